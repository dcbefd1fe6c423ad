//! New files, directories, nodes and hard links.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::io::Errno;

use super::acl;
use super::filesystem::Filesystem;
use super::handle::{Handle, OpenFile};
use super::inode::Inode;
use super::types::{Caller, Created, Entry};
use crate::backing::{FileKind, FileRef, Node, NodeRef};
use crate::error::{FsError, FsResult};
use crate::store::File;

/// Set-group-id.
const SET_GID: u32 = 0o2000;

/// Who owns what is created, and with which mode.
pub(super) struct Ownership {
    uid: u32,
    gid: u32,
    pub(super) mode: u32,
}

impl Ownership {
    /// The owner first: changing it would drop the mode's set-id bits.
    pub(super) fn give(&self, node: &dyn Node) -> FsResult<()> {
        node.set_owner(Some(self.uid), Some(self.gid))?;
        node.set_mode(self.mode)?;
        Ok(())
    }

    /// Links have no mode of their own.
    pub(super) fn give_owner(&self, node: &dyn Node) -> FsResult<()> {
        Ok(node.set_owner(Some(self.uid), Some(self.gid))?)
    }
}

impl Filesystem {
    /// Creates and opens; EEXIST if the name is taken. The file is complete on the disk before
    /// it has its name.
    pub fn create(
        &self,
        caller: Caller,
        parent: u64,
        name: &[u8],
        mode: u32,
        umask: u32,
    ) -> FsResult<Created> {
        self.writable()?;
        let dir = self.directory(parent)?;
        let disk = self.seal_name(name)?;
        let (backing, node, file) = self.unnamed(caller, &dir, mode, umask)?;
        self.named(&dir, &disk, || Ok(dir.node.link_file(&*backing, &disk.entry)?))?;
        let inode = self.inodes.reference(node, FileKind::Regular);
        inode.set_place(dir.id, &disk.entry);
        self.created(inode, file)
    }

    /// A file without a name (`O_TMPFILE`); [`Filesystem::link`] can give it one.
    pub fn create_unnamed(
        &self,
        caller: Caller,
        parent: u64,
        mode: u32,
        umask: u32,
    ) -> FsResult<Created> {
        self.writable()?;
        let dir = self.directory(parent)?;
        let (_, node, file) = self.unnamed(caller, &dir, mode, umask)?;
        let inode = self.inodes.reference(node, FileKind::Regular);
        self.inodes.unnamed(inode.key);
        self.created(inode, file)
    }

    pub fn mkdir(
        &self,
        caller: Caller,
        parent: u64,
        name: &[u8],
        mode: u32,
        umask: u32,
    ) -> FsResult<Entry> {
        self.writable()?;
        let dir = self.directory(parent)?;
        let disk = self.seal_name(name)?;
        let mut owner = self.ownership(caller, &dir, mode, umask)?;
        // The bit is passed on by the disk, and must survive the chmod.
        owner.mode |= dir.node.metadata()?.mode & SET_GID;
        self.named(&dir, &disk, || {
            let node = dir.node.mkdir(&disk.entry, 0o700)?;
            let given = owner.give(&*node);
            if given.is_err() {
                discard(dir.node.rmdir(&disk.entry));
            }
            given.map(|()| node)
        })
        .and_then(|node| self.entry(&dir, &disk.entry, node))
    }

    /// A file, fifo, socket or device. `mode` holds the permissions only.
    #[allow(clippy::too_many_arguments)]
    pub fn mknod(
        &self,
        caller: Caller,
        parent: u64,
        name: &[u8],
        kind: FileKind,
        mode: u32,
        umask: u32,
        rdev: u64,
    ) -> FsResult<Entry> {
        match kind {
            FileKind::Regular => {
                let created = self.create(caller, parent, name, mode, umask)?;
                self.release(created.handle);
                return Ok(created.entry);
            }
            FileKind::Directory | FileKind::Symlink => return Err(FsError::Os(Errno::INVAL)),
            FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice => {}
        }
        self.writable()?;
        let dir = self.directory(parent)?;
        let disk = self.seal_name(name)?;
        let owner = self.ownership(caller, &dir, mode, umask)?;
        self.named(&dir, &disk, || {
            let node = dir.node.mknod(&disk.entry, kind, 0o600, rdev)?;
            let given = owner.give(&*node);
            if given.is_err() {
                discard(dir.node.unlink(&disk.entry));
            }
            given.map(|()| node)
        })
        .and_then(|node| self.entry(&dir, &disk.entry, node))
    }

    /// A hard link to `node`.
    pub fn link(&self, node: u64, parent: u64, name: &[u8]) -> FsResult<Entry> {
        self.writable()?;
        let inode = self.inodes.get(node)?;
        let dir = self.directory(parent)?;
        let disk = self.seal_name(name)?;
        let nameless = inode.node.metadata()?.nlink == 0;
        self.named(&dir, &disk, || Ok(dir.node.link_node(&*inode.node, &disk.entry)?))?;
        self.inodes.named(&inode);
        if nameless {
            self.store.named(inode.key);
        }
        self.touched(&inode);
        self.entry(&dir, &disk.entry, Arc::clone(&inode.node))
    }

    pub(super) fn ownership(
        &self,
        caller: Caller,
        dir: &Inode,
        mode: u32,
        umask: u32,
    ) -> FsResult<Ownership> {
        let parent = dir.node.metadata()?;
        // Some file systems answer a creation in a removed directory with another error.
        if parent.nlink == 0 {
            return Err(FsError::Os(Errno::NOENT));
        }
        let gid = if parent.mode & SET_GID != 0 { parent.gid } else { caller.gid };
        // The kernel leaves the umask to us: it does not apply below a default list.
        let mode = match dir.node.get_xattr(acl::DEFAULT) {
            Ok(list) => acl::inherited_mode(mode, &list).unwrap_or(mode & !umask),
            Err(_) => mode & !umask,
        };
        Ok(Ownership { uid: caller.uid, gid, mode: mode & 0o7777 })
    }

    /// A file with its owner, mode and header, but no name.
    fn unnamed(
        &self,
        caller: Caller,
        dir: &Inode,
        mode: u32,
        umask: u32,
    ) -> FsResult<(FileRef, NodeRef, Arc<File>)> {
        let owner = self.ownership(caller, dir, mode, umask)?;
        let backing = dir.node.create_unnamed()?;
        let node = backing.node()?;
        owner.give(&*node)?;
        let file = self.store.create_file(Arc::clone(&backing))?;
        Ok((backing, node, file))
    }

    fn created(&self, inode: Arc<Inode>, file: Arc<File>) -> FsResult<Created> {
        let entry = {
            let mut content = inode.content.lock();
            content.file = Some(Arc::clone(&file));
            content.opens += 1;
            drop(content);
            let open =
                OpenFile { inode: Arc::clone(&inode), file, emptied: AtomicBool::new(false) };
            (self.finish(&inode)?, open)
        };
        let (entry, open) = entry;
        Ok(Created { entry, handle: self.handles.insert(Handle::File(open)) })
    }
}

/// Undoes half of a creation; the error that made it necessary is the one to answer.
pub(super) fn discard(result: std::io::Result<()>) {
    if let Err(error) = result {
        log::warn!("cannot remove a half-made entry: {error}");
    }
}

/// Which node of the disk has this name now, if any.
pub(super) fn present(dir: &NodeRef, entry: &[u8]) -> FsResult<Option<NodeRef>> {
    match dir.lookup(entry) {
        Ok(node) => Ok(Some(node)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}
