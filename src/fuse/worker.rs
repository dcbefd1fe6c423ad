//! The threads that serve: read a request, have it served, write the reply.
//!
//! What only waits for a flush is answered by whoever flushes, on the device that it was read from.
//!
//! A worker's two buffers hold plaintext. It overwrites them when asked to ([`Workers::wipe`]),
//! and after every request that it refuses while the volume is cut off.
//!
//! The kernel gives each request to the worker that has waited for one the longest, so that with
//! many of them no buffer is ever found in a cache. So only a few wait ([`MAX_IDLE`]); the others are
//! set aside, with nothing in their buffers, until those few are busy.

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno as OsErrno;
use zeroize::Zeroize;

use super::adapter::{Adapter, Outcome};
use super::reply::Errno;
use super::wire::{Header, IN_HEADER_LEN, OUT_HEADER_LEN, Reader};
use crate::error::{Context, Result};
use crate::sys::{self, fuse::Waiter};

/// The largest write that is asked for, and so the largest request but for its header.
pub(super) const MAX_WRITE: usize = 1 << 20;
/// Room for headers and fixed arguments beside the largest payload.
const HEADROOM: usize = 4096;

/// Workers that wait for a request at most.
const MAX_IDLE: usize = 6;
/// If fewer do, another one joins them.
const MIN_IDLE: usize = 2;

/// What the workers of one session share.
#[derive(Debug)]
pub(super) struct Workers {
    adapter: Adapter,
    /// How many wait for a request.
    idle: AtomicUsize,
    /// Those set aside, the last one first to come back.
    aside: Mutex<Vec<usize>>,
    /// The mount is gone.
    gone: AtomicBool,
    /// Counts the wipes that were asked for.
    wipes: AtomicU64,
    states: Vec<State>,
    running: Mutex<usize>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiter: OnceLock<Waiter>,
    /// Waits for a request, or is about to.
    idle: AtomicBool,
    ended: AtomicBool,
    wiped: AtomicU64,
    thread: OnceLock<Thread>,
    /// Set aside: its buffers are empty.
    aside: AtomicBool,
}

impl Workers {
    /// Starts one worker on each device.
    pub(super) fn start(adapter: Adapter, devices: Vec<Arc<OwnedFd>>) -> Result<Arc<Workers>> {
        let workers = Arc::new(Workers {
            adapter,
            idle: AtomicUsize::new(0),
            aside: Mutex::default(),
            gone: AtomicBool::new(false),
            wipes: AtomicU64::new(0),
            states: devices.iter().map(|_| State::default()).collect(),
            running: Mutex::new(0),
            ended: Condvar::new(),
        });
        for (index, device) in devices.into_iter().enumerate() {
            *workers.running.lock() += 1;
            let shared = Arc::clone(&workers);
            let started = thread::Builder::new().name(format!("fuse-{index}")).spawn(move || {
                let _end = End { workers: &shared, index };
                Worker::new(&shared, index, device).run();
            });
            if let Err(error) = started {
                *workers.running.lock() -= 1;
                workers.states[index].ended.store(true, Ordering::SeqCst);
                return Err(error).context(|| "cannot start a worker thread".into());
            }
        }
        Ok(workers)
    }

    pub(super) fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// Waits until every worker has ended, which they do when the mount is gone.
    pub(super) fn join(&self, limit: Option<Duration>) -> bool {
        let limit = limit.map(|limit| Instant::now() + limit);
        let mut running = self.running.lock();
        while *running > 0 {
            match limit {
                None => self.ended.wait(&mut running),
                Some(limit) if self.ended.wait_until(&mut running, limit).timed_out() => {
                    return *running == 0;
                }
                Some(_) => {}
            }
        }
        true
    }

    /// Has every worker overwrite its buffers; false if one does not come to it in time.
    pub(super) fn wipe(&self, limit: Instant) -> bool {
        let asked = self.wipes.fetch_add(1, Ordering::SeqCst) + 1;
        loop {
            let mut left = false;
            for state in &self.states {
                if state.ended.load(Ordering::SeqCst)
                    || state.aside.load(Ordering::SeqCst)
                    || state.wiped.load(Ordering::SeqCst) >= asked
                {
                    continue;
                }
                left = true;
                if state.idle.load(Ordering::SeqCst)
                    && let Some(waiter) = state.waiter.get()
                {
                    waiter.interrupt();
                }
            }
            if !left || Instant::now() >= limit {
                return !left;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Workers {
    /// One that waited has a request: if too few are left, another one is to wait.
    fn took_one(&self) {
        if self.idle.fetch_sub(1, Ordering::SeqCst) > MIN_IDLE {
            return;
        }
        let next = self.aside.lock().pop();
        if let Some(index) = next {
            self.bring_back(index);
        }
    }

    fn bring_back(&self, index: usize) {
        let state = &self.states[index];
        state.aside.store(false, Ordering::SeqCst);
        if let Some(thread) = state.thread.get() {
            thread.unpark();
        }
    }

    fn are_too_few(&self) -> bool {
        self.idle.load(Ordering::SeqCst) < MAX_IDLE || self.gone.load(Ordering::SeqCst)
    }

    /// Counts one in that waits, unless there are enough.
    fn may_wait(&self) -> bool {
        let _aside = self.aside.lock();
        let may = self.are_too_few();
        if may {
            self.idle.fetch_add(1, Ordering::SeqCst);
        }
        may
    }

    /// False if there are too few again. Under the lock that [`Workers::took_one`] looks under: who
    /// takes one of the last requests either finds this one aside, or is seen here.
    fn set_aside(&self, index: usize) -> bool {
        let mut aside = self.aside.lock();
        if self.are_too_few() {
            return false;
        }
        self.states[index].aside.store(true, Ordering::SeqCst);
        aside.push(index);
        true
    }

    /// Nobody waits for what will not come.
    fn end_all(&self) {
        self.gone.store(true, Ordering::SeqCst);
        let aside = std::mem::take(&mut *self.aside.lock());
        aside.into_iter().for_each(|index| self.bring_back(index));
    }
}

/// Counts a worker out, however it ends.
struct End<'a> {
    workers: &'a Workers,
    index: usize,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.workers.states[self.index].ended.store(true, Ordering::SeqCst);
        *self.workers.running.lock() -= 1;
        self.workers.ended.notify_all();
        // Whoever is set aside takes its place, or finds that the mount is gone.
        self.workers.end_all();
    }
}

struct Worker<'a> {
    workers: &'a Workers,
    index: usize,
    state: &'a State,
    device: Arc<OwnedFd>,
    request: Buffer,
    reply: Buffer,
}

/// A buffer that remembers how much of it has been used since it was last overwritten.
struct Buffer {
    bytes: Vec<u8>,
    used: usize,
}

impl Buffer {
    fn new() -> Buffer {
        Buffer { bytes: vec![0; MAX_WRITE + HEADROOM], used: 0 }
    }

    fn wipe(&mut self) {
        self.bytes[..self.used].zeroize();
        self.used = 0;
    }
}

impl<'a> Worker<'a> {
    fn new(workers: &'a Workers, index: usize, device: Arc<OwnedFd>) -> Worker<'a> {
        let state = &workers.states[index];
        Worker { workers, index, state, device, request: Buffer::new(), reply: Buffer::new() }
    }

    fn run(&mut self) {
        // Only this thread sets it.
        let _ = self.state.waiter.set(Waiter::current());
        let _ = self.state.thread.set(thread::current());
        loop {
            self.stand_by();
            let asked = self.workers.wipes.load(Ordering::SeqCst);
            if self.state.wiped.load(Ordering::SeqCst) < asked {
                self.wipe();
                self.state.wiped.store(asked, Ordering::SeqCst);
            }
            self.state.idle.store(true, Ordering::SeqCst);
            let read = rustix::io::read(self.device.as_fd(), &mut self.request.bytes[..]);
            self.state.idle.store(false, Ordering::SeqCst);
            self.workers.took_one();
            match read {
                Ok(len) => {
                    self.request.used = self.request.used.max(len);
                    self.handle(len);
                }
                // NOENT: the request was given up before it was read.
                Err(OsErrno::INTR | OsErrno::NOENT | OsErrno::AGAIN) => {}
                Err(OsErrno::NODEV) => break,
                Err(error) => {
                    log::error!("cannot read from /dev/fuse: {error}; a worker ends");
                    break;
                }
            }
        }
        self.wipe();
    }

    /// Until this worker may wait for a request.
    fn stand_by(&mut self) {
        while !self.workers.may_wait() {
            self.wipe();
            if self.workers.set_aside(self.index) {
                while self.state.aside.load(Ordering::SeqCst) {
                    thread::park();
                }
            }
        }
    }

    fn handle(&mut self, len: usize) {
        let request = &self.request.bytes[..len];
        let Some(header) = Header::parse(request) else {
            log::error!("the kernel sent {len} bytes that are no request");
            return;
        };
        let args = Reader::new(&request[IN_HEADER_LEN..], &[]);
        let body = &mut self.reply.bytes[OUT_HEADER_LEN..];
        // The operations hold no lock of their own across a panic that would not be released:
        // parking_lot's are released as the stack unwinds, and none is poisoned.
        let served = panic::catch_unwind(AssertUnwindSafe(|| {
            self.workers.adapter.serve(&header, args, body)
        }));
        let outcome = served.unwrap_or_else(|_| {
            log::error!("request {} on node {} panicked", header.opcode, header.node);
            Outcome::Error(Errno::IO)
        });
        let reply_len = match outcome {
            Outcome::Silent => 0,
            Outcome::Reply(body_len) => self.send(&header, 0, body_len),
            Outcome::Error(errno) => {
                // How far the operation had got with its reply is not known.
                self.reply.used = self.reply.bytes.len();
                self.send(&header, -errno.raw(), 0)
            }
            Outcome::Later(rest) => {
                let answer = Answer::new(&self.device, &header);
                let errno = self.workers.adapter.errno();
                rest.then(move |done| answer.send(done.map_err(|error| errno.pick(&error))));
                0
            }
        };
        self.reply.used = self.reply.used.max(reply_len);
        if self.workers.adapter.filesystem().check_open().is_err() {
            self.wipe();
        }
    }

    /// Returns how much of the reply buffer was used.
    fn send(&mut self, header: &Header, error: i32, body_len: usize) -> usize {
        let len = OUT_HEADER_LEN + body_len;
        send(&self.device, header, error, &mut self.reply.bytes[..len]);
        len
    }

    fn wipe(&mut self) {
        self.request.wipe();
        self.reply.wipe();
        // The ciphers spill what they work on.
        sys::stack::burn();
    }
}

/// Sends a reply of which all but the header is there.
fn send(device: &OwnedFd, header: &Header, error: i32, reply: &mut [u8]) {
    let len = reply.len() as u32;
    reply[..4].copy_from_slice(&len.to_ne_bytes());
    reply[4..8].copy_from_slice(&error.to_ne_bytes());
    reply[8..16].copy_from_slice(&header.unique.to_ne_bytes());
    match rustix::io::writev(device, &[IoSlice::new(reply)]) {
        Ok(_) => {}
        // The mount went away, and with it whoever waited for this.
        Err(OsErrno::NOENT | OsErrno::NODEV | OsErrno::NOTCONN) => {}
        Err(error) => {
            log::error!("cannot reply to request {}: {error}", header.opcode);
            // Without any reply whoever waits for it would wait for ever.
            if reply.len() > OUT_HEADER_LEN {
                send(device, header, -libc::EIO, &mut reply[..OUT_HEADER_LEN]);
            }
        }
    }
}

/// A reply that is owed. If nobody sends it, it is EIO.
struct Answer {
    device: Arc<OwnedFd>,
    header: Header,
    sent: bool,
}

impl Answer {
    fn new(device: &Arc<OwnedFd>, header: &Header) -> Answer {
        Answer { device: Arc::clone(device), header: *header, sent: false }
    }

    fn send(mut self, done: std::result::Result<(), Errno>) {
        self.put(done.err().map_or(0, |errno| -errno.raw()));
    }

    fn put(&mut self, error: i32) {
        self.sent = true;
        send(&self.device, &self.header, error, &mut [0; OUT_HEADER_LEN]);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.sent {
            self.put(-libc::EIO);
        }
    }
}
