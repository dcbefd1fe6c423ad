//! Tag pages and generation pages: found, verified, changed.

use std::sync::Arc;

use super::File;
use crate::crypto::mac::MacKey;
use crate::error::{FsError, FsResult};
use crate::key::gate::Lease;
use crate::store::header::Header;
use crate::store::keys::hex;
use crate::store::layout::{
    BLOCK_LEN, GROUPS_PER_SECTOR, SECTOR_LEN, SECTORS_PER_PAGE, generation_page_at,
    region_of_group, slot_of_group, tag_page_at,
};
use crate::store::page::{Page, PageId, PageMac};
use rustix::io::Errno;

fn position(id: PageId) -> u64 {
    match id {
        PageId::Tags(group) => tag_page_at(group),
        PageId::Generations(region) => generation_page_at(region),
    }
}

impl File {
    /// The tag page of a group, None where the group is holes. The group must be locked.
    pub(super) fn tag_page(&self, group: u64) -> FsResult<Option<Arc<Page>>> {
        let id = PageId::Tags(group);
        if let Some(page) = self.shared.pages.get(&(self.cache_id(), id)) {
            return Ok(Some(page));
        }
        if self.generation(group)? == 0 {
            return Ok(None);
        }
        self.load_page(id).map(Some)
    }

    /// 0 for a group of holes.
    pub(super) fn generation(&self, group: u64) -> FsResult<u64> {
        let region = region_of_group(group);
        let Some(page) = self.generation_page(region)? else { return Ok(0) };
        let slot = slot_of_group(group);
        self.verify_sectors(&page, slot / GROUPS_PER_SECTOR, slot / GROUPS_PER_SECTOR)?;
        Ok(page.generation(slot))
    }

    pub(super) fn generation_page(&self, region: u64) -> FsResult<Option<Arc<Page>>> {
        let id = PageId::Generations(region);
        if let Some(page) = self.shared.pages.get(&(self.cache_id(), id)) {
            return Ok(Some(page));
        }
        self.generation_page_locked(&self.meta.lock(), region)
    }

    /// Under `meta`, so that no page is read while it is written.
    fn generation_page_locked(&self, meta: &Header, region: u64) -> FsResult<Option<Arc<Page>>> {
        let id = PageId::Generations(region);
        if let Some(page) = self.shared.pages.get(&(self.cache_id(), id)) {
            return Ok(Some(page));
        }
        if !meta.has_region(region) {
            return Ok(None);
        }
        self.load_page(id).map(Some)
    }

    fn load_page(&self, id: PageId) -> FsResult<Arc<Page>> {
        let mut bytes = Box::new([0; BLOCK_LEN]);
        // What is missing reads as zeros, which no sector is.
        self.backing.read_at(&mut bytes[..], position(id))?;
        let page = Arc::new(Page::from_disk(id, bytes));
        self.shared.pages.insert((self.cache_id(), id), page.clone());
        Ok(page)
    }

    pub(super) fn cache_page(&self, page: Page) {
        self.shared.pages.insert((self.cache_id(), page.id()), Arc::new(page));
    }

    pub(super) fn forget_page(&self, id: PageId) {
        self.shared.pages.remove(&(self.cache_id(), id));
    }

    /// Fails for the first sector of the range that does not prove itself.
    pub(super) fn verify_sectors(&self, page: &Page, first: usize, last: usize) -> FsResult<()> {
        if page.is_verified(first, last) {
            return Ok(());
        }
        let lease = self.shared.gate.lease()?;
        let key = self.shared.keys.file_mac(&lease, &self.keys)?;
        let mac = self.page_mac(&key);
        match (first..=last).find(|&sector| !page.verify(sector, &mac)) {
            Some(sector) => Err(self.damaged_sector(page.id(), sector)),
            None => Ok(()),
        }
    }

    fn damaged_sector(&self, id: PageId, sector: usize) -> FsError {
        let (PageId::Tags(index) | PageId::Generations(index)) = id;
        let index = index * SECTORS_PER_PAGE as u64 + sector as u64;
        let position = position(id) + (sector * SECTOR_LEN) as u64;
        let detail = format!("at byte {position} of the backing file");
        FsError::integrity(id.what(), hex(&self.keys.file_id), Some(index), detail)
    }

    fn page_mac<'a>(&'a self, key: &'a MacKey) -> PageMac<'a> {
        PageMac { key, volume: &self.shared.volume, file: &self.keys.file_id }
    }

    /// Gives the sectors MACs over what they now hold.
    pub(super) fn seal_sectors(
        &self,
        lease: &Lease<'_>,
        page: &mut Page,
        first: usize,
        last: usize,
    ) -> FsResult<()> {
        let key = self.shared.keys.file_mac(lease, &self.keys)?;
        let mac = self.page_mac(&key);
        (first..=last).for_each(|sector| page.seal(sector, &mac));
        Ok(())
    }

    /// Seals sectors `first..=last` of a changed page and makes it what counts.
    pub(super) fn store_page(&self, mut page: Page, first: usize, last: usize) -> FsResult<()> {
        {
            let lease = self.shared.gate.lease()?;
            self.seal_sectors(&lease, &mut page, first, last)?;
            lease.still_open()?;
        }
        self.write_sectors(&page, first, last)?;
        self.cache_page(page);
        Ok(())
    }

    /// Writes sectors `first..=last` of the page, which are sealed.
    pub(super) fn write_sectors(&self, page: &Page, first: usize, last: usize) -> FsResult<()> {
        let (from, to) = (first * SECTOR_LEN, (last + 1) * SECTOR_LEN);
        let at = position(page.id()) + from as u64;
        self.backing.write_at(&page.bytes()[from..to], at).map_err(|error| {
            // Whichever of the two the disk has now.
            self.forget_page(page.id());
            error.into()
        })
    }

    /// Notes that the group's tag page counts from now on; it has been written. Where that takes
    /// a change of the header, the size becomes `size` by the same write, if it is less.
    pub(super) fn materialise(&self, group: u64, size: u64) -> FsResult<()> {
        let region = region_of_group(group);
        let mut meta = self.meta.lock();
        if self.generation_page_locked(&meta, region)?.is_none() {
            return self.add_region(&mut meta, group, size);
        }
        self.change_generations(&meta, region, |page| {
            let slot = slot_of_group(group);
            if page.generation(slot) == 0 {
                page.set_generation(slot, 1);
            }
        })
    }

    /// Makes the groups of `slots` of the region groups of holes.
    pub(super) fn dematerialise(&self, region: u64, slots: std::ops::Range<usize>) -> FsResult<()> {
        let meta = self.meta.lock();
        self.change_generations(&meta, region, |page| {
            for slot in slots.clone() {
                page.set_generation(slot, 0);
            }
        })?;
        let first = region * crate::store::layout::GROUPS_PER_REGION as u64;
        for slot in slots {
            self.forget_page(PageId::Tags(first + slot as u64));
        }
        Ok(())
    }

    /// Writes the sectors of the region's generation page that `change` alters.
    fn change_generations(
        &self,
        meta: &Header,
        region: u64,
        change: impl FnOnce(&mut Page),
    ) -> FsResult<()> {
        let Some(old) = self.generation_page_locked(meta, region)? else { return Ok(()) };
        let mut page = Page::clone(&old);
        change(&mut page);
        let altered = |sector: &usize| {
            let range = sector * SECTOR_LEN..(sector + 1) * SECTOR_LEN;
            page.bytes()[range.clone()] != old.bytes()[range]
        };
        let mut altered = (0..SECTORS_PER_PAGE).filter(altered);
        let Some(first) = altered.next() else { return Ok(()) };
        let last = altered.last().unwrap_or(first);
        self.verify_sectors(&old, first, last)?;
        self.store_page(page, first, last)
    }

    /// The first group of its region that is not holes: the region gets a generation page.
    fn add_region(&self, meta: &mut Header, group: u64, size: u64) -> FsResult<()> {
        let region = region_of_group(group);
        let mut next = meta.clone();
        let added = next.add_region(u32::try_from(region).map_err(|_| Errno::FBIG)?);
        next.size = next.size.max(size);
        for number in added.into_iter().map(u64::from) {
            let mut page = Page::empty(PageId::Generations(number));
            if number == region {
                page.set_generation(slot_of_group(group), 1);
            }
            self.store_page(page, 0, SECTORS_PER_PAGE - 1)?;
        }
        let done = self.update_header(meta, |header| *header = next);
        if done.is_err() {
            // A cached page counts, and without the header this one does not.
            self.forget_page(PageId::Generations(region));
        }
        done
    }
}
