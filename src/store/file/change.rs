//! One request's change of a file: gathered, sealed, logged, and only then in force.
//!
//! Whoever makes a change holds the groups it touches locked, and has reserved room in the log
//! before that. Until [`Change::commit`] nothing counts; after it the log's record is in the
//! kernel's hands, and readers see the change. A record holds all of it: after a crash it is there
//! or it is not.
//!
//! Blocks go home directly, past the log, where nothing durable can be lost by that: they are holes
//! at home and now, and have not become holes since the last checkpoint. Everything else goes to
//! the log first, with its space at home reserved.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::File;
use super::overlay::{Spot, Times};
use crate::backing::Timestamp;
use crate::error::{FsError, FsResult};
use crate::store::block::Sealer;
use crate::store::cache::{BUFFER_LEN, Buffer};
use crate::store::intent_log::{
    Draft, Entry as Listed, Home, Kind, PAGE, Position, Record, Room, SAME_SIZE, Stream,
};
use crate::store::keys::hex;
use crate::store::layout::{
    BLOCK, BLOCK_LEN, BLOCKS_PER_GROUP, BLOCKS_PER_SECTOR, SECTORS_PER_PAGE, backing_len, block_at,
    blocks_for, generation_page_at, region_of_group, slot_of_block, slot_of_group, tag_page_at,
};
use crate::store::page::{Entry, Page, PageId};

/// The fewest bytes in a row that go home directly.
const DIRECT_MIN: usize = 64 << 10;
/// The most that is reserved beyond the end for writes to come.
const AHEAD: u64 = 1 << 20;

/// Regions of a gap that may get a page for the sake of one write: as many as are in 16 TiB.
const MOST_OF_A_GAP: usize = 8192;

pub(super) struct Change<'a> {
    file: &'a File,
    kind: Kind,
    size: Option<u64>,
    holes: Range<u64>,
    /// Tag pages as they are to be.
    pages: BTreeMap<u64, Page>,
    /// Groups that become holes as a whole.
    dropped: Vec<u64>,
    /// Generation pages as the disk has them, where the region has one.
    regions: HashMap<u64, Option<Arc<Page>>>,
    logged: Blocks<'a>,
    direct: Blocks<'a>,
    /// Bytes that will be gathered, about.
    expected: usize,
    /// Blocks of `logged` that have no space at home yet, by group.
    unreserved: Vec<Range<u64>>,
    /// Some of `logged` were there before.
    overwrites: bool,
    /// Blocks that become holes, about.
    freed: u64,
    mtime: Option<Timestamp>,
    /// What the file showed before, for a change that nobody is to see.
    unseen: Option<Times>,
}

/// Blocks with their content: plaintext, and after [`Change::seal`] ciphertext.
#[derive(Default)]
struct Blocks<'a> {
    numbers: Vec<u64>,
    bytes: Bytes<'a>,
}

enum Bytes<'a> {
    /// Goes to the log as it is.
    Own(Vec<u8>),
    /// Goes home: so much of a buffer that comes back.
    Lent(Buffer<'a>, usize),
}

impl Default for Bytes<'_> {
    fn default() -> Self {
        Bytes::Own(Vec::new())
    }
}

impl Bytes<'_> {
    fn len(&self) -> usize {
        match self {
            Bytes::Own(bytes) => bytes.len(),
            Bytes::Lent(_, len) => *len,
        }
    }

    fn all(&self) -> &[u8] {
        match self {
            Bytes::Own(bytes) => bytes,
            Bytes::Lent(buffer, len) => &buffer[..*len],
        }
    }

    fn all_mut(&mut self) -> &mut [u8] {
        match self {
            Bytes::Own(bytes) => bytes,
            Bytes::Lent(buffer, len) => &mut buffer[..*len],
        }
    }

    /// False where the buffer does not hold them.
    fn append(&mut self, data: &[u8]) -> bool {
        match self {
            Bytes::Own(bytes) => bytes.extend_from_slice(data),
            Bytes::Lent(buffer, len) => {
                let Some(free) = buffer.get_mut(*len..*len + data.len()) else { return false };
                free.copy_from_slice(data);
                *len += data.len();
            }
        }
        true
    }

    fn resize(&mut self, to: usize) {
        match self {
            Bytes::Own(bytes) => bytes.resize(to, 0),
            Bytes::Lent(_, len) => *len = to.min(*len),
        }
    }

    fn take(&mut self) -> Vec<u8> {
        match self {
            Bytes::Own(bytes) => std::mem::take(bytes),
            Bytes::Lent(buffer, len) => buffer[..*len].to_vec(),
        }
    }
}

impl Blocks<'_> {
    /// Runs of consecutive blocks of one group: the first, and where they are in `bytes`.
    fn runs(&self) -> Vec<(u64, Range<usize>)> {
        let mut runs: Vec<(u64, Range<usize>)> = Vec::new();
        for (i, &block) in self.numbers.iter().enumerate() {
            let at = i * BLOCK_LEN;
            match runs.last_mut() {
                Some((first, bytes))
                    if block == *first + (bytes.len() / BLOCK_LEN) as u64
                        && !block.is_multiple_of(BLOCKS_PER_GROUP as u64) =>
                {
                    bytes.end = at + BLOCK_LEN;
                }
                _ => runs.push((block, at..at + BLOCK_LEN)),
            }
        }
        runs
    }
}

/// Pages of log that a change of `blocks` blocks may take, its tail's block and a partial one more
/// included.
pub(super) fn room_for(blocks: u64) -> u64 {
    let mut draft = Draft::new(Kind::Write, [0; 16], 0);
    draft.entries = vec![Listed { block: 0, bytes: [0; 32] }; blocks as usize];
    draft.pages() + blocks
}

impl<'a> Change<'a> {
    pub(super) fn new(file: &'a File, kind: Kind) -> Change<'a> {
        Change {
            file,
            kind,
            size: None,
            holes: 0..0,
            pages: BTreeMap::new(),
            dropped: Vec::new(),
            regions: HashMap::new(),
            logged: Blocks::default(),
            direct: Blocks::default(),
            expected: 0,
            unreserved: Vec::new(),
            overwrites: false,
            freed: 0,
            mtime: None,
            unseen: None,
        }
    }

    /// Nothing to be logged.
    pub(super) fn is_empty(&self) -> bool {
        self.size.is_none()
            && self.holes.is_empty()
            && self.logged.numbers.is_empty()
            && self.direct.numbers.is_empty()
            && self.mtime.is_none()
    }

    pub(super) fn set_size(&mut self, size: u64) {
        self.size = Some(size);
    }

    /// So many bytes are coming.
    pub(super) fn expect(&mut self, bytes: usize) {
        self.expected = bytes;
    }

    /// Of the file, before this change.
    pub(super) fn old_size(&self) -> u64 {
        self.file.size()
    }

    pub(super) fn set_mtime(&mut self, mtime: Timestamp) {
        self.mtime = Some(mtime);
    }

    /// The file shows the times it has shown.
    pub(super) fn keep_times(&mut self) -> FsResult<()> {
        let times = self.file.shown_times()?;
        self.mtime = times.mtime;
        self.unseen = Some(times);
        Ok(())
    }

    /// Makes sure that the generation page of the group's region can be changed.
    fn region(&mut self, group: u64) -> FsResult<Option<Arc<Page>>> {
        let region = region_of_group(group);
        if let Some(loaded) = self.regions.get(&region) {
            return Ok(loaded.clone());
        }
        let loaded = self.file.generation_page(region)?;
        if let Some(page) = &loaded {
            self.file.verify_what_is_right(page)?;
        }
        self.regions.insert(region, loaded.clone());
        Ok(loaded)
    }

    /// The tag page of a group, as this change has it so far. `whole` are the blocks of which
    /// nothing old is needed: a damaged sector is given up where such a block is in it, and what
    /// else was in it reads as an error from then on, as it did before.
    fn page(&mut self, group: u64, whole: &Range<u64>) -> FsResult<&mut Page> {
        if !self.pages.contains_key(&group) {
            self.region(group)?;
            let page = match self.file.tag_page(group)? {
                Some(old) => self.page_to_change(&old, group, whole)?,
                None => {
                    self.file.note_unfinished(group)?;
                    Page::empty(PageId::Tags(group))
                }
            };
            self.pages.insert(group, page);
        }
        self.pages.get_mut(&group).ok_or_else(|| Errno::IO.into())
    }

    fn page_to_change(&self, old: &Arc<Page>, group: u64, whole: &Range<u64>) -> FsResult<Page> {
        self.file.verify_what_is_right(old)?;
        self.file.note_generation(old);
        let mut page = Page::clone(old);
        for sector in 0..SECTORS_PER_PAGE {
            if page.is_verified(sector, sector) {
                continue;
            }
            let first = group * BLOCKS_PER_GROUP as u64 + (sector * BLOCKS_PER_SECTOR) as u64;
            if first + (BLOCKS_PER_SECTOR as u64) <= whole.start || whole.end <= first {
                continue;
            }
            let damage = self.file.verify_sectors(old, sector, sector);
            log::warn!(
                "{}: rewritten, only the blocks written now are readable",
                damage.err().map_or_else(|| "a damaged sector".to_owned(), |e| e.to_string())
            );
            page.reset_sector(sector);
            for slot in sector * BLOCKS_PER_SECTOR..(sector + 1) * BLOCKS_PER_SECTOR {
                page.set_entry(slot, Some(Entry::LOST));
            }
        }
        Ok(page)
    }

    /// What a block is before this change.
    pub(super) fn current(&self, block: u64) -> FsResult<Option<Entry>> {
        let Some(page) = self.file.tag_page(block / BLOCKS_PER_GROUP as u64)? else {
            return Ok(None);
        };
        let slot = slot_of_block(block);
        let sector = slot / BLOCKS_PER_SECTOR;
        self.file.verify_sectors(&page, sector, sector)?;
        Ok(page.entry(slot))
    }

    /// A block that becomes what `fill` makes of it. With `old`, it is given the plaintext that the
    /// block has now.
    pub(super) fn block(
        &mut self,
        block: u64,
        old: bool,
        fill: impl FnOnce(&mut [u8]),
    ) -> FsResult<()> {
        let entry = if old { self.current(block)? } else { None };
        self.make_room_to_log();
        let bytes = &mut self.logged.bytes;
        let at = bytes.len();
        bytes.resize(at + BLOCK_LEN);
        let content = &mut bytes.all_mut()[at..];
        if let Some(entry) = entry
            && let Err(error) = self.file.read_block(block, &entry, content)
        {
            bytes.resize(at);
            return Err(error);
        }
        fill(content);
        self.logged.numbers.push(block);
        Ok(())
    }

    /// Whole blocks of one group, from `first` on.
    pub(super) fn whole_blocks(
        &mut self,
        first: u64,
        data: &[u8],
        may_go_direct: bool,
    ) -> FsResult<()> {
        let blocks = first..first + (data.len() / BLOCK_LEN) as u64;
        let direct =
            may_go_direct && data.len() >= DIRECT_MIN && self.file.are_new(blocks.clone())?;
        if direct && matches!(self.direct.bytes, Bytes::Own(_)) {
            self.direct.bytes = Bytes::Lent(self.file.shared.buffers.take(), 0);
        }
        if !direct {
            self.make_room_to_log();
        }
        let target = if direct { &mut self.direct } else { &mut self.logged };
        if !target.bytes.append(data) {
            return Err(Errno::IO.into());
        }
        target.numbers.extend(blocks);
        Ok(())
    }

    /// At once, so that nothing is copied when more comes.
    fn make_room_to_log(&mut self) {
        if let Bytes::Own(bytes) = &mut self.logged.bytes
            && bytes.capacity() == 0
        {
            // The first and the last block may be written in part only.
            let most = self.expected.next_multiple_of(BLOCK_LEN) + BLOCK_LEN;
            bytes.reserve_exact(most.min(BUFFER_LEN));
        }
    }

    /// Makes blocks holes, before anything else that this change does to them. A change has one
    /// such range. `end` is the first block past the end of the file.
    pub(super) fn make_holes(&mut self, blocks: Range<u64>, end: u64) -> FsResult<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        self.holes = blocks.clone();
        let per_group = BLOCKS_PER_GROUP as u64;
        let past = blocks.end.min(end);
        let mut group = blocks.start / per_group;
        while group * per_group < past {
            let region = region_of_group(group);
            let Some(generations) = self.region(group)? else {
                group = self.file.group_after_region(region);
                continue;
            };
            if self.file.generation_in(&generations, group)? != 0 {
                let all = group * per_group..(group + 1) * per_group;
                if blocks.start <= all.start && (all.end <= blocks.end || end <= blocks.end) {
                    self.dropped.push(group);
                    self.freed += per_group;
                } else {
                    self.clear_entries(group, blocks.start.max(all.start)..past.min(all.end))?;
                }
            }
            group += 1;
        }
        Ok(())
    }

    /// A damaged sector of which every block goes is replaced.
    fn clear_entries(&mut self, group: u64, blocks: Range<u64>) -> FsResult<()> {
        let nothing = 0..0;
        let file = self.file;
        let page = self.page(group, &nothing)?;
        let slots = slot_of_block(blocks.start)..slot_of_block(blocks.end - 1) + 1;
        for sector in slots.start / BLOCKS_PER_SECTOR..=(slots.end - 1) / BLOCKS_PER_SECTOR {
            let all = sector * BLOCKS_PER_SECTOR..(sector + 1) * BLOCKS_PER_SECTOR;
            if page.is_verified(sector, sector) {
                continue;
            }
            if slots.start > all.start || all.end > slots.end {
                return Err(file.damaged_sector(page.id(), sector));
            }
            page.reset_sector(sector);
        }
        let mut freed = 0;
        for slot in slots {
            freed += u64::from(page.entry(slot).is_some());
            page.set_entry(slot, None);
        }
        self.freed += freed;
        Ok(())
    }

    /// Encrypts what was gathered, and notes the new entries.
    fn seal(&mut self) -> FsResult<()> {
        let count = self.logged.numbers.len() + self.direct.numbers.len();
        if count == 0 {
            return Ok(());
        }
        let mut entries = Vec::with_capacity(count);
        {
            let shared = &self.file.shared;
            let lease = shared.gate.lease()?;
            let keys = self.file.keys();
            let mut sealer = Sealer::new(shared, &keys, &lease, count as u64)?;
            for blocks in [&mut self.logged, &mut self.direct] {
                let contents = blocks.bytes.all_mut().chunks_exact_mut(BLOCK_LEN);
                for (&block, bytes) in blocks.numbers.iter().zip(contents) {
                    let entry = sealer.seal(block, bytes).ok_or(Errno::IO)?;
                    entries.push((block, entry));
                }
            }
            lease.still_open()?;
        }
        let logged = self.logged.numbers.len();
        self.set_entries(&entries, logged)
    }

    /// The first `logged` of them have no space at home yet where they were holes.
    fn set_entries(&mut self, entries: &[(u64, Entry)], logged: usize) -> FsResult<()> {
        for (i, (block, entry)) in entries.iter().enumerate() {
            let group = block / BLOCKS_PER_GROUP as u64;
            if !self.pages.contains_key(&group) {
                let blocks = entries.iter().map(|(block, _)| *block);
                let mine = blocks.filter(|block| block / BLOCKS_PER_GROUP as u64 == group);
                let (first, last) = mine.fold((u64::MAX, 0), |(a, b), x| (a.min(x), b.max(x)));
                self.page(group, &(first..last + 1))?;
            }
            let slot = slot_of_block(*block);
            let Some(page) = self.pages.get_mut(&group) else { continue };
            let old = page.entry(slot);
            page.set_entry(slot, Some(*entry));
            self.overwrites |= old.is_some();
            // One that was lost with its sector may have been a hole before that.
            if i < logged && old.is_none_or(|old| old == Entry::LOST) {
                match self.unreserved.last_mut() {
                    Some(range)
                        if range.end == *block
                            && !block.is_multiple_of(BLOCKS_PER_GROUP as u64) =>
                    {
                        range.end += 1;
                    }
                    _ => self.unreserved.push(*block..block + 1),
                }
            }
        }
        Ok(())
    }

    /// The first page that a group needs beside its blocks, if they are its first, or `from`.
    fn reserve_pages(&self, group: u64, from: u64) -> FsResult<u64> {
        let region = region_of_group(group);
        let page = {
            let state = self.file.state.lock();
            let gap = state.header.gap_for(region as u32);
            let page = state.page(PageId::Generations(region)).cloned();
            drop(state);
            self.reserve_gap(gap)?;
            page
        };
        let page = page.or_else(|| self.regions.get(&region).cloned().flatten());
        match page.map(|page| page.generation(slot_of_group(group))) {
            None if slot_of_group(group) == 0 => Ok(generation_page_at(region)),
            None => {
                self.file.backing.allocate(generation_page_at(region), BLOCK, true)?;
                Ok(tag_page_at(group))
            }
            Some(0) => Ok(tag_page_at(group)),
            Some(_) => Ok(from),
        }
    }

    /// The pages of regions that get one since the header cannot name more pieces.
    fn reserve_gap(&self, gap: Range<u32>) -> FsResult<()> {
        if gap.len() > MOST_OF_A_GAP && !self.file.recovering.load(Ordering::Acquire) {
            return Err(Errno::FBIG.into());
        }
        gap.into_iter().try_for_each(|region| {
            let at = generation_page_at(region.into());
            Ok(self.file.backing.allocate(at, BLOCK, true)?)
        })
    }

    /// Makes sure that what is in the log will have its place at home, and what goes home directly one
    /// for its tags. What follows one another is asked for at once, tag pages between blocks and all,
    /// so that a file system has no reason to put it in different places.
    fn reserve_home(&self) -> FsResult<()> {
        let direct = self.direct.runs().into_iter();
        let direct = direct.map(|(first, bytes)| first..first + (bytes.len() / BLOCK_LEN) as u64);
        let mut wanted: Vec<Range<u64>> = Vec::new();
        for blocks in direct.chain(self.unreserved.iter().cloned()) {
            let group = blocks.start / BLOCKS_PER_GROUP as u64;
            let from = self.reserve_pages(group, block_at(blocks.start))?;
            wanted.push(from..block_at(blocks.end - 1) + BLOCK);
        }
        wanted.sort_unstable_by_key(|range| range.start);
        wanted.dedup_by(|next, range| {
            let follows = next.start <= range.end;
            if follows {
                range.end = range.end.max(next.end);
            }
            follows
        });
        wanted.into_iter().try_for_each(|range| self.reserve(range))
    }

    /// Space for a range of the backing file, and if that grows it, for some of what may follow.
    fn reserve(&self, range: Range<u64>) -> FsResult<()> {
        let backing = &self.file.backing;
        let (size, ahead) = {
            let state = self.file.state.lock();
            (state.header.size, state.ahead.clone())
        };
        let from = match ahead.contains(&range.start) {
            true if range.end <= ahead.end => return Ok(()),
            true => ahead.end,
            false => range.start,
        };
        if range.end > backing_len(size) {
            let to = range.end + (size / BLOCK * BLOCK).min(AHEAD);
            match backing.allocate(from, to - from, true) {
                Ok(()) => {
                    self.file.state.lock().ahead = range.start..to;
                    return Ok(());
                }
                // Without what may follow it may do.
                Err(error)
                    if [Errno::NOSPC, Errno::DQUOT, Errno::FBIG]
                        .map(|errno| Some(errno.raw_os_error()))
                        .contains(&error.raw_os_error()) =>
                {
                    // ext4 keeps what it found.
                    self.file.state.lock().trim_end = true;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(backing.allocate(from, range.end - from, true)?)
    }

    fn write_direct(&self) -> FsResult<()> {
        for (first, bytes) in self.direct.runs() {
            self.file.backing.write_at(&self.direct.bytes.all()[bytes], block_at(first))?;
        }
        Ok(())
    }

    pub(super) fn overwrites(&self) -> bool {
        self.overwrites
    }

    /// Where what went home directly is: positions and lengths.
    pub(super) fn direct_ranges(&self) -> Vec<(u64, u64)> {
        let runs = self.direct.runs().into_iter();
        runs.map(|(first, bytes)| (block_at(first), bytes.len() as u64)).collect()
    }

    /// Puts the change into force. On an error nothing has changed, except that blocks that were
    /// holes, and still are, may have been written to.
    pub(super) fn commit(&mut self, room: Room) -> FsResult<Position> {
        self.seal()?;
        self.reserve_home()?;
        let log = self.file.shared.log()?;
        let home = (!self.direct.numbers.is_empty()).then(|| Home {
            file: self.file.backing.clone(),
            node: self.file.node,
            failures: log.home_failures(),
        });
        self.write_direct()?;
        let mtime = self.mtime.unwrap_or_else(crate::backing::now);
        let draft = self.draft(mtime);
        let stream = room.stream();
        let position = {
            let shared = &self.file.shared;
            let lease = shared.gate.lease()?;
            let session = shared.session()?;
            let key = shared.keys.log_key(&lease, &session, &shared.log_id)?;
            self.file.about_to_log(log);
            let draft = Draft { other: self.file.last_of_other(stream), ..draft };
            lease.still_open()?;
            log.append(room, draft, home, &key)?
        };
        log.wait_written(&position)?;
        let spots = (0..self.logged.numbers.len() as u64)
            .map(|i| Spot { stream, at: position.body_at + i * PAGE as u64 });
        let spots: Vec<Spot> = spots.collect();
        self.apply(&spots, mtime, (stream, position.seq));
        Ok(position)
    }

    fn draft(&mut self, mtime: Timestamp) -> Draft {
        let mut draft = Draft::new(self.kind, self.file.file_id(), self.size.unwrap_or(SAME_SIZE));
        draft.holes = (self.holes.start, self.holes.end);
        let blocks = self.logged.numbers.iter().chain(&self.direct.numbers);
        draft.entries = blocks
            .filter_map(|&block| {
                let page = self.pages.get(&(block / BLOCKS_PER_GROUP as u64))?;
                let entry = page.entry(slot_of_block(block))?;
                Some(Listed { block, bytes: entry.encode() })
            })
            .collect();
        draft.body = self.logged.bytes.take();
        draft.mtime = mtime;
        draft
    }

    /// What a record says, to be put into force again.
    pub(super) fn of_record(file: &'a File, record: &Record) -> FsResult<Change<'a>> {
        let draft = &record.draft;
        let mut change = Change::new(file, draft.kind);
        if draft.size != SAME_SIZE {
            change.size = Some(draft.size);
        }
        if draft.kind == Kind::Reseal {
            let shown = file.shown_times()?;
            change.unseen = Some(Times { mtime: Some(draft.mtime), ..shown });
        }
        // The home file may be newer than the record, if a checkpoint came to its end and the log could
        // not be told any more. Its size is then none that the file had when the record was made, and
        // what earlier records have put past it must go as it went then.
        let (first, past) = draft.holes;
        let end = past.max(blocks_for(file.size()));
        let past = if draft.kind == Kind::Truncate { end } else { past };
        if first < draft.holes.1 {
            change.make_holes(first..past, end)?;
        }
        let entries: Vec<(u64, Entry)> = draft
            .entries
            .iter()
            .filter_map(|listed| Some((listed.block, Entry::decode(&listed.bytes)?)))
            .collect();
        let logged = record.body_len() / BLOCK_LEN;
        if entries.len() < draft.entries.len() {
            let detail = "a record of the log names a block without saying what it is";
            return Err(FsError::integrity("log record", hex(&file.file_id()), None, detail));
        }
        let numbers = |part: &[(u64, Entry)]| part.iter().map(|(block, _)| *block).collect();
        change.logged.numbers = numbers(&entries[..logged]);
        change.direct.numbers = numbers(&entries[logged..]);
        change.set_entries(&entries, logged)?;
        Ok(change)
    }

    /// Recovery's half of [`Change::commit`].
    pub(super) fn replay(mut self, record: &Record, read_only: bool) -> FsResult<()> {
        if !read_only {
            self.reserve_home()?;
        }
        let stream = record.stream();
        let spots = (0..self.logged.numbers.len() as u64)
            .map(|i| Spot { stream, at: record.body_at() + i * PAGE as u64 });
        let spots: Vec<Spot> = spots.collect();
        let mut first = [u64::MAX; 2];
        first[stream as usize] = record.place.seq;
        {
            let mut state = self.file.state.lock();
            let old = state.dirty.first.unwrap_or([u64::MAX; 2]);
            state.dirty.first = Some([old[0].min(first[0]), old[1].min(first[1])]);
            // What was reserved for writes to come, if the size was home already.
            state.trim_end |= self.size.is_some();
        }
        self.apply(&spots, record.draft.mtime, (stream, record.place.seq));
        Ok(())
    }

    /// The groups are locked, so that nobody else changes their pages; generation pages and the
    /// header are changed under the state's lock alone.
    fn apply(&mut self, spots: &[Spot], mtime: Timestamp, (stream, seq): (Stream, u64)) {
        let mut state = self.file.state.lock();
        let last = &mut state.last[stream as usize];
        *last = seq.max(*last);
        let region =
            |group: u64| self.regions.get(&region_of_group(group)).and_then(Option::as_ref);
        for &group in &self.dropped {
            state.drop_group(group, region(group));
        }
        for (group, page) in std::mem::take(&mut self.pages) {
            state.put_page(page, region(group));
        }
        if !self.holes.is_empty() {
            let blocks = self.holes.clone();
            let gone: Vec<u64> =
                state.dirty.blocks.range(blocks).map(|(block, _)| *block).collect();
            for block in gone {
                state.dirty.blocks.remove(&block);
            }
            let keep = self.kind == Kind::Zero;
            state.dirty.removed.add(self.holes.start, self.holes.end, keep);
            if !keep {
                state.dirty.freed += self.freed * BLOCK;
            }
        }
        self.unreserved.iter().for_each(|blocks| state.filled(blocks));
        for (&block, &spot) in self.logged.numbers.iter().zip(spots) {
            state.dirty.blocks.insert(block, spot);
        }
        for block in &self.direct.numbers {
            state.dirty.blocks.remove(block);
        }
        if let Some(size) = self.size {
            state.set_size(size);
            self.file.set_shown_size(size);
        }
        let ctime = match self.kind {
            Kind::Times => crate::backing::now(),
            _ => mtime,
        };
        state.times = match self.unseen {
            Some(times) => state.times.or(Some(times)),
            None => Some(Times { mtime: Some(mtime), ctime }),
        };
        state.dirty.changed = true;
        self.file.set_clean(false);
    }
}
