//! Changes of names that may not be on stable storage yet.
//!
//! The file systems below have a journal: what they flush of a file takes along every change of a
//! name before it, whoever made it. Programs rely on that without knowing; a server renames its index
//! of logs and goes on with an `fsync` of the log alone. byokfs flushes data without that journal, so
//! it keeps the order itself: before anything counts as durable, every change of a name that was
//! acknowledged before is.
//!
//! Not kept in order: owners, modes, times and extended attributes. `fsync` of their file flushes
//! those.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backing::{NodeId, NodeRef};
use crate::error::FsResult;
use crate::sync::Mutex;

/// So many directories are flushed by one flush of the whole file system.
const FEW: usize = 8;

/// Empty at the mount: recovery has flushed what an earlier daemon left in the kernel's hands.
#[derive(Debug, Default)]
pub(super) struct Unsettled {
    changed: Mutex<Directories>,
    /// Changes so far, and how many of them are durable.
    changes: AtomicU64,
    settled: AtomicU64,
    /// One flush at a time: who comes meanwhile finds its change durable after it, or is the next.
    running: Mutex<()>,
}

/// What a flush owes.
#[derive(Debug)]
pub(super) enum Directories {
    These(HashMap<NodeId, NodeRef>),
    /// Too many to say which.
    Any,
}

impl Default for Directories {
    fn default() -> Directories {
        Directories::These(HashMap::new())
    }
}

impl Directories {
    fn add(&mut self, id: NodeId, node: &NodeRef) {
        if let Directories::These(known) = self {
            known.insert(id, node.clone());
            if known.len() > FEW {
                *self = Directories::Any;
            }
        }
    }

    fn put_back(&mut self, owed: Directories) {
        match owed {
            Directories::These(owed) => owed.iter().for_each(|(id, node)| self.add(*id, node)),
            Directories::Any => *self = Directories::Any,
        }
    }
}

impl Unsettled {
    /// After a name in `dir` was given, taken or moved, and before anybody is told.
    pub(super) fn add(&self, id: NodeId, dir: &NodeRef) {
        let mut changed = self.changed.lock();
        changed.add(id, dir);
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Has `flush` make durable what was changed before. After a failure it is still owed.
    pub(super) fn settle(&self, flush: impl FnOnce(&Directories) -> FsResult<()>) -> FsResult<()> {
        let asked = self.changes.load(Ordering::Acquire);
        let is_settled = || self.settled.load(Ordering::Acquire) >= asked;
        if is_settled() {
            return Ok(());
        }
        let _one = self.running.lock();
        if is_settled() {
            return Ok(());
        }
        let (owed, covered) = {
            let mut changed = self.changed.lock();
            let owed = std::mem::take(&mut *changed);
            (owed, self.changes.load(Ordering::Acquire))
        };
        if let Err(error) = flush(&owed) {
            self.changed.lock().put_back(owed);
            return Err(error);
        }
        self.settled.fetch_max(covered, Ordering::AcqRel);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Backing;
    use crate::backing::memory::MemoryBacking;

    fn settled(unsettled: &Unsettled) -> Option<Option<usize>> {
        let mut found = None;
        let look = |owed: &Directories| {
            found = Some(match owed {
                Directories::These(known) => Some(known.len()),
                Directories::Any => None,
            });
            Ok(())
        };
        unsettled.settle(look).unwrap();
        found
    }

    #[test]
    fn each_change_is_flushed_once_and_again_after_a_failure() {
        let root = MemoryBacking::new().root();
        let id = |ino| NodeId { dev: 1, ino };
        let unsettled = Unsettled::default();
        assert_eq!(settled(&unsettled), None);
        unsettled.add(id(1), &root);
        unsettled.add(id(1), &root);
        unsettled.add(id(2), &root);
        unsettled.settle(|_| Err(rustix::io::Errno::IO.into())).unwrap_err();
        assert_eq!(settled(&unsettled), Some(Some(2)));
        assert_eq!(settled(&unsettled), None);
        (0..=FEW as u64).for_each(|ino| unsettled.add(id(ino), &root));
        assert_eq!(settled(&unsettled), Some(None));
        // One that comes while a flush runs is not of those that it covers.
        unsettled.add(id(1), &root);
        let meanwhile = |_: &Directories| {
            unsettled.add(id(2), &root);
            Ok(())
        };
        unsettled.settle(meanwhile).unwrap();
        assert_eq!(settled(&unsettled), Some(Some(1)));
        assert_eq!(settled(&unsettled), None);
    }
}
