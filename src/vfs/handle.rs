//! Open files and directories.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;
use rustix::io::Errno;

use super::dir::Cursor;
use super::inode::Inode;
use crate::error::{FsError, FsResult};
use crate::store::File;
use crate::sync::Mutex;

/// Handles of different files rarely share a lock.
const SHARDS: usize = 16;

#[derive(Debug)]
pub(super) enum Handle {
    File(OpenFile),
    Dir(OpenDir),
}

/// A reference to an open content; the last one to go closes it.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) inode: Arc<Inode>,
    pub(super) file: Arc<File>,
    /// Opened with O_TRUNC.
    pub(super) emptied: AtomicBool,
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        let mut content = self.inode.content.lock();
        content.opens = content.opens.saturating_sub(1);
        if content.opens == 0 {
            content.size = Some(self.file.size());
            content.file = None;
        }
    }
}

#[derive(Debug)]
pub(super) struct OpenDir {
    pub(super) inode: Arc<Inode>,
    pub(super) cursor: Mutex<Cursor>,
}

#[derive(Debug)]
pub(super) struct HandleTable {
    shards: [RwLock<HashMap<u64, Arc<Handle>>>; SHARDS],
    next: AtomicU64,
}

impl HandleTable {
    pub(super) fn new() -> HandleTable {
        HandleTable {
            shards: std::array::from_fn(|_| RwLock::new(HashMap::new())),
            next: AtomicU64::new(1),
        }
    }

    pub(super) fn insert(&self, handle: Handle) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.shard(id).write().insert(id, Arc::new(handle));
        id
    }

    /// EBADF for a handle that was released, or is no file's.
    pub(super) fn file(&self, id: u64) -> FsResult<FileHandle> {
        let handle = self.get(id)?;
        match &*handle {
            Handle::File(_) => Ok(FileHandle(handle)),
            Handle::Dir(_) => Err(FsError::Os(Errno::BADF)),
        }
    }

    /// EBADF for a handle that was released, or is no directory's.
    pub(super) fn dir(&self, id: u64) -> FsResult<DirHandle> {
        let handle = self.get(id)?;
        match &*handle {
            Handle::Dir(_) => Ok(DirHandle(handle)),
            Handle::File(_) => Err(FsError::Os(Errno::BADF)),
        }
    }

    pub(super) fn remove(&self, id: u64) {
        let removed = self.shard(id).write().remove(&id);
        drop(removed);
    }

    /// The ids of the inodes that are open as files.
    pub(super) fn open_files(&self) -> Vec<u64> {
        let mut nodes = Vec::new();
        for shard in &self.shards {
            for handle in shard.read().values() {
                if let Handle::File(open) = &**handle {
                    nodes.push(open.inode.id);
                }
            }
        }
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    fn get(&self, id: u64) -> FsResult<Arc<Handle>> {
        self.shard(id).read().get(&id).cloned().ok_or(FsError::Os(Errno::BADF))
    }

    fn shard(&self, id: u64) -> &RwLock<HashMap<u64, Arc<Handle>>> {
        &self.shards[id as usize % SHARDS]
    }
}

/// A [`Handle::File`].
pub(super) struct FileHandle(Arc<Handle>);

impl std::ops::Deref for FileHandle {
    type Target = OpenFile;

    fn deref(&self) -> &OpenFile {
        match &*self.0 {
            Handle::File(open) => open,
            Handle::Dir(_) => unreachable!("HandleTable::file gives out files only"),
        }
    }
}

/// A [`Handle::Dir`].
pub(super) struct DirHandle(Arc<Handle>);

impl std::ops::Deref for DirHandle {
    type Target = OpenDir;

    fn deref(&self) -> &OpenDir {
        match &*self.0 {
            Handle::Dir(open) => open,
            Handle::File(_) => unreachable!("HandleTable::dir gives out directories only"),
        }
    }
}
