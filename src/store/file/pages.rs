//! Tag pages and generation pages: found and verified.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::File;
use super::overlay::Spot;
use crate::crypto::mac::MacKey;
use crate::error::{FsError, FsResult};
use crate::store::intent_log::Entry as Listed;
use crate::store::keys::hex;
use crate::store::layout::{
    BLOCK_LEN, BLOCKS_PER_GROUP, BLOCKS_PER_SECTOR, GROUPS_PER_REGION, GROUPS_PER_SECTOR, MAX_SIZE,
    SECTOR_LEN, SECTORS_PER_PAGE, generation_page_at, group_of, region_of_group, slot_of_block,
    slot_of_group, tag_page_at,
};
use crate::store::page::{Accepts, Page, PageId, PageMac};

pub(super) fn position(id: PageId) -> u64 {
    match id {
        PageId::Tags(group) => tag_page_at(group),
        PageId::Generations(region) => generation_page_at(region),
    }
}

impl File {
    /// The tag page of a group, None where the group is holes. The group must be locked.
    pub(super) fn tag_page(&self, group: u64) -> FsResult<Option<Arc<Page>>> {
        let id = PageId::Tags(group);
        let clean = self.is_clean();
        if clean && let Some(page) = self.shared.pages.get(&(self.cache_id(), id)) {
            return Ok(Some(page));
        }
        if !clean && let Some(page) = self.state.lock().dirty.pages.get(&id) {
            return Ok(Some(page.clone()));
        }
        // What lies below counts only as long as its group does.
        let generation = self.generation(group)?;
        if generation == 0 {
            return Ok(None);
        }
        if !clean && let Some(page) = self.state.lock().page(id) {
            return Ok(Some(page.clone()));
        }
        if let Some(page) = self.shared.pages.get(&(self.cache_id(), id)) {
            return Ok(Some(page));
        }
        let accepts = if self.recovering.load(Ordering::Acquire) {
            Accepts::AtLeast(generation)
        } else {
            Accepts::Exactly(generation)
        };
        self.load_page(id, accepts).map(Some)
    }

    /// 0 for a group of holes.
    pub(super) fn generation(&self, group: u64) -> FsResult<u64> {
        match self.generation_page(region_of_group(group))? {
            Some(page) => self.generation_in(&page, group),
            None => Ok(0),
        }
    }

    pub(super) fn generation_in(&self, page: &Page, group: u64) -> FsResult<u64> {
        let slot = slot_of_group(group);
        self.verify_sectors(page, slot / GROUPS_PER_SECTOR, slot / GROUPS_PER_SECTOR)?;
        Ok(page.generation(slot))
    }

    /// The first group of the next region that is not all holes; past the largest file if there is none.
    /// A file may have billions of regions that are.
    pub(super) fn group_after_region(&self, region: u64) -> u64 {
        let next = self.state.lock().header.next_region(region + 1);
        next.unwrap_or(region_of_group(group_of(MAX_SIZE)) + 1) * GROUPS_PER_REGION as u64
    }

    pub(super) fn generation_page(&self, region: u64) -> FsResult<Option<Arc<Page>>> {
        let id = PageId::Generations(region);
        let newest = {
            let state = self.state.lock();
            if !state.header.has_region(region) {
                return Ok(None);
            }
            if let Some(page) = state.page(id) {
                return Ok(Some(page.clone()));
            }
            state.header.generation
        };
        if let Some(page) = self.shared.pages.get(&(self.cache_id(), id)) {
            return Ok(Some(page));
        }
        let recovering = self.recovering.load(Ordering::Acquire);
        let accepts = if recovering { Accepts::Any } else { Accepts::AtMost(newest) };
        self.load_page(id, accepts).map(Some)
    }

    fn load_page(&self, id: PageId, accepts: Accepts) -> FsResult<Arc<Page>> {
        let mut bytes = Box::new([0; BLOCK_LEN]);
        // What is missing reads as zeros, which no sector is.
        self.backing.read_at(&mut bytes[..], position(id))?;
        let page = Arc::new(Page::from_disk(id, bytes, accepts));
        self.shared.pages.insert((self.cache_id(), id), page.clone());
        Ok(page)
    }

    pub(super) fn cache_page(&self, page: Arc<Page>) {
        self.shared.pages.insert((self.cache_id(), page.id()), page);
    }

    /// The next read of it, if no change waits to go home, comes from the disk.
    pub(super) fn forget_page(&self, id: PageId) {
        self.shared.pages.remove(&(self.cache_id(), id));
    }

    /// Fails for the first sector of the range that does not prove itself.
    pub(super) fn verify_sectors(&self, page: &Page, first: usize, last: usize) -> FsResult<()> {
        if page.is_verified(first, last) {
            return Ok(());
        }
        let lease = self.shared.gate.lease()?;
        let key = self.shared.keys.file_mac(&lease, &self.keys())?;
        let mac = self.page_mac(&key);
        match (first..=last).find(|&sector| !page.verify(sector, &mac)) {
            Some(sector) => Err(self.damaged_sector(page.id(), sector)),
            None => Ok(()),
        }
    }

    /// Finds out which sectors of a page that will be changed prove themselves: the others will be
    /// written back as they are.
    pub(super) fn verify_what_is_right(&self, page: &Page) -> FsResult<()> {
        if page.is_verified(0, SECTORS_PER_PAGE - 1) {
            return Ok(());
        }
        let lease = self.shared.gate.lease()?;
        let key = self.shared.keys.file_mac(&lease, &self.keys())?;
        let mac = self.page_mac(&key);
        (0..SECTORS_PER_PAGE).for_each(|sector| _ = page.verify(sector, &mac));
        Ok(())
    }

    /// The next checkpoint has a higher generation than whatever an unfinished one has left.
    pub(super) fn note_generation(&self, page: &Page) {
        if self.recovering.load(Ordering::Acquire) {
            let header = &mut self.state.lock().header;
            header.generation = header.generation.max(page.newest());
        }
    }

    /// The same for a group that is holes: an unfinished checkpoint may have given it a page that
    /// nothing counts yet.
    pub(super) fn note_unfinished(&self, group: u64) -> FsResult<()> {
        if !self.recovering.load(Ordering::Acquire) {
            return Ok(());
        }
        self.note_generation(&self.uncounted_page(group)?);
        Ok(())
    }

    /// Whether the tag page at home, counted or not, has one of these entries. Then a checkpoint put
    /// it there, and the record that it is of was on stable storage before that.
    pub(in crate::store) fn has_brought_home(&self, entries: &[Listed]) -> FsResult<bool> {
        let mut last: Option<(u64, Page)> = None;
        for listed in entries {
            let group = listed.block / BLOCKS_PER_GROUP as u64;
            if last.as_ref().is_none_or(|(of, _)| *of != group) {
                last = Some((group, self.uncounted_page(group)?));
            }
            let slot = slot_of_block(listed.block);
            let sector = slot / BLOCKS_PER_SECTOR;
            let found = last.as_ref().filter(|(_, page)| page.is_verified(sector, sector));
            let entry = found.and_then(|(_, page)| page.entry(slot));
            if entry.is_some_and(|entry| entry.encode() == listed.bytes) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// A tag page as it is at home, whether or not its group has one.
    fn uncounted_page(&self, group: u64) -> FsResult<Page> {
        let mut bytes = Box::new([0; BLOCK_LEN]);
        self.backing.read_at(&mut bytes[..], tag_page_at(group))?;
        let page = Page::from_disk(PageId::Tags(group), bytes, Accepts::Any);
        self.verify_what_is_right(&page)?;
        Ok(page)
    }

    pub(super) fn damaged_sector(&self, id: PageId, sector: usize) -> FsError {
        let (PageId::Tags(index) | PageId::Generations(index)) = id;
        let index = index * SECTORS_PER_PAGE as u64 + sector as u64;
        let position = position(id) + (sector * SECTOR_LEN) as u64;
        let detail = format!("at byte {position} of the backing file");
        FsError::integrity(id.what(), hex(&self.file_id), Some(index), detail)
    }

    pub(super) fn page_mac<'a>(&'a self, key: &'a MacKey) -> PageMac<'a> {
        PageMac { key, volume: &self.shared.volume, file: &self.file_id }
    }

    /// Whether the blocks, of one group, may be written home at once: they are holes in what is
    /// durable, and nothing at home is needed in their place. The group is locked.
    pub(super) fn are_new(&self, blocks: std::ops::Range<u64>) -> FsResult<bool> {
        if self.state.lock().removed(&blocks) {
            return Ok(false);
        }
        let Some(page) = self.tag_page(blocks.start / BLOCKS_PER_GROUP as u64)? else {
            return Ok(true);
        };
        self.verify_what_is_right(&page)?;
        Ok(blocks.into_iter().all(|block| page.entry(slot_of_block(block)).is_none()))
    }

    /// Where blocks are that the log has: for each of `count` blocks from `first` on. None where
    /// all are home.
    pub(super) fn spots(&self, first: u64, count: usize) -> Option<Vec<Option<Spot>>> {
        if self.is_clean() {
            return None;
        }
        let state = self.state.lock();
        let spots: Vec<_> = (first..).take(count).map(|block| state.spot(block)).collect();
        spots.iter().any(Option::is_some).then_some(spots)
    }
}
