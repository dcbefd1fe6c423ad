//! The operations that were done on a [`super::MemoryBacking`], in order.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::image::{Image, Inode, SECTOR_LEN};
use crate::backing::{SetTime, Timestamp};

/// A change of an inode's attributes.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Mode(u32),
    Owner(Option<u32>, Option<u32>),
    /// The last is the clock of that moment.
    Times(SetTime, SetTime, Timestamp),
    SetXattr(Vec<u8>, Vec<u8>),
    RemoveXattr(Vec<u8>),
}

/// One successful call. Names are resolved: an operation says which inode it linked or moved.
#[derive(Clone, Debug)]
pub(super) enum Op {
    /// `grows` when it ended past the end of the file.
    Write {
        ino: u64,
        offset: u64,
        data: Arc<[u8]>,
        grows: bool,
    },
    SetLen {
        ino: u64,
        len: u64,
    },
    Allocate {
        ino: u64,
        offset: u64,
        len: u64,
        keep_size: bool,
    },
    PunchHole {
        ino: u64,
        offset: u64,
        len: u64,
    },
    SyncData {
        ino: u64,
    },
    SyncAll {
        ino: u64,
    },
    WriteOut {
        ino: u64,
        offset: u64,
        len: u64,
    },
    /// An inode without a name: harmless until it is linked.
    Create {
        ino: u64,
        inode: Arc<Inode>,
    },
    Link {
        dir: u64,
        name: Vec<u8>,
        ino: u64,
    },
    Unlink {
        dir: u64,
        name: Vec<u8>,
        ino: u64,
    },
    /// `exchanged` is the inode that took the old name.
    Rename {
        dir: u64,
        name: Vec<u8>,
        to: u64,
        to_name: Vec<u8>,
        ino: u64,
        exchanged: Option<u64>,
    },
    Attribute {
        ino: u64,
        change: Change,
    },
    SyncDir {
        dir: u64,
    },
    SyncFs,
}

/// What of an operation is ordered with what of others, however much a disk reorders.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Name(u64, Vec<u8>),
    /// Size and extents of a file: one record on disk.
    Extents(u64),
    Attributes(u64),
}

impl Op {
    /// Empty when the operation changes no metadata.
    pub(super) fn keys(&self) -> Vec<Key> {
        match self {
            Op::Write { ino, grows: true, .. }
            | Op::SetLen { ino, .. }
            | Op::Allocate { ino, .. }
            | Op::PunchHole { ino, .. } => vec![Key::Extents(*ino)],
            Op::Attribute { ino, .. } => vec![Key::Attributes(*ino)],
            Op::Link { dir, name, .. } | Op::Unlink { dir, name, .. } => {
                vec![Key::Name(*dir, name.clone())]
            }
            Op::Rename { dir, name, to, to_name, .. } => {
                vec![Key::Name(*dir, name.clone()), Key::Name(*to, to_name.clone())]
            }
            _ => Vec::new(),
        }
    }

    /// The inodes whose own record the operation changes besides its keys: link counts.
    pub(super) fn linked(&self) -> Option<u64> {
        match self {
            Op::Link { ino, .. } | Op::Unlink { ino, .. } | Op::Rename { ino, .. } => Some(*ino),
            _ => None,
        }
    }

    /// In one line, for messages; data by its length.
    pub(super) fn describe(&self) -> String {
        match self {
            Op::Write { ino, offset, data, grows } => {
                format!("write inode {ino} at {offset}, {} bytes, grows: {grows}", data.len())
            }
            Op::Create { ino, inode } => format!("create inode {ino}, {:?}", inode.kind),
            Op::Link { dir, name, ino } => {
                format!("link {dir}/{} to inode {ino}", String::from_utf8_lossy(name))
            }
            Op::Unlink { dir, name, ino } => {
                format!("unlink {dir}/{}, inode {ino}", String::from_utf8_lossy(name))
            }
            Op::Rename { dir, name, to, to_name, ino, .. } => format!(
                "rename {dir}/{} to {to}/{}, inode {ino}",
                String::from_utf8_lossy(name),
                String::from_utf8_lossy(to_name)
            ),
            other => format!("{other:?}"),
        }
    }
}

/// The byte ranges of `len` bytes at `offset` that lie in one sector each.
pub(super) fn sectors(offset: u64, len: usize) -> impl Iterator<Item = Range<usize>> {
    let lead = (offset % SECTOR_LEN as u64) as usize;
    let count = if len == 0 { 0 } else { (lead + len).div_ceil(SECTOR_LEN) };
    (0..count)
        .map(move |i| (i * SECTOR_LEN).saturating_sub(lead)..((i + 1) * SECTOR_LEN - lead).min(len))
}

/// What of an operation reached the disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Part {
    pub metadata: bool,
    /// Of a write.
    pub data: Sectors,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Sectors {
    None,
    All,
    Some(Vec<bool>),
}

impl Part {
    pub(super) const ALL: Part = Part { metadata: true, data: Sectors::All };

    pub(super) fn has_sector(&self, at: usize) -> bool {
        match &self.data {
            Sectors::None => false,
            Sectors::All => true,
            Sectors::Some(present) => present.get(at).copied().unwrap_or(false),
        }
    }
}

/// A recording: the disk at its start, and what was done since.
#[derive(Clone, Debug)]
pub struct Trace {
    pub(super) initial: Image,
    pub(super) ops: Vec<Op>,
    same: OnceLock<Vec<Vec<bool>>>,
}

impl Trace {
    pub(super) fn new(initial: Image, ops: Vec<Op>) -> Trace {
        Trace { initial, ops, same: OnceLock::new() }
    }

    /// For each operation, if it is a write, which of its sectors it found as it left them.
    pub(super) fn same(&self) -> &[Vec<bool>] {
        self.same.get_or_init(|| {
            let mut image = self.initial.clone();
            let same = self.ops.iter().map(|op| {
                let same = match op {
                    Op::Write { ino, offset, data, .. } => image.has(*ino, *offset, data),
                    _ => Vec::new(),
                };
                image.apply(op, &Part::ALL);
                same
            });
            same.collect()
        })
    }

    /// The number of operations; a cut may be anywhere from 0 to this.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// The operations before `cut`, one line each, for a failed test's message.
    pub fn describe(&self, cut: usize) -> String {
        let lines = self.ops.iter().take(cut).enumerate();
        lines.map(|(at, op)| format!("{at:5} {}\n", op.describe())).collect()
    }

    /// The same recording without its operation `at`: what a forgotten call would have left.
    /// For tests that plant bugs.
    pub fn without(&self, at: usize) -> Trace {
        let mut ops = self.ops.clone();
        ops.remove(at);
        Trace::new(self.initial.clone(), ops)
    }

    /// The same recording with its operation `from` done as number `to` instead, which is what a
    /// wrong order would have left.
    pub fn moved(&self, from: usize, to: usize) -> Trace {
        let mut ops = self.ops.clone();
        let op = ops.remove(from);
        ops.insert(to, op);
        Trace::new(self.initial.clone(), ops)
    }

    /// Whether `wanted` likes anything that an operation brings to the disk: data, names, link
    /// targets, attributes. What a crash leaves is made of nothing else.
    pub fn brings(&self, wanted: impl Fn(&[u8]) -> bool) -> bool {
        self.ops.iter().any(|op| match op {
            Op::Write { data, .. } => wanted(data),
            Op::Create { inode, .. } => wanted(&inode.target),
            Op::Link { name, .. } => wanted(name),
            Op::Rename { to_name, .. } => wanted(to_name),
            Op::Attribute { change: Change::SetXattr(name, value), .. } => {
                wanted(name) || wanted(value)
            }
            _ => false,
        })
    }

    /// Positions of the operations whose line in [`Trace::describe`] `wanted` likes.
    pub fn find(&self, wanted: impl Fn(&str) -> bool) -> Vec<usize> {
        (0..self.ops.len()).filter(|&at| wanted(&self.ops[at].describe())).collect()
    }

    /// Positions of the calls that make something durable.
    pub fn syncs(&self) -> Vec<usize> {
        let is_sync = |op: &Op| {
            matches!(op, Op::SyncData { .. } | Op::SyncAll { .. } | Op::SyncDir { .. } | Op::SyncFs)
        };
        (0..self.ops.len()).filter(|&at| is_sync(&self.ops[at])).collect()
    }
}
