//! Allocating and giving back space.

use rustix::io::Errno;

use super::File;
use super::write::Source;
use crate::error::FsResult;
use crate::store::layout::{
    BLOCK, GROUP_LEN, MAX_SIZE, block_at, block_of, generation_page_at, group_of, group_start,
    part_in_group, region_of_group, slot_of_block, slot_of_group, tag_page_at,
};

impl File {
    /// `fallocate(2)`: reserves space, which reads as it did, or as zeros.
    pub fn allocate(&self, offset: u64, len: u64, keep_size: bool) -> FsResult<()> {
        self.check_writable()?;
        if len == 0 {
            return Err(Errno::INVAL.into());
        }
        let (_guard, offset) = self.lock_for_write(offset, len, false)?;
        self.allocate_locked(offset, len, keep_size)
    }

    fn allocate_locked(&self, offset: u64, len: u64, keep_size: bool) -> FsResult<()> {
        let end = offset + len;
        self.reserve(offset, end)?;
        let size = self.size();
        if end > size && !keep_size { self.extend(size, end) } else { Ok(()) }
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
        self.make_holes(offset, len, true)
    }

    /// `FALLOC_FL_ZERO_RANGE`: zeros the range and keeps, or gets, its space.
    pub fn zero_range(&self, offset: u64, len: u64, keep_size: bool) -> FsResult<()> {
        self.check_writable()?;
        if len == 0 {
            return Err(Errno::INVAL.into());
        }
        {
            let (_guard, offset) = self.lock_for_write(offset, len, false)?;
            self.allocate_locked(offset, len, keep_size)?;
        }
        self.make_holes(offset, len, false)
    }

    fn make_holes(&self, offset: u64, len: u64, punch: bool) -> FsResult<()> {
        self.check_writable()?;
        if len == 0 {
            return Err(Errno::INVAL.into());
        }
        let last = offset.saturating_add(len - 1).min(MAX_SIZE);
        let _guard = self.locks.exclusive(group_of(offset)..=group_of(last).max(group_of(offset)));
        let size = self.size();
        let end = offset.saturating_add(len).min(size);
        if offset >= end {
            return Ok(());
        }
        let mut group = group_of(offset);
        while group <= group_of(end - 1) {
            if let Some(next) = self.next_region_if_absent(group)? {
                group = next;
                continue;
            }
            let part = part_in_group(offset, end, group);
            // The rest of the last block does not exist, so it goes with it.
            let past = if part.end == size { part.end.next_multiple_of(BLOCK) } else { part.end };
            self.make_holes_in_group(group, part.start, past, size, punch)?;
            group += 1;
        }
        Ok(())
    }

    /// The first group of the next region, where that of `group` has nothing but holes.
    pub(super) fn next_region_if_absent(&self, group: u64) -> FsResult<Option<u64>> {
        let left = crate::store::layout::GROUPS_PER_REGION - slot_of_group(group);
        let absent = self.generation_page(region_of_group(group))?.is_none();
        Ok(absent.then_some(group + left as u64))
    }

    fn make_holes_in_group(
        &self,
        group: u64,
        from: u64,
        to: u64,
        size: u64,
        punch: bool,
    ) -> FsResult<()> {
        if self.generation(group)? == 0 {
            // Holes already, but perhaps with space reserved for them.
            if punch {
                let (at, to) = (block_at(block_of(from)), block_at(block_of(to - 1)) + BLOCK);
                self.backing.punch_hole(at, to - at)?;
            }
            return Ok(());
        }
        if from == group_start(group) && (to == group_start(group + 1) || to >= size) {
            let slot = slot_of_group(group);
            self.dematerialise(region_of_group(group), slot..slot + 1)?;
            if punch {
                self.backing.punch_hole(tag_page_at(group), GROUP_LEN)?;
            }
            return Ok(());
        }
        let (whole_from, whole_to) = (from.div_ceil(BLOCK), to / BLOCK);
        if whole_from > whole_to {
            return self.zero_sealed(from, to, size); // within one block
        }
        self.zero_sealed(from, whole_from * BLOCK, size)?;
        self.zero_sealed(whole_to * BLOCK, to, size)?;
        if whole_from == whole_to {
            return Ok(());
        }
        let first = slot_of_block(whole_from);
        let count = (whole_to - whole_from) as usize;
        self.clear_entries(group, first..first + count)?;
        if punch {
            self.backing.punch_hole(block_at(whole_from), count as u64 * BLOCK)?;
        }
        Ok(())
    }

    /// Zeros part of one block, unless that is a hole.
    fn zero_sealed(&self, from: u64, to: u64, size: u64) -> FsResult<()> {
        if from == to {
            return Ok(());
        }
        let page = self.tag_page(group_of(from))?;
        let Some(page) = page else { return Ok(()) };
        let slot = slot_of_block(block_of(from));
        let sector = slot / crate::store::layout::BLOCKS_PER_SECTOR;
        self.verify_sectors(&page, sector, sector)?;
        if page.entry(slot).is_none() {
            return Ok(());
        }
        self.write_range(from, Source::Zeros(to - from), size, size)?;
        Ok(())
    }
}
