//! Requests and replies over io_uring (Linux 6.14): one system call answers a request and waits for
//! the next, on the CPU of whoever asked.
//!
//! The kernel keeps a queue for each CPU and gives a request to an entry of the queue of the CPU that
//! it was made on, that which was answered last if it can. A worker begins with one entry, and has
//! those of the requests that it answers. What only waits for a flush is answered by whoever flushes:
//! where many commit at a time he has their entries then, and serves their next requests without a
//! switch between them. No request waits behind another one that waits for something: who has several
//! entries hands such a request to somebody who has none ([`super::crew`]).
//!
//! The memory of an entry holds the request first and the reply afterwards. So an operation whose
//! request lies there writes its reply elsewhere; those replies are small. READ, whose are not, has
//! nothing there.
//!
//! An entry that ends while the mount is there leaves whoever waits for it waiting: see [`Promise`].

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use super::adapter::Outcome;
use super::crew::{Crew, Job, Told, Waiting};
use super::place::{Place, Requests};
use super::reply::Errno;
use super::wire::{Header, Reader};
use super::worker::{Buffer, MAX_WRITE, Worker, Workers};
use crate::error::{Context, Error, FsResult, Result};
use crate::sys;
use crate::sys::uring::{Entry, Ring};
use crate::vfs::{Attendance, PendingFlush};

/// Entries for each CPU: enough for as many commits to share a flush, and for those that wait for the
/// disk to leave others.
const PER_CPU: usize = 16;
/// A machine that would have more is better off with the device, unless it is told otherwise.
pub(super) const MANY: usize = 512;

/// Workers beside those that begin with an entry: two of the log's streams can each have one that
/// flushes and has none, and there is still somebody for whatever has to be handed over.
const SPARE: usize = 3;

/// The most entries that one worker has.
const MOST: usize = 16;

/// The largest reply to a request with names or data in it: an extended attribute (XATTR_SIZE_MAX).
const MAX_REPLY: usize = 64 * 1024;

/// How many entries this machine needs for a ring: `asked`, rounded up so that every queue has as
/// many, or if that is 0 what suits the machine.
pub(super) fn entries(asked: usize) -> Result<usize> {
    let cpus = possible_cpus()?;
    let each = if asked > 0 { asked.div_ceil(cpus) } else { PER_CPU };
    Ok(cpus * each)
}

/// How many workers serve so many entries.
pub(super) fn workers(entries: usize) -> usize {
    if entries > 0 { entries + SPARE } else { 0 }
}

/// Workers with a ring each, which the kernel does not know yet.
pub(super) struct Rings {
    waiting: Vec<Sender<Arc<OwnedFd>>>,
    registered: Receiver<io::Result<()>>,
}

impl Rings {
    /// Starts workers for so many entries, with numbers from `first` on. They end if this is dropped.
    ///
    /// Fails where this process gets no rings.
    pub(super) fn prepare(workers: &Arc<Workers>, first: usize, entries: usize) -> Result<Rings> {
        let cpus = possible_cpus()?;
        let count = self::workers(entries);
        let shared = Arc::new(Shared {
            crew: Arc::new(Crew::new(count, entries)),
            requests: (0..cpus).map(|_| Requests::default()).collect(),
        });
        let (ready, is_ready) = mpsc::channel();
        let (tell, registered) = mpsc::channel();
        let mut waiting = Vec::with_capacity(count);
        for index in 0..count {
            let (go, wait) = mpsc::channel();
            let (ready, tell) = (ready.clone(), tell.clone());
            let shared = Arc::clone(&shared);
            workers.start(first + index, format!("fuse-ring-{index}"), move |worker| {
                let prepared = Ring::new(MOST).and_then(|ring| {
                    Ok((ring, (index < entries).then(|| Entry::new(MAX_WRITE)).transpose()?))
                });
                // Nobody listens any more after the first failure.
                let (ring, entry) = match prepared {
                    Ok(prepared) => prepared,
                    Err(error) => return drop(ready.send(Err(error))),
                };
                let _ = ready.send(Ok(()));
                drop(ready);
                // The mount may do without.
                let Ok(device) = wait.recv() else { return };
                Server::new(worker, &shared, ring, index).run(entry, device, tell);
            })?;
            waiting.push(go);
        }
        // What a worker that has panicked does not say is an error below, and no wait for ever.
        drop(ready);
        for _ in 0..count {
            is_ready
                .recv()
                .unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
                .context(|| "cannot set up io_uring".into())?;
        }
        Ok(Rings { waiting, registered })
    }

    /// Gives them to the session of `device`, which has agreed on it; on return requests come to them.
    ///
    /// After an error the session cannot be used: the kernel may wait for a queue to get its entry, or
    /// have begun without those that failed.
    pub(super) fn register(self, device: &Arc<OwnedFd>) -> Result<()> {
        for go in &self.waiting {
            // A worker that has ended says nothing below.
            let _ = go.send(Arc::clone(device));
        }
        for _ in &self.waiting {
            self.registered
                .recv()
                .unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))
                .context(|| "the kernel refuses a queue of io_uring".into())?;
        }
        Ok(())
    }
}

/// What all workers have in common.
struct Shared {
    crew: Arc<Crew>,
    /// Of each CPU.
    requests: Vec<Requests>,
}

/// The kernel has a queue for each CPU that there can ever be.
fn possible_cpus() -> Result<usize> {
    const FILE: &str = "/sys/devices/system/cpu/possible";
    let list = fs::read_to_string(FILE).context(|| format!("cannot read {FILE}"))?;
    count_cpus(list.trim()).ok_or_else(|| {
        Error::io(format!("{FILE} makes no sense"), io::ErrorKind::InvalidData.into())
    })
}

/// `0-3,8-11`: eight.
fn count_cpus(list: &str) -> Option<usize> {
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        last.checked_sub(first).map(|more| more + 1)
    };
    list.split(',').map(range).sum()
}

/// A worker at its ring.
struct Server<'a> {
    worker: &'a Worker<'a>,
    shared: &'a Shared,
    ring: Ring,
    /// Among those of the ring.
    number: usize,
    place: Place,
    /// A flush that is to be seen to when no request is left that has arrived: what those have written
    /// is flushed with it.
    owed: Option<Attendance>,
    /// Requests served since it is owed.
    since_owed: usize,
    reply: Buffer,
}

impl<'a> Server<'a> {
    fn new(worker: &'a Worker<'a>, shared: &'a Shared, ring: Ring, number: usize) -> Server<'a> {
        let place = Place::new(number % shared.requests.len());
        Server {
            worker,
            shared,
            ring,
            number,
            place,
            owed: None,
            since_owed: 0,
            reply: Buffer::new(MAX_REPLY),
        }
    }

    fn run(&mut self, entry: Option<Entry>, device: Arc<OwnedFd>, tell: Sender<io::Result<()>>) {
        let registered = entry.map_or(Ok(()), |entry| {
            let queue = self.number % self.shared.requests.len();
            self.place.choose(queue, false);
            self.ring.register(entry, device, queue as u16)
        });
        let refused = registered.is_err();
        // Nobody listens any more after the first failure.
        let _ = tell.send(registered);
        drop(tell);
        if refused {
            return self.shared.crew.have_gone(1);
        }
        let promise = Promise;
        match self.serve() {
            Ok(()) => promise.kept(),
            Err(error) => log::error!("cannot serve requests by io_uring: {error}"),
        }
        self.wipe();
    }

    /// Until the mount is gone.
    fn serve(&mut self) -> io::Result<()> {
        loop {
            self.wipe_if_asked()?;
            self.shared.crew.have_gone(self.ring.take_gone());
            let enough = !self.ring.has_request() || self.since_owed >= MOST;
            if let Some(attendance) = self.owed.take_if(|_| enough) {
                self.hand_or_attend(attendance)?;
            } else if let Some(entry) = self.ring.next_request() {
                self.since_owed += 1;
                self.take(entry)?;
                // Whoever waits for the answer does not wait for what has arrived after it.
                if self.ring.has_request() {
                    self.ring.send()?;
                }
            } else if self.ring.is_empty() {
                let Some(job) = self.wait_for_job() else { return Ok(()) };
                match job {
                    Job::Serve(entry) => self.handle(entry)?,
                    Job::Attend(attendance) => self.attend(attendance)?,
                    Job::Answer => self.answer_told()?,
                }
            } else {
                self.worker.waiting(|| self.ring.wait())?;
            }
        }
    }

    fn wipe_if_asked(&mut self) -> io::Result<()> {
        let asked = self.worker.has_to_wipe();
        if asked.is_some() || self.worker.is_cut_off() {
            // What the last reply is made of goes when the kernel has it, and not before.
            self.ring.send()?;
            let wiped = self.wipe();
            if let Some(asked) = asked.filter(|_| wiped) {
                self.worker.has_wiped(asked);
            }
        }
        Ok(())
    }

    fn wait_for_job(&mut self) -> Option<Job> {
        self.wipe();
        // Whoever has something to do may be busy on any CPU.
        self.place.leave();
        self.worker.set_clean(true);
        let job = self.shared.crew.wait_for_job(self.number);
        self.worker.set_clean(false);
        job
    }

    /// A request that has arrived here.
    fn take(&mut self, mut entry: Entry) -> io::Result<()> {
        let queue = entry.queue();
        let Some(request) = entry.request() else { return Ok(()) };
        let Some(header) = Header::parse(request.header) else { return self.handle(entry) };
        let args = Reader::new(request.fixed, &[]);
        let alone = self.ring.is_empty() && self.owed.is_none();
        let quick = alone || self.worker.is_quick(&header, args);
        let thread = header.caller.pid;
        let parallel = self.shared.requests.get(queue).is_some_and(|requests| {
            requests.are_parallel(thread, self.number as u32) || self.ring.has_request()
        });
        self.place.choose(queue, parallel);
        if quick {
            return self.handle(entry);
        }
        // Who gets it has said that he has nothing to overwrite.
        entry.overwrite();
        match self.shared.crew.hand(Job::Serve(entry)) {
            Err(Job::Serve(entry)) => {
                self.ring.send()?;
                self.handle(entry)
            }
            _ => Ok(()),
        }
    }

    /// Serves a request.
    fn handle(&mut self, mut entry: Entry) -> io::Result<()> {
        let Some(request) = entry.request() else { return Ok(()) };
        let (payload, request_len) = (request.payload, request.payload_len);
        let header = Header::parse(request.header);
        let most = header.map_or(0, |header| header.most_of_reply(Reader::new(request.fixed, &[])));
        let outcome = match header {
            None => Outcome::Error(Errno::IO),
            Some(header) if request_len == 0 => {
                self.worker.serve(&header, Reader::new(request.fixed, &[]), payload)
            }
            Some(header) => {
                let args = Reader::new(request.fixed, &payload[..request_len]);
                let outcome = self.worker.serve(&header, args, &mut self.reply.bytes);
                if let Outcome::Reply(len) = outcome {
                    payload[..len].copy_from_slice(&self.reply.bytes[..len]);
                    self.reply.has_used(len);
                }
                outcome
            }
        };
        match outcome {
            Outcome::Reply(len) => self.ring.answer(entry, 0, len),
            Outcome::Silent => self.ring.answer(entry, 0, 0),
            Outcome::Error(errno) => {
                if request_len == 0 {
                    entry.has_used(most);
                } else {
                    self.reply.has_used(most);
                }
                self.ring.answer(entry, -errno.raw(), 0)
            }
            Outcome::Later(rest) => self.leave(entry, rest),
        }
    }

    /// What only waits for a flush waits without a worker.
    fn leave(&mut self, mut entry: Entry, rest: PendingFlush) -> io::Result<()> {
        // No worker that is to overwrite its memory will find it.
        entry.overwrite_all();
        let waiting = Waiting::new(&self.shared.crew, entry);
        let errno = self.worker.adapter().errno();
        let tell = move |done: FsResult<()>| {
            waiting.tell(done.map_err(|error| errno.pick(&error)));
        };
        match self.worker.leave(rest, tell) {
            Some(attendance) => {
                self.since_owed = 0;
                // That of another stream goes first.
                self.owed.replace(attendance).map_or(Ok(()), |other| self.hand_or_attend(other))
            }
            None => self.answer_told(),
        }
    }

    fn hand_or_attend(&mut self, attendance: Attendance) -> io::Result<()> {
        if self.ring.is_empty() {
            return self.attend(attendance);
        }
        match self.shared.crew.hand(Job::Attend(attendance)) {
            Err(Job::Attend(attendance)) => self.attend(attendance),
            _ => Ok(()),
        }
    }

    /// Flushes, or waits for who does, until nobody waits for it any more or somebody else goes on.
    fn attend(&mut self, attendance: Attendance) -> io::Result<()> {
        let mut attendance = Some(attendance);
        while let Some(attends) = attendance.take() {
            self.ring.send()?;
            let worker = self.worker;
            attendance = worker.attend(attends, || self.wipe());
            self.answer_told()?;
            if let Some(attends) = attendance.take_if(|_| !self.ring.is_empty()) {
                match self.shared.crew.hand(Job::Attend(attends)) {
                    Err(Job::Attend(attends)) => attendance = Some(attends),
                    _ => return Ok(()),
                }
            }
        }
        Ok(())
    }

    /// Their entries wait here from now on.
    fn answer_told(&mut self) -> io::Result<()> {
        for Told { entry, done } in self.shared.crew.take_told(self.ring.room()) {
            self.ring.answer(entry, done.map_or_else(|errno| -errno.raw(), |()| 0), 0)?;
        }
        self.ring.send()
    }

    /// All but requests that are there and were not served yet. False, with nothing overwritten of the
    /// payloads, while a reply in one of them was not sent.
    fn wipe(&mut self) -> bool {
        let wiped = self.ring.overwrite();
        self.reply.wipe();
        // The ciphers spill what they work on.
        sys::stack::burn();
        wiped
    }
}

/// That a queue has its entry for as long as the mount is there. Who waits for one that has ended can
/// not even be killed, and no other transport can take its place: so if the promise is broken, the
/// daemon ends, and with it the mount. The guard then does what it does whenever the daemon dies.
struct Promise;

impl Promise {
    fn kept(self) {
        std::mem::forget(self);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        log::error!("requests would wait for ever: the daemon ends");
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn possible_cpus_are_counted() {
        assert_eq!(count_cpus("0"), Some(1));
        assert_eq!(count_cpus("0-3"), Some(4));
        assert_eq!(count_cpus("0-3,8-11,15"), Some(9));
        assert_eq!(count_cpus("3-0"), None);
        assert_eq!(count_cpus(""), None);
        assert_eq!(count_cpus("all"), None);
    }

    #[test]
    fn each_cpu_has_as_many_entries() {
        let cpus = possible_cpus().unwrap();
        assert_eq!(entries(1).unwrap(), cpus);
        assert_eq!(entries(cpus * 3).unwrap(), cpus * 3);
        assert_eq!(entries(0).unwrap(), cpus * PER_CPU);
    }
}
