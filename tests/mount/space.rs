//! Holes and reserved space: fallocate, lseek, truncate, copy_file_range.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

use crate::harness::{mounted, shell};

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

#[test]
fn each_mode_of_fallocate() {
    let mount = mounted!();
    let file = open(&mount.path("f"));
    file.write_all_at(&[5; 100_000], 0).unwrap();
    let none = FallocateFlags::empty();
    let keep = FallocateFlags::KEEP_SIZE;
    fallocate(&file, none, 0, 200_000).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 200_000);
    fallocate(&file, keep, 0, 400_000).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 200_000);
    fallocate(&file, keep | FallocateFlags::PUNCH_HOLE, 10_001, 30_000).unwrap();
    fallocate(&file, FallocateFlags::ZERO_RANGE, 50_000, 10).unwrap();
    fallocate(&file, FallocateFlags::ZERO_RANGE, 199_990, 110).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 200_100);
    fallocate(&file, FallocateFlags::ZERO_RANGE | keep, 200_000, 5_000).unwrap();
    let data = fs::read(mount.path("f")).unwrap();
    assert_eq!(data.len(), 200_100);
    for (at, byte) in data.iter().enumerate() {
        let zero = (10_001..40_001).contains(&at) || (50_000..50_010).contains(&at);
        assert_eq!(*byte, if at >= 100_000 || zero { 0 } else { 5 }, "at {at}");
    }
}

#[test]
fn punching_gives_space_back() {
    let mount = mounted!();
    let file = open(&mount.path("f"));
    file.write_all_at(&vec![5; 4 << 20], 0).unwrap();
    let before = file.metadata().unwrap().blocks();
    let punch = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE;
    fallocate(&file, punch, 0, 4 << 20).unwrap();
    file.sync_all().unwrap();
    let after = file.metadata().unwrap().blocks();
    assert!(after * 4 < before, "{before} blocks, then {after}");
}

#[test]
fn holes_are_found() {
    let mount = mounted!();
    let file = open(&mount.path("f"));
    file.set_len(10 << 20).unwrap();
    file.write_all_at(&[1; 4096], 4 << 20).unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(0)).unwrap(), 4 << 20);
    assert_eq!(seek(&file, SeekFrom::Hole(4 << 20)).unwrap(), (4 << 20) + 4096);
    assert_eq!(seek(&file, SeekFrom::Hole(0)).unwrap(), 0);
    let past = seek(&file, SeekFrom::Data(5 << 20)).unwrap_err();
    assert_eq!(past.raw_os_error(), libc::ENXIO);
    let past = seek(&file, SeekFrom::Hole(11 << 20)).unwrap_err();
    assert_eq!(past.raw_os_error(), libc::ENXIO);
}

#[test]
fn truncation_up_and_down_never_shows_old_bytes() {
    let mount = mounted!();
    let file = open(&mount.path("f"));
    file.write_all_at(&[9; 50_000], 0).unwrap();
    for (down, up) in [(49_999, 60_000), (4096, 8192), (4095, 4097), (1, 50_000), (0, 10)] {
        file.set_len(down).unwrap();
        file.set_len(up).unwrap();
        let data = fs::read(mount.path("f")).unwrap();
        assert_eq!(data.len() as u64, up);
        assert!(data[down as usize..].iter().all(|&byte| byte == 0), "{down} to {up}");
        assert!(data[..down as usize].iter().all(|&byte| byte == 9), "{down} to {up}");
        file.write_all_at(&[9; 50_000], 0).unwrap();
    }
}

#[test]
fn a_sparse_file_of_15_tib() {
    let mount = mounted!();
    let file = open(&mount.path("f"));
    let end = 15u64 << 40;
    file.set_len(end).unwrap();
    file.write_all_at(b"end", end - 3).unwrap();
    file.write_all_at(b"middle", end / 2).unwrap();
    assert_eq!(file.metadata().unwrap().len(), end);
    let mut middle = [0; 8];
    file.read_exact_at(&mut middle, end / 2 - 1).unwrap();
    assert_eq!(&middle, b"\0middle\0");
    let mut last = [0; 3];
    file.read_exact_at(&mut last, end - 3).unwrap();
    assert_eq!(&last, b"end");
    assert!(file.metadata().unwrap().blocks() < 10_000);
}

#[test]
fn ranges_are_copied_in_the_file_system() {
    let mount = mounted!();
    let data: Vec<u8> = (0..40_000_000u32).map(|i| (i / 3 % 255) as u8).collect();
    fs::write(mount.path("a"), &data).unwrap();
    shell(&mount.root(), "cp --reflink=never a b; cmp a b");
    let (from, to) = (open(&mount.path("a")), open(&mount.path("c")));
    let (mut at, mut into) = (123, 7);
    let copied = rustix::fs::copy_file_range(&from, Some(&mut at), &to, Some(&mut into), 100_000);
    let copied = copied.unwrap();
    assert!(copied > 0);
    let read = fs::read(mount.path("c")).unwrap();
    assert_eq!(&read[..7], &[0; 7]);
    assert!(read[7..] == data[123..123 + copied]);
}
