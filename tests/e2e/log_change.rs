//! The intent log gets another size and another place, through kill -9 too, and a lost one is given
//! up only when it is lost.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::can_mount;
use crate::support::process::signal;
use crate::support::sandbox::{Sandbox, path};

fn capacity(sandbox: &Sandbox) -> u64 {
    sandbox.status()["log"]["capacity"].as_u64().unwrap()
}

#[test]
fn it_is_resized_moved_and_brought_back() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted();
    let (back, fast) = (sandbox.back(), sandbox.path("fast"));
    fs::create_dir(&fast).unwrap();
    fs::write(sandbox.mnt().join("file"), "content").unwrap();
    sandbox.byokfs(&["log", "resize", path(&back), "64MiB"]).fails(9);
    // What a killed daemon leaves in the log goes home first.
    sandbox.kill_daemon();
    sandbox.byokfs(&["log", "resize", path(&back), "64MiB"]).ok();
    sandbox.mount();
    assert_eq!(fs::read_to_string(sandbox.mnt().join("file")).unwrap(), "content");
    let large = capacity(&sandbox);
    sandbox.umount();
    sandbox.byokfs(&["log", "move", path(&back), path(&fast)]).ok();
    assert_eq!(fs::read_link(back.join("log")).unwrap(), fast);
    sandbox.mount();
    fs::write(sandbox.mnt().join("file"), "newer").unwrap();
    sandbox.kill_daemon();
    sandbox.mount();
    assert_eq!(fs::read_to_string(sandbox.mnt().join("file")).unwrap(), "newer");
    assert_eq!(capacity(&sandbox), large);
    sandbox.umount();
    sandbox.byokfs(&["log", "move", path(&back), "/nowhere"]).fails(2);
    sandbox.byokfs(&["log", "move", path(&back), path(&back.join("tree"))]).fails(2);
    sandbox.byokfs(&["log", "resize", path(&back), "64"]).fails(2);
    let small = sandbox.byokfs(&["log", "resize", path(&back), "64KiB"]).fails(2);
    assert!(small.contains("at least 8MiB"), "{small}");

    // Killed anywhere, the volume mounts, and the next one does it.
    for round in 0..8u64 {
        let to = if round % 2 == 0 { &back } else { &fast };
        let mut moving = sandbox
            .command()
            .args(["log", "move", path(&back), path(to)])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(60 + 60 * round));
        signal(moving.id() as i32, Signal::KILL);
        moving.wait().unwrap();
        sandbox.mount();
        assert_eq!(fs::read_to_string(sandbox.mnt().join("file")).unwrap(), "newer");
        sandbox.umount();
        sandbox.byokfs(&["log", "move", path(&back), path(to)]).ok();
    }
    let changes = sandbox.audit("LogChanged");
    assert!(changes.iter().any(|event| event["status"] == "Succeeded"));
}

#[test]
fn a_lost_log_is_refused_until_it_is_given_up() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted();
    let back = sandbox.back();
    fs::write(sandbox.mnt().join("old"), "at home").unwrap();
    sandbox.byokfs(&["sync", path(&sandbox.mnt())]).ok();
    sandbox.umount();
    sandbox.byokfs(&["log", "discard", path(&back)]).fails(9);
    fs::remove_file(back.join("log.hot")).unwrap();
    let refused = sandbox.try_mount().fails(6);
    assert!(refused.contains("log discard"), "{refused}");
    sandbox.enable_key(false);
    sandbox.byokfs(&["log", "discard", path(&back)]).fails(7);
    sandbox.enable_key(true);
    sandbox.byokfs(&["log", "discard", path(&back), "--size", "16MiB"]).ok();
    sandbox.mount();
    assert_eq!(fs::read_to_string(sandbox.mnt().join("old")).unwrap(), "at home");
}
