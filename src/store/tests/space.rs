//! Space at home: what will be needed is there, what is not needed goes back.

use std::sync::Arc;

use rustix::io::Errno;

use super::support::{Mounted, Volume, in_memory, mount, pattern};
use crate::backing::fault::{Call, Rule};
use crate::backing::memory::MemoryBacking;
use crate::error::FsError;
use crate::store::layout::{
    BLOCK, BLOCK_LEN, BLOCKS_PER_GROUP, GROUP_PLAIN, backing_len, block_at, tag_page_at,
};
use crate::store::{Durability, File};

fn write(file: &File, offset: u64, data: &[u8]) {
    file.write_at(data, offset, Durability::default()).unwrap();
}

/// Whether the file has space of its own for the page at `position`.
fn has_space(file: &File, position: u64) -> bool {
    file.backing().seek_data(position).unwrap() == Some(position)
}

#[test]
fn the_tags_of_what_went_home_directly_have_their_space() {
    let (_backing, mounted) = in_memory();
    let file = mounted.create("f");
    write(&file, 0, &pattern(3 * GROUP_PLAIN as usize, 1));
    for group in 0..3 {
        assert!(has_space(&file, tag_page_at(group)), "group {group}");
    }
}

/// A file system lays together what is asked for together.
#[test]
fn what_is_written_in_a_row_is_reserved_in_a_row() {
    let volume = Volume::new();
    let file = volume.create("f");
    let calls = 2 * 4;
    volume.faults.arm(Rule {
        call: Call::Allocate,
        after: calls,
        lasting: true,
        errno: Errno::IO,
        partial: None,
    });
    for part in 0..4 {
        write(&file, part << 20, &pattern(1 << 20, 1));
    }
}

#[test]
fn space_that_may_be_needed_later_is_not_insisted_on() {
    let volume = Volume::new();
    let file = volume.create("f");
    write(&file, 0, &pattern(256 << 10, 1));
    let no_space = |lasting| Rule {
        call: Call::Allocate,
        after: 0,
        lasting,
        errno: Errno::NOSPC,
        partial: None,
    };
    let end = 10 * GROUP_PLAIN;
    volume.faults.arm(no_space(false));
    write(&file, end, &pattern(256 << 10, 2));
    volume.faults.arm(no_space(true));
    let data = pattern(256 << 10, 3);
    let refused = file.write_at(&data, 2 * end, Durability::default());
    assert!(matches!(refused, Err(FsError::Os(Errno::NOSPC))), "{refused:?}");
    volume.faults.disarm();
    assert_eq!(file.size(), end + (256 << 10));
}

/// ext4 keeps what it found before it found no more.
#[test]
fn what_a_full_disk_leaves_of_a_request_beyond_the_end_goes_back() {
    let volume = Volume::new();
    let file = volume.create("f");
    write(&file, 0, &pattern(256 << 10, 1));
    volume.store.checkpoint().unwrap();
    let before = backing_blocks(&file);
    volume.faults.arm(Rule {
        call: Call::Allocate,
        after: 0,
        lasting: false,
        errno: Errno::NOSPC,
        partial: Some(200 << 10),
    });
    write(&file, file.size(), b"a block more");
    assert!(volume.faults.disarm(), "it was refused once");
    assert!(backing_blocks(&file) > before + 16);
    volume.store.checkpoint().unwrap();
    assert!(backing_blocks(&file) <= before + 16, "{} after {before}", backing_blocks(&file));
}

#[test]
fn space_that_was_given_back_is_asked_for_again() {
    let (_backing, mounted) = in_memory();
    let file = mounted.create("f");
    // Appends reserve ahead; then the file shrinks below that, and grows past it without data.
    for block in 0..100 {
        write(&file, block * BLOCK, &pattern(BLOCK_LEN, 2));
    }
    file.truncate(50 * BLOCK).unwrap();
    file.truncate(2 * GROUP_PLAIN).unwrap();
    let snapshot = file.begin_checkpoint().unwrap();
    // Somebody writes while that runs.
    write(&file, GROUP_PLAIN, b"meanwhile");
    file.write_home(&snapshot).unwrap();
    file.write_new_regions(&snapshot).unwrap();
    file.write_header(&snapshot).unwrap();
    file.sync_home().unwrap();
    assert!(file.end_checkpoint(&snapshot).unwrap());
    for block in 50..120 {
        write(&file, block * BLOCK, &pattern(BLOCK_LEN, 3));
        assert!(has_space(&file, block_at(block)), "block {block}");
    }
}

/// A file of three groups, at home.
fn three_groups() -> (Arc<MemoryBacking>, Mounted, Arc<File>) {
    let (backing, mounted) = in_memory();
    let file = mounted.create("f");
    write(&file, 0, &pattern(3 * GROUP_PLAIN as usize, 1));
    mounted.store.checkpoint().unwrap();
    (backing, mounted, file)
}

fn backing_blocks(file: &File) -> u64 {
    file.backing().metadata().unwrap().blocks
}

#[test]
fn what_is_reserved_where_something_was_removed_stays_reserved() {
    let whole = 0..3 * GROUP_PLAIN;
    let within = GROUP_PLAIN + 3 * BLOCK..GROUP_PLAIN + 20 * BLOCK;
    for (removed, asked) in [(&whole, &whole), (&whole, &within), (&within, &within)] {
        for during in [false, true] {
            let (_backing, mounted, file) = three_groups();
            match *removed == whole {
                true => file.truncate(0).unwrap(),
                false => file.punch_hole(removed.start, removed.end - removed.start).unwrap(),
            }
            let running = during.then(|| file.begin_checkpoint().unwrap());
            file.allocate(asked.start, asked.end - asked.start, false).unwrap();
            if let Some(snapshot) = running {
                file.write_home(&snapshot).unwrap();
                file.write_new_regions(&snapshot).unwrap();
                file.write_header(&snapshot).unwrap();
                file.sync_home().unwrap();
                file.end_checkpoint(&snapshot).unwrap();
            }
            mounted.store.checkpoint().unwrap();
            let blocks = asked.start / BLOCK..asked.end / BLOCK;
            for block in blocks.clone() {
                let has = has_space(&file, block_at(block));
                assert!(has, "block {block}, {removed:?} removed, during a checkpoint: {during}");
            }
            let groups = blocks.start / BLOCKS_PER_GROUP as u64..asked.end.div_ceil(GROUP_PLAIN);
            groups.for_each(|group| assert!(has_space(&file, tag_page_at(group)), "{group}"));
        }
    }
}

/// A checkpoint that finds a removed group changed leaves it to the next, with all that was asked since.
#[test]
fn what_is_zeroed_during_a_checkpoint_keeps_its_space() {
    let (_backing, mounted, file) = three_groups();
    file.punch_hole(0, 20 * BLOCK).unwrap();
    let snapshot = file.begin_checkpoint().unwrap();
    file.zero_range(5 * BLOCK, 5 * BLOCK, false).unwrap();
    write(&file, 30 * BLOCK, b"in the same group");
    file.punch_hole(0, BLOCK).unwrap();
    file.write_home(&snapshot).unwrap();
    file.write_new_regions(&snapshot).unwrap();
    file.write_header(&snapshot).unwrap();
    file.sync_home().unwrap();
    assert!(file.end_checkpoint(&snapshot).unwrap());
    mounted.store.checkpoint().unwrap();
    for block in 0..20 {
        assert_eq!(has_space(&file, block_at(block)), (5..10).contains(&block), "{block}");
    }
}

#[test]
fn what_is_removed_after_it_was_reserved_goes_back() {
    let (_backing, mounted, file) = three_groups();
    let full = backing_blocks(&file);
    file.punch_hole(0, 20 * BLOCK).unwrap();
    file.allocate(0, 20 * BLOCK, false).unwrap();
    file.zero_range(0, 20 * BLOCK, false).unwrap();
    file.punch_hole(5 * BLOCK, 3 * BLOCK).unwrap();
    mounted.store.checkpoint().unwrap();
    assert_eq!(backing_blocks(&file), full - 3 * 8);
    assert!((5..8).all(|block| !has_space(&file, block_at(block))));
}

#[test]
fn scattered_holes_leave_what_was_reserved_between_them() {
    let (_backing, mounted) = in_memory();
    let file = mounted.create("f");
    file.allocate(0, 1200 * BLOCK, false).unwrap();
    for block in (0..1200).step_by(2) {
        write(&file, block * BLOCK, &pattern(BLOCK_LEN, 1));
    }
    mounted.store.checkpoint().unwrap();
    for block in (0..1200).step_by(4) {
        file.punch_hole(block * BLOCK, BLOCK).unwrap();
    }
    mounted.store.checkpoint().unwrap();
    for block in 0..1200 {
        assert_eq!(has_space(&file, block_at(block)), block % 4 != 0, "block {block}");
    }
}

/// What the file shows is what it will take, before the checkpoint too.
#[test]
fn blocks_that_are_written_again_are_not_counted_as_given_back() {
    let (_backing, mounted, file) = three_groups();
    let full = file.blocks512().unwrap();
    file.punch_hole(0, 20 * BLOCK).unwrap();
    assert_eq!(file.blocks512().unwrap(), full - 20 * 8);
    write(&file, 0, &pattern(5 * BLOCK_LEN, 2));
    file.allocate(10 * BLOCK, 5 * BLOCK, false).unwrap();
    assert_eq!(file.blocks512().unwrap(), full - 10 * 8);
    mounted.store.checkpoint().unwrap();
    assert_eq!(file.blocks512().unwrap(), full - 10 * 8);
}

#[test]
fn space_beyond_the_end_is_there_until_the_file_is_truncated() {
    let (_backing, mounted, file) = three_groups();
    let before = backing_blocks(&file);
    let size = file.size();
    file.allocate(size, 50 * BLOCK, true).unwrap();
    let asked = backing_blocks(&file);
    assert!(asked >= before + 50 * 8);
    // A growing file gives back what it took for writes to come, and no more.
    write(&file, size, b"one more");
    mounted.store.checkpoint().unwrap();
    assert!(backing_blocks(&file) >= asked);
    file.truncate(file.size()).unwrap();
    assert_eq!(backing_blocks(&file), before + 2 * 8, "a tag page and a block");

    file.allocate(file.size(), 50 * BLOCK, true).unwrap();
    write(&file, 0, b"dirty");
    file.truncate(file.size()).unwrap();
    mounted.store.checkpoint().unwrap();
    assert_eq!(backing_blocks(&file), before + 2 * 8);

    file.allocate(file.size(), 50 * BLOCK, true).unwrap();
    file.truncate(BLOCK).unwrap();
    mounted.store.checkpoint().unwrap();
    assert!(backing_blocks(&file) <= 6 * 8, "{}", backing_blocks(&file));
}

#[test]
fn space_beyond_the_end_that_is_asked_for_after_a_truncation_stays() {
    let (_backing, mounted, file) = three_groups();
    file.truncate(0).unwrap();
    file.allocate(0, 200 * BLOCK, true).unwrap();
    mounted.store.checkpoint().unwrap();
    assert!(backing_blocks(&file) >= 200 * 8, "{}", backing_blocks(&file));
    assert_eq!(file.backing().metadata().unwrap().size, backing_len(0));
}

/// What an append reserves ahead goes back after a crash as well, even if it was only that which a
/// checkpoint had not come to.
#[test]
fn what_was_reserved_for_writes_to_come_goes_back_after_a_crash() {
    for steps in 0..2 {
        let (backing, mounted) = in_memory();
        let file = mounted.create("f");
        write(&file, 0, &pattern(300 * BLOCK_LEN, 1));
        mounted.store.checkpoint().unwrap();
        write(&file, 300 * BLOCK, b"an append");
        if steps > 0 {
            let snapshot = file.begin_checkpoint().unwrap();
            file.write_home(&snapshot).unwrap();
            file.write_new_regions(&snapshot).unwrap();
            file.write_header(&snapshot).unwrap();
            file.sync_home().unwrap();
        }
        let with_more = backing_blocks(&file);
        drop((file, mounted));
        let mounted = mount(backing).unwrap();
        mounted.store.checkpoint().unwrap();
        let now = backing_blocks(&mounted.open("f"));
        assert!(now < with_more, "{now} of {with_more}, after {steps} steps");
        assert!(now <= (301 + 2 + 1 + 3) * 8, "{now}");
    }
}

/// Of a damaged sector nobody knows what had space.
#[test]
fn what_is_written_into_a_damaged_sector_has_space_of_its_own() {
    let (_backing, mounted) = in_memory();
    let file = mounted.create("f");
    write(&file, 0, b"the only block");
    file.truncate(10 * BLOCK).unwrap();
    mounted.store.checkpoint().unwrap();
    let sector = file.backing().clone();
    drop(file);
    sector.write_at(&[0xa5; 512], tag_page_at(0)).unwrap();
    let file = mounted.open("f");
    write(&file, 2 * BLOCK, &pattern(BLOCK_LEN, 1));
    assert!(has_space(&file, block_at(2)));
}

/// A billion regions, all of them holes but two, are not looked at one by one.
#[test]
fn the_largest_of_files_is_cut_off_and_searched_at_once() {
    let (_backing, mounted, file) = three_groups();
    let far = 1 << 57;
    file.truncate(1 << 58).unwrap();
    write(&file, far, &[7; 5000]);
    let start = std::time::Instant::now();
    assert_eq!(file.seek_data(3 * GROUP_PLAIN).unwrap(), Some(far));
    assert_eq!(file.seek_data(far + 8192).unwrap(), None);
    mounted.store.checkpoint().unwrap();
    file.punch_hole(4 * GROUP_PLAIN, 1 << 57).unwrap();
    assert_eq!(file.seek_data(3 * GROUP_PLAIN).unwrap(), None);
    mounted.store.checkpoint().unwrap();
    file.truncate(5000).unwrap();
    mounted.store.checkpoint().unwrap();
    assert_eq!((file.size(), file.seek_hole(0).unwrap()), (5000, Some(5000)));
    assert!(start.elapsed() < std::time::Duration::from_secs(10));
}
