//! Random operations, compared with a `Vec<u8>`.

use proptest::prelude::*;

use super::support::{Volume, pattern, read_all};
use crate::store::file::{Durability, File, WriteMode};

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

fn check_seek(file: &File, model: &[u8], offset: u64) {
    let data = file.seek_data(offset).unwrap();
    let end = data.unwrap_or(model.len() as u64) as usize;
    let skipped = &model[(offset as usize).min(end)..end];
    assert!(skipped.iter().all(|&byte| byte == 0), "data was skipped");
    match file.seek_hole(offset).unwrap() {
        None => assert!(offset >= model.len() as u64),
        Some(hole) => assert!(hole >= offset && hole <= model.len() as u64),
    }
}

fn apply(file: &File, model: &mut Vec<u8>, op: Op) {
    match op {
        Op::Write { offset, len, seed, durability } => {
            let data = pattern(len, seed);
            let mode = WriteMode { append: false, durability };
            assert_eq!(file.write_at(&data, offset, mode).unwrap(), offset);
            write(model, offset, &data);
        }
        Op::Append { len, seed } => {
            let data = pattern(len, seed);
            let mode = WriteMode { append: true, ..WriteMode::default() };
            let at = file.write_at(&data, 5, mode).unwrap();
            assert_eq!(at, model.len() as u64);
            write(model, at, &data);
        }
        Op::Read { offset, len } => {
            let mut bytes = vec![0xee; len];
            let count = file.read_at(&mut bytes, offset).unwrap();
            let from = (offset as usize).min(model.len());
            let to = (offset as usize + len).min(model.len());
            assert!(bytes[..count] == model[from..to.max(from)], "read {offset}+{len}");
        }
        Op::Truncate { len } => {
            file.truncate(len).unwrap();
            model.resize(len as usize, 0);
        }
        Op::Punch { offset, len } => {
            file.punch_hole(offset, len).unwrap();
            zero(model, offset, len);
        }
        Op::Zero { offset, len, keep_size } => {
            file.zero_range(offset, len, keep_size).unwrap();
            if !keep_size {
                grow(model, offset + len);
            }
            zero(model, offset, len);
        }
        Op::Allocate { offset, len, keep_size } => {
            file.allocate(offset, len, keep_size).unwrap();
            if !keep_size {
                grow(model, offset + len);
            }
        }
        Op::Seek { offset } => check_seek(file, model, offset),
        Op::Sync { data_only } => file.sync(data_only).unwrap(),
        Op::Reopen => unreachable!(),
    }
    assert_eq!(file.size(), model.len() as u64);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_file_is_what_was_written(ops in proptest::collection::vec(op(), 1..40)) {
        let mut volume = Volume::new();
        let mut file = volume.create("f");
        let mut model = Vec::new();
        for op in ops {
            if let Op::Reopen = op {
                drop(file);
                volume = volume.reopen();
                file = volume.open("f");
                let node = volume.store.tree().lookup(b"f").unwrap();
                prop_assert_eq!(volume.store.plain_size(&node).unwrap(), model.len() as u64);
            } else {
                apply(&file, &mut model, op);
            }
        }
        prop_assert!(read_all(&file) == model);
        drop(file);
        let volume = volume.reopen_as(true);
        prop_assert!(read_all(&volume.open("f")) == model, "after a read-only mount");
    }
}
