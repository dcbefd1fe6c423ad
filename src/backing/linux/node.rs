//! An inode held by an O_PATH descriptor.

use std::any::Any;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    self, AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Timespec,
    Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::{Errno, retry_on_intr};

use super::dir::LinuxDir;
use super::file::LinuxFile;
use crate::backing::{
    Access, DirStream, File, FileKind, FileRef, Metadata, Node, NodeId, NodeRef, RenameMode,
    SetTime, Timestamp, XattrMode,
};

#[derive(Debug)]
pub(super) struct LinuxNode {
    fd: OwnedFd,
    id: NodeId,
    kind: FileKind,
    times: AccessTimes,
}

/// Whether reading a node moves its access time. Inherited by what is found below a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AccessTimes {
    /// As the file system is mounted.
    Move,
    Keep,
}

impl LinuxNode {
    pub(super) fn new(fd: OwnedFd, times: AccessTimes) -> io::Result<LinuxNode> {
        let metadata = metadata(&fd)?;
        Ok(LinuxNode { fd, id: metadata.id, kind: metadata.kind, times })
    }

    pub(super) fn of_open_file(fd: &OwnedFd, times: AccessTimes) -> io::Result<LinuxNode> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = retry_on_intr(|| fs::open(proc_path(fd), flags, Mode::empty()))?;
        LinuxNode::new(fd, times)
    }

    pub(super) fn times(&self) -> AccessTimes {
        self.times
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    fn open_here(&self, flags: OFlags) -> io::Result<OwnedFd> {
        let mode = Mode::RUSR | Mode::WUSR;
        let mut flags = flags | OFlags::CLOEXEC;
        if self.times == AccessTimes::Keep {
            flags |= OFlags::NOATIME;
        }
        // A mode is an error to openat(2) wherever nothing is created.
        let mode = if flags.contains(OFlags::TMPFILE) { mode } else { Mode::empty() };
        Ok(retry_on_intr(|| fs::openat(&self.fd, ".", flags, mode))?)
    }

    /// What was just made under a name. If there is no descriptor for it, say, it is taken back:
    /// the caller is told that there is nothing.
    fn made(&self, name: &[u8], how: AtFlags) -> io::Result<NodeRef> {
        self.lookup(name).inspect_err(|_| {
            let taken = component(name).and_then(|name| Ok(fs::unlinkat(&self.fd, &name, how)?));
            if let Err(error) = taken {
                log::warn!("cannot remove a half-made entry: {error}");
            }
        })
    }

    /// The magic link to this inode, for calls that take no O_PATH descriptor. It leads to the
    /// inode itself, also where that is a symbolic link.
    fn proc_path(&self) -> String {
        proc_path(&self.fd)
    }
}

fn proc_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// A name that is one component and not a way out.
pub(super) fn component(name: &[u8]) -> io::Result<CString> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        return Err(Errno::INVAL.into());
    }
    CString::new(name).map_err(|_| Errno::INVAL.into())
}

fn os_node(node: &dyn Node) -> io::Result<&LinuxNode> {
    node.as_any().downcast_ref().ok_or_else(|| Errno::XDEV.into())
}

pub(super) fn file_kind(kind: FileType) -> Option<FileKind> {
    Some(match kind {
        FileType::RegularFile => FileKind::Regular,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        FileType::Fifo => FileKind::Fifo,
        FileType::Socket => FileKind::Socket,
        FileType::CharacterDevice => FileKind::CharDevice,
        FileType::BlockDevice => FileKind::BlockDevice,
        FileType::Unknown => return None,
    })
}

pub(super) fn metadata(fd: impl AsFd) -> io::Result<Metadata> {
    let stat = retry_on_intr(|| fs::fstat(&fd))?;
    let time = |sec: i64, nsec: u64| Timestamp { sec, nsec: nsec as u32 };
    Ok(Metadata {
        id: NodeId { dev: stat.st_dev, ino: stat.st_ino },
        kind: file_kind(FileType::from_raw_mode(stat.st_mode))
            .ok_or_else(|| io::Error::from(Errno::INVAL))?,
        mode: stat.st_mode & 0o7777,
        nlink: stat.st_nlink,
        uid: stat.st_uid,
        gid: stat.st_gid,
        rdev: stat.st_rdev,
        size: stat.st_size as u64,
        blocks: stat.st_blocks as u64,
        atime: time(stat.st_atime, stat.st_atime_nsec),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
    })
}

impl Node for LinuxNode {
    fn id(&self) -> NodeId {
        self.id
    }

    fn metadata(&self) -> io::Result<Metadata> {
        metadata(&self.fd)
    }

    fn open(&self, access: Access) -> io::Result<FileRef> {
        // Opening a FIFO blocks, opening a device has effects.
        match self.kind {
            FileKind::Regular => {}
            FileKind::Directory => return Err(Errno::ISDIR.into()),
            _ => return Err(Errno::INVAL.into()),
        }
        let flags = match access {
            Access::Read | Access::Peek => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        let flags = flags | OFlags::CLOEXEC;
        let open = |flags| retry_on_intr(|| fs::open(self.proc_path(), flags, Mode::empty()));
        let fd = if self.times == AccessTimes::Keep || access == Access::Peek {
            // Only the owner and root may ask for it.
            match open(flags | OFlags::NOATIME) {
                Err(Errno::PERM) => open(flags)?,
                opened => opened?,
            }
        } else {
            open(flags)?
        };
        Ok(Arc::new(LinuxFile::new(fd, self.times)))
    }

    fn lookup(&self, name: &[u8]) -> io::Result<NodeRef> {
        let name = component(name)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        // EAGAIN: a rename elsewhere raced with the walk.
        loop {
            match fs::openat2(&self.fd, &name, flags, Mode::empty(), resolve) {
                Ok(fd) => return Ok(Arc::new(LinuxNode::new(fd, self.times)?)),
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn read_dir(&self) -> io::Result<Box<dyn DirStream>> {
        let fd = self.open_here(OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(Box::new(LinuxDir::new(fd)))
    }

    fn create_unnamed(&self) -> io::Result<FileRef> {
        let fd = self.open_here(OFlags::TMPFILE | OFlags::RDWR)?;
        Ok(Arc::new(LinuxFile::new(fd, self.times)))
    }

    fn link_file(&self, file: &dyn File, name: &[u8]) -> io::Result<()> {
        let name = component(name)?;
        let file: &LinuxFile =
            file.as_any().downcast_ref().ok_or_else(|| io::Error::from(Errno::XDEV))?;
        let from = proc_path(file.fd());
        Ok(retry_on_intr(|| fs::linkat(CWD, &from, &self.fd, &name, AtFlags::SYMLINK_FOLLOW))?)
    }

    fn link_node(&self, target: &dyn Node, name: &[u8]) -> io::Result<()> {
        let name = component(name)?;
        let from = os_node(target)?.proc_path();
        Ok(retry_on_intr(|| fs::linkat(CWD, &from, &self.fd, &name, AtFlags::SYMLINK_FOLLOW))?)
    }

    fn mkdir(&self, name: &[u8], mode: u32) -> io::Result<NodeRef> {
        let cname = component(name)?;
        retry_on_intr(|| fs::mkdirat(&self.fd, &cname, Mode::from_raw_mode(mode)))?;
        self.made(name, AtFlags::REMOVEDIR)
    }

    fn mknod(&self, name: &[u8], kind: FileKind, mode: u32, rdev: u64) -> io::Result<NodeRef> {
        let cname = component(name)?;
        let kind = match kind {
            FileKind::Regular => FileType::RegularFile,
            FileKind::Fifo => FileType::Fifo,
            FileKind::Socket => FileType::Socket,
            FileKind::CharDevice => FileType::CharacterDevice,
            FileKind::BlockDevice => FileType::BlockDevice,
            FileKind::Directory | FileKind::Symlink => return Err(Errno::INVAL.into()),
        };
        retry_on_intr(|| fs::mknodat(&self.fd, &cname, kind, Mode::from_raw_mode(mode), rdev))?;
        self.made(name, AtFlags::empty())
    }

    fn symlink(&self, name: &[u8], target: &[u8]) -> io::Result<NodeRef> {
        let cname = component(name)?;
        let target = CString::new(target).map_err(|_| io::Error::from(Errno::INVAL))?;
        retry_on_intr(|| fs::symlinkat(&target, &self.fd, &cname))?;
        self.made(name, AtFlags::empty())
    }

    fn read_link(&self) -> io::Result<Vec<u8>> {
        Ok(retry_on_intr(|| fs::readlinkat(&self.fd, "", Vec::new()))?.into_bytes())
    }

    fn unlink(&self, name: &[u8]) -> io::Result<()> {
        let name = component(name)?;
        Ok(retry_on_intr(|| fs::unlinkat(&self.fd, &name, AtFlags::empty()))?)
    }

    fn rmdir(&self, name: &[u8]) -> io::Result<()> {
        let name = component(name)?;
        Ok(retry_on_intr(|| fs::unlinkat(&self.fd, &name, AtFlags::REMOVEDIR))?)
    }

    fn rename(
        &self,
        name: &[u8],
        to: &dyn Node,
        to_name: &[u8],
        mode: RenameMode,
    ) -> io::Result<()> {
        let (name, to_name) = (component(name)?, component(to_name)?);
        let to = os_node(to)?;
        let flags = match mode {
            RenameMode::Replace => RenameFlags::empty(),
            RenameMode::NoReplace => RenameFlags::NOREPLACE,
            RenameMode::Exchange => RenameFlags::EXCHANGE,
        };
        Ok(retry_on_intr(|| fs::renameat_with(&self.fd, &name, &to.fd, &to_name, flags))?)
    }

    fn sync(&self) -> io::Result<()> {
        let fd = self.open_here(OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(retry_on_intr(|| fs::fsync(&fd))?)
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        if self.kind == FileKind::Symlink {
            return Err(Errno::OPNOTSUPP.into());
        }
        let path = self.proc_path();
        let mode = Mode::from_raw_mode(mode);
        Ok(retry_on_intr(|| fs::chmodat(CWD, &path, mode, AtFlags::empty()))?)
    }

    fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        Ok(retry_on_intr(|| fs::chownat(&self.fd, "", uid, gid, AtFlags::EMPTY_PATH))?)
    }

    fn set_times(&self, atime: SetTime, mtime: SetTime) -> io::Result<()> {
        let times = Timestamps { last_access: timespec(atime), last_modification: timespec(mtime) };
        Ok(retry_on_intr(|| fs::utimensat(&self.fd, "", &times, AtFlags::EMPTY_PATH))?)
    }

    fn get_xattr(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        let (path, name) = (self.proc_path(), xattr_name(name)?);
        sized(|buf| fs::getxattr(&path, &name, buf))
    }

    fn set_xattr(&self, name: &[u8], value: &[u8], mode: XattrMode) -> io::Result<()> {
        let (path, name) = (self.proc_path(), xattr_name(name)?);
        let flags = match mode {
            XattrMode::CreateOrReplace => XattrFlags::empty(),
            XattrMode::Create => XattrFlags::CREATE,
            XattrMode::Replace => XattrFlags::REPLACE,
        };
        Ok(retry_on_intr(|| fs::setxattr(&path, &name, value, flags))?)
    }

    fn list_xattrs(&self) -> io::Result<Vec<Vec<u8>>> {
        let path = self.proc_path();
        let list = sized(|buf| fs::listxattr(&path, buf))?;
        Ok(list.split(|&byte| byte == 0).filter(|n| !n.is_empty()).map(<[u8]>::to_vec).collect())
    }

    fn remove_xattr(&self, name: &[u8]) -> io::Result<()> {
        let (path, name) = (self.proc_path(), xattr_name(name)?);
        Ok(retry_on_intr(|| fs::removexattr(&path, &name))?)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn xattr_name(name: &[u8]) -> io::Result<CString> {
    CString::new(name).map_err(|_| Errno::INVAL.into())
}

/// Calls with a buffer that is most often enough, then with the largest the kernel allows.
fn sized(mut call: impl FnMut(&mut [u8]) -> rustix::io::Result<usize>) -> io::Result<Vec<u8>> {
    const MAX: usize = 64 * 1024; // XATTR_SIZE_MAX, XATTR_LIST_MAX
    for len in [512, MAX] {
        let mut buf = vec![0; len];
        match retry_on_intr(|| call(&mut buf)) {
            Ok(count) => {
                buf.truncate(count);
                return Ok(buf);
            }
            Err(Errno::RANGE) if len < MAX => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::RANGE.into())
}

fn timespec(time: SetTime) -> Timespec {
    match time {
        SetTime::Keep => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        SetTime::Now => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        SetTime::At(at) => Timespec { tv_sec: at.sec, tv_nsec: at.nsec.into() },
    }
}
