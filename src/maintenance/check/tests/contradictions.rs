//! Files that prove themselves and contradict themselves: found, named, and left as they are.

use super::expected::{Expected, compare, error, finds, note, stays, warning};
use super::forge::{self, GROUPS, MAC_KEY_AT, RUNS_AT, SIZE_AT, SLOTS_AT, TAGS};
use super::support::{PAGE, SECTOR, SIZE, Volume, block, flip, put, tag_page};

/// With a forged header of `big`, finds just this, all of it of that file; a repair leaves it.
#[track_caller]
fn forged(change: impl FnOnce(&mut [u8]), expected: &[Expected]) -> Volume {
    let volume = finds(|v| forge::put_header(v, &v.big, change), expected);
    all_of_big(&volume);
    stays(&volume);
    volume
}

#[track_caller]
fn all_of_big(volume: &Volume) {
    for finding in volume.check().findings {
        assert_eq!(finding.path.as_deref(), Some("/big"));
        assert_eq!(finding.backing_path, volume.big.to_str().unwrap());
    }
}

#[test]
fn headers_of_a_format_that_is_not_known() {
    let unknown = || error("header-format").of("/big").at(0);
    // A later format, other blocks, something in reserved bytes, a DEK slot in another state.
    for byte in [24, 73, 64, 500, SLOTS_AT + 2] {
        let volume = forged(|header| header[byte] = 2, &[unknown()]);
        assert!(volume.check().findings[0].detail.contains("format"));
        assert!(volume.big.exists());
    }
    let volume = Volume::new();
    [24, PAGE + 24].iter().for_each(|&at| put(&volume.big, at, &[2]));
    assert_eq!(volume.check_without_key().codes(), ["header-format"]);
}

/// A mount goes by the newer copy, and by the second of two that are as new as each other.
#[test]
fn a_copy_of_a_format_that_is_not_known() {
    for (newer, copy) in [(1, 0), (1, 1), (0, 1)] {
        let volume = Volume::new();
        let record = forge::header(&volume, &volume.big, |header| {
            header[24] = 2;
            header[48] += newer;
        });
        put(&volume.big, copy * PAGE, &record);
        compare(&volume.check(), &[error("header-format").of("/big").at(0)]);
        stays(&volume);
    }
    // What a mount does not go by is no more than damaged.
    let volume = Volume::new();
    put(&volume.big, 0, &forge::header(&volume, &volume.big, |header| header[24] = 2));
    compare(&volume.check(), &[warning("header-copy").of("/big").at(0)]);
    super::expected::is_made_good(&volume);
}

#[test]
fn headers_with_fields_that_contradict_each_other() {
    let wrong = || error("header-content").of("/big").at(0);
    let longest = 1_u64 << 59;
    for size in [longest + 1, u64::MAX] {
        let volume = forged(|header| set(header, SIZE_AT, &size.to_le_bytes()), &[wrong()]);
        assert!(volume.check().findings[0].detail.contains(&size.to_string()));
    }
    // New blocks go to a DEK slot that is not there.
    forged(|header| header[76] = 3, &[wrong()]);
    // The same DEK slot twice.
    forged(|header| header.copy_within(SLOTS_AT..SLOTS_AT + 64, SLOTS_AT + 64), &[wrong()]);
    // Regions: one twice, an empty one, and one that is neither in the file nor on the disk.
    let runs = |header: &mut [u8], runs: &[[u32; 2]]| {
        header[RUNS_AT] = runs.len() as u8;
        for (i, run) in runs.iter().flatten().enumerate() {
            set(header, RUNS_AT + 2 + 4 * i, &run.to_le_bytes());
        }
    };
    finds(|v| forge::put_header(v, &v.big, |header| runs(header, &[[0, 1], [1, 0]])), &[wrong()]);
    let past = 2 * PAGE + 5 * 237_899_776;
    let volume = finds(
        |v| forge::put_header(v, &v.big, |header| runs(header, &[[0, 1], [5, 1]])),
        &[wrong(), warning("generation-sector").of("/big").at(past)],
    );
    stays(&volume);
    let volume = Volume::new();
    forge::put_header(&volume, &volume.big, |header| runs(header, &[[0, 1], [0, 1]]));
    assert!(volume.check().codes().contains(&"header-content"));

    // Of a volume key that is not there, nothing is authentic; without the key it is seen.
    for id in [0, 3] {
        let volume = Volume::new();
        [28, PAGE + 28].iter().for_each(|&at| put(&volume.big, at, &[id]));
        let checked = volume.check_without_key();
        assert_eq!(checked.codes(), ["header-content"]);
        assert!(checked.findings[0].detail.contains("volume key"));
        compare(&volume.check(), &[error("header").of("/big").at(0)]);
    }
}

/// Without the key a header is believed, whatever a damaged one says.
#[test]
fn sizes_that_no_file_has_without_the_key() {
    for size in [(1_u64 << 59) + 1, u64::MAX - 4096, u64::MAX] {
        let volume = Volume::new();
        [0, PAGE].iter().for_each(|at| put(&volume.big, at + SIZE_AT as u64, &size.to_le_bytes()));
        assert_eq!(volume.check_without_key().codes(), ["header-content"]);
    }
}

fn set(header: &mut [u8], at: usize, bytes: &[u8]) {
    header[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn keys_that_do_not_unwrap() {
    let key = || error("file-key").of("/big").at(0);
    let blocks = |first, past| error("block").of("/big").at(block(first)).blocks(first, past);
    let volume = forged(
        |header| header[SLOTS_AT + 8 + 5] ^= 1,
        &[key(), blocks(0, 120), blocks(120, 240), blocks(240, 300)],
    );
    let checked = volume.check();
    let of_slot = checked.findings.iter().find(|one| one.code.name() == "file-key").unwrap();
    assert!(of_slot.detail.contains("DEK slot 0"), "{}", of_slot.detail);
    // Without its MAC key no page of the file can be looked at; all the others are.
    let volume = forged(|header| header[MAC_KEY_AT + 5] ^= 1, &[key()]);
    let checked = volume.check();
    assert!(checked.findings[0].detail.contains("MAC key"));
    assert_eq!((checked.summary.files, checked.summary.blocks), (4, 3));
    flip(&volume.small, block(0));
    assert_eq!(volume.check().codes().len(), 2);
}

/// The pages of group 1 are of a checkpoint that the header does not know of.
#[test]
fn a_group_that_is_newer_than_the_header() {
    let at = 2 * PAGE + 32 + 8;
    let volume = Volume::new();
    let newer = (forge::generation(&volume.big) + 5).to_le_bytes();
    for sector in 0..8 {
        let at = tag_page(1) + sector * SECTOR;
        let newer = |sector: &mut [u8]| set(sector, 16, &newer);
        forge::sector(&volume, &volume.big, at, TAGS, newer);
    }
    forge::sector(&volume, &volume.big, 2 * PAGE, GROUPS, |sector| set(sector, 40, &newer));
    compare(&volume.check(), &[error("generation").of("/big").at(at).blocks(120, 240)]);
    all_of_big(&volume);
    stays(&volume);
    let mut codes = volume.check_without_key().codes();
    codes.sort_unstable();
    assert_eq!(codes, ["generation", "tag-sector"]);
}

#[test]
fn content_past_the_end() {
    let size = 130 * PAGE;
    let shorter = |header: &mut [u8]| set(header, SIZE_AT, &size.to_le_bytes());
    let past = || warning("past-end").of("/big");
    // The rest of its group, block by block, and a group that is past it as a whole.
    let group = 2 * PAGE + 32 + 2 * 8;
    let volume = forged(
        shorter,
        &[past().at(group), past().at(block(130)), note("length").of("/big").at(block(130))],
    );
    let mut codes = volume.check_without_key().codes();
    codes.sort_unstable();
    assert_eq!(codes, ["length", "past-end", "past-end"]);
}

#[test]
fn a_last_block_that_goes_on_past_the_end() {
    let size = SIZE - 1000;
    let last = warning("tail").of("/big").at(block(299)).content(299 * PAGE, size);
    forged(|header| set(header, SIZE_AT, &size.to_le_bytes()), &[last]);
}
