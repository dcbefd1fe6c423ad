//! Golden volumes: what was written in a format must be readable as long as that format is.
//!
//! Each is an archive of a backing directory, made once by [`make`] and never again: a change of
//! the code that makes one of these tests fail changes the format, and needs a number of its own.
//! The volume keys are bytes of one value each.

mod content;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use byokfs::backing::Backing;
use byokfs::backing::linux::LinuxBacking;
use byokfs::crypto::secret::Secret;
use byokfs::key::clock::BootTime;
use byokfs::key::gate::{Gate, Keyring};
use byokfs::store::{FEATURE_PLAINTEXT_NAMES, FormatOptions, Store};
use byokfs::vfs::audit::LogOnly;
use byokfs::vfs::{Filesystem, FilesystemOptions};

/// Where [`make`] puts new archives; it does nothing without.
const MAKE: &str = "BYOKFS_MAKE_GOLDEN";

fn secret(byte: u8) -> Secret<32> {
    Secret::new_with(|key| key.fill(byte)).unwrap()
}

fn first() -> Keyring {
    Keyring::new(1, secret(1))
}

fn both() -> Keyring {
    Keyring::new(2, secret(2)).with_retiring(1, secret(1))
}

struct Opened {
    fs: Arc<Filesystem>,
    store: Arc<Store>,
}

fn open(back: &Path, keyring: &Keyring, read_only: bool) -> Opened {
    let backing: Arc<dyn Backing> = LinuxBacking::open(back).unwrap();
    let gate = Gate::new();
    let store = Store::open(Arc::clone(&backing), Arc::clone(&gate), read_only).unwrap();
    store.start_session(keyring).unwrap();
    assert!(gate.open(keyring.try_clone().unwrap(), BootTime::now() + Duration::from_secs(600)));
    store.recover().unwrap();
    let options = FilesystemOptions { read_only };
    let fs = Filesystem::new(Arc::clone(&store), backing, gate, Arc::new(LogOnly), options);
    Opened { fs, store }
}

fn archive(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.tar.gz"))
}

fn tar(args: &[&str], archive: &Path, dir: &Path) {
    let status = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "--sparse", "--numeric-owner"])
        .args(args)
        .arg(archive)
        .args(["-C", dir.to_str().unwrap(), "back"])
        .status()
        .unwrap();
    assert!(status.success());
}

/// None where the archive cannot be unpacked here.
fn unpacked(name: &str) -> Option<tempfile::TempDir> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: attributes of a volume are root's");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    tar(&["-xzf"], &archive(name), dir.path());
    Some(dir)
}

/// Reads it as it is, then mounts it for writing, twice, and reads it again.
fn assert_readable(name: &str, keyring: impl Fn() -> Keyring, expected: &str) {
    let Some(dir) = unpacked(name) else { return };
    let back = dir.path().join("back");
    let read = |read_only| {
        let opened = open(&back, &keyring(), read_only);
        let found = content::describe(&opened.fs);
        if !read_only {
            opened.store.close().unwrap();
        }
        found
    };
    for read_only in [true, false, false, true] {
        let found = read(read_only);
        assert_eq!(found, expected, "{name}, read-only: {read_only}");
    }
}

#[test]
fn a_volume_that_was_closed() {
    assert_readable("format-1-closed", first, include_str!("closed.txt"));
}

#[test]
fn a_volume_with_plaintext_names() {
    assert_readable("format-1-plaintext-names", first, include_str!("closed.txt"));
}

/// Records of every kind are in its log, of both streams, and a file is between two DEKs.
#[test]
fn a_volume_whose_daemon_was_killed() {
    assert_readable("format-1-killed", first, include_str!("killed.txt"));
}

/// The volume header and some files name the second volume key, others the first.
#[test]
fn a_volume_between_two_volume_keys() {
    assert_readable("format-1-two-keys", both, include_str!("two-keys.txt"));
}

#[test]
fn make() {
    let Some(out) = std::env::var_os(MAKE).map(PathBuf::from) else { return };
    let make = |name: &str, text: &str, features: u64, work: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        let back = dir.path().join("back");
        fs::create_dir(&back).unwrap();
        let options = FormatOptions {
            plaintext_names: features & FEATURE_PLAINTEXT_NAMES != 0,
            log_size: Some(8 << 20),
        };
        Store::format(&*LinuxBacking::open(&back).unwrap(), &first(), options).unwrap();
        work(&back);
        let opened = open(&back, &both(), true);
        fs::write(out.join(format!("{text}.txt")), content::describe(&opened.fs)).unwrap();
        drop(opened);
        tar(&["-czf"], &out.join(format!("format-1-{name}.tar.gz")), dir.path());
    };
    let closed = |back: &Path| {
        let opened = open(back, &first(), false);
        content::fill(&opened.fs);
        opened.store.close().unwrap();
    };
    make("closed", "closed", 0, &closed);
    make("plaintext-names", "closed", FEATURE_PLAINTEXT_NAMES, &closed);
    make("killed", "killed", 0, &|back| {
        let opened = open(back, &first(), false);
        content::fill(&opened.fs);
        opened.store.checkpoint().unwrap();
        content::begin_rotation(&opened.store, &opened.fs);
        content::change(&opened.fs);
        opened.store.sync_all().unwrap();
    });
    make("two-keys", "two-keys", 0, &|back| {
        let opened = open(back, &first(), false);
        content::fill(&opened.fs);
        opened.store.close().unwrap();
        drop(opened);
        let opened = open(back, &both(), false);
        content::change(&opened.fs);
        opened.store.sync_all().unwrap();
    });
}
