//! Which CPU a worker of the ring runs on.
//!
//! That of the queue which its requests come from: a request is then served where whoever waits for
//! it has just gone to sleep, and no other CPU has to be woken for it. But one thread with many
//! requests under way, by native AIO, would have them all served by one CPU, and so would who serves
//! several queues: then any of them.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// After as many requests that were not made beside others, a worker is back on a queue's CPU.
const SINGLE: usize = 64;

/// What is known of the requests of one CPU.
#[derive(Debug, Default)]
pub(super) struct Requests {
    /// Who made the last, and which worker got it.
    last: AtomicU64,
}

impl Requests {
    /// Whether one thread makes its requests side by side: the one before this was made by the same
    /// thread, and got by another worker. The kernel prefers the entry that was answered last.
    pub(super) fn are_parallel(&self, thread: u32, worker: u32) -> bool {
        let last = self.last.swap(u64::from(thread) << 32 | u64::from(worker), Ordering::Relaxed);
        (last >> 32) as u32 == thread && last as u32 != worker
    }
}

#[derive(Debug)]
pub(super) struct Place {
    any: CpuSet,
    /// Of the queue that the last request came from.
    cpu: usize,
    on_own: bool,
    /// Requests of that queue since the last that was made beside another one.
    single: usize,
}

impl Place {
    pub(super) fn new(cpu: usize) -> Place {
        let any = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
        Place { any, cpu, on_own: false, single: SINGLE }
    }

    pub(super) fn choose(&mut self, cpu: usize, parallel: bool) {
        let single = !parallel && cpu == self.cpu;
        self.cpu = cpu;
        self.single = if single { self.single.saturating_add(1) } else { 0 };
        self.set_own(self.single > if self.on_own { 0 } else { SINGLE });
    }

    /// On any CPU.
    pub(super) fn leave(&mut self) {
        self.single = 0;
        self.set_own(false);
    }

    fn set_own(&mut self, on_own: bool) {
        if on_own == self.on_own {
            return;
        }
        self.on_own = on_own;
        let mut cpus = self.any;
        // Otherwise it is not one that this process may use, or not there.
        if on_own && self.cpu < CpuSet::MAX_CPU && cpus.is_set(self.cpu) {
            cpus = CpuSet::new();
            cpus.set(self.cpu);
        }
        if let Err(error) = sched_setaffinity(None, &cpus) {
            log::debug!("the CPUs of a worker cannot be chosen: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_leaves_its_cpu_when_there_is_much_to_do_and_comes_back() {
        let mut place = Place::new(0);
        place.choose(0, false);
        assert!(place.on_own);
        for (cpu, parallel) in [(0, true), (1, false)] {
            place.choose(cpu, parallel);
            assert!(!place.on_own);
            for _ in 0..SINGLE {
                place.choose(cpu, false);
                assert!(!place.on_own);
            }
            place.choose(cpu, false);
            assert!(place.on_own);
        }
        place.leave();
        assert!(!place.on_own);
        place.choose(1, false);
        assert!(!place.on_own, "not at once");
        assert_eq!(sched_getaffinity(None).unwrap(), place.any);
    }

    #[test]
    fn requests_are_parallel_where_one_thread_has_several_workers() {
        let requests = Requests::default();
        assert!(!requests.are_parallel(7, 1));
        assert!(!requests.are_parallel(7, 1));
        assert!(!requests.are_parallel(8, 2));
        assert!(!requests.are_parallel(7, 1));
        assert!(requests.are_parallel(7, 2));
    }
}
