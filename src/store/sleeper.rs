//! Waking one thread that waits under a lock, and no other.
//!
//! With one condition for all, every change wakes all who wait, and most of them only to wait
//! again. Here each has its own, and leaves it with what it waits for.

use std::sync::Arc;

use crate::sync::{Condvar, MutexGuard};

/// What one thread is woken by. It may wait under several locks, one after the other, which the standard
/// library's condition variable allows where it is made of futexes, as on Linux.
#[derive(Clone, Debug, Default)]
pub(super) struct Sleeper(Arc<Condvar>);

thread_local! {
    static MINE: Sleeper = Sleeper::default();
}

impl Sleeper {
    /// This thread's.
    pub(super) fn mine() -> Sleeper {
        MINE.with(Sleeper::clone)
    }

    /// Waits, on the thread that this is of, without the lock until somebody wakes it.
    pub(super) fn sleep<T>(&self, guard: &mut MutexGuard<'_, T>) {
        self.0.wait(guard);
    }

    /// Under the same lock.
    pub(super) fn wake(&self) {
        self.0.notify_one();
    }
}
