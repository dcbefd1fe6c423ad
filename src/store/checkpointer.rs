//! When and in which order files go home, and the log's space comes back.
//!
//! One checkpoint runs at a time. It takes every file that is dirty through the steps that
//! [`super::file`] describes, and then has the log forget what they needed. In the background it
//! runs when a stream is half full, when too many files are dirty, and when the oldest change is
//! half a minute old; and every few seconds, whether or not one runs, what is not durable yet is
//! flushed. Writers who are faster than the checkpoints are slowed down in the last quarter of a
//! stream. A checkpoint that fails is tried again; until one succeeds, writers go on as long as the
//! log has room, and get the checkpoint's error when it has none.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::Shared;
use super::file::File;
use super::intent_log::{Room, STREAMS, Scope, Stream, Usage};
use crate::error::{Context, FsError, FsResult, Result};
use crate::sync::{Condvar, Mutex};

/// What `sync` never tells a FUSE daemon to do, this does.
const FLUSH_EVERY: Duration = Duration::from_secs(5);
const CHECKPOINT_EVERY: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(500);
/// Each holds its backing file open.
const MANY_FILES: usize = 512;
/// So many files are flushed by one flush of the whole file system.
const FEW_FILES: usize = 8;
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// What a page waits when the last quarter of a stream is half full.
const DELAY_OF_PAGE: Duration = Duration::from_micros(50);
const MAX_DELAY: Duration = Duration::from_millis(20);

/// How long a record of `pages` is held up. Where writers are faster than checkpoints, the log will be
/// full: they are slowed down before, all of them a little, lest all of them stand still then.
fn delay(usage: Usage, pages: u64) -> Duration {
    let quarter = usage.capacity / 4;
    let over = usage.used.saturating_sub(usage.capacity - quarter);
    if over == 0 {
        return Duration::ZERO;
    }
    let times = over as f64 / quarter.saturating_sub(over).max(1) as f64;
    DELAY_OF_PAGE.mul_f64((times * pages as f64).min(1e6)).min(MAX_DELAY)
}

/// The files that have something in the log. They stay open until it is home.
#[derive(Debug, Default)]
pub(super) struct DirtyFiles {
    files: Mutex<Vec<Arc<File>>>,
    /// Files that are gone, by the lowest seqs that they had.
    graves: Mutex<Vec<[u64; STREAMS]>>,
    /// Some of `files` are to be let go of.
    due: AtomicBool,
    many: AtomicBool,
}

impl DirtyFiles {
    pub(super) fn add(&self, file: Arc<File>) {
        let mut files = self.files.lock();
        if !files.iter().any(|known| Arc::ptr_eq(known, &file)) {
            files.push(file);
        }
        if files.len() >= MANY_FILES {
            self.many.store(true, Ordering::Relaxed);
        }
    }

    fn list(&self) -> Vec<Arc<File>> {
        self.files.lock().clone()
    }

    /// Those that could not be let go of at once.
    pub(super) fn inter_due(&self) {
        if self.due.swap(false, Ordering::Relaxed) {
            let mut forsaken = self.list();
            forsaken.retain(|file| file.is_forsaken());
            forsaken.into_iter().for_each(|file| self.inter(file));
        }
    }

    fn remove(&self, gone: &Arc<File>) {
        let mut files = self.files.lock();
        files.retain(|file| !Arc::ptr_eq(gone, file));
        self.many.store(files.len() >= MANY_FILES, Ordering::Relaxed);
    }

    pub(super) fn clear(&self) {
        let files = std::mem::take(&mut *self.files.lock());
        drop(files);
    }

    pub(super) fn len(&self) -> usize {
        self.files.lock().len()
    }

    /// Lets go of a file that nobody can reach, if it has no name: its space comes back now. What
    /// the log has of it stays until its removal is durable, since without that it would be back.
    pub(super) fn bury(&self, file: Arc<File>) {
        if file.has_no_name().unwrap_or(false) {
            file.forsake();
            self.inter(file);
        }
    }

    /// Not while somebody else has it: a checkpoint, a rotation, or who has answered the last request
    /// for it, and is about to let go of it. Then it is due a little later.
    fn inter(&self, file: Arc<File>) {
        if Arc::strong_count(&file) > 2 {
            self.due.store(true, Ordering::Relaxed);
            return;
        }
        if let Some(first) = file.first() {
            self.graves.lock().push(first);
        }
        self.remove(&file);
    }

    /// No record that anything here needs is lower, nor than `next`.
    fn lowest(&self, next: [u64; STREAMS]) -> [u64; STREAMS] {
        let files = self.list();
        let firsts = files.iter().filter_map(|file| file.first());
        let graves = self.graves.lock().clone();
        firsts.chain(graves).fold(next, |low, first| [low[0].min(first[0]), low[1].min(first[1])])
    }
}

/// What the background thread and those who wait for it tell each other.
#[derive(Debug, Default)]
pub(super) struct Checkpointer {
    running: Mutex<()>,
    wanted: Mutex<Wanted>,
    changed: Condvar,
    /// Why the last one failed, if it did.
    failure: Mutex<Option<(Errno, String)>>,
    background: AtomicBool,
    /// Come to an end, well or not.
    attempts: AtomicU64,
    /// Completed, for status.
    pub count: AtomicU64,
    /// Nobody can reach the volume any more: every checkpoint may be the last.
    closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Wanted {
    now: bool,
    stop: bool,
}

impl Checkpointer {
    fn ask(&self) {
        let mut wanted = self.wanted.lock();
        if !wanted.now {
            wanted.now = true;
            self.changed.notify_all();
        }
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.failure.lock().as_ref().map(|(_, text)| text.clone())
    }
}

impl Shared {
    /// Room for a record of `pages`. The caller holds no lock that a checkpoint needs.
    pub(super) fn reserve(&self, stream: Stream, pages: u64) -> FsResult<Room> {
        let log = self.log()?;
        let before = self.checkpointer.attempts.load(Ordering::Acquire);
        let room = log.reserve(stream, pages, || self.make_room(before))?;
        let Usage { used, capacity } = room.usage();
        if used > capacity / 2 || self.dirty.many.load(Ordering::Relaxed) {
            self.checkpointer.ask();
        }
        if self.checkpointer.background.load(Ordering::Acquire) {
            let delay = delay(room.usage(), room.pages());
            if !delay.is_zero() {
                std::thread::sleep(delay);
            }
        }
        Ok(room)
    }

    /// Has a checkpoint made, or says why there can be none. What failed before the caller came,
    /// when there had been `before` attempts, may succeed now.
    fn make_room(&self, before: u64) -> FsResult<()> {
        self.gate.check()?;
        if !self.checkpointer.background.load(Ordering::Acquire) {
            return self.checkpoint();
        }
        let tried = self.checkpointer.attempts.load(Ordering::Acquire) > before;
        if tried && let Some((errno, _)) = *self.checkpointer.failure.lock() {
            return Err(errno.into());
        }
        self.checkpointer.ask();
        Ok(())
    }

    /// A flush of names, or of new files, has failed. The kernel may tell of it once, and nothing
    /// writes them again: nothing more may count as durable.
    pub(super) fn names_failed(&self, error: &std::io::Error) {
        if let Some(log) = self.log.get() {
            log.flush_failed("names, or new files, cannot be flushed", error);
        }
    }

    /// Runs a flush of something that is not in the log, as [`Log::flush_of`] does.
    pub(super) fn flush(
        &self,
        scope: Scope,
        flush: impl FnOnce() -> std::io::Result<()>,
        failed: impl FnOnce(&std::io::Error),
    ) -> std::io::Result<()> {
        match self.log.get() {
            Some(log) => log.flush_of(scope, flush, failed),
            None => flush().inspect_err(failed),
        }
    }

    /// The same of names, or of new files: a failure is final.
    pub(super) fn flush_names(
        &self,
        scope: Scope,
        flush: impl FnOnce() -> std::io::Result<()>,
    ) -> FsResult<()> {
        let done = self.flush(scope, flush, |error| self.names_failed(error));
        // Whatever it was: MySQL takes EROFS for success.
        done.map_err(|_| Errno::IO.into())
    }

    /// Everything at home, and every name, is on stable storage afterwards. A failure is final where
    /// `names` are asked for, or were new.
    pub(super) fn sync_fs(&self, names: bool) -> FsResult<()> {
        let mark = self.newborn.mark();
        let is_final = names || mark.is_some();
        let done = self.flush(
            Scope::Whole,
            || self.backing.sync_fs(),
            |error| {
                if is_final {
                    self.names_failed(error);
                } else if let Some(log) = self.log.get() {
                    log.home_failed(None, error);
                }
            },
        );
        match done {
            Ok(()) => mark.into_iter().for_each(|mark| self.newborn.flushed(mark)),
            Err(_) if is_final => return Err(Errno::IO.into()),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// The last checkpoint, and each that may come after it, notes that the volume is closed, if
    /// everything is home.
    pub(super) fn close(&self) -> FsResult<()> {
        self.checkpointer.closed.store(true, Ordering::Release);
        self.checkpoint()
    }

    /// Brings everything home that is in the log now.
    pub(super) fn checkpoint(&self) -> FsResult<()> {
        let _one = self.checkpointer.running.lock();
        // A panic is a failure like any other: those who wait for room must not wait for ever.
        let run = AssertUnwindSafe(|| self.checkpoint_locked());
        let done = catch_unwind(run).unwrap_or_else(|_| Err(Errno::IO.into()));
        if let Err(error) = &done {
            log::warn!("a checkpoint failed: {error}");
        }
        *self.checkpointer.failure.lock() = match &done {
            // The next one comes when the keys are back.
            Ok(()) | Err(FsError::CutOff(_)) => None,
            Err(error @ FsError::Os(errno)) => Some((*errno, error.to_string())),
            Err(error) => Some((Errno::IO, error.to_string())),
        };
        self.checkpointer.attempts.fetch_add(1, Ordering::AcqRel);
        if let Some(log) = self.log.get() {
            log.wake();
        }
        done
    }

    fn checkpoint_locked(&self) -> FsResult<()> {
        let log = self.log()?.clone();
        // First of all: a record that is appended from here on is not of those that go.
        let next = log.next_seqs();
        let graves = self.dirty.graves.lock().len();
        let files: Vec<_> =
            self.dirty.list().into_iter().map(|file| (file.begin_checkpoint(), file)).collect();
        let clean: Vec<Arc<File>> = files
            .iter()
            .filter(|(snapshot, _)| snapshot.is_none())
            .map(|(_, file)| file.clone())
            .collect();
        let work: Vec<_> =
            files.into_iter().filter_map(|(snapshot, file)| Some((snapshot?, file))).collect();
        let bring = || -> FsResult<()> {
            log.flush()?;
            let all = |step: &dyn Fn(&super::file::Snapshot, &File) -> FsResult<()>| {
                work.iter().try_for_each(|(snapshot, file)| step(snapshot, file))
            };
            all(&|snapshot, file| file.write_home(snapshot))?;
            if work.len() > FEW_FILES || graves > 0 {
                self.sync_fs(false)?;
            } else {
                all(&|_, file| file.sync_home())?;
            }
            let new: Vec<_> =
                work.iter().filter(|(snapshot, file)| file.has_new_regions(snapshot)).collect();
            new.iter().try_for_each(|(snapshot, file)| file.write_new_regions(snapshot))?;
            if new.len() > FEW_FILES {
                self.sync_fs(false)?;
            } else {
                new.iter().try_for_each(|(_, file)| file.sync_home())?;
            }
            all(&|snapshot, file| file.write_header(snapshot))?;
            if work.len() > FEW_FILES {
                self.sync_fs(false)?;
            } else {
                all(&|_, file| file.sync_home())?;
            }
            Ok(())
        };
        if let Err(error) = bring() {
            work.iter().for_each(|(_, file)| file.abandon_checkpoint());
            return Err(error);
        }
        let mut done = Ok(());
        let mut home = Vec::new();
        for (snapshot, file) in &work {
            match file.end_checkpoint(snapshot) {
                Ok(false) => home.push(file.clone()),
                Ok(true) => {}
                Err(error) => {
                    file.abandon_checkpoint();
                    done = Err(error);
                }
            }
        }
        done?;
        drop(work);
        self.dirty.graves.lock().drain(..graves);
        self.forget_clean(&home);
        self.forget_clean(&clean);
        let tails = self.dirty.lowest(next);
        let last = self.checkpointer.closed.load(Ordering::Acquire);
        let clean = last && self.dirty.len() == 0;
        if clean {
            // Of files that were never written to, names and headers.
            self.sync_fs(false)?;
        }
        log.trim(tails, clean, |anchor| {
            let lease = self.gate.lease()?;
            let keys = self.keys.anchor_macs(&lease)?;
            let sealed = anchor.seal(&keys);
            lease.still_open()?;
            Ok(sealed)
        })?;
        self.checkpointer.count.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Unless they were written to since.
    fn forget_clean(&self, files: &[Arc<File>]) {
        let mut listed = self.dirty.files.lock();
        listed.retain(|file| {
            let mine = files.iter().any(|known| Arc::ptr_eq(known, file));
            !mine || file.first().is_some()
        });
        self.dirty.many.store(listed.len() >= MANY_FILES, Ordering::Relaxed);
    }

    /// Waits for a while, or until somebody asks for a checkpoint; None when it is time to end.
    fn pause(&self, ends_by_asking: bool) -> Option<bool> {
        let mut wanted = self.checkpointer.wanted.lock();
        let ends = wanted.stop || (ends_by_asking && wanted.now);
        if !ends {
            self.checkpointer.changed.wait_for(&mut wanted, TICK);
        }
        match wanted.stop {
            true => None,
            false => Some(ends_by_asking && std::mem::take(&mut wanted.now)),
        }
    }

    /// Apart from the checkpoints, since nobody is promised that those are quick.
    fn flush_loop(&self, on_failure: &dyn Fn(&str)) {
        let mut told = false;
        let mut flushed = Instant::now();
        while self.pause(false).is_some() {
            let Some(log) = self.log.get() else { continue };
            self.dirty.inter_due();
            if flushed.elapsed() >= FLUSH_EVERY {
                flushed = Instant::now();
                if self.newborn.mark().is_some()
                    && let Err(error) = self.sync_fs(false)
                {
                    log::error!("new files could not be flushed: {error}");
                }
                // Failing, it poisons the log, which tells everyone.
                drop(log.flush());
            }
            if !told && let Some(reason) = log.poisoned() {
                told = true;
                on_failure(&reason);
            }
        }
    }

    fn checkpoint_loop(&self) {
        let mut brought = Instant::now();
        while let Some(asked) = self.pause(true) {
            let Some(log) = self.log.get() else { continue };
            let due = brought.elapsed() >= CHECKPOINT_EVERY;
            if (asked || due) && log.poisoned().is_none() && self.gate.check().is_ok() {
                brought = Instant::now();
                match self.checkpoint() {
                    Ok(()) | Err(FsError::CutOff(_)) => {}
                    Err(_) => std::thread::sleep(RETRY_AFTER),
                }
            }
        }
    }
}

/// The threads, for as long as this lives.
#[derive(Debug)]
pub(super) struct Background {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Background {
    /// `on_failure` is called once, when the log takes nothing more.
    pub(super) fn start(
        shared: Arc<Shared>,
        on_failure: impl Fn(&str) + Send + 'static,
    ) -> Result<Background> {
        let mut background = Background { shared: shared.clone(), threads: Vec::new() };
        let flusher = shared.clone();
        background.spawn("flusher", move || flusher.flush_loop(&on_failure))?;
        background.spawn("checkpointer", move || shared.checkpoint_loop())?;
        background.shared.checkpointer.background.store(true, Ordering::Release);
        Ok(background)
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(work);
        self.threads.push(thread.context(|| format!("cannot start the {name}"))?);
        Ok(())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.shared.checkpointer.wanted.lock().stop = true;
        self.shared.checkpointer.changed.notify_all();
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if thread.join().is_err() {
                log::error!("the {name} panicked");
            }
        }
        self.shared.checkpointer.background.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_are_held_up_the_more_the_less_is_left() {
        let capacity = 1 << 20;
        let at = |used| delay(Usage { used, capacity }, 5);
        assert_eq!(at(0), Duration::ZERO);
        assert_eq!(at(capacity * 3 / 4), Duration::ZERO);
        let steps: Vec<Duration> = (13..=16).map(|part| at(capacity / 16 * part)).collect();
        assert!(steps.is_sorted() && steps[0] > Duration::ZERO, "{steps:?}");
        assert_eq!(at(capacity / 8 * 7), DELAY_OF_PAGE * 5);
        assert_eq!(at(capacity), MAX_DELAY);
        let nothing = Usage { used: 0, capacity: 0 };
        assert_eq!(delay(nothing, 1), Duration::ZERO);
        let whole = Usage { used: 1, capacity: 1 };
        assert!(delay(whole, u64::MAX) <= MAX_DELAY);
    }
}
