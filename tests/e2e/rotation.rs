//! The KEK is rotated: online and not, to a version, a key, by itself, and through kill -9. What
//! is written meanwhile is all there.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::process::Signal;

use crate::support::process::{alive, signal};
use crate::support::sandbox::{KEY, Sandbox, path};
use crate::support::server::Site;
use crate::support::writer::{self, AckedWriters};
use crate::support::{can_mount, can_run_mariadb, until};

/// A new version, created in another second than the one before: Key Vault tells no finer.
fn new_version(sandbox: &Sandbox) -> String {
    std::thread::sleep(Duration::from_millis(1100));
    sandbox.vault(&["key", "rotate", "--name", KEY]).trim().to_owned()
}

fn rotate(sandbox: &Sandbox, target: &Path, more: &[&str]) -> String {
    let args = [&["rotate", "kek", path(target)], more].concat();
    sandbox.byokfs(&args).ok()
}

fn disable(sandbox: &Sandbox, version: &str) {
    let version = version.rsplit('/').next().unwrap();
    let args = ["key", "set-attributes", "--name", KEY, "--version", version, "--enabled", "false"];
    sandbox.vault(&args);
}

#[test]
fn a_rotation_under_writes_loses_nothing_and_the_old_version_can_go() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted_with("follow_versions = false\n");
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for writer in 0..3 {
            let (sandbox, stop, written) = (&sandbox, &stop, &written);
            scope.spawn(move || {
                let mut file = File::create(sandbox.mnt().join(format!("file{writer}"))).unwrap();
                for line in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return file.sync_all().unwrap();
                    }
                    writeln!(file, "writer {writer} line {line}").unwrap();
                    if line % 16 == 0 {
                        file.sync_data().unwrap();
                    }
                    written.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..3 {
            let before = sandbox.kek_in_use();
            let seen = written.load(Ordering::Relaxed);
            let version = new_version(&sandbox);
            rotate(&sandbox, &sandbox.mnt(), &[]);
            assert_eq!(sandbox.kek_in_use(), version);
            disable(&sandbox, &before);
            until("writes go on", || written.load(Ordering::Relaxed) > seen + 10);
        }
        // Several probes later nothing has been cut off.
        std::thread::sleep(Duration::from_secs(5));
        assert_eq!(sandbox.state(), "Available");
        stop.store(true, Ordering::Relaxed);
    });
    assert!(sandbox.audit("MakeInaccessible").is_empty());
    let mut sandbox = sandbox;
    sandbox.umount();
    sandbox.mount();
    let mut lines = 0;
    for writer in 0..3 {
        let text = fs::read_to_string(sandbox.mnt().join(format!("file{writer}"))).unwrap();
        for (number, line) in text.lines().enumerate() {
            assert_eq!(line, format!("writer {writer} line {number}"));
            lines += 1;
        }
    }
    assert_eq!(lines, written.load(Ordering::Relaxed));
    let events = sandbox.audit("KekRotated");
    let succeeded = events.iter().filter(|event| event["status"] == "Succeeded");
    assert_eq!(succeeded.count(), 3);
    assert_eq!(events[1]["to"], events[2]["from"]);
}

#[test]
fn an_unmounted_volume_is_rotated_to_another_key() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted();
    fs::write(sandbox.mnt().join("file"), "content").unwrap();
    let first = sandbox.kek_in_use();
    // The daemon has the volume: nobody else may.
    sandbox.umount();
    sandbox.create_key("other", &["--kty", "RSA", "--size", "2048"]);
    let out = rotate(&sandbox, &sandbox.back(), &["--to", &sandbox.key_url("other"), "--json"]);
    let out: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&out["from"], &out["changed"]), (&first.clone().into(), &true.into()));
    assert_eq!(out["follows_new_versions"], true);
    // Again: nothing to do.
    let again = rotate(&sandbox, &sandbox.back(), &[]);
    assert!(again.starts_with("already "), "{again}");
    sandbox.vault(&["key", "delete", "--name", KEY]);
    sandbox.mount();
    assert_eq!(fs::read_to_string(sandbox.mnt().join("file")).unwrap(), "content");
    assert!(sandbox.kek_in_use().contains("/keys/other/"));

    // A key that does not meet the requirements, one that is not there, an unknown algorithm.
    sandbox.create_key("off", &["--kty", "RSA", "--size", "2048", "--enabled", "false"]);
    let kek = sandbox.kek_in_use();
    for (to, code) in [("off", 7), ("none", 7)] {
        let to = sandbox.key_url(to);
        sandbox.byokfs(&["rotate", "kek", path(&sandbox.mnt()), "--to", &to]).fails(code);
    }
    let mnt = sandbox.mnt();
    let args = ["rotate", "kek", path(&mnt), "--algorithm", "ROT13"];
    assert!(sandbox.byokfs(&args).fails(2).contains("RSA-OAEP-256"));
    assert_eq!((sandbox.kek_in_use(), sandbox.state()), (kek, "Available".into()));

    // What is still needed, and that it is not forgotten.
    let keys = sandbox.needed_keys(&sandbox.back());
    let roles: Vec<_> = keys.iter().map(|(_, role)| role.as_str()).collect();
    assert_eq!(roles, ["current", "previous"], "{keys:?}");
    assert_eq!(keys[1].0, first);
    for (kid, _) in &keys {
        let args = ["forget-key", path(&mnt), kid, "--no-copies"];
        assert!(sandbox.byokfs(&args).fails(9).contains("still needed"));
    }
    rotate(&sandbox, &sandbox.mnt(), &["--algorithm", "RSA-OAEP"]);
    let args = ["forget-key", path(&mnt), &first];
    assert!(sandbox.byokfs(&args).fails(9).contains("--no-copies"));
    sandbox.byokfs(&[&args[..], &["--no-copies"]].concat()).ok();
    assert!(sandbox.needed_keys(&sandbox.back()).iter().all(|(kid, _)| *kid != first));
    assert_eq!(sandbox.audit("KeyForgotten").len(), 1);
}

#[test]
fn versions_of_a_key_named_without_one_are_followed_by_themselves() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted();
    let first = sandbox.kek_in_use();
    let version = new_version(&sandbox);
    until("the new version to be followed", || sandbox.kek_in_use() == version);
    let events = sandbox.audit("KekRotated");
    let done = events.iter().find(|event| event["status"] == "Succeeded").unwrap();
    assert_eq!((&done["from"], &done["to"]), (&first.clone().into(), &version.clone().into()));
    assert_eq!(done["followed"], true);
    // Pinned to a version, it is not.
    rotate(&sandbox, &sandbox.mnt(), &["--to", &version]);
    new_version(&sandbox);
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(sandbox.kek_in_use(), version);
    disable(&sandbox, &first);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(sandbox.state(), "Available");
    disable(&sandbox, &version);
    sandbox.until_inaccessible();
    // The new version does not help: the one in use was taken away.
    sandbox.byokfs(&["rotate", "kek", path(&sandbox.mnt())]).fails(11);
    sandbox.byokfs(&["revalidate", path(&sandbox.mnt())]).fails(7);
}

/// The daemon is killed somewhere in a rotation, again and again: it always mounts, with one of
/// the two versions, and has everything.
#[test]
fn a_daemon_killed_while_it_rotates_leaves_a_volume_that_mounts() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted();
    sandbox.create_key("other", &["--kty", "RSA", "--size", "2048"]);
    let keys = [sandbox.key_url(KEY), sandbox.key_url("other")];
    for round in 0..6u64 {
        fs::write(sandbox.mnt().join(format!("file{round}")), "content").unwrap();
        let daemon = sandbox.daemon();
        let to = &keys[(round as usize + 1) % 2];
        let mut rotation = sandbox
            .command()
            .args(["rotate", "kek", path(&sandbox.mnt()), "--to", to])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(15 + 25 * round));
        signal(daemon, Signal::KILL);
        rotation.wait().unwrap();
        until("the daemon's end and its mount's", || !alive(daemon) && !sandbox.is_mounted());
        sandbox.mount();
        assert_eq!(sandbox.state(), "Available");
        for file in 0..=round {
            let file = sandbox.mnt().join(format!("file{file}"));
            assert_eq!(fs::read_to_string(file).unwrap(), "content");
        }
    }
}

#[test]
fn a_database_under_load_does_not_notice() {
    if !can_run_mariadb() {
        return;
    }
    let site = Site::running(&[], "");
    let writers = AckedWriters::start(&site.server, 4, 0);
    writers.until(100);
    for commits in [300, 500, 700] {
        let version = new_version(&site.sandbox);
        rotate(&site.sandbox, &site.sandbox.mnt(), &[]);
        assert_eq!(site.sandbox.kek_in_use(), version);
        writers.until(commits);
    }
    let acked = writers.finish();
    writer::assert_all_there(&site.server, &acked);
    assert!(site.sandbox.audit("MakeInaccessible").is_empty());
}
