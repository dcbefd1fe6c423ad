//! What of a file is newer than its home: changes that the log holds and no checkpoint has brought
//! home yet. No I/O.
//!
//! Pages here are whole and trusted; they get their MACs when they go home. Two overlays lie one
//! upon the other: the one that requests change, and below it, while a checkpoint runs, the one
//! that is being written home.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use super::removed::Removed;
use crate::backing::Timestamp;
use crate::store::header::Header;
use crate::store::intent_log::{STREAMS, Stream};
use crate::store::layout::{BLOCK, GROUPS_PER_REGION, group_of, region_of_group, slot_of_group};
use crate::store::page::{Page, PageId};

/// Where the ciphertext of a block is, in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    pub stream: Stream,
    pub at: u64,
}

#[derive(Debug, Default)]
pub(super) struct Overlay {
    pub pages: HashMap<PageId, Arc<Page>>,
    pub blocks: BTreeMap<u64, Spot>,
    pub removed: Removed,
    /// Bytes at home that are holes now, and whose space comes back with the checkpoint, about.
    pub freed: u64,
    /// Regions whose generation page does not count at home yet.
    pub new_regions: BTreeSet<u64>,
    /// Something is to go home.
    pub changed: bool,
    /// No record of this overlay has a lower seq; None where it has no record.
    pub first: Option<[u64; STREAMS]>,
    /// With `first`, the file is among the dirty files, and stays there.
    pub listed: bool,
}

/// The current state of a file, as far as it is not on the disk alone.
#[derive(Debug)]
pub(super) struct State {
    /// What the header says, with all changes; its generation is that of the last checkpoint begun.
    pub header: Header,
    pub dirty: Overlay,
    /// What a running checkpoint is bringing home.
    pub inflight: Option<Overlay>,
    /// The last record of each stream, 0 for none.
    pub last: [u64; STREAMS],
    /// While something is dirty: the times that the file shows.
    pub times: Option<Times>,
    /// Positions at home that were reserved for what will be written beyond the end.
    pub ahead: Range<u64>,
    /// Space beyond the end may be there that nobody asked for, or needs any more.
    pub trim_end: bool,
    /// Positions at home beyond the end for which somebody asked.
    pub asked: Range<u64>,
    /// It has no name, and nobody can reach it.
    pub forsaken: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// None: that of the backing file.
    pub mtime: Option<Timestamp>,
    pub ctime: Timestamp,
}

impl State {
    pub(super) fn new(header: Header) -> State {
        State {
            header,
            dirty: Overlay::default(),
            inflight: None,
            last: [0; STREAMS],
            times: None,
            trim_end: false,
            ahead: 0..0,
            asked: 0..0,
            forsaken: false,
        }
    }

    pub(super) fn page(&self, id: PageId) -> Option<&Arc<Page>> {
        let below = || self.inflight.as_ref().and_then(|overlay| overlay.pages.get(&id));
        self.dirty.pages.get(&id).or_else(below)
    }

    pub(super) fn spot(&self, block: u64) -> Option<Spot> {
        let below = || self.inflight.as_ref().and_then(|overlay| overlay.blocks.get(&block));
        self.dirty.blocks.get(&block).or_else(below).copied()
    }

    /// Whether a block of the range has become a hole, and the disk may not know yet.
    pub(super) fn removed(&self, blocks: &Range<u64>) -> bool {
        let below = self.inflight.as_ref().is_some_and(|overlay| overlay.removed.touches(blocks));
        below || self.dirty.removed.touches(blocks)
    }

    /// What the next checkpoint gives back, about, in bytes.
    pub(super) fn freed(&self) -> u64 {
        self.dirty.freed + self.inflight.as_ref().map_or(0, |overlay| overlay.freed)
    }

    fn overlays(&mut self) -> impl Iterator<Item = &mut Overlay> {
        self.inflight.iter_mut().chain([&mut self.dirty])
    }

    /// Space was asked for, for these blocks: those that became holes do not lose it any more.
    pub(super) fn keep_space(&mut self, blocks: &Range<u64>) {
        for overlay in self.overlays() {
            let kept = overlay.removed.keep(blocks) * BLOCK;
            overlay.freed = overlay.freed.saturating_sub(kept);
        }
    }

    /// Space beyond the end was asked for. Of two requests with something between them the later
    /// counts: nobody asked for what is between.
    pub(super) fn ask(&mut self, positions: Range<u64>) {
        let apart = positions.end < self.asked.start || self.asked.end < positions.start;
        self.asked = match self.asked.is_empty() || apart {
            true => positions,
            false => self.asked.start.min(positions.start)..self.asked.end.max(positions.end),
        };
    }

    /// Nobody wants the space beyond the end any more.
    pub(super) fn ask_for_nothing(&mut self) {
        self.asked = 0..0;
        self.trim_end = true;
    }

    /// Blocks that were holes are not any more.
    pub(super) fn filled(&mut self, blocks: &Range<u64>) {
        for overlay in self.overlays() {
            let needed = overlay.removed.given_back(blocks) * BLOCK;
            overlay.freed = overlay.freed.saturating_sub(needed);
        }
    }

    /// The lowest seqs that anything of this file may need.
    pub(super) fn first(&self) -> Option<[u64; STREAMS]> {
        let below = self.inflight.as_ref().and_then(|overlay| overlay.first);
        match (self.dirty.first, below) {
            (Some(a), Some(b)) => Some([a[0].min(b[0]), a[1].min(b[1])]),
            (a, b) => a.or(b),
        }
    }

    /// The generation page of a region, to be changed; `loaded` is what the disk has of it. None
    /// where the region is holes.
    fn generations(&mut self, region: u64, loaded: Option<&Arc<Page>>) -> Option<&mut Page> {
        if !self.header.has_region(region) {
            return None;
        }
        let id = PageId::Generations(region);
        let current = self.page(id).or(loaded)?.clone();
        let page = self.dirty.pages.entry(id).or_insert(current);
        Some(Arc::make_mut(page))
    }

    /// Makes the tag page that of its group.
    pub(super) fn put_page(&mut self, page: Page, loaded: Option<&Arc<Page>>) {
        let PageId::Tags(group) = page.id() else { return };
        let region = region_of_group(group);
        if !self.header.has_region(region) {
            for number in self.header.add_region(region as u32).into_iter().map(u64::from) {
                let id = PageId::Generations(number);
                self.dirty.pages.insert(id, Arc::new(Page::empty(id)));
                self.dirty.new_regions.insert(number);
            }
        }
        let next = self.header.generation + 1;
        if let Some(generations) = self.generations(region, loaded) {
            let slot = slot_of_group(group);
            if generations.generation(slot) == 0 {
                generations.set_generation(slot, next);
            }
        }
        self.dirty.pages.insert(page.id(), Arc::new(page));
    }

    /// Makes a group one of holes.
    pub(super) fn drop_group(&mut self, group: u64, loaded: Option<&Arc<Page>>) {
        self.dirty.pages.remove(&PageId::Tags(group));
        if let Some(generations) = self.generations(region_of_group(group), loaded) {
            generations.set_generation(slot_of_group(group), 0);
        }
    }

    /// Forgets everything of the regions past that of `size`: whatever the size was, since at recovery
    /// older records may have put something past that.
    pub(super) fn set_size(&mut self, size: u64) {
        let kept = if size == 0 { 0 } else { region_of_group(group_of(size - 1)) + 1 };
        if self.header.drop_regions_from(kept) {
            let stays = |id: &PageId| match *id {
                PageId::Tags(group) => group < kept * GROUPS_PER_REGION as u64,
                PageId::Generations(region) => region < kept,
            };
            self.dirty.pages.retain(|id, _| stays(id));
            self.dirty.new_regions.retain(|&region| region < kept);
        }
        self.header.size = size;
    }

    /// Moves what is dirty to where a checkpoint finds it, and gives it the next generation.
    pub(super) fn begin(&mut self) {
        self.header.generation += 1;
        let generation = self.header.generation;
        let groups: Vec<u64> = self.dirty.pages.keys().filter_map(|id| id.group()).collect();
        for group in groups {
            if let Some(page) = self.generations(region_of_group(group), None) {
                page.set_generation(slot_of_group(group), generation);
            }
        }
        self.inflight = Some(std::mem::take(&mut self.dirty));
    }

    /// The checkpoint failed: what it was to bring home stays to be brought.
    pub(super) fn put_back(&mut self) {
        let Some(old) = self.inflight.take() else { return };
        for (id, page) in old.pages {
            let counts = match id {
                PageId::Generations(region) => self.header.has_region(region),
                PageId::Tags(group) => {
                    let region = region_of_group(group);
                    let newer = self.dirty.pages.get(&PageId::Generations(region));
                    let gone = newer.is_some_and(|page| page.generation(slot_of_group(group)) == 0);
                    self.header.has_region(region)
                        && !gone
                        && !self.dirty.new_regions.contains(&region)
                }
            };
            if counts {
                self.dirty.pages.entry(id).or_insert(page);
            }
        }
        for (block, spot) in old.blocks {
            self.dirty.blocks.entry(block).or_insert(spot);
        }
        for part in old.removed.parts() {
            self.dirty.removed.add_older(part.first, part.past, part.keep);
        }
        self.dirty.freed += old.freed;
        let header = &self.header;
        let kept = old.new_regions.into_iter().filter(|&region| header.has_region(region));
        self.dirty.new_regions.extend(kept);
        self.dirty.changed |= old.changed;
        self.dirty.first = match (self.dirty.first, old.first) {
            (Some(a), Some(b)) => Some([a[0].min(b[0]), a[1].min(b[1])]),
            (a, b) => a.or(b),
        };
    }
}
