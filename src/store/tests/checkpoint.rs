//! Checkpoints: what they must not lose, whatever happens around them.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use rustix::io::Errno;

use super::support::{Volume, pattern, read_all};
use crate::backing::fault::{Call, Rule};
use crate::error::FsError;
use crate::store::layout::{BLOCK, BLOCK_LEN, GROUP_PLAIN};
use crate::store::{Durability, File};

fn write(file: &File, offset: u64, data: &[u8]) {
    file.write_at(data, offset, Durability::default()).unwrap();
}

#[test]
fn a_checkpoint_that_panics_loses_nothing() {
    for call in [Call::Write, Call::Sync, Call::SetLen, Call::Read] {
        let volume = Volume::new();
        let file = volume.create("f");
        let data = pattern(GROUP_PLAIN as usize + 70_000, 1);
        write(&file, 0, &data);
        volume.store.checkpoint().unwrap();
        file.truncate(data.len() as u64 - 9000).unwrap();
        write(&file, 100, &[7; 8900]);
        let want = read_all(&file);
        volume.faults.arm_panic(call);
        let failed = volume.store.checkpoint();
        assert!(matches!(failed, Err(FsError::Os(Errno::IO))), "{call:?}");
        assert!(read_all(&file) == want, "{call:?}: at once");
        let mut want = want;
        // In the flush of the log it poisons that.
        if volume.store.log_status().unwrap().poisoned.is_none() {
            write(&file, 50_000, b"more");
            want = read_all(&file);
            volume.store.checkpoint().unwrap();
            assert!(read_all(&file) == want, "{call:?}: after another checkpoint");
        }
        drop(file);
        let volume = volume.reopen();
        assert!(read_all(&volume.open("f")) == want, "{call:?}: after a mount");
    }
}

/// The kernel tells of a failed write-back once. Whoever hears it must not keep it from those who
/// wait for the same blocks.
#[test]
fn a_flush_that_fails_in_a_checkpoint_is_not_forgotten_by_the_next_fsync() {
    let volume = Volume::new();
    let file = volume.create("f");
    write(&file, 0, b"something to bring home");
    let (faults, writer) = (volume.faults.clone(), file.clone());
    volume.faults.arm_hook(Call::Write, move || {
        // Directly to its place, when the log has been flushed already.
        write(&writer, 16 * BLOCK, &pattern(256 << 10, 1));
        let once =
            Rule { call: Call::Sync, after: 0, lasting: false, errno: Errno::IO, partial: None };
        faults.arm(once);
    });
    volume.store.checkpoint().unwrap_err();
    assert!(volume.faults.disarm());
    file.sync(false).expect_err("nobody knows whether the blocks are there");
    write_fails(&file);
    let mut bytes = vec![0; 256 << 10];
    file.read_at(&mut bytes, 16 * BLOCK).unwrap();
    assert!(bytes == pattern(256 << 10, 1));
}

fn write_fails(file: &File) {
    let done = file.write_at(b"x", 0, Durability::default());
    assert!(matches!(done, Err(FsError::Os(Errno::IO))), "{done:?}");
}

#[test]
fn a_checkpoint_does_not_end_well_if_somebody_else_has_heard_that_its_writes_failed() {
    let volume = Volume::new();
    let file = volume.create("f");
    write(&file, 0, b"acknowledged");
    file.sync(true).unwrap();
    let (faults, other) = (volume.faults.clone(), file.clone());
    volume.faults.arm_hook(Call::Write, move || {
        let once =
            Rule { call: Call::Sync, after: 0, lasting: false, errno: Errno::IO, partial: None };
        faults.arm(once);
        other.sync(true).unwrap_err();
    });
    volume.store.checkpoint().unwrap_err();
    volume.store.checkpoint().unwrap_err();
    assert!(file.first().is_some(), "the log still has it");
    let reason = volume.store.log_status().and_then(|log| log.poisoned).unwrap();
    let id = crate::store::keys::hex(&file.file_id());
    assert!(reason.contains(&id) && !reason.contains("log."), "{reason}");
    write_fails(&file);
    write_fails(&volume.create("g"));
}

/// They are on their way home, and no record names them yet: no queue owes a flush of that file.
#[test]
fn blocks_are_not_acknowledged_whose_write_back_failed_before_their_record_was_made() {
    let volume = Volume::new();
    let file = volume.create("f");
    write(&file, 0, b"something to bring home");
    file.sync(true).unwrap();
    file.name_is_durable(file.owes_name().unwrap());
    let snapshot = file.begin_checkpoint().unwrap();
    file.write_home(&snapshot).unwrap();
    let (faults, other) = (volume.faults.clone(), file.clone());
    volume.faults.arm_hook(Call::Write, move || {
        let once =
            Rule { call: Call::Sync, after: 0, lasting: false, errno: Errno::IO, partial: None };
        faults.arm(once);
        other.sync_home().unwrap_err();
    });
    let done = file.write_at(&pattern(256 << 10, 1), 16 * BLOCK, Durability::default());
    assert!(matches!(done, Err(FsError::Os(Errno::IO))), "{done:?}");
    file.abandon_checkpoint();
    assert_eq!(file.size(), 23);
    // Only those: the log has what the checkpoint was to bring home.
    volume.store.checkpoint().unwrap();
    write(&file, 16 * BLOCK, &pattern(256 << 10, 1));
    file.sync(false).unwrap();
}

#[test]
fn a_new_file_is_not_durable_after_a_flush_of_it_has_failed_in_a_checkpoint() {
    let volume = Volume::new();
    let file = volume.create("f");
    write(&file, 0, b"something to bring home");
    let once = Rule { call: Call::Sync, after: 1, lasting: false, errno: Errno::IO, partial: None };
    volume.faults.arm(once);
    volume.store.checkpoint().unwrap_err();
    assert!(volume.faults.disarm());
    file.sync(false).expect_err("its header may be lost");
}

#[test]
fn a_flush_that_fails_in_a_checkpoint_alone_is_made_good_by_the_next() {
    let volume = Volume::new();
    let file = volume.create("f");
    write(&file, 0, b"something to bring home");
    file.sync(true).unwrap();
    file.name_is_durable(file.owes_name().unwrap());
    let once = Rule { call: Call::Sync, after: 0, lasting: false, errno: Errno::IO, partial: None };
    volume.faults.arm(once);
    volume.store.checkpoint().unwrap_err();
    file.sync(false).unwrap();
    volume.store.checkpoint().unwrap();
    write(&file, 0, b"more");
}

#[test]
fn what_is_written_while_a_checkpoint_takes_long_is_flushed_all_the_same() {
    let volume = Volume::new();
    volume.store.start_background(|reason| panic!("{reason}")).unwrap();
    let (file, other) = (volume.create("f"), volume.create("g"));
    let (stuck, is_stuck) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    let blocks = pattern(24 * BLOCK_LEN, 1);
    write(&file, 0, &blocks);
    // A checkpoint reads what it copies from the log, and nobody else reads here.
    volume.faults.arm_hook(Call::Read, move || {
        stuck.send(()).unwrap();
        let _ = may_go_on.recv();
    });
    // Until the log is more than half full, and then once more.
    while {
        let log = volume.store.log_status().unwrap();
        write(&file, 0, &blocks);
        log.used <= log.capacity / 2
    } {}
    is_stuck.recv().unwrap();
    let (flushed, is_flushed) = mpsc::channel();
    volume.faults.arm_hook(Call::Sync, move || flushed.send(()).unwrap());
    write(&other, 0, b"nobody waits for this");
    let in_time = is_flushed.recv_timeout(Duration::from_secs(60));
    drop(go_on);
    assert!(in_time.is_ok(), "not flushed before the checkpoint has ended");
}

#[test]
fn the_space_of_what_is_removed_during_a_checkpoint_comes_back_after_it() {
    for fails in [false, true] {
        let volume = Volume::new();
        let file = volume.create("f");
        write(&file, 0, &pattern(5 * BLOCK_LEN, 1));
        let gone = Arc::downgrade(&file);
        let (store, faults) = (volume.store.clone(), volume.faults.clone());
        // A checkpoint reads what it copies from the log.
        volume.faults.arm_hook(Call::Read, move || {
            write(&file, 0, b"once more");
            store.tree().unlink(b"f").unwrap();
            let node = file.backing().node().unwrap().id();
            drop(file);
            store.forsaken(node);
            if fails {
                let (call, errno) = (Call::Write, Errno::NOSPC);
                faults.arm(Rule { call, after: 0, lasting: true, errno, partial: None });
            }
        });
        assert_eq!(volume.store.checkpoint().is_err(), fails);
        volume.store.shared.dirty.inter_due();
        assert_eq!(gone.strong_count(), 0, "failing: {fails}");
        volume.faults.disarm();
        // What the log has of it is let go with the next one.
        volume.store.checkpoint().unwrap();
        let log = volume.store.log_status().unwrap();
        assert_eq!((log.used, log.dirty_files), (0, 0), "failing: {fails}");
        assert!(!volume.path("f").exists());
    }
}

/// The checkpointer still runs then, and may have been asked before that.
#[test]
fn a_checkpoint_after_the_last_one_leaves_the_volume_closed() {
    let volume = Volume::new();
    write(&volume.create("f"), 0, b"something to bring home");
    volume.store.close().unwrap();
    assert!(volume.store.shared.log().unwrap().is_closed());
    volume.store.checkpoint().unwrap();
    assert!(volume.store.shared.log().unwrap().is_closed());
}

/// Whoever has answered the last request for a file lets go of it a moment later.
#[test]
fn the_space_of_what_somebody_still_holds_comes_back_when_he_lets_go() {
    let volume = Volume::new();
    let file = volume.create("f");
    write(&file, 0, &pattern(5 * BLOCK_LEN, 1));
    volume.store.tree().unlink(b"f").unwrap();
    volume.store.forsaken(file.backing().node().unwrap().id());
    volume.store.shared.dirty.inter_due();
    let gone = Arc::downgrade(&file);
    assert_eq!(volume.store.log_status().unwrap().dirty_files, 1, "it may be written to yet");
    drop(file);
    volume.store.shared.dirty.inter_due();
    assert_eq!((gone.strong_count(), volume.store.log_status().unwrap().dirty_files), (0, 0));
}
