//! Power cuts: every state that a disk may be in after one, recovered by the real code.
//!
//! A workload runs on the recording backing. After each operation the content of the file is
//! noted, and whether the operation promised that it would last. Then the trace is cut at every
//! call, in every way that [`Options`] asks for, and what recovery makes of it must be the content
//! after one of the operations: no earlier one than the last that promised, no later one than the
//! last that was begun. Nothing may read as an error, and a check of the state, before its recovery,
//! may find nothing but notes.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::support::{KEY, Mounted, in_memory, mount, pattern};
use crate::backing::memory::{Crash, Options, Random, Trace};
use crate::maintenance::check::Repair;
use crate::maintenance::check::tests::support::check_backing;
use crate::store::layout::GROUP_PLAIN;
use crate::store::{Durability, File, Rotated, Store, WriteMode};

#[derive(Clone, Debug)]
pub(super) enum Op {
    Write {
        offset: u64,
        len: usize,
        seed: u8,
        durability: Durability,
    },
    Truncate(u64),
    Punch {
        offset: u64,
        len: u64,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    Allocate {
        offset: u64,
        len: u64,
    },
    Sync,
    Checkpoint,
    /// Of everything that was sealed with keys made by then; ended after so many groups.
    Rotate {
        before: u64,
        groups: usize,
    },
}

/// What there was after an operation.
struct Step {
    /// Calls recorded when it returned.
    position: usize,
    content: Arc<Vec<u8>>,
    durable: bool,
}

pub(super) struct Run {
    pub(super) trace: Trace,
    /// The first is the empty file before its first operation.
    steps: Vec<Step>,
    /// Each state is looked at before it is recovered.
    check_states: bool,
}

/// None where it was ended.
pub(super) fn rotate(
    store: &Store,
    file: &Arc<File>,
    before: u64,
    groups: usize,
) -> Option<Rotated> {
    let mut left = groups;
    let mut pace = |_| {
        let goes_on = left > 0;
        left = left.saturating_sub(1);
        if goes_on { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let files = [file.clone()];
    let rotated = store.rotate_deks(&files, before, &mut pace).unwrap()?;
    rotated.into_iter().next()
}

fn grown(content: &mut Vec<u8>, to: u64) {
    if content.len() < to as usize {
        content.resize(to as usize, 0);
    }
}

pub(super) fn run(ops: &[Op]) -> Run {
    let (backing, mounted) = in_memory();
    let tree = mounted.store.tree();
    let file = mounted.create("f");
    let mut content = Vec::new();
    let mut steps = vec![Step { position: 0, content: Arc::new(Vec::new()), durable: false }];
    let mut named = false;
    for op in ops {
        let mut durable = false;
        let mut promise = |file: &File| {
            // As the name layer does before anything of a new file may count as durable.
            if file.is_unsynced() || !named {
                tree.sync().unwrap();
                named = true;
            }
        };
        match *op {
            Op::Write { offset, len, seed, durability } => {
                let data = pattern(len, seed);
                if durability == Durability::Flushed {
                    promise(&file);
                    durable = true;
                }
                file.write_at(&data, offset, WriteMode { append: false, durability }).unwrap();
                grown(&mut content, offset + len as u64);
                content[offset as usize..offset as usize + len].copy_from_slice(&data);
            }
            Op::Truncate(len) => {
                file.truncate(len).unwrap();
                content.resize(len as usize, 0);
            }
            Op::Punch { offset, len } | Op::Zero { offset, len } => {
                if let Op::Zero { .. } = op {
                    file.zero_range(offset, len, true).unwrap();
                } else {
                    file.punch_hole(offset, len).unwrap();
                }
                let end = content.len().min((offset + len) as usize);
                if (offset as usize) < end {
                    content[offset as usize..end].fill(0);
                }
            }
            Op::Allocate { offset, len } => {
                file.allocate(offset, len, false).unwrap();
                grown(&mut content, offset + len);
            }
            Op::Sync => {
                promise(&file);
                file.sync(false).unwrap();
                file.name_is_durable();
                durable = true;
            }
            Op::Checkpoint => mounted.store.checkpoint().unwrap(),
            Op::Rotate { before, groups } => {
                rotate(&mounted.store, &file, before, groups);
            }
        }
        let content = Arc::new(content.clone());
        steps.push(Step { position: backing.position(), content, durable });
    }
    let trace = backing.trace();
    Run { trace, steps, check_states: true }
}

impl Run {
    /// Which contents a cut there may leave: the steps from the last that promised to the one that
    /// was under way.
    fn allowed(&self, cut: usize) -> (&[Step], bool) {
        let promised = self.steps.iter().rposition(|step| step.durable && step.position <= cut);
        let begun = self.steps.iter().position(|step| step.position > cut);
        let last = begun.map_or(self.steps.len(), |begun| begun + 1);
        (&self.steps[promised.unwrap_or(0)..last], promised.is_some())
    }

    pub(super) fn judge(&self, cut: usize, mounted: &Mounted) -> Result<(), String> {
        let (allowed, promised) = self.allowed(cut);
        match mounted.content("f") {
            None if promised => Err("the file is not there".into()),
            None => Ok(()),
            Some(Err(error)) => Err(error),
            Some(Ok(content)) => {
                if allowed.iter().any(|step| *step.content == content) {
                    return Ok(());
                }
                let known = self.steps.iter().position(|step| *step.content == content);
                Err(format!("{} bytes, as after step {known:?}", content.len()))
            }
        }
    }

    /// Tries one state, and with `again` cuts inside its recovery too.
    fn try_crash(&self, trace: &Trace, crash: &Crash, again: Option<usize>) -> Result<(), String> {
        let backing = trace.materialise(crash);
        let at = |what: &str, error: &dyn std::fmt::Display| {
            format!("cut {}: {}; {crash:?}: {what}: {error}", crash.cut, trace.describe(crash.cut))
        };
        if self.check_states {
            let checked = check_backing(backing.clone(), Some(KEY), Repair::No);
            let checked = checked.map_err(|error| at("check", &error))?;
            if let Some(finding) = checked.serious().first() {
                return Err(at("check", &format!("{finding:#?}")));
            }
        }
        let mounted = mount(backing.clone()).map_err(|error| at("recovery", &error))?;
        self.judge(crash.cut, &mounted).map_err(|error| at("content", &error))?;
        let content = mounted.content("f");
        drop(mounted);
        let Some(budget) = again else { return Ok(()) };
        let second = backing.trace();
        let options = Options { budget, ..Options::default() };
        for cut in 0..=second.len() {
            for inner in second.crashes(cut, &options) {
                let mounted = mount(second.materialise(&inner)).map_err(|error| {
                    let inner = format!("{}{inner:?}", second.describe(cut));
                    at(&format!("recovery after\n{inner}"), &error)
                })?;
                if mounted.content("f") != content {
                    let inner = format!("{}{inner:?}", second.describe(cut));
                    return Err(at("content", &format!("another after\n{inner}")));
                }
            }
        }
        Ok(())
    }

    fn check(&self, trace: &Trace, budget: usize, seed: u64) -> Result<usize, String> {
        let options = Options { budget, seed, ..Options::default() };
        let mut random = Random::new(seed);
        let mut states = 0;
        for cut in 0..=trace.len() {
            for crash in trace.crashes(cut, &options) {
                let again = (random.below(150) == 0).then_some(2);
                self.try_crash(trace, &crash, again)?;
                states += 1;
            }
        }
        Ok(states)
    }
}

pub(super) fn write(offset: u64, len: usize, seed: u8) -> Op {
    Op::Write { offset, len, seed, durability: Durability::Handed }
}

pub(super) fn checked(name: &str, ops: &[Op], budget: usize) {
    let run = run(ops);
    let states = run.check(&run.trace, budget, 1).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(states > run.trace.len(), "{name}: {states} states of {} calls", run.trace.len());
}

/// As a redo log is written: 512 bytes at a time, the last block again and again.
#[test]
fn commits_survive() {
    let mut ops = vec![write(0, 8192, 1), Op::Sync];
    for i in 0..8_u64 {
        let durability = if i % 3 == 0 { Durability::Flushed } else { Durability::Handed };
        ops.push(Op::Write { offset: 8192 + i * 512, len: 512, seed: i as u8 + 2, durability });
        if i == 4 {
            ops.push(Op::Checkpoint);
        }
    }
    ops.push(Op::Sync);
    checked("redo", &ops, 10);
}

#[test]
fn pages_are_whole() {
    let mut ops = vec![write(0, 200_000, 1), Op::Sync, Op::Checkpoint];
    for i in 0..4_u64 {
        let durability = if i % 2 == 0 { Durability::OnDevice } else { Durability::Flushed };
        ops.push(Op::Write {
            offset: i * 3 % 8 * 16384,
            len: 16384,
            seed: i as u8 + 2,
            durability,
        });
    }
    ops.extend([Op::Checkpoint, write(16384, 16384, 77), Op::Sync]);
    checked("pages", &ops, 8);
}

#[test]
fn appends_past_the_log_are_there_or_not() {
    let group = GROUP_PLAIN as usize;
    let ops = [
        write(0, 70_000, 1),
        Op::Sync,
        write(70_000, group, 2),
        write(70_000 + group as u64, 100_000, 3),
        // Over what went home directly, before it is durable, and after.
        write(100_000, 40_000, 4),
        Op::Sync,
        write(300_000, 140_000, 5),
        Op::Checkpoint,
        write(310_000, 10, 6),
        Op::Sync,
    ];
    checked("appends", &ops, 6);
}

#[test]
fn what_is_cut_off_does_not_return() {
    let ops = [
        write(0, 600_000, 1),
        Op::Sync,
        Op::Truncate(10_001),
        write(30_000, 5000, 2),
        Op::Sync,
        Op::Checkpoint,
        Op::Truncate(0),
        Op::Allocate { offset: 0, len: 300_000 },
        write(0, 140_000, 3),
        Op::Sync,
        Op::Truncate(600_000),
        Op::Checkpoint,
    ];
    checked("truncate", &ops, 6);
}

#[test]
fn holes_are_holes() {
    let ops = [
        write(0, 1_000_000, 1),
        Op::Sync,
        Op::Checkpoint,
        Op::Punch { offset: 5000, len: 100_000 },
        Op::Zero { offset: 495_000, len: 600_000 },
        Op::Sync,
        write(20_000, 100, 3),
        write(495_616, 131_072, 4),
        Op::Checkpoint,
        Op::Punch { offset: 0, len: 1_200_000 },
        write(600_000, 90_000, 5),
        Op::Sync,
    ];
    checked("holes", &ops, 4);
}

fn random_op(random: &mut Random, size: u64) -> Op {
    let offset = match random.below(4) {
        0 => size,
        1 => random.below(size + 1) / 4096 * 4096,
        _ => random.below(size + 20_000),
    };
    let len = [512, 4096, 16384, 70_000, 300_000][random.below(5) as usize];
    match random.below(12) {
        0..=4 => {
            let durability = [Durability::Handed, Durability::OnDevice, Durability::Flushed]
                [random.below(3) as usize];
            let seed = random.below(256) as u8;
            Op::Write { offset: offset.min(900_000), len: len as usize, seed, durability }
        }
        5 => Op::Truncate(random.below(900_000)),
        6 => Op::Punch { offset, len: len * 2 },
        7 => Op::Zero { offset, len },
        8 => Op::Allocate { offset: offset.min(800_000), len },
        9 => Op::Checkpoint,
        _ => Op::Sync,
    }
}

#[test]
fn random_workloads_survive() {
    let seeds = std::env::var("BYOKFS_CRASH_SEEDS").ok().and_then(|text| text.parse().ok());
    for seed in 0..seeds.unwrap_or(6_u64) {
        let mut random = Random::new(seed + 1000);
        let mut size = 0;
        let ops: Vec<Op> = (0..12)
            .map(|_| {
                let op = random_op(&mut random, size);
                size = match op {
                    Op::Write { offset, len, .. } => size.max(offset + len as u64),
                    Op::Allocate { offset, len } => size.max(offset + len),
                    Op::Truncate(len) => len,
                    _ => size,
                };
                op
            })
            .collect();
        let run = run(&ops);
        if let Err(error) = run.check(&run.trace, 2, seed) {
            panic!("seed {seed}: {ops:#?}\n{error}");
        }
    }
}

/// The harness finds what it is there for: of each of these mistakes, an example.
#[test]
fn planted_mistakes_are_found() {
    let mut ops = vec![write(0, 8192, 1), Op::Sync];
    for i in 0..3_u64 {
        ops.push(write(8192 + i * 512, 512, i as u8 + 2));
        ops.push(Op::Sync);
    }
    ops.extend([Op::Checkpoint, write(8192, 512, 9), Op::Sync]);
    let mut run = run(&ops);
    run.check(&run.trace, 12, 3).unwrap();
    run.check_states = false;
    let mut harmless = Vec::new();
    let syncs = run.trace.syncs();
    for &at in &syncs {
        if run.check(&run.trace.without(at), 24, 3).is_ok() {
            harmless.push(run.trace.describe(at + 1).lines().last().unwrap_or_default().to_owned());
        }
    }
    // Every other flush left out is found: of the log, the directory, the header, new regions. Not
    // needed here are the inode's at the first sync, whose header is durable already; that of data
    // and tags, which the new region's covers; the anchor's, as long as nothing overwrites what it
    // gave back; and the last, with which the trace ends.
    assert!(harmless.len() <= 4, "{} of {}: {harmless:#?}", harmless.len(), syncs.len());
}
