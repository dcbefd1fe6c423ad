//! A volume is given another volume key, through kill -9 too.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::can_mount;
use crate::support::process::signal;
use crate::support::sandbox::{Sandbox, path};

fn fill(sandbox: &Sandbox) {
    for i in 0..60 {
        let dir = sandbox.mnt().join(format!("dir{}", i % 4));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("file{i}")), vec![i as u8; 30_000]).unwrap();
    }
    std::os::unix::fs::symlink("some target", sandbox.mnt().join("link")).unwrap();
    let long = "n".repeat(250);
    fs::write(sandbox.mnt().join(long), "a long name").unwrap();
}

fn assert_filled(sandbox: &Sandbox) {
    for i in 0..60 {
        let file = sandbox.mnt().join(format!("dir{}/file{i}", i % 4));
        assert!(fs::read(file).unwrap() == vec![i as u8; 30_000], "file {i}");
    }
    let link = fs::read_link(sandbox.mnt().join("link")).unwrap();
    assert_eq!(link.to_str(), Some("some target"));
    assert_eq!(fs::read_to_string(sandbox.mnt().join("n".repeat(250))).unwrap(), "a long name");
}

#[test]
fn everything_is_there_and_old_envelopes_open_nothing() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted();
    fill(&sandbox);
    let rotate = ["rotate", "volume", path(&sandbox.back())].map(str::to_owned);
    let rotate: Vec<&str> = rotate.iter().map(String::as_str).collect();
    sandbox.byokfs(&rotate).fails(9);
    sandbox.umount();
    let envelope = sandbox.back().join("envelope.json");
    let old = fs::read(&envelope).unwrap();
    let answer = sandbox.byokfs(&rotate).ok();
    assert!(answer.contains("volume key 2 in the place of 1, in 61 files"), "{answer}");
    assert!(!sandbox.back().join("envelope.prev.json").exists());
    let new = fs::read(&envelope).unwrap();
    assert!(!String::from_utf8(new.clone()).unwrap().contains("retiring"));
    sandbox.mount();
    assert_filled(&sandbox);
    sandbox.umount();

    // Put back, the old envelope is refused: its volume key is not the one that is pinned any more.
    fs::write(&envelope, old).unwrap();
    assert!(sandbox.try_mount().fails(6).contains("pin"));
    fs::write(&envelope, new).unwrap();

    // KEK and DEKs rotate as before, and so does the volume key, again.
    sandbox.byokfs(&rotate).ok();
    sandbox.vault(&["key", "rotate", "--name", "kek"]);
    sandbox.byokfs(&["rotate", "kek", path(&sandbox.back())]).ok();
    sandbox.mount();
    assert_filled(&sandbox);
    sandbox.byokfs(&["rotate", "dek", path(&sandbox.mnt()), "--rate", "0B"]).ok();
    assert_filled(&sandbox);
    let events = sandbox.audit("VolumeKeyRotated");
    let succeeded: Vec<_> = events.iter().filter(|e| e["status"] == "Succeeded").collect();
    assert_eq!(succeeded.len(), 2);
    assert_eq!((&succeeded[1]["from"], &succeeded[1]["to"]), (&2.into(), &3.into()));

    // Without the key, nothing.
    sandbox.umount();
    sandbox.enable_key(false);
    let before = fs::read(&envelope).unwrap();
    sandbox.byokfs(&rotate).fails(7);
    assert_eq!(fs::read(&envelope).unwrap(), before);
    sandbox.byokfs(&["rotate", "volume", "/nowhere"]).fails(1);
    sandbox.byokfs(&["rotate", "volume", "/etc"]).fails(4);
}

#[test]
fn killed_before_its_last_step_it_is_finished_by_the_next_or_by_a_mount() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted();
    fill(&sandbox);
    sandbox.umount();
    let mut pins = fs::read_dir(sandbox.path("config/volumes.d")).unwrap();
    let pin = pins.next().unwrap().unwrap().path();
    let fingerprint = || {
        let text = fs::read_to_string(&pin).unwrap();
        text.lines().find(|line| line.starts_with("fingerprint =")).unwrap().to_owned()
    };
    // The envelope has forgotten the old key, the pin not yet, nor has the envelope before it.
    let previous = sandbox.back().join("envelope.prev.json");
    let rotate_all_but_the_pin = |sandbox: &Sandbox| {
        let before = fs::read_to_string(&pin).unwrap();
        let old = fingerprint();
        let envelope = fs::read(sandbox.back().join("envelope.json")).unwrap();
        sandbox.byokfs(&["rotate", "volume", path(&sandbox.back())]).ok();
        let next = fingerprint().replace("fingerprint =", "fingerprint_next =");
        fs::write(&pin, before.replace(&old, &format!("{old}\n{next}"))).unwrap();
        fs::write(&previous, envelope).unwrap();
    };

    rotate_all_but_the_pin(&sandbox);
    sandbox.byokfs(&["rotate", "volume", path(&sandbox.back())]).ok();
    assert!(!previous.exists());
    sandbox.mount();
    assert_filled(&sandbox);
    sandbox.umount();

    rotate_all_but_the_pin(&sandbox);
    sandbox.mount();
    assert_filled(&sandbox);
    assert!(!previous.exists());
    assert!(!fs::read_to_string(&pin).unwrap().contains("fingerprint_next"));
    sandbox.umount();

    // After another rotation the predecessor is that one's.
    rotate_all_but_the_pin(&sandbox);
    sandbox.vault(&["key", "rotate", "--name", "kek"]);
    sandbox.byokfs(&["rotate", "kek", path(&sandbox.back())]).ok();
    sandbox.mount();
    assert_filled(&sandbox);
    assert!(previous.exists());
    assert!(!fs::read_to_string(&pin).unwrap().contains("fingerprint_next"));
    sandbox.umount();
}

#[test]
fn killed_at_any_moment_it_is_finished_by_the_next() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted();
    fill(&sandbox);
    sandbox.umount();
    let mut resumed = 0;
    for round in 0..12u64 {
        let mut rotation = sandbox
            .command()
            .args(["rotate", "volume", path(&sandbox.back())])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(20 + 30 * round));
        signal(rotation.id() as i32, Signal::KILL);
        rotation.wait().unwrap();
        let text = fs::read_to_string(sandbox.back().join("envelope.json")).unwrap();
        let unfinished = text.contains("retiring");
        // It mounts as it is, and a KEK is not rotated meanwhile.
        if round % 2 == 0 {
            sandbox.mount();
            assert_filled(&sandbox);
            sandbox.umount();
        }
        if unfinished {
            resumed += 1;
            let back = sandbox.back();
            let checked = sandbox.byokfs(&["fsck", "--json", path(&back)]);
            assert!(checked.out.contains("\"retiring-key\""), "{checked}");
            sandbox
                .byokfs(&["rotate", "kek", path(&sandbox.back()), "--algorithm", "RSA-OAEP"])
                .fails(9);
            let back = sandbox.back();
            let args = ["rotate", "volume", path(&back), "--json"];
            let done: serde_json::Value =
                serde_json::from_str(&sandbox.byokfs(&args).ok()).unwrap();
            assert_eq!(done["resumed"], true);
        }
    }
    sandbox.byokfs(&["rotate", "volume", path(&sandbox.back())]).ok();
    sandbox.mount();
    assert_filled(&sandbox);
    println!("{resumed} of 12 were killed in the middle");
}
