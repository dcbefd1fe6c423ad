//! A writer of its own: files that are written as database servers write theirs, each by one
//! thread, with every request and every acknowledgement remembered.
//!
//! After a crash a file must be what some of its last requests made of it: each there as a whole
//! or not at all, on top of all that was acknowledged. Where blocks that are there already are
//! written anew, no request may be missing that came before one which is there.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use byokfs::backing::memory::Random;
use rustix::fs::{FallocateFlags, fallocate};

use super::{Crash, Load};

/// More requests than that are not left without an acknowledgement: 2^6 outcomes to compare with.
const MOST_PENDING: u64 = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A log that goes round, its last block written again and again: 512 B upwards.
    Redo,
    /// Pages of 16 KiB in any order, O_DIRECT, up to 960 KiB in a request.
    Pages,
    /// Single blocks and parts of them, O_DSYNC.
    Dsync,
    /// Grows at its end, by odd lengths.
    Append,
    /// Writes, holes and truncations anywhere.
    Shape,
}

/// Of those that change their shape, some: what they do to each other in the log is the hard part.
const FILES: [Kind; 8] = [
    Kind::Redo,
    Kind::Pages,
    Kind::Dsync,
    Kind::Append,
    Kind::Shape,
    Kind::Shape,
    Kind::Shape,
    Kind::Shape,
];

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Redo => "redo",
            Kind::Pages => "pages",
            Kind::Dsync => "dsync",
            Kind::Append => "append",
            Kind::Shape => "shape",
        }
    }

    /// Written before the load starts, and of that length ever after.
    fn fixed(self) -> Option<usize> {
        match self {
            Kind::Redo | Kind::Pages => Some(4 << 20),
            Kind::Dsync => Some(256 << 10),
            Kind::Append | Kind::Shape => None,
        }
    }

    fn flags(self) -> i32 {
        match self {
            Kind::Pages => libc::O_DIRECT,
            Kind::Dsync => libc::O_DSYNC,
            Kind::Redo | Kind::Append | Kind::Shape => 0,
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write { offset: usize, data: Arc<Vec<u8>> },
    SetLen(usize),
    Punch { offset: usize, len: usize },
    Zero { offset: usize, len: usize },
}

impl Op {
    fn issue(&self, file: &File) -> io::Result<()> {
        match *self {
            Op::Write { offset, ref data } => match file.write_at(data, offset as u64)? {
                written if written == data.len() => Ok(()),
                written => Err(io::Error::other(format!("{written} of {} written", data.len()))),
            },
            Op::SetLen(len) => file.set_len(len as u64),
            Op::Punch { offset, len } => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                Ok(fallocate(file, flags, offset as u64, len as u64)?)
            }
            Op::Zero { offset, len } => {
                Ok(fallocate(file, FallocateFlags::ZERO_RANGE, offset as u64, len as u64)?)
            }
        }
    }

    fn apply(&self, content: &mut Vec<u8>) {
        match *self {
            Op::Write { offset, ref data } => {
                let end = offset + data.len();
                content.resize(content.len().max(end), 0);
                content[offset..end].copy_from_slice(data);
            }
            Op::SetLen(len) => content.resize(len, 0),
            Op::Punch { offset, len } => {
                let end = (offset + len).min(content.len());
                content[offset.min(end)..end].fill(0);
            }
            Op::Zero { offset, len } => {
                let end = offset + len;
                content.resize(content.len().max(end), 0);
                content[offset..end].fill(0);
            }
        }
    }

    fn shown(&self) -> String {
        match self {
            Op::Write { offset, data } => format!("write of {} at {offset}", data.len()),
            other => format!("{other:?}"),
        }
    }
}

/// What one file must hold.
struct Ledger {
    name: String,
    kind: Kind,
    /// With all that was acknowledged as durable.
    content: Vec<u8>,
    /// Issued since then; the last one may not have returned.
    pending: Vec<Op>,
    returned: usize,
    random: Random,
    failure: Option<String>,
    /// Requests are all there or not at all. Plain file systems do not promise it.
    atomic: bool,
}

impl Ledger {
    fn next(&mut self, position: &mut usize) -> Op {
        let end = self.len_with_pending();
        let random = &mut self.random;
        let write = |random: &mut Random, offset, len| Op::Write {
            offset,
            data: Arc::new(random.bytes(len)),
        };
        match self.kind {
            Kind::Redo => {
                let size = self.content.len();
                let len = 512 * (1 + random.below(16) as usize);
                let offset = if *position + len > size { 0 } else { *position };
                // The last block is not full: the next request writes it again.
                *position = offset + len - 512 * (random.below(2) as usize);
                write(random, offset, len)
            }
            Kind::Pages => {
                const PAGE: usize = 16 << 10;
                let count = if random.chance(1) { 1 + random.below(60) } else { 1 } as usize;
                let last = self.content.len() / PAGE - count;
                let page = random.below(last as u64 + 1) as usize;
                write(random, page * PAGE, count * PAGE)
            }
            Kind::Dsync => {
                let len = 1 + random.below(6000) as usize;
                let offset = random.below((self.content.len() - len) as u64) as usize;
                write(random, offset, len)
            }
            Kind::Append => {
                if end > 6 << 20 {
                    return Op::SetLen(0);
                }
                let most = if random.chance(1) { 900_000 } else { 20_000 };
                let count = 1 + random.below(most) as usize;
                write(random, end, count)
            }
            Kind::Shape => {
                const SIZE: u64 = 1 << 20;
                let offset = random.below(SIZE) as usize;
                let most = if random.chance(2) { 200_000 } else { 9000 };
                let len = 1 + random.below(most) as usize;
                match random.below(8) {
                    0 => Op::SetLen(offset),
                    1 => Op::Punch { offset, len },
                    2 => Op::Zero { offset, len },
                    _ => write(random, offset, len),
                }
            }
        }
    }

    fn len_with_pending(&self) -> usize {
        self.pending.iter().fold(self.content.len(), |len, op| match op {
            Op::Write { offset, data } => len.max(offset + data.len()),
            Op::Zero { offset, len: count } => len.max(offset + count),
            Op::SetLen(len) => *len,
            Op::Punch { .. } => len,
        })
    }

    /// The first `count` pending requests are there for good.
    fn settle(&mut self, count: usize) {
        for op in self.pending.drain(..count) {
            op.apply(&mut self.content);
        }
        self.returned -= count;
    }

    /// Takes as given whatever is where a request was pending.
    fn adopt(&mut self, found: &[u8]) {
        for op in self.pending.drain(..) {
            if let Op::Write { offset, data } = op {
                let range = offset..offset + data.len();
                if let Some(bytes) = found.get(range.clone()) {
                    self.content[range].copy_from_slice(bytes);
                }
            }
        }
        self.returned = 0;
    }

    /// Finds out which of the pending requests are there, and goes on from that.
    fn check(&mut self, found: Vec<u8>, crash: Crash) -> Result<(), String> {
        if crash == Crash::Kill {
            self.settle(self.returned);
        }
        if !self.atomic {
            self.adopt(&found);
        }
        let in_order = self.kind.fixed().is_some();
        let count = self.pending.len();
        let outcomes = if in_order { count as u64 + 1 } else { 1 << count };
        let mut nearest = (0, 0);
        for outcome in 0..outcomes {
            let there = |number: usize| match in_order {
                true => (number as u64) < outcome,
                false => outcome & 1 << number != 0,
            };
            let mut expected = self.content.clone();
            for (number, op) in self.pending.iter().enumerate() {
                if there(number) {
                    op.apply(&mut expected);
                }
            }
            if expected == found {
                self.content = found;
                self.pending.clear();
                self.returned = 0;
                return Ok(());
            }
            nearest = nearest.max((same(&expected, &found), outcome));
        }
        let pending: Vec<String> = self.pending.iter().map(Op::shown).collect();
        Err(format!(
            "{}: {} bytes, which are not what {} acknowledged bytes and any {} of the requests \
             since then ({} of them returned) make: the best match, {:b}, agrees on the first {}; {pending:?}",
            self.name,
            found.len(),
            self.content.len(),
            if in_order { "first ones" } else { "ones" },
            self.returned,
            nearest.1,
            nearest.0,
        ))
    }
}

/// Up to the first difference.
fn same(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

pub struct Records {
    ledgers: Vec<Arc<Mutex<Ledger>>>,
    acknowledged: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
    /// Claims durability without asking for it: the control that must be found out.
    careless: bool,
}

impl Records {
    pub fn new(seed: u64) -> Records {
        let ledgers = FILES.iter().enumerate().map(|(number, kind)| {
            let random = Random::new(seed ^ (number as u64) << 56);
            let (content, pending) = (Vec::new(), Vec::new());
            Arc::new(Mutex::new(Ledger {
                name: format!("{}-{number}", kind.name()),
                kind: *kind,
                content,
                pending,
                returned: 0,
                random,
                failure: None,
                atomic: true,
            }))
        });
        Records {
            ledgers: ledgers.collect(),
            acknowledged: Arc::default(),
            threads: Vec::new(),
            careless: false,
        }
    }

    /// On a file system that promises less: only what was acknowledged, at the end of a log that
    /// is flushed after each record.
    pub fn only_durability(mut self) -> Records {
        self.ledgers.retain(|ledger| ledger.lock().unwrap().kind == Kind::Redo);
        self.ledgers.iter().for_each(|ledger| ledger.lock().unwrap().atomic = false);
        self
    }

    pub fn careless(mut self) -> Records {
        self.careless = true;
        self
    }
}

impl Ledger {
    fn path(&self, mnt: &Path) -> PathBuf {
        mnt.join(&self.name)
    }
}

impl Load for Records {
    fn prepare(&mut self, mnt: &Path) {
        for ledger in &self.ledgers {
            let mut ledger = ledger.lock().unwrap();
            let len = ledger.kind.fixed().unwrap_or(0);
            ledger.content = ledger.random.bytes(len);
            let file = File::create(ledger.path(mnt)).unwrap();
            file.write_all_at(&ledger.content, 0).unwrap();
            file.sync_all().unwrap();
        }
        File::open(mnt).unwrap().sync_all().unwrap();
    }

    fn start(&mut self, mnt: &Path, _crashed: &dyn Fn() -> bool) {
        for ledger in &self.ledgers {
            let (path, flags) = {
                let ledger = ledger.lock().unwrap();
                (ledger.path(mnt), ledger.kind.flags())
            };
            let opened = File::options().read(true).write(true).custom_flags(flags).open(path);
            // The power may be gone already.
            let Ok(file) = opened else { continue };
            let (ledger, count) = (Arc::clone(ledger), Arc::clone(&self.acknowledged));
            let careless = self.careless;
            self.threads.push(std::thread::spawn(move || {
                if let Err(failure) = write(&ledger, &file, &count, careless) {
                    ledger.lock().unwrap().failure = Some(failure);
                }
            }));
        }
    }

    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    fn end(&mut self) {
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }

    fn verify(&mut self, mnt: &Path, crash: Crash) {
        let mut wrong = Vec::new();
        for ledger in &self.ledgers {
            let mut ledger = ledger.lock().unwrap();
            if let Some(failure) = ledger.failure.take() {
                wrong.push(format!("{}: {failure}", ledger.name));
            }
            match fs::read(ledger.path(mnt)) {
                Ok(found) => wrong.extend(ledger.check(found, crash).err()),
                Err(error) => wrong.push(format!("{}: cannot be read: {error}", ledger.name)),
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

/// Until an error, which must be one that a crash explains.
fn write(
    ledger: &Mutex<Ledger>,
    file: &File,
    count: &AtomicU64,
    careless: bool,
) -> Result<(), String> {
    let mut position = 0;
    let expected = |error: io::Error| match super::is_of_a_crash(&error) {
        true => Ok(()),
        false => Err(error.to_string()),
    };
    loop {
        let (op, sync) = {
            let mut ledger = ledger.lock().unwrap();
            let op = ledger.next(&mut position);
            ledger.pending.push(op.clone());
            let full = ledger.pending.len() as u64 >= MOST_PENDING;
            let kind = ledger.kind;
            let often = matches!(kind, Kind::Redo | Kind::Append | Kind::Dsync);
            let sync = full || ledger.random.chance(if often { 6 } else { 2 });
            (op, sync)
        };
        if let Err(error) = op.issue(file) {
            return expected(error);
        }
        let durable = {
            let mut ledger = ledger.lock().unwrap();
            ledger.returned += 1;
            ledger.kind == Kind::Dsync
        };
        if !durable {
            if !sync {
                continue;
            }
            if !careless && let Err(error) = file.sync_data() {
                return expected(error);
            }
        }
        let mut ledger = ledger.lock().unwrap();
        let all = ledger.pending.len();
        ledger.settle(all);
        count.fetch_add(1, Ordering::Relaxed);
    }
}
