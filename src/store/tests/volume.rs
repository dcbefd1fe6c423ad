//! Volumes: made, opened, refused.

use std::sync::Arc;

use super::support::{Volume, in_memory, keyring, options, pattern, read_all};
use crate::backing::linux::LinuxBacking;
use crate::crypto::secret::Secret;
use crate::error::{FsError, Kind};
use crate::key::gate::{Gate, Keyring};
use crate::store::Store;
use crate::store::file::Durability;
use rustix::io::Errno;

fn open(volume: &Volume) -> crate::Result<Arc<Store>> {
    let backing = LinuxBacking::open(volume.root()).unwrap();
    Store::open(backing, Gate::new(), false)
}

#[test]
fn a_volume_is_made_in_an_empty_directory_only() {
    let dir = tempfile::tempdir().unwrap();
    let backing = LinuxBacking::open(dir.path()).unwrap();
    assert_eq!(Store::inspect(&*backing).unwrap_err().kind, Kind::NotAVolume);
    std::fs::write(dir.path().join("something"), b"").unwrap();
    let options = options();
    let error = Store::format(&*backing, &keyring(), options).unwrap_err();
    assert_eq!(error.kind, Kind::Busy);
    std::fs::remove_file(dir.path().join("something")).unwrap();
    let info = Store::format(&*backing, &keyring(), options).unwrap();
    assert_eq!(info.features, 0);
    assert_eq!(Store::inspect(&*backing).unwrap(), info);
    assert!(Store::format(&*backing, &keyring(), options).is_err(), "not twice");
}

#[test]
fn one_writer_at_a_time() {
    let volume = Volume::new();
    let error = open(&volume).unwrap_err();
    assert_eq!(error.kind, Kind::Busy);
    assert!(error.to_string().contains(volume.root().to_str().unwrap()), "{error}");
}

#[test]
fn another_volume_key_opens_nothing_and_changes_nothing() {
    let mut volume = Volume::new();
    let file = volume.create("f");
    file.write_at(b"content", 0, Durability::default()).unwrap();
    drop(file);
    let sessions = || std::fs::read(volume.root().join("sessions.a")).unwrap();
    let before = sessions();
    let other = Keyring::new(1, Secret::new_with(|key| key.fill(0x43)).unwrap());
    assert_eq!(volume.store.start_session(&other).unwrap_err().kind, Kind::Corrupt);
    assert_eq!(sessions(), before);
    volume = volume.reopen();
    assert_eq!(read_all(&volume.open("f")), b"content");
}

#[test]
fn one_damaged_copy_of_anything_serves() {
    let mut volume = Volume::new();
    let file = volume.create("f");
    let data = pattern(10_000, 5);
    file.write_at(&data, 0, Durability::default()).unwrap();
    drop(file);
    for (name, at) in
        [("volume", 70), ("volume", 4096 + 70), ("sessions.a", 70), ("sessions.b", 20)]
    {
        let path = volume.root().join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        volume = volume.reopen();
        assert!(read_all(&volume.open("f")) == data, "{name} at {at}");
        assert_eq!(volume.store.info().damaged_copy, name == "volume");
        if name == "volume" {
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
        }
    }
}

#[test]
fn a_read_only_volume_is_not_written() {
    let volume = Volume::new();
    let file = volume.create("f");
    file.write_at(&pattern(10_000, 5), 0, Durability::default()).unwrap();
    drop(file);
    let volume = volume.reopen_as(true);
    let listing = |name: &str| std::fs::read(volume.root().join(name)).unwrap();
    let before = ["sessions.a", "sessions.b", "log.hot", "log.bulk"].map(listing);
    let file = volume.open("f");
    assert!(read_all(&file) == pattern(10_000, 5));
    let refused = |done: Result<(), FsError>| matches!(done, Err(FsError::Os(Errno::ROFS)));
    assert!(refused(file.write_at(b"x", 0, Durability::default()).map(|_| ())));
    assert!(refused(file.truncate(0)) && refused(file.allocate(0, 1, true)));
    assert!(refused(file.punch_hole(0, 1)) && refused(file.zero_range(0, 1, true)));
    assert_eq!(["sessions.a", "sessions.b", "log.hot", "log.bulk"].map(listing), before);
}

/// Of one that shows none GNU tar takes for granted that it is zeros.
#[test]
fn a_file_with_data_has_blocks() {
    let volume = Volume::new();
    let far = volume.create("far");
    far.write_at(b"x", 1 << 40, Durability::default()).unwrap();
    assert!(far.blocks512().unwrap() > 0);
    let file = volume.create("again");
    assert_eq!(file.blocks512().unwrap(), 0);
    for len in [1 << 20, 8 << 10] {
        file.write_at(&vec![1; len], 0, Durability::default()).unwrap();
        volume.store.checkpoint().unwrap();
        file.truncate(0).unwrap();
        assert_eq!(file.blocks512().unwrap(), 0);
        file.write_at(&[2; 4096], 0, Durability::default()).unwrap();
        assert!(file.blocks512().unwrap() > 0);
        volume.store.checkpoint().unwrap();
        assert!(file.blocks512().unwrap() > 0);
    }
}

#[test]
fn pages_that_fill_a_gap_have_their_space_and_a_limit() {
    let volume = Volume::new();
    let file = volume.create("f");
    let blocks = || file.backing().metadata().unwrap().blocks;
    let mut most = 0;
    for step in 0..12_u64 {
        let before = blocks();
        file.write_at(b"x", step << 40, Durability::default()).unwrap();
        most = most.max(blocks() - before);
    }
    // A TiB has some hundred regions.
    assert!(most > 400 * 8, "{most}");
    volume.store.checkpoint().unwrap();
    // Farther than ext4 goes.
    let (_, mounted) = in_memory();
    let file = mounted.create("far");
    let write = |step: u64| file.write_at(b"x", step << 54, Durability::default());
    (0..8).for_each(|step| assert!(write(step).is_ok(), "{step}"));
    assert!(matches!(write(8), Err(FsError::Os(Errno::FBIG))));
    write(0).unwrap();
    mounted.store.checkpoint().unwrap();
    let mut byte = [0];
    file.read_at(&mut byte, 7 << 54).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn sparse_files_take_the_space_of_their_data() {
    let volume = Volume::new();
    let file = volume.create("f");
    for tib in [0_u64, 1, 3, 9, 2, 14] {
        file.write_at(b"here", tib << 40, Durability::default()).unwrap();
    }
    file.truncate(15 << 40).unwrap();
    assert!(file.blocks512().unwrap() < 400, "{}", file.blocks512().unwrap());
    assert_eq!(file.seek_data(4096).unwrap(), Some(1 << 40));
    assert_eq!(file.seek_data((9 << 40) + 4096).unwrap(), Some(14 << 40));
    assert_eq!(file.seek_data((14 << 40) + 4096).unwrap(), None);
    assert_eq!(file.seek_hole(1 << 40).unwrap(), Some((1 << 40) + 4096));
    drop(file);
    let volume = volume.reopen();
    let file = volume.open("f");
    let mut buf = [1; 8];
    for tib in [0_u64, 1, 2, 3, 9, 14] {
        file.read_at(&mut buf, tib << 40).unwrap();
        assert_eq!(&buf, b"here\0\0\0\0", "{tib} TiB");
    }
    file.read_at(&mut buf, 5 << 40).unwrap();
    assert_eq!(buf, [0; 8]);
    let too_large = file.truncate(u64::MAX);
    assert!(matches!(too_large, Err(FsError::Os(Errno::FBIG))));
    assert!(matches!(
        file.write_at(b"x", u64::MAX, Durability::default()),
        Err(FsError::Os(Errno::FBIG))
    ));
}

#[test]
fn allocated_and_punched_space_is_counted() {
    let volume = Volume::new();
    let file = volume.create("f");
    file.allocate(0, 1 << 20, false).unwrap();
    assert_eq!(file.size(), 1 << 20);
    let full = file.blocks512().unwrap();
    assert_eq!(full, 2048);
    file.write_at(&pattern(1 << 20, 1), 0, Durability::default()).unwrap();
    assert_eq!(file.blocks512().unwrap(), full);
    file.punch_hole(0, 1 << 19).unwrap();
    assert!(file.blocks512().unwrap() <= full / 2 + 16);
    let node = volume.store.tree().lookup(b"f").unwrap();
    assert_eq!(volume.store.file_usage(&node).unwrap(), (1 << 20, file.blocks512().unwrap()));
}
