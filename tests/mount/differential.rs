//! Random operations on the mount, on a plain directory beside it, and on a model in memory: all
//! three must agree on every result: errors, contents, sizes, modes, link counts, listings. Where
//! a time moves in the plain directory it must move on the mount.
//!
//! A failure names its seed; `BYOKFS_TEST_SEED` runs that one alone.

mod model;
mod real;

use std::time::{SystemTime, UNIX_EPOCH};

use self::model::Model;
use self::real::Real;
use crate::harness::mounted;

const STEPS: usize = 2500;
const SEED: &str = "BYOKFS_TEST_SEED";
/// Open files at a time.
const SLOTS: usize = 4;

#[derive(Clone, Debug)]
enum Op {
    Open { slot: usize, path: String, create: bool, exclusive: bool, truncate: bool },
    Close { slot: usize },
    Write { slot: usize, offset: u64, len: usize, byte: u8 },
    Append { slot: usize, len: usize, byte: u8 },
    Read { slot: usize, offset: u64, len: usize },
    SetLen { slot: usize, len: u64 },
    Space { slot: usize, how: Space, offset: u64, len: u64 },
    StatOpen { slot: usize },
    Sync { slot: usize },
    Mkdir { path: String },
    Rmdir { path: String },
    Unlink { path: String },
    Rename { from: String, to: String, how: Rename },
    Link { from: String, to: String },
    Symlink { target: String, path: String },
    ReadLink { path: String },
    Chmod { path: String, mode: u32 },
    SetTimes { path: String, seconds: i64 },
    SetXattr { path: String, name: String, value: Vec<u8> },
    GetXattr { path: String, name: String },
    RemoveXattr { path: String, name: String },
    Stat { path: String },
    List { path: String },
}

#[derive(Clone, Copy, Debug)]
enum Space {
    Allocate,
    AllocateKeep,
    Punch,
    Zero,
}

#[derive(Clone, Copy, Debug)]
enum Rename {
    Replace,
    NoReplace,
    Exchange,
}

/// What an operation answered: a description of the result, or the errno.
type Answer = Result<String, i32>;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Few names, so that they meet; one of them is long.
    fn path(&mut self) -> String {
        let depth = 1 + self.below(3) as usize;
        let names: Vec<String> = (0..depth)
            .map(|_| match self.below(6) {
                5 => "long".repeat(60),
                name => char::from(b'a' + name as u8).to_string(),
            })
            .collect();
        names.join("/")
    }

    /// Around the edges of blocks and groups of blocks, and anywhere.
    fn offset(&mut self) -> u64 {
        let edge = [0, 4096, 8192, 61_440, 491_520][self.below(5) as usize];
        match self.below(3) {
            0 => edge,
            1 => edge + self.below(3),
            _ => self.below(600_000),
        }
    }

    fn op(&mut self) -> Op {
        let slot = self.below(SLOTS as u64) as usize;
        let (path, other) = (self.path(), self.path());
        let (offset, len) = (self.offset(), 1 + self.below(20_000) as usize);
        let byte = self.next() as u8;
        let name = format!("user.{}", ["x", "y"][self.below(2) as usize]);
        match self.below(100) {
            0..14 => Op::Open {
                slot,
                path,
                create: self.chance(80),
                exclusive: self.chance(20),
                truncate: self.chance(15),
            },
            14..18 => Op::Close { slot },
            18..30 => Op::Write { slot, offset, len, byte },
            30..33 => Op::Append { slot, len, byte },
            33..40 => Op::Read { slot, offset, len: len * 2 },
            40..44 => Op::SetLen { slot, len: offset },
            44..48 => {
                let how = [Space::Allocate, Space::AllocateKeep, Space::Punch, Space::Zero];
                Op::Space { slot, how: how[self.below(4) as usize], offset, len: len as u64 }
            }
            48..51 => Op::StatOpen { slot },
            51..52 => Op::Sync { slot },
            52..60 => Op::Mkdir { path },
            60..63 => Op::Rmdir { path },
            63..67 => Op::Unlink { path },
            67..75 => {
                let how = [Rename::Replace, Rename::Replace, Rename::NoReplace, Rename::Exchange];
                Op::Rename { from: path, to: other, how: how[self.below(4) as usize] }
            }
            75..78 => Op::Link { from: path, to: other },
            78..80 => {
                let target = "t/".repeat([3, 50, 400][self.below(3) as usize]);
                Op::Symlink { target, path }
            }
            80..82 => Op::ReadLink { path },
            82..84 => Op::Chmod { path, mode: self.below(0o1000) as u32 },
            84..85 => Op::SetTimes { path, seconds: self.below(900_000_000) as i64 },
            85..87 => Op::SetXattr { path, name, value: vec![byte; len % 300] },
            87..89 => Op::GetXattr { path, name },
            89..90 => Op::RemoveXattr { path, name },
            90..96 => Op::Stat { path },
            _ => Op::List { path },
        }
    }
}

fn run(seed: u64) {
    let mut mount = mounted!();
    let plain = tempfile::tempdir().unwrap();
    let mut random = Random(seed);
    let mut on_mount = Real::new(mount.root());
    let mut on_plain = Real::new(plain.path().to_owned());
    let mut model = Model::new();
    let mut trace = Vec::new();
    for step in 0..STEPS {
        let op = random.op();
        let (here, there, model) = (on_mount.apply(&op), on_plain.apply(&op), model.apply(&op));
        trace.push(format!("{op:?} -> {here:?}"));
        let recent = || trace[trace.len().saturating_sub(40)..].join("\n");
        assert_eq!(here, there, "mount and directory; seed {seed}, step {step}:\n{}", recent());
        assert_eq!(here, model, "mount and model; seed {seed}, step {step}:\n{}", recent());
        if let Some(path) = on_plain.unmatched_move(&on_mount) {
            panic!("a time of {path} did not move; seed {seed}, step {step}:\n{}", recent());
        }
    }
    on_mount.close_all();
    let expected = model.tree();
    assert_eq!(real::tree(&mount.root()), expected, "seed {seed}");
    assert_eq!(real::tree(plain.path()), expected, "seed {seed}");
    mount.remount("");
    assert_eq!(real::tree(&mount.root()), expected, "seed {seed}, after a new mount");
}

fn seeds(fixed: &[u64]) -> Vec<u64> {
    match std::env::var(SEED) {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => fixed.to_vec(),
    }
}

#[test]
fn mount_directory_and_model_agree() {
    seeds(&[1, 2, 3]).into_iter().for_each(run);
}

#[test]
fn they_agree_on_a_sequence_nobody_has_seen() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    seeds(&[now.as_nanos() as u64]).into_iter().for_each(run);
}
