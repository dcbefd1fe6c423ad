//! Flushes that overlap.
//!
//! Of what could not be written the kernel tells once for each descriptor, to whichever call comes to
//! know first, and to none that is opened later; another call that runs at the same time, or the next,
//! succeeds. So a success counts only when every flush of the same that overlapped it has ended, and
//! the log has not failed: who fails lets the log fail first, where that matters, and then ends.

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::Log;
use crate::backing::NodeId;
use crate::sync::{Condvar, Mutex};

/// What one flush can hide the failure of from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Scope {
    /// A stream of the log, by its number.
    Stream(usize),
    /// Anything else that has an inode.
    Inode(NodeId),
    /// The backing file system, which has a record of failures apart from those of its inodes.
    Whole,
}

#[derive(Debug, Default)]
pub(super) struct Overlaps {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Of the next one.
    number: u64,
    running: BTreeMap<u64, Scope>,
}

impl Overlaps {
    fn begin(&self, scope: Scope) -> Running<'_> {
        let mut state = self.state.lock();
        let number = state.number;
        state.number += 1;
        state.running.insert(number, scope);
        Running { overlaps: self, number }
    }

    /// Returns when all of that scope that have begun by now have ended.
    fn wait(&self, scope: Scope) {
        let mut state = self.state.lock();
        let past = state.number;
        while state.running.range(..past).any(|(_, other)| *other == scope) {
            self.ended.wait(&mut state);
        }
    }
}

/// One of them; ends when dropped, by a panic too.
struct Running<'a> {
    overlaps: &'a Overlaps,
    number: u64,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.overlaps.state.lock().running.remove(&self.number);
        self.overlaps.ended.notify_all();
    }
}

impl Log {
    /// Runs a call that makes durable what was written. If it fails, or panics, `failed` lets the log
    /// fail where records depend on it. An error too where the log has failed, before or meanwhile:
    /// then a success proves nothing.
    pub(in crate::store) fn flush_of(
        &self,
        scope: Scope,
        flush: impl FnOnce() -> io::Result<()>,
        failed: impl FnOnce(&io::Error),
    ) -> io::Result<()> {
        self.check_flag()?;
        self.write_out_of(scope, flush, failed)?;
        self.overlaps.wait(scope);
        self.check_flag()
    }

    /// The same for a call that promises less, and may come to know of a failure all the same.
    pub(in crate::store) fn write_out_of(
        &self,
        scope: Scope,
        call: impl FnOnce() -> io::Result<()>,
        failed: impl FnOnce(&io::Error),
    ) -> io::Result<()> {
        let running = self.overlaps.begin(scope);
        let done = catch_unwind(AssertUnwindSafe(call));
        let done = done.unwrap_or_else(|_| Err(io::Error::other("a flush has panicked")));
        let done = done.inspect_err(failed);
        drop(running);
        done
    }

    fn check_flag(&self) -> io::Result<()> {
        if self.failed.load(Ordering::Acquire) { Err(Errno::IO.into()) } else { Ok(()) }
    }
}
