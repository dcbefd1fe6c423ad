//! Waiting for a flush without a thread.
//!
//! A server with many connections has as many commits under way, and a thread that sleeps for each of
//! them costs more than the commit. So who has to answer for a flush leaves a note of whom to tell.
//! One thread at a time sees to the notes of a stream: who leaves one where nobody does, until there
//! are none.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::commit::Goal;
use super::rounds::Role;
use super::{Log, Stream};
use crate::error::FsResult;

/// Is called once, by any thread, and must not wait: others are told after it, and flushed for.
type Tell = Box<dyn FnOnce(FsResult<()>) + Send>;

/// What is left of making something durable: the flush of a stream of the log.
#[derive(Debug)]
#[must_use = "nothing is durable before"]
pub struct PendingFlush {
    log: Arc<Log>,
    stream: Stream,
    seq: u64,
}

#[derive(Default)]
pub(super) struct Pending {
    notes: Vec<Note>,
    /// Somebody sees to the notes: none is left while nobody does.
    attended: bool,
}

struct Note {
    /// Records before this are to be on stable storage.
    before: u64,
    tell: Tell,
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} notes", self.notes.len())
    }
}

impl Pending {
    /// A flush is under way, or will be at once.
    pub(super) fn is_attended(&self) -> bool {
        self.attended
    }

    /// Takes the notes to be told by now: with what is durable, or all of them.
    fn due(&mut self, durable: u64, all: bool) -> Vec<Note> {
        let is_due = |note: &mut Note| all || note.before <= durable;
        self.notes.extract_if(.., is_due).collect()
    }
}

impl PendingFlush {
    /// What it promises, it promises when this returns.
    pub fn wait(self) -> FsResult<()> {
        self.wait_with_pauses(&mut || {})
    }

    /// The same. `pause` is called whenever that may take long, and a signal handler has run or this
    /// thread is about to flush for all.
    pub fn wait_with_pauses(self, pause: &mut dyn FnMut()) -> FsResult<()> {
        self.log.flush_through(self.stream, self.seq, pause)
    }

    /// Has `tell` called as soon as it is known, perhaps before this returns. If nobody sees to the
    /// notes of the stream, the caller has to, or to find somebody who does.
    pub fn leave(self, tell: impl FnOnce(FsResult<()>) + Send + 'static) -> Option<Attendance> {
        let (index, before) = (self.stream as usize, self.seq + 1);
        let attend = self.log.leave(index, before, Box::new(tell));
        attend.then(|| Attendance { log: Some(self.log), index })
    }

    /// The same, and sees to the notes where nobody does, those of others too. `pause` as for
    /// [`PendingFlush::wait_with_pauses`].
    pub fn then(self, tell: impl FnOnce(FsResult<()>) + Send + 'static, pause: &mut dyn FnMut()) {
        let mut attendance = self.leave(tell);
        while let Some(attends) = attendance {
            attendance = attends.go_on(pause);
        }
    }
}

/// The duty to see to the notes of a stream, until there are none. Any thread may take it over.
#[derive(Debug)]
#[must_use = "without it nobody is told"]
pub struct Attendance {
    /// None when it is over.
    log: Option<Arc<Log>>,
    index: usize,
}

impl Attendance {
    /// Waits for a flush, or does it for all, and tells those whom it concerns; None when no others are
    /// left. `pause` as for [`PendingFlush::wait_with_pauses`].
    pub fn go_on(mut self, pause: &mut dyn FnMut()) -> Option<Attendance> {
        let is_left = self.log.as_ref().is_some_and(|log| log.attend(self.index, pause));
        if !is_left {
            self.log = None;
        }
        is_left.then_some(self)
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        let Some(log) = self.log.take() else { return };
        while log.attend(self.index, &mut || {}) {}
    }
}

impl Log {
    /// The flush that makes the record with that number, and all before it in its stream, durable;
    /// None where it is.
    pub(in crate::store) fn pending_flush(
        self: &Arc<Self>,
        stream: Stream,
        seq: u64,
    ) -> Option<PendingFlush> {
        let durable = self.progress[stream as usize].has(Role::Flush, seq + 1);
        (!durable).then(|| PendingFlush { log: Arc::clone(self), stream, seq })
    }

    /// True if nobody sees to the notes.
    fn leave(&self, index: usize, before: u64, tell: Tell) -> bool {
        if let Err(error) = self.until(Goal { index, role: Role::Write, before }, &mut || {}) {
            tell(Err(error));
            return false;
        }
        if self.progress[index].has(Role::Flush, before) {
            tell(Ok(()));
            return false;
        }
        let pending = &mut self.streams.lock().queues[index].pending;
        pending.notes.push(Note { before, tell });
        !std::mem::replace(&mut pending.attended, true)
    }

    /// Until some are told. Whether others are left.
    fn attend(&self, index: usize, pause: &mut dyn FnMut()) -> bool {
        loop {
            let (due, durable, attended) = {
                let mut streams = self.streams.lock();
                let failed = streams.check().is_err();
                let durable = self.progress[index].mark(Role::Flush);
                let pending = &mut streams.queues[index].pending;
                let due = pending.due(durable, failed);
                // Whoever comes while the last ones are told sees to himself.
                pending.attended = !pending.notes.is_empty();
                (due, durable, pending.attended)
            };
            let told = !due.is_empty();
            due.into_iter().for_each(|note| note.tell(durable));
            if told || !attended {
                return attended;
            }
            // Until the end of the round that runs, whatever it reaches: notes that it covers may
            // come yet. If the log has failed, all are told.
            let before = durable + 1;
            let _ = self.go_on(Goal { index, role: Role::Flush, before }, pause);
        }
    }
}

impl Note {
    /// A panic must not keep the news from the others.
    fn tell(self, durable: u64) {
        let result =
            if self.before <= durable { Ok(()) } else { Err(rustix::io::Errno::IO.into()) };
        let tell = self.tell;
        let told = catch_unwind(AssertUnwindSafe(|| tell(result)));
        if told.is_err() {
            log::error!("who was to be told of a flush has panicked");
        }
    }
}
