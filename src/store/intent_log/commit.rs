//! Group commit: the first who waits writes, or flushes, for all who wait.
//!
//! Nobody holds the lock during I/O. A leader takes every record that is ready and lies without a
//! gap, writes them with one call, and wakes the others; whoever came meanwhile finds the next
//! leader among them ([`super::rounds`]). The same again for the flush, which covers all that was
//! written before it began; for that one can also wait without a thread ([`super::pending`]).

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::queue::Queue;
use super::rounds::Role;
use super::{Log, Position, Room, STREAMS, Scope, Stream};
use crate::backing::NodeId;
use crate::error::FsResult;
use crate::sync::{Condvar, MutexGuard};

/// That the records of a stream before `before` have come as far as that role brings them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Goal {
    pub(super) index: usize,
    pub(super) role: Role,
    pub(super) before: u64,
}

#[derive(Debug)]
pub(super) struct Streams {
    pub(in crate::store) queues: [Queue; STREAMS],
    poison: Option<String>,
    /// Flushes of home files that failed, whether or not the log did by that.
    pub(super) home_failures: u64,
}

impl Streams {
    pub(super) fn new(queues: [Queue; STREAMS]) -> Streams {
        Streams { queues, poison: None, home_failures: 0 }
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
        let next = {
            let mut streams = self.log.streams.lock();
            let queue = &mut streams.queues[self.index];
            let first = queue.fill(self.seq, [head, body]);
            (first && queue.is_free(Role::Write)).then(|| queue.rounds(Role::Write).next())
        };
        self.filled = true;
        if let Some(next) = next {
            self.log.progress[self.index].signal(Role::Write, next).wake_one();
        }
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
        let index = position.stream as usize;
        self.until(Goal { index, role: Role::Write, before: position.seq + 1 }, &mut || {})
    }

    /// Returns when the record with that number, and all before it in its stream, is on the device,
    /// perhaps in its cache. Blocks that records only name are the caller's business.
    pub(in crate::store) fn write_out_through(&self, stream: Stream, seq: u64) -> FsResult<()> {
        let (index, before) = (stream as usize, seq + 1);
        [Role::Write, Role::WriteOut]
            .into_iter()
            .try_for_each(|role| self.until(Goal { index, role, before }, &mut || {}))
    }

    /// Begins to write the record out, which was appended just now, where that would not keep others:
    /// its flush, which is expected soon, then finds most of it done.
    pub(in crate::store) fn start_write_out(&self, position: &Position) {
        let index = position.stream as usize;
        let ranges = {
            let streams = self.streams.lock();
            let queue = &streams.queues[index];
            // One that runs is followed by one for all that came meanwhile, in one piece.
            if !queue.is_free(Role::Flush) || !queue.is_free(Role::WriteOut) {
                return;
            }
            queue.ring.ranges(position.seq, position.seq + 1)
        };
        let file = &self.files[index];
        let started = ranges.iter().try_for_each(|&(at, len)| file.start_write_out(at, len));
        if let Err(error) = started {
            self.poison(index, "a record cannot be written out", &error);
        }
    }

    /// Whether records name blocks in this home file that no flush has covered yet.
    pub(in crate::store) fn owes_flush_of(&self, home: NodeId) -> bool {
        let streams = self.streams.lock();
        streams.queues.iter().any(|queue| queue.owes_flush_of(Some(home)))
    }

    /// Returns when the record with that number, and all before it in its stream, is on stable
    /// storage. `pause` is called whenever that may take long, and a signal handler has run or this
    /// thread is about to do it for all.
    pub(in crate::store) fn flush_through(
        &self,
        stream: Stream,
        seq: u64,
        pause: &mut dyn FnMut(),
    ) -> FsResult<()> {
        let (index, before) = (stream as usize, seq + 1);
        [Role::Write, Role::Flush]
            .into_iter()
            .try_for_each(|role| self.until(Goal { index, role, before }, pause))
    }

    /// Everything appended so far is on stable storage afterwards. Needs no key.
    pub(in crate::store) fn flush(&self) -> FsResult<()> {
        for index in 0..STREAMS {
            let before = self.streams.lock().queues[index].ring.next_seq();
            for role in [Role::Write, Role::Flush] {
                self.until(Goal { index, role, before }, &mut || {})?;
            }
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
        let mut asked = false;
        loop {
            streams.check()?;
            let queue = &mut streams.queues[index];
            if queue.ring.reserve(pages) {
                let usage = queue.usage();
                return Ok(Room { log: self.clone(), stream, pages, usage });
            }
            if asked {
                self.space[index].wait_for(&mut streams, std::time::Duration::from_secs(1));
            } else {
                // There may be room afterwards, of which nobody tells who does not wait yet.
                MutexGuard::unlocked(&mut streams, &give_up)?;
            }
            asked = !asked;
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

    /// Why the log takes nothing more, if so.
    pub(in crate::store) fn poisoned(&self) -> Option<String> {
        self.streams.lock().poison.clone()
    }

    /// Returns when the goal is reached.
    pub(super) fn until(&self, goal: Goal, pause: &mut dyn FnMut()) -> FsResult<()> {
        while !self.progress[goal.index].has(goal.role, goal.before) {
            self.go_on(goal, pause)?;
        }
        Ok(())
    }

    /// Takes the role for one round, or sleeps until somebody who has it has done one.
    pub(super) fn go_on(&self, goal: Goal, pause: &mut dyn FnMut()) -> FsResult<()> {
        let Goal { index, role, before } = goal;
        let mut streams = self.streams.lock();
        if self.progress[index].has(role, before) {
            return Ok(());
        }
        streams.check()?;
        let queue = &mut streams.queues[index];
        if queue.is_free(role) {
            match role {
                Role::Write => self.write(streams, index),
                Role::Flush => self.flush_written(streams, index, pause),
                Role::WriteOut => self.write_out(streams, index),
            }
            return Ok(());
        }
        let group = queue.rounds(role).group(before);
        let ticket = self.progress[index].signal(role, group).ticket();
        drop(streams);
        if ticket.sleep() {
            pause();
        }
        Ok(())
    }

    fn write(&self, mut streams: MutexGuard<'_, Streams>, index: usize) {
        let (at, batch, last) = streams.queues[index].take_batch();
        self.round(streams, index, Role::Write, last + 1, "a record cannot be written", || {
            let parts: Vec<&[u8]> = batch.iter().flatten().map(|part| &part[..]).collect();
            self.files[index].write_parts_at(&parts, at)
        });
    }

    fn flush_written(
        &self,
        streams: MutexGuard<'_, Streams>,
        index: usize,
        pause: &mut dyn FnMut(),
    ) {
        let covered = self.progress[index].mark(Role::Write);
        let homes = streams.queues[index].homes_before(covered);
        let what = "the log cannot be flushed";
        self.round(streams, index, Role::Flush, covered, what, || {
            pause();
            homes.iter().try_for_each(|home| {
                let failed = |error: &io::Error| self.home_failed(Some(home.node), error);
                self.flush_of(Scope::Inode(home.node), || home.file.sync_data(), failed)
            })?;
            let failed = |error: &io::Error| self.poison(index, what, error);
            self.flush_of(Scope::Stream(index), || self.files[index].sync_data(), failed)
        });
    }

    fn write_out(&self, streams: MutexGuard<'_, Streams>, index: usize) {
        let from = self.progress[index].mark(Role::WriteOut);
        let covered = self.progress[index].mark(Role::Write);
        let ranges = streams.queues[index].ring.ranges(from, covered);
        let what = "a record cannot be written out";
        self.round(streams, index, Role::WriteOut, covered, what, || {
            let file = &self.files[index];
            let write = || ranges.iter().try_for_each(|&(at, len)| file.write_out(at, len));
            let failed = |error: &io::Error| self.poison(index, what, error);
            self.write_out_of(Scope::Stream(index), write, failed)
        });
    }

    /// Does `io` for all who wait for that role and for no more than `reaches`. A panic in it is a
    /// failure like any other: those who wait must not wait for ever.
    fn round(
        &self,
        mut streams: MutexGuard<'_, Streams>,
        index: usize,
        role: Role,
        reaches: u64,
        failure: &str,
        io: impl FnOnce() -> io::Result<()>,
    ) {
        let progress = &self.progress[index];
        streams.queues[index].rounds(role).begin(reaches);
        drop(streams);
        let done = catch_unwind(AssertUnwindSafe(io));
        let done = done
            .unwrap_or_else(|_| Err(io::Error::other("the request that was to do it panicked")));
        let mut streams = self.streams.lock();
        let group = streams.queues[index].rounds(role).end();
        match done {
            // What has failed meanwhile may have been told to another, and not to this one.
            Ok(()) if streams.poison.is_some() => {}
            Ok(()) => {
                progress.raise(role, reaches);
                if role == Role::Flush {
                    streams.queues[index].homes_are_durable(reaches);
                }
            }
            // Most have seen to it themselves.
            Err(_) if streams.poison.is_some() => {}
            Err(error) => self.poison_locked(&mut streams, index, failure, &error),
        }
        let queue = &mut streams.queues[index];
        let next = queue.is_free(role).then(|| queue.rounds(role).next());
        drop(streams);
        progress.signal(role, group).wake_all();
        if let Some(next) = next {
            progress.signal(role, next).wake_one();
        }
        if role == Role::Flush {
            // What is on stable storage is on the device too.
            progress.wake_all_of(Role::WriteOut);
        }
    }

    /// Somebody else's flush of a home file, or with None of all, has failed. The kernel may tell of
    /// it once: what went there directly and was not flushed before must not count as durable by a
    /// later flush that knows nothing of it.
    pub(in crate::store) fn home_failed(&self, home: Option<NodeId>, error: &io::Error) {
        let mut streams = self.streams.lock();
        // One that has written to it and is about to append its record is not known yet.
        streams.home_failures += 1;
        for index in 0..STREAMS {
            if streams.queues[index].owes_flush_of(home) {
                let what = "blocks that went home directly cannot be flushed";
                self.poison_locked(&mut streams, index, what, error);
            }
        }
    }

    /// To be asked before blocks are written home that a record only names.
    pub(in crate::store) fn home_failures(&self) -> u64 {
        self.streams.lock().home_failures
    }

    /// A flush of something else that nobody will write again has failed.
    pub(crate) fn flush_failed(&self, what: &str, error: &io::Error) {
        self.poison_because(&mut self.streams.lock(), format!("{what}: {error}"));
    }

    pub(super) fn poison(&self, index: usize, what: &str, error: &io::Error) {
        self.poison_locked(&mut self.streams.lock(), index, what, error);
    }

    fn poison_locked(&self, streams: &mut Streams, index: usize, what: &str, error: &io::Error) {
        let file = String::from_utf8_lossy(super::FILES[index]);
        self.poison_because(streams, format!("{file}: {what}: {error}"));
    }

    fn poison_because(&self, streams: &mut Streams, reason: String) {
        log::error!("{reason}; writes fail until the volume is mounted again");
        streams.poison.get_or_insert(reason);
        self.failed.store(true, Ordering::Release);
        self.progress.iter().for_each(|progress| progress.wake_all());
        self.space.iter().for_each(Condvar::notify_all);
    }
}
