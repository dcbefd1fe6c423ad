//! Without the key: what can be seen is found, and nothing is invented.

use std::fs;

use super::support::{
    BLOCKS, KEY, PAGE, SIZE, Volume, block, check_backing, flip, get, open, pattern, put, tag_page,
    write_at,
};
use crate::maintenance::check::{Repair, Severity};

/// One finding of this code at that position.
#[track_caller]
fn finds(damage: impl FnOnce(&Volume), code: &str, at: Option<u64>) {
    let volume = Volume::new();
    damage(&volume);
    let checked = volume.check_without_key();
    assert_eq!(checked.codes(), [code], "{:#?}", checked.findings);
    assert_eq!(checked.findings[0].at, at);
    assert_eq!(checked.findings[0].path, None);
    assert_eq!(checked.summary.left > 0, checked.findings[0].severity > Severity::Note);
}

#[test]
fn nothing_is_wrong_with_a_volume_that_was_closed() {
    let volume = Volume::new();
    let before = volume.fingerprint();
    let checked = volume.check_without_key();
    assert!(checked.findings.is_empty(), "{:#?}", checked.findings);
    assert_eq!(checked.summary.blocks, BLOCKS + 3);
    assert_eq!(volume.fingerprint(), before, "something has changed");
}

#[test]
fn a_volume_that_was_not_closed() {
    let volume = Volume::killed(|fs| {
        let handle = open(fs, "big");
        write_at(fs, handle, 5000, b"over the first blocks");
        write_at(fs, handle, SIZE, &pattern(600_000, 9));
        fs.release(handle);
    });
    assert_eq!(volume.check_without_key().codes(), ["log-pending"]);
}

#[test]
fn what_can_be_seen_is_found() {
    for copy in 0..2 {
        let at = copy * PAGE;
        finds(|v| flip(&v.path("volume"), at + 70), "volume-header-copy", Some(at));
        finds(|v| flip(&v.path("log.bulk"), at + 20), "anchor-copy", Some(at));
        finds(|v| flip(&v.big, at + 20), "header-copy", Some(at));
        finds(|v| flip(&v.big, at + 600), "header-copy", Some(at));
    }
    // That the copies differ is seen, which is right is not.
    finds(|v| flip(&v.big, 200), "header-copy", Some(PAGE));
    finds(|v| flip(&v.path("sessions.a"), 80), "sessions-copy", None);
    finds(|v| _ = [20, PAGE + 20].map(|at| flip(&v.big, at)), "header", Some(0));
    finds(|v| flip(&v.big, tag_page(1) + 24), "tag-sector", Some(tag_page(1)));
    finds(|v| flip(&v.big, tag_page(1) + 17), "tag-sector", Some(tag_page(1)));
    finds(|v| flip(&v.big, 2 * PAGE + 25), "generation-sector", Some(2 * PAGE));
    let entry = tag_page(0) + 32 + 3 * 32;
    finds(|v| flip(&v.big, entry + 25), "block", Some(block(3)));
    finds(|v| flip(&v.big, entry + 28), "block", Some(block(3)));
    finds(|v| flip(&v.big, entry + 31), "block", Some(block(3)));
    finds(
        |v| {
            let file = fs::File::options().write(true).open(&v.big).unwrap();
            rustix::fs::fallocate(
                &file,
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
                block(7),
                2 * PAGE,
            )
            .unwrap();
        },
        "block",
        Some(block(7)),
    );
    finds(
        |v| {
            let other = get(&v.big, tag_page(0) + 32, 32);
            put(&v.big, tag_page(0) + 64, &other);
        },
        "nonce",
        None,
    );
    finds(|v| fs::write(v.path("envelope.json"), "{}").unwrap(), "envelope", None);
    finds(|v| fs::remove_file(v.path("log.hot")).unwrap(), "log", None);
    finds(|v| fs::rename(&v.small, v.path("tree/not!ours")).unwrap(), "name", None);
    finds(|v| fs::remove_file(&v.side).unwrap(), "long-name", None);
    finds(|v| fs::remove_file(&v.long).unwrap(), "side-file", None);
    finds(|v| fs::remove_file(&v.target).unwrap(), "symlink", None);
    finds(|v| fs::remove_file(&v.long_link).unwrap(), "link-target", None);
}

/// A damaged header lists regions without end, and the log excuses much of what it names.
#[test]
fn regions_that_are_not_on_the_disk_are_not_looked_for() {
    let volume = Volume::killed(|fs| {
        let handle = open(fs, "big");
        write_at(fs, handle, 5000, b"over the first blocks");
        fs.release(handle);
    });
    for copy in 0..2 {
        put(&volume.big, copy * PAGE + 84, &u32::MAX.to_le_bytes());
    }
    assert_eq!(volume.check_without_key().codes(), ["log-pending"]);
}

/// What only the key can tell.
#[test]
fn what_is_inside_is_believed() {
    let volume = Volume::new();
    flip(&volume.big, block(5));
    flip(&volume.big, tag_page(0) + 32);
    assert!(volume.check_without_key().findings.is_empty());
    assert!(!check_backing(volume.backing(), Some(KEY), Repair::No).unwrap().findings.is_empty());
}
