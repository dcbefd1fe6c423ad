//! The harness finds what it is there for: of each mistake in the order of calls, an example. Each is
//! planted in the recording of a run that is right, where it looks as a run of wrong code would.

use super::{Effort, FILES, Op, Run, Step, run, write};
use crate::backing::Backing;
use crate::backing::memory::{MemoryBacking, Trace};
use crate::store::layout::{block_at, generation_page_at, tag_page_at};

impl Run {
    /// The same without a call.
    fn without(&self, at: usize) -> Run {
        self.edited(self.trace.without(at), |position| position - usize::from(position > at))
    }

    /// The same with a call made earlier or later, as number `to`.
    fn moved(&self, from: usize, to: usize) -> Run {
        let trace = self.trace.moved(from, to);
        if from < to {
            return self.edited(trace, |p| if (from + 1..=to).contains(&p) { p - 1 } else { p });
        }
        self.edited(trace, |p| if (to + 1..=from).contains(&p) { p + 1 } else { p })
    }

    fn edited(&self, trace: Trace, place: impl Fn(usize) -> usize) -> Run {
        let mut steps = self.steps.clone();
        steps.iter_mut().for_each(|step| step.position = place(step.position));
        Run { trace, steps }
    }

    /// What cuts of its power show.
    fn is_right(&self) -> Result<usize, String> {
        self.check(&Effort { deep: 0, checked: 0, ..Effort::of(20, 3) })
    }

    fn line(&self, at: usize) -> String {
        self.trace.describe(at + 1).lines().last().unwrap_or_default().to_owned()
    }

    /// Calls from `from` on of which the line says this.
    fn calls(&self, from: usize, text: &str) -> Vec<usize> {
        let found = self.trace.find(|line| line.contains(text));
        found.into_iter().filter(|&at| at >= from).collect()
    }

    /// The first of them.
    fn call(&self, from: usize, text: &str) -> usize {
        let found = self.calls(from, text).first().copied();
        found.unwrap_or_else(|| panic!("{text}: not in\n{}", self.trace.describe(usize::MAX)))
    }

    /// The first write of a page of a file from `from` on.
    fn page(&self, from: usize, name: &str, at: u64) -> usize {
        self.call(from, &format!("write inode {} at {at},", self.ino(name)))
    }

    fn flush(&self, from: usize, name: &str) -> usize {
        self.call(from, &format!("SyncData {{ ino: {} }}", self.ino(name)))
    }

    /// Where the operations that come after so many begin.
    fn position(&self, ops: usize) -> usize {
        self.steps[ops].position
    }
}

fn must_be_found(what: &str, run: &Run) {
    if let Ok(states) = run.is_right() {
        panic!("{what}: not found in {states} states of\n{}", run.trace.describe(usize::MAX));
    }
}

fn small() -> Run {
    let mut ops = vec![write(0, 8192, 1), Op::Sync];
    for i in 0..2_u64 {
        ops.push(write(8192 + i * 512, 512, i as u8 + 2));
        ops.push(Op::Sync);
    }
    ops.extend([Op::Checkpoint, write(8192, 512, 9), Op::Sync]);
    run(&ops)
}

#[test]
fn a_flush_that_is_left_out() {
    let run = small();
    run.is_right().unwrap();
    let mut harmless = Vec::new();
    let syncs = run.trace.syncs();
    for &at in &syncs {
        if run.without(at).is_right().is_ok() {
            harmless.push(run.line(at));
        }
    }
    // Every other one is found: of the log, the directory, the header, new regions. Not needed here
    // are the inode's at the first sync, whose header is durable already; that of data and tags,
    // which the new region's covers; the anchor's, as long as nothing overwrites what it gave back;
    // and the last, with which the trace ends.
    assert!(harmless.len() <= 4, "{} of {}: {harmless:#?}", harmless.len(), syncs.len());
}

#[test]
fn a_directory_that_is_not_flushed() {
    let run = small();
    must_be_found("no fsync of the directory", &run.without(run.call(0, "SyncDir")));
}

/// A large write of new blocks, past the log, and one over them.
fn direct() -> Run {
    let run = run(&[
        write(0, 4096, 1),
        Op::Sync,
        Op::Checkpoint,
        Op::SyncAll,
        write(16 * 4096, 200_000, 2),
        Op::Sync,
        write(16 * 4096, 4096, 3),
        Op::Sync,
        Op::Checkpoint,
        write(0, 512, 4),
        Op::Sync,
    ]);
    run.is_right().unwrap();
    run
}

#[test]
fn blocks_that_follow_their_tags() {
    let run = direct();
    // Past the log: the record is durable first, then the block is written.
    let from = run.position(4);
    let block = run.page(from, "f", block_at(16));
    let flushed = run.flush(from, "log.bulk");
    assert!(block < flushed);
    must_be_found("direct blocks after their record", &run.moved(block, flushed));
    // In a checkpoint: after everything that says they are there, and the log is empty.
    let from = run.position(8);
    let block = run.page(from, "f", block_at(16));
    let trimmed = run.flush(from, "log.hot");
    assert!(block < trimmed);
    must_be_found("blocks after their checkpoint", &run.moved(block, trimmed));
}

#[test]
fn a_log_that_is_emptied_before_home_is_flushed() {
    let run = direct();
    let from = run.position(8);
    let home = run.flush(from, "f");
    let hot = run.ino("log.hot");
    let anchor = run.call(from, &format!("write inode {hot} at"));
    assert!(home < anchor);
    // The write of the anchor and its flush, to before the first flush of home.
    let run = run.moved(anchor, home).moved(anchor + 1, home + 1);
    must_be_found("the tail before home", &run);
}

#[test]
fn a_header_that_names_a_region_before_its_generations_are_there() {
    let run = direct();
    let from = run.position(2);
    let generations = run.page(from, "f", generation_page_at(0));
    let header = run.page(from, "f", 0);
    assert!(generations < header);
    let run = run.moved(header, generations);
    must_be_found("header before generations", &run);
}

#[test]
fn home_that_is_overwritten_before_the_log_is_flushed() {
    let run = run(&[
        write(0, 4096, 1),
        Op::Sync,
        Op::Checkpoint,
        Op::SyncAll,
        write(0, 512, 2),
        Op::Checkpoint,
        write(0, 512, 3),
        Op::Sync,
    ]);
    run.is_right().unwrap();
    let from = run.position(5);
    let log = run.flush(from - 1, "log.hot");
    let home = run.flush(from - 1, "f");
    assert!(log < home);
    must_be_found("home before the log", &run.moved(log, home));
}

#[test]
fn tags_that_are_flushed_after_what_says_how_old_they_are() {
    let run = direct();
    let from = run.position(8);
    let tags = run.page(from, "f", tag_page_at(0));
    let trimmed = run.flush(from, "log.hot");
    assert!(tags < trimmed);
    must_be_found("tags after their checkpoint", &run.moved(tags, trimmed));
}

/// The positions that promises are judged by follow what is moved.
#[test]
fn moved_calls_move_promises() {
    let backing = MemoryBacking::new();
    (0..4).for_each(|_| backing.sync_fs().unwrap());
    let step = |position| Step {
        position,
        contents: [None, None],
        durable: [true; FILES],
        on_device: [true; FILES],
    };
    let run = Run { trace: backing.trace(), steps: (1..=4).map(step).collect() };
    let positions = |run: &Run| run.steps.iter().map(|step| step.position).collect::<Vec<_>>();
    assert_eq!(positions(&run.without(1)), [1, 1, 2, 3]);
    // What was the first call is the third now.
    assert_eq!(positions(&run.moved(0, 2)), [0, 1, 3, 4]);
    // And what was the last is the second.
    assert_eq!(positions(&run.moved(3, 1)), [1, 3, 4, 4]);
}
