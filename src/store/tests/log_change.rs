//! Another size or place for the log, and another log for a lost one.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::support::{keyring, options, pattern};
use crate::backing::linux::LinuxBacking;
use crate::backing::memory::{MemoryBacking, Options};
use crate::backing::{Access, Backing};
use crate::error::{Kind, Result};
use crate::key::gate::{BootTime, Gate};
use crate::store::{Durability, Store};

fn open(backing: Arc<dyn Backing>) -> Result<Arc<Store>> {
    let gate = Gate::new();
    let store = Store::open(backing, gate.clone(), false)?;
    store.start_session(&keyring())?;
    assert!(gate.open(keyring(), BootTime::now() + Duration::from_secs(3600)));
    store.recover()?;
    Ok(store)
}

fn write(store: &Store, seed: u8) {
    let tree = store.tree();
    let file = match tree.lookup(b"f") {
        Ok(node) => store.open_file(node.open(Access::ReadWrite).unwrap()).unwrap(),
        Err(_) => {
            let unnamed = tree.create_unnamed().unwrap();
            let file = store.create_file(unnamed.clone()).unwrap();
            tree.link_file(&*unnamed, b"f").unwrap();
            tree.sync().unwrap();
            file
        }
    };
    file.write_at(&pattern(100_000, seed), 0, Durability::default()).unwrap();
    file.sync(true).unwrap();
}

fn assert_has(store: &Store, seed: u8) {
    let node = store.tree().lookup(b"f").unwrap();
    let file = store.open_file(node.open(Access::ReadWrite).unwrap()).unwrap();
    let mut bytes = vec![0; 100_000];
    assert_eq!(file.read_at(&mut bytes, 0).unwrap(), bytes.len());
    assert!(bytes == pattern(100_000, seed));
}

fn change(backing: Arc<dyn Backing>, to: Option<&Path>, size: Option<u64>) -> Result<()> {
    let store = open(backing)?;
    store.close().unwrap();
    store.replace_log(to, size)
}

#[test]
fn a_log_gets_another_size_whatever_a_power_cut_leaves() {
    let backing = MemoryBacking::new();
    Store::format(&*backing, &keyring(), options()).unwrap();
    write(&open(backing.clone()).unwrap(), 1);
    change(backing.clone(), None, Some(16 << 20)).unwrap();
    let store = open(backing.clone()).unwrap();
    assert_eq!(store.log_size(), Some(16 << 20));
    assert_has(&store, 1);
    // What was not brought home is not left behind.
    write(&store, 2);
    drop(store);
    backing.settle();
    let start = backing.trace().len();
    change(backing.clone(), None, Some(8 << 20)).unwrap();
    let trace = backing.trace();
    let options = Options { budget: 3, ..Options::default() };
    let mut sizes = std::collections::BTreeSet::new();
    for cut in start..=trace.len() {
        for crash in trace.crashes(cut, &options) {
            let disk = trace.materialise(&crash);
            let store = open(disk.clone()).unwrap_or_else(|e| panic!("{e} after {crash:?}"));
            assert_has(&store, 2);
            sizes.insert(store.log_size().unwrap());
            write(&store, 3);
            drop(store);
            let store = open(disk.clone()).unwrap();
            assert_has(&store, 3);
        }
    }
    assert_eq!(sizes.into_iter().collect::<Vec<_>>(), [8 << 20, 16 << 20]);
}

#[test]
fn a_log_moves_to_another_directory_and_back() {
    let (dir, fast) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open_backing = || LinuxBacking::open(dir.path()).unwrap() as Arc<dyn Backing>;
    Store::format(&*open_backing(), &keyring(), options()).unwrap();
    write(&open(open_backing()).unwrap(), 1);
    let names = |dir: &Path| {
        let entries = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with("log"))
            .collect();
        names.sort();
        names
    };
    let inside = dir.path().join("tree");
    let refused = change(open_backing(), Some(&inside), None).unwrap_err();
    assert_eq!(refused.kind, Kind::Usage);

    change(open_backing(), Some(fast.path()), None).unwrap();
    assert_eq!(names(dir.path()), ["log"]);
    assert_eq!(names(fast.path()), ["log.bulk", "log.hot", "log.owner"]);
    let store = open(open_backing()).unwrap();
    assert_has(&store, 1);
    write(&store, 2);
    drop(store);
    change(open_backing(), None, Some(9 << 20)).unwrap();
    assert_eq!(names(fast.path()), ["log.bulk", "log.hot", "log.owner"]);
    // From there to a third place.
    let other = tempfile::tempdir().unwrap();
    change(open_backing(), Some(other.path()), None).unwrap();
    assert!(names(fast.path()).is_empty());
    let store = open(open_backing()).unwrap();
    assert_has(&store, 2);
    assert_eq!(store.log_size(), Some(9 << 20));

    // In use: neither a second user of the volume nor a copy of it gets at the log.
    let copy = tempfile::tempdir().unwrap();
    let mut cp = std::process::Command::new("cp");
    assert!(cp.arg("-a").arg(dir.path()).arg(copy.path()).status().unwrap().success());
    let copy = copy.path().join(dir.path().file_name().unwrap());
    let error = open(LinuxBacking::open(&copy).unwrap()).unwrap_err();
    assert_eq!(error.kind, Kind::Busy, "{error}");
    drop(store);
    let error = open(LinuxBacking::open(&copy).unwrap()).unwrap_err();
    assert_eq!(error.kind, Kind::Denied, "{error}");
    // The directory serves one volume.
    let second = tempfile::tempdir().unwrap();
    let second_backing = || LinuxBacking::open(second.path()).unwrap() as Arc<dyn Backing>;
    Store::format(&*second_backing(), &keyring(), options()).unwrap();
    let error = change(second_backing(), Some(other.path()), None).unwrap_err();
    assert_eq!(error.kind, Kind::Busy, "{error}");

    change(open_backing(), Some(dir.path()), None).unwrap();
    assert_eq!(names(dir.path()), ["log.bulk", "log.hot"]);
    assert!(names(other.path()).is_empty());
    assert_has(&open(open_backing()).unwrap(), 2);
}

#[test]
fn only_a_log_that_is_lost_is_discarded() {
    let (dir, fast) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open_backing = || LinuxBacking::open(dir.path()).unwrap() as Arc<dyn Backing>;
    Store::format(&*open_backing(), &keyring(), options()).unwrap();
    let store = open(open_backing()).unwrap();
    write(&store, 1);
    store.checkpoint().unwrap();
    write(&store, 2);
    drop(store);
    let discard = || {
        let gate = Gate::new();
        let store = Store::open(open_backing(), gate.clone(), false).unwrap();
        assert!(gate.open(keyring(), BootTime::now() + Duration::from_secs(600)));
        store.discard_log(Some(8 << 20))
    };
    assert_eq!(discard().unwrap_err().kind, Kind::Busy);
    // One stream is gone.
    std::fs::remove_file(dir.path().join("log.bulk")).unwrap();
    let error = open(open_backing()).unwrap_err();
    assert!(error.to_string().contains("log discard"), "{error}");
    discard().unwrap();
    let store = open(open_backing()).unwrap();
    assert_has(&store, 1);
    drop(store);
    // And with it the whole disk that it was on.
    change(open_backing(), Some(fast.path()), None).unwrap();
    drop(fast);
    assert!(open(open_backing()).is_err());
    discard().unwrap();
    assert_has(&open(open_backing()).unwrap(), 1);
}

/// A link that leads to a directory which is another volume's by now, or nobody's.
#[test]
fn a_new_log_is_not_put_in_the_place_of_somebody_elses() {
    let (dir, fast) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open_backing = || LinuxBacking::open(dir.path()).unwrap() as Arc<dyn Backing>;
    Store::format(&*open_backing(), &keyring(), options()).unwrap();
    write(&open(open_backing()).unwrap(), 1);
    change(open_backing(), Some(fast.path()), None).unwrap();
    let copies = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        let copy = copies.path().join(name);
        let mut cp = std::process::Command::new("cp");
        assert!(cp.arg("-a").arg(dir.path()).arg(&copy).status().unwrap().success());
        copy
    };
    let discard = |path: &Path| {
        let gate = Gate::new();
        let backing = LinuxBacking::open(path).unwrap();
        let store = Store::open(backing, gate.clone(), false).unwrap();
        assert!(gate.open(keyring(), BootTime::now() + Duration::from_secs(600)));
        store.discard_log(Some(8 << 20))
    };
    // The original has another log there since, and something in it that is not home.
    let first = copy("first");
    change(open_backing(), None, Some(9 << 20)).unwrap();
    let store = open(open_backing()).unwrap();
    store.checkpoint().unwrap();
    write(&store, 2);
    drop(store);
    assert_eq!(open(LinuxBacking::open(&first).unwrap()).unwrap_err().kind, Kind::Corrupt);
    discard(&first).unwrap();
    assert_has(&open(LinuxBacking::open(&first).unwrap()).unwrap(), 1);
    assert_has(&open(open_backing()).unwrap(), 2);
    // An empty disk in the place of one that is gone.
    for entry in std::fs::read_dir(fast.path()).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    assert!(open(open_backing()).is_err());
    discard(dir.path()).unwrap();
    assert_has(&open(open_backing()).unwrap(), 2);
}

/// The key was lost before the log could be put into force, and came back.
#[test]
fn a_log_elsewhere_is_found_again_by_the_next_session() {
    let (dir, fast) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open_backing = || LinuxBacking::open(dir.path()).unwrap() as Arc<dyn Backing>;
    Store::format(&*open_backing(), &keyring(), options()).unwrap();
    change(open_backing(), Some(fast.path()), None).unwrap();
    write(&open(open_backing()).unwrap(), 1);
    let gate = Gate::new();
    let store = Store::open(open_backing(), gate.clone(), false).unwrap();
    store.start_session(&keyring()).unwrap();
    store.recover().unwrap_err();
    store.start_session(&keyring()).unwrap();
    assert!(gate.open(keyring(), BootTime::now() + Duration::from_secs(600)));
    store.recover().unwrap();
    assert_has(&store, 1);
}

/// Its disk is not mounted yet, say.
#[test]
fn a_log_whose_directory_is_not_there_is_what_is_told_of() {
    let (dir, fast) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open_backing = || LinuxBacking::open(dir.path()).unwrap() as Arc<dyn Backing>;
    Store::format(&*open_backing(), &keyring(), options()).unwrap();
    let to = fast.path().join("log");
    std::fs::create_dir(&to).unwrap();
    change(open_backing(), Some(&to), None).unwrap();
    let away = fast.path().join("away");
    std::fs::rename(&to, &away).unwrap();
    let message = open(open_backing()).unwrap_err().to_string();
    assert!(message.contains("the log's own directory cannot be used"), "{message}");
    assert!(message.contains(to.to_str().unwrap()), "{message}");
    std::fs::rename(&away, &to).unwrap();
    open(open_backing()).unwrap();
}

/// The new directory is full, say, and then goes away.
#[test]
fn a_move_that_was_given_up_is_in_nobodys_way() {
    let (dir, fast) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open_backing = || LinuxBacking::open(dir.path()).unwrap() as Arc<dyn Backing>;
    let link = || std::fs::symlink_metadata(dir.path().join("log.new")).is_ok();
    Store::format(&*open_backing(), &keyring(), options()).unwrap();
    let give_up = || {
        std::fs::create_dir(fast.path().join("log.hot.new")).unwrap();
        change(open_backing(), Some(fast.path()), None).unwrap_err();
        std::fs::remove_dir(fast.path().join("log.hot.new")).unwrap();
    };
    give_up();
    write(&open(open_backing()).unwrap(), 1);
    assert!(!link());
    // It may be tried again.
    change(open_backing(), Some(fast.path()), None).unwrap();
    assert_has(&open(open_backing()).unwrap(), 1);
    change(open_backing(), Some(dir.path()), None).unwrap();
    // As before a mount has tidied up.
    std::os::unix::fs::symlink(fast.path(), dir.path().join("log.new")).unwrap();
    drop(fast);
    let store = open(open_backing()).unwrap();
    assert_has(&store, 1);
    write(&store, 2);
    drop(store);
    assert!(!link());
    assert_has(&open(open_backing()).unwrap(), 2);
}

/// Records of an earlier log, put into the new one where they once were, are not taken.
#[test]
fn records_of_another_log_do_not_count() {
    let dir = tempfile::tempdir().unwrap();
    let open_backing = || LinuxBacking::open(dir.path()).unwrap() as Arc<dyn Backing>;
    Store::format(&*open_backing(), &keyring(), options()).unwrap();
    let store = open(open_backing()).unwrap();
    write(&store, 1);
    drop(store);
    let old = ["log.hot", "log.bulk"].map(|name| std::fs::read(dir.path().join(name)).unwrap());
    let store = open(open_backing()).unwrap();
    write(&store, 2);
    drop(store);
    change(open_backing(), None, None).unwrap();
    for (name, old) in ["log.hot", "log.bulk"].into_iter().zip(old) {
        let mut new = std::fs::read(dir.path().join(name)).unwrap();
        let end = new.len().min(old.len());
        new[8192..end].copy_from_slice(&old[8192..end]);
        std::fs::write(dir.path().join(name), new).unwrap();
    }
    let store = open(open_backing()).unwrap();
    assert_eq!(store.recover().unwrap().records, 0);
    assert_has(&store, 2);
}
