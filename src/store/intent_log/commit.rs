//! Group commit: the first who waits writes, or flushes, for all who wait.
//!
//! Nobody holds the lock during I/O. A leader takes every record that is ready and lies without a
//! gap, writes them with one call, and tells the others; whoever came meanwhile finds the next
//! leader among them. The same again for the flush, which covers all that was written before it
//! began; for that one can also wait without a thread ([`super::pending`]).

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use rustix::io::Errno;

use super::queue::{Goal, Queue, Role};
use super::{Log, Position, Room, STREAMS, Stream};
use crate::backing::FileRef;
use crate::error::{FsError, FsResult};
use crate::store::sleeper::Sleeper;
use crate::sync::{Condvar, MutexGuard};

#[derive(Debug)]
pub(super) struct Streams {
    pub(in crate::store) queues: [Queue; STREAMS],
    poison: Option<String>,
}

impl Streams {
    pub(super) fn new(queues: [Queue; STREAMS]) -> Streams {
        Streams { queues, poison: None }
    }

    /// Never EROFS: MySQL takes that for success when it is the answer to fsync(2), and then
    /// acknowledges commits that nobody has.
    pub(super) fn check(&self) -> FsResult<()> {
        if self.poison.is_some() { Err(Errno::IO.into()) } else { Ok(()) }
    }
}

/// A place in the queue that has to be filled: if its owner is lost, so is the sequence.
pub(super) struct Slot<'a> {
    log: &'a Log,
    index: usize,
    seq: u64,
    filled: bool,
}

impl<'a> Slot<'a> {
    pub(super) fn new(log: &'a Log, index: usize, seq: u64) -> Slot<'a> {
        Slot { log, index, seq, filled: false }
    }

    pub(super) fn fill(mut self, head: Vec<u8>, body: Vec<u8>) {
        let mut streams = self.log.streams.lock();
        let queue = &mut streams.queues[self.index];
        if queue.fill(self.seq, [head, body]) {
            queue.wake(Role::Write);
        }
        self.filled = true;
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        if !self.filled {
            let lost = io::Error::other("a record was never finished");
            self.log.poison(self.index, "a request was interrupted", &lost);
        }
    }
}

impl Log {
    /// Returns when the record is in the kernel's hands: it survives this process.
    pub(in crate::store) fn wait_written(&self, position: &Position) -> FsResult<()> {
        self.write_until(position.stream as usize, position.seq + 1)
    }

    /// Returns when the record with that number, and all before it in its stream, is on the device,
    /// perhaps in its cache. Blocks that records only name are the caller's business.
    pub(in crate::store) fn write_out_through(&self, stream: Stream, seq: u64) -> FsResult<()> {
        self.write_out_until(stream as usize, seq + 1)
    }

    /// Whether records name blocks in this home file that no flush has covered yet.
    pub(in crate::store) fn owes_flush_of(&self, home: &FileRef) -> bool {
        let streams = self.streams.lock();
        streams.queues.iter().any(|queue| queue.owes_flush_of(Some(home)))
    }

    /// Returns when the record with that number, and all before it in its stream, is on stable
    /// storage.
    pub(in crate::store) fn flush_through(&self, stream: Stream, seq: u64) -> FsResult<()> {
        self.flush_until(stream as usize, seq + 1)
    }

    /// Everything appended so far is on stable storage afterwards. Needs no key.
    pub(in crate::store) fn flush(&self) -> FsResult<()> {
        for index in 0..STREAMS {
            let next = self.streams.lock().queues[index].ring.next_seq();
            self.flush_until(index, next)?;
        }
        Ok(())
    }

    /// Waits until the stream has room for a record of `pages`, or `give_up` says why not to wait. It
    /// is asked again whenever something changes, and by [`Log::wake`]. Nobody may wait here who
    /// holds what the space's release depends on.
    pub(in crate::store) fn reserve(
        self: &Arc<Self>,
        stream: Stream,
        pages: u64,
        give_up: impl Fn() -> FsResult<()>,
    ) -> FsResult<Room> {
        let index = stream as usize;
        let mut streams = self.streams.lock();
        loop {
            streams.check()?;
            if streams.queues[index].ring.reserve(pages) {
                return Ok(Room { log: self.clone(), stream, pages });
            }
            MutexGuard::unlocked(&mut streams, &give_up)?;
            self.space[index].wait_for(&mut streams, std::time::Duration::from_secs(1));
        }
    }

    pub(super) fn unreserve(&self, stream: Stream, pages: u64) {
        if pages > 0 {
            self.streams.lock().queues[stream as usize].ring.unreserve(pages);
            self.space[stream as usize].notify_all();
        }
    }

    /// Makes everyone who waits for room ask again whether to give up.
    pub(in crate::store) fn wake(&self) {
        self.space.iter().for_each(Condvar::notify_all);
    }

    /// EIO once the log has failed.
    pub(in crate::store) fn check(&self) -> FsResult<()> {
        self.streams.lock().check()
    }

    /// Why the log takes nothing more, if so.
    pub(in crate::store) fn poisoned(&self) -> Option<String> {
        self.streams.lock().poison.clone()
    }

    /// Writes until every record before `seq` is in the kernel's hands.
    pub(super) fn write_until(&self, index: usize, seq: u64) -> FsResult<()> {
        let mut streams = self.streams.lock();
        loop {
            if streams.queues[index].written >= seq {
                return Ok(());
            }
            streams.check()?;
            let queue = &mut streams.queues[index];
            if queue.writing || !queue.is_ready() {
                sleep(&mut streams, index, Goal { role: Role::Write, before: seq });
                continue;
            }
            queue.writing = true;
            let (at, batch, last) = queue.take_batch();
            let result = leading(&mut streams, || {
                let parts: Vec<&[u8]> = batch.iter().flatten().map(|part| &part[..]).collect();
                self.files[index].write_parts_at(&parts, at)
            });
            let queue = &mut streams.queues[index];
            queue.writing = false;
            match result {
                Ok(()) => queue.written = last + 1,
                Err(error) => {
                    self.poison_locked(&mut streams, index, "a record cannot be written", &error);
                }
            }
            streams.queues[index].wake(Role::Write);
        }
    }

    fn flush_until(&self, index: usize, seq: u64) -> FsResult<()> {
        self.write_until(index, seq)?;
        let mut streams = self.streams.lock();
        loop {
            if streams.queues[index].durable >= seq {
                return Ok(());
            }
            streams.check()?;
            self.flush_or_wait(&mut streams, index, seq);
        }
    }

    /// Flushes the stream, or waits for who is at it: until records before `seq` are on stable
    /// storage, or it is this thread's turn.
    pub(super) fn flush_or_wait(
        &self,
        streams: &mut MutexGuard<'_, Streams>,
        index: usize,
        seq: u64,
    ) {
        let queue = &mut streams.queues[index];
        if queue.flushing {
            sleep(streams, index, Goal { role: Role::Flush, before: seq });
            return;
        }
        queue.flushing = true;
        let covered = queue.written;
        let homes = queue.homes_before(covered);
        let result = leading(streams, || {
            homes.iter().try_for_each(|home| home.sync_data())?;
            self.syncs[index].flush(|| self.files[index].sync_data())
        });
        let queue = &mut streams.queues[index];
        queue.flushing = false;
        match result {
            // What has failed meanwhile may have been told to another, and not to this flush.
            Ok(()) if streams.poison.is_some() => {}
            Ok(()) => {
                let queue = &mut streams.queues[index];
                queue.durable = queue.durable.max(covered);
                queue.homes_are_durable(covered);
            }
            Err(error) => {
                self.poison_locked(streams, index, "the log cannot be flushed", &error);
            }
        }
        streams.queues[index].wake(Role::Flush);
    }

    fn write_out_until(&self, index: usize, seq: u64) -> FsResult<()> {
        self.write_until(index, seq)?;
        let mut streams = self.streams.lock();
        loop {
            let queue = &mut streams.queues[index];
            let from = queue.on_device.max(queue.durable);
            if from >= seq {
                return Ok(());
            }
            streams.check()?;
            let queue = &mut streams.queues[index];
            if queue.writing_out {
                sleep(&mut streams, index, Goal { role: Role::WriteOut, before: seq });
                continue;
            }
            queue.writing_out = true;
            let covered = queue.written;
            let ranges = queue.ring.ranges(from, covered);
            let result = leading(&mut streams, || {
                let file = &self.files[index];
                let write = || ranges.iter().try_for_each(|&(at, len)| file.write_out(at, len));
                self.syncs[index].write_out(write)
            });
            let queue = &mut streams.queues[index];
            queue.writing_out = false;
            match result {
                Ok(()) if streams.poison.is_some() => {}
                Ok(()) => {
                    let queue = &mut streams.queues[index];
                    queue.on_device = queue.on_device.max(covered);
                }
                Err(error) => {
                    let what = "a record cannot be written out";
                    self.poison_locked(&mut streams, index, what, &error);
                }
            }
            streams.queues[index].wake(Role::WriteOut);
        }
    }

    /// Somebody else's flush of a home file, or with None of all, has failed. The kernel may tell of
    /// it once: what went there directly and was not flushed before must not count as durable by a
    /// later flush that knows nothing of it.
    pub(in crate::store) fn home_failed(&self, home: Option<&FileRef>, error: &io::Error) {
        let mut streams = self.streams.lock();
        for index in 0..STREAMS {
            if streams.queues[index].owes_flush_of(home) {
                let what = "blocks that went home directly cannot be flushed";
                self.poison_locked(&mut streams, index, what, error);
            }
        }
    }

    /// A flush of something else that nobody will write again has failed.
    pub(crate) fn flush_failed(&self, what: &str, error: &io::Error) {
        self.poison_because(&mut self.streams.lock(), format!("{what}: {error}"));
    }

    pub(super) fn poison(&self, index: usize, what: &str, error: &io::Error) -> FsError {
        self.poison_locked(&mut self.streams.lock(), index, what, error);
        Errno::IO.into()
    }

    fn poison_locked(&self, streams: &mut Streams, index: usize, what: &str, error: &io::Error) {
        let file = String::from_utf8_lossy(super::FILES[index]);
        self.poison_because(streams, format!("{file}: {what}: {error}"));
    }

    fn poison_because(&self, streams: &mut Streams, reason: String) {
        log::error!("{reason}; writes fail until the volume is mounted again");
        streams.poison.get_or_insert(reason);
        for queue in &mut streams.queues {
            queue.wake_all();
        }
        self.space.iter().for_each(Condvar::notify_all);
    }
}

/// Waits until [`Queue::wake`] finds this thread, or the log fails.
fn sleep(streams: &mut MutexGuard<'_, Streams>, index: usize, goal: Goal) {
    let sleeper = Sleeper::mine();
    streams.queues[index].falls_asleep(goal, sleeper.clone());
    sleeper.sleep(streams);
    streams.queues[index].woken(&sleeper);
}

/// I/O for all who wait, without the lock. A panic in it is a failure like any other: those who
/// wait must not wait for ever.
fn leading(
    streams: &mut MutexGuard<'_, Streams>,
    io: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let done = MutexGuard::unlocked(streams, || catch_unwind(AssertUnwindSafe(io)));
    done.unwrap_or_else(|_| Err(io::Error::other("the request that was to do it panicked")))
}
