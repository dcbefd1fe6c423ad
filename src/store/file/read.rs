//! Reading.

use super::File;
use crate::error::{FsError, FsResult};
use crate::store::block::Opener;
use crate::store::keys::hex;
use crate::store::layout::{
    BLOCK, BLOCK_LEN, BLOCKS_PER_SECTOR, block_at, block_of, group_of, groups, part_in_group,
    region_of_group, slot_of_block,
};
use crate::store::page::{Entry, Page, PageId};

impl File {
    /// Bytes read; fewer than asked for only at the end of the file. On an error `buf` is zeroed.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> FsResult<usize> {
        let last = offset.saturating_add(buf.len() as u64).saturating_sub(1);
        let range = group_of(offset)..=group_of(last).max(group_of(offset));
        let mut done = {
            let _guard = self.locks.shared(range.clone());
            self.read_locked(buf, offset)
        };
        if let Err(FsError::Integrity(_)) = done {
            // Once more, alone and from the disk, before it counts.
            let _guard = self.locks.exclusive(range.clone());
            for group in range.clone() {
                if group_of(self.size()) < group {
                    break;
                }
                self.forget_page(PageId::Tags(group));
                self.forget_page(PageId::Generations(region_of_group(group)));
            }
            done = self.read_locked(buf, offset);
        }
        if done.is_err() {
            buf.fill(0);
        }
        done
    }

    /// The groups are locked.
    fn read_locked(&self, buf: &mut [u8], offset: u64) -> FsResult<usize> {
        let size = self.size();
        if offset >= size || buf.is_empty() {
            return Ok(0);
        }
        let count = usize::try_from(size - offset).map_or(buf.len(), |left| left.min(buf.len()));
        let end = offset + count as u64;
        for group in groups(offset, count as u64) {
            let part = part_in_group(offset, end, group);
            let (from, to) = ((part.start - offset) as usize, (part.end - offset) as usize);
            self.read_part(group, part.start, &mut buf[from..to])?;
        }
        Ok(count)
    }

    /// Reads a range within one group.
    fn read_part(&self, group: u64, offset: u64, buf: &mut [u8]) -> FsResult<()> {
        let Some(page) = self.tag_page(group)? else {
            buf.fill(0);
            return Ok(());
        };
        let end = offset + buf.len() as u64;
        let (first, last) = (block_of(offset), block_of(end - 1));
        self.verify_sectors(
            &page,
            slot_of_block(first) / BLOCKS_PER_SECTOR,
            slot_of_block(last) / BLOCKS_PER_SECTOR,
        )?;

        // Whole blocks are decrypted where they are wanted, the others in a buffer of ours.
        let (whole_from, whole_to) = (offset.div_ceil(BLOCK), block_of(end));
        let head = (!offset.is_multiple_of(BLOCK) || first == whole_to).then_some(first);
        let tail = (!end.is_multiple_of(BLOCK) && Some(last) != head).then_some(last);
        let mut scratch = (head.is_some() || tail.is_some()).then(|| self.shared.buffers.take());

        let whole = if whole_from < whole_to {
            let from = (whole_from * BLOCK - offset) as usize;
            let len = (whole_to - whole_from) as usize * BLOCK_LEN;
            self.read_sealed(&page, whole_from, &mut buf[from..from + len])?;
            Some((from, len))
        } else {
            None
        };
        let partial = [head, tail];
        if let Some(scratch) = &mut scratch {
            for (block, bytes) in partial.iter().zip(scratch.chunks_exact_mut(BLOCK_LEN)) {
                if let Some(block) = *block {
                    self.read_sealed(&page, block, bytes)?;
                }
            }
        }

        let lease = self.shared.gate.lease()?;
        let keys = self.keys();
        let mut opener = Opener::new(&self.shared, &keys, &lease);
        let mut open = |block: u64, bytes: &mut [u8]| match page.entry(slot_of_block(block)) {
            Some(entry) => opener.open(block, &entry, bytes),
            None => {
                bytes.fill(0);
                Ok(())
            }
        };
        if let Some((from, len)) = whole {
            let blocks = buf[from..from + len].chunks_exact_mut(BLOCK_LEN);
            for (block, bytes) in (whole_from..).zip(blocks) {
                open(block, bytes)?;
            }
        }
        if let Some(scratch) = &mut scratch {
            for (block, bytes) in partial.iter().zip(scratch.chunks_exact_mut(BLOCK_LEN)) {
                let Some(block) = *block else { continue };
                open(block, bytes)?;
                let start = block * BLOCK;
                let (from, to) = (offset.max(start), end.min(start + BLOCK));
                buf[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&bytes[(from - start) as usize..(to - start) as usize]);
            }
        }
        Ok(lease.still_open()?)
    }

    /// Reads the ciphertext of the blocks from `first` on that fill `buf`, at least of those that
    /// are not holes.
    pub(super) fn read_sealed(&self, page: &Page, first: u64, buf: &mut [u8]) -> FsResult<()> {
        let count = buf.len() / BLOCK_LEN;
        let Some(spots) = self.spots(first, count) else {
            return self.read_home(page, first, buf);
        };
        let log = self.shared.log()?;
        let mut at = 0;
        while at < count {
            let same = |next: usize| match (spots[at], spots[next]) {
                (None, None) => true,
                (Some(from), Some(to)) => {
                    from.stream == to.stream && from.at + ((next - at) * BLOCK_LEN) as u64 == to.at
                }
                _ => false,
            };
            let past = (at + 1..count).find(|&next| !same(next)).unwrap_or(count);
            let bytes = &mut buf[at * BLOCK_LEN..past * BLOCK_LEN];
            match spots[at] {
                Some(spot) => log.read(spot.stream, bytes, spot.at)?,
                None => self.read_home(page, first + at as u64, bytes)?,
            }
            at = past;
        }
        Ok(())
    }

    /// From the home file, by one call.
    fn read_home(&self, page: &Page, first: u64, buf: &mut [u8]) -> FsResult<()> {
        let count = buf.len() / BLOCK_LEN;
        let sealed = |i: &usize| -> bool { page.entry(slot_of_block(first) + i).is_some() };
        let mut sealed = (0..count).filter(sealed);
        let Some(from) = sealed.next() else { return Ok(()) };
        let to = sealed.last().unwrap_or(from) + 1;
        let bytes = &mut buf[from * BLOCK_LEN..to * BLOCK_LEN];
        let read = self.backing.read_at(bytes, block_at(first + from as u64))?;
        // Past the end of the backing file: not a block, whatever was in `buf`.
        bytes[read..].fill(0);
        Ok(())
    }

    /// Reads and decrypts one block that is not a hole.
    pub(super) fn read_block(&self, block: u64, entry: &Entry, buf: &mut [u8]) -> FsResult<()> {
        match self.spots(block, 1).and_then(|spots| spots[0]) {
            Some(spot) => self.shared.log()?.read(spot.stream, buf, spot.at)?,
            None => {
                let read = self.backing.read_at(buf, block_at(block))?;
                if read < buf.len() {
                    let detail = "the backing file ends before it";
                    let file = hex(&self.file_id());
                    return Err(FsError::integrity("block", file, Some(block), detail));
                }
            }
        }
        let lease = self.shared.gate.lease()?;
        Opener::new(&self.shared, &self.keys(), &lease).open(block, entry, buf)?;
        Ok(lease.still_open()?)
    }
}
