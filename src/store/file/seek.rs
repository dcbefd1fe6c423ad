//! Finding data and holes.

use super::File;
use crate::error::FsResult;
use crate::store::layout::{
    BLOCK, BLOCKS_PER_GROUP, BLOCKS_PER_SECTOR, block_of, blocks_for, group_of, group_start,
    region_of_group, slot_of_block,
};

impl File {
    /// The start of the next data at or after `offset`; None past the last data.
    pub fn seek_data(&self, offset: u64) -> FsResult<Option<u64>> {
        let found = self.seek(offset, true)?;
        Ok(found.filter(|&at| at < self.size()))
    }

    /// The start of the next hole; the end of the file is one. None at or past the end.
    pub fn seek_hole(&self, offset: u64) -> FsResult<Option<u64>> {
        let size = self.size();
        if offset >= size {
            return Ok(None);
        }
        Ok(Some(self.seek(offset, false)?.map_or(size, |at| at.min(size))))
    }

    /// The first byte at or after `offset` in a block that is sealed, or is not.
    fn seek(&self, offset: u64, sealed: bool) -> FsResult<Option<u64>> {
        let mut block = block_of(offset);
        loop {
            let size = self.size();
            if block >= blocks_for(size) || offset >= size {
                return Ok(None);
            }
            let group = group_of(block * BLOCK);
            let _guard = self.locks.shared(group..=group);
            let Some(page) = self.tag_page(group)? else {
                if !sealed {
                    return Ok(Some(offset.max(block * BLOCK)));
                }
                let next = self.past_holes(group)?;
                block = group_start(next) / BLOCK;
                continue;
            };
            for slot in slot_of_block(block)..BLOCKS_PER_GROUP {
                self.verify_sectors(&page, slot / BLOCKS_PER_SECTOR, slot / BLOCKS_PER_SECTOR)?;
                if page.entry(slot).is_some() == sealed {
                    return Ok(Some(offset.max(block * BLOCK)));
                }
                block += 1;
                if block >= blocks_for(size) {
                    return Ok(None);
                }
            }
        }
    }

    /// After a group of holes, the next that may be something else.
    fn past_holes(&self, group: u64) -> FsResult<u64> {
        let region = region_of_group(group);
        let absent = self.generation_page(region)?.is_none();
        Ok(if absent { self.group_after_region(region) } else { group + 1 })
    }
}
