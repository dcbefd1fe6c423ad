//! A disk that loses, on a power cut, what was not flushed: one file on a small FUSE file system of
//! its own, made for a loop device with direct I/O. [`medium`] decides what is lost.
//!
//! One thread serves it, in the process of the test. It never touches the mount itself, and what
//! goes through the mount on this process's behalf runs in child processes or in the kernel.

pub mod medium;

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use self::medium::{Medium, PowerLost};

const NAME: &[u8] = b"disk";
const ROOT: u64 = 1;
const FILE: u64 = 2;

const MAX_WRITE: usize = 1 << 20;
/// A write's header and arguments come in front of its data.
const BUFFER: usize = MAX_WRITE + 4096;

mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
}

const ASYNC_READ: u32 = 1 << 0;
const BIG_WRITES: u32 = 1 << 5;
const ASYNC_DIO: u32 = 1 << 15;
const MAX_PAGES: u32 = 1 << 22;
const FOPEN_DIRECT_IO: u32 = 1 << 0;

/// A disk that is there; unmounted when it is dropped.
pub struct Disk {
    medium: Arc<Mutex<Medium>>,
    mountpoint: PathBuf,
    server: Option<JoinHandle<()>>,
}

impl Disk {
    /// Shows `image` as `mountpoint`/disk, which writes `sector` bytes in one piece.
    pub fn attach(image: &Path, mountpoint: &Path, sector: u64) -> io::Result<Disk> {
        let medium = Arc::new(Mutex::new(Medium::open(image, sector)?));
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let c = |bytes: &[u8]| CString::new(bytes).map_err(io::Error::from);
        byokfs::sys::fuse::mount(
            c"byokfs-test-disk",
            &c(mountpoint.as_os_str().as_bytes())?,
            c"fuse",
            0,
            &c(options.as_bytes())?,
        )?;
        let served = Arc::clone(&medium);
        let server = std::thread::spawn(move || serve(device, &served));
        Ok(Disk { medium, mountpoint: mountpoint.to_owned(), server: Some(server) })
    }

    pub fn file(&self) -> PathBuf {
        self.mountpoint.join("disk")
    }

    pub fn medium(&self) -> MutexGuard<'_, Medium> {
        self.medium.lock().unwrap()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mountpoint = CString::new(self.mountpoint.as_os_str().as_bytes()).unwrap();
        let _ = byokfs::sys::fuse::unmount(&mountpoint, byokfs::sys::fuse::Unmount::Lazy);
        // Whoever still has the file open keeps the connection, and the thread, for the moment; it
        // ends with the process at the latest.
        if let Some(server) = self.server.take()
            && super::support::within(super::support::SOON, || server.is_finished())
        {
            let _ = server.join();
        }
    }
}

/// Until the file system is unmounted.
fn serve(mut device: File, medium: &Mutex<Medium>) {
    let mut buf = vec![0; BUFFER];
    loop {
        let len = match device.read(&mut buf) {
            Ok(len) => len,
            Err(error) => match error.raw_os_error() {
                // The request was taken back before it could be read.
                Some(libc::ENOENT | libc::EINTR | libc::EAGAIN) => continue,
                _ => return,
            },
        };
        let request = Request::parse(&buf[..len]);
        let Some(answer) = answer(&request, medium) else { continue };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(errno) => (-errno, Vec::new()),
        };
        let mut reply = Vec::with_capacity(16 + body.len());
        reply.extend(((16 + body.len()) as u32).to_ne_bytes());
        reply.extend(error.to_ne_bytes());
        reply.extend(request.unique.to_ne_bytes());
        reply.extend(body);
        // One that was taken back meanwhile is answered with ENOENT.
        let _ = device.write(&reply);
    }
}

struct Request<'a> {
    opcode: u32,
    unique: u64,
    node: u64,
    args: &'a [u8],
}

impl Request<'_> {
    fn parse(bytes: &[u8]) -> Request<'_> {
        Request {
            opcode: u32_at(bytes, 4),
            unique: u64_at(bytes, 8),
            node: u64_at(bytes, 16),
            args: &bytes[40..],
        }
    }
}

/// None where the kernel waits for no answer.
fn answer(request: &Request<'_>, medium: &Mutex<Medium>) -> Option<Result<Vec<u8>, i32>> {
    let args = request.args;
    let mut medium = medium.lock().unwrap();
    Some(match request.opcode {
        opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => return None,
        opcode::INIT => Ok(init(args)),
        opcode::LOOKUP if args.split_last() == Some((&0, NAME)) => {
            let mut entry = Vec::new();
            // Its node and generation, then for how long that is valid.
            words(&mut entry, &[FILE, 0, 3600, 3600, 0]);
            entry.extend(attr(FILE, medium.len()));
            Ok(entry)
        }
        opcode::LOOKUP => Err(libc::ENOENT),
        opcode::GETATTR => {
            let mut out = Vec::new();
            words(&mut out, &[3600, 0]);
            out.extend(attr(request.node, medium.len()));
            Ok(out)
        }
        opcode::OPEN | opcode::OPENDIR => {
            let mut out = Vec::new();
            words(&mut out, &[0, if request.node == FILE { FOPEN_DIRECT_IO.into() } else { 0 }]);
            Ok(out)
        }
        opcode::READDIR | opcode::RELEASE | opcode::RELEASEDIR | opcode::FLUSH => Ok(Vec::new()),
        opcode::READ => {
            let (offset, size) = (u64_at(args, 8), u32_at(args, 16) as usize);
            let size = size.min(medium.len().saturating_sub(offset) as usize);
            let mut data = vec![0; size];
            settle(medium.read(offset, &mut data)).map(|()| data)
        }
        opcode::WRITE => {
            let (offset, size, flags) = (u64_at(args, 8), u32_at(args, 16), u32_at(args, 32));
            let data = &args[40..][..size as usize];
            let mut done = settle(medium.write(offset, data));
            if flags.cast_signed() & (libc::O_DSYNC | libc::O_SYNC) != 0 {
                done = done.and_then(|()| settle(medium.flush().map(Ok)));
            }
            done.map(|()| [size.to_ne_bytes(), [0; 4]].concat())
        }
        opcode::FSYNC => settle(medium.flush().map(Ok)).map(|()| Vec::new()),
        opcode::STATFS => Ok(vec![0; 80]),
        _ => Err(libc::ENOSYS),
    })
}

fn settle(done: Result<io::Result<()>, PowerLost>) -> Result<(), i32> {
    match done {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.raw_os_error().unwrap_or(libc::EINVAL)),
        Err(PowerLost) => Err(libc::EIO),
    }
}

/// `struct fuse_init_out`.
fn init(args: &[u8]) -> Vec<u8> {
    let offered = u32_at(args, 12);
    let flags = offered & (ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES);
    let mut out = Vec::new();
    for word in [7, 31, 1 << 20, flags] {
        out.extend(u32::to_ne_bytes(word));
    }
    // How many requests may wait, and from where on the kernel calls that congestion.
    for half in [256u16, 192] {
        out.extend(half.to_ne_bytes());
    }
    for word in [MAX_WRITE as u32, 1] {
        out.extend(word.to_ne_bytes());
    }
    for half in [256u16, 0] {
        out.extend(half.to_ne_bytes());
    }
    out.resize(64, 0);
    out
}

/// `struct fuse_attr`.
fn attr(node: u64, len: u64) -> Vec<u8> {
    let (mode, size) = match node {
        ROOT => (libc::S_IFDIR | 0o700, 0),
        _ => (libc::S_IFREG | 0o600, len),
    };
    let mut out = Vec::new();
    words(&mut out, &[node, size, size.div_ceil(512), 0, 0, 0]);
    for word in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
        out.extend(u32::to_ne_bytes(word));
    }
    out
}

fn words(out: &mut Vec<u8>, words: &[u64]) {
    words.iter().for_each(|word| out.extend(word.to_ne_bytes()));
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(*bytes[at..].first_chunk().expect("a request that is too short"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(*bytes[at..].first_chunk().expect("a request that is too short"))
}
