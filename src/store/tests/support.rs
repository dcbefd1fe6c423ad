//! A volume in a scratch directory.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use crate::backing::fault::{FaultBacking, Faults};
use crate::backing::linux::LinuxBacking;
use crate::backing::memory::MemoryBacking;
use crate::backing::{Access, Backing};
use crate::crypto::secret::Secret;
use crate::error::FsError;
use crate::key::gate::{BootTime, Gate, Keyring, Reason};
use crate::maintenance::check::tests::support::put_envelope;
use crate::store::{File, FormatOptions, Store};

pub(super) struct Volume {
    dir: tempfile::TempDir,
    pub faults: Arc<Faults>,
    pub store: Arc<Store>,
    pub gate: Arc<Gate>,
}

pub(super) const KEY: u8 = 0x42;

pub(super) fn keyring() -> Keyring {
    Keyring::new(1, Secret::new_with(|key| key.fill(KEY)).unwrap())
}

pub(super) fn options() -> FormatOptions {
    FormatOptions { log_size: Some(8 << 20), ..FormatOptions::default() }
}

fn open(dir: &std::path::Path, read_only: bool) -> (Arc<Store>, Arc<Gate>, Arc<Faults>) {
    let (backing, faults) = FaultBacking::new(LinuxBacking::open(dir).unwrap());
    let gate = Gate::new();
    let store = Store::open(backing, gate.clone(), read_only).unwrap();
    store.start_session(&keyring()).unwrap();
    assert!(gate.open(keyring(), BootTime::now() + Duration::from_secs(3600)));
    store.recover().unwrap();
    (store, gate, faults)
}

/// A volume over any backing, for tests that cut its power.
pub(super) struct Mounted {
    pub store: Arc<Store>,
    pub gate: Arc<Gate>,
}

/// Opens the volume and recovers it.
pub(super) fn mount(backing: Arc<dyn Backing>) -> crate::Result<Mounted> {
    let mounted = unrecovered(backing, false)?;
    mounted.store.recover()?;
    Ok(mounted)
}

pub(super) fn mount_read_only(backing: Arc<dyn Backing>) -> crate::Result<Mounted> {
    let mounted = unrecovered(backing, true)?;
    mounted.store.recover()?;
    Ok(mounted)
}

/// Its gate is open, and what the log holds is not in force yet.
pub(super) fn unrecovered(backing: Arc<dyn Backing>, read_only: bool) -> crate::Result<Mounted> {
    let gate = Gate::new();
    let store = Store::open(backing, gate.clone(), read_only)?;
    store.start_session(&keyring())?;
    assert!(gate.open(keyring(), BootTime::now() + Duration::from_secs(3600)));
    Ok(Mounted { store, gate })
}

/// A new volume in memory, mounted; its recording starts now.
pub(super) fn in_memory() -> (Arc<MemoryBacking>, Mounted) {
    let backing = MemoryBacking::new();
    // The names of these tests are none that byokfs would make.
    let options = FormatOptions { plaintext_names: true, ..options() };
    Store::format(&*backing, &keyring(), options).unwrap();
    put_envelope(&*backing);
    let mounted = mount(backing.clone()).unwrap();
    backing.settle();
    (backing, mounted)
}

/// Cuts the volume off, and opens it again.
pub(super) fn revalidate(store: &Store, gate: &Gate) {
    gate.shut(Reason::Unreachable);
    assert!(gate.drain(Duration::from_secs(5)));
    gate.wipe();
    store.start_session(&keyring()).unwrap();
    assert!(gate.open(keyring(), BootTime::now() + Duration::from_secs(3600)));
}

impl Mounted {
    pub(super) fn create(&self, name: &str) -> Arc<File> {
        let tree = self.store.tree();
        let unnamed = tree.create_unnamed().unwrap();
        let file = self.store.create_file(unnamed.clone()).unwrap();
        tree.link_file(&*unnamed, name.as_bytes()).unwrap();
        file
    }

    /// None where there is no such name.
    pub(super) fn try_open(&self, name: &str) -> Option<crate::error::FsResult<Arc<File>>> {
        let node = self.store.tree().lookup(name.as_bytes()).ok()?;
        let access = if self.store.is_read_only() { Access::Read } else { Access::ReadWrite };
        Some(self.store.open_file(node.open(access).unwrap()))
    }

    pub(super) fn open(&self, name: &str) -> Arc<File> {
        self.try_open(name).expect("it is there").unwrap()
    }

    /// All of a file. None where it is not there, an error's text where it cannot be read.
    pub(super) fn content(&self, name: &str) -> Option<Result<Vec<u8>, String>> {
        let file = match self.try_open(name)? {
            Ok(file) => file,
            // A name that a crash has left alone.
            Err(FsError::Os(Errno::NOENT)) if self.store.is_read_only() => return None,
            Err(error) => return Some(Err(error.to_string())),
        };
        let mut bytes = vec![0xee; file.size() as usize];
        Some(match file.read_at(&mut bytes, 0) {
            Ok(count) if count == bytes.len() => Ok(bytes),
            Ok(count) => Err(format!("{count} bytes of {}", bytes.len())),
            Err(error) => Err(error.to_string()),
        })
    }
}

impl Volume {
    pub(super) fn new() -> Volume {
        let dir = tempfile::tempdir().unwrap();
        let backing = LinuxBacking::open(dir.path()).unwrap();
        Store::format(&*backing, &keyring(), options()).unwrap();
        let (store, gate, faults) = open(dir.path(), false);
        Volume { dir, faults, store, gate }
    }

    /// As if the daemon had been killed, and the volume mounted again. No file may be open.
    pub(super) fn reopen(self) -> Volume {
        self.reopen_as(false)
    }

    pub(super) fn reopen_as(self, read_only: bool) -> Volume {
        let Volume { dir, faults, store, gate } = self;
        drop((store, gate, faults));
        let (store, gate, faults) = open(dir.path(), read_only);
        Volume { dir, faults, store, gate }
    }

    pub(super) fn create(&self, name: &str) -> Arc<File> {
        let tree = self.store.tree();
        let backing = tree.create_unnamed().unwrap();
        let file = self.store.create_file(backing.clone()).unwrap();
        tree.link_file(&*backing, name.as_bytes()).unwrap();
        file
    }

    pub(super) fn open(&self, name: &str) -> Arc<File> {
        self.try_open(name).unwrap()
    }

    pub(super) fn try_open(&self, name: &str) -> crate::error::FsResult<Arc<File>> {
        let node = self.store.tree().lookup(name.as_bytes()).unwrap();
        let access = if self.store.is_read_only() { Access::Read } else { Access::ReadWrite };
        self.store.open_file(node.open(access).unwrap())
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("tree").join(name)
    }

    pub(super) fn root(&self) -> &std::path::Path {
        self.dir.path()
    }
}

pub(super) fn read_all(file: &File) -> Vec<u8> {
    let mut bytes = vec![0xee; file.size() as usize + 100];
    let count = file.read_at(&mut bytes, 0).unwrap();
    assert_eq!(count as u64, file.size());
    bytes.truncate(count);
    bytes
}

/// Bytes that differ from block to block.
pub(super) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u64 * 7 + (i as u64 >> 8) * 13) as u8 ^ seed).collect()
}
