//! Group commit: the first who waits writes, or flushes, for all who wait.
//!
//! Nobody holds the lock during I/O. A leader takes every record that is ready and lies without a
//! gap, writes them with one call, and tells the others; whoever came meanwhile finds the next
//! leader among them. The same again for the flush, which covers all that was written before it
//! began; for that one can also wait without a thread ([`super::pending`]).

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parking_lot::MutexGuard;
use rustix::io::Errno;

use super::pending::Pending;
use super::ring::{Ring, Spot};
use super::{Log, PAGE, Position, Room, STREAMS, Stream};
use crate::backing::FileRef;
use crate::error::{FsError, FsResult};
use crate::store::sleeper::Sleeper;

/// The most that one write takes along.
const BATCH: usize = 4 << 20;

/// A record on its way to the kernel; `bytes` is None until its MAC is made.
#[derive(Debug)]
struct Queued {
    spot: Spot,
    bytes: Option<[Vec<u8>; 2]>,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(in crate::store) ring: Ring,
    waiting: VecDeque<Queued>,
    /// Records before this are in the kernel's hands.
    written: u64,
    /// Records before this are on stable storage, and so is what they say is home.
    durable: u64,
    /// Records before this are on the device, perhaps in its cache.
    on_device: u64,
    writing: bool,
    flushing: bool,
    writing_out: bool,
    homes: Vec<Home>,
    pub(super) pending: Pending,
    /// Those who wait for others' I/O. Whenever a role becomes free, and somebody needs it, one of
    /// those is called to take it; if he needs it no more, he calls the next.
    asleep: Vec<Asleep>,
}

/// What one thread does for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Write,
    Flush,
    WriteOut,
}

/// Records before `before` as far as that role brings them.
#[derive(Clone, Copy, Debug)]
struct Goal {
    role: Role,
    before: u64,
}

#[derive(Debug)]
struct Asleep {
    goal: Goal,
    /// Woken to take the role.
    called: bool,
    sleeper: Sleeper,
}

/// A home file with blocks that records only name: to be flushed before those records are.
#[derive(Debug)]
struct Home {
    first: u64,
    last: u64,
    file: FileRef,
}

#[derive(Debug)]
pub(super) struct Streams {
    pub(in crate::store) queues: [Queue; STREAMS],
    poison: Option<String>,
}

impl Queue {
    pub(super) fn new(ring: Ring) -> Queue {
        let next = ring.next_seq();
        let waiting = VecDeque::new();
        Queue {
            ring,
            waiting,
            written: next,
            durable: next,
            on_device: next,
            writing: false,
            flushing: false,
            writing_out: false,
            homes: Vec::new(),
            pending: Pending::default(),
            asleep: Vec::new(),
        }
    }

    pub(super) fn place(&mut self, pages: u64, home: Option<FileRef>) -> Spot {
        let spot = self.ring.place(pages);
        self.waiting.push_back(Queued { spot, bytes: None });
        if let Some(file) = home {
            match self.homes.iter_mut().find(|home| Arc::ptr_eq(&home.file, &file)) {
                Some(home) => home.last = spot.seq,
                None => self.homes.push(Home { first: spot.seq, last: spot.seq, file }),
            }
        }
        spot
    }

    /// The home files that records before `seq` need on stable storage.
    fn homes_before(&self, seq: u64) -> Vec<FileRef> {
        let needed = self.homes.iter().filter(|home| home.first < seq);
        needed.map(|home| home.file.clone()).collect()
    }

    fn homes_are_durable(&mut self, seq: u64) {
        self.homes.retain_mut(|home| {
            home.first = home.first.max(seq);
            home.last >= seq
        });
    }

    /// Records before this are on stable storage.
    pub(super) fn durable_before(&self) -> u64 {
        self.durable
    }

    /// The last record that is on stable storage.
    pub(super) fn durable_seq(&self) -> u64 {
        self.durable.saturating_sub(1)
    }

    fn is_reached(&self, goal: Goal) -> bool {
        let reached = match goal.role {
            Role::Write => self.written,
            Role::Flush => self.durable,
            Role::WriteOut => self.on_device.max(self.durable),
        };
        goal.before <= reached
    }

    fn is_free(&self, role: Role) -> bool {
        match role {
            Role::Write => !self.writing,
            Role::Flush => !self.flushing,
            Role::WriteOut => !self.writing_out,
        }
    }

    /// Wakes whoever has what he waits for, and calls the first who needs that role, if it is free
    /// and there is something to do for it.
    fn wake(&mut self, role: Role) {
        let for_role = |asleep: &Asleep| asleep.goal.role == role;
        let mut wanted = self.is_free(role)
            && (role != Role::Write || self.is_ready())
            && !self.asleep.iter().any(|asleep| asleep.called && for_role(asleep));
        let mut all = std::mem::take(&mut self.asleep);
        all.retain_mut(|asleep| {
            let reached = self.is_reached(asleep.goal);
            let takes_over = wanted && !reached && for_role(asleep);
            if asleep.called || !(reached || takes_over) {
                return true;
            }
            wanted &= !takes_over;
            asleep.called = takes_over;
            asleep.sleeper.wake();
            takes_over
        });
        self.asleep = all;
    }

    /// If the role was left to this one, and he does not need it any more, it is the next one's.
    fn woken(&mut self, sleeper: &Sleeper) {
        let mine = self.asleep.iter().position(|asleep| asleep.sleeper.is(sleeper));
        if let Some(mine) = mine {
            let goal = self.asleep.remove(mine).goal;
            if self.is_reached(goal) {
                self.wake(goal.role);
            }
        }
    }

    fn is_ready(&self) -> bool {
        self.waiting.front().is_some_and(|queued| queued.bytes.is_some())
    }

    /// Every ready record that lies behind the first without a gap: position, bytes, last seq.
    fn take_batch(&mut self) -> (u64, Vec<[Vec<u8>; 2]>, u64) {
        let mut batch = Vec::new();
        let (mut from, mut end, mut last) = (0, None, 0);
        let mut len = 0;
        while let Some(queued) = self.waiting.front_mut() {
            if end.is_some_and(|end| end != queued.spot.at) || len >= BATCH {
                break;
            }
            let Some(bytes) = queued.bytes.take() else { break };
            if end.is_none() {
                from = queued.spot.at;
            }
            let record_len = bytes[0].len() + bytes[1].len();
            len += record_len;
            end = Some(queued.spot.at + record_len as u64);
            last = queued.spot.seq;
            batch.push(bytes);
            self.waiting.pop_front();
        }
        (from, batch, last)
    }
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
        let first = queue.waiting.front().map(|queued| queued.spot.seq);
        let at = first.map_or(0, |first| (self.seq - first) as usize);
        if let Some(queued) = queue.waiting.get_mut(at) {
            queued.bytes = Some([head, body]);
        }
        if at == 0 {
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
        let mut homes = streams.queues.iter().flat_map(|queue| &queue.homes);
        homes.any(|known| Arc::ptr_eq(home, &known.file))
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
        self.space.iter().for_each(|space| _ = space.notify_all());
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
            let mut homes = streams.queues[index].homes.iter();
            if homes.any(|known| home.is_none_or(|home| Arc::ptr_eq(home, &known.file))) {
                let what = "blocks that went home directly cannot be flushed";
                self.poison_locked(&mut streams, index, what, error);
            }
        }
    }

    /// A flush of names, or of new files, has failed.
    pub(crate) fn names_failed(&self, error: &io::Error) {
        self.poison_locked(&mut self.streams.lock(), 0, "names cannot be flushed", error);
    }

    pub(super) fn poison(&self, index: usize, what: &str, error: &io::Error) -> FsError {
        self.poison_locked(&mut self.streams.lock(), index, what, error);
        Errno::IO.into()
    }

    fn poison_locked(&self, streams: &mut Streams, index: usize, what: &str, error: &io::Error) {
        let file = String::from_utf8_lossy(super::FILES[index]);
        let reason = format!("{file}: {what}: {error}");
        log::error!("{reason}; writes fail until the volume is mounted again");
        streams.poison.get_or_insert(reason);
        for queue in &mut streams.queues {
            queue.asleep.drain(..).for_each(|asleep| asleep.sleeper.wake());
        }
        self.space.iter().for_each(|space| _ = space.notify_all());
    }
}

/// Waits until [`Queue::wake`] finds this thread, or the log fails.
fn sleep(streams: &mut MutexGuard<'_, Streams>, index: usize, goal: Goal) {
    let sleeper = Sleeper::mine();
    streams.queues[index].asleep.push(Asleep { goal, called: false, sleeper: sleeper.clone() });
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

const _: () = assert!(BATCH >= super::record::MAX_PAGES * PAGE);

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> Queue {
        Queue::new(Ring::resume(0, 1 << 20, Spot { seq: 1, at: 0 }, &[]))
    }

    fn add(queue: &mut Queue, role: Role, before: u64) -> Sleeper {
        let sleeper = Sleeper::default();
        let goal = Goal { role, before };
        queue.asleep.push(Asleep { goal, called: false, sleeper: sleeper.clone() });
        sleeper
    }

    fn called(queue: &Queue) -> Vec<u64> {
        let called = queue.asleep.iter().filter(|asleep| asleep.called);
        called.map(|asleep| asleep.goal.before).collect()
    }

    #[test]
    fn one_is_called_and_calls_the_next_if_he_needs_it_no_more() {
        let mut queue = queue();
        let first = add(&mut queue, Role::WriteOut, 3);
        add(&mut queue, Role::WriteOut, 9);
        add(&mut queue, Role::Flush, 9);
        queue.wake(Role::WriteOut);
        queue.wake(Role::WriteOut);
        assert_eq!(called(&queue), [3]);
        // Before he comes to it, a flush does for him.
        queue.durable = 5;
        queue.wake(Role::WriteOut);
        assert_eq!(called(&queue), [3]);
        queue.woken(&first);
        assert_eq!(called(&queue), [9], "or nobody would do it");
        assert_eq!(queue.asleep.len(), 2);
    }

    #[test]
    fn nobody_is_called_to_a_role_that_somebody_has_or_that_has_nothing_to_do() {
        let mut queue = queue();
        add(&mut queue, Role::Flush, 9);
        add(&mut queue, Role::Write, 9);
        queue.flushing = true;
        queue.wake(Role::Flush);
        queue.wake(Role::Write);
        assert!(called(&queue).is_empty());
        queue.flushing = false;
        queue.wake(Role::Flush);
        assert_eq!(queue.asleep.iter().filter(|asleep| asleep.called).count(), 1);
        assert!(queue.asleep[0].called);
    }

    #[test]
    fn all_who_have_what_they_wait_for_are_woken() {
        let mut queue = queue();
        for (role, before) in [(Role::Flush, 4), (Role::WriteOut, 5), (Role::Flush, 6)] {
            add(&mut queue, role, before);
        }
        queue.durable = 5;
        queue.wake(Role::Flush);
        assert_eq!(called(&queue), [6]);
        assert_eq!(queue.asleep.len(), 1);
    }
}
