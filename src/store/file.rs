//! One plaintext file over its backing file, its home, and the log.
//!
//! A change is logged before it counts ([`change`]), lies in an [`overlay`] over what the disk has,
//! and goes home with the next [`checkpoint`]. At home the order is: data and tag pages, flushed;
//! generation pages of new regions, flushed; the other generation pages and the header, flushed; and
//! only then is the log's space used again. So a home file at any instant is an older state of the
//! file, or a mix of one with the states that the log holds: what the log holds is put over it.
//!
//! Locks, in this order: a range of groups, then `state`. Nobody who holds a range waits for room
//! in the log.

mod change;
mod checkpoint;
mod overlay;
mod pages;
mod read;
mod removed;
mod reseal;
mod resize;
mod seek;
mod space;
mod verify;
mod write;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::RwLock;
use rustix::io::Errno;

use self::change::Change;
pub(super) use self::checkpoint::Snapshot;
use self::overlay::State;
pub use self::overlay::Times;
use super::Shared;
use super::header::Header;
use super::intent_log::{Kind, Log, PendingFlush, Record, STREAMS, Scope, Stream};
use super::keys::{FileKeys, hex};
use super::layout::{BLOCK, HEADERS_LEN, blocks_for, group_of, region_of_group};
use super::range_lock::RangeLock;
use crate::backing::{FileRef, NodeId, NodeRef, SetTime};
use crate::error::FsResult;
use crate::sync::Mutex;

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

/// A file of an opened volume; every handle on the same inode shares one.
#[derive(Debug)]
pub struct File {
    shared: Arc<Shared>,
    me: Weak<File>,
    backing: FileRef,
    node: NodeId,
    file_id: [u8; 16],
    keys: RwLock<Arc<FileKeys>>,
    /// Names this file's pages in the cache. A new number forgets them all.
    cache_id: AtomicU64,
    locks: RangeLock,
    state: Mutex<State>,
    /// Nothing is dirty and no checkpoint runs: the disk is all there is.
    clean: AtomicBool,
    /// That of the header in `state`.
    size: AtomicU64,
    /// Not 0 while nothing of this file is known to be on stable storage, neither its inode nor its
    /// name: its number among those of which that is so.
    unsynced: AtomicU64,
    /// A write-back of the inode failed: what is on the disk is no longer known.
    failed: AtomicBool,
    /// A record is put into force again: an unfinished checkpoint may have left pages that are newer
    /// than the rest. It has left no others than records in the log change.
    recovering: AtomicBool,
    /// Writes since somebody last waited for the disk.
    since_sync: AtomicU64,
    /// There was one before that.
    one_by_one: AtomicBool,
}

impl File {
    pub(super) fn new(
        shared: Arc<Shared>,
        backing: FileRef,
        node: NodeId,
        header: Header,
        unsynced: Option<u64>,
    ) -> File {
        File {
            file_id: header.file_id,
            keys: RwLock::new(Arc::new(FileKeys::of(&header))),
            me: Weak::new(),
            cache_id: AtomicU64::new(shared.next_cache_id()),
            locks: RangeLock::default(),
            size: AtomicU64::new(header.size),
            state: Mutex::new(State::new(header)),
            clean: AtomicBool::new(true),
            unsynced: AtomicU64::new(unsynced.unwrap_or(0)),
            failed: AtomicBool::new(false),
            recovering: AtomicBool::new(false),
            since_sync: AtomicU64::new(u64::MAX / 2),
            one_by_one: AtomicBool::new(false),
            shared,
            backing,
            node,
        }
    }

    /// To be called before anyone else has it.
    pub(super) fn set_me(&mut self, me: Weak<File>) {
        self.me = me;
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Those that everything is sealed and opened with now. Who holds a range of groups may keep
    /// them for as long: no key is forgotten that a block in it needs.
    pub(super) fn keys(&self) -> Arc<FileKeys> {
        self.keys.read().clone()
    }

    /// The lowest seqs that anything of this file may need; None where the log has nothing of it.
    pub(super) fn first(&self) -> Option<[u64; STREAMS]> {
        self.state.lock().first()
    }

    /// It has no name, and nobody can reach it any more.
    pub(super) fn forsake(&self) {
        self.state.lock().forsaken = true;
    }

    pub(super) fn is_forsaken(&self) -> bool {
        self.state.lock().forsaken
    }

    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub fn file_id(&self) -> [u8; 16] {
        self.file_id
    }

    pub fn backing(&self) -> &FileRef {
        &self.backing
    }

    /// Allocated space in units of 512 bytes, without what the format adds.
    pub fn blocks512(&self) -> FsResult<u64> {
        Ok(plain_blocks(self.kept512(self.backing.metadata()?.blocks), self.size()))
    }

    /// Without what the next checkpoint gives back, at most: what was written since may need some of it.
    /// `blocks` of the backing file, in units of 512 bytes.
    pub(super) fn kept512(&self, blocks: u64) -> u64 {
        let freed = self.state.lock().freed() / 512;
        blocks.saturating_sub(freed).max(blocks.min((HEADERS_LEN + BLOCK) / 512))
    }

    /// The times to be shown while they are not those of the backing file.
    pub fn times(&self) -> Option<Times> {
        self.state.lock().times
    }

    /// Something else than the content was changed.
    pub(super) fn touch(&self) {
        if let Some(times) = &mut self.state.lock().times {
            times.ctime = crate::backing::now();
        }
    }

    /// Sets the times of the backing file, which is `node`, and those that the file shows.
    pub(super) fn set_times(&self, node: &NodeRef, atime: SetTime, mtime: SetTime) -> FsResult<()> {
        let shown = match mtime {
            SetTime::Keep => None,
            SetTime::Now => Some(crate::backing::now()),
            SetTime::At(time) => Some(time),
        };
        loop {
            let room = match self.times() {
                Some(_) => Some(self.shared.reserve(Stream::Hot, change::room_for(0))?),
                None => None,
            };
            // No checkpoint ends meanwhile: it would put the older time over this one.
            let _guard = self.locks.shared(0..=0);
            let dirty = self.times().is_some();
            if dirty && room.is_none() {
                continue;
            }
            node.set_times(atime, mtime)?;
            if let (true, Some(room), Some(mtime)) = (dirty, room, shown) {
                // Otherwise recovery would bring the older one back.
                let mut change = Change::new(self, Kind::Times);
                change.set_mtime(mtime);
                change.commit(room)?;
            }
            return Ok(());
        }
    }

    /// Nothing of the file, perhaps not even its name, has been made durable.
    pub fn is_unsynced(&self) -> bool {
        self.owes_name().is_some()
    }

    /// The same, as what [`File::name_is_durable`] wants to hear of it.
    pub fn owes_name(&self) -> Option<u64> {
        Some(self.unsynced.load(Ordering::Acquire)).filter(|&number| number != 0)
    }

    pub(super) fn name_is_new(&self, number: u64) {
        self.unsynced.store(number, Ordering::Release);
    }

    /// The file was flushed, and before that its name was: to be called by who knows of names. What
    /// was `owed` before all that: it may have been given another name since.
    pub fn name_is_durable(&self, owed: u64) {
        // Another one is owed then.
        let _ = self.unsynced.compare_exchange(owed, 0, Ordering::AcqRel, Ordering::Acquire);
        self.shared.newborn.remove(self.node, owed);
    }

    /// What was written is on stable storage afterwards; with `attributes`, those of the backing
    /// file are too. The name is the caller's business. A failure is final.
    pub fn sync(&self, attributes: bool) -> FsResult<()> {
        self.sync_inode(attributes)?;
        self.begin_sync()?.map_or(Ok(()), PendingFlush::wait)
    }

    /// The first half of [`File::sync`]: the backing file itself, where that is owed.
    pub fn sync_inode(&self, attributes: bool) -> FsResult<()> {
        self.check_usable()?;
        if !(attributes || self.is_unsynced()) {
            return Ok(());
        }
        let sync = || self.backing.sync_all();
        let done = self.shared.flush(Scope::Inode(self.node), sync, |error| self.fail(error));
        // Whatever it was: MySQL takes EROFS for success.
        done.map_err(|_| Errno::IO.into())
    }

    /// The other half: what was written. Returns the last flush of the log, if one is owed.
    pub fn begin_sync(&self) -> FsResult<Option<PendingFlush>> {
        self.check_usable()?;
        let writes = self.since_sync.swap(0, Ordering::Relaxed);
        if writes > 0 {
            self.one_by_one.store(writes == 1, Ordering::Relaxed);
        }
        if self.shared.read_only {
            return Ok(None);
        }
        let last = self.state.lock().last;
        let log = self.shared.log()?;
        let owed = |stream: Stream| match last[stream as usize] {
            0 => None,
            seq => log.pending_flush(stream, seq),
        };
        match (owed(Stream::Bulk), owed(Stream::Hot)) {
            (Some(bulk), Some(hot)) => {
                bulk.wait()?;
                Ok(Some(hot))
            }
            (bulk, hot) => Ok(bulk.or(hot)),
        }
    }

    /// The times that the file shows.
    fn shown_times(&self) -> FsResult<Times> {
        if let Some(times) = self.times() {
            return Ok(times);
        }
        let home = self.backing.metadata()?;
        let settled = self.shared.settled_times.get(self.node, home.ctime);
        Ok(Times { mtime: Some(home.mtime), ctime: settled.unwrap_or(home.ctime) })
    }

    /// Puts a record of the log into force, at recovery.
    pub(super) fn replay(&self, record: &Record) -> FsResult<()> {
        self.recovering.store(true, Ordering::Release);
        let change = Change::of_record(self, record);
        let done = change.and_then(|change| change.replay(record, self.shared.read_only));
        self.recovering.store(false, Ordering::Release);
        done
    }

    /// Notes, before a record is appended, that from here on the log holds something of this file. On
    /// return it is among the dirty files, whoever put it there: of others a checkpoint does not know
    /// that the log must keep their records.
    fn about_to_log(&self, log: &Log) {
        let first = {
            let mut state = self.state.lock();
            let first = *state.dirty.first.get_or_insert_with(|| log.next_seqs());
            if state.dirty.listed {
                return;
            }
            first
        };
        if let Some(me) = self.me.upgrade() {
            self.shared.dirty.add(me);
        }
        let dirty = &mut self.state.lock().dirty;
        dirty.listed = dirty.first == Some(first);
    }

    /// The last record of this file in the other stream.
    fn last_of_other(&self, stream: Stream) -> u64 {
        self.state.lock().last[(stream as usize + 1) % STREAMS]
    }

    fn set_shown_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    fn set_clean(&self, clean: bool) {
        self.clean.store(clean, Ordering::Release);
    }

    fn is_clean(&self) -> bool {
        self.clean.load(Ordering::Acquire)
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

    /// The kernel has told of a failed write-back, perhaps of something that a checkpoint has brought
    /// home and is about to flush: the log must not forget anything any more.
    fn fail(&self, error: &std::io::Error) {
        let file = hex(&self.file_id);
        log::error!("file {file}: write-back failed ({error}); it takes no more writes");
        self.failed.store(true, Ordering::Release);
        if let Ok(log) = self.shared.log() {
            log.flush_failed(&format!("file {file} cannot be flushed"), error);
        }
    }

    fn cache_id(&self) -> u64 {
        self.cache_id.load(Ordering::Acquire)
    }

    /// Forgets every cached page. No request may be in the groups concerned.
    fn forget_pages(&self) {
        self.cache_id.store(self.shared.next_cache_id(), Ordering::Release);
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
        let keys = shared.keys.header_macs(&lease)?;
        let pages = header.encode(&shared.volume, &keys);
        lease.still_open()?;
        // Whoever has read it has checked that.
        pages.ok_or(Errno::IO)?
    };
    Ok(backing.write_at(&pages, 0)?)
}

/// What of `blocks` of a backing file is data: its pages of a file of that size are taken off.
pub(super) fn plain_blocks(blocks: u64, size: u64) -> u64 {
    const PER_PAGE: u64 = BLOCK / 512;
    let groups = if size == 0 { 0 } else { group_of(size - 1) + 1 };
    let regions = if size == 0 { 0 } else { region_of_group(groups - 1) + 1 };
    let pages = HEADERS_LEN / BLOCK + regions + groups;
    // A sparse file lacks most of those pages, and a full one has no more blocks than it needs. One that
    // has any must not show 0: GNU tar takes that for a file of zeros, and does not read it.
    let least = if blocks > HEADERS_LEN / 512 { PER_PAGE } else { 0 };
    let data = blocks.saturating_sub(pages * PER_PAGE).max(least);
    data.min(blocks_for(size) * PER_PAGE)
}
