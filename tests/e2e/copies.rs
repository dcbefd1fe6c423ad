//! Copies of a volume: restored, or made a replica of, with an identity of their own and then a key
//! of their own. One source, two more "hosts", each a configuration with its identity.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::process::{Answer, run};
use crate::support::sandbox::{KEY, Sandbox, mounted, path};
use crate::support::{can_mount, until};

const PERMISSIONS: &str = "get,list,wrapKey,unwrapKey";

/// Another configuration, with another identity, and a copy of the source's backing directory.
struct Host<'a> {
    sandbox: &'a Sandbox,
    name: &'static str,
}

impl<'a> Host<'a> {
    fn new(sandbox: &'a Sandbox, name: &'static str) -> Host<'a> {
        let host = Host { sandbox, name };
        for dir in ["config", "run", "mnt"] {
            fs::create_dir_all(host.path(dir)).unwrap();
        }
        let header = host.path("config/identity.header");
        sandbox.vault(&["identity", "create", name, "--header-file", path(&header)]);
        let config = fs::read_to_string(sandbox.path("config/byokfs.toml")).unwrap();
        let own = [
            (sandbox.path("config"), host.path("config")),
            (sandbox.path("run"), host.path("run")),
            (sandbox.path("log/audit.jsonl"), host.path("audit.jsonl")),
        ];
        let config = own.iter().fold(config, |config, (from, to)| {
            config.replace(&format!("\"{}", path(from)), &format!("\"{}", path(to)))
        });
        fs::write(host.path("config/byokfs.toml"), config).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.sandbox.path(self.name).join(name)
    }

    fn back(&self) -> PathBuf {
        self.path("back")
    }

    fn mnt(&self) -> PathBuf {
        self.path("mnt")
    }

    /// The copy, as a backup tool makes it, and the pin, which the operator brings along.
    fn restore(&self, from: &Path) {
        run("cp", &["-a", path(from), path(&self.back())]);
        run(
            "cp",
            &["-a", path(&self.sandbox.path("config/volumes.d")), path(&self.path("config"))],
        );
    }

    fn byokfs(&self, args: &[&str]) -> Answer {
        let config = self.path("config/byokfs.toml");
        Answer::of(self.sandbox.command().env("BYOKFS_CONFIG", config).args(args))
    }

    fn grant(&self, permissions: &str) {
        let args = ["grant", "--identity", self.name, "--key-permissions", permissions];
        self.sandbox.vault(&args);
    }

    fn status(&self) -> Value {
        let answer = self.byokfs(&["status", path(&self.mnt()), "--json"]);
        serde_json::from_str(&answer.out).unwrap_or_else(|error| panic!("{error}: {answer}"))
    }

    fn reason(&self) -> String {
        self.status()["reason"].as_str().unwrap_or_default().to_owned()
    }

    fn content(&self) -> std::io::Result<String> {
        fs::read_to_string(self.mnt().join("file"))
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        if mounted(&self.mnt()) {
            let _ = self.byokfs(&["umount", path(&self.mnt())]);
        }
    }
}

#[test]
fn a_restored_copy_opens_with_its_own_identity_and_gets_its_own_key() {
    if !can_mount() {
        return;
    }
    let source = Sandbox::mounted();
    fs::write(source.mnt().join("file"), "from the source").unwrap();
    source.byokfs(&["sync", path(&source.mnt())]).ok();
    let first = source.kek_in_use();
    let host = Host::new(&source, "restored");
    host.restore(&source.back());

    // It mounts, shut, with no question asked to the key service.
    let answer = host.byokfs(&["mount", path(&host.back()), path(&host.mnt())]);
    assert!(answer.err.contains("Inaccessible") && answer.err.contains("revalidate"), "{answer}");
    answer.ok();
    assert_eq!(host.reason(), "NotConfirmed");
    assert_eq!(host.content().unwrap_err().raw_os_error(), Some(5));
    // Its identity may not use the source's key yet.
    host.byokfs(&["revalidate", path(&host.mnt())]).fails(7);
    assert_eq!(host.reason(), "NotConfirmed");
    host.grant(PERMISSIONS);
    host.byokfs(&["revalidate", path(&host.mnt())]).ok();
    assert_eq!(host.content().unwrap(), "from the source");

    // Once confirmed it mounts by itself.
    host.byokfs(&["umount", path(&host.mnt())]).ok();
    host.byokfs(&["mount", path(&host.back()), path(&host.mnt())]).ok();
    assert_eq!(host.content().unwrap(), "from the source");

    // A key of its own, while it serves.
    source.create_key("own", &["--kty", "RSA", "--size", "2048"]);
    host.byokfs(&["rekey", path(&host.mnt()), "--to", &source.key_url("own")]).ok();
    let keys = source.needed_keys(&host.back());
    assert_eq!(keys.len(), 1, "{keys:?}");
    assert!(keys[0].0.contains("/keys/own/"));
    assert!(!host.back().join("envelope.prev.json").exists());

    // From here on each has its own fate.
    source.enable_key(false);
    source.until_inaccessible();
    assert_eq!(host.status()["state"], "Available");
    fs::write(host.mnt().join("file"), "of its own").unwrap();
    source.enable_key(true);
    source.vault(&["key", "set-attributes", "--name", "own", "--enabled", "false"]);
    until("the copy's own cut-off", || host.reason() == "KeyDisabled");
    source.revalidate();
    assert_eq!(fs::read_to_string(source.mnt().join("file")).unwrap(), "from the source");
    assert_eq!(source.kek_in_use(), first);
}

#[test]
fn a_copy_that_cannot_be_recovered_stays_shut_until_it_can() {
    if !can_mount() {
        return;
    }
    let source = Sandbox::mounted();
    fs::write(source.mnt().join("file"), "from the source").unwrap();
    source.kill_daemon();
    until("the guard to unmount", || !source.is_mounted());
    let host = Host::new(&source, "restored");
    host.restore(&source.back());
    host.grant(PERMISSIONS);
    // Somebody has copied a file beside itself: to which of the two the log belongs is not clear.
    let tree = host.back().join("tree");
    let file = fs::read_dir(&tree).unwrap().next().unwrap().unwrap().path();
    let twin = tree.join("twin");
    run("cp", &["-a", path(&file), path(&twin)]);

    host.byokfs(&["mount", path(&host.back()), path(&host.mnt())]).ok();
    let answer = host.byokfs(&["revalidate", path(&host.mnt())]);
    assert!(answer.err.contains("copies of one file"), "{answer}");
    let status = host.status();
    assert_eq!((&status["state"], host.reason()), (&"Inaccessible".into(), "NotConfirmed".into()));
    assert_eq!(host.content().unwrap_err().raw_os_error(), Some(5));
    assert!(fs::read_dir(host.mnt()).is_err(), "without a recovery nothing is served");

    fs::remove_file(twin).unwrap();
    host.byokfs(&["revalidate", path(&host.mnt())]).ok();
    assert_eq!(host.content().unwrap(), "from the source");
}

#[test]
fn a_replica_gets_its_own_key_before_it_is_ever_mounted() {
    if !can_mount() {
        return;
    }
    let source = Sandbox::mounted();
    fs::write(source.mnt().join("file"), "from the source").unwrap();
    source.byokfs(&["sync", path(&source.mnt())]).ok();
    source.create_key("own", &["--kty", "RSA", "--size", "2048"]);
    let own = source.key_url("own");
    let host = Host::new(&source, "replica");
    host.restore(&source.back());
    let rekey = || host.byokfs(&["rekey", path(&host.back()), "--to", &own]);
    rekey().fails(7);
    host.grant(PERMISSIONS);
    // A rotation is not a confirmation.
    let message = host.byokfs(&["rotate", "kek", path(&host.back()), "--to", &own]).fails(7);
    assert!(message.contains("revalidate"), "{message}");
    rekey().ok();
    // The source's key is of no use for it any more, and need not be there.
    source.vault(&["key", "delete", "--name", KEY]);
    host.byokfs(&["mount", path(&host.back()), path(&host.mnt())]).ok();
    assert_eq!(host.content().unwrap(), "from the source");
    source.vault(&["key", "recover", "--name", KEY]);
}

#[test]
fn an_old_copy_opens_with_the_version_that_is_recorded_in_it() {
    if !can_mount() {
        return;
    }
    let mut source = Sandbox::mounted_with("follow_versions = false\n");
    fs::write(source.mnt().join("file"), "before").unwrap();
    let old = source.kek_in_use();
    source.umount();
    let copy = source.path("backup");
    run("cp", &["-a", path(&source.back()), path(&copy)]);
    source.mount();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    source.vault(&["key", "rotate", "--name", KEY]);
    source.byokfs(&["rotate", "kek", path(&source.mnt())]).ok();
    let new = source.kek_in_use();
    fs::write(source.mnt().join("file"), "after").unwrap();
    source.umount();
    assert_eq!(source.needed_keys(&source.back())[1], (old.clone(), "previous".into()));

    // Restored in place: the host knows another key version, so a person has to say so.
    fs::rename(source.back(), source.path("newer")).unwrap();
    fs::rename(&copy, source.back()).unwrap();
    source.mount();
    assert_eq!(source.status()["reason"], "NotConfirmed");
    let message = source.byokfs(&["revalidate", path(&source.mnt())]).fails(7);
    assert!(message.contains(&old) && message.contains(&new), "{message}");
    source.byokfs(&["revalidate", path(&source.mnt()), "--accept-key", &new]).fails(7);
    source.byokfs(&["revalidate", path(&source.mnt()), "--accept-key", &old]).ok();
    assert_eq!(fs::read_to_string(source.mnt().join("file")).unwrap(), "before");

    // Its version gone, it is lost until that is back; the newer one does not help.
    let version = old.rsplit('/').next().unwrap();
    let set = |enabled| {
        let of = ["key", "set-attributes", "--name", KEY, "--version", version];
        source.vault(&[&of[..], &["--enabled", enabled]].concat());
    };
    set("false");
    source.until_inaccessible();
    set("true");
    source.revalidate();
}

/// Somebody who can write to the disk puts the old envelope back, whose key version is still
/// enabled for old copies: the volume must not open with it, now that the new one is revoked.
#[test]
fn an_old_envelope_does_not_get_around_a_revocation() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted_with("follow_versions = false\n");
    let envelope = sandbox.back().join("envelope.json");
    let old = fs::read(&envelope).unwrap();
    sandbox.create_key("other", &["--kty", "RSA", "--size", "2048"]);
    let to = sandbox.key_url("other");
    sandbox.byokfs(&["rotate", "kek", path(&sandbox.mnt()), "--to", &to]).ok();
    sandbox.vault(&["key", "set-attributes", "--name", "other", "--enabled", "false"]);
    sandbox.until_inaccessible();
    fs::write(&envelope, &old).unwrap();
    let message = sandbox.byokfs(&["revalidate", path(&sandbox.mnt())]).fails(7);
    assert!(message.contains("replaced the envelope"), "{message}");
    sandbox.umount();
    // Nor by giving it another key: the old version would unwrap it.
    sandbox.create_key("third", &["--kty", "RSA", "--size", "2048"]);
    let third = sandbox.key_url("third");
    let message = sandbox.byokfs(&["rekey", path(&sandbox.back()), "--to", &third]).fails(7);
    assert!(message.contains("replaced the envelope"), "{message}");
    assert_eq!(fs::read(&envelope).unwrap(), old);
    sandbox.mount();
    assert_eq!(sandbox.status()["reason"], "NotConfirmed");
    assert!(fs::read_dir(sandbox.mnt()).is_err());
}

/// Nor does it take the place of the one that is watched while the volume is Available.
#[test]
fn an_old_envelope_is_not_watched_when_a_rotation_fails() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted_with("follow_versions = false\n");
    let envelope = sandbox.back().join("envelope.json");
    let old = fs::read(&envelope).unwrap();
    sandbox.create_key("other", &["--kty", "RSA", "--size", "2048"]);
    let to = sandbox.key_url("other");
    sandbox.byokfs(&["rotate", "kek", path(&sandbox.mnt()), "--to", &to]).ok();
    let watched = sandbox.status()["kek"].clone();
    fs::write(&envelope, &old).unwrap();
    let message = sandbox.byokfs(&["rotate", "kek", path(&sandbox.mnt())]).fails(7);
    assert!(message.contains("replaced the envelope"), "{message}");
    assert_eq!(sandbox.status()["kek"], watched);
    sandbox.vault(&["key", "set-attributes", "--name", "other", "--enabled", "false"]);
    sandbox.until_inaccessible();
}
