//! Waiting for a flush without a thread.
//!
//! A server with many connections has as many commits under way, and a thread that sleeps for each of
//! them costs more than the commit. So who has to answer for a flush leaves a note of whom to tell.
//! One thread at a time sees to the notes of a stream: who leaves one where nobody does, until there
//! are none.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::commit::Streams;
use super::{Log, Stream};
use crate::error::FsResult;
use crate::sync::MutexGuard;

/// Is called once, by any thread.
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
        self.log.flush_through(self.stream, self.seq)
    }

    /// Has `tell` called as soon as it is known, perhaps before this returns. This thread may be the
    /// one that flushes, for others too.
    pub fn then(self, tell: impl FnOnce(FsResult<()>) + Send + 'static) {
        self.log.flush_and_tell(self.stream as usize, self.seq + 1, Box::new(tell));
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
        let durable = self.streams.lock().queues[stream as usize].durable;
        (durable <= seq).then(|| PendingFlush { log: Arc::clone(self), stream, seq })
    }

    fn flush_and_tell(&self, index: usize, before: u64, tell: Tell) {
        if let Err(error) = self.write_until(index, before) {
            return tell(Err(error));
        }
        let mut streams = self.streams.lock();
        if before <= streams.queues[index].durable {
            drop(streams);
            return tell(Ok(()));
        }
        let pending = &mut streams.queues[index].pending;
        pending.notes.push(Note { before, tell });
        if !pending.attended {
            pending.attended = true;
            self.attend(&mut streams, index);
        }
    }

    fn attend(&self, streams: &mut MutexGuard<'_, Streams>, index: usize) {
        loop {
            let failed = streams.check().is_err();
            let queue = &mut streams.queues[index];
            let durable = queue.durable;
            let due = queue.pending.due(durable, failed);
            let next = queue.pending.notes.iter().map(|note| note.before).min();
            // Whoever comes while the last ones are told sees to himself.
            queue.pending.attended = next.is_some();
            if !due.is_empty() {
                let tell = || due.into_iter().for_each(|note| note.tell(durable));
                MutexGuard::unlocked(streams, tell);
            }
            let Some(next) = next else { return };
            if streams.check().is_ok() {
                self.flush_or_wait(streams, index, next);
            }
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
