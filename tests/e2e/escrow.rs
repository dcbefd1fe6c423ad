//! The key is backed up before it is first used, and brings the volume back after a purge.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::Value;

use crate::support::can_mount;
use crate::support::process::run;
use crate::support::sandbox::{IDENTITY, KEY, Sandbox, path};

fn backup_row(sandbox: &Sandbox, target: &str) -> (String, String) {
    let answer = sandbox.byokfs(&["check-key", target, "--json"]);
    let table: Value = serde_json::from_str(&answer.out).unwrap_or_else(|_| panic!("{answer}"));
    let rows = table["rows"].as_array().unwrap();
    let row = rows.iter().find(|row| row["requirement"] == "key backup").unwrap();
    let text = |field: &str| row[field].as_str().unwrap().to_owned();
    (text("verdict"), text("found"))
}

#[test]
fn a_backup_made_at_init_brings_a_purged_key_back() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::bare_with(&["--no-purge-protection"]);
    let (back, file) = (sandbox.back(), sandbox.path("config/kek.backup"));
    let init = |file: &str| {
        sandbox.byokfs(&["init", path(&back), "--kek", &sandbox.kek(), "--escrow", file])
    };
    // Without the permission nothing is made, and it says what to do.
    let message = init(path(&file)).fails(7);
    assert!(message.contains("--made-elsewhere"), "{message}");
    assert!(!file.exists() && fs::read_dir(&back).unwrap().next().is_none());
    sandbox.vault(&["grant", "--identity", IDENTITY, "--key-permissions", "backup"]);
    // Not in the volume itself.
    init(path(&back.join("kek.backup"))).fails(2);
    let answer = init(path(&file));
    assert!(!answer.err.contains("no backup"), "{answer}");
    answer.ok();
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(backup_row(&sandbox, path(&back)).0, "Ok");

    sandbox.mount();
    fs::write(sandbox.mnt().join("file"), "content").unwrap();
    sandbox.vault(&["key", "delete", "--name", KEY]);
    sandbox.vault(&["key", "purge", "--name", KEY]);
    sandbox.until_inaccessible();
    sandbox.byokfs(&["revalidate", path(&sandbox.mnt())]).fails(7);
    sandbox.vault(&["key", "restore", "--file", path(&file)]);
    sandbox.revalidate();
    assert_eq!(fs::read_to_string(sandbox.mnt().join("file")).unwrap(), "content");
}

#[test]
fn a_missing_backup_is_told_until_it_is_made_or_noted() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::bare();
    let answer = sandbox.init();
    assert!(answer.err.contains("no backup of the key is known"), "{answer}");
    answer.ok();
    let back = sandbox.back();
    let escrow = |more: &[&str]| sandbox.byokfs(&[&["escrow", path(&back)], more].concat());
    assert_eq!(backup_row(&sandbox, path(&back)), ("Warn".into(), "none known".into()));
    sandbox.byokfs(&["check-key", path(&back), "--strict"]).fails(7);
    let file = sandbox.path("config/kek.backup");
    escrow(&["--file", path(&file)]).fails(7);
    assert!(!file.exists());
    escrow(&["--made-elsewhere"]).ok();
    assert_eq!(backup_row(&sandbox, path(&back)).0, "Ok");
    // A new version is in no old backup.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    sandbox.vault(&["key", "rotate", "--name", KEY]);
    sandbox.byokfs(&["rotate", "kek", path(&back)]).ok();
    let (verdict, found) = backup_row(&sandbox, path(&back));
    assert_eq!(verdict, "Warn");
    assert!(found.contains("earlier version"), "{found}");
    sandbox.vault(&["grant", "--identity", IDENTITY, "--key-permissions", "backup"]);
    escrow(&["--file", path(&file)]).ok();
    assert_eq!(backup_row(&sandbox, path(&back)).0, "Ok");
    // What is there is not written over.
    escrow(&["--file", path(&file)]).fails(1);
    assert!(file.exists());
}

/// Somebody who can write to the disk has another key noted as the one that is backed up.
#[test]
fn a_backup_of_a_key_that_is_not_this_volume_s_is_not_noted() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::bare();
    sandbox.init().ok();
    let (back, other, file) =
        (sandbox.back(), sandbox.path("other"), sandbox.path("config/kek.backup"));
    let envelope = back.join("envelope.json");
    let old = fs::read(&envelope).unwrap();
    sandbox.create_key("second", &["--kty", "RSA", "--size", "2048"]);
    let to = sandbox.key_url("second");
    sandbox.byokfs(&["rotate", "kek", path(&back), "--to", &to]).ok();
    sandbox.byokfs(&["init", path(&other), "--kek", &to]).ok();
    sandbox.vault(&["grant", "--identity", IDENTITY, "--key-permissions", "backup"]);
    let current = fs::read(&envelope).unwrap();
    let refused = |volume: &Path, code, why: &str| {
        for more in [&["--made-elsewhere"][..], &["--file", path(&file)]] {
            let message = sandbox.byokfs(&[&["escrow", path(volume)], more].concat()).fails(code);
            assert!(message.contains(why), "{message}");
        }
        assert!(!file.exists());
    };
    fs::write(&envelope, &old).unwrap();
    refused(&back, 7, "replaced the envelope");
    fs::copy(other.join("envelope.json"), &envelope).unwrap();
    refused(&back, 6, "the envelope belongs to volume");
    fs::write(&envelope, &current).unwrap();
    let copy = sandbox.path("copy");
    run("cp", &["-a", path(&back), path(&copy)]);
    refused(&copy, 7, "never opened here");
    assert_eq!(backup_row(&sandbox, path(&back)), ("Warn".into(), "none known".into()));
    sandbox.byokfs(&["escrow", path(&back), "--file", path(&file)]).ok();
    assert_eq!(backup_row(&sandbox, path(&back)).0, "Ok");
}
