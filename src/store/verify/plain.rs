//! A file without its key: whether everything is in its place and fits together. What is inside is
//! believed; blocks are looked for, not opened.

use std::io;
use std::ops::Range;

use super::file::{Scratch, Tally, read_flaw};
use super::{Flaw, Joined, Sink, What, of_block, of_group, of_sectors};
use crate::backing::FileRef;
use crate::error::FsResult;
use crate::store::header::Header;
use crate::store::layout::{
    BLOCK, BLOCK_LEN, BLOCKS_PER_GROUP, BLOCKS_PER_SECTOR, GROUPS_PER_REGION, GROUPS_PER_SECTOR,
    SECTORS_PER_PAGE, block_at, blocks_for, generation_page_at, group_start, slot_of_group,
    tag_page_at,
};
use crate::store::page::{Accepts, Entry, FLAG_LOST, FLAG_SEALED, Page, PageId};
use crate::store::session::SessionTable;

pub(super) struct Plain<'a> {
    pub home: &'a FileRef,
    pub header: &'a Header,
    pub sessions: &'a SessionTable,
    /// No unfinished checkpoint can have been at work on it.
    pub exact: bool,
}

impl Plain<'_> {
    pub(super) fn check(
        &self,
        region: u64,
        groups: Range<u64>,
        scratch: &mut Scratch,
        sink: &mut Sink<'_>,
    ) -> FsResult<Tally> {
        let mut tally = Tally::default();
        let (size, newest) = (self.header.size, self.header.generation);
        let first = groups.start == region * GROUPS_PER_REGION as u64;
        let id = PageId::Generations(region);
        let page = match self.page(id, generation_page_at(region)) {
            Ok(page) => page,
            Err(error) => {
                let detail = read_flaw(error.into())?;
                if first {
                    let flaw = Flaw::new(What::Read, detail).at(generation_page_at(region));
                    let all =
                        region * GROUPS_PER_REGION as u64..(region + 1) * GROUPS_PER_REGION as u64;
                    sink(flaw.content(group_start(all.start)..group_start(all.end), size));
                }
                return Ok(tally);
            }
        };
        let good = self.sectors(&page, Accepts::Any, first.then_some(&mut *sink));
        if first {
            tally.bytes += BLOCK;
        }
        let there = self.extents(
            tag_page_at(groups.start)
                ..tag_page_at(groups.end - 1) + (1 + BLOCKS_PER_GROUP as u64) * BLOCK,
        );
        for group in groups {
            let slot = slot_of_group(group);
            let generation = page.generation(slot);
            if !good[slot / GROUPS_PER_SECTOR] || generation == 0 {
                continue;
            }
            if group_start(group) >= size {
                if self.exact {
                    let detail =
                        format!("group {group} is past the end of the file, and not holes");
                    sink(of_group(What::PastEnd, group, size, detail));
                }
                continue;
            }
            if generation > newest && self.exact {
                let detail =
                    format!("group {group} is of generation {generation}, the header of {newest}");
                sink(of_group(What::Generation, group, size, detail));
            }
            let id = PageId::Tags(group);
            match self.page(id, tag_page_at(group)) {
                Ok(page) => self.tags(&page, group, generation, &there, scratch, sink, &mut tally),
                Err(error) => {
                    let flaw = Flaw::new(What::Read, read_flaw(error.into())?);
                    let content = group_start(group)..group_start(group + 1);
                    sink(flaw.at(tag_page_at(group)).content(content, size));
                }
            }
        }
        Ok(tally)
    }

    fn page(&self, id: PageId, at: u64) -> io::Result<Page> {
        let mut bytes = Box::new([0; BLOCK_LEN]);
        self.home.read_at(&mut bytes[..], at)?;
        Ok(Page::from_disk(id, bytes, Accepts::Any))
    }

    /// Which sectors can be what they say; the others are told of.
    fn sectors(
        &self,
        page: &Page,
        accepts: Accepts,
        sink: Option<&mut Sink<'_>>,
    ) -> [bool; SECTORS_PER_PAGE] {
        let newest = self.header.generation;
        let mut good = [true; SECTORS_PER_PAGE];
        let mut bad = Vec::new();
        for (sector, good) in good.iter_mut().enumerate() {
            let generation = page.generation_of_sector(sector);
            let wrong = if !page.is_in_place(sector) {
                "not one of this place".to_owned()
            } else if !accepts.takes(generation) {
                format!("of generation {generation}, not that of its group")
            } else if self.exact && generation > newest {
                format!("of generation {generation}, the header of {newest}")
            } else {
                continue;
            };
            *good = false;
            bad.push((sector, wrong));
        }
        if let Some(sink) = sink {
            for alike in bad.chunk_by(|one, next| one.1 == next.1) {
                let sectors = alike.iter().map(|&(sector, _)| sector);
                of_sectors(page.id(), sectors, self.header.size, &alike[0].1, sink);
            }
        }
        good
    }

    #[allow(clippy::too_many_arguments)]
    fn tags(
        &self,
        page: &Page,
        group: u64,
        generation: u64,
        there: &Extents,
        scratch: &mut Scratch,
        sink: &mut Sink<'_>,
        tally: &mut Tally,
    ) {
        let size = self.header.size;
        let accepts =
            if self.exact { Accepts::Exactly(generation) } else { Accepts::AtLeast(generation) };
        let good = self.sectors(page, accepts, Some(sink));
        let sink = &mut Joined::new(sink);
        tally.bytes += BLOCK;
        for slot in 0..BLOCKS_PER_GROUP {
            let block = group * BLOCKS_PER_GROUP as u64 + slot as u64;
            let Some(entry) = page.entry(slot).filter(|_| good[slot / BLOCKS_PER_SECTOR]) else {
                continue;
            };
            if let Some((what, detail)) = self.entry(block, &entry, there) {
                sink.block(block, of_block(what, block, size, detail));
            }
            if entry.flags == FLAG_SEALED {
                tally.blocks += 1;
                scratch.note_nonce(entry.dek_slot, entry.session, entry.counter);
            }
        }
    }

    fn entry(&self, block: u64, entry: &Entry, there: &Extents) -> Option<(What, String)> {
        let Entry { flags, dek_slot, session, .. } = *entry;
        if block >= blocks_for(self.header.size) {
            let detail = "past the end of the file, and not a hole".to_owned();
            return self.exact.then_some((What::PastEnd, detail));
        }
        if flags == FLAG_LOST {
            let detail = "its tag was in a damaged sector that has been rewritten since";
            return Some((What::BlockLost, detail.into()));
        }
        let detail = if flags != FLAG_SEALED {
            "its tag entry has unknown flags".to_owned()
        } else if !self.header.deks.iter().any(|slot| slot.id == dek_slot) {
            format!("it names DEK slot {dek_slot}, the header has none")
        } else if self.sessions.get(session).is_none() {
            format!("session {session} is not in the session table")
        } else if self.exact && !there.contain(block_at(block)) {
            "there is nothing in its place".to_owned()
        } else {
            return None;
        };
        Some((What::Block, detail))
    }

    /// What of the range the disk has something of.
    fn extents(&self, range: Range<u64>) -> Extents {
        let mut extents = Vec::new();
        let mut at = range.start;
        while at < range.end {
            // A file system that cannot say has everything.
            let Ok(data) = self.home.seek_data(at) else { return Extents::All };
            let Some(data) = data.filter(|&data| data < range.end) else { break };
            let Ok(hole) = self.home.seek_hole(data) else { return Extents::All };
            let end = hole.unwrap_or(range.end);
            extents.push(data..end);
            at = end.max(data + 1);
        }
        Extents::Listed(extents)
    }
}

enum Extents {
    All,
    Listed(Vec<Range<u64>>),
}

impl Extents {
    /// Some of the block that begins there: one that is all zeros is not sealed.
    fn contain(&self, at: u64) -> bool {
        match self {
            Extents::All => true,
            Extents::Listed(extents) => {
                let i = extents.partition_point(|extent| extent.end <= at);
                extents.get(i).is_some_and(|extent| extent.start < at + BLOCK)
            }
        }
    }
}
