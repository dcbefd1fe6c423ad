//! The inodes that the kernel or an open handle knows.
//!
//! Invariants:
//! - A node id is given out once. A backing inode that is known has one id, whatever its names.
//! - An inode stays as long as its lookups are not all forgotten; a handle keeps it beyond that.
//! - There may be more inodes than descriptors: [`InodeTable::crowded`] has someone ask the kernel
//!   to forget some, and [`InodeTable::reference`] waits a little for that.
//! - An inode without a name is not found by its backing identity any more: the disk may give
//!   that identity to a new file as soon as nothing holds the old one.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::RwLock;
use rustix::io::Errno;

use super::types::ROOT;
use crate::backing::{FileKind, NodeId, NodeRef};
use crate::error::{FsError, FsResult};
use crate::store::File;
use crate::sync::{Condvar, Mutex, MutexGuard};

#[derive(Debug)]
pub(super) struct Inode {
    pub(super) id: u64,
    pub(super) node: NodeRef,
    pub(super) key: NodeId,
    pub(super) kind: FileKind,
    pub(super) content: Mutex<Content>,
    /// Changed only under the table's lock.
    lookups: AtomicU64,
    place: Mutex<Option<Place>>,
    /// What is known of the mode, in two bits, and above them how often that was changed.
    set_id: AtomicU32,
    attributes_changed: AtomicBool,
    attributes_flushed: Mutex<()>,
}

/// Where an inode was last seen, for messages: a node id and a name of the disk.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) parent: u64,
    pub(super) entry: Box<[u8]>,
}

/// The content of a regular file, while it is open and between.
#[derive(Debug, Default)]
pub(super) struct Content {
    /// There as long as `opens` is not 0.
    pub(super) file: Option<Arc<File>>,
    pub(super) opens: u32,
    /// Of a file that is not open. This mount is the only writer, so it stays true.
    pub(super) size: Option<u64>,
}

/// Of [`Inode::set_id`], what is known.
const SET_ID: u32 = 3;

/// Whether a write has set-id bits to drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SetId {
    Unknown,
    None,
    Some,
}

impl Inode {
    /// Something that only `fsync` of the backing inode makes durable has changed.
    pub(super) fn note_attributes(&self) {
        self.attributes_changed.store(true, Ordering::Release);
    }

    /// For as long as one flushes what [`Inode::take_attributes`] has told.
    pub(super) fn lock_attributes(&self) -> MutexGuard<'_, ()> {
        self.attributes_flushed.lock()
    }

    pub(super) fn take_attributes(&self) -> bool {
        self.attributes_changed.swap(false, Ordering::AcqRel)
    }

    pub(super) fn place(&self) -> Option<Place> {
        self.place.lock().clone()
    }

    pub(super) fn set_place(&self, parent: u64, entry: &[u8]) {
        *self.place.lock() = Some(Place { parent, entry: entry.into() });
    }

    /// That name is gone, and it has another.
    pub(super) fn forget_place(&self, parent: u64, entry: &[u8]) {
        let mut place = self.place.lock();
        if place.as_ref().is_some_and(|seen| seen.parent == parent && *seen.entry == *entry) {
            *place = None;
        }
    }

    pub(super) fn set_id(&self) -> SetId {
        match self.set_id.load(Ordering::Acquire) & SET_ID {
            1 => SetId::None,
            2 => SetId::Some,
            _ => SetId::Unknown,
        }
    }

    /// For [`Inode::note_mode`], before the disk is asked for the mode.
    pub(super) fn mode_changes(&self) -> u32 {
        self.set_id.load(Ordering::Acquire) & !SET_ID
    }

    /// Remembers the mode that the disk had, unless it was changed since there were so many changes.
    pub(super) fn note_mode(&self, mode: u32, changes: u32) {
        let set_id = if mode & 0o6000 == 0 { 1 } else { 2 };
        let known = |now: u32| (now & !SET_ID == changes).then_some(changes | set_id);
        // Whoever has changed it does not know what has become of it.
        let _ = self.set_id.fetch_update(Ordering::AcqRel, Ordering::Acquire, known);
    }

    /// The disk has another mode.
    pub(super) fn mode_changed(&self) {
        let unknown = |now: u32| Some((now | SET_ID).wrapping_add(1));
        let _ = self.set_id.fetch_update(Ordering::AcqRel, Ordering::Acquire, unknown);
    }
}

#[derive(Debug)]
pub(super) struct InodeTable {
    maps: RwLock<Maps>,
    next: AtomicU64,
    /// How many inodes are many; none are, until somebody says so.
    many: AtomicUsize,
    crowd: Mutex<()>,
    crowded: Condvar,
}

/// How long a request waits at most for room in a table that is far too full.
const CROWD_WAIT: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct Maps {
    by_id: HashMap<u64, Arc<Inode>>,
    by_key: HashMap<NodeId, u64>,
}

impl InodeTable {
    pub(super) fn new(root: NodeRef) -> InodeTable {
        let inode = new_inode(ROOT, root, FileKind::Directory);
        let mut maps = Maps::default();
        maps.by_key.insert(inode.key, ROOT);
        maps.by_id.insert(ROOT, Arc::new(inode));
        InodeTable {
            maps: RwLock::new(maps),
            next: AtomicU64::new(ROOT + 1),
            many: AtomicUsize::new(usize::MAX),
            crowd: Mutex::new(()),
            crowded: Condvar::new(),
        }
    }

    /// ESTALE for an id that was forgotten or never given.
    pub(super) fn get(&self, id: u64) -> FsResult<Arc<Inode>> {
        self.maps.read().by_id.get(&id).cloned().ok_or(FsError::Os(Errno::STALE))
    }

    /// The inode of `node`, new or known, with one more lookup to forget.
    pub(super) fn reference(&self, node: NodeRef, kind: FileKind) -> Arc<Inode> {
        let key = node.id();
        {
            let maps = self.maps.read();
            if let Some(inode) = maps.by_key.get(&key).and_then(|id| maps.by_id.get(id)) {
                inode.lookups.fetch_add(1, Ordering::Relaxed);
                return Arc::clone(inode);
            }
        }
        let mut maps = self.maps.write();
        if let Some(inode) = maps.by_key.get(&key).and_then(|id| maps.by_id.get(id)) {
            inode.lookups.fetch_add(1, Ordering::Relaxed);
            return Arc::clone(inode);
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let inode = Arc::new(new_inode(id, node, kind));
        maps.by_key.insert(key, id);
        maps.by_id.insert(id, Arc::clone(&inode));
        let len = maps.by_id.len();
        drop(maps);
        let many = self.many.load(Ordering::Relaxed);
        if len > many {
            self.crowded.notify_all();
            if len > many.saturating_add(many / 4) {
                std::thread::sleep(CROWD_WAIT);
            }
        }
        inode
    }

    pub(super) fn set_many(&self, many: usize) {
        self.many.store(many, Ordering::Relaxed);
    }

    /// Waits until there are many inodes, at most `limit`; the ids of as many of the oldest as
    /// are more than half of that, empty if there are not many.
    pub(super) fn crowded(&self, limit: Duration) -> Vec<u64> {
        let many = self.many.load(Ordering::Relaxed);
        {
            let mut crowd = self.crowd.lock();
            if self.maps.read().by_id.len() <= many {
                self.crowded.wait_for(&mut crowd, limit);
            }
        }
        let mut ids = self.ids();
        if ids.len() <= many {
            return Vec::new();
        }
        let surplus = ids.len() - many / 2;
        ids.sort_unstable();
        ids.retain(|&id| id != ROOT);
        ids.truncate(surplus);
        ids
    }

    /// Gives `count` lookups back. The root stays.
    /// The inode, if nobody knows it any more: as long as it is held, no other has its number.
    pub(super) fn forget(&self, id: u64, count: u64) -> Option<Arc<Inode>> {
        if id == ROOT {
            return None;
        }
        let mut maps = self.maps.write();
        let inode = maps.by_id.get(&id)?;
        let left = inode.lookups.load(Ordering::Relaxed).saturating_sub(count);
        inode.lookups.store(left, Ordering::Relaxed);
        if left > 0 {
            return None;
        }
        let key = inode.key;
        // The last reference to a node closes a descriptor: not under the lock.
        let gone = maps.by_id.remove(&id);
        if maps.by_key.get(&key) == Some(&id) {
            maps.by_key.remove(&key);
        }
        drop(maps);
        gone
    }

    /// The inode has lost its last name.
    pub(super) fn unnamed(&self, key: NodeId) {
        self.maps.write().by_key.remove(&key);
    }

    /// An inode without a name was given one (`O_TMPFILE`, then linked).
    pub(super) fn named(&self, inode: &Inode) {
        let mut maps = self.maps.write();
        if maps.by_id.contains_key(&inode.id) {
            maps.by_key.insert(inode.key, inode.id);
        }
    }

    pub(super) fn known(&self, key: NodeId) -> Option<Arc<Inode>> {
        let maps = self.maps.read();
        maps.by_key.get(&key).and_then(|id| maps.by_id.get(id)).cloned()
    }

    /// Every id the kernel may have something cached for.
    pub(super) fn ids(&self) -> Vec<u64> {
        self.maps.read().by_id.keys().copied().collect()
    }
}

fn new_inode(id: u64, node: NodeRef, kind: FileKind) -> Inode {
    Inode {
        id,
        key: node.id(),
        node,
        kind,
        content: Mutex::new(Content::default()),
        lookups: AtomicU64::new(1),
        place: Mutex::new(None),
        set_id: AtomicU32::new(0),
        // Before it was forgotten, perhaps.
        attributes_changed: AtomicBool::new(true),
        attributes_flushed: Mutex::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Backing;
    use crate::backing::memory::MemoryBacking;

    #[test]
    fn what_was_seen_before_a_change_of_mode_is_not_what_is_there_after_it() {
        let inode = new_inode(2, MemoryBacking::new().root(), FileKind::Directory);
        let before = inode.mode_changes();
        inode.note_mode(0o755, before);
        assert_eq!(inode.set_id(), SetId::None);
        inode.mode_changed();
        assert_eq!(inode.set_id(), SetId::Unknown);
        // Somebody who has looked at the file before comes to say so now.
        inode.note_mode(0o755, before);
        assert_eq!(inode.set_id(), SetId::Unknown);
        inode.note_mode(0o4755, inode.mode_changes());
        assert_eq!(inode.set_id(), SetId::Some);
    }
}
