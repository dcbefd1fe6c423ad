//! Locks on ranges of a file's groups.
//!
//! A request takes all it needs at once and waits its turn behind earlier requests that it
//! conflicts with, so nothing deadlocks and no writer starves. The guard gives the range back
//! when it is dropped, also by a panic.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use super::sleeper::Sleeper;
use crate::sync::Mutex;

#[derive(Debug)]
struct Request {
    ticket: u64,
    first: u64,
    last: u64,
    exclusive: bool,
    /// It waits, and has not been woken.
    sleeper: Option<Sleeper>,
}

impl Request {
    fn conflicts(&self, other: &Request) -> bool {
        (self.exclusive || other.exclusive) && self.first <= other.last && other.first <= self.last
    }
}

#[derive(Debug, Default)]
struct Queue {
    /// Granted and waiting, in order of arrival.
    requests: VecDeque<Request>,
    next_ticket: u64,
}

#[derive(Debug, Default)]
pub(super) struct RangeLock(Mutex<Queue>);

#[derive(Debug)]
pub(super) struct RangeGuard<'a> {
    lock: &'a RangeLock,
    ticket: u64,
}

impl RangeLock {
    pub(super) fn shared(&self, range: RangeInclusive<u64>) -> RangeGuard<'_> {
        self.take(range, false)
    }

    pub(super) fn exclusive(&self, range: RangeInclusive<u64>) -> RangeGuard<'_> {
        self.take(range, true)
    }

    fn take(&self, range: RangeInclusive<u64>, exclusive: bool) -> RangeGuard<'_> {
        let mut queue = self.0.lock();
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        let (first, last) = range.into_inner();
        queue.requests.push_back(Request { ticket, first, last, exclusive, sleeper: None });
        // From here on the guard takes the request back, however this ends.
        let guard = RangeGuard { lock: self, ticket };
        while let Some(mine) = queue.hindered(ticket) {
            let me = Sleeper::mine();
            queue.requests[mine].sleeper = Some(me.clone());
            me.sleep(&mut queue);
        }
        guard
    }
}

impl Queue {
    /// Where the request is, if it conflicts with an earlier one.
    fn hindered(&self, ticket: u64) -> Option<usize> {
        let mine = self.requests.iter().position(|request| request.ticket == ticket)?;
        self.is_hindered(mine).then_some(mine)
    }

    fn is_hindered(&self, at: usize) -> bool {
        let mut earlier = self.requests.iter().take(at);
        earlier.any(|request| request.conflicts(&self.requests[at]))
    }

    /// Wakes whom nobody hinders any more.
    fn wake(&mut self) {
        for at in 0..self.requests.len() {
            if self.requests[at].sleeper.is_some()
                && !self.is_hindered(at)
                && let Some(sleeper) = self.requests[at].sleeper.take()
            {
                sleeper.wake();
            }
        }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut queue = self.lock.0.lock();
        queue.requests.retain(|request| request.ticket != self.ticket);
        queue.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
    use std::time::Duration;

    #[test]
    fn overlapping_writers_exclude_each_other_and_readers() {
        let lock = RangeLock::default();
        let cells: Vec<AtomicU64> = (0..8).map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (lock, cells) = (&lock, &cells);
                scope.spawn(move || {
                    for round in 0..500 {
                        let first = (thread * 3 + round) % 6;
                        let range = first..=first + round % 3;
                        if round % 2 == 0 {
                            let _guard = lock.exclusive(range.clone());
                            for i in range {
                                assert_eq!(cells[i as usize].fetch_add(1 << 32, SeqCst), 0);
                                std::thread::yield_now();
                                cells[i as usize].fetch_sub(1 << 32, SeqCst);
                            }
                        } else {
                            let _guard = lock.shared(range.clone());
                            for i in range {
                                assert!(cells[i as usize].fetch_add(1, SeqCst) < 1 << 32);
                                std::thread::yield_now();
                                cells[i as usize].fetch_sub(1, SeqCst);
                            }
                        }
                    }
                });
            }
        });
        assert!(lock.0.lock().requests.is_empty());
    }

    #[test]
    fn a_panic_leaves_nothing_locked() {
        let lock = RangeLock::default();
        let panicked = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let _guard = lock.exclusive(0..=u64::MAX);
                    std::panic::resume_unwind(Box::new(()));
                })
                .join()
        });
        assert!(panicked.is_err());
        drop(lock.exclusive(3..=3));
    }

    #[test]
    fn a_writer_gets_its_turn_among_readers() {
        let lock = RangeLock::default();
        let reader = lock.shared(0..=0);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| drop(lock.exclusive(0..=0)));
            while lock.0.lock().requests.len() < 2 {
                std::thread::sleep(Duration::from_millis(1));
            }
            let late = scope.spawn(|| drop(lock.shared(0..=0)));
            while lock.0.lock().requests.len() < 3 {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(!late.is_finished(), "waits behind the writer");
            drop(reader);
            writer.join().unwrap();
            late.join().unwrap();
        });
    }
}
