//! A mount, from mount(2) to the last worker's end.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::adapter::Adapter;
use super::init::Offer;
use super::purge::Purge;
use super::reply::CutOffErrno;
use super::ring::{self, Rings};
use super::worker::Workers;
use super::{dev, trim};
use crate::error::{Context, Error, Kind, Result};
use crate::sys;
use crate::sys::fuse::Unmount;
use crate::vfs::Filesystem;

/// The type that mount(8) and /proc/self/mountinfo show.
const FS_TYPE: &str = "fuse.byokfs";
const DEVICE: &str = "/dev/fuse";

/// Enough that requests waiting for the disk leave threads for what does not wait, and that many
/// commits find each other to share one flush.
const THREADS_PER_CPU: usize = 8;
const THREADS_MIN: usize = 32;
const THREADS_MAX: usize = 128;
/// Beside the ring they take only what the kernel forgets and interrupts.
const BESIDE_RING: usize = 4;

/// How requests come from the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// The ring where the kernel offers it, or else the device.
    #[default]
    Auto,
    /// read(2) and write(2) of /dev/fuse.
    Dev,
    /// FUSE over io_uring.
    Uring,
}

impl Transport {
    /// Stable name, as in the configuration and in `--json` output.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Auto => "auto",
            Transport::Dev => "dev",
            Transport::Uring => "uring",
        }
    }
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
    transport: Transport,
}

/// Mounts; on return the mount serves.
pub fn mount(fs: Arc<Filesystem>, options: &MountOptions) -> Result<Mounted> {
    trim::raise_descriptor_limit();
    let mountpoint = fs::canonicalize(&options.mountpoint)
        .context(|| format!("cannot use the mount point {}", options.mountpoint.display()))?;
    let mounted = match begin(&fs, &mountpoint, options, options.transport) {
        Err(Failure::Ring(error)) if options.transport == Transport::Auto => {
            over_device(&error);
            begin(&fs, &mountpoint, options, Transport::Dev)
        }
        mounted => mounted,
    };
    let mounted = mounted.map_err(|failure| match failure {
        Failure::Ring(error) | Failure::Other(error) => error,
    })?;
    trim::start(mounted.purge(), &mounted.workers)?;
    Ok(mounted)
}

/// Why a session could not begin.
enum Failure {
    /// It was promised a ring, and did not get it.
    Ring(Error),
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Other(error)
    }
}

fn begin(
    fs: &Arc<Filesystem>,
    mountpoint: &Path,
    options: &MountOptions,
    transport: Transport,
) -> Result<Mounted, Failure> {
    let device = Arc::new(open_device()?);
    attach(&device, mountpoint, options)?;
    let served = serve(Arc::clone(fs), options, transport, &device);
    match served {
        Ok((workers, transport)) => {
            Ok(Mounted { mountpoint: mountpoint.to_owned(), device, workers, transport })
        }
        Err(failure) => {
            // By force: who waits for an answer already would keep it, and the workers, for ever.
            if let Err(error) = detach(mountpoint, Unmount::Forced) {
                log::error!("{error}");
            }
            Err(failure)
        }
    }
}

/// Agrees with the kernel on how requests come, and starts who serves them.
fn serve(
    fs: Arc<Filesystem>,
    options: &MountOptions,
    transport: Transport,
    device: &Arc<OwnedFd>,
) -> Result<(Arc<Workers>, Transport), Failure> {
    let offer = Offer::read(device)?;
    let from_device = threads(options.threads);
    let from_ring = workers_for_ring(options.threads, transport, &offer)?;
    let adapter = Adapter::new(fs, options.errno);
    let workers = Workers::new(adapter, from_device + from_ring);
    let rings = match from_ring {
        0 => None,
        count => match Rings::prepare(&workers, from_device, count) {
            Ok(rings) => Some(rings),
            Err(error) if transport == Transport::Uring => return Err(Failure::Other(error)),
            Err(error) => {
                over_device(&error);
                // They count against the same limits as those that are started below.
                workers.join(Some(Duration::from_secs(1)));
                None
            }
        },
    };
    offer.answer(device, rings.is_some())?;
    let (transport, from_device) = match rings {
        Some(rings) => {
            rings.register(device).map_err(Failure::Ring)?;
            (Transport::Uring, from_device.min(BESIDE_RING))
        }
        None => (Transport::Dev, from_device),
    };
    dev::start(&workers, 0, clone_devices(device, from_device)?)?;
    Ok((workers, transport))
}

/// How many: none where the device is wanted, or will do.
fn workers_for_ring(threads: usize, transport: Transport, offer: &Offer) -> Result<usize> {
    match transport {
        Transport::Dev => Ok(0),
        Transport::Uring if !offer.has_ring() => Err(no_ring()),
        Transport::Uring => ring::workers(threads),
        Transport::Auto if !offer.has_ring() => Ok(0),
        Transport::Auto => match ring::workers(threads) {
            Ok(count) if threads > 0 || count <= ring::MANY => Ok(count),
            Ok(count) => {
                log::info!("requests come over {DEVICE}: io_uring would take {count} threads");
                Ok(0)
            }
            Err(error) => {
                over_device(&error);
                Ok(0)
            }
        },
    }
}

fn over_device(error: &Error) {
    log::warn!("requests come over {DEVICE}, not by io_uring: {error}");
}

fn no_ring() -> Error {
    let message = "this kernel offers no FUSE over io_uring: it needs Linux 6.14 or newer, and Y in \
                   /sys/module/fuse/parameters/enable_uring";
    Error::new(Kind::Unsupported, message)
}

impl Mounted {
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// How requests come: never [`Transport::Auto`].
    pub fn transport(&self) -> Transport {
        self.transport
    }

    pub fn purge(&self) -> Purge {
        Purge::new(Arc::clone(&self.device), Arc::clone(&self.workers))
    }

    /// Works in every state of the volume. Not lazy, it fails with [`Kind::Busy`] while files
    /// are open or someone's working directory is inside.
    pub fn unmount(&self, lazy: bool) -> Result<()> {
        detach(&self.mountpoint, if lazy { Unmount::Lazy } else { Unmount::IfUnused })
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
            && let Err(error) = detach(&self.mountpoint, Unmount::Lazy)
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

fn detach(mountpoint: &Path, how: Unmount) -> Result<()> {
    let shown = mountpoint.display();
    let target = c_string(mountpoint.as_os_str().as_bytes())?;
    sys::fuse::unmount(&target, how).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => Error::new(Kind::Busy, format!("{shown} is in use")),
        Some(libc::EINVAL | libc::ENOENT) => {
            Error::new(Kind::NotMounted, format!("nothing is mounted on {shown}"))
        }
        _ => Error::io(format!("cannot unmount {shown}"), error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_follow_the_machine_unless_told() {
        assert!(threads(0) >= THREADS_MIN);
        assert_eq!(threads(3), 3);
    }
}
