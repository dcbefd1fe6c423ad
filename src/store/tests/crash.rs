//! Power cuts: every state that a disk may be in after one, recovered by the real code.
//!
//! A workload runs on the recording backing. After each operation the content of each file is
//! noted, and whether the operation promised that it would last. Then the trace is cut at every
//! call, in every way that [`Options`] asks for, and what recovery makes of it must be the content
//! after one of the operations: no earlier one than the last that promised, no later one than the
//! last that was begun. Nothing may read as an error, and a check of the state, before its recovery,
//! may find nothing but notes. Now and then recovery itself is cut, and what
//! recovers from that; now and then the volume is written to again, and cut again.

mod killed;
mod nonces;
mod planted;
mod tampered;
mod workloads;

use std::ops::ControlFlow;
use std::sync::Arc;

use super::support::{KEY, Mounted, in_memory, mount, mount_read_only, pattern, revalidate};
use crate::backing::Backing;
use crate::backing::memory::{Crash, MemoryBacking, Options, Random, Trace};
use crate::maintenance::check::tests::support::check_backing;
use crate::maintenance::check::{Finding, Repair};
use crate::store::intent_log::FILES as LOGS;
use crate::store::{Durability, File, Rotated, Store};

/// The files of a workload.
const NAMES: [&str; 2] = ["f", "g"];
const FILES: usize = NAMES.len();

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
        keep_size: bool,
    },
    Sync,
    Checkpoint,
    /// Everything is on stable storage, names too.
    SyncAll,
    /// Of everything that was sealed with keys made by then; ended after so many groups.
    Rotate {
        before: u64,
        groups: usize,
    },
    /// The volume is cut off, and opened again.
    Revalidate,
    /// The same with the other file.
    Other(Box<Op>),
}

/// A file as it reads; None where it is not there.
type Content = Option<Arc<Vec<u8>>>;

/// What there was after an operation.
#[derive(Clone, Debug)]
struct Step {
    /// Calls recorded when it returned.
    position: usize,
    contents: [Content; FILES],
    durable: [bool; FILES],
    /// As durable as the device is.
    on_device: [bool; FILES],
}

pub(super) struct Run {
    pub(super) trace: Trace,
    /// The first is what there was before the first operation.
    steps: Vec<Step>,
}

/// How much is tried.
#[derive(Clone, Debug)]
pub(super) struct Effort {
    /// States for each cut and order.
    pub budget: usize,
    pub seed: u64,
    /// So many states have their recovery cut, and as many are written to again.
    pub deep: usize,
    /// The device may lose what it was handed and not told to flush.
    pub volatile_cache: bool,
    /// One in so many states is looked at by fsck before it is recovered; 0 for none.
    pub checked: usize,
}

impl Effort {
    pub(super) fn of(budget: usize, seed: u64) -> Effort {
        Effort { budget, seed, deep: seeds(4) as usize / 2, volatile_cache: true, checked: 8 }
    }

    fn options(&self) -> Options {
        let Effort { budget, seed, volatile_cache, .. } = *self;
        Options { budget, seed, volatile_cache, ..Options::default() }
    }
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

/// Runs operations and notes what they leave.
struct Driver {
    backing: Arc<MemoryBacking>,
    mounted: Mounted,
    contents: [Content; FILES],
    /// Its name is durable.
    named: [bool; FILES],
    /// As much of it was durable once, and has been neither cut off nor punched since.
    kept: [usize; FILES],
    steps: Vec<Step>,
}

impl Driver {
    /// In a new volume, with the first file.
    fn new() -> Driver {
        let (backing, mounted) = in_memory();
        let mut driver = Driver::after(backing, mounted, [None, None]);
        driver.contents[0] = Some(Arc::default());
        driver.steps[0].contents = driver.contents.clone();
        driver.mounted.create(NAMES[0]);
        driver
    }

    /// In one that was recovered, and has this in it.
    fn after(backing: Arc<MemoryBacking>, mounted: Mounted, contents: [Content; FILES]) -> Driver {
        let there = contents.each_ref().map(Option::is_some);
        let kept = contents.each_ref().map(|content| content.as_ref().map_or(0, |c| c.len()));
        let steps = vec![Step {
            position: backing.position(),
            contents: contents.clone(),
            durable: there,
            on_device: there,
        }];
        Driver { backing, mounted, contents, named: there, kept, steps }
    }

    fn file(&mut self, which: usize) -> Arc<File> {
        if self.contents[which].is_none() {
            let file = self.mounted.create(NAMES[which]);
            self.contents[which] = Some(Arc::default());
            self.note(which, false, false);
            return file;
        }
        self.mounted.open(NAMES[which])
    }

    /// As the name layer does before anything of a new file may count as durable.
    fn name(&mut self, which: usize, file: &File) {
        if file.is_unsynced() || !self.named[which] {
            self.mounted.store.tree().sync().unwrap();
            self.named[which] = true;
        }
    }

    fn run(&mut self, op: &Op) {
        let (which, op) = match op {
            Op::Other(op) => (1, &**op),
            op => (0, op),
        };
        let file = self.file(which);
        let mut content = self.contents[which].as_ref().map_or_else(Vec::new, |c| c.to_vec());
        let (mut durable, mut on_device) = (false, false);
        match *op {
            Op::Write { offset, len, seed, durability } => {
                let data = pattern(len, seed);
                if durability == Durability::Flushed {
                    self.name(which, &file);
                }
                durable = durability == Durability::Flushed;
                // A plain file system promises no more than that either.
                let inside = offset as usize + len <= self.kept[which];
                on_device = durability == Durability::OnDevice && inside;
                file.write_at(&data, offset, durability).unwrap();
                grow(&mut content, offset + len as u64);
                content[offset as usize..offset as usize + len].copy_from_slice(&data);
            }
            Op::Truncate(len) => {
                file.truncate(len).unwrap();
                content.resize(len as usize, 0);
                self.kept[which] = self.kept[which].min(len as usize);
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
                self.kept[which] = self.kept[which].min(offset as usize);
            }
            Op::Allocate { offset, len, keep_size } => {
                file.allocate(offset, len, keep_size).unwrap();
                if !keep_size {
                    grow(&mut content, offset + len);
                }
            }
            Op::Sync => {
                let owed = file.owes_name();
                self.name(which, &file);
                file.sync(false).unwrap();
                if let Some(owed) = owed {
                    file.name_is_durable(owed);
                }
                durable = true;
            }
            Op::Checkpoint => self.mounted.store.checkpoint().unwrap(),
            Op::SyncAll => {
                self.mounted.store.sync_all().unwrap();
                self.named = [true; FILES];
                durable = true;
            }
            Op::Rotate { before, groups } => {
                rotate(&self.mounted.store, &file, before, groups);
            }
            Op::Revalidate => revalidate(&self.mounted.store, &self.mounted.gate),
            Op::Other(_) => unreachable!("of two files there is one other"),
        }
        if durable {
            self.kept[which] = content.len();
        }
        self.contents[which] = Some(Arc::new(content));
        self.note(which, durable, durable || on_device);
    }

    /// Everything is as it is now, and that was promised of one file.
    fn note(&mut self, which: usize, durable: bool, on_device: bool) {
        let mut step = Step {
            position: self.backing.position(),
            contents: self.contents.clone(),
            durable: [false; FILES],
            on_device: [false; FILES],
        };
        step.durable[which] = durable;
        step.on_device[which] = on_device;
        self.steps.push(step);
    }

    fn end(self) -> Run {
        Run { trace: self.backing.trace(), steps: self.steps }
    }
}

fn grow(content: &mut Vec<u8>, to: u64) {
    if content.len() < to as usize {
        content.resize(to as usize, 0);
    }
}

pub(super) fn run(ops: &[Op]) -> Run {
    let mut driver = Driver::new();
    ops.iter().for_each(|op| driver.run(op));
    driver.end()
}

/// What is in the files, or why that cannot be read.
fn contents(mounted: &Mounted) -> Result<[Content; FILES], String> {
    let mut contents = [None, None];
    for (name, content) in NAMES.into_iter().zip(&mut contents) {
        if let Some(read) = mounted.content(name) {
            *content = Some(Arc::new(read.map_err(|error| format!("{name}: {error}"))?));
        }
    }
    Ok(contents)
}

impl Run {
    /// What follows so many operations.
    fn after(mut self, ops: usize) -> Run {
        self.steps.drain(..ops);
        self
    }

    /// Of one of the files, or of a log.
    fn ino(&self, name: &str) -> u64 {
        let root = self.trace.at(self.trace.len()).root();
        let log = LOGS.contains(&name.as_bytes());
        let dir = if log { root } else { root.lookup(b"tree").unwrap() };
        dir.lookup(name.as_bytes()).unwrap().id().ino
    }

    /// Which contents a cut there may leave: the steps from the last that promised to the one that
    /// was under way.
    fn allowed(&self, which: usize, cut: usize, volatile_cache: bool) -> (&[Step], bool) {
        let promises = |step: &Step| match volatile_cache {
            true => step.durable[which],
            false => step.on_device[which],
        };
        let promised = self.steps.iter().rposition(|step| promises(step) && step.position <= cut);
        let begun = self.steps.iter().position(|step| step.position > cut);
        let last = begun.map_or(self.steps.len(), |begun| begun + 1);
        (&self.steps[promised.unwrap_or(0)..last], promised.is_some())
    }

    pub(super) fn judge(&self, cut: usize, mounted: &Mounted) -> Result<(), String> {
        self.judge_contents(cut, &contents(mounted)?, true)
    }

    fn judge_contents(
        &self,
        cut: usize,
        contents: &[Content; FILES],
        volatile_cache: bool,
    ) -> Result<(), String> {
        for (which, content) in contents.iter().enumerate() {
            let (allowed, promised) = self.allowed(which, cut, volatile_cache);
            let Some(there) = content else {
                if promised {
                    return Err(format!("{} is not there", NAMES[which]));
                }
                continue;
            };
            if !allowed.iter().any(|step| step.contents[which] == *content) {
                let known = self.steps.iter().position(|step| step.contents[which] == *content);
                let (name, len) = (NAMES[which], there.len());
                return Err(format!("{name} has {len} bytes, as after step {known:?}"));
            }
        }
        Ok(())
    }

    /// The number of states that were tried.
    pub(super) fn check(&self, effort: &Effort) -> Result<usize, String> {
        let options = effort.options();
        let mut random = Random::new(effort.seed);
        // Before the first step there was nothing to judge.
        let cuts = self.steps[0].position..=self.trace.len();
        let crashes: Vec<Crash> = cuts.flat_map(|cut| self.trace.crashes(cut, &options)).collect();
        let mut choose = |count: usize| -> Vec<usize> {
            (0..count).map(|_| random.below(crashes.len() as u64) as usize).collect()
        };
        let (again, lives) = (choose(effort.deep), choose(effort.deep));
        for (i, crash) in crashes.iter().enumerate() {
            if effort.checked > 0 && i % effort.checked == 0 {
                self.look_at(crash)?;
            }
            if effort.checked > 0 && i % effort.checked == 1 {
                self.only_read(crash, effort)?;
            }
            if i % GROWN == 0 {
                nothing_past_the_end(self.trace.materialise(crash))
                    .map_err(|error| format!("cut {}: {crash:?}: {error}", crash.cut))?;
            }
            let count = |chosen: &[usize]| chosen.iter().filter(|&&chosen| chosen == i).count();
            self.try_crash(crash, effort, count(&again) > 0, count(&lives) > 0).map_err(
                |error| {
                    let calls = self.trace.describe(crash.cut);
                    format!("cut {}: {calls}; {crash:?}: {error}", crash.cut)
                },
            )?;
        }
        Ok(crashes.len())
    }

    /// A read-only mount of a state: it shows the same, and leaves it as it was.
    fn only_read(&self, crash: &Crash, effort: &Effort) -> Result<(), String> {
        let backing = self.trace.materialise(crash);
        let mounted = mount_read_only(backing.clone());
        let mounted = mounted.map_err(|error| format!("read-only: {error}"))?;
        let contents = contents(&mounted).map_err(|error| format!("read-only: {error}"))?;
        self.judge_contents(crash.cut, &contents, effort.volatile_cache)
            .map_err(|error| format!("read-only: {error}"))?;
        match backing.position() {
            0 => Ok(()),
            _ => Err(format!("read-only: {}", backing.trace().describe(usize::MAX))),
        }
    }

    /// What fsck says of a state.
    fn look_at(&self, crash: &Crash) -> Result<(), String> {
        let backing = self.trace.materialise(crash);
        let calls = || format!("{}{crash:?}", self.trace.describe(crash.cut));
        let checked = check_backing(backing, Some(KEY), Repair::No);
        let checked = checked.map_err(|error| format!("check: {error} after {}", calls()))?;
        // Of the two copies one may be torn, which looks as any damage does.
        let torn = |finding: &Finding| finding.backing_path.starts_with("memory/sessions.");
        match checked.serious().into_iter().find(|finding| !torn(finding)) {
            Some(finding) => Err(format!("check: {finding:#?} after {}", calls())),
            None => Ok(()),
        }
    }

    /// Tries one state; with `again` cuts inside its recovery too, and with `life` what follows it.
    fn try_crash(
        &self,
        crash: &Crash,
        effort: &Effort,
        again: bool,
        life: bool,
    ) -> Result<(), String> {
        let backing = self.trace.materialise(crash);
        let mounted = mount(backing.clone()).map_err(|error| format!("recovery: {error}"))?;
        let contents = contents(&mounted)?;
        self.judge_contents(crash.cut, &contents, effort.volatile_cache)?;
        if again {
            let mut random = Random::new(effort.seed ^ crash.cut as u64);
            cut_recovery(&backing.trace(), &contents, LEVELS, &mut random)
                .map_err(|error| format!("after its recovery was cut: {error}"))?;
        }
        if life {
            let run = second_life(backing, mounted, contents, crash.cut as u8);
            let effort = Effort { budget: 1, deep: 0, ..effort.clone() };
            run.check(&effort).map_err(|error| format!("in a second life: {error}"))?;
        }
        Ok(())
    }
}

/// In one state of so many, files are grown.
const GROWN: usize = 5;

/// Where files grow after a recovery, they read as zeros, before and after that comes home.
fn nothing_past_the_end(backing: Arc<MemoryBacking>) -> Result<(), String> {
    const MORE: u64 = 2 << 20;
    let mounted = mount(backing).map_err(|error| format!("recovery: {error}"))?;
    let before = contents(&mounted)?;
    let mut expected = before.clone();
    for (name, content) in NAMES.iter().zip(&mut expected) {
        let Some(content) = content else { continue };
        let size = content.len() as u64 + MORE;
        mounted.open(name).truncate(size).map_err(|error| format!("{name}: {error}"))?;
        Arc::make_mut(content).resize(size as usize, 0);
    }
    for when in ["at once", "at home"] {
        if contents(&mounted).map_err(|error| format!("grown, {when}: {error}"))? != expected {
            return Err(format!("grown, {when}: not zeros"));
        }
        mounted.store.checkpoint().map_err(|error| format!("grown: {error}"))?;
    }
    Ok(())
}

/// Recovery is cut, and the recovery of that, and of that.
const LEVELS: usize = 3;

/// Cuts a recovery at every call. Whatever follows must come to the same contents.
fn cut_recovery(
    trace: &Trace,
    contents: &[Content; FILES],
    levels: usize,
    random: &mut Random,
) -> Result<(), String> {
    let options = Options { budget: 2, seed: random.next_u64(), ..Options::default() };
    let deeper = random.below(trace.len() as u64 + 1) as usize;
    for cut in 0..=trace.len() {
        for (i, crash) in trace.crashes(cut, &options).into_iter().enumerate() {
            let at = |error: &dyn std::fmt::Display| {
                format!("{}{crash:?}: {error}", trace.describe(cut))
            };
            let backing = trace.materialise(&crash);
            let mounted = mount(backing.clone()).map_err(|error| at(&error))?;
            if self::contents(&mounted).map_err(|error| at(&error))? != *contents {
                return Err(at(&"another content"));
            }
            drop(mounted);
            if i == 0 {
                nothing_past_the_end(trace.materialise(&crash)).map_err(|error| at(&error))?;
            }
            if levels > 1 && cut == deeper && i == 0 {
                cut_recovery(&backing.trace(), contents, levels - 1, random)
                    .map_err(|error| at(&error))?;
            }
        }
    }
    Ok(())
}

/// The volume goes on after its recovery, each time with something else.
fn second_life(
    backing: Arc<MemoryBacking>,
    mounted: Mounted,
    contents: [Content; FILES],
    seed: u8,
) -> Run {
    let end = contents[0].as_ref().map_or(0, |content| content.len() as u64);
    let mut driver = Driver::after(backing, mounted, contents);
    for op in [
        write(100, 512, seed),
        Op::Other(Box::new(write(0, 5000, seed ^ 0x55))),
        write(end, 70_000, seed ^ 0xaa),
        Op::Sync,
        Op::Checkpoint,
        write(200, 512, !seed),
        Op::Sync,
    ] {
        driver.run(&op);
    }
    driver.end()
}

pub(super) fn write(offset: u64, len: usize, seed: u8) -> Op {
    Op::Write { offset, len, seed, durability: Durability::Handed }
}

pub(super) fn checked(name: &str, ops: &[Op], budget: usize) {
    let run = run(ops);
    let states = run.check(&Effort::of(budget, 1));
    let states = states.unwrap_or_else(|error| panic!("{name}: {error}"));
    assert!(states > run.trace.len(), "{name}: {states} states of {} calls", run.trace.len());
    no_plaintext(name, &run.trace, ops);
}

/// Nothing that was written reached the disk as it is, in any state of it.
fn no_plaintext(name: &str, trace: &Trace, ops: &[Op]) {
    for op in ops {
        let op = if let Op::Other(op) = op { op } else { op };
        if let Op::Write { len, seed, .. } = *op {
            let canary = &pattern(len, seed)[len / 2..][..24.min(len / 2)];
            let found = trace.brings(|bytes| memchr::memmem::find(bytes, canary).is_some());
            assert!(!found, "{name}: plaintext on the disk");
        }
    }
}

/// How many seeds to try of what is chosen by chance.
fn seeds(usual: u64) -> u64 {
    let wanted = std::env::var("BYOKFS_CRASH_SEEDS").ok().and_then(|text| text.parse().ok());
    wanted.unwrap_or(usual)
}
