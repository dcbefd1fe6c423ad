//! What somebody with access to the disk can do to what a power cut left. Whatever it is: the mount is
//! refused, reads fail, or everything is as it should be. What `docs/FORMAT.md` says cannot be
//! detected is told apart here, and nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::workloads::random_workload;
use super::{Content, FILES, NAMES, Op, Run, contents, run, seeds, write};
use crate::backing::memory::{Crash, MemoryBacking, Options, Random};
use crate::backing::{Access, Backing, FileRef};
use crate::store::intent_log::{FILES as LOGS, Record};
use crate::store::layout::{
    BLOCK, BLOCK_LEN, GROUP_PLAIN, SECTOR_LEN, SECTORS_PER_PAGE, block_at, generation_page_at,
    tag_page_at,
};
use crate::store::tests::support::{mount, unrecovered};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    FlipBlock,
    FlipTags,
    FlipGenerations,
    FlipHeader,
    FlipHeaders,
    ZeroHeaders,
    SwapBlocks,
    SwapTags,
    ForeignBlock,
    ForeignTags,
    ForeignHeaders,
    SwapFiles,
    ReplayBlock,
    ReplayTagSector,
    ReplayTagPage,
    ReplayGenerations,
    ReplayHeader,
    FlipLog,
    ZeroLogPage,
    SwapLogPages,
    ReplayLogPage,
    FlipAnchor,
    FlipAnchors,
    ReplayAnchor,
    ReplayAnchors,
    FlipSessions,
    ReplaySessions,
    FlipVolume,
}

use Kind::*;

const KINDS: [Kind; 28] = [
    FlipBlock,
    FlipTags,
    FlipGenerations,
    FlipHeader,
    FlipHeaders,
    ZeroHeaders,
    SwapBlocks,
    SwapTags,
    ForeignBlock,
    ForeignTags,
    ForeignHeaders,
    SwapFiles,
    ReplayBlock,
    ReplayTagSector,
    ReplayTagPage,
    ReplayGenerations,
    ReplayHeader,
    FlipLog,
    ZeroLogPage,
    SwapLogPages,
    ReplayLogPage,
    FlipAnchor,
    FlipAnchors,
    ReplayAnchor,
    ReplayAnchors,
    FlipSessions,
    ReplaySessions,
    FlipVolume,
];

/// Kinds that are survived, or change nothing that counts, wherever they hit.
const HARMLESS: [Kind; 8] = [
    FlipHeader,
    ReplayHeader,
    SwapFiles,
    FlipAnchor,
    ReplayAnchor,
    ReplayAnchors,
    FlipSessions,
    FlipVolume,
];

/// A disk that is tampered with.
struct Disk<'a> {
    backing: &'a Arc<MemoryBacking>,
    /// The same volume at an earlier time.
    old: Arc<MemoryBacking>,
    random: &'a mut Random,
    /// The one page of a log that was changed.
    log_page: Option<(usize, u64)>,
}

fn open(backing: &MemoryBacking, name: &str) -> Option<FileRef> {
    let root = backing.root();
    let dir = if NAMES.contains(&name) { root.lookup(b"tree").ok()? } else { root };
    dir.lookup(name.as_bytes()).ok()?.open(Access::ReadWrite).ok()
}

fn read(file: &FileRef, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_at(&mut bytes, at).unwrap();
    bytes
}

fn flip(file: &FileRef, at: u64) {
    let byte = read(file, at, 1)[0];
    file.write_at(&[byte ^ 4], at).unwrap();
}

fn swap(a: (&FileRef, u64), b: (&FileRef, u64), len: usize) -> bool {
    let (first, second) = (read(a.0, a.1, len), read(b.0, b.1, len));
    a.0.write_at(&second, a.1).unwrap();
    b.0.write_at(&first, b.1).unwrap();
    first != second
}

impl Disk<'_> {
    fn file(&self, name: &str) -> Option<FileRef> {
        open(self.backing, name).filter(|file| file.metadata().unwrap().size > 0)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    /// Of what the first file has at home.
    fn block(&mut self, file: &FileRef) -> Option<u64> {
        let len = file.metadata().unwrap().size;
        let blocks: Vec<u64> = (0..len / BLOCK).filter(|&b| block_at(b) + BLOCK <= len).collect();
        let count = blocks.len() as u64;
        (count > 0).then(|| blocks[self.below(count) as usize])
    }

    fn group(&mut self, file: &FileRef) -> Option<u64> {
        Some(self.block(file)? * BLOCK / GROUP_PLAIN)
    }

    fn sector(&mut self) -> u64 {
        self.below(SECTORS_PER_PAGE as u64) * SECTOR_LEN as u64
    }

    /// A page of a log that has a record in it.
    fn any_log_page(&mut self, log: &FileRef) -> Option<u64> {
        let pages = (2..300).map(|page| page * BLOCK);
        let used: Vec<u64> =
            pages.filter(|&at| read(log, at, BLOCK_LEN).iter().any(|&byte| byte != 0)).collect();
        let count = used.len() as u64;
        (count > 0).then(|| used[self.below(count) as usize])
    }

    /// Puts back what was there. False where that is what is there.
    fn replay(&self, name: &str, at: u64, len: usize) -> Option<bool> {
        let (now, old) = (open(self.backing, name)?, open(&self.old, name)?);
        let (there, before) = (read(&now, at, len), read(&old, at, len));
        now.write_at(&before, at).unwrap();
        Some(there != before)
    }

    /// None, or false, where there was nothing to change.
    fn tamper(&mut self, kind: Kind) -> Option<bool> {
        let stream = self.below(2) as usize;
        let log = std::str::from_utf8(LOGS[stream]).unwrap();
        let copy = self.below(2) * BLOCK;
        let name = NAMES[0];
        Some(match kind {
            FlipBlock => {
                let file = self.file(name)?;
                let at = block_at(self.block(&file)?) + self.below(BLOCK);
                flip(&file, at);
                true
            }
            FlipTags => {
                let file = self.file(name)?;
                let at = tag_page_at(self.group(&file)?) + self.below(BLOCK);
                flip(&file, at);
                true
            }
            FlipGenerations => {
                let file = self.file(name)?;
                flip(&file, generation_page_at(0) + self.below(BLOCK));
                true
            }
            FlipHeader | FlipHeaders => {
                let file = self.file(name)?;
                let at = self.below(SECTOR_LEN as u64);
                flip(&file, copy + at);
                if kind == FlipHeaders {
                    flip(&file, BLOCK - copy + at);
                }
                true
            }
            ZeroHeaders => {
                self.file(name)?.write_at(&[0; 2 * BLOCK_LEN], 0).unwrap();
                true
            }
            SwapBlocks => {
                let file = self.file(name)?;
                let (a, b) = (self.block(&file)?, self.block(&file)?);
                swap((&file, block_at(a)), (&file, block_at(b)), BLOCK_LEN)
            }
            SwapTags => {
                let file = self.file(name)?;
                let (a, b) = (self.group(&file)?, self.group(&file)?);
                let (a, b) = (tag_page_at(a) + self.sector(), tag_page_at(b) + self.sector());
                swap((&file, a), (&file, b), SECTOR_LEN)
            }
            ForeignBlock | ForeignTags | ForeignHeaders => {
                let (file, other) = (self.file(name)?, self.file(NAMES[1])?);
                let (at, len) = match kind {
                    ForeignBlock => (block_at(self.block(&other)?), BLOCK_LEN),
                    ForeignTags => (tag_page_at(0) + self.sector(), SECTOR_LEN),
                    _ => (0, 2 * BLOCK_LEN),
                };
                let foreign = read(&other, at, len);
                let before = read(&file, at, len);
                file.write_at(&foreign, at).unwrap();
                foreign != before
            }
            SwapFiles => {
                let (file, other) = (self.file(name)?, self.file(NAMES[1])?);
                let sizes = [&file, &other].map(|file| file.metadata().unwrap().size);
                swap((&file, 0), (&other, 0), sizes[0].max(sizes[1]) as usize);
                file.set_len(sizes[1]).unwrap();
                other.set_len(sizes[0]).unwrap();
                true
            }
            ReplayBlock => {
                let at = block_at(self.block(&self.file(name)?)?);
                self.replay(name, at, BLOCK_LEN)?
            }
            ReplayTagSector => {
                let at = tag_page_at(self.group(&self.file(name)?)?) + self.sector();
                self.replay(name, at, SECTOR_LEN)?
            }
            ReplayTagPage => {
                let at = tag_page_at(self.group(&self.file(name)?)?);
                self.replay(name, at, BLOCK_LEN)?
            }
            ReplayGenerations => {
                let at = generation_page_at(0);
                let now = read(&self.file(name)?, at, SECTOR_LEN);
                let old = read(&open(&self.old, name)?, at, SECTOR_LEN);
                let groups = (32..SECTOR_LEN).step_by(8);
                // To before a group was there: that group is holes then.
                if groups
                    .into_iter()
                    .any(|at| old[at..at + 8] == [0; 8] && now[at..at + 8] != [0; 8])
                {
                    return None;
                }
                self.replay(name, at, SECTOR_LEN)?
            }
            ReplayHeader => self.replay(name, copy, BLOCK_LEN)?,
            FlipLog | ZeroLogPage => {
                let file = self.file(log)?;
                let at = self.any_log_page(&file)?;
                self.log_page = Some((stream, at));
                match kind {
                    FlipLog => flip(&file, at + self.below(BLOCK)),
                    _ => file.write_at(&[0; BLOCK_LEN], at).unwrap(),
                }
                true
            }
            SwapLogPages => {
                let file = self.file(log)?;
                let (a, b) = (self.any_log_page(&file)?, self.any_log_page(&file)?);
                swap((&file, a), (&file, b), BLOCK_LEN)
            }
            ReplayLogPage => {
                let at = self.any_log_page(&self.file(log)?)?;
                self.log_page = Some((stream, at));
                self.replay(log, at, BLOCK_LEN)?
            }
            FlipAnchor | FlipAnchors => {
                let file = self.file("log.hot")?;
                let at = self.below(SECTOR_LEN as u64);
                flip(&file, copy + at);
                if kind == FlipAnchors {
                    flip(&file, BLOCK - copy + at);
                }
                true
            }
            ReplayAnchor => self.replay("log.hot", copy, BLOCK_LEN)?,
            ReplayAnchors => self.replay("log.hot", 0, 2 * BLOCK_LEN)?,
            FlipSessions => {
                let copy = self.below(2) as usize;
                let file = self.file(["sessions.a", "sessions.b"][copy])?;
                let len = file.metadata().unwrap().size;
                flip(&file, self.below(len));
                true
            }
            ReplaySessions => {
                let mut changed = false;
                for name in ["sessions.a", "sessions.b"] {
                    let old = open(&self.old, name)?;
                    changed |= self.replay(name, 0, old.metadata().unwrap().size as usize)?;
                }
                changed
            }
            FlipVolume => {
                let file = self.file("volume")?;
                flip(&file, copy + self.below(SECTOR_LEN as u64));
                true
            }
        })
    }
}

/// A record of the log in a crash state.
#[derive(Clone, Copy, Debug)]
struct Logged {
    stream: usize,
    at: u64,
    end: u64,
    /// A later one says that it was on stable storage.
    known: bool,
}

fn logged(run: &Run, crash: &Crash) -> Vec<Logged> {
    let mounted = unrecovered(run.trace.materialise(crash), false).unwrap();
    let found = mounted.store.found.lock();
    let found = found.as_ref().unwrap();
    let one = |record: &Record| {
        let (stream, at) = (usize::from(record.place.stream), record.place.at);
        let end = at + record.pages() * BLOCK;
        Logged { stream, at, end, known: record.place.seq <= found.durable[stream] }
    };
    found.records.iter().chain(&found.cut_short).map(one).collect()
}

/// The step that the log may be cut back to: what was cut off leaves nothing that speaks of it. Before
/// that the log was last emptied.
fn floor(run: &Run, crash: &Crash) -> usize {
    let anchor = format!("write inode {} at", run.ino("log.hot"));
    let trims = run.trace.find(|line| line.starts_with(&anchor) && line.contains(" 512 bytes"));
    // With the flush that follows it.
    let last = trims.into_iter().rfind(|at| at + 1 < crash.cut).unwrap_or(0);
    run.steps.iter().rposition(|step| step.position <= last).unwrap_or(0)
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    detected: usize,
    survived: usize,
}

struct Case<'a> {
    run: &'a Run,
    crash: &'a Crash,
    records: Vec<Logged>,
    whole: [Content; FILES],
    floor: usize,
}

impl Case<'_> {
    fn try_kind(&self, kind: Kind, random: &mut Random) -> Option<Result<bool, String>> {
        let backing = self.run.trace.materialise(self.crash);
        let old = self.run.trace.at(random.below(self.crash.cut as u64 + 1) as usize);
        let mut disk = Disk { backing: &backing, old, random, log_page: None };
        if disk.tamper(kind) != Some(true) {
            return None;
        }
        let log_page = disk.log_page;
        let Ok(mounted) = mount(backing) else { return Some(Ok(true)) };
        if let Some(lost) = log_page.and_then(|page| self.known_record(page)) {
            return Some(Err(format!("{kind:?}: {lost:?} is missed by nobody")));
        }
        let unborn = mounted.store.recovery.get().map_or(0, |report| report.unborn);
        let Ok(mut after) = contents(&mounted) else { return Some(Ok(true)) };
        if kind == SwapFiles {
            after.swap(0, 1);
        }
        for (which, content) in after.iter().enumerate() {
            if content.is_none() && self.whole[which].is_some() && unborn > 0 {
                return Some(Ok(true)); // which is reported
            }
            // Of a file without blocks the header is all there is: as if its name had been moved.
            if kind == ForeignHeaders && which == 0 && *content == after[1] {
                continue;
            }
            if !self.is_between(which, content) {
                let name = NAMES[which];
                let bytes = content.as_ref().map(|content| content.len());
                return Some(Err(format!("{kind:?}: {name} is wrong, silently: {bytes:?} bytes")));
            }
        }
        Some(Ok(false))
    }

    /// The record that a page of a log belongs to, if another says that it must be there.
    fn known_record(&self, (stream, at): (usize, u64)) -> Option<Logged> {
        let mut records = self.records.iter().filter(|record| record.known);
        let here =
            |record: &&Logged| record.stream == stream && (record.at..record.end).contains(&at);
        records.find(here).copied()
    }

    /// What is known to be durable is there, and nothing but what was written in that order.
    fn is_between(&self, which: usize, content: &Content) -> bool {
        let steps = &self.run.steps;
        let last = steps.iter().position(|step| step.position > self.crash.cut);
        let between = self.floor..=last.unwrap_or(steps.len() - 1);
        *content == self.whole[which]
            || steps[between].iter().any(|step| step.contents[which] == *content)
    }
}

fn tamper_with(run: &Run, seed: u64, counts: &mut BTreeMap<Kind, Count>) {
    let (mut random, mut chosen) = (Random::new(seed ^ 0x7a), Random::new(seed));
    let options = Options { budget: 1, seed, ..Options::default() };
    for cut in (run.steps[0].position + 3..=run.trace.len()).step_by(2) {
        for crash in run.trace.crashes(cut, &options) {
            let whole = contents(&mount(run.trace.materialise(&crash)).unwrap()).unwrap();
            let (records, floor) = (logged(run, &crash), floor(run, &crash));
            let case = Case { run, crash: &crash, records, whole, floor };
            // A part of them for each state, unless there is time.
            let some = if seeds(5) > 5 { 8 } else { 3 };
            for kind in KINDS.into_iter().filter(|_| chosen.chance(some)) {
                match case.try_kind(kind, &mut random) {
                    None => {}
                    Some(Ok(true)) => counts.entry(kind).or_default().detected += 1,
                    Some(Ok(false)) => counts.entry(kind).or_default().survived += 1,
                    Some(Err(error)) => {
                        let calls = run.trace.describe(cut);
                        panic!("seed {seed}, cut {cut}: {error} after\n{calls}{crash:?}");
                    }
                }
            }
        }
    }
}

fn other(op: Op) -> Op {
    Op::Other(Box::new(op))
}

#[test]
fn nothing_wrong_is_read_from_a_tampered_crash_state() {
    let mut counts = BTreeMap::new();
    let ops = [
        write(0, 20_000, 1),
        other(write(0, 20_000, 2)),
        Op::Sync,
        other(Op::Sync),
        Op::Checkpoint,
        write(20_000, 300_000, 3),
        write(100, 5000, 4),
        Op::Sync,
        Op::Revalidate,
        write(200, 512, 5),
        Op::Checkpoint,
        Op::Punch { offset: 40_000, len: 90_000 },
        write(300, 512, 6),
        other(write(0, 70_000, 7)),
        Op::Sync,
        Op::Checkpoint,
        write(400, 512, 8),
        Op::Sync,
        write(500, 512, 9),
        Op::Sync,
    ];
    tamper_with(&run(&ops), 1, &mut counts);
    for seed in 0..seeds(5) / 5 {
        tamper_with(&run(&random_workload(seed)), seed, &mut counts);
    }
    for kind in KINDS {
        let count = counts.get(&kind).copied().unwrap_or_default();
        let seen = if HARMLESS.contains(&kind) { count.survived } else { count.detected };
        assert!(seen > 0, "{kind:?} was never tried in earnest: {counts:#?}");
    }
}
