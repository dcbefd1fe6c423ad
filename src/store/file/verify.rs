//! Looking at all there is of a file, for who checks a volume: its pages and blocks as readers find
//! them, what the log holds over what the disk has.

use std::ops::Range;

use super::File;
use super::pages::position;
use crate::error::{FsError, FsResult};
use crate::store::block::Opener;
use crate::store::layout::{
    BLOCK, BLOCK_LEN, BLOCKS_PER_GROUP, BLOCKS_PER_SECTOR, GROUPS_PER_REGION, GROUPS_PER_SECTOR,
    SECTORS_PER_PAGE, blocks_for, group_start, slot_of_block, slot_of_group,
};
use crate::store::page::{Entry, FLAG_LOST, Page, PageId};
use crate::store::verify::{
    Flaw, Joined, Scratch, Sink, Tally, What, of_block, of_group, of_sectors, read_flaw,
};

impl File {
    /// The regions that have generation pages now.
    pub(in crate::store) fn runs(&self) -> Vec<Range<u64>> {
        self.state.lock().header.runs().collect()
    }

    /// Looks at some groups of a region, and at its generation page with the first of them.
    pub(in crate::store) fn verify(
        &self,
        region: u64,
        groups: Range<u64>,
        scratch: &mut Scratch,
        sink: &mut Sink<'_>,
    ) -> FsResult<Tally> {
        let mut tally = Tally::default();
        let size = self.size();
        let page = match self.generation_page(region).and_then(|page| self.all_verified(page)) {
            Ok(Some(page)) => page,
            Ok(None) => return Ok(tally),
            Err(error) => {
                let detail = read_flaw(error)?;
                if groups.start == region * GROUPS_PER_REGION as u64 {
                    let groups = GROUPS_PER_REGION as u64;
                    let content = group_start(region * groups)..group_start((region + 1) * groups);
                    let flaw = Flaw::new(What::Read, detail);
                    let at = position(PageId::Generations(region));
                    sink(flaw.at(at).content(content, size));
                }
                return Ok(tally);
            }
        };
        if groups.start == region * GROUPS_PER_REGION as u64 {
            tally.bytes += BLOCK;
            bad_sectors(&page, size, sink);
        }
        for group in groups {
            let slot = slot_of_group(group);
            let sector = slot / GROUPS_PER_SECTOR;
            let generation = page.generation(slot);
            if !page.is_verified(sector, sector) || generation == 0 {
                continue;
            }
            if group_start(group) >= size {
                let detail = format!("group {group} is past the end of the file, and not holes");
                sink(of_group(What::PastEnd, group, size, detail));
                continue;
            }
            let newest = self.state.lock().header.generation;
            if generation > newest && self.is_clean() {
                let detail =
                    format!("group {group} is of generation {generation}, the header of {newest}");
                sink(of_group(What::Generation, group, size, detail));
            }
            self.verify_group(group, size, scratch, sink, &mut tally)?;
        }
        Ok(tally)
    }

    fn all_verified<P: AsRef<Page>>(&self, page: Option<P>) -> FsResult<Option<P>> {
        if let Some(page) = &page {
            self.verify_what_is_right(page.as_ref())?;
        }
        Ok(page)
    }

    fn verify_group(
        &self,
        group: u64,
        size: u64,
        scratch: &mut Scratch,
        sink: &mut Sink<'_>,
        tally: &mut Tally,
    ) -> FsResult<()> {
        let page = match self.tag_page(group).and_then(|page| self.all_verified(page)) {
            Ok(Some(page)) => page,
            Ok(None) => return Ok(()),
            Err(error) => {
                let flaw = Flaw::new(What::Read, read_flaw(error)?);
                let content = group_start(group)..group_start(group + 1);
                sink(flaw.at(position(PageId::Tags(group))).content(content, size));
                return Ok(());
            }
        };
        bad_sectors(&page, size, sink);
        let sink = &mut Joined::new(sink);
        let first = group * BLOCKS_PER_GROUP as u64;
        let mut sealed = Vec::new();
        for slot in 0..BLOCKS_PER_GROUP {
            let (block, sector) = (first + slot as u64, slot / BLOCKS_PER_SECTOR);
            let Some(entry) = page.entry(slot).filter(|_| page.is_verified(sector, sector)) else {
                continue;
            };
            if block >= blocks_for(size) {
                let detail = "past the end of the file, and not a hole";
                sink.block(block, of_block(What::PastEnd, block, size, detail.into()));
            } else if entry.flags == FLAG_LOST {
                let detail = "its tag was in a damaged sector that has been rewritten since";
                sink.block(block, of_block(What::BlockLost, block, size, detail.into()));
            } else {
                sealed.push((block, entry));
            }
        }
        tally.bytes += BLOCK;
        let Some((last, _)) = sealed.last() else { return Ok(()) };
        let len = (last + 1 - first) as usize * BLOCK_LEN;
        if self.read_sealed(&page, first, &mut scratch.blocks[..len]).is_err() {
            self.read_one_by_one(&page, &mut sealed, size, scratch, sink)?;
        }
        tally.blocks += sealed.len() as u64;
        tally.bytes += sealed.len() as u64 * BLOCK;

        let lease = self.shared.gate.lease()?;
        let keys = self.keys();
        let mut opener = Opener::new(&self.shared, &keys, &lease);
        for (block, entry) in sealed {
            let bytes = &mut scratch.blocks[slot_of_block(block) * BLOCK_LEN..][..BLOCK_LEN];
            let blank = bytes.iter().all(|&byte| byte == 0);
            match opener.open(block, &entry, bytes) {
                Ok(()) => {
                    let end = (block + 1) * BLOCK;
                    let tail = (size.min(end) - block * BLOCK) as usize;
                    if bytes[tail..].iter().any(|&byte| byte != 0) {
                        let detail = "it goes on past the end of the file";
                        sink.other(of_block(What::Tail, block, size, detail.into()));
                    }
                }
                Err(FsError::Integrity(failure)) => {
                    let detail = match blank {
                        true => "there is nothing but zeros in its place".to_owned(),
                        false => failure.detail,
                    };
                    sink.block(
                        block,
                        self.place(block, of_block(What::Block, block, size, detail)),
                    );
                }
                Err(error) => return Err(error),
            }
            scratch.note_nonce(entry.dek_slot, entry.session, entry.counter);
        }
        Ok(lease.still_open()?)
    }

    /// After a read that failed: which of the blocks cannot be had.
    fn read_one_by_one(
        &self,
        page: &Page,
        sealed: &mut Vec<(u64, Entry)>,
        size: u64,
        scratch: &mut Scratch,
        sink: &mut Joined<'_, '_>,
    ) -> FsResult<()> {
        let mut readable = Vec::with_capacity(sealed.len());
        for (block, entry) in std::mem::take(sealed) {
            let at = slot_of_block(block) * BLOCK_LEN;
            match self.read_sealed(page, block, &mut scratch.blocks[at..at + BLOCK_LEN]) {
                Ok(()) => readable.push((block, entry)),
                Err(error) => {
                    let flaw = of_block(What::Read, block, size, read_flaw(error)?);
                    sink.block(block, self.place(block, flaw));
                }
            }
        }
        *sealed = readable;
        Ok(())
    }

    /// The flaw of a block, where that is: at home, or in the log.
    fn place(&self, block: u64, flaw: Flaw) -> Flaw {
        match self.spots(block, 1).and_then(|spots| spots[0]) {
            Some(spot) => {
                let path = self.shared.log.get().map(|log| log.path(spot.stream).to_owned());
                Flaw { place: path, at: Some(spot.at), ..flaw }
            }
            None => flaw,
        }
    }
}

/// The sectors that do not prove themselves.
fn bad_sectors(page: &Page, size: u64, sink: &mut Sink<'_>) {
    let bad = (0..SECTORS_PER_PAGE).filter(|&sector| !page.is_verified(sector, sector));
    of_sectors(page.id(), bad, size, "not authentic", sink);
}
