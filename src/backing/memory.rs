//! A backing directory in memory that records every call, and the disks that a power cut would
//! leave of it.
//!
//! [`MemoryBacking::trace`] is the recording, [`Trace::crashes`] enumerates the states, and
//! [`Trace::materialise`] makes each of them a backing again, on which the real code runs and is
//! recorded in turn: so a crash inside recovery is one more step of the same kind. For tests;
//! nothing of the daemon uses it. Permissions are kept and not enforced.

mod crash;
mod image;
mod random;
#[cfg(test)]
mod tests;
mod trace;

use std::any::Any;
use std::collections::HashSet;
use std::fmt::Debug;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

pub use crash::{Crash, Options, Order};
use image::{Image, Inode, PAGE_LEN, ROOT};
pub use random::Random;
pub use trace::Trace;
use trace::{Change, Op, Part};

use super::{
    Access, Backing, DirEntry, DirStream, File, FileKind, FileRef, Metadata, Node, NodeId, NodeRef,
    RenameMode, SetTime, StatFs, Timestamp, XattrMode,
};
use crate::sync::Mutex;

const DEVICE: u64 = 0xb70;

/// A disk in memory.
#[derive(Debug)]
pub struct MemoryBacking(Arc<Disk>);

#[derive(Debug)]
struct Disk {
    state: Mutex<State>,
    locked: Arc<AtomicBool>,
}

#[derive(Debug)]
struct State {
    initial: Image,
    image: Image,
    ops: Vec<Op>,
    next_ino: u64,
    clock: i64,
    /// Unnamed files that may still be named.
    nameless: HashSet<u64>,
}

impl State {
    fn inode(&self, ino: u64) -> io::Result<&Inode> {
        self.image.inode(ino).ok_or_else(|| Errno::STALE.into())
    }

    fn dir(&self, ino: u64) -> io::Result<&Inode> {
        let inode = self.inode(ino)?;
        if inode.kind == FileKind::Directory { Ok(inode) } else { Err(Errno::NOTDIR.into()) }
    }

    fn named(&self, dir: u64, name: &[u8]) -> io::Result<u64> {
        check_name(name)?;
        self.dir(dir)?.names.get(name).copied().ok_or_else(|| Errno::NOENT.into())
    }

    fn is_dir(&self, ino: u64) -> bool {
        self.inode(ino).is_ok_and(|inode| inode.kind == FileKind::Directory)
    }

    fn check_free(&self, dir: u64, name: &[u8]) -> io::Result<()> {
        match self.named(dir, name) {
            Ok(_) => Err(Errno::EXIST.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if dir != ROOT && self.image.nlink(dir) < 2 {
                    return Err(Errno::NOENT.into()); // a removed directory
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn run(&mut self, op: Op) {
        self.image.apply(&op, &Part::ALL);
        self.ops.push(op);
    }

    fn now(&mut self) -> Timestamp {
        self.clock += 1;
        Timestamp { sec: self.clock, nsec: 0 }
    }

    fn create(&mut self, mut inode: Inode) -> u64 {
        let ino = self.next_ino;
        self.next_ino += 1;
        let now = self.now();
        (inode.atime, inode.mtime) = (now, now);
        self.run(Op::Create { ino, inode: Arc::new(inode) });
        ino
    }

    fn create_named(&mut self, dir: u64, name: &[u8], inode: Inode) -> io::Result<u64> {
        self.check_free(dir, name)?;
        let ino = self.create(inode);
        self.run(Op::Link { dir, name: name.to_vec(), ino });
        Ok(ino)
    }

    /// Whether `below` is `dir` or lies below it.
    fn is_below(&self, below: u64, dir: u64) -> bool {
        below == dir
            || self.image.inode(dir).is_some_and(|inode| {
                inode.names.values().any(|&ino| self.is_dir(ino) && self.is_below(below, ino))
            })
    }
}

fn check_name(name: &[u8]) -> io::Result<()> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        return Err(Errno::INVAL.into());
    }
    if name.len() > 255 { Err(Errno::NAMETOOLONG.into()) } else { Ok(()) }
}

impl MemoryBacking {
    /// An empty directory.
    pub fn new() -> Arc<MemoryBacking> {
        MemoryBacking::from_image(Image::empty())
    }

    fn from_image(image: Image) -> Arc<MemoryBacking> {
        let next_ino = image.last_ino() + 1;
        let state = State {
            initial: image.clone(),
            image,
            ops: Vec::new(),
            next_ino,
            clock: 0,
            nameless: HashSet::new(),
        };
        let disk = Disk { state: Mutex::new(state), locked: Arc::default() };
        Arc::new(MemoryBacking(Arc::new(disk)))
    }

    /// How many operations were done so far: a place to cut at.
    pub fn position(&self) -> usize {
        self.0.state.lock().ops.len()
    }

    /// What was recorded so far.
    pub fn trace(&self) -> Trace {
        let state = self.0.state.lock();
        Trace::new(state.initial.clone(), state.ops.clone())
    }

    /// Takes everything done so far as durable and starts the recording anew.
    pub fn settle(&self) {
        let mut state = self.0.state.lock();
        state.initial = state.image.clone();
        state.ops.clear();
    }

    fn node(&self, ino: u64) -> MemoryNode {
        MemoryNode { disk: self.0.clone(), ino }
    }
}

impl Backing for MemoryBacking {
    fn root(&self) -> NodeRef {
        Arc::new(self.node(ROOT))
    }

    fn statfs(&self) -> io::Result<StatFs> {
        let blocks = 1 << 28;
        Ok(StatFs {
            block_size: PAGE_LEN as u64,
            blocks,
            blocks_free: blocks,
            blocks_available: blocks,
            files: blocks,
            files_free: blocks,
            name_max: 255,
        })
    }

    fn sync_fs(&self) -> io::Result<()> {
        self.0.state.lock().run(Op::SyncFs);
        Ok(())
    }

    fn lock(&self, name: &[u8]) -> io::Result<Box<dyn Debug + Send + Sync>> {
        if self.0.locked.swap(true, Ordering::SeqCst) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let guard = Guard(self.0.locked.clone());
        let mut state = self.0.state.lock();
        if state.named(ROOT, name).is_err() {
            state.create_named(ROOT, name, Inode::new(FileKind::Regular, 0o600, 0))?;
        }
        Ok(Box::new(guard))
    }

    fn elsewhere(&self, path: &Path) -> crate::Result<Arc<dyn Backing>> {
        let message = format!("{} is not in memory", path.display());
        Err(crate::Error::new(crate::Kind::Unsupported, message))
    }

    fn lock_existing(&self, name: &[u8]) -> io::Result<Box<dyn Debug + Send + Sync>> {
        self.0.state.lock().named(ROOT, name)?;
        self.lock(name)
    }

    fn display_path(&self) -> String {
        "memory".into()
    }
}

#[derive(Debug)]
struct Guard(Arc<AtomicBool>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// Both a node and an open file: what can be done with either depends on the caller.
#[derive(Clone, Debug)]
struct MemoryNode {
    disk: Arc<Disk>,
    ino: u64,
}

/// Of the same disk, else EXDEV.
fn same_disk<'a>(any: &'a dyn Any, disk: &Arc<Disk>) -> io::Result<&'a MemoryNode> {
    let node = any
        .downcast_ref::<MemoryNode>()
        .or_else(|| any.downcast_ref::<MemoryFile>().map(|file| &file.node));
    node.filter(|node| Arc::ptr_eq(&node.disk, disk)).ok_or_else(|| Errno::XDEV.into())
}

impl MemoryNode {
    fn at(&self, ino: u64) -> NodeRef {
        Arc::new(MemoryNode { disk: self.disk.clone(), ino })
    }

    fn create(&self, name: &[u8], inode: Inode) -> io::Result<NodeRef> {
        let ino = self.disk.state.lock().create_named(self.ino, name, inode)?;
        Ok(self.at(ino))
    }

    fn link(&self, ino: u64, name: &[u8]) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        state.check_free(self.ino, name)?;
        if state.is_dir(ino) {
            return Err(Errno::PERM.into());
        }
        state.nameless.remove(&ino);
        state.run(Op::Link { dir: self.ino, name: name.to_vec(), ino });
        Ok(())
    }

    fn change(&self, change: Change) {
        self.disk.state.lock().run(Op::Attribute { ino: self.ino, change });
    }

    fn remove(&self, name: &[u8], want_dir: bool) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        let ino = state.named(self.ino, name)?;
        match (want_dir, state.is_dir(ino)) {
            (true, false) => return Err(Errno::NOTDIR.into()),
            (false, true) => return Err(Errno::ISDIR.into()),
            (true, true) if !state.inode(ino)?.names.is_empty() => {
                return Err(Errno::NOTEMPTY.into());
            }
            _ => {}
        }
        state.run(Op::Unlink { dir: self.ino, name: name.to_vec(), ino });
        Ok(())
    }
}

impl Node for MemoryNode {
    fn id(&self) -> NodeId {
        NodeId { dev: DEVICE, ino: self.ino }
    }

    fn metadata(&self) -> io::Result<Metadata> {
        let state = self.disk.state.lock();
        let inode = state.inode(self.ino)?;
        Ok(Metadata {
            id: self.id(),
            kind: inode.kind,
            mode: inode.mode,
            nlink: state.image.nlink(self.ino),
            uid: inode.uid,
            gid: inode.gid,
            rdev: inode.rdev,
            size: inode.size,
            blocks: inode.allocated_pages() * (PAGE_LEN as u64 / 512),
            atime: inode.atime,
            mtime: inode.mtime,
            ctime: inode.mtime,
        })
    }

    fn open(&self, access: Access) -> io::Result<FileRef> {
        match self.disk.state.lock().inode(self.ino)?.kind {
            FileKind::Regular => {}
            FileKind::Directory => return Err(Errno::ISDIR.into()),
            _ => return Err(Errno::INVAL.into()),
        }
        Ok(Arc::new(MemoryFile { node: self.clone(), access }))
    }

    fn lookup(&self, name: &[u8]) -> io::Result<NodeRef> {
        let ino = self.disk.state.lock().named(self.ino, name)?;
        Ok(self.at(ino))
    }

    fn read_dir(&self) -> io::Result<Box<dyn DirStream>> {
        let state = self.disk.state.lock();
        let names = state.dir(self.ino)?.names.iter();
        let entry = |(at, (name, &ino)): (usize, (&Vec<u8>, &u64))| DirEntry {
            name: name.clone(),
            ino,
            kind: state.image.inode(ino).map(|inode| inode.kind),
            next: at as u64 + 1,
        };
        Ok(Box::new(MemoryDir { entries: names.enumerate().map(entry).collect(), at: 0 }))
    }

    fn create_unnamed(&self) -> io::Result<FileRef> {
        let mut state = self.disk.state.lock();
        state.dir(self.ino)?;
        let ino = state.create(Inode::new(FileKind::Regular, 0o600, 0));
        state.nameless.insert(ino);
        let node = MemoryNode { disk: self.disk.clone(), ino };
        Ok(Arc::new(MemoryFile { node, access: Access::ReadWrite }))
    }

    fn link_file(&self, file: &dyn File, name: &[u8]) -> io::Result<()> {
        self.link(same_disk(file.as_any(), &self.disk)?.ino, name)
    }

    fn link_node(&self, target: &dyn Node, name: &[u8]) -> io::Result<()> {
        let ino = same_disk(target.as_any(), &self.disk)?.ino;
        {
            let state = self.disk.state.lock();
            if state.image.nlink(ino) == 0 && !state.nameless.contains(&ino) {
                return Err(Errno::NOENT.into());
            }
        }
        self.link(ino, name)
    }

    fn mkdir(&self, name: &[u8], mode: u32) -> io::Result<NodeRef> {
        self.create(name, Inode::new(FileKind::Directory, mode, 0))
    }

    fn mknod(&self, name: &[u8], kind: FileKind, mode: u32, rdev: u64) -> io::Result<NodeRef> {
        if matches!(kind, FileKind::Directory | FileKind::Symlink) {
            return Err(Errno::INVAL.into());
        }
        self.create(name, Inode::new(kind, mode, rdev))
    }

    fn symlink(&self, name: &[u8], target: &[u8]) -> io::Result<NodeRef> {
        let mut inode = Inode::new(FileKind::Symlink, 0o777, 0);
        inode.target = target.to_vec();
        inode.size = target.len() as u64;
        self.create(name, inode)
    }

    fn read_link(&self) -> io::Result<Vec<u8>> {
        let state = self.disk.state.lock();
        let inode = state.inode(self.ino)?;
        if inode.kind != FileKind::Symlink {
            return Err(Errno::INVAL.into());
        }
        Ok(inode.target.clone())
    }

    fn unlink(&self, name: &[u8]) -> io::Result<()> {
        self.remove(name, false)
    }

    fn rmdir(&self, name: &[u8]) -> io::Result<()> {
        self.remove(name, true)
    }

    fn rename(
        &self,
        name: &[u8],
        to: &dyn Node,
        to_name: &[u8],
        mode: RenameMode,
    ) -> io::Result<()> {
        let to = same_disk(to.as_any(), &self.disk)?.ino;
        let mut state = self.disk.state.lock();
        let ino = state.named(self.ino, name)?;
        let over = match state.named(to, to_name) {
            Ok(over) => Some(over),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        match (mode, over) {
            (RenameMode::NoReplace, Some(_)) => return Err(Errno::EXIST.into()),
            (RenameMode::Exchange, None) => return Err(Errno::NOENT.into()),
            _ if state.is_dir(ino) && state.is_below(to, ino) => return Err(Errno::INVAL.into()),
            (mode, Some(over)) if state.is_dir(over) && state.is_below(self.ino, over) => {
                let exchange = mode == RenameMode::Exchange;
                return Err(if exchange { Errno::INVAL } else { Errno::NOTEMPTY }.into());
            }
            (_, Some(over)) if over == ino => return Ok(()),
            (RenameMode::Replace, Some(over)) => match (state.is_dir(ino), state.is_dir(over)) {
                (true, false) => return Err(Errno::NOTDIR.into()),
                (false, true) => return Err(Errno::ISDIR.into()),
                (true, true) if !state.inode(over)?.names.is_empty() => {
                    return Err(Errno::NOTEMPTY.into());
                }
                _ => {}
            },
            _ => {}
        }
        let exchanged = over.filter(|_| mode == RenameMode::Exchange);
        let (dir, name, to_name) = (self.ino, name.to_vec(), to_name.to_vec());
        state.run(Op::Rename { dir, name, to, to_name, ino, exchanged });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        state.dir(self.ino)?;
        state.run(Op::SyncDir { dir: self.ino });
        Ok(())
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        self.change(Change::Mode(mode));
        Ok(())
    }

    fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        self.change(Change::Owner(uid, gid));
        Ok(())
    }

    fn set_times(&self, atime: SetTime, mtime: SetTime) -> io::Result<()> {
        let now = self.disk.state.lock().now();
        self.change(Change::Times(atime, mtime, now));
        Ok(())
    }

    fn get_xattr(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        let state = self.disk.state.lock();
        state.inode(self.ino)?.xattrs.get(name).cloned().ok_or_else(|| Errno::NODATA.into())
    }

    fn set_xattr(&self, name: &[u8], value: &[u8], mode: XattrMode) -> io::Result<()> {
        match (mode, self.get_xattr(name).is_ok()) {
            (XattrMode::Create, true) => Err(Errno::EXIST.into()),
            (XattrMode::Replace, false) => Err(Errno::NODATA.into()),
            _ => {
                self.change(Change::SetXattr(name.to_vec(), value.to_vec()));
                Ok(())
            }
        }
    }

    fn list_xattrs(&self) -> io::Result<Vec<Vec<u8>>> {
        Ok(self.disk.state.lock().inode(self.ino)?.xattrs.keys().cloned().collect())
    }

    fn remove_xattr(&self, name: &[u8]) -> io::Result<()> {
        self.get_xattr(name)?;
        self.change(Change::RemoveXattr(name.to_vec()));
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[derive(Debug)]
struct MemoryDir {
    entries: Vec<DirEntry>,
    at: usize,
}

impl DirStream for MemoryDir {
    fn next_entry(&mut self) -> io::Result<Option<DirEntry>> {
        let entry = self.entries.get(self.at).cloned();
        self.at += usize::from(entry.is_some());
        Ok(entry)
    }

    fn seek(&mut self, position: u64) -> io::Result<()> {
        self.at = position as usize;
        Ok(())
    }
}

#[derive(Debug)]
struct MemoryFile {
    node: MemoryNode,
    access: Access,
}

impl MemoryFile {
    fn with<T>(&self, read: impl FnOnce(&Inode) -> T) -> io::Result<T> {
        self.node.disk.state.lock().inode(self.node.ino).map(read)
    }

    fn run(&self, op: Op) -> io::Result<()> {
        self.node.disk.state.lock().run(op);
        Ok(())
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.access == Access::ReadWrite { Ok(()) } else { Err(Errno::BADF.into()) }
    }
}

/// Past this, `off_t` ends.
fn end_of(offset: u64, len: u64) -> io::Result<u64> {
    let end = offset.checked_add(len).filter(|&end| i64::try_from(end).is_ok());
    end.ok_or_else(|| Errno::FBIG.into())
}

impl File for MemoryFile {
    fn metadata(&self) -> io::Result<Metadata> {
        self.node.metadata()
    }

    fn node(&self) -> io::Result<NodeRef> {
        Ok(Arc::new(self.node.clone()))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(|inode| inode.read(buf, offset))
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.check_writable()?;
        let end = end_of(offset, data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        let mut state = self.node.disk.state.lock();
        let grows = end > state.inode(self.node.ino)?.size;
        state.run(Op::Write { ino: self.node.ino, offset, data: data.into(), grows });
        Ok(())
    }

    fn write_parts_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.write_at(&parts.concat(), offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check_writable()?;
        end_of(len, 0)?;
        self.run(Op::SetLen { ino: self.node.ino, len })
    }

    fn allocate(&self, offset: u64, len: u64, keep_size: bool) -> io::Result<()> {
        self.check_writable()?;
        end_of(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        self.run(Op::Allocate { ino: self.node.ino, offset, len, keep_size })
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        if len == 0 {
            return Ok(());
        }
        self.run(Op::PunchHole { ino: self.node.ino, offset, len })
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let page = PAGE_LEN as u64;
        self.with(|inode| {
            let at = inode.next_page(offset / page)? * page;
            Some(at.max(offset)).filter(|&at| at < inode.size)
        })
    }

    fn seek_hole(&self, offset: u64) -> io::Result<Option<u64>> {
        let page = PAGE_LEN as u64;
        self.with(|inode| {
            if offset >= inode.size {
                return None;
            }
            let mut index = offset / page;
            while inode.has_page(index) {
                index += 1;
            }
            Some((index * page).max(offset).min(inode.size))
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.run(Op::SyncData { ino: self.node.ino })
    }

    fn sync_all(&self) -> io::Result<()> {
        self.run(Op::SyncAll { ino: self.node.ino })
    }

    fn write_out(&self, offset: u64, len: u64) -> io::Result<()> {
        self.run(Op::WriteOut { ino: self.node.ino, offset, len })
    }

    /// Nothing is certain after it that was not before.
    fn start_write_out(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
