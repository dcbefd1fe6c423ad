//! What database servers do to their files, and what they might.

use super::{Effort, Op, checked, run, seeds, write};
use crate::backing::memory::Random;
use crate::store::Durability;
use crate::store::layout::GROUP_PLAIN;

fn other(op: Op) -> Op {
    Op::Other(Box::new(op))
}

fn flushed(offset: u64, len: usize, seed: u8) -> Op {
    Op::Write { offset, len, seed, durability: Durability::Flushed }
}

fn on_device(offset: u64, len: usize, seed: u8) -> Op {
    Op::Write { offset, len, seed, durability: Durability::OnDevice }
}

/// As a redo log is written: 512 bytes at a time, the last block again and again.
#[test]
fn commits_survive() {
    let mut ops = vec![write(0, 8192, 1), Op::Sync];
    for i in 0..8_u64 {
        let (offset, seed) = (8192 + i * 512, i as u8 + 2);
        ops.push(if i % 3 == 0 { flushed(offset, 512, seed) } else { write(offset, 512, seed) });
        if i == 4 {
            ops.push(Op::Checkpoint);
        }
    }
    ops.push(Op::Sync);
    checked("redo", &ops, 10);
}

/// Every subset of the sectors that differ: a commit's record has nine of them.
#[test]
fn a_commit_survives_torn_in_every_way() {
    let before = [write(0, 4096, 1), Op::Checkpoint, Op::SyncAll];
    let after = [
        flushed(512, 512, 2),
        Op::Truncate(5000),
        Op::Sync,
        Op::Punch { offset: 0, len: 4096 },
        Op::Sync,
        Op::Checkpoint,
    ];
    let run = run(&[&before[..], &after].concat()).after(before.len());
    let effort = Effort { deep: 0, checked: 20, ..Effort::of(512, 1) };
    let states = run.check(&effort).unwrap_or_else(|error| panic!("{error}"));
    assert!(states > 512, "{states}");
}

#[test]
fn pages_are_whole() {
    let mut ops = vec![write(0, 200_000, 1), Op::Sync, Op::Checkpoint];
    for i in 0..4_u64 {
        let (offset, seed) = (i * 3 % 8 * 16384, i as u8 + 2);
        ops.push(match i % 2 {
            0 => on_device(offset, 16384, seed),
            _ => flushed(offset, 16384, seed),
        });
    }
    ops.extend([Op::Checkpoint, write(16384, 16384, 77), Op::Sync]);
    checked("pages", &ops, 8);
}

/// Where the device keeps what it was handed, an O_DIRECT write into what is there already lasts
/// without a flush, as on a plain file system, whatever else was written before and not flushed.
#[test]
fn direct_writes_last_on_a_device_that_does() {
    let ops = [
        write(0, 400_000, 1),
        Op::Sync,
        Op::Checkpoint,
        // Somebody else's, which nobody waits for, in both streams.
        other(write(0, 5000, 2)),
        other(write(8192, 200_000, 3)),
        on_device(16384, 16384, 4),
        write(100, 10, 5),
        on_device(32768, 65536, 6),
        write(49152, 16384, 7),
        on_device(65536, 4096, 8),
        // Of the same file, past the log.
        write(400_000, 300_000, 9),
        on_device(0, 16384, 10),
        Op::Truncate(600_000),
        on_device(4096, 100_000, 11),
        Op::Checkpoint,
        on_device(8192, 512, 12),
    ];
    let run = run(&ops);
    let effort = Effort { volatile_cache: false, ..Effort::of(6, 1) };
    run.check(&effort).unwrap_or_else(|error| panic!("{error}"));
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
        Op::Allocate { offset: 0, len: 300_000, keep_size: false },
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

/// Two files, both streams, and flushes of one that take some of the other along.
#[test]
fn streams_mix() {
    let ops = [
        write(0, 150_000, 1),
        other(write(0, 3000, 2)),
        other(Op::Sync),
        write(4096, 100_000, 3),
        write(5000, 100, 4),
        other(flushed(3000, 700, 5)),
        write(60_000, 90_000, 6),
        Op::Truncate(90_000),
        other(write(10_000, 300_000, 7)),
        flushed(0, 512, 8),
        other(write(100, 100, 9)),
        Op::Checkpoint,
        other(write(12_000, 80_000, 10)),
        write(80_000, 20_000, 11),
        other(Op::Sync),
        Op::Sync,
    ];
    checked("streams", &ops, 5);
}

/// Several sessions in one log.
#[test]
fn revalidations_leave_the_log_whole() {
    let ops = [
        write(0, 20_000, 1),
        Op::Sync,
        write(100, 512, 2),
        Op::Revalidate,
        write(700, 512, 3),
        write(20_000, 100_000, 4),
        Op::Sync,
        Op::Revalidate,
        Op::Checkpoint,
        write(90, 512, 5),
        Op::Sync,
    ];
    checked("sessions", &ops, 6);
}

/// As much as the log holds, more than once.
#[test]
fn both_streams_go_round() {
    const LAPS: u8 = 6;
    let mut ops = vec![write(0, 1_000_000, 1), other(write(0, 900_000, 2)), Op::Sync, Op::SyncAll];
    ops.push(Op::Checkpoint);
    let mut last = 0;
    for lap in 0..LAPS {
        last = ops.len();
        // Both streams have what follows from the other.
        ops.extend((0..10).map(|i| flushed(i * 70_000, 65_536, lap * 16 + i as u8)));
        ops.push(write(100_000, 800_000, lap * 16 + 11));
        ops.extend([flushed(150_000, 700, lap * 16 + 12), other(write(50_000, 70_000, lap))]);
        ops.push(if lap % 2 == 0 { Op::Checkpoint } else { Op::Truncate(950_000) });
        ops.push(other(Op::Sync));
        if lap % 2 == 1 {
            ops.extend([write(900_000, 100_000, lap * 16 + 13), Op::Checkpoint]);
        }
    }
    let run = run(&ops).after(last);
    for log in ["log.hot", "log.bulk"] {
        let begin = format!("write inode {} at 8192,", run.ino(log));
        let laps = run.trace.find(|line| line.contains(&begin)).len();
        assert!(laps > 1, "{log} was begun {laps} times");
    }
    let effort = Effort { deep: 1, checked: 20, ..Effort::of(1, 1) };
    run.check(&effort).unwrap_or_else(|error| panic!("{error}"));
}

fn random_op(random: &mut Random, size: u64) -> Op {
    let offset = match random.below(4) {
        0 => size,
        1 => random.below(size + 1) / 4096 * 4096,
        _ => random.below(size + 20_000),
    };
    let len = [512, 4096, 16384, 70_000, 300_000][random.below(5) as usize];
    match random.below(13) {
        0..=4 => {
            let durability = [Durability::Handed, Durability::OnDevice, Durability::Flushed]
                [random.below(3) as usize];
            let seed = random.below(256) as u8;
            Op::Write { offset: offset.min(900_000), len: len as usize, seed, durability }
        }
        5 => Op::Truncate(random.below(900_000)),
        6 => Op::Punch { offset, len: len * 2 },
        7 => Op::Zero { offset, len },
        8 => {
            let keep_size = random.chance(2);
            Op::Allocate { offset: offset.min(800_000), len, keep_size }
        }
        9 => Op::Checkpoint,
        10 if random.chance(1) => Op::Revalidate,
        11 if random.chance(1) => Op::Rotate { before: 1 << 40, groups: 1 },
        _ => Op::Sync,
    }
}

pub(super) fn random_workload(seed: u64) -> Vec<Op> {
    let mut random = Random::new(seed + 1000);
    let mut sizes = [0, 0];
    let mut one = || {
        let which = usize::from(random.chance(2));
        let op = random_op(&mut random, sizes[which]);
        sizes[which] = match op {
            Op::Write { offset, len, .. } => sizes[which].max(offset + len as u64),
            Op::Allocate { offset, len, keep_size: false } => sizes[which].max(offset + len),
            Op::Truncate(len) => len,
            _ => sizes[which],
        };
        if which == 0 { op } else { other(op) }
    };
    (0..12).map(|_| one()).collect()
}

#[test]
fn random_workloads_survive() {
    for seed in 0..seeds(3) {
        let ops = random_workload(seed);
        let run = run(&ops);
        let volatile_cache = seed % 3 != 2;
        let effort = Effort { volatile_cache, ..Effort::of(2, seed) };
        if let Err(error) = run.check(&effort) {
            panic!("seed {seed}: {ops:#?}\n{error}");
        }
        super::no_plaintext("random", &run.trace, &ops);
    }
}
