//! What a disk holds: inodes, names and pages, and how one operation changes them.
//!
//! Images share what they have in common, so that one can be cloned for every crash state.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use super::trace::{Change, Op, Part};
use crate::backing::{FileKind, SetTime, Timestamp};

pub(super) const PAGE_LEN: usize = 4096;
pub(super) const SECTOR_LEN: usize = 512;
pub(super) const ROOT: u64 = 2;

type Page = [u8; PAGE_LEN];

/// Pages that are shared and looked up together.
const CHUNK: u64 = 64;

/// The pages of a file, by their index.
#[derive(Clone, Debug, Default)]
struct Pages(BTreeMap<u64, Arc<Chunk>>);

type Chunk = [Option<Arc<Page>>; CHUNK as usize];

impl Pages {
    fn get(&self, index: u64) -> Option<&Arc<Page>> {
        self.0.get(&(index / CHUNK))?[(index % CHUNK) as usize].as_ref()
    }

    /// To be changed; of zeros where there is none.
    fn page(&mut self, index: u64) -> &mut Page {
        let empty = || Arc::new(std::array::from_fn(|_| None));
        let chunk = Arc::make_mut(self.0.entry(index / CHUNK).or_insert_with(empty));
        let page = &mut chunk[(index % CHUNK) as usize];
        Arc::make_mut(page.get_or_insert_with(|| Arc::new([0; PAGE_LEN])))
    }

    fn remove(&mut self, index: u64) {
        let Some(chunk) = self.0.get_mut(&(index / CHUNK)) else { return };
        let chunk = Arc::make_mut(chunk);
        chunk[(index % CHUNK) as usize] = None;
        if chunk.iter().all(Option::is_none) {
            self.0.remove(&(index / CHUNK));
        }
    }

    /// The indexes of those in the range, in order.
    fn in_range(&self, range: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let chunks = self.0.range(range.start / CHUNK..range.end.div_ceil(CHUNK));
        let there = chunks.flat_map(|(number, chunk)| {
            let pages = (number * CHUNK..).zip(chunk.iter());
            pages.filter(|(_, page)| page.is_some()).map(|(index, _)| index)
        });
        there.filter(move |index| range.contains(index))
    }
}

#[derive(Clone, Debug)]
pub(super) struct Inode {
    pub kind: FileKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    pub size: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Of a symbolic link.
    pub target: Vec<u8>,
    /// Of a directory.
    pub names: BTreeMap<Vec<u8>, u64>,
    pages: Pages,
}

impl Inode {
    pub(super) fn new(kind: FileKind, mode: u32, rdev: u64) -> Inode {
        Inode {
            kind,
            mode: mode & 0o7777,
            uid: 0,
            gid: 0,
            rdev,
            size: 0,
            atime: Timestamp::default(),
            mtime: Timestamp::default(),
            xattrs: BTreeMap::new(),
            target: Vec::new(),
            names: BTreeMap::new(),
            pages: Pages::default(),
        }
    }

    pub(super) fn allocated_pages(&self) -> u64 {
        self.pages.in_range(0..u64::MAX).count() as u64
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let len = (self.size.saturating_sub(offset)).min(buf.len() as u64) as usize;
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let within = (at % PAGE_LEN as u64) as usize;
            let take = (PAGE_LEN - within).min(len - done);
            let to = &mut buf[done..done + take];
            match self.pages.get(at / PAGE_LEN as u64) {
                Some(page) => to.copy_from_slice(&page[within..within + take]),
                None => to.fill(0),
            }
            done += take;
        }
        len
    }

    /// Puts bytes in place without regard to the size.
    fn put(&mut self, data: &[u8], offset: u64) {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let within = (at % PAGE_LEN as u64) as usize;
            let take = (PAGE_LEN - within).min(data.len() - done);
            let page = self.page(at / PAGE_LEN as u64);
            page[within..within + take].copy_from_slice(&data[done..done + take]);
            done += take;
        }
    }

    fn page(&mut self, index: u64) -> &mut Page {
        self.pages.page(index)
    }

    /// Zeroes the range and gives back the pages that lie in it whole.
    fn clear(&mut self, offset: u64, end: u64) {
        let page_len = PAGE_LEN as u64;
        let touched: Vec<u64> =
            self.pages.in_range(offset / page_len..end.div_ceil(page_len)).collect();
        for index in touched {
            let (from, to) = (offset.max(index * page_len), end.min((index + 1) * page_len));
            if to - from == page_len {
                self.pages.remove(index);
            } else {
                self.page(index)
                    [(from - index * page_len) as usize..(to - index * page_len) as usize]
                    .fill(0);
            }
        }
    }

    pub(super) fn next_page(&self, from: u64) -> Option<u64> {
        self.pages.in_range(from..u64::MAX).next()
    }

    pub(super) fn has_page(&self, index: u64) -> bool {
        self.pages.get(index).is_some()
    }

    fn change(&mut self, change: &Change) {
        match change {
            Change::Mode(mode) => self.mode = mode & 0o7777,
            Change::Owner(uid, gid) => {
                self.uid = uid.unwrap_or(self.uid);
                self.gid = gid.unwrap_or(self.gid);
            }
            Change::Times(atime, mtime, now) => {
                let set = |to: &mut Timestamp, how: &SetTime| match how {
                    SetTime::Keep => {}
                    SetTime::Now => *to = *now,
                    SetTime::At(time) => *to = *time,
                };
                set(&mut self.atime, atime);
                set(&mut self.mtime, mtime);
            }
            Change::SetXattr(name, value) => {
                self.xattrs.insert(name.clone(), value.clone());
            }
            Change::RemoveXattr(name) => {
                self.xattrs.remove(name);
            }
        }
    }
}

/// A whole disk.
#[derive(Clone, Debug)]
pub(super) struct Image {
    inodes: BTreeMap<u64, Arc<Inode>>,
}

impl Image {
    pub(super) fn empty() -> Image {
        let root = Arc::new(Inode::new(FileKind::Directory, 0o755, 0));
        Image { inodes: BTreeMap::from([(ROOT, root)]) }
    }

    pub(super) fn inode(&self, ino: u64) -> Option<&Inode> {
        self.inodes.get(&ino).map(|inode| &**inode)
    }

    fn inode_mut(&mut self, ino: u64) -> Option<&mut Inode> {
        self.inodes.get_mut(&ino).map(Arc::make_mut)
    }

    pub(super) fn last_ino(&self) -> u64 {
        self.inodes.keys().next_back().copied().unwrap_or(ROOT)
    }

    /// Counted, not kept: what a crash leaves cannot contradict it.
    pub(super) fn nlink(&self, ino: u64) -> u64 {
        let names = self.inodes.values().flat_map(|inode| inode.names.values());
        let named = names.filter(|&&named| named == ino).count() as u64;
        match self.inode(ino) {
            Some(inode) if inode.kind == FileKind::Directory => {
                let is_dir = |ino: &&u64| {
                    self.inode(**ino).is_some_and(|inode| inode.kind == FileKind::Directory)
                };
                let below = inode.names.values().filter(is_dir).count() as u64;
                1 + below + if ino == ROOT { 1 } else { named }
            }
            _ => named,
        }
    }

    /// Applies the part of `op` that reached the disk. What it acts on may be missing after a
    /// crash; then it does nothing.
    pub(super) fn apply(&mut self, op: &Op, part: &Part) {
        match op {
            Op::Write { ino, offset, data, .. } => self.write(*ino, *offset, data, part),
            Op::Create { ino, inode } => {
                self.inodes.insert(*ino, inode.clone());
            }
            _ if !part.metadata => {}
            Op::SetLen { ino, len } => {
                if let Some(inode) = self.inode_mut(*ino) {
                    inode.clear(*len, u64::MAX);
                    inode.size = *len;
                }
            }
            Op::Allocate { ino, offset, len, keep_size } => {
                if let Some(inode) = self.inode_mut(*ino) {
                    let end = offset.saturating_add(*len);
                    for index in offset / PAGE_LEN as u64..end.div_ceil(PAGE_LEN as u64) {
                        inode.page(index);
                    }
                    if !keep_size {
                        inode.size = inode.size.max(end);
                    }
                }
            }
            Op::PunchHole { ino, offset, len } => {
                if let Some(inode) = self.inode_mut(*ino) {
                    inode.clear(*offset, offset.saturating_add(*len));
                }
            }
            Op::Link { dir, name, ino } => self.set_name(*dir, name, *ino),
            Op::Unlink { dir, name, ino } => self.remove_name(*dir, name, *ino),
            Op::Rename { dir, name, to, to_name, ino, exchanged } => {
                match exchanged {
                    Some(other) => self.set_name(*dir, name, *other),
                    None => self.remove_name(*dir, name, *ino),
                }
                self.set_name(*to, to_name, *ino);
            }
            Op::Attribute { ino, change } => {
                if let Some(inode) = self.inode_mut(*ino) {
                    inode.change(change);
                }
            }
            Op::SyncData { .. }
            | Op::SyncAll { .. }
            | Op::SyncDir { .. }
            | Op::SyncFs
            | Op::WriteOut { .. } => {}
        }
    }

    fn write(&mut self, ino: u64, offset: u64, data: &[u8], part: &Part) {
        let Some(inode) = self.inode_mut(ino) else { return };
        if part.metadata {
            inode.size = inode.size.max(offset + data.len() as u64);
        }
        for (at, sector) in super::trace::sectors(offset, data.len()).enumerate() {
            if part.has_sector(at) {
                inode.put(&data[sector.clone()], offset + sector.start as u64);
            }
        }
    }

    /// Which sectors of `data` are at `offset` already.
    pub(super) fn has(&self, ino: u64, offset: u64, data: &[u8]) -> Vec<bool> {
        let mut there = vec![0; data.len()];
        let count = self.inode(ino).map_or(0, |inode| inode.read(&mut there, offset));
        let sectors = super::trace::sectors(offset, data.len());
        sectors.map(|range| range.end <= count && there[range.clone()] == data[range]).collect()
    }

    fn set_name(&mut self, dir: u64, name: &[u8], ino: u64) {
        if let Some(inode) = self.inode_mut(dir) {
            inode.names.insert(name.to_vec(), ino);
        }
    }

    fn remove_name(&mut self, dir: u64, name: &[u8], ino: u64) {
        if let Some(inode) = self.inode_mut(dir)
            && inode.names.get(name) == Some(&ino)
        {
            inode.names.remove(name);
        }
    }

    /// What a mount after a crash finds: nothing past the end of a file, no inode without a name.
    pub(super) fn settle(&mut self) {
        let mut reached = BTreeSet::from([ROOT]);
        let mut open = vec![ROOT];
        while let Some(ino) = open.pop() {
            let below = self.inode(ino).into_iter().flat_map(|inode| inode.names.values());
            open.extend(below.filter(|&&ino| reached.insert(ino)));
        }
        self.inodes.retain(|ino, _| reached.contains(ino));
        for inode in self.inodes.values_mut() {
            let past_end = inode.size.div_ceil(PAGE_LEN as u64);
            let ragged = inode.size % PAGE_LEN as u64 != 0;
            if inode.next_page(past_end).is_some() || ragged && inode.has_page(past_end - 1) {
                let size = inode.size;
                Arc::make_mut(inode).clear(size, u64::MAX);
            }
        }
    }
}
