//! Data encryption keys are rotated while the volume is used: nothing is lost, nobody sees it, and a
//! pause, a killed daemon or a cut-off leaves what can be gone on with.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::process::{Answer, alive, signal};
use crate::support::sandbox::{Sandbox, path};
use crate::support::server::Site;
use crate::support::writer::{self, AckedWriters};
use crate::support::{can_mount, can_run_mariadb, until};

fn rotate(sandbox: &Sandbox, more: &[&str]) -> Answer {
    sandbox.byokfs(&[&["rotate", "dek", path(&sandbox.mnt())], more].concat())
}

fn rotation(sandbox: &Sandbox) -> Value {
    sandbox.status()["rotation"].clone()
}

/// The DEK slots of every header below `dir` that are in use.
fn slots(dir: &Path) -> Vec<Vec<u16>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            all.extend(slots(&entry.path()));
            continue;
        }
        let bytes = fs::read(entry.path()).unwrap();
        if bytes.len() < 8192 || &bytes[16..24] != b"BYOKFILE" {
            continue;
        }
        let le = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let used = (0..4).map(|i| 192 + i * 64).filter(|at| le(at + 2) == 1);
        all.push(used.map(le).collect());
    }
    all.sort();
    all
}

fn fill(sandbox: &Sandbox, files: usize) {
    for i in 0..files {
        let dir = sandbox.mnt().join(format!("dir{}", i % 3));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("file{i}")), vec![i as u8; 700_000]).unwrap();
    }
}

fn assert_filled(sandbox: &Sandbox, files: usize) {
    for i in 0..files {
        let file = sandbox.mnt().join(format!("dir{}/file{i}", i % 3));
        assert!(fs::read(file).unwrap() == vec![i as u8; 700_000], "file {i}");
    }
}

#[test]
fn all_or_some_of_the_files_get_new_keys_and_the_old_ones_are_destroyed() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted();
    fill(&sandbox, 9);
    let file = sandbox.mnt().join("dir1/file4");
    let before = fs::metadata(&file).unwrap();
    rotate(&sandbox, &[path(&sandbox.mnt().join("dir0")), path(&file), "--rate", "0B"]).ok();
    sandbox.byokfs(&["sync", path(&sandbox.mnt())]).ok();
    let (new, old) = (vec![1], vec![0]);
    let expected = [vec![old.clone(); 5], vec![new.clone(); 4]].concat();
    assert_eq!(slots(&sandbox.tree()), expected);
    let after = fs::metadata(&file).unwrap();
    let times = |of: &fs::Metadata| (of.mtime(), of.mtime_nsec(), of.ctime(), of.ctime_nsec());
    assert_eq!(times(&before), times(&after), "nobody sees it");
    assert_eq!(rotation(&sandbox)["state"], "done");
    let destroyed = sandbox.audit("DekDestroyed");
    assert_eq!(destroyed.iter().map(|event| event["keys"].as_u64().unwrap()).sum::<u64>(), 4);

    // A second later: every key that there was is older.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let shown: Value =
        serde_json::from_str(&rotate(&sandbox, &["--rate", "0B", "--json"]).ok()).unwrap();
    assert_eq!((&shown["state"], &shown["files_done"]), (&"done".into(), &9.into()));
    let expected = [vec![vec![1]; 5], vec![vec![2]; 4]].concat();
    assert_eq!(slots(&sandbox.tree()), expected);
    let ended = sandbox.audit("DekRotated");
    let succeeded = ended.iter().filter(|event| event["status"] == "Succeeded");
    assert_eq!(succeeded.count(), 2);
    assert!(!sandbox.back().join("rotation.json").exists());

    // Wrong arguments.
    rotate(&sandbox, &["/etc/passwd"]).fails(2);
    rotate(&sandbox, &[path(&sandbox.mnt().join("nothing"))]).fails(1);
    rotate(&sandbox, &["--rate", "5"]).fails(2);
    rotate(&sandbox, &["--pause"]).fails(2);
    assert_filled(&sandbox, 9);
    sandbox.umount();
    rotate(&sandbox, &[]).fails(10);
    sandbox.mount();
    assert_filled(&sandbox, 9);
}

#[test]
fn a_pause_a_killed_daemon_and_a_cut_off_are_gone_on_from() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted();
    fill(&sandbox, 6);
    rotate(&sandbox, &["--rate", "1MiB", "--no-wait"]).ok();
    let progress = |sandbox: &Sandbox| rotation(sandbox)["bytes_done"].as_u64().unwrap_or(0);
    until("the first bytes", || progress(&sandbox) > 0);
    rotate(&sandbox, &[path(&sandbox.mnt().join("dir0"))]).fails(9);
    rotate(&sandbox, &["--pause"]).ok();
    assert_eq!(rotation(&sandbox)["state"], "paused");
    assert_filled(&sandbox, 6);
    // Paused it stays, over a remount too.
    sandbox.umount();
    sandbox.mount();
    assert_eq!(rotation(&sandbox)["state"], "paused");
    rotate(&sandbox, &["--no-wait", "--rate", "512KiB"]).ok();
    until("more bytes", || progress(&sandbox) > 0);

    let daemon = sandbox.daemon();
    signal(daemon, Signal::KILL);
    until("the daemon's end and its mount's", || !alive(daemon) && !sandbox.is_mounted());
    sandbox.mount();
    until("it to go on by itself", || rotation(&sandbox)["state"] == "running");
    assert_filled(&sandbox, 6);
    until("more bytes", || progress(&sandbox) > 0);

    sandbox.revoke();
    sandbox.until_inaccessible();
    rotate(&sandbox, &[]).fails(11);
    sandbox.recover();
    // Faster from here on; it has waited for the key.
    rotate(&sandbox, &["--rate", "0B"]).ok();
    assert_eq!(rotation(&sandbox)["state"], "done");
    assert_eq!(slots(&sandbox.tree()), vec![vec![1]; 6]);
    assert_filled(&sandbox, 6);
}

#[test]
fn a_database_under_load_does_not_notice() {
    if !can_run_mariadb() {
        return;
    }
    let site = Site::running(&[], "");
    let writers = AckedWriters::start(&site.server, 4, 0);
    writers.until(100);
    for commits in [300, 500] {
        rotate(&site.sandbox, &["--rate", "0B"]).ok();
        assert_eq!(rotation(&site.sandbox)["state"], "done");
        writers.until(commits);
        std::thread::sleep(std::time::Duration::from_millis(1100));
    }
    // And slowly, beside the checks.
    rotate(&site.sandbox, &["--rate", "8MiB", "--no-wait"]).ok();
    writers.until(700);
    let acked = writers.finish();
    writer::assert_all_there(&site.server, &acked);
    assert!(site.sandbox.audit("IntegrityFailure").is_empty());
    assert!(site.sandbox.audit("MakeInaccessible").is_empty());
}
