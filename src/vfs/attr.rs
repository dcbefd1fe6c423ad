//! Attributes: stat, chmod, chown, truncate, utimens.

use rustix::io::Errno;

use super::filesystem::Filesystem;
use super::handle::OpenFile;
use super::inode::{Inode, SetId};
use super::symlink;
use super::types::{Attr, SetAttr};
use crate::backing::{FileKind, Metadata, SetTime};
use crate::error::{FsError, FsResult};

impl Filesystem {
    pub fn getattr(&self, node: u64) -> FsResult<Attr> {
        self.gate.check()?;
        let attr = self.attr(&*self.inodes.get(node)?)?;
        self.gate.check()?;
        Ok(attr)
    }

    /// Works on any node that is known, whether or not it has a name. The owner comes first,
    /// because changing it drops the set-id bits that the mode may then set.
    pub fn setattr(&self, node: u64, change: &SetAttr) -> FsResult<Attr> {
        self.writable()?;
        let inode = self.inodes.get(node)?;
        if let Some(size) = change.size {
            match inode.kind {
                FileKind::Regular => {}
                FileKind::Directory => return Err(FsError::Os(Errno::ISDIR)),
                _ => return Err(FsError::Os(Errno::INVAL)),
            }
            let open = self.open_content(&inode, true)?;
            self.truncate(&open, size, change.mtime == SetTime::Keep)?;
        }
        if change.uid.is_some() || change.gid.is_some() {
            inode.node.set_owner(change.uid, change.gid)?;
        }
        if change.drop_set_id {
            self.drop_set_id(&inode)?;
        }
        if let Some(mode) = change.mode {
            inode.node.set_mode(mode & 0o7777)?;
            inode.mode_changed();
        }
        if change.atime != SetTime::Keep || change.mtime != SetTime::Keep {
            self.store.set_times(&inode.node, change.atime, change.mtime)?;
        }
        self.touched(&inode);
        let attr = self.attr(&inode)?;
        self.gate.check()?;
        Ok(attr)
    }

    /// A truncation to the same size is a change of the file too.
    pub(super) fn truncate(&self, open: &OpenFile, size: u64, set_mtime: bool) -> FsResult<()> {
        let same = open.file.size() == size;
        self.audited(&open.inode, open.file.truncate(size))?;
        let node = &open.inode.node;
        match (set_mtime, same) {
            (true, true) => self.store.set_times(node, SetTime::Keep, SetTime::Now)?,
            // The file shows that of its truncation.
            (true, false) => node.set_times(SetTime::Keep, SetTime::Now)?,
            (false, _) => {}
        }
        self.touched(&open.inode);
        Ok(())
    }

    pub(super) fn attr(&self, inode: &Inode) -> FsResult<Attr> {
        let mode_changes = inode.mode_changes();
        let mut metadata = inode.node.metadata()?;
        if inode.kind == FileKind::Regular {
            self.store.amend(&mut metadata);
        }
        inode.note_mode(metadata.mode, mode_changes);
        let size = match inode.kind {
            FileKind::Regular => self.content_size(inode)?,
            FileKind::Symlink => symlink::plain_size(inode, metadata.size)?,
            FileKind::Directory => metadata.size,
            FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice => 0,
        };
        Ok(attr_of(&metadata, size))
    }

    /// A file whose header is damaged has the size 0, so that it can be looked at and removed;
    /// opening it fails.
    fn content_size(&self, inode: &Inode) -> FsResult<u64> {
        let mut content = inode.content.lock();
        if let Some(file) = &content.file {
            return Ok(file.size());
        }
        if let Some(size) = content.size {
            return Ok(size);
        }
        let read = self.store.plain_size(&inode.node);
        if read.is_ok() {
            content.size = read.as_ref().ok().copied();
        }
        drop(content);
        match self.audited(inode, read) {
            Err(FsError::Integrity(_)) => Ok(0),
            other => other,
        }
    }

    /// What a write by someone who is not privileged does to the mode.
    pub(super) fn drop_set_id(&self, inode: &Inode) -> FsResult<()> {
        if inode.set_id() == SetId::None {
            return Ok(());
        }
        let changes = inode.mode_changes();
        let mode = inode.node.metadata()?.mode;
        let kept = without_set_id(mode);
        if kept != mode {
            inode.node.set_mode(kept)?;
            inode.mode_changed();
            self.touched(inode);
        }
        inode.note_mode(kept, changes);
        Ok(())
    }
}

/// The set-group-id bit without group execution is no set-group-id bit, and stays.
fn without_set_id(mode: u32) -> u32 {
    let group = if mode & 0o010 == 0 { 0 } else { 0o2000 };
    mode & !(0o4000 | group)
}

fn attr_of(metadata: &Metadata, size: u64) -> Attr {
    Attr {
        ino: metadata.id.ino,
        kind: metadata.kind,
        mode: metadata.mode,
        nlink: metadata.nlink,
        uid: metadata.uid,
        gid: metadata.gid,
        rdev: metadata.rdev,
        size,
        blocks: metadata.blocks,
        atime: metadata.atime,
        mtime: metadata.mtime,
        ctime: metadata.ctime,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_id_bits_go_unless_the_group_bit_means_nothing() {
        assert_eq!(without_set_id(0o4755), 0o755);
        assert_eq!(without_set_id(0o6775), 0o775);
        assert_eq!(without_set_id(0o2644), 0o2644);
        assert_eq!(without_set_id(0o1644), 0o1644);
    }
}
