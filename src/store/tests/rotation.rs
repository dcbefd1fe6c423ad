//! Rotation of data encryption keys: nobody sees it, and no cut of the power loses a key that
//! something needs.

use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use rustix::io::Errno;

use super::crash::{Op, checked, rotate, run, write};
use super::support::{Volume, mount, pattern, read_all};
use crate::backing::fault::{Call, Rule};
use crate::backing::memory::Options;
use crate::store::file::File;
use crate::store::layout::GROUP_PLAIN;
use crate::store::{Durability, FsError};

/// Later than any key of these tests was made.
const LATER: u64 = 1 << 40;
const ALL: usize = usize::MAX;

/// Slots of the header at home, and the slot that its entries name, of a file without holes.
fn slots_on_disk(volume: &Volume, name: &str) -> (Vec<u16>, Vec<u16>) {
    let disk = std::fs::read(volume.path(name)).unwrap();
    let le = |at: usize| u16::from_le_bytes([disk[at], disk[at + 1]]);
    let used = (0..4).map(|i| 192 + i * 64).filter(|at| le(at + 2) == 1).map(le).collect();
    let tags = |group: usize| 12_288 + group * 495_616;
    let groups = (disk.len() - 12_288).div_ceil(495_616);
    let entries = (0..groups).flat_map(|group| (0..120).map(move |block| (group, block)));
    let at = |(group, block): (usize, usize)| tags(group) + block / 15 * 512 + 32 + block % 15 * 32;
    let sealed = entries.map(at).filter(|at| le(at + 30) == 1);
    let mut named: Vec<u16> = sealed.map(|at| le(at + 28)).collect();
    named.sort_unstable();
    named.dedup();
    (used, named)
}

#[test]
fn everything_is_sealed_again_and_the_old_key_is_gone() {
    let volume = Volume::new();
    let data = pattern(3 * GROUP_PLAIN as usize + 777, 5);
    let file = volume.create("f");
    file.write_at(&data, 0, Durability::default()).unwrap();
    volume.store.checkpoint().unwrap();
    assert_eq!(slots_on_disk(&volume, "f"), (vec![0], vec![0]));
    let before = std::fs::metadata(volume.path("f")).unwrap();

    let rotated = rotate(&volume.store, &file, LATER, ALL).unwrap();
    assert_eq!((rotated.blocks, rotated.damaged, rotated.destroyed), (361, 0, 1));
    assert_eq!(slots_on_disk(&volume, "f"), (vec![1], vec![1]));
    assert_eq!(read_all(&file), data);
    let after = std::fs::metadata(volume.path("f")).unwrap();
    assert_eq!((before.mtime(), before.mtime_nsec()), (after.mtime(), after.mtime_nsec()));
    assert!(!volume.store.needs_rotation(&file, LATER));
    // Again, with what is older than the new key: there is nothing.
    let again = rotate(&volume.store, &file, LATER, ALL).unwrap();
    assert_eq!((again.blocks, again.destroyed), (0, 0));
    // And with what is not.
    let again = rotate(&volume.store, &file, LATER + 5, ALL).unwrap();
    assert_eq!((again.blocks, again.destroyed), (361, 1));
    drop(file);
    let volume = volume.reopen();
    assert_eq!(slots_on_disk(&volume, "f"), (vec![2], vec![2]));
    assert_eq!(read_all(&volume.open("f")), data);
}

#[test]
fn a_rotation_that_was_ended_is_gone_on_with() {
    let mut volume = Volume::new();
    let data = pattern(4 * GROUP_PLAIN as usize, 6);
    volume.create("f").write_at(&data, 0, Durability::default()).unwrap();
    for (i, groups) in [0, 1, 3, 2].into_iter().enumerate() {
        // Each time everything is older: another key is begun with, as long as there are slots.
        let file = volume.open("f");
        assert_eq!(rotate(&volume.store, &file, LATER + i as u64 * 9, groups), None);
        assert!(volume.store.needs_rotation(&file, LATER));
        assert_eq!(read_all(&file), data);
        drop(file);
        volume = volume.reopen();
    }
    let file = volume.open("f");
    assert_eq!(read_all(&file), data);
    let rotated = rotate(&volume.store, &file, LATER + 99, ALL).unwrap();
    assert!(rotated.destroyed >= 4, "{rotated:?}");
    drop(file);
    let volume = volume.reopen();
    let (slots, named) = slots_on_disk(&volume, "f");
    assert_eq!((slots.len(), &slots), (1, &named));
    assert_eq!(read_all(&volume.open("f")), data);
}

#[test]
fn a_damaged_block_keeps_the_key_that_it_may_need() {
    let volume = Volume::new();
    let data = pattern(200 * 4096, 6);
    let file = volume.create("f");
    file.write_at(&data, 0, Durability::default()).unwrap();
    volume.store.checkpoint().unwrap();
    let mut disk = std::fs::read(volume.path("f")).unwrap();
    disk[16_384 + 7 * 4096 + 9] ^= 1;
    std::fs::write(volume.path("f"), &disk).unwrap();
    let rotated = rotate(&volume.store, &file, LATER, ALL).unwrap();
    assert_eq!((rotated.blocks, rotated.damaged, rotated.destroyed), (199, 1, 0));
    volume.store.checkpoint().unwrap();
    assert_eq!(slots_on_disk(&volume, "f").0, [0, 1]);
    let mut block = vec![0; 4096];
    assert!(matches!(file.read_at(&mut block, 7 * 4096), Err(FsError::Integrity(_))));
    file.read_at(&mut block, 8 * 4096).unwrap();
    assert_eq!(block, data[8 * 4096..9 * 4096]);
    // Written anew, it needs no old key.
    file.write_at(&data[7 * 4096..8 * 4096], 7 * 4096, Durability::default()).unwrap();
    let rotated = rotate(&volume.store, &file, LATER, ALL).unwrap();
    assert_eq!((rotated.damaged, rotated.destroyed), (0, 1));
    assert_eq!(slots_on_disk(&volume, "f"), (vec![1], vec![1]));
    assert_eq!(read_all(&file), data);
}

#[test]
fn writers_and_readers_go_on_meanwhile() {
    let volume = Volume::new();
    let len = 6 * GROUP_PLAIN as usize;
    let file = volume.create("f");
    file.write_at(&pattern(len, 0), 0, Durability::default()).unwrap();
    let stop = AtomicBool::new(false);
    // Each writer has blocks of its own, every fourth, and writes its round into them.
    let write = |file: &Arc<File>, writer: usize| {
        let mut round = 0_u8;
        while !stop.load(Ordering::Relaxed) || round == 0 {
            round = round.wrapping_add(1).max(1);
            for block in (writer..len / 4096).step_by(4 * 37) {
                let at = block as u64 * 4096;
                file.write_at(&[round; 4096], at, Durability::default()).unwrap();
                let mut back = [0; 4096];
                file.read_at(&mut back, at).unwrap();
                assert_eq!(back, [round; 4096]);
            }
        }
        round
    };
    let rounds = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|i| {
                scope.spawn({
                    let (w, f) = (&write, &file);
                    move || w(f, i)
                })
            })
            .collect();
        for round in 0..5 {
            rotate(&volume.store, &file, LATER + round * 7, ALL).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().map(|writer| writer.join().unwrap()).collect::<Vec<u8>>()
    });
    let mut expected = pattern(len, 0);
    for (writer, round) in rounds.into_iter().enumerate() {
        for block in (writer..len / 4096).step_by(4 * 37) {
            expected[block * 4096..(block + 1) * 4096].fill(round);
        }
    }
    assert!(read_all(&file) == expected);
    drop(file);
    let volume = volume.reopen();
    assert!(read_all(&volume.open("f")) == expected);
    let (slots, named) = slots_on_disk(&volume, "f");
    assert_eq!((slots.len(), &slots), (1, &named));
}

/// A writer that has sealed its block, and not logged it yet, when another key is taken into use.
#[test]
fn a_block_that_was_being_written_when_the_key_changed_can_be_read() {
    let volume = Volume::new();
    let file = volume.create("f");
    file.sync(true).unwrap();
    file.add_dek(LATER).unwrap();
    volume.store.checkpoint().unwrap();
    let (sealed, is_sealed) = mpsc::channel();
    let (changed, is_changed) = mpsc::channel();
    volume.faults.arm_hook(Call::Allocate, move || {
        sealed.send(()).unwrap();
        // Whoever waits for this writer, as it should, says nothing.
        let _ = is_changed.recv_timeout(Duration::from_millis(300));
    });
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| file.write_at(&[7; 4096], 0, Durability::default()).unwrap());
        is_sealed.recv().unwrap();
        file.use_newest_dek();
        for group in 0..file.groups() {
            file.reseal(group).unwrap();
        }
        let _ = changed.send(());
        writer.join().unwrap();
    });
    volume.store.checkpoint().unwrap();
    volume.store.checkpoint().unwrap();
    file.retire_deks().unwrap();
    volume.store.checkpoint().unwrap();
    assert_eq!(read_all(&file), [7; 4096]);
    drop(file);
    assert_eq!(read_all(&volume.reopen().open("f")), [7; 4096]);
}

/// Each write of a rotation fails in turn. It is done when the old key is gone from the disk, and then
/// it says so.
#[test]
fn a_key_that_is_still_on_the_disk_is_not_said_to_be_gone() {
    for after in 0.. {
        let volume = Volume::new();
        let file = volume.create("f");
        file.write_at(&pattern(9000, 1), 0, Durability::default()).unwrap();
        volume.store.checkpoint().unwrap();
        let errno = Errno::NOSPC;
        let rule = Rule { call: Call::Write, after, lasting: false, errno, partial: None };
        volume.faults.arm(rule);
        let files = [file.clone()];
        let rotate = || {
            let done = volume.store.rotate_deks(&files, LATER, &mut |_| ControlFlow::Continue(()));
            done.map(|done| done.unwrap()[0].destroyed)
        };
        let first = rotate();
        if !volume.faults.disarm() {
            assert_eq!(first.unwrap(), 1);
            break;
        }
        if volume.store.log_status().unwrap().poisoned.is_some() {
            continue;
        }
        assert!(first.is_err(), "{after}");
        assert!(volume.store.needs_rotation(&file, LATER), "{after}: it is not done");
        assert_eq!(rotate().unwrap(), 1, "{after}");
        assert!(!volume.store.needs_rotation(&file, LATER), "{after}");
        assert_eq!(slots_on_disk(&volume, "f"), (vec![1], vec![1]), "{after}");
    }
}

/// The same; the checkpointer then does what is left, and nobody has the file open any more.
#[test]
fn a_key_that_has_gone_since_a_failure_is_said_to_be() {
    for after in 0.. {
        let volume = Volume::new();
        let file = volume.create("f");
        file.write_at(&pattern(9000, 1), 0, Durability::default()).unwrap();
        volume.store.checkpoint().unwrap();
        let errno = Errno::NOSPC;
        volume.faults.arm(Rule { call: Call::Write, after, lasting: false, errno, partial: None });
        let rotate = |file: Arc<File>| {
            let files = [file];
            let done = volume.store.rotate_deks(&files, LATER, &mut |_| ControlFlow::Continue(()));
            done.map(|done| done.unwrap()[0].destroyed)
        };
        let first = rotate(file);
        if !volume.faults.disarm() {
            assert_eq!(first.unwrap(), 1);
            break;
        }
        if volume.store.log_status().unwrap().poisoned.is_some() {
            continue;
        }
        first.unwrap_err();
        volume.store.checkpoint().unwrap();
        let file = volume.open("f");
        assert!(volume.store.needs_rotation(&file, LATER), "{after}: it is not told");
        assert_eq!(rotate(file).unwrap(), 1, "{after}");
        assert!(!volume.store.needs_rotation(&volume.open("f"), LATER), "{after}");
    }
}

/// Its slots are all taken, so some keys go before the rest is done.
#[test]
fn keys_that_went_before_a_rotation_was_ended_are_said_to_be_gone() {
    let volume = Volume::new();
    let file = volume.create("f");
    file.write_at(&pattern(GROUP_PLAIN as usize, 6), 0, Durability::default()).unwrap();
    for round in 0..3 {
        assert_eq!(rotate(&volume.store, &file, LATER + round * 9, 0), None);
    }
    // Of a file of one group: the first asking is for the slots, the second one for the rest.
    assert_eq!(rotate(&volume.store, &file, LATER + 99, 1), None);
    let rotated = rotate(&volume.store, &file, LATER + 99, ALL).unwrap();
    assert_eq!(rotated.destroyed, 4);
}

/// A clock that was fast when the key was made, or a list of what to rotate that somebody has planted.
#[test]
fn a_key_from_the_future_is_old() {
    let volume = Volume::new();
    let file = volume.create("f");
    file.write_at(&pattern(9000, 1), 0, Durability::default()).unwrap();
    let now = crate::store::seconds_since_epoch();
    for before in [LATER, u64::MAX - 1, u64::MAX] {
        assert_eq!(rotate(&volume.store, &file, before, ALL).unwrap().destroyed, 1);
        assert!(volume.store.needs_rotation(&file, now), "{before}");
        assert_eq!(rotate(&volume.store, &file, now, ALL).unwrap().destroyed, 1);
        assert!(!volume.store.needs_rotation(&file, now), "{before}");
    }
}

/// It is removed, and nobody else has it open.
#[test]
fn a_file_that_goes_meanwhile_is_not_damaged() {
    let volume = Volume::new();
    let data = pattern(200 * 4096, 6);
    let file = volume.create("f");
    file.write_at(&data, 0, Durability::default()).unwrap();
    volume.store.checkpoint().unwrap();
    // Not straight home, this time.
    file.write_at(&data, 0, Durability::default()).unwrap();
    let id = file.backing().metadata().unwrap().id;
    std::fs::remove_file(volume.path("f")).unwrap();
    volume.store.forsaken(id);
    // More than once around the log.
    let other = volume.create("g");
    for round in 0..12 {
        other.write_at(&pattern(1 << 20, round), 0, Durability::default()).unwrap();
        volume.store.checkpoint().unwrap();
    }
    assert!(read_all(&file) == data);
    let rotated = rotate(&volume.store, &file, LATER, ALL).unwrap();
    assert_eq!((rotated.blocks, rotated.damaged), (200, 0));
}

fn workload() -> Vec<Op> {
    vec![
        write(0, GROUP_PLAIN as usize + 70_000, 1),
        Op::Sync,
        Op::Rotate { before: LATER, groups: 1 },
        write(5000, 512, 2),
        Op::Sync,
        Op::Rotate { before: LATER, groups: ALL },
        write(GROUP_PLAIN - 4096, 16_384, 3),
        Op::Rotate { before: LATER + 9, groups: ALL },
        write(100, 512, 4),
        Op::Sync,
    ]
}

#[test]
fn no_power_cut_loses_a_key_that_is_needed() {
    checked("rotation", &workload(), 3);
}

#[test]
fn a_rotation_that_a_power_cut_ended_is_gone_on_with() {
    let run = run(&workload());
    let options = Options { budget: 2, ..Options::default() };
    let mut unfinished = 0;
    for cut in (0..=run.trace.len()).step_by(3) {
        for crash in run.trace.crashes(cut, &options) {
            let mounted = mount(run.trace.materialise(&crash)).unwrap();
            let Some(file) = mounted.try_open("f") else { continue };
            let file = file.unwrap();
            unfinished += usize::from(file.is_between_deks());
            let content = mounted.content("f");
            let rotated = rotate(&mounted.store, &file, LATER + 50, ALL).unwrap();
            assert!(rotated.destroyed >= 1, "{crash:?}");
            assert!(!file.is_between_deks() && mounted.content("f") == content, "{crash:?}");
            run.judge(cut, &mounted).unwrap_or_else(|error| panic!("{error} after {crash:?}"));
        }
    }
    assert!(unfinished > 10, "{unfinished}");
}
