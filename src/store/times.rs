//! Change times of files that a checkpoint brought home.
//!
//! Bringing a file home moves the change time of its backing file, of which its users know
//! nothing: they are shown the one from before, for as long as the backing file's is the one that
//! the checkpoint left. Kept in memory only: a new mount shows the backing file's.

use std::collections::HashMap;

use crate::backing::{NodeId, Timestamp};
use crate::sync::Mutex;

/// More are forgotten, all at once.
const MOST: usize = 65_536;

#[derive(Debug, Default)]
pub(super) struct SettledTimes(Mutex<HashMap<NodeId, (Timestamp, Timestamp)>>);

impl SettledTimes {
    pub(super) fn insert(&self, node: NodeId, home: Timestamp, shown: Timestamp) {
        let mut times = self.0.lock();
        if times.len() >= MOST {
            times.clear();
        }
        times.insert(node, (home, shown));
    }

    pub(super) fn get(&self, node: NodeId, home: Timestamp) -> Option<Timestamp> {
        let times = self.0.lock();
        times.get(&node).filter(|(settled, _)| *settled == home).map(|(_, shown)| *shown)
    }

    pub(super) fn forget(&self, node: NodeId) {
        self.0.lock().remove(&node);
    }
}
