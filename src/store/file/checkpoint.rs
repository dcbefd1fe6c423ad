//! Bringing a file's changes home, in steps that the checkpointer takes for many files at once:
//!
//! 1. [`File::begin_checkpoint`] sets aside what is dirty. Requests go on, over it.
//! 2. The log is flushed: from here on everything that was set aside survives whatever happens.
//! 3. [`File::write_home`]: blocks and tag pages. Flushed.
//! 4. [`File::write_new_regions`]: generation pages that the header does not name yet; what they
//!    say is there then, and they are when the header names them. Flushed, if there are any.
//! 5. [`File::write_header`]: the other generation pages and the header. Flushed.
//! 6. [`File::end_checkpoint`]: space that nobody needs goes back, and the disk counts again.
//!
//! Then, and not before, may the log forget the records. A step that fails leaves everything where
//! the log has it ([`File::abandon_checkpoint`]).

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::File;
use super::overlay::Spot;
use super::pages::position;
use super::removed::Removed;
use super::write_header;
use crate::backing::{SetTime, Timestamp};
use crate::error::FsResult;
use crate::store::header::Header;
use crate::store::intent_log::Scope;
use crate::store::keys::hex;
use crate::store::layout::{
    BLOCK, BLOCK_LEN, BLOCKS_PER_GROUP, backing_len, block_at, blocks_for, region_of_group,
    slot_of_block, tag_page_at,
};
use crate::store::page::{Page, PageId};

/// The most that is copied at once.
const COPY: usize = 1 << 20;
/// So much is handed to the disk before it is waited for: what a commit finds before it in the disk's
/// queue, at the most.
const AHEAD_OF_DISK: usize = 4 << 20;

/// What a checkpoint brings home.
#[derive(Debug)]
pub(in crate::store) struct Snapshot {
    header: Header,
    blocks: Vec<(u64, Spot)>,
    new_regions: BTreeSet<u64>,
}

impl File {
    /// None where there is nothing to bring home.
    pub(in crate::store) fn begin_checkpoint(&self) -> Option<Snapshot> {
        let _guard = self.locks.exclusive(0..=u64::MAX);
        let mut state = self.state.lock();
        // Of one that came to no end at all, not even a failed one.
        state.put_back();
        if !state.dirty.changed {
            state.dirty.first = None;
            state.dirty.listed = false;
            return None;
        }
        state.begin();
        let inflight = state.inflight.as_ref()?;
        Some(Snapshot {
            header: state.header.clone(),
            blocks: inflight.blocks.iter().map(|(block, spot)| (*block, *spot)).collect(),
            new_regions: inflight.new_regions.clone(),
        })
    }

    pub(in crate::store) fn has_no_name(&self) -> FsResult<bool> {
        Ok(self.backing.metadata()?.nlink == 0)
    }

    /// Step 3, without the flush.
    pub(in crate::store) fn write_home(&self, snapshot: &Snapshot) -> FsResult<()> {
        self.copy_blocks(&snapshot.blocks)?;
        self.write_pages(|id| id.group().is_some(), snapshot.header.generation)
    }

    pub(in crate::store) fn has_new_regions(&self, snapshot: &Snapshot) -> bool {
        !snapshot.new_regions.is_empty()
    }

    /// Step 4, without the flush.
    pub(in crate::store) fn write_new_regions(&self, snapshot: &Snapshot) -> FsResult<()> {
        let new = |id: &PageId| match id {
            PageId::Tags(_) => false,
            PageId::Generations(region) => snapshot.new_regions.contains(region),
        };
        self.write_pages(new, snapshot.header.generation)
    }

    fn copy_blocks(&self, blocks: &[(u64, Spot)]) -> FsResult<()> {
        let log = self.shared.log()?;
        let mut buffer = Vec::new();
        let mut rest = blocks;
        let (mut handed, mut from_block) = (0, None);
        while let [(first, from), ..] = rest {
            let follows = |i: usize| {
                let (block, spot) = rest[i];
                let (before, _) = rest[i - 1];
                block == before + 1
                    && !block.is_multiple_of(BLOCKS_PER_GROUP as u64)
                    && spot.stream == from.stream
                    && spot.at == from.at + (i * BLOCK_LEN) as u64
            };
            let most = rest.len().min(COPY / BLOCK_LEN);
            let count = (1..most).find(|&i| !follows(i)).unwrap_or(most);
            buffer.resize(count * BLOCK_LEN, 0);
            log.read(from.stream, &mut buffer, from.at)?;
            self.backing.write_at(&buffer, block_at(*first))?;
            rest = &rest[count..];
            handed += buffer.len();
            let start = block_at(*from_block.get_or_insert(*first));
            if handed >= AHEAD_OF_DISK {
                let end = block_at(*first) + buffer.len() as u64;
                let write = || self.backing.write_out(start, end - start);
                log.write_out_of(Scope::Inode(self.node), write, |error| self.home_failed(error))?;
                (handed, from_block) = (0, None);
            }
        }
        Ok(())
    }

    /// Seals and writes the pages set aside that `wanted` chooses.
    fn write_pages(&self, wanted: impl Fn(&PageId) -> bool, generation: u64) -> FsResult<()> {
        let ids: Vec<PageId> = {
            let state = self.state.lock();
            state.inflight.iter().flat_map(|overlay| overlay.pages.keys()).copied().collect()
        };
        let mut ids: Vec<PageId> = ids.into_iter().filter(|id| wanted(id)).collect();
        ids.sort_unstable_by_key(|id| position(*id));
        for ids in ids.chunks(64) {
            let pages: Vec<Arc<Page>> = {
                let state = self.state.lock();
                let overlay = state.inflight.as_ref();
                let page = |id| overlay.and_then(|overlay| overlay.pages.get(id)).cloned();
                ids.iter().filter_map(page).collect()
            };
            let pages = self.sealed(pages, generation)?;
            for page in &pages {
                self.backing.write_at(&page.bytes()[..], position(page.id()))?;
            }
            if let Some(overlay) = &mut self.state.lock().inflight {
                overlay.pages.extend(pages.into_iter().map(|page| (page.id(), page)));
            }
        }
        Ok(())
    }

    fn sealed(&self, pages: Vec<Arc<Page>>, generation: u64) -> FsResult<Vec<Arc<Page>>> {
        let lease = self.shared.gate.lease()?;
        let key = self.shared.keys.file_mac(&lease, &self.keys())?;
        let mac = self.page_mac(&key);
        let seal = |page: Arc<Page>| {
            let mut page = Arc::unwrap_or_clone(page);
            page.seal_all(generation, &mac);
            Arc::new(page)
        };
        let pages = pages.into_iter().map(seal).collect();
        lease.still_open()?;
        Ok(pages)
    }

    /// Step 5, without the flush.
    pub(in crate::store) fn write_header(&self, snapshot: &Snapshot) -> FsResult<()> {
        let known = |id: &PageId| match id {
            PageId::Tags(_) => false,
            PageId::Generations(region) => !snapshot.new_regions.contains(region),
        };
        self.write_pages(known, snapshot.header.generation)?;
        write_header(&self.shared, &self.backing, &snapshot.header)
    }

    /// The flush of steps 3 to 5. A checkpoint that fails is made again, with all that it writes; what
    /// went home otherwise is not.
    pub(in crate::store) fn sync_home(&self) -> FsResult<()> {
        self.check_usable()?;
        let sync = || self.backing.sync_data();
        self.shared.flush(Scope::Inode(self.node), sync, |error| self.home_failed(error))?;
        self.check_usable()
    }

    fn home_failed(&self, error: &std::io::Error) {
        if self.is_unsynced() {
            self.shared.names_failed(error);
        } else if let Some(log) = self.shared.log.get() {
            log.home_failed(Some(self.node), error);
        }
    }

    /// Step 6. True if something is dirty again.
    pub(in crate::store) fn end_checkpoint(&self, snapshot: &Snapshot) -> FsResult<bool> {
        // Nobody reads from the log what it is about to forget.
        let _guard = self.locks.exclusive(0..=u64::MAX);
        self.give_back(snapshot)?;
        // Nothing is given up before all of it has succeeded.
        let settled = self.settle_times()?;
        let mut state = self.state.lock();
        let done = state.inflight.take().unwrap_or_default();
        if done.removed.parts().next().is_some() {
            self.forget_pages();
        }
        done.pages.into_values().for_each(|page| self.cache_page(page));
        let clean = !state.dirty.changed;
        if clean && let (Some(home), Some(times)) = (settled, state.times.take()) {
            self.shared.settled_times.insert(self.node, home, times.ctime);
        }
        self.set_clean(clean);
        Ok(!clean)
    }

    /// Gives the backing file the time that the file shows, unless that is dirty again, and returns
    /// the change time that this leaves. Everything is locked.
    fn settle_times(&self) -> FsResult<Option<Timestamp>> {
        let times = {
            let state = self.state.lock();
            state.times.filter(|_| !state.dirty.changed)
        };
        let Some(times) = times else { return Ok(None) };
        if let Some(mtime) = times.mtime {
            self.backing.node()?.set_times(SetTime::Keep, SetTime::At(mtime))?;
        }
        Ok(Some(self.backing.metadata()?.ctime))
    }

    pub(in crate::store) fn abandon_checkpoint(&self) {
        let _guard = self.locks.exclusive(0..=u64::MAX);
        self.state.lock().put_back();
    }

    /// Space of what became holes, or lies past the end, and is not needed since. Everything is
    /// locked.
    fn give_back(&self, snapshot: &Snapshot) -> FsResult<()> {
        let size = snapshot.header.size.max(self.size());
        let removed = {
            let mut state = self.state.lock();
            // Not as it was when this began: space may have been asked for since.
            let removed = state.inflight.as_ref().map(|overlay| overlay.removed.clone());
            let removed = removed.unwrap_or_default();
            if removed.parts().any(|part| !part.keep) {
                // What is punched may be a part of it.
                state.trim_end |= !state.ahead.is_empty();
                state.ahead = 0..0;
            }
            removed
        };
        for part in removed.parts().filter(|part| !part.keep) {
            let past = part.past.min(blocks_for(size));
            let mut first = part.first;
            while first < past {
                let group = first / BLOCKS_PER_GROUP as u64;
                let whole = past / BLOCKS_PER_GROUP as u64;
                // A group of which only a part goes is looked at by itself.
                let next = self.next_group(group)?.min(whole.max(group + 1));
                let until = past.min(next * BLOCKS_PER_GROUP as u64);
                self.punch_holes(group, first..until, &removed)?;
                first = until;
            }
        }
        let length = backing_len(size);
        let trim = {
            let state = self.state.lock();
            let wanted = length < state.asked.end;
            let unused = !state.ahead.is_empty() && !state.dirty.changed;
            state.trim_end || unused && !wanted
        };
        if trim || self.backing.metadata()?.size > length { self.trim(length) } else { Ok(()) }
    }

    /// Gives back the space past `length`, where the home ends, as far as nobody has asked for it.
    /// Everything is locked.
    pub(super) fn trim(&self, length: u64) -> FsResult<()> {
        self.backing.set_len(length)?;
        let asked = {
            let mut state = self.state.lock();
            state.ahead = 0..0;
            state.trim_end = false;
            state.asked.clone()
        };
        let from = asked.start.max(length);
        if from < asked.end
            && let Err(error) = self.backing.allocate(from, asked.end - from, true)
        {
            let file = hex(&self.file_id);
            log::warn!("file {file}: space that was reserved beyond its end is lost: {error}");
            self.state.lock().asked = 0..0;
        }
        Ok(())
    }

    /// The group after this one, or after its region, if all of that is holes.
    fn next_group(&self, group: u64) -> FsResult<u64> {
        let region = region_of_group(group);
        let absent = self.generation_page(region)?.is_none();
        Ok(if absent { self.group_after_region(region) } else { group + 1 })
    }

    /// Gives back the space of the blocks, which start in `group`, as far as they are holes.
    fn punch_holes(&self, group: u64, blocks: Range<u64>, removed: &Removed) -> FsResult<()> {
        let changed_since = {
            let state = self.state.lock();
            let page = state.dirty.pages.contains_key(&PageId::Tags(group));
            page || state.dirty.removed.touches(&blocks)
        };
        if changed_since {
            // What is durable is not what is current: the next checkpoint looks again.
            self.state.lock().dirty.removed.add_older(blocks.start, blocks.end, false);
            return Ok(());
        }
        let Some(page) = self.tag_page(group)? else {
            let all = group * BLOCKS_PER_GROUP as u64..(group + 1) * BLOCKS_PER_GROUP as u64;
            let whole = blocks.start == all.start && !removed.keeps_any_of(&all);
            let from = if whole { tag_page_at(group) } else { block_at(blocks.start) };
            let to = block_at(blocks.end - 1) + BLOCK;
            return Ok(self.backing.punch_hole(from, to - from)?);
        };
        self.verify_what_is_right(&page)?;
        let mut start = None;
        for block in blocks.start..=blocks.end {
            let hole = block < blocks.end && page.entry(slot_of_block(block)).is_none();
            match (hole, start) {
                (true, None) => start = Some(block),
                (false, Some(from)) => {
                    let len = (block - from) * BLOCK;
                    self.backing.punch_hole(block_at(from), len)?;
                    start = None;
                }
                _ => {}
            }
        }
        Ok(())
    }
}
