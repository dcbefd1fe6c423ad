//! Allocating and giving back space.

use std::ops::Range;

use rustix::io::Errno;

use super::File;
use super::change::{Change, room_for};
use crate::error::FsResult;
use crate::store::intent_log::{Kind, Stream};
use crate::store::layout::{
    BLOCK, BLOCK_LEN, MAX_SIZE, block_at, block_of, blocks_for, generation_page_at, group_of,
    group_start, region_of_group, slot_of_group, tag_page_at,
};

impl File {
    /// `fallocate(2)`: reserves space, which reads as it did, or as zeros.
    pub fn allocate(&self, offset: u64, len: u64, keep_size: bool) -> FsResult<()> {
        self.check_writable()?;
        if len == 0 {
            return Err(Errno::INVAL.into());
        }
        let room = self.shared.reserve(Stream::Hot, room_for(0))?;
        let _guard = self.lock_for_write(offset, len)?;
        let end = offset + len;
        self.reserve(offset, end)?;
        let blocks = block_of(offset)..block_of(end - 1) + 1;
        self.state.lock().keep_space(&blocks);
        if end <= self.size() {
            return Ok(());
        }
        if keep_size {
            self.state.lock().ask(block_at(blocks.start)..block_at(blocks.end - 1) + BLOCK);
            return Ok(());
        }
        self.grow_home(end)?;
        let mut change = Change::new(self, Kind::Truncate);
        change.set_size(end);
        change.commit(room).map(drop)
    }

    /// Reserves the data blocks, and every page that a write into them will need.
    fn reserve(&self, offset: u64, end: u64) -> FsResult<()> {
        let group = group_of(offset);
        let region = region_of_group(group);
        let mut from = block_at(block_of(offset));
        if self.generation(group)? == 0 || group_start(group) >= self.size() {
            from = tag_page_at(group);
        }
        if self.generation_page(region)?.is_none() {
            let page = generation_page_at(region);
            if slot_of_group(group) == 0 {
                from = page;
            } else {
                self.backing.allocate(page, BLOCK, true)?;
            }
        }
        let to = block_at(block_of(end - 1)) + BLOCK;
        Ok(self.backing.allocate(from, to - from, true)?)
    }

    /// `FALLOC_FL_PUNCH_HOLE`: zeros the range and gives its space back; the size stays.
    pub fn punch_hole(&self, offset: u64, len: u64) -> FsResult<()> {
        self.make_holes(offset, len, Kind::Punch)
    }

    /// `FALLOC_FL_ZERO_RANGE`: zeros the range and keeps, or gets, its space.
    pub fn zero_range(&self, offset: u64, len: u64, keep_size: bool) -> FsResult<()> {
        self.allocate(offset, len, keep_size)?;
        self.make_holes(offset, len, Kind::Zero)
    }

    fn make_holes(&self, offset: u64, len: u64, kind: Kind) -> FsResult<()> {
        self.check_writable()?;
        if len == 0 {
            return Err(Errno::INVAL.into());
        }
        let room = self.shared.reserve(Stream::Hot, room_for(2))?;
        let last = offset.saturating_add(len - 1).min(MAX_SIZE);
        let _guard = self.locks.exclusive(group_of(offset)..=group_of(last).max(group_of(offset)));
        let size = self.size();
        let end = offset.saturating_add(len).min(size);
        if offset >= end {
            return Ok(());
        }
        let mut change = Change::new(self, kind);
        change.zero(offset, end, size)?;
        if change.is_empty() { Ok(()) } else { change.commit(room).map(drop) }
    }
}

impl Change<'_> {
    /// Zeros a range: its whole blocks become holes. The rest of the last block of the file does
    /// not exist, so it goes with it.
    fn zero(&mut self, from: u64, to: u64, size: u64) -> FsResult<()> {
        let to = if to == size { to.next_multiple_of(BLOCK) } else { to };
        let (whole_from, whole_to) = (from.div_ceil(BLOCK), to / BLOCK);
        if whole_from > whole_to {
            return self.zero_part(block_of(from), part(from, to)); // within one block
        }
        if !from.is_multiple_of(BLOCK) {
            self.zero_part(block_of(from), part(from, whole_from * BLOCK))?;
        }
        if !to.is_multiple_of(BLOCK) {
            self.zero_part(whole_to, part(whole_to * BLOCK, to))?;
        }
        self.make_holes(whole_from..whole_to, blocks_for(size))
    }

    /// Zeros part of one block, unless that is a hole.
    pub(super) fn zero_part(&mut self, block: u64, bytes: Range<usize>) -> FsResult<()> {
        if self.current(block)?.is_none() {
            return Ok(());
        }
        self.block(block, true, |content| content[bytes].fill(0))
    }
}

/// Of its block, the bytes `from..to` of a file.
fn part(from: u64, to: u64) -> Range<usize> {
    let at = (from % BLOCK) as usize;
    at..(at + (to - from) as usize).min(BLOCK_LEN)
}
