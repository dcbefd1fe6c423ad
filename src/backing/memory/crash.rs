//! Every state that a power cut may leave behind.
//!
//! What a sync has made durable is there. Of the rest: each write is absent, there, or torn at
//! sectors of 512 bytes, whichever the order; metadata is there as [`Order`] allows. Sector
//! subsets are exhaustive up to eight sectors, and beyond that the extremes and a sample.
//!
//! The model of a sync is what POSIX and the Linux manuals promise and no more: `fdatasync` covers
//! data, size and extents; `fsync` the attributes as well; neither covers the file's name, which
//! takes the `fsync` of the directory. A file without a name is gone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::MemoryBacking;
use super::image::{Image, SECTOR_LEN};
use super::random::Random;
use super::trace::{Key, Op, Part, Sectors, Trace, sectors};

/// Up to so many unsynced sectors every subset is tried: the record of a commit of one block has
/// as many that differ from what was there.
const EXHAUSTIVE: usize = 9;

/// How metadata that no sync covers reaches the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// As with ext4's data=ordered journal: in the order it was done, across all files, a sync
    /// taking along whatever came before what it covers; a file's size never ahead of its data.
    Journal,
    /// In any order, as far as it is not about the same name or the same file's extents: new names,
    /// removed names and sizes each on their own, and a size without the data (zeros).
    Reordered,
}

#[derive(Clone, Debug)]
pub struct Options {
    pub orders: Vec<Order>,
    /// The most states for each cut and order.
    pub budget: usize,
    pub seed: u64,
    /// Whether the device may lose what was written out but not flushed.
    pub volatile_cache: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            orders: vec![Order::Journal, Order::Reordered],
            budget: 64,
            seed: 1,
            volatile_cache: true,
        }
    }
}

/// One crash state: where the power was cut, and what of the unsynced operations is there.
/// Its `Debug` form is enough to repeat it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Crash {
    pub cut: usize,
    pub order: Order,
    unsynced: BTreeMap<usize, Part>,
}

/// What no sync before the cut covers.
#[derive(Clone, Debug, Default)]
struct Pending {
    /// Operations whose metadata is open, in order.
    metadata: Vec<usize>,
    /// Writes whose data is open, and which of their sectors.
    data: Vec<(usize, Vec<usize>)>,
    /// Number of sectors of those writes.
    counts: HashMap<usize, usize>,
}

/// Operations whose metadata is there, among [`Pending::metadata`].
type Metadata = HashSet<usize>;
/// Sectors that are there, by operation.
type Data = HashMap<usize, HashSet<usize>>;

impl Trace {
    /// The crash states of a power cut after the first `cut` operations, without repetition.
    pub fn crashes(&self, cut: usize, options: &Options) -> Vec<Crash> {
        let mut random = Random::new(options.seed ^ (cut as u64) << 20);
        let mut found = Vec::new();
        let mut without_metadata: Option<Pending> = None;
        for &order in &options.orders {
            let pending = self.pending(cut, order, options.volatile_cache);
            if pending.metadata.is_empty() {
                // One order is then as the other.
                if without_metadata.as_ref().is_some_and(|other| other.data == pending.data) {
                    continue;
                }
                without_metadata = Some(pending.clone());
            }
            let mut seen = HashSet::new();
            let mut add = |metadata: &Metadata, data: &Data| {
                let crash = self.crash(cut, order, &pending, metadata, data);
                if seen.insert(crash.clone()) {
                    found.push(crash);
                }
                seen.len()
            };
            let metadata = self.metadata_choices(&pending, order, options.budget, &mut random);
            let data = data_choices(&pending, options.budget, &mut random);
            if metadata.len() * data.len() <= options.budget {
                metadata.iter().for_each(|m| data.iter().for_each(|d| _ = add(m, d)));
                continue;
            }
            // The extremes of each with each, then what chance brings.
            for m in metadata.iter().take(2) {
                data.iter().take(2).for_each(|d| _ = add(m, d));
            }
            for _ in 0..options.budget * 4 {
                let m = &metadata[random.below(metadata.len() as u64) as usize];
                let d = &data[random.below(data.len() as u64) as usize];
                if add(m, d) >= options.budget {
                    break;
                }
            }
        }
        found
    }

    /// The disk that `crash` leaves, as a backing of its own, recording from here.
    pub fn materialise(&self, crash: &Crash) -> Arc<MemoryBacking> {
        let mut image = self.initial.clone();
        self.replay(&mut image, crash);
        image.settle();
        MemoryBacking::from_image(image)
    }

    /// The disk as it was after `cut` operations: what a killed process leaves.
    pub fn at(&self, cut: usize) -> Arc<MemoryBacking> {
        let mut image = self.initial.clone();
        self.ops[..cut].iter().for_each(|op| image.apply(op, &Part::ALL));
        image.settle();
        MemoryBacking::from_image(image)
    }

    fn replay(&self, image: &mut Image, crash: &Crash) {
        for (at, op) in self.ops[..crash.cut].iter().enumerate() {
            image.apply(op, crash.unsynced.get(&at).unwrap_or(&Part::ALL));
        }
    }

    fn pending(&self, cut: usize, order: Order, volatile_cache: bool) -> Pending {
        let ops = &self.ops[..cut];
        let mut synced = Synced::default();
        let mut open = Vec::new();
        let mut last_covered = None;
        let mut pending = Pending::default();
        for (at, op) in ops.iter().enumerate().rev() {
            if matches!(op, Op::SyncFs) {
                last_covered = last_covered.max(Some(at));
                break;
            }
            synced.note(op);
            let keys = op.keys();
            if !keys.is_empty() {
                if synced.covers(op, &keys, order) {
                    synced.keys.extend(keys);
                    last_covered = last_covered.max(Some(at));
                } else {
                    open.push(at);
                }
            }
            if let Op::Write { ino, offset, data, .. } = op
                && !synced.data.contains(ino)
            {
                let all: Vec<_> = sectors(*offset, data.len()).collect();
                let free = |i: &usize| {
                    volatile_cache || !synced.is_written_out(*ino, *offset, all[*i].clone())
                };
                pending.counts.insert(at, all.len());
                pending.data.push((at, (0..all.len()).filter(free).collect()));
            }
        }
        if order == Order::Journal {
            // One journal: what is covered takes everything before it along, and a size its data.
            let along = |at: &usize| last_covered.is_some_and(|last| *at < last);
            pending.data.retain(|(at, _)| {
                !(along(at) && matches!(ops[*at], Op::Write { grows: true, .. }))
            });
            open.retain(|at| !along(at));
        }
        open.reverse();
        pending.data.reverse();
        pending.metadata = open;
        self.leave_out_what_changes_nothing(&mut pending);
        pending
    }

    /// A sector that was written as it was is there either way, unless what made it so is open too.
    fn leave_out_what_changes_nothing(&self, pending: &mut Pending) {
        let same = self.same();
        let emptied = |at: &usize| match self.ops[*at] {
            Op::SetLen { ino, .. } | Op::PunchHole { ino, .. } => Some(ino),
            _ => None,
        };
        let emptied: HashSet<u64> = pending.metadata.iter().filter_map(emptied).collect();
        let mut open: HashSet<(u64, u64)> = HashSet::new();
        for (at, free) in &mut pending.data {
            let Op::Write { ino, offset, .. } = &self.ops[*at] else { continue };
            if emptied.contains(ino) {
                continue;
            }
            // By where it starts: unaligned writes to a sector are all of them about it.
            let first = offset / SECTOR_LEN as u64;
            free.retain(|&i| {
                let place = (*ino, first + i as u64);
                let matters = !same[*at][i] || open.contains(&place);
                if matters {
                    open.insert(place);
                }
                matters
            });
        }
    }

    fn metadata_choices(
        &self,
        pending: &Pending,
        order: Order,
        budget: usize,
        random: &mut Random,
    ) -> Vec<Metadata> {
        let open = &pending.metadata;
        let mut choices = vec![open.iter().copied().collect(), Metadata::new()];
        match order {
            Order::Journal => {
                let lens = (1..open.len()).rev().take(budget);
                choices.extend(lens.map(|len| open[..len].iter().copied().collect::<Metadata>()));
            }
            Order::Reordered if open.len() <= EXHAUSTIVE => {
                for bits in 1..(1_u32 << open.len()).saturating_sub(1) {
                    let is_set = |i: &usize| bits >> i & 1 == 1;
                    choices.push((0..open.len()).filter(is_set).map(|i| open[i]).collect());
                }
            }
            Order::Reordered => {
                for &one in open.iter().take(budget) {
                    choices.push(Metadata::from([one]));
                    choices.push(open.iter().copied().filter(|&other| other != one).collect());
                }
                for _ in 0..budget {
                    let odds = 1 + random.below(7);
                    choices.push(open.iter().copied().filter(|_| random.chance(odds)).collect());
                }
            }
        }
        choices.iter_mut().for_each(|choice| self.respect_keys(open, choice));
        choices
    }

    /// Takes out of `choice` what cannot be there without something before it that is not.
    fn respect_keys(&self, open: &[usize], choice: &mut Metadata) {
        let mut missing: HashSet<Key> = HashSet::new();
        for at in open {
            let keys = self.ops[*at].keys();
            if !choice.contains(at) || keys.iter().any(|key| missing.contains(key)) {
                choice.remove(at);
                missing.extend(keys);
            }
        }
    }

    fn crash(
        &self,
        cut: usize,
        order: Order,
        pending: &Pending,
        metadata: &Metadata,
        data: &Data,
    ) -> Crash {
        let mut unsynced: BTreeMap<usize, Part> = BTreeMap::new();
        for &at in &pending.metadata {
            let part = Part { metadata: metadata.contains(&at), data: Sectors::All };
            unsynced.insert(at, part);
        }
        for (at, free) in &pending.data {
            let with_size = unsynced.get(at).is_none_or(|part| part.metadata);
            let grows = matches!(self.ops[*at], Op::Write { grows: true, .. });
            if order == Order::Journal && grows && with_size {
                continue;
            }
            let there = data.get(at);
            let count = pending.counts.get(at).copied().unwrap_or(0);
            let mut present = vec![true; count];
            free.iter().for_each(|i| present[*i] = there.is_some_and(|there| there.contains(i)));
            let data = if present.iter().all(|&there| there) {
                Sectors::All
            } else if present.iter().any(|&there| there) {
                Sectors::Some(present)
            } else {
                Sectors::None
            };
            unsynced.insert(*at, Part { metadata: with_size, data });
        }
        unsynced.retain(|_, part| *part != Part::ALL);
        Crash { cut, order, unsynced }
    }
}

/// What the operations behind the one in hand have made durable.
#[derive(Debug, Default)]
struct Synced {
    /// Files: data and extents.
    data: HashSet<u64>,
    /// Files and directories: attributes too.
    all: HashSet<u64>,
    names: HashSet<u64>,
    written_out: Vec<(u64, std::ops::Range<u64>)>,
    /// Of operations that are durable: those before them on the same key are too.
    keys: HashSet<Key>,
}

impl Synced {
    fn note(&mut self, op: &Op) {
        match op {
            Op::SyncData { ino } => _ = self.data.insert(*ino),
            Op::SyncAll { ino } => {
                self.data.insert(*ino);
                self.all.insert(*ino);
            }
            Op::SyncDir { dir } => {
                self.names.insert(*dir);
                self.all.insert(*dir);
            }
            Op::WriteOut { ino, offset, len } => {
                self.written_out.push((*ino, *offset..offset.saturating_add(*len)));
            }
            _ => {}
        }
    }

    fn covers(&self, op: &Op, keys: &[Key], order: Order) -> bool {
        let one = |key: &Key| {
            self.keys.contains(key)
                || match key {
                    Key::Name(dir, _) => self.names.contains(dir),
                    Key::Extents(ino) => self.data.contains(ino),
                    Key::Attributes(ino) => self.all.contains(ino),
                }
        };
        // A journal commits a file's link count, and with it the name, when the file is synced.
        let linked =
            order == Order::Journal && op.linked().is_some_and(|ino| self.all.contains(&ino));
        linked || keys.iter().any(one)
    }

    fn is_written_out(&self, ino: u64, offset: u64, sector: std::ops::Range<usize>) -> bool {
        let (from, to) = (offset + sector.start as u64, offset + sector.end as u64);
        self.written_out
            .iter()
            .any(|(of, range)| *of == ino && range.start <= from && to <= range.end)
    }
}

/// All, none, and the rest: every subset of a few sectors, else each write alone there or missing
/// and a sample.
fn data_choices(pending: &Pending, budget: usize, random: &mut Random) -> Vec<Data> {
    let free: Vec<(usize, usize)> = pending
        .data
        .iter()
        .flat_map(|(at, free)| free.iter().map(|&sector| (*at, sector)))
        .collect();
    let choose = |is_there: &mut dyn FnMut(usize, (usize, usize)) -> bool| {
        let mut choice = Data::new();
        for (i, &(at, sector)) in free.iter().enumerate() {
            if is_there(i, (at, sector)) {
                choice.entry(at).or_default().insert(sector);
            }
        }
        choice
    };
    let mut choices = vec![choose(&mut |_, _| true), Data::new()];
    if free.len() <= EXHAUSTIVE {
        for bits in 1..(1_u32 << free.len()).saturating_sub(1) {
            choices.push(choose(&mut |i, _| bits >> i & 1 == 1));
        }
        return choices;
    }
    for (write, _) in pending.data.iter().rev().take(budget) {
        choices.push(choose(&mut |_, (at, _)| at == *write));
        choices.push(choose(&mut |_, (at, _)| at != *write));
    }
    for round in 0..budget {
        let odds = 1 + random.below(7);
        if round % 2 == 0 {
            choices.push(choose(&mut |_, _| random.chance(odds)));
        } else {
            // Whole writes, and one of them torn.
            let whole: HashMap<usize, bool> =
                pending.data.iter().map(|(at, _)| (*at, random.chance(odds))).collect();
            let torn = pending.data[random.below(pending.data.len() as u64) as usize].0;
            choices.push(choose(&mut |_, (at, _)| {
                if at == torn { random.chance(odds) } else { whole.get(&at) == Some(&true) }
            }));
        }
    }
    choices
}
