//! Changing the size.

use rustix::io::Errno;

use super::File;
use super::change::{Change, room_for};
use crate::error::{FsError, FsResult};
use crate::store::intent_log::{Kind, Stream};
use crate::store::layout::{BLOCK, MAX_SIZE, backing_len, block_of, blocks_for};

impl File {
    /// Sets the size. What is cut off never returns: the file reads zeros where it grows again.
    pub fn truncate(&self, len: u64) -> FsResult<()> {
        self.check_writable()?;
        if len > MAX_SIZE {
            return Err(Errno::FBIG.into());
        }
        let room = self.shared.reserve(Stream::Hot, room_for(1))?;
        let _guard = self.locks.exclusive(0..=u64::MAX);
        let size = self.size();
        if len == size {
            return self.trim_soon();
        }
        let mut change = Change::new(self, Kind::Truncate);
        change.set_size(len);
        if len > size {
            self.grow_home(len)?;
        } else {
            change.zero_tail(len)?;
            // What is in regions past the end goes with the regions.
            change.make_holes(blocks_for(len)..blocks_for(size), blocks_for(size))?;
        }
        change.commit(room)?;
        if len < size {
            self.state.lock().ask_for_nothing();
        }
        Ok(())
    }

    /// Gives back what was reserved beyond the end, with the next checkpoint if one is due.
    fn trim_soon(&self) -> FsResult<()> {
        self.state.lock().ask_for_nothing();
        if self.is_clean() { self.trim(backing_len(self.size())) } else { Ok(()) }
    }

    /// First, since this is what fails where the backing file system takes no such size.
    pub(super) fn grow_home(&self, len: u64) -> FsResult<()> {
        let wanted = backing_len(len);
        if self.backing.metadata()?.size < wanted {
            self.backing.set_len(wanted)?;
        }
        Ok(())
    }
}

impl Change<'_> {
    /// Zeros what is past `len` in its block, which stays that way until it is written.
    fn zero_tail(&mut self, len: u64) -> FsResult<()> {
        if len.is_multiple_of(BLOCK) {
            return Ok(());
        }
        let done = self.zero_part(block_of(len), (len % BLOCK) as usize..BLOCK as usize);
        match done {
            // It stays as unreadable as it is.
            Err(damage @ FsError::Integrity(_)) => {
                log::warn!("a file is truncated whose last block is damaged: {damage}");
                Ok(())
            }
            done => done,
        }
    }
}
