//! What waits in a stream: records for their write, and threads for what others do.
//!
//! No I/O here, and no lock: [`super::commit`] has both.

use std::collections::VecDeque;
use std::sync::Arc;

use super::PAGE;
use super::pending::Pending;
use super::ring::{Ring, Spot};
use crate::backing::FileRef;
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
    pub(super) written: u64,
    /// Records before this are on stable storage, and so is what they say is home.
    pub(super) durable: u64,
    /// Records before this are on the device, perhaps in its cache.
    pub(super) on_device: u64,
    pub(super) writing: bool,
    pub(super) flushing: bool,
    pub(super) writing_out: bool,
    homes: Vec<Home>,
    pub(super) pending: Pending,
    /// Those who wait for others' I/O. Whenever a role becomes free, and somebody needs it, one of
    /// those is called to take it; if he needs it no more, he calls the next.
    asleep: Vec<Asleep>,
}

/// What one thread does for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Write,
    Flush,
    WriteOut,
}

/// Records before `before` as far as that role brings them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Goal {
    pub(super) role: Role,
    pub(super) before: u64,
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
    pub(super) fn homes_before(&self, seq: u64) -> Vec<FileRef> {
        let needed = self.homes.iter().filter(|home| home.first < seq);
        needed.map(|home| home.file.clone()).collect()
    }

    /// Whether records name blocks in this home file, or with None in any, that no flush has covered.
    pub(super) fn owes_flush_of(&self, home: Option<&FileRef>) -> bool {
        let is_it = |known: &Home| home.is_none_or(|home| Arc::ptr_eq(home, &known.file));
        self.homes.iter().any(is_it)
    }

    pub(super) fn homes_are_durable(&mut self, seq: u64) {
        self.homes.retain_mut(|home| {
            home.first = home.first.max(seq);
            home.last >= seq
        });
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
    pub(super) fn wake(&mut self, role: Role) {
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

    /// The record's bytes; true where it is the first that waits.
    pub(super) fn fill(&mut self, seq: u64, bytes: [Vec<u8>; 2]) -> bool {
        let first = self.waiting.front().map(|queued| queued.spot.seq);
        let at = first.map_or(0, |first| (seq - first) as usize);
        if let Some(queued) = self.waiting.get_mut(at) {
            queued.bytes = Some(bytes);
        }
        at == 0
    }

    /// To be followed by a sleep, and that by [`Queue::woken`].
    pub(super) fn falls_asleep(&mut self, goal: Goal, sleeper: Sleeper) {
        self.asleep.push(Asleep { goal, called: false, sleeper });
    }

    pub(super) fn wake_all(&mut self) {
        self.asleep.drain(..).for_each(|asleep| asleep.sleeper.wake());
    }

    /// If the role was left to this one, and he does not need it any more, it is the next one's.
    pub(super) fn woken(&mut self, sleeper: &Sleeper) {
        let mine = self.asleep.iter().position(|asleep| asleep.sleeper.is(sleeper));
        if let Some(mine) = mine {
            let goal = self.asleep.remove(mine).goal;
            if self.is_reached(goal) {
                self.wake(goal.role);
            }
        }
    }

    pub(super) fn is_ready(&self) -> bool {
        self.waiting.front().is_some_and(|queued| queued.bytes.is_some())
    }

    /// Every ready record that lies behind the first without a gap: position, bytes, last seq.
    pub(super) fn take_batch(&mut self) -> (u64, Vec<[Vec<u8>; 2]>, u64) {
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
