//! Writing.

use std::ops::RangeInclusive;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Durability, File, WriteMode};
use crate::error::{FsError, FsResult};
use crate::store::block::Sealer;
use crate::store::keys::hex;
use crate::store::layout::{
    BLOCK, BLOCK_LEN, BLOCKS_PER_GROUP, BLOCKS_PER_SECTOR, HEADERS_LEN, MAX_SIZE, SECTORS_PER_PAGE,
    block_at, block_of, generation_page_at, group_of, group_start, groups, part_in_group,
    region_of_group, slot_of_block, tag_page_at,
};
use crate::store::page::{Entry, Page, PageId};
use crate::store::pending::Record;
use crate::store::range_lock::RangeGuard;

/// What a range of bytes is to become.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    Data(&'a [u8]),
    /// That many zeros.
    Zeros(u64),
}

impl<'a> Source<'a> {
    fn len(&self) -> u64 {
        match self {
            Source::Data(data) => data.len() as u64,
            Source::Zeros(len) => *len,
        }
    }

    fn slice(&self, from: u64, to: u64) -> Source<'a> {
        match self {
            Source::Data(data) => Source::Data(&data[from as usize..to as usize]),
            Source::Zeros(_) => Source::Zeros(to - from),
        }
    }

    fn copy_to(&self, target: &mut [u8]) {
        match self {
            Source::Data(data) => target.copy_from_slice(data),
            Source::Zeros(_) => target.fill(0),
        }
    }
}

impl File {
    /// Writes all of `data` and returns the offset it went to.
    ///
    /// After an error each block of the range holds its old or its new content, and the size is
    /// the old one.
    pub fn write_at(&self, data: &[u8], offset: u64, mode: WriteMode) -> FsResult<u64> {
        self.check_writable()?;
        if data.is_empty() {
            return Ok(if mode.append { self.size() } else { offset });
        }
        let len = data.len() as u64;
        let (offset, meta_changed) = {
            let (_guard, offset) = self.lock_for_write(offset, len, mode.append)?;
            let changed = self.write_locked(offset, data)?;
            (offset, changed)
        };
        match mode.durability {
            Durability::Handed => {}
            Durability::OnDevice => self.write_out(offset, len, meta_changed)?,
            Durability::Flushed => self.sync(true)?,
        }
        Ok(offset)
    }

    /// Locks what a write of `len` bytes at `offset` needs, and returns where it goes. A write
    /// that extends the file keeps every other one out that would.
    pub(super) fn lock_for_write(
        &self,
        offset: u64,
        len: u64,
        append: bool,
    ) -> FsResult<(RangeGuard<'_>, u64)> {
        loop {
            let size = self.size();
            let offset = if append { size } else { offset };
            let end = offset.checked_add(len).filter(|&end| end <= MAX_SIZE).ok_or(Errno::FBIG)?;
            if end <= size {
                let guard = self.locks.exclusive(group_of(offset)..=group_of(end - 1));
                if end <= self.size() {
                    return Ok((guard, offset));
                }
                continue;
            }
            let first = group_of(offset.min(size));
            let guard = self.locks.exclusive(first..=u64::MAX);
            let size = self.size();
            let offset = if append { size } else { offset };
            if offset.checked_add(len).is_none_or(|end| end > MAX_SIZE) {
                return Err(Errno::FBIG.into());
            }
            if group_of(offset.min(size)) >= first {
                return Ok((guard, offset));
            }
        }
    }

    /// The groups are locked as [`File::lock_for_write`] does. True if the header or a generation
    /// page has changed.
    fn write_locked(&self, offset: u64, data: &[u8]) -> FsResult<bool> {
        let (size, end) = (self.size(), offset + data.len() as u64);
        if offset > size {
            self.clear_beyond(size)?;
        }
        let fresh = self.write_range(offset, Source::Data(data), size, size.max(end))?;
        if end > size {
            self.set_size(end)?;
        }
        Ok(fresh || end > size)
    }

    /// Writes without changing the size, except that the last group of the range may set it to
    /// `size_then`; nothing at or past `size` is taken to exist. True if a group had been holes.
    pub(super) fn write_range(
        &self,
        offset: u64,
        source: Source<'_>,
        size: u64,
        size_then: u64,
    ) -> FsResult<bool> {
        let end = offset + source.len();
        let mut any_fresh = false;
        for group in groups(offset, source.len()) {
            let part = part_in_group(offset, end, group);
            let source = source.slice(part.start - offset, part.end - offset);
            let size_then = if part.end == end { size_then } else { size };
            any_fresh |= self.write_part(group, part.start, source, size, size_then)?;
        }
        Ok(any_fresh)
    }

    /// Writes a range within one group, whose lock is held alone.
    fn write_part(
        &self,
        group: u64,
        offset: u64,
        source: Source<'_>,
        size: u64,
        size_then: u64,
    ) -> FsResult<bool> {
        let end = offset + source.len();
        let (first, last) = (block_of(offset), block_of(end - 1));
        let count = (last - first + 1) as usize;
        self.settle(group)?;
        let old = if group_start(group) < size { self.tag_page(group)? } else { None };
        let fresh = old.is_none();
        let mut page = match &old {
            Some(old) => self.page_to_change(old, offset, end)?,
            None => Page::empty(PageId::Tags(group)),
        };

        let mut buffer = self.shared.buffers.take();
        let blocks = &mut buffer[..count * BLOCK_LEN];
        for block in partial_blocks(offset, end) {
            let at = (block - first) as usize * BLOCK_LEN;
            let start = block * BLOCK;
            let entry = page.entry(slot_of_block(block)).filter(|_| start < size);
            self.read_to_change(block, entry, size, &mut blocks[at..at + BLOCK_LEN])?;
        }
        let from = (offset - first * BLOCK) as usize;
        source.copy_to(&mut blocks[from..from + source.len() as usize]);

        let (first_sector, last_sector) = if fresh {
            (0, SECTORS_PER_PAGE - 1)
        } else {
            (slot_of_block(first) / BLOCKS_PER_SECTOR, slot_of_block(last) / BLOCKS_PER_SECTOR)
        };
        let (first_slot, last_slot) = (slot_of_block(first), slot_of_block(last));
        let replaces = (first_slot..=last_slot).any(|slot| page.entry(slot).is_some());
        let record =
            self.seal_blocks(&mut page, first, blocks, first_sector..=last_sector, replaces)?;

        let announced = match record {
            Some((record, bytes)) => Some(self.shared.pending.announce(record, &bytes)?),
            None => None,
        };
        if fresh && first_slot == 0 {
            self.backing.write_parts_at(&[page.bytes(), blocks], tag_page_at(group))?;
        } else {
            self.backing.write_at(blocks, block_at(first))?;
            self.write_sectors(&page, first_sector, last_sector)?;
        }
        if fresh {
            self.materialise(group, size_then)?;
        }
        self.cache_page(page);
        if let Some(announced) = announced {
            announced.finished();
        }
        Ok(fresh)
    }

    /// Encrypts `blocks` in place, puts their entries into `page` and seals its sectors; returns
    /// what is to be announced before blocks with content are replaced.
    fn seal_blocks(
        &self,
        page: &mut Page,
        first: u64,
        blocks: &mut [u8],
        sectors: RangeInclusive<usize>,
        replaces: bool,
    ) -> FsResult<Option<(Record, Vec<u8>)>> {
        let count = blocks.len() / BLOCK_LEN;
        let lease = self.shared.gate.lease()?;
        let mut sealer = Sealer::new(&self.shared, &self.keys, &lease, count as u64)?;
        for (block, bytes) in (first..).zip(blocks.chunks_exact_mut(BLOCK_LEN)) {
            let entry = sealer.seal(block, bytes).ok_or(Errno::IO)?;
            page.set_entry(slot_of_block(block), Some(entry));
        }
        self.seal_sectors(&lease, page, *sectors.start(), *sectors.end())?;
        let record = if replaces {
            let slot = slot_of_block(first);
            let entries = (slot..slot + count).filter_map(|slot| page.entry(slot)).collect();
            let group = first / BLOCKS_PER_GROUP as u64;
            let record = Record { file_id: self.keys.file_id, group, first: slot, entries };
            let key = self.shared.keys.pending_mac(&lease)?;
            let bytes = record.encode(&self.shared.volume, &key);
            Some((record, bytes))
        } else {
            None
        };
        lease.still_open()?;
        Ok(record)
    }

    /// Where a write of this group was interrupted, finds out which of its blocks have the new
    /// content. The group is locked alone.
    pub(super) fn settle(&self, group: u64) -> FsResult<()> {
        let records = self.shared.pending.unsettled(&self.keys.file_id, group);
        if records.is_empty() {
            return Ok(());
        }
        let Some(old) = self.tag_page(group)? else {
            self.shared.pending.settled(&self.keys.file_id, group);
            return Ok(());
        };
        let mut page = Page::clone(&old);
        let mut changed: Option<(usize, usize)> = None;
        let mut buffer = self.shared.buffers.take();
        let bytes = &mut buffer[..BLOCK_LEN];
        for record in &records {
            for (slot, entry) in (record.first..).zip(&record.entries) {
                let sector = slot / BLOCKS_PER_SECTOR;
                let block = group * BLOCKS_PER_GROUP as u64 + slot as u64;
                if integrity(self.verify_sectors(&old, sector, sector))?.is_none() {
                    continue;
                }
                let Some(current) = page.entry(slot).filter(|current| current != entry) else {
                    continue;
                };
                if integrity(self.read_block(block, &current, bytes))?.is_none()
                    && integrity(self.read_block(block, entry, bytes))?.is_some()
                {
                    page.set_entry(slot, Some(*entry));
                    let (from, to) = changed.unwrap_or((sector, sector));
                    changed = Some((from.min(sector), to.max(sector)));
                }
            }
        }
        if let Some((first, last)) = changed {
            if self.shared.read_only {
                self.cache_page(page);
                return Ok(());
            }
            self.verify_sectors(&old, first, last)?;
            self.store_page(page, first, last)?;
            log::info!("file {}: an interrupted write is settled", hex(&self.keys.file_id));
        }
        if !self.shared.read_only {
            self.shared.pending.settled(&self.keys.file_id, group);
        }
        Ok(())
    }

    /// A copy of a tag page whose sectors for `offset..end` are good to be changed. A damaged
    /// sector is given up where a block in it is written whole: what else was in it reads as an
    /// error from then on, as it did before.
    fn page_to_change(&self, old: &Arc<Page>, offset: u64, end: u64) -> FsResult<Page> {
        let sectors = |block: u64| slot_of_block(block) / BLOCKS_PER_SECTOR;
        let (first, last) = (sectors(block_of(offset)), sectors(block_of(end - 1)));
        match self.verify_sectors(old, first, last) {
            Err(FsError::Integrity(_)) => {}
            done => return done.map(|()| Page::clone(old)),
        }
        let PageId::Tags(group) = old.id() else { return Err(Errno::IO.into()) };
        self.forget_page(old.id());
        let again = self.tag_page(group)?.ok_or(Errno::IO)?;
        let mut page = Page::clone(&again);
        for sector in first..=last {
            let Err(damage) = self.verify_sectors(&again, sector, sector) else { continue };
            if !matches!(damage, FsError::Integrity(_))
                || partial_blocks(offset, end).any(|block| sectors(block) == sector)
            {
                return Err(damage);
            }
            log::warn!("{damage}: rewritten, only the blocks written now are readable");
            page.reset_sector(sector);
            for slot in sector * BLOCKS_PER_SECTOR..(sector + 1) * BLOCKS_PER_SECTOR {
                page.set_entry(slot, Some(Entry::LOST));
            }
        }
        Ok(page)
    }

    /// The plaintext of a block that will be written in part.
    fn read_to_change(
        &self,
        block: u64,
        entry: Option<Entry>,
        size: u64,
        bytes: &mut [u8],
    ) -> FsResult<()> {
        let Some(entry) = entry else {
            bytes.fill(0);
            return Ok(());
        };
        self.read_block(block, &entry, bytes)?;
        // Bytes past the size do not exist, even if a write that was never finished left some.
        let exists = (size - block * BLOCK).min(BLOCK) as usize;
        bytes[exists..].fill(0);
        Ok(())
    }

    /// Hands the device what a write of this range put into the kernel's cache.
    fn write_out(&self, offset: u64, len: u64, meta_changed: bool) -> FsResult<()> {
        let end = offset + len;
        let write_out = || -> std::io::Result<()> {
            for group in groups(offset, len) {
                let part = part_in_group(offset, end, group);
                let (from, to) = (block_of(part.start), block_of(part.end - 1));
                self.backing.write_out(block_at(from), (to - from + 1) * BLOCK)?;
                self.backing.write_out(tag_page_at(group), BLOCK)?;
            }
            if meta_changed {
                let (first, last) = (group_of(offset), group_of(end - 1));
                for region in region_of_group(first)..=region_of_group(last) {
                    self.backing.write_out(generation_page_at(region), BLOCK)?;
                }
                self.backing.write_out(0, HEADERS_LEN)?;
            }
            Ok(())
        };
        write_out().map_err(|error| self.fail(error))
    }
}

/// The first and last block of a range, where they are not covered whole.
fn partial_blocks(offset: u64, end: u64) -> impl Iterator<Item = u64> {
    let (first, last) = (block_of(offset), block_of(end - 1));
    let covers_start = |block: u64| offset <= block * BLOCK;
    let covers_end = |block: u64| end >= (block + 1) * BLOCK;
    let head = (!covers_start(first) || !covers_end(first)).then_some(first);
    let tail = (last != first && !covers_end(last)).then_some(last);
    head.into_iter().chain(tail)
}

/// None where the disk's content is at fault; other failures are failures.
fn integrity(done: FsResult<()>) -> FsResult<Option<()>> {
    match done {
        Ok(()) => Ok(Some(())),
        Err(FsError::Integrity(_)) => Ok(None),
        Err(error) => Err(error),
    }
}
