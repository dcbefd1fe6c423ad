//! One plaintext file over its backing file.
//!
//! Order of writes: data, tag sectors, generation sectors, header; each handed to the kernel
//! before the call returns. What a later write in that order has not reached does not count: a
//! group without a generation is holes, and nothing at or past the size in the header exists,
//! whatever tag entries say. So whoever makes bytes past the old size readable without writing
//! them clears them first.
//!
//! Locks, in this order: a range of groups, then `meta` (header and generation pages).

mod pages;
mod read;
mod resize;
mod seek;
mod space;
mod write;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::io::Errno;

use super::Shared;
use super::header::Header;
use super::keys::{FileKeys, hex};
use super::layout::{BLOCK, HEADERS_LEN, blocks_for, group_of, region_of_group};
use super::range_lock::RangeLock;
use crate::backing::{FileRef, NodeId};
use crate::error::{FsError, FsResult};

/// When a write is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Durability {
    /// In the backing kernel's hands: survives the daemon.
    #[default]
    Handed,
    /// On the device, perhaps in its cache: what a plain O_DIRECT write promises.
    OnDevice,
    /// On stable storage: O_DSYNC, O_SYNC.
    Flushed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WriteMode {
    /// At the end of the file, wherever that is; the offset given is ignored.
    pub append: bool,
    pub durability: Durability,
}

/// A file of an opened volume; every handle on the same inode shares one.
#[derive(Debug)]
pub struct File {
    shared: Arc<Shared>,
    backing: FileRef,
    node: NodeId,
    keys: FileKeys,
    /// Names this file's pages in the cache. A new number forgets them all.
    cache_id: AtomicU64,
    locks: RangeLock,
    meta: Mutex<Header>,
    /// That of `meta`; changed only with the groups from the smaller size on locked.
    size: AtomicU64,
    /// Nothing of this file is known to be on stable storage yet, not even its inode.
    unsynced: AtomicBool,
    /// A write-back failed: what is on the disk is no longer known.
    failed: AtomicBool,
}

impl File {
    pub(super) fn new(
        shared: Arc<Shared>,
        backing: FileRef,
        node: NodeId,
        header: Header,
        unsynced: bool,
    ) -> File {
        File {
            keys: FileKeys::of(&header),
            cache_id: AtomicU64::new(shared.next_cache_id()),
            locks: RangeLock::default(),
            size: AtomicU64::new(header.size),
            meta: Mutex::new(header),
            unsynced: AtomicBool::new(unsynced),
            failed: AtomicBool::new(false),
            shared,
            backing,
            node,
        }
    }

    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub fn file_id(&self) -> [u8; 16] {
        self.keys.file_id
    }

    pub fn backing(&self) -> &FileRef {
        &self.backing
    }

    /// Allocated space in units of 512 bytes, without what the format adds.
    pub fn blocks512(&self) -> FsResult<u64> {
        Ok(plain_blocks(self.backing.metadata()?.blocks, self.size()))
    }

    /// `data_only` is fdatasync: the size counts as data. A failure is final, as it is for the
    /// kernel: what did not reach the disk may be gone from its cache too.
    pub fn sync(&self, data_only: bool) -> FsResult<()> {
        self.check_usable()?;
        let first = self.unsynced.load(Ordering::Acquire);
        let done =
            if data_only && !first { self.backing.sync_data() } else { self.backing.sync_all() };
        if let Err(error) = done {
            return Err(self.fail(error));
        }
        if first {
            self.unsynced.store(false, Ordering::Release);
        }
        Ok(())
    }

    fn check_usable(&self) -> FsResult<()> {
        if self.failed.load(Ordering::Acquire) { Err(Errno::IO.into()) } else { Ok(()) }
    }

    fn check_writable(&self) -> FsResult<()> {
        if self.shared.read_only {
            return Err(Errno::ROFS.into());
        }
        self.check_usable()
    }

    fn fail(&self, error: std::io::Error) -> FsError {
        let file = hex(&self.keys.file_id);
        log::error!("file {file}: write-back failed ({error}); it takes no more writes");
        self.failed.store(true, Ordering::Release);
        error.into()
    }

    fn cache_id(&self) -> u64 {
        self.cache_id.load(Ordering::Acquire)
    }

    /// Forgets every cached page. No request may be in the groups concerned.
    fn forget_pages(&self) {
        self.cache_id.store(self.shared.next_cache_id(), Ordering::Release);
    }

    /// Writes the header with `change` made to it; on an error the old one stays in force.
    fn update_header(&self, meta: &mut Header, change: impl FnOnce(&mut Header)) -> FsResult<()> {
        let mut next = meta.clone();
        change(&mut next);
        next.generation += 1;
        write_header(&self.shared, &self.backing, &next)?;
        *meta = next;
        Ok(())
    }

    /// Makes `size` the size. The groups from the smaller size on are locked.
    fn set_size(&self, size: u64) -> FsResult<()> {
        let mut meta = self.meta.lock();
        if meta.size != size {
            self.update_header(&mut meta, |header| {
                if size < header.size {
                    let kept = if size == 0 { 0 } else { region_of_group(group_of(size - 1)) + 1 };
                    header.drop_regions_from(kept);
                }
                header.size = size;
            })?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}

impl Drop for File {
    fn drop(&mut self) {
        self.shared.forget(self.node);
    }
}

/// MACs the header under a lease and writes both copies.
pub(super) fn write_header(shared: &Shared, backing: &FileRef, header: &Header) -> FsResult<()> {
    let pages = {
        let lease = shared.gate.lease()?;
        let key = shared.keys.header_mac(&lease)?;
        let pages = header.encode(&shared.volume, &key);
        lease.still_open()?;
        pages
    };
    Ok(backing.write_at(&pages, 0)?)
}

/// What of `blocks` of a backing file is data: its pages of a file of that size are taken off.
pub(super) fn plain_blocks(blocks: u64, size: u64) -> u64 {
    const PER_PAGE: u64 = BLOCK / 512;
    let groups = if size == 0 { 0 } else { group_of(size - 1) + 1 };
    let regions = if size == 0 { 0 } else { region_of_group(groups - 1) + 1 };
    let pages = HEADERS_LEN / BLOCK + regions + groups;
    // A sparse file lacks most of those pages, and a full one has no more blocks than it needs.
    blocks.saturating_sub(pages * PER_PAGE).min(blocks_for(size) * PER_PAGE)
}
