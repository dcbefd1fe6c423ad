//! Locks: the standard library's, without its poisoning. A panic in one request must not lock others
//! out; nothing here relies on data that a panic may have left half changed.
//!
//! Not parking_lot's, whose mutex calls sched_yield(2) before it sleeps: on a machine without an idle
//! CPU whoever yields gets it back milliseconds later, and holds up all who wait for what he has.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{self, LockResult, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::thread::futex;

/// [`std::sync::Mutex`].
#[derive(Default)]
pub(crate) struct Mutex<T>(sync::Mutex<T>);

/// Unlocks when it is dropped.
pub(crate) struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
    /// None only inside [`MutexGuard::unlocked`] and [`Condvar`], which have borrowed the guard.
    locked: Option<sync::MutexGuard<'a, T>>,
}

/// [`std::sync::Condvar`], which makes a system call only where somebody waits.
#[derive(Debug, Default)]
pub(crate) struct Condvar {
    condition: sync::Condvar,
    /// Changed under the lock of who waits.
    waiting: AtomicU32,
}

/// How a wait with a limit has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    pub(crate) fn timed_out(self) -> bool {
        self.0
    }
}

fn sound<T>(result: LockResult<T>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Mutex<T> {
        Mutex(sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard { mutex: self, locked: Some(sound(self.0.lock())) }
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        sound(self.0.get_mut())
    }

    pub(crate) fn into_inner(self) -> T {
        sound(self.0.into_inner())
    }
}

impl<T: fmt::Debug> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T> MutexGuard<'_, T> {
    /// Runs `work` without the lock, and takes it again, after a panic too.
    pub(crate) fn unlocked<R>(guard: &mut Self, work: impl FnOnce() -> R) -> R {
        struct Relock<'g, 'a, T>(&'g mut MutexGuard<'a, T>);
        impl<T> Drop for Relock<'_, '_, T> {
            fn drop(&mut self) {
                self.0.locked = Some(sound(self.0.mutex.0.lock()));
            }
        }
        guard.locked = None;
        let _relock = Relock(guard);
        work()
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.locked {
            Some(locked) => locked,
            None => unreachable!("a guard that is borrowed"),
        }
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        match &mut self.locked {
            Some(locked) => locked,
            None => unreachable!("a guard that is borrowed"),
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl Condvar {
    pub(crate) const fn new() -> Condvar {
        Condvar { condition: sync::Condvar::new(), waiting: AtomicU32::new(0) }
    }

    pub(crate) fn notify_one(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.condition.notify_one();
        }
    }

    pub(crate) fn notify_all(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.condition.notify_all();
        }
    }

    pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        if let Some(locked) = guard.locked.take() {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            guard.locked = Some(sound(self.condition.wait(locked)));
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn wait_for<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        limit: Duration,
    ) -> WaitTimeoutResult {
        let mut timed_out = false;
        if let Some(locked) = guard.locked.take() {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let (locked, result) = sound(self.condition.wait_timeout(locked, limit));
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            guard.locked = Some(locked);
            timed_out = result.timed_out();
        }
        WaitTimeoutResult(timed_out)
    }

    pub(crate) fn wait_until<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        limit: Instant,
    ) -> WaitTimeoutResult {
        self.wait_for(guard, limit.saturating_duration_since(Instant::now()))
    }
}

/// Where threads sleep without a lock, until what they wait for may have come.
///
/// Who is about to sleep takes a ticket under the lock of what he waits for, having found that it has
/// not come. Who changes that, changes it under the same lock, and wakes after that, best without it.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    /// How often somebody was to be woken: whoever has seen another number does not fall asleep.
    calls: AtomicU32,
    tickets: AtomicU32,
}

/// For one sleep.
#[derive(Debug)]
pub(crate) struct Ticket<'a> {
    signal: &'a Signal,
    calls: u32,
}

impl Signal {
    pub(crate) fn ticket(&self) -> Ticket<'_> {
        self.tickets.fetch_add(1, Ordering::SeqCst);
        Ticket { signal: self, calls: self.calls.load(Ordering::SeqCst) }
    }

    pub(crate) fn wake_one(&self) {
        self.wake(1);
    }

    pub(crate) fn wake_all(&self) {
        // The kernel takes it for an int.
        self.wake(i32::MAX as u32);
    }

    fn wake(&self, most: u32) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if self.tickets.load(Ordering::SeqCst) > 0 {
            // It fails for addresses that are none.
            let _ = futex::wake(&self.calls, futex::Flags::PRIVATE, most);
        }
    }
}

impl Ticket<'_> {
    /// Until somebody wakes this one or all, or for no reason. True if a signal handler has run.
    pub(crate) fn sleep(self) -> bool {
        let calls = &self.signal.calls;
        let slept = futex::wait(calls, futex::Flags::PRIVATE, self.calls, None);
        slept == Err(Errno::INTR)
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.signal.tickets.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::{Arc, TryLockError};
    use std::thread;

    use super::*;

    fn is_locked<T>(mutex: &Mutex<T>) -> bool {
        matches!(mutex.0.try_lock(), Err(TryLockError::WouldBlock))
    }

    #[test]
    fn a_panic_locks_nobody_out() {
        let mutex = Mutex::new(1);
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let _guard = mutex.lock();
            panic!("on purpose");
        }));
        assert!(panicked.is_err());
        assert_eq!(*mutex.lock(), 1);
        assert_eq!(mutex.into_inner(), 1);
    }

    #[test]
    fn what_runs_unlocked_finds_it_unlocked_and_leaves_it_locked() {
        let mutex = Mutex::new(1);
        let mut guard = mutex.lock();
        assert!(is_locked(&mutex));
        MutexGuard::unlocked(&mut guard, || *mutex.lock() = 2);
        assert!(is_locked(&mutex));
        assert_eq!(*guard, 2);
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            MutexGuard::unlocked(&mut guard, || panic!("on purpose"));
        }));
        assert!(panicked.is_err());
        assert!(is_locked(&mutex), "locked again by the panic's way out");
        *guard += 1;
        drop(guard);
        assert_eq!(*mutex.lock(), 3);
    }

    #[test]
    fn a_condition_wakes_and_a_limit_ends() {
        let pair = Arc::new((Mutex::new(false), Condvar::new()));
        let other = Arc::clone(&pair);
        let thread = thread::spawn(move || {
            *other.0.lock() = true;
            other.1.notify_all();
        });
        let mut guard = pair.0.lock();
        while !*guard {
            pair.1.wait(&mut guard);
        }
        thread.join().unwrap();
        let limit = Instant::now() + Duration::from_millis(5);
        while !pair.1.wait_until(&mut guard, limit).timed_out() {}
        assert!(Instant::now() >= limit);
        assert!(*guard);
    }

    #[test]
    fn a_ticket_sees_a_call_from_before_its_sleep_and_one_from_after() {
        let signal = Signal::default();
        let ticket = signal.ticket();
        signal.wake_one();
        assert!(!ticket.sleep(), "at once");
        let mutex = Mutex::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut guard = mutex.lock();
                    while *guard == 0 {
                        let ticket = signal.ticket();
                        MutexGuard::unlocked(&mut guard, || ticket.sleep());
                    }
                    *guard += 1;
                });
            }
            while signal.tickets.load(Ordering::SeqCst) < 4 {
                thread::yield_now();
            }
            *mutex.lock() = 1;
            signal.wake_all();
        });
        assert_eq!(*mutex.lock(), 5);
        assert_eq!(signal.tickets.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn each_call_wakes_one_more() {
        let signal = Signal::default();
        let woken = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    signal.ticket().sleep();
                    woken.fetch_add(1, Ordering::SeqCst);
                });
            }
            while woken.load(Ordering::SeqCst) < 2 {
                signal.wake_one();
                thread::sleep(Duration::from_millis(1));
            }
        });
    }
}
