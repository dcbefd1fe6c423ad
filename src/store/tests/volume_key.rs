//! Another volume key: everything names it afterwards, and no cut of the power is in its way.

use std::sync::Arc;
use std::time::Duration;

use super::support::{options, pattern};
use crate::backing::Access;
use crate::backing::memory::{MemoryBacking, Options};
use crate::crypto::secret::Secret;
use crate::error::{Kind, Result};
use crate::key::gate::{BootTime, Gate, Keyring};
use crate::store::{Durability, Store};

fn secret(byte: u8) -> Secret<32> {
    Secret::new_with(|key| key.fill(byte)).unwrap()
}

fn old() -> Keyring {
    Keyring::new(1, secret(1))
}

fn new() -> Keyring {
    Keyring::new(2, secret(2))
}

fn both() -> Keyring {
    new().with_retiring(1, secret(1))
}

fn open(backing: Arc<MemoryBacking>, keyring: &Keyring) -> Result<Arc<Store>> {
    let gate = Gate::new();
    let store = Store::open(backing, gate.clone(), false)?;
    store.start_session(keyring)?;
    assert!(gate.open(keyring.try_clone()?, BootTime::now() + Duration::from_secs(3600)));
    store.recover()?;
    Ok(store)
}

fn name(i: usize) -> Vec<u8> {
    format!("f{i}").into_bytes()
}

/// A volume with three files, one in a directory, and changes of all of them in the log.
fn volume() -> Arc<MemoryBacking> {
    let backing = MemoryBacking::new();
    Store::format(&*backing, &old(), options()).unwrap();
    let store = open(backing.clone(), &old()).unwrap();
    let deep = store.tree().mkdir(b"dir", 0o700).unwrap();
    for i in 0..3 {
        let dir = if i == 2 { deep.clone() } else { store.tree() };
        let unnamed = dir.create_unnamed().unwrap();
        let file = store.create_file(unnamed.clone()).unwrap();
        dir.link_file(&*unnamed, &name(i)).unwrap();
        file.write_at(&pattern(20_000, i as u8), 0, Durability::default()).unwrap();
        file.sync(true).unwrap();
    }
    store.sync_all().unwrap();
    drop(store);
    backing
}

fn assert_whole(store: &Store) {
    let deep = store.tree().lookup(b"dir").unwrap();
    for i in 0..3 {
        let dir = if i == 2 { deep.clone() } else { store.tree() };
        let node = dir.lookup(&name(i)).unwrap();
        let file = store.open_file(node.open(Access::ReadWrite).unwrap()).unwrap();
        let mut bytes = vec![0; 20_000];
        assert_eq!(file.read_at(&mut bytes, 0).unwrap(), bytes.len());
        assert_eq!(bytes, pattern(20_000, i as u8));
    }
}

#[test]
fn the_new_key_opens_everything_and_the_old_one_nothing() {
    let backing = volume();
    let store = open(backing.clone(), &both()).unwrap();
    let metadata_key = store.metadata_key(&both()).unwrap();
    let mut told = 0;
    let adopted = store.adopt_volume_key(&mut |files| told = files).unwrap();
    assert_eq!((adopted.files, adopted.unreadable, told), (3, 0, 3));
    store.close().unwrap();
    drop(store);
    for _ in 0..2 {
        let store = open(backing.clone(), &new()).unwrap();
        assert_whole(&store);
        assert!(store.metadata_key(&new()).unwrap().ct_eq(&metadata_key), "names stay");
        assert!(store.log_status().unwrap().poisoned.is_none());
    }
    assert_eq!(open(backing.clone(), &old()).unwrap_err().kind, Kind::Corrupt);
    // And again, from the second to a third.
    let third = || Keyring::new(3, secret(3)).with_retiring(2, secret(2));
    let store = open(backing.clone(), &third()).unwrap();
    assert_eq!(store.adopt_volume_key(&mut |_| {}).unwrap().files, 3);
    store.close().unwrap();
    drop(store);
    assert_whole(&open(backing, &Keyring::new(3, secret(3))).unwrap());
}

#[test]
fn no_power_cut_is_in_its_way() {
    let backing = volume();
    backing.settle();
    let store = open(backing.clone(), &both()).unwrap();
    store.adopt_volume_key(&mut |_| {}).unwrap();
    store.close().unwrap();
    drop(store);
    let trace = backing.trace();
    let options = Options { budget: 4, ..Options::default() };
    let (mut states, mut unfinished) = (0, 0);
    for cut in 0..=trace.len() {
        for crash in trace.crashes(cut, &options) {
            let disk = trace.materialise(&crash);
            let store =
                open(disk.clone(), &both()).unwrap_or_else(|e| panic!("{e} after {crash:?}"));
            assert_whole(&store);
            let adopted = store.adopt_volume_key(&mut |_| {}).unwrap();
            unfinished += usize::from(adopted.files > 0);
            assert_eq!(adopted.unreadable, 0);
            store.close().unwrap();
            drop(store);
            assert_whole(&open(disk, &new()).unwrap_or_else(|e| panic!("{e} after {crash:?}")));
            states += 1;
        }
    }
    assert!(states > 100 && unfinished > 20, "{states}, {unfinished}");
}

#[test]
fn a_file_that_cannot_be_read_stays_as_it_is() {
    let backing = volume();
    drop(open(backing.clone(), &old()).unwrap());
    let root = crate::backing::Backing::root(&*backing);
    let node = root.lookup(b"tree").unwrap().lookup(b"f0").unwrap();
    let file = node.open(Access::ReadWrite).unwrap();
    for page in [0, 4096] {
        file.write_at(&[0x55; 100], page + 20).unwrap();
    }
    let store = open(backing.clone(), &both()).unwrap();
    let adopted = store.adopt_volume_key(&mut |_| {}).unwrap();
    assert_eq!((adopted.files, adopted.unreadable), (2, 1));
    let mut bytes = [0; 100];
    file.read_at(&mut bytes, 20).unwrap();
    assert_eq!(bytes, [0x55; 100]);
}

#[test]
fn the_log_can_be_changed_while_the_key_is_being_changed() {
    let backing = volume();
    let store = open(backing.clone(), &both()).unwrap();
    store.close().unwrap();
    store.replace_log(None, Some(16 << 20)).unwrap();
    drop(store);
    let store = open(backing.clone(), &both()).unwrap();
    assert_whole(&store);
    store.adopt_volume_key(&mut |_| {}).unwrap();
    store.close().unwrap();
    drop(store);
    assert_whole(&open(backing, &new()).unwrap());
}
