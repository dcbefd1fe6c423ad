//! Time stamps.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

use crate::harness::{mounted, shell};

fn times(path: &Path) -> [(i64, i64); 3] {
    let m = fs::symlink_metadata(path).unwrap();
    [(m.atime(), m.atime_nsec()), (m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec())]
}

#[test]
fn times_are_kept_to_the_nanosecond_also_before_1970() {
    let mut mount = mounted!();
    let path = mount.path("f");
    fs::write(&path, "x").unwrap();
    for (sec, nsec) in [(1_700_000_000, 1), (0, 999_999_999), (-5, 300_000_000), (-1, 1)] {
        let at = Timespec { tv_sec: sec, tv_nsec: nsec };
        let both = Timestamps { last_access: at, last_modification: at };
        utimensat(CWD, &path, &both, AtFlags::empty()).unwrap();
        assert_eq!(times(&path)[..2], [(sec, nsec); 2]);
        mount.remount("");
        assert_eq!(times(&path)[..2], [(sec, nsec); 2], "after a remount");
    }
}

#[test]
fn extreme_times_end_nothing() {
    let mount = mounted!();
    let path = mount.path("f");
    fs::write(&path, "x").unwrap();
    for sec in [i64::MIN, i64::MIN + 1, i64::MAX] {
        let at = Timespec { tv_sec: sec, tv_nsec: 5 };
        let both = Timestamps { last_access: at, last_modification: at };
        // Which of them the disk takes is its own affair.
        let _ = utimensat(CWD, &path, &both, AtFlags::empty());
    }
    assert_eq!(fs::read(&path).unwrap(), b"x");
}

#[test]
fn changes_move_the_times_they_should() {
    let mount = mounted!();
    let path = mount.path("f");
    let file = File::create(&path).unwrap();
    let moved = |change: &dyn Fn()| {
        let before = times(&path);
        sleep(Duration::from_millis(20));
        change();
        let after = times(&path);
        [0, 1, 2].map(|i| before[i] != after[i])
    };
    assert_eq!(moved(&|| file.write_all_at(b"data", 0).unwrap()), [false, true, true]);
    assert_eq!(moved(&|| file.set_len(2).unwrap()), [false, true, true]);
    assert_eq!(moved(&|| file.set_len(2).unwrap()), [false, true, true]);
    assert_eq!(moved(&|| drop(shell(&mount.root(), "chmod 600 f"))), [false, false, true]);
    assert_eq!(moved(&|| fs::hard_link(&path, mount.path("g")).unwrap()), [false, false, true]);
    assert_eq!(moved(&|| fs::remove_file(mount.path("g")).unwrap()), [false, false, true]);
    assert_eq!(moved(&|| file.sync_all().unwrap()), [false; 3]);
}

#[test]
fn a_time_set_before_the_last_close_stays() {
    let mut mount = mounted!();
    let path = mount.path("f");
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 987_654_321);
    let file = File::create(&path).unwrap();
    file.write_all_at(&[1; 70_000], 0).unwrap();
    file.set_times(FileTimes::new().set_modified(time).set_accessed(time)).unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), time);
    mount.remount("");
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), time);
}

#[test]
fn a_directory_s_times_follow_its_entries() {
    let mount = mounted!();
    let script = "mkdir d; touch -d 2001-01-01 d; stat -c %Y d; touch d/f; \
                  [ $(stat -c %Y d) -gt 1600000000 ] && echo moved";
    assert_eq!(shell(&mount.root(), script), "978307200\nmoved\n");
}
