//! What can be wrong with the files of a volume, as facts: what it means is for others to say.

use std::ops::Range;

use crate::store::layout::{
    BLOCK, BLOCKS_PER_GROUP, BLOCKS_PER_SECTOR, GROUP_PLAIN, GROUPS_PER_SECTOR, SECTOR_LEN,
    SECTORS_PER_PAGE, block_at, generation_page_at, group_start, region_of_group, slot_of_group,
    tag_page_at,
};
use crate::store::page::{Page, PageId};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// The volume header was not written with this key.
    VolumeHeader,
    VolumeHeaderCopy,
    VolumeHeaderCopyOlder,
    /// Neither copy of the session table serves.
    Sessions,
    SessionsCopy,
    SessionsCopyOlder,
    AnchorCopy,
    /// Missing, foreign, or damaged in a part that was durable.
    Log,
    /// A change of its size or place that a crash has cut short.
    LogUnsettled,
    /// What the log holds cannot be put into force.
    LogReplay,
    /// It was not closed: the next mount brings home what the log holds.
    LogPending,
    /// Records of files that are not there.
    LogRemoved,
    /// Records that nobody was promised, whose blocks are not there.
    LogIncomplete,
    /// Neither copy of a file's header serves.
    Header,
    HeaderUnsupported,
    HeaderCopy,
    HeaderCopyOlder,
    /// A copy that a crash kept from ever being written.
    HeaderCopyUnwritten,
    /// Fields that contradict each other, or the volume.
    HeaderContent,
    /// A wrapped key that does not unwrap.
    FileKey,
    /// A name that a crash left without a file.
    NeverFlushed,
    GenerationSector,
    /// Newer than the header.
    Generation,
    TagSector,
    Block,
    /// Lost before, with its tag sector.
    BlockLost,
    /// Something is noted past the end of the file.
    PastEnd,
    /// The last block goes on past the end of the file.
    Tail,
    /// Two blocks were sealed with one nonce.
    Nonce,
    /// The backing file is longer than its content needs.
    Length,
    /// The disk does not give it out.
    Read,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    pub what: What,
    /// Its path; None for the file that is being checked.
    pub place: Option<String>,
    /// Byte position in it.
    pub at: Option<u64>,
    /// The bytes of plaintext concerned.
    pub content: Option<Range<u64>>,
    pub detail: String,
}

pub type Sink<'a> = dyn FnMut(Flaw) + 'a;

impl Flaw {
    pub(in crate::store) fn new(what: What, detail: impl Into<String>) -> Flaw {
        Flaw { what, place: None, at: None, content: None, detail: detail.into() }
    }

    pub(in crate::store) fn of(what: What, place: &str, detail: impl Into<String>) -> Flaw {
        Flaw { place: Some(place.to_owned()), ..Flaw::new(what, detail) }
    }

    pub(in crate::store) fn at(self, at: u64) -> Flaw {
        Flaw { at: Some(at), ..self }
    }

    /// Of the bytes, those that a file of `size` has.
    pub(in crate::store) fn content(self, bytes: Range<u64>, size: u64) -> Flaw {
        let bytes = bytes.start.min(size)..bytes.end.min(size);
        Flaw { content: (!bytes.is_empty()).then_some(bytes), ..self }
    }
}

/// Sectors of a page, with the plaintext that cannot be had without them; those that follow one
/// another together.
pub(in crate::store) fn of_sectors(
    page: PageId,
    sectors: impl Iterator<Item = usize>,
    size: u64,
    wrong: &str,
    sink: &mut Sink<'_>,
) {
    let (what, position, first, len) = match page {
        PageId::Tags(group) => {
            let len = BLOCKS_PER_SECTOR as u64 * BLOCK;
            (What::TagSector, tag_page_at(group), group_start(group), len)
        }
        PageId::Generations(region) => {
            let first = group_start(region * (SECTORS_PER_PAGE * GROUPS_PER_SECTOR) as u64);
            let len = GROUPS_PER_SECTOR as u64 * GROUP_PLAIN;
            (What::GenerationSector, generation_page_at(region), first, len)
        }
    };
    // What the file reaches is one thing, what it does not another.
    let reached = |sector: usize| first + sector as u64 * len < size;
    let mut runs: Vec<Range<usize>> = Vec::new();
    for sector in sectors {
        match runs.last_mut() {
            Some(run) if run.end == sector && reached(run.start) == reached(sector) => {
                run.end += 1;
            }
            _ => runs.push(sector..sector + 1),
        }
    }
    for run in runs {
        let name = page.what();
        let detail = match run.len() {
            1 => format!("the {name} is {wrong}"),
            count => format!("{count} {name}s from here on are {wrong}"),
        };
        let content = first + run.start as u64 * len..first + run.end as u64 * len;
        let at = position + (run.start * SECTOR_LEN) as u64;
        sink(Flaw::new(what, detail).at(at).content(content, size));
    }
}

/// A group whose generation is not what it can be.
pub(in crate::store) fn of_group(what: What, group: u64, size: u64, detail: String) -> Flaw {
    let within = Page::generation_range(slot_of_group(group)).start as u64;
    let at = generation_page_at(region_of_group(group)) + within;
    Flaw::new(what, detail).at(at).content(group_start(group)..group_start(group + 1), size)
}

/// A block at home.
pub(in crate::store) fn of_block(what: What, block: u64, size: u64, detail: String) -> Flaw {
    Flaw::new(what, detail).at(block_at(block)).content(block * BLOCK..(block + 1) * BLOCK, size)
}

/// Takes together what follows one another within a group.
pub(in crate::store) struct Joined<'a, 'b> {
    sink: &'a mut Sink<'b>,
    open: Option<(Flaw, u64)>,
}

impl<'a, 'b> Joined<'a, 'b> {
    pub(in crate::store) fn new(sink: &'a mut Sink<'b>) -> Joined<'a, 'b> {
        Joined { sink, open: None }
    }

    /// A flaw of one block.
    pub(in crate::store) fn block(&mut self, block: u64, flaw: Flaw) {
        if let Some((open, last)) = &mut self.open
            && block == *last + 1
            && !block.is_multiple_of(BLOCKS_PER_GROUP as u64)
            && open.what == flaw.what
            && open.place == flaw.place
            && open.detail == flaw.detail
            && open.content.is_some() == flaw.content.is_some()
        {
            if let (Some(content), Some(more)) = (&mut open.content, &flaw.content) {
                content.end = more.end;
            }
            *last = block;
            return;
        }
        self.flush();
        self.open = Some((flaw, block));
    }

    pub(in crate::store) fn other(&mut self, flaw: Flaw) {
        self.flush();
        (self.sink)(flaw);
    }

    fn flush(&mut self) {
        if let Some((flaw, _)) = self.open.take() {
            (self.sink)(flaw);
        }
    }
}

impl Drop for Joined<'_, '_> {
    fn drop(&mut self) {
        self.flush();
    }
}
