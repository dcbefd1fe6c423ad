//! The threads that look at files.
//!
//! Files wait in a queue that is short, so that the walk cannot run far ahead; a file that was
//! begun and has many pieces is shared by all who have nothing else to do, and goes first.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::place::Place;
use super::{Code, Finding, Job, Remedy, fatal, unreadable};
use crate::backing::{NodeId, NodeRef};
use crate::error::{Error, Kind, Result};
use crate::store::verify::{FileCheck, Flaw, Opened, Scratch, What};
use crate::sync::{Condvar, Mutex};

/// Files that wait; each holds two descriptors.
const QUEUE: usize = 256;

/// Names that a finding of a file with several lists beside the first.
const NAMES_TOLD: usize = 10;

/// A regular file of the tree.
#[derive(Debug)]
pub(super) struct Work {
    pub node: NodeRef,
    /// All its names, with the directories that they are in; at least one.
    pub names: Vec<(NodeRef, Arc<Place>)>,
}

impl Work {
    fn first(&self) -> &Arc<Place> {
        &self.names[0].1
    }

    fn also(&self) -> Vec<Arc<Place>> {
        self.names.iter().skip(1).take(NAMES_TOLD).map(|(_, place)| place.clone()).collect()
    }
}

/// A file whose pieces are shared out.
#[derive(Debug)]
struct Shared {
    work: Work,
    check: FileCheck,
    next: AtomicU64,
    done: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Work>,
    shared: Vec<Arc<Shared>>,
    /// Threads that may bring something to share.
    opening: usize,
    closed: bool,
    failed: Option<Error>,
}

/// Where each file id was seen first.
type Ids = HashMap<[u8; 16], (NodeId, Arc<Place>)>;

#[derive(Debug, Default)]
pub(super) struct Pool {
    state: Mutex<State>,
    changed: Condvar,
    ids: Mutex<Ids>,
}

/// A thread that panics must not have the others wait for it.
struct Alarm<'a>(&'a Pool);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(Error::new(Kind::Io, "a thread of the check has panicked"));
        }
    }
}

enum Task {
    File(Work),
    Piece(Arc<Shared>, u64),
}

impl Pool {
    /// False once the check has failed: then there is no use in going on.
    pub(super) fn push(&self, work: Work) -> bool {
        let mut state = self.state.lock();
        while state.queue.len() >= QUEUE && state.failed.is_none() {
            self.changed.wait(&mut state);
        }
        if state.failed.is_some() {
            return false;
        }
        state.queue.push_back(work);
        self.changed.notify_all();
        true
    }

    /// Nothing more comes.
    pub(super) fn close(&self, failure: Option<Error>) {
        let mut state = self.state.lock();
        state.closed = true;
        if state.failed.is_none() {
            state.failed = failure;
        }
        self.changed.notify_all();
    }

    pub(super) fn outcome(self) -> Result<()> {
        self.state.into_inner().failed.map_or(Ok(()), Err)
    }

    fn fail(&self, error: Error) {
        let mut state = self.state.lock();
        state.failed.get_or_insert(error);
        self.changed.notify_all();
    }

    fn next(&self) -> Option<Task> {
        let mut state = self.state.lock();
        loop {
            if state.failed.is_some() {
                return None;
            }
            if let Some(shared) = state.shared.last().cloned() {
                let piece = shared.next.fetch_add(1, Ordering::Relaxed);
                if piece + 1 >= shared.check.pieces() {
                    state.shared.pop();
                }
                return Some(Task::Piece(shared, piece));
            }
            if let Some(work) = state.queue.pop_front() {
                state.opening += 1;
                self.changed.notify_all();
                return Some(Task::File(work));
            }
            if state.closed && state.opening == 0 {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }

    /// The life of a thread.
    pub(super) fn work(&self, job: &Job<'_>) {
        let _alarm = Alarm(self);
        let mut scratch = Scratch::default();
        while let Some(task) = self.next() {
            let done = match task {
                Task::File(work) => {
                    let begun = self.begin(work, job, &mut scratch);
                    let mut state = self.state.lock();
                    state.opening -= 1;
                    let begun = begun.map(|shared| state.shared.extend(shared));
                    self.changed.notify_all();
                    begun
                }
                Task::Piece(shared, piece) => shared.check(piece, job, &mut scratch),
            };
            if let Err(error) = done {
                return self.fail(error);
            }
        }
    }

    /// Looks at a file's header, and at all of a small file.
    fn begin(
        &self,
        work: Work,
        job: &Job<'_>,
        scratch: &mut Scratch,
    ) -> Result<Option<Arc<Shared>>> {
        job.counts().files.fetch_add(1, Ordering::Relaxed);
        attributes(job, &work.node, &work)?;
        let mut flaws = Vec::new();
        let opened = job.volume.begin(&work.node, &mut |flaw| flaws.push(flaw));
        let check = match opened {
            Ok(Opened::File(check)) => Some(check),
            Ok(Opened::Unreadable | Opened::NeverFlushed) => None,
            Err(error) => {
                flaws.push(Flaw::unreadable(unreadable(error)?));
                None
            }
        };
        if let Some(check) = &check {
            self.note_id(check, &work, job)?;
        }
        let restored = match &check {
            Some(check) if check.copy_to_restore && job.repair.does(Remedy::Copy) => {
                let restored = job.volume.restore_header(&work.node);
                if let Err(error) = &restored {
                    let path = work.first().backing();
                    let message = format!("cannot restore the header of {path}: {error}");
                    job.found.report.trouble(&message);
                }
                Some(restored.is_ok())
            }
            _ => None,
        };
        for flaw in flaws {
            let code = Code::Store(flaw.what);
            let repaired = restored.filter(|_| code.remedy() == Remedy::Copy);
            let mut finding = job.found.of_file(flaw, work.first(), &work.also());
            if code.remedy() == Remedy::Copy
                && check.as_ref().is_none_or(|check| !check.copy_to_restore)
            {
                // Nobody can tell which copy is the good one.
                finding.repair = None;
            }
            if code.remedy() == Remedy::Quarantine && job.repair.does(Remedy::Quarantine) {
                // Each name of it.
                for (dir, place) in &work.names {
                    let of_name = Finding {
                        path: place.logical(),
                        backing_path: place.backing(),
                        also: Vec::new(),
                        ..finding.clone()
                    };
                    job.judge(of_name, dir, place.name())?;
                }
            } else {
                job.found.tell(finding, repaired)?;
            }
        }
        let Some(check) = check else { return Ok(None) };
        let pieces = check.pieces();
        let shared = Shared { work, check, next: AtomicU64::new(0), done: AtomicU64::new(0) };
        if pieces > 1 {
            return Ok(Some(Arc::new(shared)));
        }
        if pieces == 1 {
            shared.check(0, job, scratch)?;
        } else {
            shared.finish(job)?;
        }
        Ok(None)
    }

    /// Two inodes of one file are copies.
    fn note_id(&self, check: &FileCheck, work: &Work, job: &Job<'_>) -> Result<()> {
        let (id, place) = (work.node.id(), work.first());
        let first = {
            let mut ids = self.ids.lock();
            let (first, there) = ids.entry(check.file_id()).or_insert_with(|| (id, place.clone()));
            (*first != id).then(|| there.clone())
        };
        let Some(there) = first else { return Ok(()) };
        let other = there.logical().unwrap_or_else(|| there.backing());
        let detail = format!("it has the file id of {other} ({})", there.backing());
        let mut finding = Finding::new(Code::DuplicateFile, place.backing(), detail);
        finding.path = place.logical();
        finding.also = vec![other];
        job.found.tell(finding, None)
    }
}

impl Shared {
    fn check(&self, piece: u64, job: &Job<'_>, scratch: &mut Scratch) -> Result<()> {
        let mut flaws = Vec::new();
        let tally = self.check.check(piece, scratch, &mut |flaw| flaws.push(flaw));
        self.tell(flaws, job)?;
        let tally = tally.map_err(fatal)?;
        job.counts().blocks.fetch_add(tally.blocks, Ordering::Relaxed);
        job.counts().bytes.fetch_add(tally.bytes, Ordering::Relaxed);
        job.found.report.progress(tally.bytes);
        if self.done.fetch_add(1, Ordering::AcqRel) + 1 >= self.check.pieces() {
            self.finish(job)?;
        }
        Ok(())
    }

    fn finish(&self, job: &Job<'_>) -> Result<()> {
        let mut flaws = Vec::new();
        let done = self.check.finish(&mut |flaw| flaws.push(flaw));
        self.tell(flaws, job)?;
        done.map_err(fatal)
    }

    fn tell(&self, flaws: Vec<Flaw>, job: &Job<'_>) -> Result<()> {
        for flaw in flaws {
            let finding = job.found.of_file(flaw, self.work.first(), &self.work.also());
            job.found.tell(finding, None)?;
        }
        Ok(())
    }
}

fn attributes(job: &Job<'_>, node: &NodeRef, work: &Work) -> Result<()> {
    super::walk::attributes(job, node, work.first())
}

impl Flaw {
    /// Of a file that cannot be opened.
    fn unreadable(detail: String) -> Flaw {
        Flaw { what: What::Read, place: None, at: None, content: None, detail }
    }
}
