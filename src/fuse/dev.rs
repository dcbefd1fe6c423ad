//! Requests by read(2) from /dev/fuse, replies by write(2): the transport that every kernel has. What
//! the kernel sends only this way comes here beside the ring too.
//!
//! What only waits for a flush is answered by whoever flushes, on the device that it was read from.
//!
//! The kernel gives each request to the worker that has waited for one the longest, so that with
//! many of them no buffer is ever found in a cache. So only a few wait ([`MAX_IDLE`]); the others are
//! set aside, with nothing in their buffers, until those few are busy.

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::Duration;

use rustix::io::Errno as OsErrno;

use super::adapter::Outcome;
use super::reply::Errno;
use super::wire::{Header, IN_HEADER_LEN, OUT_HEADER_LEN, Reader};
use super::worker::{Buffer, MAX_WRITE, Worker, Workers};
use crate::error::Result;
use crate::sync::Mutex;
use crate::sys;

/// Room for headers and fixed arguments beside the largest payload.
const HEADROOM: usize = 4096;

/// How long a worker waits that had no memory for a request.
const PAUSE: Duration = Duration::from_millis(100);

/// Workers that wait for a request at most.
const MAX_IDLE: usize = 6;
/// If fewer do, another one joins them.
const MIN_IDLE: usize = 2;

/// Starts one worker on each device, with numbers from `first` on.
pub(super) fn start(
    workers: &Arc<Workers>,
    first: usize,
    devices: Vec<Arc<OwnedFd>>,
) -> Result<()> {
    let standby = Arc::new(Standby::new(devices.len()));
    for (index, device) in devices.into_iter().enumerate() {
        let standby = Arc::clone(&standby);
        workers.start(first + index, format!("fuse-{index}"), move |worker| {
            // Whoever is set aside takes its place, or finds that the mount is gone.
            let _end = End(&standby);
            Channel::new(worker, &standby, index, device).run();
        })?;
    }
    Ok(())
}

/// Sees to it that some wait, and not too many.
#[derive(Debug)]
struct Standby {
    /// How many wait for a request.
    idle: AtomicUsize,
    /// Those set aside, the last one first to come back.
    aside: Mutex<Vec<usize>>,
    /// The mount is gone.
    gone: AtomicBool,
    members: Vec<Member>,
}

#[derive(Debug, Default)]
struct Member {
    thread: OnceLock<Thread>,
    aside: AtomicBool,
}

impl Standby {
    fn new(count: usize) -> Standby {
        Standby {
            idle: AtomicUsize::new(0),
            aside: Mutex::default(),
            gone: AtomicBool::new(false),
            members: (0..count).map(|_| Member::default()).collect(),
        }
    }

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
        let member = &self.members[index];
        member.aside.store(false, Ordering::SeqCst);
        if let Some(thread) = member.thread.get() {
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

    /// False if there are too few again. Under the lock that [`Standby::took_one`] looks under: who
    /// takes one of the last requests either finds this one aside, or is seen here.
    fn set_aside(&self, index: usize) -> bool {
        let mut aside = self.aside.lock();
        if self.are_too_few() {
            return false;
        }
        self.members[index].aside.store(true, Ordering::SeqCst);
        aside.push(index);
        true
    }

    fn wait_aside(&self, index: usize) {
        while self.members[index].aside.load(Ordering::SeqCst) {
            thread::park();
        }
    }

    /// Nobody waits for what will not come.
    fn end_all(&self) {
        self.gone.store(true, Ordering::SeqCst);
        let aside = std::mem::take(&mut *self.aside.lock());
        aside.into_iter().for_each(|index| self.bring_back(index));
    }
}

struct End<'a>(&'a Standby);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.end_all();
    }
}

struct Channel<'a> {
    worker: &'a Worker<'a>,
    standby: &'a Standby,
    index: usize,
    device: Arc<OwnedFd>,
    request: Buffer,
    reply: Buffer,
}

impl<'a> Channel<'a> {
    fn new(
        worker: &'a Worker<'a>,
        standby: &'a Standby,
        index: usize,
        device: Arc<OwnedFd>,
    ) -> Channel<'a> {
        let buffer = || Buffer::new(MAX_WRITE + HEADROOM);
        Channel { worker, standby, index, device, request: buffer(), reply: buffer() }
    }

    fn run(&mut self) {
        // Only this thread sets it.
        let _ = self.standby.members[self.index].thread.set(thread::current());
        loop {
            self.stand_by();
            match self.read() {
                Ok(len) => {
                    self.request.has_used(len);
                    self.handle(len);
                }
                // NOENT: the request was given up before it was read.
                Err(OsErrno::INTR | OsErrno::NOENT | OsErrno::AGAIN) => {}
                Err(OsErrno::NODEV) => break,
                // The kernel has ended that request with EIO. Later ones find memory, and need somebody.
                Err(OsErrno::NOMEM) => {
                    // Part of it may have come.
                    self.request.has_used(usize::MAX);
                    log::error!("no memory to read a request from /dev/fuse: it has failed");
                    thread::sleep(PAUSE);
                }
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
        while !self.standby.may_wait() {
            self.wipe();
            self.worker.set_clean(true);
            if self.standby.set_aside(self.index) {
                self.standby.wait_aside(self.index);
            }
            self.worker.set_clean(false);
        }
    }

    fn read(&mut self) -> rustix::io::Result<usize> {
        if let Some(asked) = self.worker.has_to_wipe() {
            self.wipe();
            self.worker.has_wiped(asked);
        }
        let (device, buffer) = (self.device.as_fd(), &mut self.request.bytes[..]);
        let read = self.worker.waiting(|| rustix::io::read(device, buffer));
        self.standby.took_one();
        read
    }

    fn handle(&mut self, len: usize) {
        let request = &self.request.bytes[..len];
        let Some(header) = Header::parse(request) else {
            log::error!("the kernel sent {len} bytes that are no request");
            return;
        };
        let args = Reader::new(&request[IN_HEADER_LEN..], &[]);
        let outcome = self.worker.serve(&header, args, &mut self.reply.bytes[OUT_HEADER_LEN..]);
        match outcome {
            Outcome::Silent => {}
            Outcome::Reply(body_len) => {
                self.reply.has_used(OUT_HEADER_LEN + body_len);
                self.send(&header, 0, body_len);
            }
            Outcome::Error(errno) => {
                self.reply.has_used(OUT_HEADER_LEN + header.most_of_reply(args));
                self.send(&header, -errno.raw(), 0);
            }
            Outcome::Later(rest) => {
                let answer = Answer::new(&self.device, &header);
                let worker = self.worker;
                worker.finish_and_tell(rest, move |done| answer.send(done), || self.wipe());
            }
        }
        if self.worker.is_cut_off() {
            self.wipe();
        }
    }

    fn send(&mut self, header: &Header, error: i32, body_len: usize) {
        let len = OUT_HEADER_LEN + body_len;
        send(&self.device, header, error, &mut self.reply.bytes[..len]);
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
