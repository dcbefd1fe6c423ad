//! What somebody with access to the disk can do, and what the reader gets.

// A list of one range of blocks is what is meant.
#![allow(clippy::single_range_in_vec_init)]

use std::ops::Range;

use super::support::{Volume, pattern, read_all};
use crate::error::{FsError, FsResult};
use crate::store::file::{Durability, File};
use crate::store::layout::{
    BLOCK, BLOCK_LEN, BLOCKS_PER_SECTOR, GROUP_PLAIN, SECTOR_LEN, backing_len, block_at,
    generation_page_at, tag_page_at,
};

/// Blocks of the sample file: more than one group.
const BLOCKS: u64 = 130;
const SIZE: usize = BLOCKS as usize * BLOCK_LEN - 1000;

struct Sample {
    volume: Volume,
    data: Vec<u8>,
}

impl Sample {
    fn new() -> Sample {
        let volume = Volume::new();
        let data = pattern(SIZE, 1);
        volume.create("f").write_at(&data, 0, Durability::default()).unwrap();
        Sample { volume, data }
    }

    fn change(&self, change: impl FnOnce(&mut Vec<u8>)) {
        change_file(&self.volume, "f", change);
    }

    /// Opens the file anew, and expects exactly the blocks of `bad` to be errors.
    fn expect_bad(&self, bad: &[Range<u64>], case: &str) {
        let file = self.volume.open("f");
        for block in 0..BLOCKS {
            let expect_bad = bad.iter().any(|range| range.contains(&block));
            let from = (block * BLOCK) as usize;
            let want = &self.data[from..SIZE.min(from + BLOCK_LEN)];
            let mut got = vec![0xee; want.len()];
            match file.read_at(&mut got, block * BLOCK) {
                Ok(count) => {
                    assert!(!expect_bad, "{case}: block {block} reads");
                    assert!(count == want.len() && got == want, "{case}: block {block} is wrong");
                }
                Err(FsError::Integrity(_)) => {
                    assert!(expect_bad, "{case}: block {block} does not read");
                    assert!(got.iter().all(|&byte| byte == 0), "{case}: block {block} leaks");
                }
                Err(error) => panic!("{case}: block {block}: {error}"),
            }
        }
    }
}

fn change_file(volume: &Volume, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
    volume.store.checkpoint().unwrap();
    let path = volume.path(name);
    let mut bytes = std::fs::read(&path).unwrap();
    change(&mut bytes);
    // In place: the inode must stay.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(0).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
}

fn is_integrity<T>(result: FsResult<T>) -> bool {
    matches!(result, Err(FsError::Integrity(_)))
}

/// The blocks whose entries are in this sector.
fn of_sector(group: u64, sector: u64) -> Range<u64> {
    let first = group * 120 + sector * BLOCKS_PER_SECTOR as u64;
    first..first + BLOCKS_PER_SECTOR as u64
}

#[test]
fn a_flipped_bit_of_data_costs_its_block() {
    let sample = Sample::new();
    for (block, bit) in [(0, 0), (14, 8), (77, 32_767), (119, 5), (120, 16_000), (129, 32_760)] {
        let at = block_at(block) as usize + bit / 8;
        sample.change(|bytes| bytes[at] ^= 1 << (bit % 8));
        sample.expect_bad(&[block..block + 1], &format!("block {block}, bit {bit}"));
        sample.change(|bytes| bytes[at] ^= 1 << (bit % 8));
    }
    sample.expect_bad(&[], "restored");
}

#[test]
fn a_flipped_bit_of_a_tag_sector_costs_its_blocks() {
    let sample = Sample::new();
    for (group, sector) in [(0, 0), (0, 3), (0, 7), (1, 0)] {
        for byte in [0, 15, 16, 24, 31, 32, 47, 48, 56, 60, 62, 63, 100, 511] {
            let at = tag_page_at(group) as usize + sector as usize * SECTOR_LEN + byte;
            sample.change(|bytes| bytes[at] ^= 4);
            let case = format!("group {group} sector {sector} byte {byte}");
            sample.expect_bad(&[of_sector(group, sector)], &case);
            sample.change(|bytes| bytes[at] ^= 4);
        }
    }
}

#[test]
fn zeroing_anything_is_not_a_hole() {
    let sample = Sample::new();
    let (tags, page) = (tag_page_at(0) as usize, BLOCK_LEN);
    let cases: [(&str, usize, usize, Range<u64>); 6] = [
        ("block", block_at(5) as usize, page, 5..6),
        ("tag sector", tags + SECTOR_LEN, SECTOR_LEN, of_sector(0, 1)),
        ("tag entry", tags + 2 * SECTOR_LEN + 32, 32, of_sector(0, 2)),
        ("tag page", tags, page, 0..120),
        ("group", tags, page * 121, 0..120),
        ("generation sector", generation_page_at(0) as usize, SECTOR_LEN, 0..130),
    ];
    for (case, at, len, bad) in cases {
        let mut before = Vec::new();
        sample.change(|bytes| {
            before = bytes[at..at + len].to_vec();
            bytes[at..at + len].fill(0);
        });
        sample.expect_bad(&[bad], case);
        sample.change(|bytes| bytes[at..at + len].copy_from_slice(&before));
    }
    sample.expect_bad(&[], "restored");
}

#[test]
fn swapping_within_a_file_is_found() {
    let sample = Sample::new();
    let swap = |a: usize, b: usize, len: usize| {
        sample.change(|bytes| {
            let (left, right) = bytes.split_at_mut(b);
            left[a..a + len].swap_with_slice(&mut right[..len]);
        });
    };
    let (first, second) = (tag_page_at(0) as usize, tag_page_at(1) as usize);
    let cases = [
        ("blocks", block_at(3), block_at(125), BLOCK_LEN, vec![3..4, 125..126]),
        ("neighbours", block_at(3), block_at(4), BLOCK_LEN, vec![3..5]),
        (
            "tag sectors of a page",
            first as u64,
            (first + SECTOR_LEN) as u64,
            SECTOR_LEN,
            vec![of_sector(0, 0), of_sector(0, 1)],
        ),
        (
            "tag sectors of two pages",
            first as u64,
            second as u64,
            SECTOR_LEN,
            vec![of_sector(0, 0), of_sector(1, 0)],
        ),
        ("tag pages", first as u64, second as u64, BLOCK_LEN, vec![0..130]),
        ("entries", first as u64 + 32, first as u64 + 64, 32, vec![of_sector(0, 0)]),
    ];
    for (case, a, b, len, bad) in cases {
        swap(a as usize, b as usize, len);
        sample.expect_bad(&bad, case);
        swap(a as usize, b as usize, len);
    }
    // A block together with its entry, in another place of the same sector.
    swap(block_at(3) as usize, block_at(4) as usize, BLOCK_LEN);
    swap(first + 32 + 3 * 32, first + 32 + 4 * 32, 32);
    sample.expect_bad(&[of_sector(0, 0)], "block and entry");
}

#[test]
fn swapping_between_files_is_found() {
    let sample = Sample::new();
    let other = pattern(SIZE, 9);
    sample.volume.create("g").write_at(&other, 0, Durability::default()).unwrap();
    sample.volume.store.checkpoint().unwrap();
    let foreign = std::fs::read(sample.volume.path("g")).unwrap();
    let own = std::fs::read(sample.volume.path("f")).unwrap();
    let first = tag_page_at(0) as usize;
    for (case, at, len, bad) in [
        ("block", block_at(7) as usize, BLOCK_LEN, 7..8),
        ("tag sector", first + SECTOR_LEN, SECTOR_LEN, of_sector(0, 1)),
        ("tag page", first, BLOCK_LEN, 0..120),
        ("group", first, 121 * BLOCK_LEN, 0..120),
        ("generation page", generation_page_at(0) as usize, BLOCK_LEN, 0..130),
        ("all but the header", 2 * BLOCK_LEN, own.len() - 2 * BLOCK_LEN, 0..130),
    ] {
        sample.change(|bytes| bytes[at..at + len].copy_from_slice(&foreign[at..at + len]));
        sample.expect_bad(&[bad], case);
        sample.change(|bytes| bytes[at..at + len].copy_from_slice(&own[at..at + len]));
    }
    // With the whole header of another file, nothing of this one is authentic.
    sample.change(|bytes| bytes[..8192].copy_from_slice(&foreign[..8192]));
    sample.expect_bad(&[0..130], "header");
}

#[test]
fn a_shortened_backing_file_is_not_a_shortened_file() {
    let sample = Sample::new();
    for blocks in [129, 121, 120, 64, 1] {
        let mut cut = Vec::new();
        let at = backing_len(blocks * BLOCK) as usize;
        sample.change(|bytes| cut = bytes.split_off(at));
        sample.expect_bad(&[blocks..130], &format!("{blocks} blocks left"));
        sample.change(|bytes| bytes.extend_from_slice(&cut));
    }
    let whole = std::fs::read(sample.volume.path("f")).unwrap();
    for at in [4608, 100, 0] {
        sample.change(|bytes| bytes.truncate(at));
        match at {
            4608 => sample.expect_bad(&[0..130], "header B only in part, no content"),
            100 => assert!(is_integrity(sample.volume.try_open("f")), "no header"),
            _ => assert!(is_integrity(sample.volume.try_open("f")), "empty"),
        }
        sample.change(|bytes| *bytes = whole.clone());
    }
}

#[test]
fn one_damaged_header_serves_two_do_not() {
    let sample = Sample::new();
    for copy in [0, BLOCK_LEN] {
        for byte in [0, 20, 40, 57, 100, 150, 200, 511, 4000] {
            sample.change(|bytes| bytes[copy + byte] ^= 0x40);
            sample.expect_bad(&[], &format!("header copy at {copy}, byte {byte}"));
            sample.change(|bytes| bytes[BLOCK_LEN - copy + 60] ^= 1);
            assert!(is_integrity(sample.volume.try_open("f")));
            let node = sample.volume.store.tree().lookup(b"f").unwrap();
            assert!(is_integrity(sample.volume.store.plain_size(&node)));
            sample.change(|bytes| {
                bytes[copy + byte] ^= 0x40;
                bytes[BLOCK_LEN - copy + 60] ^= 1;
            });
        }
    }
    // The next change of size makes both good again.
    sample.change(|bytes| bytes[33] ^= 1);
    let file = sample.volume.open("f");
    file.truncate(SIZE as u64 + 1).unwrap();
    file.truncate(SIZE as u64).unwrap();
    drop(file);
    sample.change(|bytes| bytes[BLOCK_LEN + 33] ^= 1);
    sample.expect_bad(&[], "healed");
}

fn write(file: &File, offset: u64, data: &[u8]) -> FsResult<()> {
    file.write_at(data, offset, Durability::default())
}

#[test]
fn a_damaged_block_is_healed_by_writing_it_whole_only() {
    let mut sample = Sample::new();
    sample.change(|bytes| bytes[block_at(8) as usize + 9] ^= 1);
    let file = sample.volume.open("f");
    assert!(is_integrity(write(&file, 8 * BLOCK + 5, b"part")));
    assert!(is_integrity(write(&file, 8 * BLOCK - 10, &[1; 20])));
    assert!(is_integrity(file.punch_hole(8 * BLOCK + 5, 10)));
    drop(file);
    sample.expect_bad(&[8..9], "after partial writes");
    let fresh = pattern(3 * BLOCK_LEN, 77);
    write(&sample.volume.open("f"), 7 * BLOCK, &fresh).unwrap();
    sample.data[7 * BLOCK_LEN..10 * BLOCK_LEN].copy_from_slice(&fresh);
    sample.expect_bad(&[], "after a whole write");
}

#[test]
fn a_damaged_tag_sector_is_healed_block_by_block() {
    let mut sample = Sample::new();
    sample.change(|bytes| bytes[tag_page_at(0) as usize + SECTOR_LEN + 200] ^= 1);
    let file = sample.volume.open("f");
    assert!(is_integrity(write(&file, 16 * BLOCK + 1, b"part")));
    let fresh = pattern(2 * BLOCK_LEN, 78);
    write(&file, 16 * BLOCK, &fresh).unwrap();
    drop(file);
    sample.data[16 * BLOCK_LEN..18 * BLOCK_LEN].copy_from_slice(&fresh);
    sample.expect_bad(&[15..16, 18..30], "two blocks written");
    let fresh = pattern(15 * BLOCK_LEN, 79);
    write(&sample.volume.open("f"), 15 * BLOCK, &fresh).unwrap();
    sample.data[15 * BLOCK_LEN..30 * BLOCK_LEN].copy_from_slice(&fresh);
    sample.expect_bad(&[], "all written");
    // Punched, the damage is gone too.
    sample.change(|bytes| bytes[tag_page_at(0) as usize + 200] ^= 1);
    sample.volume.open("f").punch_hole(0, 15 * BLOCK).unwrap();
    sample.data[..15 * BLOCK_LEN].fill(0);
    sample.expect_bad(&[], "punched");
}

#[test]
fn holes_are_as_authentic_as_data() {
    let sample = Sample::new();
    let file = sample.volume.open("f");
    file.punch_hole(20 * BLOCK, 4 * BLOCK).unwrap();
    drop(file);
    // Whatever is put where a hole is, it stays a hole.
    sample.change(|bytes| bytes[block_at(21) as usize..][..BLOCK_LEN].fill(0x5a));
    let file = sample.volume.open("f");
    let mut got = vec![0xee; 4 * BLOCK_LEN];
    file.read_at(&mut got, 20 * BLOCK).unwrap();
    assert!(got.iter().all(|&byte| byte == 0));
}

#[test]
fn bytes_past_the_size_never_come_back() {
    let volume = Volume::new();
    let file = volume.create("f");
    let len = GROUP_PLAIN + 3 * BLOCK;
    write(&file, 0, &pattern(len as usize, 3)).unwrap();
    for cut in [len - 1, GROUP_PLAIN + 5000, GROUP_PLAIN, GROUP_PLAIN - 1, 40_961, 4096, 1, 0] {
        write(&file, 0, &pattern(len as usize, 3)).unwrap();
        file.truncate(cut).unwrap();
        write(&file, len, b"end").unwrap();
        let all = read_all(&file);
        assert_eq!(all[..cut as usize], pattern(cut as usize, 3)[..], "kept, cut at {cut}");
        assert!(all[cut as usize..len as usize].iter().all(|&b| b == 0), "cut at {cut}");
        file.truncate(0).unwrap();
    }
}
