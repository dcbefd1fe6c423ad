//! Requests and replies over io_uring (Linux 6.14): one system call answers a request and waits for
//! the next, on the CPU of whoever asked.
//!
//! The kernel keeps a queue for each CPU and gives a request to an entry of the queue of the CPU that
//! it was made on. A worker has one entry: with more of them, a request would wait behind another one
//! that this worker is at, while other workers have nothing to do.
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
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::adapter::Outcome;
use super::reply::Errno;
use super::wire::{Header, Reader};
use super::worker::{Buffer, MAX_WRITE, Worker, Workers};
use crate::error::{Context, Error, Result};
use crate::sys;
use crate::sys::uring::{self, Waited};

/// Workers for each CPU: enough for as many commits to share a flush, and for those that wait for the
/// disk to leave others.
const PER_CPU: usize = 16;
/// A machine that would have more is better off with the device, unless it is told otherwise.
pub(super) const MANY: usize = 512;

/// After as many requests that were not made beside others, a worker is back on its queue's CPU.
const SINGLE: usize = 64;

/// The largest reply to a request with names or data in it: an extended attribute (XATTR_SIZE_MAX).
const MAX_REPLY: usize = 64 * 1024;

/// How many workers this machine needs for a ring: `asked`, rounded up so that every queue has as
/// many, or if that is 0 what suits the machine.
pub(super) fn workers(asked: usize) -> Result<usize> {
    let cpus = possible_cpus()?;
    let each = if asked > 0 { asked.div_ceil(cpus) } else { PER_CPU };
    Ok(cpus * each)
}

/// Workers with a ring each, which the kernel does not know yet.
pub(super) struct Rings {
    waiting: Vec<Sender<Arc<OwnedFd>>>,
    registered: Receiver<io::Result<()>>,
}

impl Rings {
    /// Starts `count` workers, with numbers from `first` on. They end if this is dropped.
    ///
    /// Fails where this process gets no rings.
    pub(super) fn prepare(workers: &Arc<Workers>, first: usize, count: usize) -> Result<Rings> {
        let queues: Vec<_> = (0..possible_cpus()?).map(|cpu| Arc::new(Queue::new(cpu))).collect();
        let (ready, is_ready) = mpsc::channel();
        let (tell, registered) = mpsc::channel();
        let mut waiting = Vec::with_capacity(count);
        for index in 0..count {
            let (go, wait) = mpsc::channel();
            let (ready, tell) = (ready.clone(), tell.clone());
            let queue = Arc::clone(&queues[index % queues.len()]);
            workers.start(first + index, format!("fuse-ring-{index}"), move |worker| {
                // Nobody listens any more after the first failure.
                let entry = match uring::Entry::new(MAX_WRITE) {
                    Ok(entry) => entry,
                    Err(error) => return drop(ready.send(Err(error))),
                };
                let _ = ready.send(Ok(()));
                drop(ready);
                // The mount may do without.
                let Ok(device) = wait.recv() else { return };
                Entry::new(worker, entry, &queue, index as u32).run(device, tell);
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

/// What the workers of a CPU share.
struct Queue {
    cpu: usize,
    /// Who made the last request, and which worker got it.
    last: AtomicU64,
}

impl Queue {
    fn new(cpu: usize) -> Queue {
        Queue { cpu, last: AtomicU64::new(0) }
    }

    /// Whether one thread makes its requests side by side: the one before this was made by the same
    /// thread, and got by another worker. The kernel prefers the worker that was the last to answer.
    fn is_parallel(&self, thread: u32, worker: u32) -> bool {
        let last = self.last.swap(u64::from(thread) << 32 | u64::from(worker), Ordering::Relaxed);
        (last >> 32) as u32 == thread && last as u32 != worker
    }
}

/// Which CPUs a worker runs on. Its queue's own: a request is then served where whoever waits for it
/// has just gone to sleep, and no other CPU has to be woken for it. But one thread with many requests
/// under way, by native AIO, would have them all served by one CPU: then any of them.
struct Place {
    own: CpuSet,
    any: CpuSet,
    on_own: bool,
    /// Requests since the last that was made beside another one.
    single: usize,
}

impl Place {
    fn new(cpu: usize) -> Place {
        let any = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
        let mut own = CpuSet::new();
        // Otherwise it is not one that this process may use, or not there.
        if cpu < CpuSet::MAX_CPU && any.is_set(cpu) {
            own.set(cpu);
        } else {
            own = any;
        }
        Place { own, any, on_own: false, single: SINGLE }
    }

    fn choose(&mut self, parallel: bool) {
        self.single = if parallel { 0 } else { self.single.saturating_add(1) };
        let on_own = self.single > if self.on_own { 0 } else { SINGLE };
        if on_own != self.on_own {
            self.on_own = on_own;
            let cpus = if on_own { &self.own } else { &self.any };
            if let Err(error) = sched_setaffinity(None, cpus) {
                log::debug!("the CPUs of a worker cannot be chosen: {error}");
            }
        }
    }
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

struct Entry<'a> {
    worker: &'a Worker<'a>,
    entry: uring::Entry,
    queue: &'a Queue,
    /// Among all workers.
    number: u32,
    place: Place,
    /// How much of the entry's payload has held something since it was last overwritten.
    used: usize,
    reply: Buffer,
}

impl<'a> Entry<'a> {
    fn new(
        worker: &'a Worker<'a>,
        entry: uring::Entry,
        queue: &'a Queue,
        number: u32,
    ) -> Entry<'a> {
        let place = Place::new(queue.cpu);
        Entry { worker, entry, queue, number, place, used: 0, reply: Buffer::new(MAX_REPLY) }
    }

    fn run(&mut self, device: Arc<OwnedFd>, tell: Sender<io::Result<()>>) {
        self.place.choose(false);
        let registered = self.entry.register(device, self.queue.cpu as u16);
        let refused = registered.is_err();
        // Nobody listens any more after the first failure.
        let _ = tell.send(registered);
        drop(tell);
        if refused {
            return;
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
            let asked = self.worker.has_to_wipe();
            if asked.is_some() || self.worker.is_cut_off() {
                // What the last reply is made of goes when the kernel has it, and not before.
                self.entry.send()?;
                let wiped = self.wipe();
                if let Some(asked) = asked.filter(|_| wiped) {
                    self.worker.has_wiped(asked);
                }
            }
            match self.worker.waiting(|| self.entry.wait())? {
                Waited::Request => self.handle()?,
                Waited::Nothing => {}
                Waited::Gone => return Ok(()),
            }
        }
    }

    /// Serves the request that is there.
    fn handle(&mut self) -> io::Result<()> {
        let Some(request) = self.entry.request() else { return Ok(()) };
        let (payload, request_len) = (request.payload, request.payload_len);
        let header = Header::parse(request.header);
        if let Some(header) = &header {
            self.place.choose(self.queue.is_parallel(header.caller.pid, self.number));
        }
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
        self.used = self.used.max(request_len);
        let (error, reply_len) = match outcome {
            Outcome::Reply(len) => (0, len),
            Outcome::Silent => (0, 0),
            Outcome::Error(errno) => {
                if request_len == 0 {
                    self.used = self.used.max(most.min(MAX_WRITE));
                } else {
                    self.reply.has_used(most);
                }
                (-errno.raw(), 0)
            }
            Outcome::Later(rest) => {
                let worker = self.worker;
                let wipe = || {
                    self.wipe();
                };
                let done = worker.finish(rest, wipe);
                (done.map_or_else(|errno| -errno.raw(), |()| 0), 0)
            }
        };
        self.used = self.used.max(reply_len);
        self.entry.commit(error, reply_len)
    }

    /// All but a request that is there and was not served yet. False, with nothing overwritten of the
    /// payload, while a reply in it was not sent.
    fn wipe(&mut self) -> bool {
        let keep = self.entry.request().map_or(0, |request| request.payload_len);
        let wiped = self.entry.overwrite(keep..self.used);
        if wiped {
            self.used = keep;
        }
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
    fn a_worker_leaves_its_cpu_when_there_is_much_to_do_and_comes_back() {
        let mut place = Place::new(0);
        place.choose(false);
        assert!(place.on_own);
        place.choose(true);
        assert!(!place.on_own);
        for _ in 0..SINGLE {
            place.choose(false);
            assert!(!place.on_own);
        }
        place.choose(false);
        assert!(place.on_own);
        sched_setaffinity(None, &place.any).unwrap();
    }

    #[test]
    fn requests_are_parallel_where_one_thread_has_several_workers() {
        let queue = Queue::new(0);
        assert!(!queue.is_parallel(7, 1));
        assert!(!queue.is_parallel(7, 1));
        assert!(!queue.is_parallel(8, 2));
        assert!(!queue.is_parallel(7, 1));
        assert!(queue.is_parallel(7, 2));
    }

    #[test]
    fn each_cpu_has_as_many_workers() {
        let cpus = possible_cpus().unwrap();
        assert_eq!(workers(1).unwrap(), cpus);
        assert_eq!(workers(cpus * 3).unwrap(), cpus * 3);
        assert_eq!(workers(0).unwrap(), cpus * PER_CPU);
    }
}
