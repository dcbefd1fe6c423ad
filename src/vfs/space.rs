//! Space and holes: fallocate, lseek, copy_file_range.

use rustix::io::Errno;
use zeroize::Zeroizing;

use super::filesystem::Filesystem;
use super::types::Caller;
use crate::error::{FsError, FsResult};
use crate::store::Durability;

const KEEP_SIZE: u32 = libc::FALLOC_FL_KEEP_SIZE as u32;
const PUNCH_HOLE: u32 = libc::FALLOC_FL_PUNCH_HOLE as u32;
const ZERO_RANGE: u32 = libc::FALLOC_FL_ZERO_RANGE as u32;
const PUNCH_KEEP: u32 = PUNCH_HOLE | KEEP_SIZE;
const ZERO_KEEP: u32 = ZERO_RANGE | KEEP_SIZE;

const SEEK_DATA: u32 = libc::SEEK_DATA as u32;
const SEEK_HOLE: u32 = libc::SEEK_HOLE as u32;

/// A copy is done in pieces of this size, and one request copies at most [`COPY_MAX`]: the
/// caller is told how much and asks for the rest.
const COPY_PIECE: usize = 256 << 10;
const COPY_MAX: u64 = 16 << 20;

impl Filesystem {
    /// Modes as in fallocate(2): 0, KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE; EOPNOTSUPP for the others.
    pub fn fallocate(
        &self,
        caller: Caller,
        handle: u64,
        offset: u64,
        len: u64,
        mode: u32,
    ) -> FsResult<()> {
        self.writable()?;
        let open = self.handles.file(handle)?;
        if !caller.is_root() {
            self.drop_set_id(&open.inode)?;
        }
        let file = &open.file;
        let done = match mode {
            0 => file.allocate(offset, len, false),
            KEEP_SIZE => file.allocate(offset, len, true),
            PUNCH_KEEP => file.punch_hole(offset, len),
            ZERO_RANGE => file.zero_range(offset, len, false),
            ZERO_KEEP => file.zero_range(offset, len, true),
            _ => Err(FsError::Os(Errno::OPNOTSUPP)),
        };
        self.audited(&open.inode, done)
    }

    /// SEEK_DATA and SEEK_HOLE; the kernel does the others itself.
    pub fn lseek(&self, handle: u64, offset: u64, whence: u32) -> FsResult<u64> {
        self.gate.check()?;
        let open = self.handles.file(handle)?;
        let found = match whence {
            SEEK_DATA => open.file.seek_data(offset),
            SEEK_HOLE => open.file.seek_hole(offset),
            _ => Err(FsError::Os(Errno::INVAL)),
        };
        let found = self.audited(&open.inode, found)?.ok_or(FsError::Os(Errno::NXIO))?;
        self.gate.check()?;
        Ok(found)
    }

    /// Copies up to `len` bytes between two handles with their offsets, and returns how many; 0
    /// at the end of the source. The kernel has checked that the ranges do not overlap.
    pub fn copy_file_range(
        &self,
        caller: Caller,
        (from, from_offset): (u64, u64),
        (to, to_offset): (u64, u64),
        len: u64,
    ) -> FsResult<u64> {
        self.writable()?;
        let (from, to) = (self.handles.file(from)?, self.handles.file(to)?);
        if !caller.is_root() {
            self.drop_set_id(&to.inode)?;
        }
        let len = len.min(COPY_MAX);
        let mut piece = Zeroizing::new(vec![0u8; COPY_PIECE.min(len as usize)]);
        let mut copied = 0;
        while copied < len {
            let want = piece.len().min((len - copied) as usize);
            let read = from.file.read_at(&mut piece[..want], from_offset + copied);
            let read = match self.audited(&from.inode, read) {
                Ok(0) => break,
                Ok(read) => read,
                Err(_) if copied > 0 => break,
                Err(error) => return Err(error),
            };
            let at = to_offset + copied;
            let written = to.file.write_at(&piece[..read], at, Durability::default());
            match self.audited(&to.inode, written) {
                Ok(_) => copied += read as u64,
                Err(_) if copied > 0 => break,
                Err(error) => return Err(error),
            }
        }
        self.gate.check()?;
        Ok(copied)
    }
}
