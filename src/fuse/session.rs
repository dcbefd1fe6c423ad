//! A mount, from mount(2) to the last worker's end.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno as OsErrno;

use super::adapter::Adapter;
use super::purge::Purge;
use super::reply::CutOffErrno;
use super::trim;
use super::wire::{Header, IN_HEADER_LEN, MAJOR, MINOR, OUT_HEADER_LEN, Reader, Writer, opcode};
use super::worker::{MAX_WRITE, Workers};
use crate::error::{Context, Error, Kind, Result};
use crate::sys;
use crate::vfs::Filesystem;

/// The type that mount(8) and /proc/self/mountinfo show.
const FS_TYPE: &str = "fuse.byokfs";
const DEVICE: &str = "/dev/fuse";

/// Enough that requests waiting for the disk leave threads for what does not wait, and that many
/// commits find each other to share one flush.
const THREADS_PER_CPU: usize = 8;
const THREADS_MIN: usize = 32;
const THREADS_MAX: usize = 128;

/// INIT flags.
const ASYNC_READ: u64 = 1 << 0;
const ATOMIC_O_TRUNC: u64 = 1 << 3;
const EXPORT_SUPPORT: u64 = 1 << 4;
const BIG_WRITES: u64 = 1 << 5;
const DONT_MASK: u64 = 1 << 6;
const DO_READDIRPLUS: u64 = 1 << 13;
const READDIRPLUS_AUTO: u64 = 1 << 14;
const ASYNC_DIO: u64 = 1 << 15;
const PARALLEL_DIROPS: u64 = 1 << 18;
const POSIX_ACL: u64 = 1 << 20;
const MAX_PAGES: u64 = 1 << 22;
const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
const SETXATTR_EXT: u64 = 1 << 29;
const INIT_EXT: u64 = 1 << 30;
const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;

/// What byokfs cannot do without. Left out on purpose: WRITEBACK_CACHE (acknowledged data would
/// be lost at a cut-off), PASSTHROUGH (past the encryption), AUTO_INVAL_DATA and the caching of
/// link targets (plaintext in the page cache), POSIX_LOCKS and FLOCK_LOCKS (the kernel's own
/// are right for one mount).
const REQUIRED: u64 = ASYNC_READ
    | ATOMIC_O_TRUNC
    | BIG_WRITES
    | DONT_MASK
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | POSIX_ACL
    | MAX_PAGES
    | HANDLE_KILLPRIV_V2
    | SETXATTR_EXT
    | INIT_EXT
    | DIRECT_IO_ALLOW_MMAP;
const WANTED: u64 = REQUIRED | EXPORT_SUPPORT | DO_READDIRPLUS | READDIRPLUS_AUTO;

/// Asynchronous requests that the kernel lets run at a time; its own default of 12 would limit
/// every native AIO.
const MAX_BACKGROUND: u16 = 4096;

/// How requests come from the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// The best that this kernel and this version have.
    #[default]
    Auto,
    /// read(2) and write(2) of /dev/fuse.
    Dev,
    /// FUSE over io_uring.
    Uring,
}

#[derive(Clone, Debug)]
pub struct MountOptions {
    pub mountpoint: PathBuf,
    /// Shown as the mount's source: the backing directory, absolute.
    pub source: String,
    pub read_only: bool,
    pub errno: CutOffErrno,
    pub transport: Transport,
    /// Worker threads; 0 for as many as suit the machine.
    pub threads: usize,
    pub noexec: bool,
    pub noatime: bool,
}

impl MountOptions {
    pub fn new(source: impl Into<String>, mountpoint: impl Into<PathBuf>) -> MountOptions {
        MountOptions {
            mountpoint: mountpoint.into(),
            source: source.into(),
            read_only: false,
            errno: CutOffErrno::default(),
            transport: Transport::default(),
            threads: 0,
            noexec: false,
            noatime: false,
        }
    }
}

/// A mount that serves. When it is dropped it is detached, if nobody unmounted it before.
#[derive(Debug)]
pub struct Mounted {
    mountpoint: PathBuf,
    device: Arc<OwnedFd>,
    workers: Arc<Workers>,
}

/// Mounts; on return the mount serves.
pub fn mount(fs: Arc<Filesystem>, options: &MountOptions) -> Result<Mounted> {
    match options.transport {
        Transport::Auto | Transport::Dev => {}
        Transport::Uring => {
            let message = "this version has no io_uring transport; use transport = \"auto\"";
            return Err(Error::new(Kind::Unsupported, message));
        }
    }
    trim::raise_descriptor_limit();
    let mountpoint = fs::canonicalize(&options.mountpoint)
        .context(|| format!("cannot use the mount point {}", options.mountpoint.display()))?;
    let device = Arc::new(open_device()?);
    attach(&device, &mountpoint, options)?;
    let serve = || {
        handshake(&device)?;
        let devices = clone_devices(&device, threads(options.threads))?;
        Workers::start(Adapter::new(fs, options.errno), devices)
    };
    match serve() {
        Ok(workers) => {
            let mounted = Mounted { mountpoint, device, workers };
            trim::start(mounted.purge(), &mounted.workers)?;
            Ok(mounted)
        }
        Err(error) => {
            if let Err(error) = detach(&mountpoint, true) {
                log::error!("{error}");
            }
            Err(error)
        }
    }
}

impl Mounted {
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    pub fn purge(&self) -> Purge {
        Purge::new(Arc::clone(&self.device), Arc::clone(&self.workers))
    }

    /// Works in every state of the volume. Not lazy, it fails with [`Kind::Busy`] while files
    /// are open or someone's working directory is inside.
    pub fn unmount(&self, lazy: bool) -> Result<()> {
        detach(&self.mountpoint, lazy)
    }

    /// Until the mount is gone, whoever unmounted it, and the last worker has ended.
    pub fn wait(&self) {
        self.workers.join(None);
    }

    /// True when the mount is gone; false when the time was up first.
    pub fn wait_timeout(&self, limit: Duration) -> bool {
        self.workers.join(Some(limit))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Anything else could be mounted there by now, if this mount is gone.
        if !self.wait_timeout(Duration::ZERO)
            && let Err(error) = detach(&self.mountpoint, true)
        {
            log::warn!("{error}");
        }
    }
}

/// The flags of a mount that the kernel can change while it is mounted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    pub read_only: bool,
    pub noexec: bool,
    pub noatime: bool,
}

impl Flags {
    fn bits(self) -> libc::c_ulong {
        // Without one of the two a remount would leave access times as they are.
        let times = if self.noatime { libc::MS_NOATIME } else { libc::MS_RELATIME };
        let mut bits = libc::MS_NOSUID | libc::MS_NODEV | times;
        if self.read_only {
            bits |= libc::MS_RDONLY;
        }
        if self.noexec {
            bits |= libc::MS_NOEXEC;
        }
        bits
    }
}

/// Changes the flags of a mount. To read-only fails with [`Kind::Busy`] while files are open for
/// writing.
pub fn remount(mountpoint: &Path, flags: Flags) -> Result<()> {
    let shown = mountpoint.display();
    let target = c_string(mountpoint.as_os_str().as_bytes())?;
    let flags = flags.bits() | libc::MS_REMOUNT;
    sys::fuse::mount(c"none", &target, c"none", flags, c"").map_err(|error| {
        match error.raw_os_error() {
            Some(libc::EBUSY) => {
                Error::new(Kind::Busy, format!("files on {shown} are open for writing"))
            }
            Some(libc::EPERM) => {
                Error::new(Kind::Denied, format!("cannot remount {shown}: this needs root"))
            }
            _ => Error::io(format!("cannot remount {shown}"), error),
        }
    })
}

fn threads(asked: usize) -> usize {
    if asked > 0 {
        return asked;
    }
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    (cpus * THREADS_PER_CPU).clamp(THREADS_MIN, THREADS_MAX)
}

fn open_device() -> Result<OwnedFd> {
    rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .context(|| format!("cannot open {DEVICE} (is the module fuse loaded?)"))
}

/// A device for each worker: with one of their own they do not contend for its lock.
fn clone_devices(session: &Arc<OwnedFd>, count: usize) -> Result<Vec<Arc<OwnedFd>>> {
    let mut devices = vec![Arc::clone(session)];
    while devices.len() < count {
        let device = open_device()?;
        sys::fuse::clone_device(device.as_fd(), session.as_fd())
            .context(|| format!("cannot clone {DEVICE}"))?;
        devices.push(Arc::new(device));
    }
    Ok(devices)
}

fn c_string(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|_| Error::usage("a path with a NUL in it"))
}

fn attach(device: &OwnedFd, mountpoint: &Path, options: &MountOptions) -> Result<()> {
    let shown = mountpoint.display();
    if !mountpoint.is_dir() {
        return Err(Error::usage(format!("the mount point {shown} is not a directory")));
    }
    let flags =
        Flags { read_only: options.read_only, noexec: options.noexec, noatime: options.noatime };
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions,allow_other",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    sys::fuse::mount(
        &c_string(options.source.as_bytes())?,
        &c_string(mountpoint.as_os_str().as_bytes())?,
        &c_string(FS_TYPE.as_bytes())?,
        flags.bits(),
        &c_string(data.as_bytes())?,
    )
    .map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM) => {
            Error::new(Kind::Denied, format!("cannot mount on {shown}: this needs root"))
        }
        _ => Error::io(format!("cannot mount on {shown}"), error),
    })
}

fn detach(mountpoint: &Path, lazy: bool) -> Result<()> {
    let shown = mountpoint.display();
    let target = c_string(mountpoint.as_os_str().as_bytes())?;
    sys::fuse::unmount(&target, lazy).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => Error::new(Kind::Busy, format!("{shown} is in use")),
        Some(libc::EINVAL | libc::ENOENT) => {
            Error::new(Kind::NotMounted, format!("nothing is mounted on {shown}"))
        }
        _ => Error::io(format!("cannot unmount {shown}"), error),
    })
}

/// Agrees with the kernel on the protocol: the first request is always INIT.
fn handshake(device: &OwnedFd) -> Result<()> {
    let protocol = |message: &str| Error::new(Kind::Unsupported, message);
    let mut request = vec![0; MAX_WRITE + 4096];
    let len = loop {
        match rustix::io::read(device, &mut request[..]) {
            Ok(len) => break len,
            Err(OsErrno::INTR | OsErrno::AGAIN | OsErrno::NOENT) => {}
            Err(error) => {
                return Err(Error::io("the kernel closed the new mount", error.into()));
            }
        }
    };
    let header = Header::parse(&request[..len])
        .filter(|header| header.opcode == opcode::INIT)
        .ok_or_else(|| protocol("the kernel did not begin with FUSE_INIT"))?;
    let offered = Init::parse(Reader::new(&request[IN_HEADER_LEN..len], &[]))
        .ok_or_else(|| protocol("FUSE_INIT is too short: this kernel is too old"))?;
    let mut reply = [0; OUT_HEADER_LEN + 64];
    let (out, body) = reply.split_at_mut(OUT_HEADER_LEN);
    let error = match offered.check() {
        Ok(()) => {
            offered.answer(body);
            0
        }
        Err(_) => -libc::EPROTO,
    };
    let reply_len = if error == 0 { OUT_HEADER_LEN + 64 } else { OUT_HEADER_LEN };
    Writer::new(out).u32(reply_len as u32).u32(error.cast_unsigned()).u64(header.unique);
    rustix::io::write(device, &reply[..reply_len])
        .map_err(io::Error::from)
        .context(|| "cannot answer FUSE_INIT".into())?;
    offered.check()
}

/// `struct fuse_init_in`.
#[derive(Clone, Copy, Debug)]
struct Init {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u64,
}

impl Init {
    fn parse(mut args: Reader<'_>) -> Option<Init> {
        let (major, minor) = (args.u32().ok()?, args.u32().ok()?);
        let (max_readahead, low) = (args.u32().ok()?, args.u32().ok()?);
        let high = if u64::from(low) & INIT_EXT == 0 { 0 } else { args.u32().ok()? };
        Some(Init { major, minor, max_readahead, flags: u64::from(high) << 32 | u64::from(low) })
    }

    fn check(&self) -> Result<()> {
        if self.major != MAJOR {
            let message = format!("the kernel speaks FUSE {}, not {MAJOR}", self.major);
            return Err(Error::new(Kind::Unsupported, message));
        }
        let missing = REQUIRED & !self.flags;
        if missing != 0 {
            let message = format!(
                "this kernel's FUSE {}.{} lacks what byokfs needs (flags {missing:#x}); use Linux \
                 6.6 or newer",
                self.major, self.minor
            );
            return Err(Error::new(Kind::Unsupported, message));
        }
        Ok(())
    }

    /// `struct fuse_init_out`.
    fn answer(&self, body: &mut [u8]) {
        let flags = self.flags & WANTED;
        let mut writer = Writer::new(body);
        writer.u32(MAJOR).u32(MINOR.min(self.minor)).u32(self.max_readahead).u32(flags as u32);
        writer.u16(MAX_BACKGROUND).u16(MAX_BACKGROUND / 4 * 3).u32(MAX_WRITE as u32);
        // Times in nanoseconds, pages of the largest request, no alignment of mappings.
        writer.u32(1).u16((MAX_WRITE / 4096) as u16).u16(0).u32((flags >> 32) as u32);
        writer.zeros(28);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(flags: u64) -> Init {
        Init { major: 7, minor: 45, max_readahead: 131_072, flags }
    }

    #[test]
    fn only_what_is_wanted_is_agreed_on() {
        let mut body = [0xff; 64];
        init(u64::MAX).answer(&mut body);
        let word = |at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().unwrap());
        let flags = u64::from(word(12)) | u64::from(word(32)) << 32;
        assert_eq!(flags, WANTED);
        let writeback_cache = 1 << 16;
        let passthrough = 1 << 37;
        assert_eq!(flags & (writeback_cache | passthrough), 0);
        assert_eq!(word(20), 1 << 20);
        assert_eq!(&body[36..], &[0; 28]);
    }

    #[test]
    fn an_old_kernel_is_refused_with_the_reason() {
        assert!(init(REQUIRED).check().is_ok());
        let error = init(REQUIRED & !DIRECT_IO_ALLOW_MMAP).check().unwrap_err();
        assert_eq!(error.kind, Kind::Unsupported);
        assert!(error.to_string().contains("6.6"));
    }

    #[test]
    fn threads_follow_the_machine_unless_told() {
        assert!(threads(0) >= THREADS_MIN);
        assert_eq!(threads(3), 3);
    }
}
