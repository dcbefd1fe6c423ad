//! Changing the size.

use super::File;
use super::write::Source;
use crate::error::FsResult;
use crate::store::layout::{
    BLOCK, BLOCK_LEN, BLOCKS_PER_GROUP, BLOCKS_PER_SECTOR, GROUP_PLAIN, GROUPS_PER_REGION,
    MAX_SIZE, backing_len, block_of, blocks_for, group_of, region_of_group, slot_of_block,
    slot_of_group,
};
use crate::store::page::Page;
use rustix::io::Errno;

impl File {
    /// Sets the size. What is cut off never returns: the file reads zeros where it grows again.
    pub fn truncate(&self, len: u64) -> FsResult<()> {
        self.check_writable()?;
        if len > MAX_SIZE {
            return Err(Errno::FBIG.into());
        }
        let _guard = self.locks.exclusive(0..=u64::MAX);
        let size = self.size();
        if len > size {
            return self.extend(size, len);
        }
        if len == size {
            return Ok(());
        }
        self.set_size(len)?;
        // Pages of groups past the end are no longer what the cache says.
        self.forget_pages();
        if let Err(error) = self.backing.set_len(backing_len(len)) {
            log::warn!("a truncated file keeps its space on disk: {error}");
        }
        Ok(())
    }

    /// From `size` to `len` by zeros. The groups from the one of `size` on are locked.
    pub(super) fn extend(&self, size: u64, len: u64) -> FsResult<()> {
        self.clear_beyond(size)?;
        // First, since this is what fails where the backing file system takes no such size.
        self.backing.set_len(backing_len(len))?;
        self.set_size(len)
    }

    /// Before bytes past `size` become readable without having been written: makes them zeros.
    /// The groups from the one of `size` on are locked.
    pub(super) fn clear_beyond(&self, size: u64) -> FsResult<()> {
        if !size.is_multiple_of(GROUP_PLAIN) {
            let group = group_of(size);
            if let Some(page) = self.tag_page(group)? {
                if !size.is_multiple_of(BLOCK) {
                    self.clear_tail(size, &page)?;
                }
                self.clear_entries_from(group, blocks_for(size))?;
            }
        }
        let first_group = if size == 0 { 0 } else { group_of(size - 1) + 1 };
        let region = region_of_group(first_group);
        let first = slot_of_group(first_group);
        // No region past that of the size has a generation page: truncation drops them, and a
        // header that names a new one is written with or after the size.
        self.dematerialise(region, first..GROUPS_PER_REGION)
    }

    /// Zeros the rest of the block that `size` lies in, if it has anything else.
    fn clear_tail(&self, size: u64, page: &Page) -> FsResult<()> {
        let block = block_of(size);
        let slot = slot_of_block(block);
        self.verify_sectors(page, slot / BLOCKS_PER_SECTOR, slot / BLOCKS_PER_SECTOR)?;
        let Some(entry) = page.entry(slot) else { return Ok(()) };
        let stale = {
            let mut buffer = self.shared.buffers.take();
            let bytes = &mut buffer[..BLOCK_LEN];
            self.read_block(block, &entry, bytes)?;
            bytes[(size % BLOCK) as usize..].iter().any(|&byte| byte != 0)
        };
        if stale {
            self.write_range(size, Source::Zeros(BLOCK - size % BLOCK), size, size)?;
        }
        Ok(())
    }

    /// Makes the blocks from `first` to the end of their group holes.
    fn clear_entries_from(&self, group: u64, first: u64) -> FsResult<()> {
        if first / BLOCKS_PER_GROUP as u64 != group {
            return Ok(());
        }
        self.clear_entries(group, slot_of_block(first)..BLOCKS_PER_GROUP)
    }

    /// Makes blocks of a group holes. A damaged sector of which every block is to go is replaced.
    pub(super) fn clear_entries(&self, group: u64, slots: std::ops::Range<usize>) -> FsResult<()> {
        let Some(old) = self.tag_page(group)? else { return Ok(()) };
        if slots.is_empty() {
            return Ok(());
        }
        let (first, last) = (slots.start / BLOCKS_PER_SECTOR, (slots.end - 1) / BLOCKS_PER_SECTOR);
        let mut page = Page::clone(&old);
        let mut damaged = Vec::new();
        for sector in first..=last {
            let all = sector * BLOCKS_PER_SECTOR..(sector + 1) * BLOCKS_PER_SECTOR;
            let covered = slots.start <= all.start && all.end <= slots.end;
            match self.verify_sectors(&old, sector, sector) {
                Err(crate::error::FsError::Integrity(_)) if covered => {
                    page.reset_sector(sector);
                    damaged.push(sector);
                }
                done => done?,
            }
        }
        let changed = |slot: &usize| {
            page.entry(*slot).is_some() || damaged.contains(&(slot / BLOCKS_PER_SECTOR))
        };
        let mut changed = slots.clone().filter(changed);
        let Some(from) = changed.next() else { return Ok(()) };
        let to = changed.last().unwrap_or(from);
        for slot in slots {
            page.set_entry(slot, None);
        }
        let (first, last) = (from / BLOCKS_PER_SECTOR, to / BLOCKS_PER_SECTOR);
        self.store_page(page, first, last)
    }
}
