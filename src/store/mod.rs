//! The file format: plaintext files of any size over authenticated ciphertext.

mod file;

use std::sync::Arc;

pub use file::{Durability, File, WriteMode};

use crate::backing::{Backing, FileRef, NodeRef};
use crate::error::{Error, FsResult, Kind, Result};
use crate::key::gate::{Gate, Keyring};

/// What a volume says about itself without its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    pub uuid: [u8; 16],
    pub format: u32,
    pub features: u64,
    /// True when one of the two copies of the volume header is damaged; the other served.
    pub damaged_copy: bool,
}

/// Names are stored as they are, not encrypted.
pub const FEATURE_PLAINTEXT_NAMES: u64 = 1 << 0;

#[derive(Clone, Copy, Debug, Default)]
pub struct FormatOptions {
    pub plaintext_names: bool,
}

/// An opened volume below the name layer.
#[derive(Debug)]
pub struct Store {
    backing: Arc<dyn Backing>,
    info: VolumeInfo,
}

fn unfinished() -> Error {
    Error::new(Kind::Unsupported, "not built yet")
}

impl Store {
    /// Makes an empty volume in an empty directory.
    pub fn format(_b: &dyn Backing, _k: &Keyring, _o: FormatOptions) -> Result<VolumeInfo> {
        Err(unfinished())
    }

    /// Needs no key and changes nothing.
    pub fn inspect(_backing: &dyn Backing) -> Result<VolumeInfo> {
        Err(unfinished())
    }

    /// Takes the writer lock. Needs no key; nothing can be read before [`Store::start_session`].
    pub fn open(_b: Arc<dyn Backing>, _g: Arc<Gate>, _read_only: bool) -> Result<Arc<Store>> {
        Err(unfinished())
    }

    /// At mount and at each revalidation, before the gate opens.
    pub fn start_session(&self, _keyring: &Keyring) -> Result<()> {
        Err(unfinished())
    }

    pub fn info(&self) -> &VolumeInfo {
        &self.info
    }

    pub fn is_read_only(&self) -> bool {
        true
    }

    /// The backing directory of the logical root.
    pub fn tree(&self) -> NodeRef {
        self.backing.root()
    }

    /// Where the envelope is kept.
    pub fn envelope_dir(&self) -> NodeRef {
        self.backing.root()
    }

    /// Makes an empty, unnamed backing file a file of this volume.
    pub fn create_file(self: &Arc<Self>, _file: FileRef) -> FsResult<Arc<File>> {
        Err(rustix::io::Errno::NOSYS.into())
    }

    /// One [`File`] per inode, however often it is opened. On a writable volume `file` must be
    /// open for writing.
    pub fn open_file(self: &Arc<Self>, _file: FileRef) -> FsResult<Arc<File>> {
        Err(rustix::io::Errno::NOSYS.into())
    }

    /// The size of a file that need not be open.
    pub fn plain_size(&self, _node: &NodeRef) -> FsResult<u64> {
        Err(rustix::io::Errno::NOSYS.into())
    }

    /// Everything written so far is on stable storage afterwards.
    pub fn sync_all(&self) -> FsResult<()> {
        Err(rustix::io::Errno::NOSYS.into())
    }
}
