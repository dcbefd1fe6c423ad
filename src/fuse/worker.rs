//! The threads that serve, whichever way requests come to them: [`dev`](super::dev),
//! [`ring`](super::ring).
//!
//! What a worker reads requests into and puts replies together in holds plaintext. It overwrites that
//! when asked to ([`Workers::wipe`]), and after every request that it refuses while the volume is cut
//! off.

use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno as OsErrno;
use zeroize::Zeroize;

use super::adapter::{Adapter, Outcome};
use super::reply::Errno;
use super::wire::{Header, Reader};
use crate::error::{Context, FsResult, Result};
use crate::sync::{Condvar, Mutex};
use crate::sys::fuse::Waiter;
use crate::vfs::PendingFlush;

/// The largest write that is asked for, and so the largest request but for its header.
pub(super) const MAX_WRITE: usize = 1 << 20;

/// What the workers of one session share.
#[derive(Debug)]
pub(super) struct Workers {
    adapter: Adapter,
    /// Counts the wipes that were asked for.
    wipes: AtomicU64,
    states: Vec<State>,
    running: Mutex<usize>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Set as the worker starts.
    waiter: OnceLock<Waiter>,
    /// Waits for a request or a flush, or is about to.
    idle: AtomicBool,
    running: AtomicBool,
    wiped: AtomicU64,
    /// There is nothing to overwrite, until this worker says otherwise.
    clean: AtomicBool,
}

impl Workers {
    /// Room for `count` of them.
    pub(super) fn new(adapter: Adapter, count: usize) -> Arc<Workers> {
        Arc::new(Workers {
            adapter,
            wipes: AtomicU64::new(0),
            states: (0..count).map(|_| State::default()).collect(),
            running: Mutex::new(0),
            ended: Condvar::new(),
        })
    }

    /// Starts the worker with the number `index`, which has not been started before.
    pub(super) fn start(
        self: &Arc<Self>,
        index: usize,
        name: String,
        run: impl FnOnce(&Worker<'_>) + Send + 'static,
    ) -> Result<()> {
        *self.running.lock() += 1;
        self.states[index].running.store(true, Ordering::SeqCst);
        let shared = Arc::clone(self);
        let started = thread::Builder::new().name(name).spawn(move || {
            let worker = Worker { workers: &shared, state: &shared.states[index] };
            // Only this thread sets it.
            let _ = worker.state.waiter.set(Waiter::current());
            run(&worker);
        });
        if started.is_err() {
            self.count_out(&self.states[index]);
        }
        started.map(drop).context(|| "cannot start a worker thread".into())
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

    /// Has every worker overwrite its memory; false if one does not come to it in time.
    pub(super) fn wipe(&self, limit: Instant) -> bool {
        let asked = self.wipes.fetch_add(1, Ordering::SeqCst) + 1;
        loop {
            let mut left = false;
            for state in &self.states {
                if !state.running.load(Ordering::SeqCst)
                    || state.clean.load(Ordering::SeqCst)
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

    fn count_out(&self, state: &State) {
        state.running.store(false, Ordering::SeqCst);
        *self.running.lock() -= 1;
        self.ended.notify_all();
    }
}

/// One of them, in its own thread.
#[derive(Debug)]
pub(super) struct Worker<'a> {
    workers: &'a Workers,
    state: &'a State,
}

impl Worker<'_> {
    pub(super) fn adapter(&self) -> &Adapter {
        &self.workers.adapter
    }

    /// To be called before every wait: whether this worker's memory is to be overwritten, and if so,
    /// what to tell [`Worker::has_wiped`] afterwards.
    pub(super) fn has_to_wipe(&self) -> Option<u64> {
        let asked = self.workers.wipes.load(Ordering::SeqCst);
        (self.state.wiped.load(Ordering::SeqCst) < asked).then_some(asked)
    }

    pub(super) fn has_wiped(&self, asked: u64) {
        self.state.wiped.store(asked, Ordering::SeqCst);
    }

    /// A system call that waits for a request, and that a signal ends.
    pub(super) fn waiting<T>(&self, call: impl FnOnce() -> T) -> T {
        self.state.idle.store(true, Ordering::SeqCst);
        let waited = call();
        self.state.idle.store(false, Ordering::SeqCst);
        waited
    }

    /// There is nothing to overwrite; to be taken back before the next wait.
    pub(super) fn set_clean(&self, clean: bool) {
        self.state.clean.store(clean, Ordering::SeqCst);
    }

    /// Serves one request; the reply, without its header, is at the start of `out`.
    pub(super) fn serve(&self, header: &Header, args: Reader<'_>, out: &mut [u8]) -> Outcome {
        // No lock is left behind by a panic: each is released as the stack unwinds, and none is poisoned.
        let served = || self.adapter().serve(header, args, out);
        panic::catch_unwind(AssertUnwindSafe(served)).unwrap_or_else(|_| {
            log::error!("request {} on node {} panicked", header.opcode, header.node);
            Outcome::Error(Errno::IO)
        })
    }

    /// What is left of a request that only waits for a flush; `wipe` overwrites this worker's memory.
    pub(super) fn finish(
        &self,
        rest: PendingFlush,
        wipe: impl FnMut(),
    ) -> std::result::Result<(), Errno> {
        let done = self.flushing(wipe, |pause| rest.wait_with_pauses(pause));
        let done = done.unwrap_or_else(|| Err(OsErrno::IO.into()));
        done.map_err(|error| self.adapter().errno().pick(&error))
    }

    /// The same, of which `tell` is told, by this worker or another.
    pub(super) fn finish_and_tell(
        &self,
        rest: PendingFlush,
        tell: impl FnOnce(std::result::Result<(), Errno>) + Send + 'static,
        wipe: impl FnMut(),
    ) {
        let errno = self.adapter().errno();
        let tell = move |done: FsResult<()>| tell(done.map_err(|error| errno.pick(&error)));
        let _ = self.flushing(wipe, |pause| rest.then(tell, pause));
    }

    /// A flush may take as long as the disk does, and a cut-off shall not wait for it: this worker's
    /// memory is overwritten meanwhile when that is asked for, and before a flush that this worker does
    /// itself, which nothing interrupts. None after a panic.
    fn flushing<T>(
        &self,
        mut wipe: impl FnMut(),
        wait: impl FnOnce(&mut dyn FnMut()) -> T,
    ) -> Option<T> {
        let mut pause = || {
            if !self.state.clean.load(Ordering::SeqCst) {
                wipe();
                self.set_clean(true);
            }
        };
        let wait = AssertUnwindSafe(|| wait(&mut pause));
        let done = self.waiting(|| panic::catch_unwind(wait));
        self.set_clean(false);
        done.inspect_err(|_| log::error!("a request that waited for a flush panicked")).ok()
    }

    /// What the request just served has left must be overwritten.
    pub(super) fn is_cut_off(&self) -> bool {
        self.adapter().filesystem().check_open().is_err()
    }
}

impl Drop for Worker<'_> {
    fn drop(&mut self) {
        self.workers.count_out(self.state);
    }
}

/// Memory that remembers how much of it has been used since it was last overwritten.
pub(super) struct Buffer {
    pub(super) bytes: Vec<u8>,
    used: usize,
}

impl Buffer {
    pub(super) fn new(len: usize) -> Buffer {
        Buffer { bytes: vec![0; len], used: 0 }
    }

    pub(super) fn has_used(&mut self, len: usize) {
        self.used = self.used.max(len).min(self.bytes.len());
    }

    pub(super) fn wipe(&mut self) {
        self.bytes[..self.used].zeroize();
        self.used = 0;
    }
}
