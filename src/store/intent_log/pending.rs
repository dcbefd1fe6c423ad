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

    /// Has `tell` called as soon as it is known, perhaps before this returns. This thread may be the
    /// one that flushes, for others too; `pause` as for [`PendingFlush::wait_with_pauses`].
    pub fn then(self, tell: impl FnOnce(FsResult<()>) + Send + 'static, pause: &mut dyn FnMut()) {
        self.log.flush_and_tell(self.stream as usize, self.seq + 1, Box::new(tell), pause);
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

    fn flush_and_tell(&self, index: usize, before: u64, tell: Tell, pause: &mut dyn FnMut()) {
        if let Err(error) = self.until(Goal { index, role: Role::Write, before }, pause) {
            return tell(Err(error));
        }
        if self.progress[index].has(Role::Flush, before) {
            return tell(Ok(()));
        }
        let attend = {
            let pending = &mut self.streams.lock().queues[index].pending;
            pending.notes.push(Note { before, tell });
            !std::mem::replace(&mut pending.attended, true)
        };
        if attend {
            self.attend(index, pause);
        }
    }

    fn attend(&self, index: usize, pause: &mut dyn FnMut()) {
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
            due.into_iter().for_each(|note| note.tell(durable));
            if !attended {
                return;
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
