//! Flushes of one file that overlap.
//!
//! Of a page that could not be written the kernel tells once for each descriptor, to whichever call
//! comes to know first; another call that runs at the same time, or the next, succeeds. So a success
//! counts only if no call that overlapped it has failed, and none before.

use std::collections::BTreeSet;
use std::io;

use crate::sync::{Condvar, Mutex};

#[derive(Debug, Default)]
pub(super) struct Syncs {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Of the next call.
    number: u64,
    running: BTreeSet<u64>,
    failed: bool,
}

impl Syncs {
    /// Runs a call that makes what was written durable.
    pub(super) fn flush(&self, call: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let past = self.run(call)?;
        let mut state = self.state.lock();
        while state.running.first().is_some_and(|&number| number < past) {
            self.ended.wait(&mut state);
        }
        if state.failed {
            return Err(io::Error::other("another flush of it has failed"));
        }
        Ok(())
    }

    /// Runs a call that may come to know of a failed write, and promises less.
    pub(super) fn write_out(&self, call: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.run(call).map(drop)
    }

    /// The number that the next call has, when this one has ended.
    fn run(&self, call: impl FnOnce() -> io::Result<()>) -> io::Result<u64> {
        let mut running = {
            let mut state = self.state.lock();
            let number = state.number;
            state.number += 1;
            state.running.insert(number);
            Running { syncs: self, number, succeeded: false }
        };
        call()?;
        running.succeeded = true;
        drop(running);
        Ok(self.state.lock().number)
    }
}

/// Ends as failed if nobody says otherwise, by a panic too.
struct Running<'a> {
    syncs: &'a Syncs,
    number: u64,
    succeeded: bool,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.syncs.state.lock();
        state.running.remove(&self.number);
        state.failed |= !self.succeeded;
        self.syncs.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_success_counts_only_if_nothing_beside_it_fails() {
        for fails in [false, true] {
            let syncs = Arc::new(Syncs::default());
            let (started, has_started) = channel();
            let (end, may_end) = channel::<()>();
            let beside = Arc::clone(&syncs);
            let other = std::thread::spawn(move || {
                beside.write_out(|| {
                    started.send(()).unwrap();
                    may_end.recv().unwrap();
                    if fails { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
                })
            });
            has_started.recv().unwrap();
            let (flushed, is_flushed) = channel();
            let flusher = Arc::clone(&syncs);
            let flush = std::thread::spawn(move || {
                let done = flusher.flush(|| Ok(()));
                flushed.send(()).unwrap();
                done
            });
            let early = is_flushed.recv_timeout(std::time::Duration::from_millis(50));
            assert!(early.is_err(), "nobody knows yet what comes of the other");
            end.send(()).unwrap();
            assert_eq!(other.join().unwrap().is_err(), fails);
            assert_eq!(flush.join().unwrap().is_err(), fails);
            assert_eq!(syncs.flush(|| Ok(())).is_err(), fails, "and from then on");
        }
    }

    #[test]
    fn a_panic_is_a_failure_and_holds_nobody_up() {
        let syncs = Syncs::default();
        let run = || syncs.flush(|| panic!("as ordered"));
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
        assert!(syncs.flush(|| Ok(())).is_err());
    }
}
