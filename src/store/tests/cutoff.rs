//! The gate shuts and opens again.

use std::time::Duration;

use super::support::{Volume, keyring, pattern, read_all};
use crate::error::{FsError, FsResult};
use crate::key::gate::{BootTime, Reason};
use crate::store::file::Durability;

fn is_cut_off<T>(result: FsResult<T>) -> bool {
    matches!(result, Err(FsError::CutOff(_)))
}

fn cut_off(volume: &Volume) {
    volume.gate.shut(Reason::Unreachable);
    assert!(volume.gate.drain(Duration::from_secs(5)));
    volume.gate.wipe();
}

fn revalidate(volume: &Volume) {
    volume.store.start_session(&keyring()).unwrap();
    assert!(volume.gate.open(keyring(), BootTime::now() + Duration::from_secs(60)));
}

#[test]
fn open_files_answer_the_cut_off_and_work_again_afterwards() {
    let volume = Volume::new();
    let file = volume.create("f");
    let old = pattern(50_000, 1);
    file.write_at(&old, 0, Durability::default()).unwrap();
    let counter = volume.store.shared.session().unwrap().counter.session();

    cut_off(&volume);
    let mut buf = vec![0xee; 50_000];
    assert!(is_cut_off(file.read_at(&mut buf, 0)));
    assert!(buf.iter().all(|&byte| byte == 0));
    assert!(is_cut_off(file.write_at(b"new", 0, Durability::default())));
    assert!(is_cut_off(file.write_at(b"new", 70_000, Durability::default())));
    assert!(is_cut_off(file.truncate(1000)));
    assert!(is_cut_off(file.punch_hole(0, 4096)));
    let backing = volume.store.tree().create_unnamed().unwrap();
    assert!(is_cut_off(volume.store.create_file(backing)));
    // What is sealed already may still be made durable.
    file.sync(false).unwrap();
    assert_eq!(file.size(), 50_000);

    revalidate(&volume);
    assert_eq!(volume.store.shared.session().unwrap().counter.session(), counter + 1);
    assert!(read_all(&file) == old);
    file.write_at(b"new", 20_000, Durability::default()).unwrap();
    drop(file);
    let volume = volume.reopen();
    let mut new = old;
    new[20_000..20_003].copy_from_slice(b"new");
    assert!(read_all(&volume.open("f")) == new, "blocks of three sessions");
}

#[test]
fn a_cut_off_at_any_moment_leaves_the_file_whole() {
    let volume = Volume::new();
    let file = volume.create("f");
    let len = 700_000;
    file.write_at(&vec![1; len], 0, Durability::default()).unwrap();
    for round in 2..20_u8 {
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| file.write_at(&vec![round; len], 0, Durability::default()));
            std::thread::sleep(Duration::from_micros(u64::from(round) * 150));
            cut_off(&volume);
            let done = writer.join().unwrap();
            assert!(done.is_ok() || is_cut_off(done));
        });
        revalidate(&volume);
        for block in read_all(&file).chunks(4096) {
            assert!(block.iter().all(|&byte| byte == block[0]) && block[0] <= round);
        }
    }
}
