//! Repairs: what they do, that nothing is lost by them, and that they leave nothing to do.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use serde_json::Value;

use super::forge;
use super::support::{
    KEY, PAGE, SIZE, Volume, block, check_backing, flip, get, keyring, open, open_gate, pattern,
    put, write_at,
};
use crate::backing::fault::{Call, FaultBacking, Rule};
use crate::maintenance::check::Repair;
use crate::store::Store;

fn lost(volume: &Volume) -> Vec<PathBuf> {
    let entries = fs::read_dir(volume.path("lost"));
    entries.into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

fn manifest(volume: &Volume) -> Vec<Value> {
    let text = fs::read_to_string(volume.path("lost/manifest.jsonl")).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Plants, repairs, and checks again: `codes` are repaired, and `left` is all that is found then.
#[track_caller]
fn repairs(damage: impl FnOnce(&Volume), codes: &[&str], left: &[&str]) -> Volume {
    let volume = Volume::new();
    damage(&volume);
    let repaired = volume.repair(Repair::All);
    assert!(repaired.troubles.is_empty(), "{:?}", repaired.troubles);
    let done = repaired.findings.iter().filter(|finding| finding.repaired == Some(true));
    let mut done: Vec<_> = done.map(|finding| finding.code.name()).collect();
    done.sort_unstable();
    assert_eq!(done, codes, "{:#?}", repaired.findings);
    assert_eq!(repaired.summary.repaired, codes.len() as u64);
    let again = volume.repair(Repair::All);
    assert_eq!(again.summary.repaired, 0, "{:#?}", again.findings);
    let mut found = again.codes();
    found.sort_unstable();
    assert_eq!(found, left, "{:#?}", again.findings);
    assert!(again.findings.iter().all(|finding| finding.repair.is_none()));
    volume
}

#[test]
fn copies_are_restored() {
    for copy in 0..2 {
        let at = copy * PAGE;
        repairs(|v| flip(&v.path("volume"), at + 70), &["volume-header-copy"], &[]);
        repairs(|v| flip(&v.path("log.bulk"), at + 60), &["anchor-copy"], &[]);
        let volume = repairs(|v| flip(&v.big, at + 60), &["header-copy"], &[]);
        let header = fs::read(&volume.big).unwrap();
        assert!(header[..PAGE as usize] == header[PAGE as usize..2 * PAGE as usize]);
    }
    let newest_of_hot = |v: &Volume| {
        let log = v.path("log.hot");
        let at = [0, PAGE].into_iter().max_by_key(|at| super::support::get(&log, at + 32, 1));
        flip(&log, at.unwrap() + 60);
    };
    repairs(newest_of_hot, &["anchor-copy", "log-pending"], &[]);
    for name in ["sessions.a", "sessions.b"] {
        repairs(|v| flip(&v.path(name), 70), &["sessions-copy"], &[]);
        repairs(|v| fs::remove_file(v.path(name)).unwrap(), &["sessions-copy"], &[]);
    }
}

/// The copy of another file may be the newer one; the file's own holds the only keys of its content.
#[test]
fn a_header_of_another_file_is_not_written_over_the_own_one() {
    for copy in [0, PAGE] {
        let volume = Volume::new();
        let own = get(&volume.big, PAGE - copy, PAGE as usize);
        let record = forge::header(&volume, &volume.small, |header| header[48] += 1);
        put(&volume.big, copy, &record);
        let before = volume.check();
        let told = before.findings.iter().find(|one| one.code.name() == "header-copy").unwrap();
        assert!(told.detail.contains("another file"), "{}", told.detail);
        assert_eq!((told.path.as_deref(), told.repair), (Some("/big"), None));
        volume.repair(Repair::All);
        assert!(get(&volume.big, PAGE - copy, PAGE as usize) == own);
    }
}

#[test]
fn a_restored_header_leaves_the_time_of_modification() {
    let volume = Volume::new();
    let before = fs::metadata(&volume.big).unwrap().modified().unwrap();
    flip(&volume.big, 60);
    let changed = fs::File::options().write(true).open(&volume.big).unwrap();
    changed.set_modified(before).unwrap();
    volume.repair(Repair::All);
    assert_eq!(fs::metadata(&volume.big).unwrap().modified().unwrap(), before);
}

#[test]
fn what_nobody_can_reach_is_moved_and_noted() {
    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    let mut moved = 0;
    let both = |v: &Volume| {
        moved = inode(&v.big);
        [30, PAGE + 30].iter().for_each(|&at| flip(&v.big, at));
    };
    let volume = repairs(both, &["header"], &["lost"]);
    assert!(!volume.big.exists());
    let lines = manifest(&volume);
    assert_eq!(lines.len(), 1);
    assert_eq!((&lines[0]["code"], &lines[0]["path"]), (&"header".into(), &"/big".into()));
    assert_eq!(lines[0]["backing_path"], volume.big.to_str().unwrap());
    let name = lines[0]["name"].as_str().unwrap();
    assert_eq!(inode(&volume.path("lost").join(name)), moved);
    // Nothing of it has changed but its place: put back, it is found again.
    fs::rename(volume.path("lost").join(name), &volume.big).unwrap();
    assert!(volume.check().codes().contains(&"header"));

    let foreign = |v: &Volume| {
        fs::rename(&v.directory, v.path("tree/not!ours")).unwrap();
    };
    let volume = repairs(foreign, &["name"], &["lost"]);
    let inner = volume.inner.file_name().unwrap();
    let whole = lost(&volume).iter().any(|path| path.join(inner).is_file());
    assert!(whole, "a directory goes with what is in it");

    let with_link = |v: &Volume| {
        let name = v.long_link.file_name().unwrap();
        fs::rename(&v.long_link, v.directory.join(name)).unwrap();
        foreign(v);
    };
    let volume = repairs(with_link, &["name"], &["lost"]);
    assert!(volume.target.exists(), "put back, the link is as it was");

    repairs(|v| fs::remove_file(&v.side).unwrap(), &["long-name"], &["lost"]);
    let volume = repairs(|v| flip(&v.side, 3), &["long-name", "side-file"], &["lost"]);
    assert_eq!(lost(&volume).len(), 3);
    repairs(|v| fs::remove_file(&v.long).unwrap(), &["side-file"], &["lost"]);
    repairs(|v| fs::remove_file(&v.long_link).unwrap(), &["link-target"], &["lost"]);
}

/// Whatever cannot be opened or found just now, by a fault of the disk or for want of descriptors, may
/// be whole.
#[test]
fn what_cannot_be_read_now_is_not_moved() {
    let volume = Volume::new();
    let places =
        [&volume.big, &volume.small, &volume.inner, &volume.long, &volume.side, &volume.target];
    for call in [Call::Open, Call::Lookup] {
        for errno in [Errno::IO, Errno::MFILE] {
            for after in 0.. {
                let (backing, faults) = FaultBacking::new(volume.backing());
                faults.arm(Rule { call, after, lasting: false, errno, partial: None });
                // It may come to nothing.
                drop(check_backing(backing, Some(KEY), Repair::All));
                for place in places {
                    assert!(place.exists(), "{call:?} {after}: {}", place.display());
                }
                if !faults.has_failed() {
                    break;
                }
            }
        }
    }
    assert_eq!(volume.check().codes(), [""; 0]);
}

#[test]
fn what_reads_in_part_stays() {
    let volume = repairs(|v| flip(&v.big, block(5)), &[], &["block"]);
    assert!(volume.big.exists() && lost(&volume).is_empty());
    repairs(|v| flip(&v.target, 500), &[], &["symlink"]);
}

#[test]
fn the_log_is_brought_home() {
    let last = |fs: &crate::vfs::Filesystem| {
        let handle = open(fs, "big");
        write_at(fs, handle, 5000, b"over the first blocks");
        write_at(fs, handle, SIZE, &pattern(600_000, 9));
        fs.release(handle);
    };
    for repair in [Repair::Safe, Repair::All] {
        let volume = Volume::killed(last);
        // As a crash before the first flush leaves it.
        fs::write(volume.path("tree/AAAA"), "").unwrap();
        let repaired = volume.repair(repair);
        assert!(repaired.codes().contains(&"log-pending"), "{:#?}", repaired.findings);
        assert!(repaired.summary.closed && repaired.summary.left == 0);
        assert_eq!(volume.check().codes(), ["lost"]);
        let text = volume.check().summary.blocks;
        assert_eq!(text, (SIZE + 600_000).div_ceil(PAGE) + 3);
    }
}

#[test]
fn the_safe_repair_moves_nothing() {
    let volume = Volume::new();
    fs::write(volume.path("tree/not!ours"), "").unwrap();
    flip(&volume.big, 60);
    let repaired = volume.repair(Repair::Safe);
    assert_eq!(repaired.summary.repaired, 1);
    assert!(repaired.summary.left > 0 && volume.path("tree/not!ours").exists());
    assert!(lost(&volume).is_empty());
}

#[test]
fn a_log_that_is_no_good_is_left_alone() {
    let volume = Volume::new();
    fs::remove_file(volume.path("log.bulk")).unwrap();
    flip(&volume.big, 60);
    fs::write(volume.path("tree/not!ours"), "").unwrap();
    let before = volume.fingerprint();
    let repaired = volume.repair(Repair::All);
    assert!(repaired.summary.repaired == 0 && repaired.codes().contains(&"log"));
    assert!(!repaired.troubles.is_empty());
    assert_eq!(volume.fingerprint(), before);
}

#[test]
fn a_log_in_another_place() {
    let volume = Volume::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let open = || {
        let store = Store::open(volume.backing(), open_gate(KEY), false).unwrap();
        store.start_session(&keyring(KEY)).unwrap();
        store.recover().unwrap();
        store
    };
    let store = open();
    store.close().unwrap();
    store.replace_log(Some(elsewhere.path()), None).unwrap();
    drop(store);
    assert!(volume.check().findings.is_empty());
    assert!(volume.check_without_key().findings.is_empty());
    let log = elsewhere.path().join("log.bulk");
    flip(&log, 60);
    let checked = volume.check();
    assert_eq!(checked.codes(), ["anchor-copy"]);
    assert_eq!(checked.findings[0].backing_path, log.to_str().unwrap());
    volume.repair(Repair::All);
    assert!(volume.check().findings.is_empty());

    // As a crash leaves it after the header has named the new log.
    let link = volume.path("log");
    fs::rename(&link, volume.path("log.new")).unwrap();
    fs::rename(&log, elsewhere.path().join("log.bulk.new")).unwrap();
    let codes = volume.check().codes();
    assert_eq!(codes, ["log-unsettled", "leftover"]);
    assert_eq!(volume.check_without_key().codes(), codes);
    let repaired = volume.repair(Repair::Safe);
    assert_eq!((repaired.summary.repaired, repaired.summary.left), (1, 0));
    assert!(volume.check().findings.is_empty() && log.exists() && link.is_symlink());

    fs::remove_file(&link).unwrap();
    assert_eq!(volume.check().codes(), ["log"]);
}

/// Cut at every call, a repair leaves what one more repair makes good.
#[test]
fn a_power_cut_in_the_middle_does_no_harm() {
    use crate::backing::fault::{Call, FaultBacking, Rule};
    let volume = Volume::new();
    let plant = |volume: &Volume| {
        flip(&volume.path("volume"), 70);
        flip(&volume.path("sessions.b"), 70);
        flip(&volume.path("log.bulk"), 60);
        flip(&volume.inner, 60);
        [30, PAGE + 30].iter().for_each(|&at| flip(&volume.small, at));
        fs::write(volume.path("tree/not!ours"), "").unwrap();
    };
    drop(volume);
    for after in 0.. {
        let volume = Volume::new();
        plant(&volume);
        let (backing, faults) = FaultBacking::new(volume.backing());
        let errno = rustix::io::Errno::IO;
        let mut hit = false;
        for call in [Call::Write, Call::Name] {
            let partial = Some(600);
            faults.arm(Rule { call, after: after / 2, lasting: true, errno, partial });
        }
        let done = super::support::check_backing(backing, Some(super::support::KEY), Repair::All);
        hit |= faults.disarm();
        drop(done);
        let repaired = volume.repair(Repair::All);
        let codes = volume.check().codes();
        assert_eq!(codes, ["lost"], "after {after}: {:#?}", repaired.findings);
        assert_eq!(lost(&volume).len(), 3, "two files and the manifest");
        if !hit {
            assert!(after > 10);
            return;
        }
    }
}
