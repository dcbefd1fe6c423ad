//! Random operations, compared with a `Vec<u8>`.

use proptest::prelude::*;

use rustix::io::Errno;

use super::support::{Volume, pattern, read_all};
use crate::backing::fault::{Call, Rule};
use crate::error::FsResult;
use crate::store::file::{Durability, File};
use crate::store::layout::BLOCK_LEN;

/// Room for four groups and something.
const MAX_OFFSET: u64 = 2_100_000;

#[derive(Clone, Debug)]
enum Op {
    Write { offset: u64, len: usize, seed: u8, durability: Durability },
    Append { len: usize, seed: u8 },
    Read { offset: u64, len: usize },
    Truncate { len: u64 },
    Punch { offset: u64, len: u64 },
    Zero { offset: u64, len: u64, keep_size: bool },
    Allocate { offset: u64, len: u64, keep_size: bool },
    Seek { offset: u64 },
    Sync { data_only: bool },
    Reopen,
    Checkpoint,
}

/// Favours the edges of blocks, sectors and groups.
fn offset() -> impl Strategy<Value = u64> {
    let edge = |unit: u64| {
        (0..MAX_OFFSET / unit + 1, -2_i64..3)
            .prop_map(move |(i, d)| (i * unit).saturating_add_signed(d).min(MAX_OFFSET))
    };
    prop_oneof![0..MAX_OFFSET, edge(4096), edge(15 * 4096), edge(120 * 4096), 0_u64..10_000]
}

fn len() -> impl Strategy<Value = u64> {
    prop_oneof![1_u64..600, 1_u64..20_000, Just(4096), Just(16384), 1_u64..1_048_577]
}

fn op() -> impl Strategy<Value = Op> {
    let durability = prop_oneof![8 => Just(Durability::Handed), 1 => Just(Durability::OnDevice), 1 => Just(Durability::Flushed)];
    prop_oneof![
        6 => (offset(), len(), any::<u8>(), durability).prop_map(|(offset, len, seed, durability)| {
            Op::Write { offset, len: len as usize, seed, durability }
        }),
        3 => (1_usize..9000, any::<u8>()).prop_map(|(len, seed)| Op::Append { len, seed }),
        4 => (offset(), len()).prop_map(|(offset, len)| Op::Read { offset, len: len as usize }),
        3 => offset().prop_map(|len| Op::Truncate { len }),
        2 => (offset(), len()).prop_map(|(offset, len)| Op::Punch { offset, len }),
        1 => (offset(), len(), any::<bool>())
            .prop_map(|(offset, len, keep_size)| Op::Zero { offset, len, keep_size }),
        1 => (offset(), len(), any::<bool>())
            .prop_map(|(offset, len, keep_size)| Op::Allocate { offset, len, keep_size }),
        1 => offset().prop_map(|offset| Op::Seek { offset }),
        1 => any::<bool>().prop_map(|data_only| Op::Sync { data_only }),
        1 => Just(Op::Reopen),
        2 => Just(Op::Checkpoint),
    ]
}

fn grow(model: &mut Vec<u8>, end: u64) {
    if model.len() < end as usize {
        model.resize(end as usize, 0);
    }
}

fn zero(model: &mut [u8], offset: u64, len: u64) {
    let from = (offset as usize).min(model.len());
    let to = ((offset + len) as usize).min(model.len());
    model[from..to].fill(0);
}

fn write(model: &mut Vec<u8>, offset: u64, data: &[u8]) {
    grow(model, offset + data.len() as u64);
    model[offset as usize..offset as usize + data.len()].copy_from_slice(data);
}

fn check_seek(file: &File, model: &[u8], offset: u64) -> FsResult<()> {
    let data = file.seek_data(offset)?;
    let end = data.unwrap_or(model.len() as u64) as usize;
    let skipped = &model[(offset as usize).min(end)..end];
    assert!(skipped.iter().all(|&byte| byte == 0), "data was skipped");
    match file.seek_hole(offset)? {
        None => assert!(offset >= model.len() as u64),
        Some(hole) => assert!(hole >= offset && hole <= model.len() as u64),
    }
    Ok(())
}

/// What the file is after `op`.
fn predict(model: &[u8], op: &Op) -> Vec<u8> {
    let mut model = model.to_vec();
    match *op {
        Op::Write { offset, len, seed, .. } => write(&mut model, offset, &pattern(len, seed)),
        Op::Append { len, seed } => model.extend(pattern(len, seed)),
        Op::Truncate { len } => model.resize(len as usize, 0),
        Op::Punch { offset, len } => zero(&mut model, offset, len),
        Op::Zero { offset, len, keep_size } => {
            if !keep_size {
                grow(&mut model, offset + len);
            }
            zero(&mut model, offset, len);
        }
        Op::Allocate { offset, len, keep_size } => {
            if !keep_size {
                grow(&mut model, offset + len);
            }
        }
        Op::Read { .. } | Op::Seek { .. } | Op::Sync { .. } | Op::Reopen | Op::Checkpoint => {}
    }
    model
}

fn run(file: &File, model: &[u8], op: &Op) -> FsResult<()> {
    match *op {
        Op::Write { offset, len, seed, durability } => {
            file.write_at(&pattern(len, seed), offset, durability)
        }
        Op::Append { len, seed } => {
            file.write_at(&pattern(len, seed), model.len() as u64, Durability::default())
        }
        Op::Read { offset, len } => {
            let mut bytes = vec![0xee; len];
            let count = file.read_at(&mut bytes, offset)?;
            let from = (offset as usize).min(model.len());
            let to = (offset as usize + len).min(model.len());
            assert!(bytes[..count] == model[from..to.max(from)], "read {offset}+{len}");
            Ok(())
        }
        Op::Truncate { len } => file.truncate(len),
        Op::Punch { offset, len } => file.punch_hole(offset, len),
        Op::Zero { offset, len, keep_size } => file.zero_range(offset, len, keep_size),
        Op::Allocate { offset, len, keep_size } => file.allocate(offset, len, keep_size),
        Op::Seek { offset } => check_seek(file, model, offset),
        Op::Sync { data_only } => file.sync(data_only),
        Op::Reopen | Op::Checkpoint => Ok(()),
    }
}

/// True if every block is as before or as after, and the size is one of the two.
fn is_between(now: &[u8], old: &[u8], new: &[u8]) -> bool {
    if now.len() != old.len() && now.len() != new.len() {
        return false;
    }
    now.chunks(BLOCK_LEN).enumerate().all(|(block, now)| {
        let is = |model: &[u8]| {
            let mut want = vec![0; now.len()];
            let from = (block * BLOCK_LEN).min(model.len());
            let to = (from + now.len()).min(model.len());
            want[..to - from].copy_from_slice(&model[from..to]);
            want == now
        };
        is(old) || is(new)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_file_is_what_was_written(ops in proptest::collection::vec(op(), 1..40)) {
        let mut volume = Volume::new();
        let mut file = volume.create("f");
        let mut model = Vec::new();
        for op in ops {
            if let Op::Checkpoint = op {
                volume.store.checkpoint().unwrap();
            }
            if let Op::Reopen = op {
                drop(file);
                volume = volume.reopen();
                file = volume.open("f");
                let node = volume.store.tree().lookup(b"f").unwrap();
                prop_assert_eq!(volume.store.plain_size(&node).unwrap(), model.len() as u64);
            }
            run(&file, &model, &op).unwrap();
            model = predict(&model, &op);
            prop_assert_eq!(file.size(), model.len() as u64);
        }
        prop_assert!(read_all(&file) == model);
        drop(file);
        let volume = volume.reopen_as(true);
        prop_assert!(read_all(&volume.open("f")) == model, "after a read-only mount");
    }

    /// The daemon dies at any call, which may be done in part: nothing that was acknowledged is
    /// lost, and the rest is old or new. Then it goes on, and dies again.
    #[test]
    fn a_killed_daemon_loses_nothing(
        lives in proptest::collection::vec(
            (proptest::collection::vec(op(), 1..12), 0_usize..60, 0_usize..40),
            1..4,
        ),
    ) {
        let mut volume = Volume::new();
        let mut file = volume.create("f");
        let mut model = Vec::new();
        for (ops, after, pages) in lives {
            let partial = Some(pages * BLOCK_LEN);
            let rule = Rule { call: Call::Any, after, lasting: true, errno: Errno::IO, partial };
            volume.faults.arm(rule);
            let mut next = None;
            for op in ops {
                let new = predict(&model, &op);
                // A read may end in an error of its own, once the disk has failed.
                let done = match op {
                    Op::Checkpoint => volume.store.checkpoint(),
                    _ => run(&file, &model, &op),
                };
                if volume.faults.has_failed() {
                    next = Some(new);
                    break;
                }
                done.unwrap();
                model = new;
            }
            drop(file);
            // The dead daemon does nothing any more.
            volume = volume.reopen();
            file = volume.open("f");
            let now = read_all(&file);
            match next {
                None => prop_assert!(now == model),
                Some(new) => prop_assert!(is_between(&now, &model, &new)),
            }
            model = now;
        }
    }
}
