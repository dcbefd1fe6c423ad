//! Writing.

use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::change::{Change, room_for};
use super::{Durability, File};
use crate::error::FsResult;
use crate::store::intent_log::{Kind, Scope, Stream};
use crate::store::layout::{
    BLOCK, MAX_SIZE, block_of, blocks_for, group_of, groups, part_in_group,
};
use crate::store::range_lock::RangeGuard;

/// Larger requests go to the stream that nobody's commit waits for.
const SMALL: u64 = 16 << 10;
/// The same for a file whose writes are waited for one by one.
const SMALL_AND_SYNCED: u64 = 64 << 10;
/// A file is one of those when it is synced at least every so many writes.
const WRITES_PER_SYNC: u64 = 4;
/// One record holds that much; a longer write is several.
const MAX_REQUEST: usize = 1 << 20;

impl File {
    /// Writes all of `data`. Up to 1 MiB are written whole or not at all, whatever happens.
    ///
    /// After an error the file is as it was, or, past 1 MiB, holds the first part of `data`.
    pub fn write_at(&self, data: &[u8], offset: u64, durability: Durability) -> FsResult<()> {
        self.check_writable()?;
        let mut at = offset;
        for part in data.chunks(MAX_REQUEST) {
            self.write_request(part, at, durability)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn write_request(&self, data: &[u8], offset: u64, durability: Durability) -> FsResult<()> {
        let len = data.len() as u64;
        let room =
            self.shared.reserve(self.stream_for(len, durability), room_for(len / BLOCK + 2))?;
        let (direct, overwrites, position) = {
            let _guard = self.lock_for_write(offset, len)?;
            let mut change = Change::new(self, Kind::Write);
            change.expect(data.len());
            change.write(offset, data, room.stream() == Stream::Bulk)?;
            if offset + len > self.size() {
                change.set_size(offset + len);
            }
            let position = change.commit(room)?;
            (change.direct_ranges(), change.overwrites(), position)
        };
        let log = self.shared.log()?;
        match durability {
            Durability::Handed if self.is_sync_likely() => log.start_write_out(&position),
            Durability::Handed => {}
            Durability::OnDevice => self.wait_on_device(&direct, overwrites)?,
            Durability::Flushed => self.sync(false)?,
        }
        Ok(())
    }

    /// What was there already and is overwritten lasts on a device that keeps what it is handed, as
    /// on a plain file system. So what the record needs in order to count must be there too: every
    /// earlier one of its stream, and of its file in the other, with the blocks that those name.
    fn wait_on_device(&self, direct: &[(u64, u64)], overwrites: bool) -> FsResult<()> {
        let log = self.shared.log()?;
        if overwrites && log.owes_flush_of(self.node) {
            return self.sync(false);
        }
        for &(at, len) in direct {
            let write = || self.backing.write_out(at, len);
            let done = log.write_out_of(Scope::Inode(self.node), write, |error| self.fail(error));
            done.map_err(|_| Errno::IO)?;
        }
        let last = self.state.lock().last;
        for stream in [Stream::Bulk, Stream::Hot] {
            if last[stream as usize] > 0 {
                log.write_out_through(stream, last[stream as usize])?;
            }
        }
        Ok(())
    }

    /// After the first write since the last sync, in a file of which each write was synced.
    fn is_sync_likely(&self) -> bool {
        self.one_by_one.load(Ordering::Relaxed) && self.since_sync.load(Ordering::Relaxed) == 1
    }

    fn stream_for(&self, len: u64, durability: Durability) -> Stream {
        let writes = self.since_sync.fetch_add(1, Ordering::Relaxed);
        let waited_for = durability == Durability::Flushed || writes < WRITES_PER_SYNC;
        if len < SMALL || (waited_for && len <= SMALL_AND_SYNCED) {
            Stream::Hot
        } else {
            Stream::Bulk
        }
    }

    /// Locks what a write of `len` bytes at `offset` needs. A write that extends the file keeps every
    /// other one out that would.
    pub(super) fn lock_for_write(&self, offset: u64, len: u64) -> FsResult<RangeGuard<'_>> {
        let end = offset.checked_add(len).filter(|&end| end <= MAX_SIZE).ok_or(Errno::FBIG)?;
        loop {
            let size = self.size();
            if end <= size {
                let guard = self.locks.exclusive(group_of(offset)..=group_of(end - 1));
                if end <= self.size() {
                    return Ok(guard);
                }
                continue;
            }
            let first = group_of(offset.min(size));
            let guard = self.locks.exclusive(first..=u64::MAX);
            if group_of(offset.min(self.size())) >= first {
                return Ok(guard);
            }
        }
    }
}

impl Change<'_> {
    /// The groups of the range are locked.
    fn write(&mut self, offset: u64, data: &[u8], may_go_direct: bool) -> FsResult<()> {
        let end = offset + data.len() as u64;
        let (first, last) = (block_of(offset), block_of(end - 1));
        let covers_first = offset == first * BLOCK && (end >= (first + 1) * BLOCK);
        let whole_from = if covers_first { first } else { first + 1 };
        if !covers_first {
            let to = ((first + 1) * BLOCK).min(end) - offset;
            self.part_of_block(first, offset, &data[..to as usize])?;
        }
        let covers_last = end == (last + 1) * BLOCK;
        let whole_to = if covers_last { last + 1 } else { last };
        if whole_from < whole_to {
            let (from, to) = (whole_from * BLOCK, whole_to * BLOCK);
            for group in groups(from, to - from) {
                let part = part_in_group(from, to, group);
                let (a, b) = ((part.start - offset) as usize, (part.end - offset) as usize);
                self.whole_blocks(block_of(part.start), &data[a..b], may_go_direct)?;
            }
        }
        if !covers_last && last > first {
            let at = (last * BLOCK - offset) as usize;
            self.part_of_block(last, last * BLOCK, &data[at..])?;
        }
        Ok(())
    }

    fn part_of_block(&mut self, block: u64, offset: u64, data: &[u8]) -> FsResult<()> {
        let at = (offset - block * BLOCK) as usize;
        let old = block < blocks_for(self.old_size());
        self.block(block, old, |bytes| bytes[at..at + data.len()].copy_from_slice(data))
    }
}
