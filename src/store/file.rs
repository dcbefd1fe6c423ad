//! One plaintext file.

use crate::backing::FileRef;
use crate::error::FsResult;
use rustix::io::Errno;

/// When a write is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Durability {
    /// In the backing kernel's hands: survives the daemon.
    #[default]
    Handed,
    /// On the device, perhaps in its cache: what a plain O_DIRECT write promises.
    OnDevice,
    /// On stable storage: O_DSYNC, O_SYNC.
    Flushed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WriteMode {
    /// At the end of the file, wherever that is; the offset given is ignored.
    pub append: bool,
    pub durability: Durability,
}

/// A file of an opened volume; every handle on the same inode shares one.
#[derive(Debug)]
pub struct File {
    backing: FileRef,
}

impl File {
    pub fn size(&self) -> u64 {
        0
    }

    pub fn file_id(&self) -> [u8; 16] {
        [0; 16]
    }

    pub fn backing(&self) -> &FileRef {
        &self.backing
    }

    /// Allocated space in units of 512 bytes, without what the format adds.
    pub fn blocks512(&self) -> FsResult<u64> {
        Err(Errno::NOSYS.into())
    }

    /// Bytes read; fewer than asked for only at the end of the file. On an error `buf` is zeroed.
    pub fn read_at(&self, _buf: &mut [u8], _offset: u64) -> FsResult<usize> {
        Err(Errno::NOSYS.into())
    }

    /// Writes all of `data` and returns the offset it went to.
    pub fn write_at(&self, _data: &[u8], _offset: u64, _mode: WriteMode) -> FsResult<u64> {
        Err(Errno::NOSYS.into())
    }

    pub fn truncate(&self, _len: u64) -> FsResult<()> {
        Err(Errno::NOSYS.into())
    }

    pub fn allocate(&self, _offset: u64, _len: u64, _keep_size: bool) -> FsResult<()> {
        Err(Errno::NOSYS.into())
    }

    pub fn punch_hole(&self, _offset: u64, _len: u64) -> FsResult<()> {
        Err(Errno::NOSYS.into())
    }

    pub fn zero_range(&self, _offset: u64, _len: u64, _keep_size: bool) -> FsResult<()> {
        Err(Errno::NOSYS.into())
    }

    /// None past the last data.
    pub fn seek_data(&self, _offset: u64) -> FsResult<Option<u64>> {
        Err(Errno::NOSYS.into())
    }

    /// None at or past the end; the end of the file is a hole.
    pub fn seek_hole(&self, _offset: u64) -> FsResult<Option<u64>> {
        Err(Errno::NOSYS.into())
    }

    /// `data_only` is fdatasync: the size counts as data.
    pub fn sync(&self, _data_only: bool) -> FsResult<()> {
        Err(Errno::NOSYS.into())
    }
}
