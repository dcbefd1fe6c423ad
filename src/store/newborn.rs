//! Files that were made and are not on stable storage yet, neither their inode nor their name.
//!
//! A file that is closed and opened again is another [`super::File`], and must still know that its
//! first flush owes both. An inode stays listed until a flush that began after it was made has
//! ended well.

use std::collections::HashMap;

use crate::backing::NodeId;
use crate::sync::Mutex;

#[derive(Debug, Default)]
pub(super) struct Newborn(Mutex<Listed>);

#[derive(Debug, Default)]
struct Listed {
    /// With a number that rises: the disk may give an inode's identity to the next one.
    nodes: HashMap<NodeId, u64>,
    last: u64,
}

impl Newborn {
    /// Returns its number.
    pub(super) fn add(&self, node: NodeId) -> u64 {
        let mut listed = self.0.lock();
        listed.last += 1;
        let number = listed.last;
        listed.nodes.insert(node, number);
        number
    }

    pub(super) fn number(&self, node: NodeId) -> Option<u64> {
        self.0.lock().nodes.get(&node).copied()
    }

    pub(super) fn contains(&self, node: NodeId) -> bool {
        self.0.lock().nodes.contains_key(&node)
    }

    /// Its inode and name were flushed, unless it was added again since it had that number.
    pub(super) fn remove(&self, node: NodeId, number: u64) {
        let mut listed = self.0.lock();
        if listed.nodes.get(&node) == Some(&number) {
            listed.nodes.remove(&node);
        }
    }

    /// What a flush of everything that begins now will cover; None if there is nothing.
    pub(super) fn mark(&self) -> Option<u64> {
        let listed = self.0.lock();
        if listed.nodes.is_empty() { None } else { Some(listed.last) }
    }

    /// Everything up to `mark` is on stable storage.
    pub(super) fn flushed(&self, mark: u64) {
        self.0.lock().nodes.retain(|_, number| *number > mark);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_was_there_when_it_began() {
        let newborn = Newborn::default();
        let node = |ino| NodeId { dev: 1, ino };
        assert_eq!(newborn.mark(), None);
        newborn.add(node(1));
        newborn.add(node(2));
        let mark = newborn.mark().unwrap();
        // The inode is removed, and its number given to a new file, while the flush runs.
        newborn.add(node(2));
        newborn.flushed(mark);
        assert!(!newborn.contains(node(1)) && newborn.contains(node(2)));
        newborn.remove(node(2), mark);
        assert!(newborn.contains(node(2)));
        newborn.remove(node(2), newborn.number(node(2)).unwrap());
        assert_eq!(newborn.mark(), None);
    }
}
