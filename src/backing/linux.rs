//! The Linux file system calls behind [`super::Backing`].
//!
//! Nodes are O_PATH descriptors: they pin an inode without opening it, and every call on an
//! inode goes through its descriptor, so that no path is ever walked twice. Names are resolved by
//! `openat2(2)` below the directory they are asked of, and never through a symbolic link.
//! Needs /proc, by which an O_PATH descriptor is reopened, and reached by calls that take a path.
//!
//! Calls that a signal interrupts are made again; short reads and writes are carried on.

mod dir;
mod file;
mod node;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use rustix::fs::{self, FlockOperation, Mode, OFlags};
use rustix::io::retry_on_intr;

use self::node::{AccessTimes, LinuxNode};
use super::{Backing, NodeRef, StatFs};
use crate::error::{Context, Error, Kind, Result};

/// File systems whose locks are leases, or whose far side may change beneath us.
const REFUSED: [(u32, &str); 10] = [
    (0x6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x517b, "SMB"),
    (0x0102_1997, "9P"),
    (0x00c3_6400, "Ceph"),
    (0x6573_5546, "FUSE"),
    (0x5346_414f, "AFS"),
    (0x7375_7245, "Coda"),
    (0x0bd0_0bd0, "Lustre"),
];

/// A directory of this machine that holds a volume.
pub struct LinuxBacking {
    root: Arc<LinuxNode>,
    /// For [`Backing::sync_fs`]. Always the same, since each is told once of what failed, and a new
    /// one nothing that somebody else has been told of.
    whole: OwnedFd,
    path: PathBuf,
}

impl LinuxBacking {
    pub fn open(path: &Path) -> Result<Arc<LinuxBacking>> {
        LinuxBacking::with_times(path, AccessTimes::Move)
    }

    /// Reading moves no access time.
    pub fn open_noatime(path: &Path) -> Result<Arc<LinuxBacking>> {
        LinuxBacking::with_times(path, AccessTimes::Keep)
    }

    fn with_times(path: &Path, times: AccessTimes) -> Result<Arc<LinuxBacking>> {
        let shown = path.display();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = fs::open(path, flags, Mode::empty())
            .context(|| format!("cannot open the directory {shown}"))?;
        let kind = fs::fstatfs(&fd).context(|| format!("cannot examine {shown}"))?.f_type;
        if let Some(name) = refused(kind as u32) {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "{shown} is on a network file system ({name}); its locks do not keep a second \
                     writer out. Use a local file system, or one on a network block device"
                ),
            ));
        }
        let root = LinuxNode::new(fd, times).context(|| format!("cannot examine {shown}"))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let whole = fs::openat(root.fd(), ".", flags, Mode::empty())
            .context(|| format!("cannot open the directory {shown}"))?;
        // Messages outlive a change of the working directory.
        let path = std::path::absolute(path).context(|| format!("cannot resolve {shown}"))?;
        Ok(Arc::new(LinuxBacking { root: Arc::new(root), whole, path }))
    }
}

fn refused(magic: u32) -> Option<&'static str> {
    REFUSED.iter().find(|(refused, _)| *refused == magic).map(|(_, name)| *name)
}

impl fmt::Debug for LinuxBacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LinuxBacking").field(&self.path).finish()
    }
}

/// Dropped with the last descriptor of the open file, so also when the process dies.
#[derive(Debug)]
struct WriterLock {
    _fd: OwnedFd,
}

fn take_lock(fd: OwnedFd) -> io::Result<Box<dyn fmt::Debug + Send + Sync>> {
    retry_on_intr(|| fs::flock(&fd, FlockOperation::NonBlockingLockExclusive))?;
    Ok(Box::new(WriterLock { _fd: fd }))
}

impl Backing for LinuxBacking {
    fn root(&self) -> NodeRef {
        self.root.clone()
    }

    fn statfs(&self) -> io::Result<StatFs> {
        let stat = retry_on_intr(|| fs::fstatvfs(self.root.fd()))?;
        Ok(StatFs {
            block_size: if stat.f_frsize == 0 { stat.f_bsize } else { stat.f_frsize },
            blocks: stat.f_blocks,
            blocks_free: stat.f_bfree,
            blocks_available: stat.f_bavail,
            files: stat.f_files,
            files_free: stat.f_ffree,
            name_max: stat.f_namemax,
        })
    }

    fn sync_fs(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| fs::syncfs(&self.whole))?)
    }

    fn lock(&self, name: &[u8]) -> io::Result<Box<dyn fmt::Debug + Send + Sync>> {
        let name = node::component(name)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let fd = retry_on_intr(|| fs::openat(self.root.fd(), &name, flags, mode))?;
        take_lock(fd)
    }

    fn lock_existing(&self, name: &[u8]) -> io::Result<Box<dyn fmt::Debug + Send + Sync>> {
        let name = node::component(name)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = retry_on_intr(|| fs::openat(self.root.fd(), &name, flags, Mode::empty()))?;
        take_lock(fd)
    }

    fn display_path(&self) -> String {
        self.path.display().to_string()
    }

    fn elsewhere(&self, path: &Path) -> Result<Arc<dyn Backing>> {
        Ok(LinuxBacking::with_times(path, self.root.times())?)
    }
}

#[cfg(test)]
mod tests;
