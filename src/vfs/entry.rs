//! Lookups and what is owed for them.

use std::sync::Arc;

use rustix::io::Errno;

use super::filesystem::{Filesystem, kind_of};
use super::inode::Inode;
use super::types::{Entry, ROOT};
use crate::backing::NodeRef;
use crate::error::{FsError, FsResult};

impl Filesystem {
    /// ENOENT when there is no such name. `.` and `..` are answered for nodes that are known,
    /// which is what file handles (`open_by_handle_at`) need.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> FsResult<Entry> {
        self.gate.check()?;
        let dir = match name {
            b"." => return self.again(self.inodes.get(parent)?),
            b".." => {
                let known = self.inodes.get(parent)?;
                let above = known.place().map_or(ROOT, |place| place.parent);
                return self.again(self.inodes.get(above)?);
            }
            _ => self.directory(parent)?,
        };
        let disk = self.seal_name(name)?;
        let node = dir.node.lookup(&disk.entry)?;
        self.entry(&dir, &disk.entry, node)
    }

    /// Gives back `count` lookups of `node`. Never fails, also while cut off.
    pub fn forget(&self, node: u64, count: u64) {
        if let Some(inode) = self.inodes.forget(node, count) {
            self.store.forsaken(inode.key);
        }
    }

    /// Makes `node`, found as `entry` in `dir`, known to the caller.
    pub(super) fn entry(&self, dir: &Inode, entry: &[u8], node: NodeRef) -> FsResult<Entry> {
        // A file system mounted below the backing directory is not part of the volume, and its
        // inode numbers are not ours.
        if node.id().dev != dir.key.dev {
            return Err(FsError::Os(Errno::XDEV));
        }
        let kind = kind_of(&node)?;
        let inode = self.inodes.reference(node, kind);
        inode.set_place(dir.id, entry);
        self.finish(&inode)
    }

    /// One more lookup of an inode that is known.
    fn again(&self, inode: Arc<Inode>) -> FsResult<Entry> {
        let inode = self.inodes.reference(Arc::clone(&inode.node), inode.kind);
        self.finish(&inode)
    }

    /// The entry of an inode that has just been referenced; on failure the reference is undone.
    pub(super) fn finish(&self, inode: &Inode) -> FsResult<Entry> {
        let attr = self.attr(inode).and_then(|attr| Ok(self.gate.check().map(|()| attr)?));
        match attr {
            Ok(attr) => Ok(Entry { node: inode.id, attr }),
            Err(error) => {
                self.forget(inode.id, 1);
                Err(error)
            }
        }
    }
}
