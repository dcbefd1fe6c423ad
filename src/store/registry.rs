//! The open files of a volume: one [`File`] per inode.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use super::file::File;
use crate::backing::NodeId;
use crate::error::FsResult;
use crate::sync::Mutex;

const SHARDS: usize = 64;

#[derive(Debug)]
pub(super) struct Registry([Mutex<HashMap<NodeId, Weak<File>>>; SHARDS]);

impl Default for Registry {
    fn default() -> Registry {
        Registry(std::array::from_fn(|_| Mutex::default()))
    }
}

impl Registry {
    fn shard(&self, node: NodeId) -> &Mutex<HashMap<NodeId, Weak<File>>> {
        &self.0[node.ino as usize % SHARDS]
    }

    pub(super) fn get(&self, node: NodeId) -> Option<Arc<File>> {
        self.shard(node).lock().get(&node).and_then(Weak::upgrade)
    }

    /// `open` runs under a lock, so that nobody else opens the same file meanwhile.
    pub(super) fn get_or_insert(
        &self,
        node: NodeId,
        open: impl FnOnce() -> FsResult<File>,
    ) -> FsResult<Arc<File>> {
        let mut files = self.shard(node).lock();
        if let Some(file) = files.get(&node).and_then(Weak::upgrade) {
            return Ok(file);
        }
        let mut opened = open()?;
        let file = Arc::new_cyclic(|me| {
            opened.set_me(me.clone());
            opened
        });
        files.insert(node, Arc::downgrade(&file));
        Ok(file)
    }

    /// Called by a file that is being dropped; the inode may have been opened again since.
    pub(super) fn forget(&self, node: NodeId) {
        let mut files = self.shard(node).lock();
        if files.get(&node).is_some_and(|file| file.strong_count() == 0) {
            files.remove(&node);
        }
    }
}
