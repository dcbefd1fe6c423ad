//! Many at once: on one directory, on one file, and against renames, removals, the cut-off and
//! the end of the mount.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{Mount, errno, mounted, names, shell};

const THREADS: usize = 64;

#[test]
fn sixty_four_threads_share_a_directory() {
    let mount = mounted!();
    let dir = mount.path("d");
    fs::create_dir(&dir).unwrap();
    let taken = AtomicUsize::new(0);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (dir, taken) = (&dir, &taken);
            scope.spawn(move || {
                for round in 0..10 {
                    let path = |kind: &str| dir.join(format!("{kind}-{thread}-{round}"));
                    fs::write(path("new"), format!("{thread} {round}")).unwrap();
                    fs::hard_link(path("new"), path("link")).unwrap();
                    fs::rename(path("new"), path("moved")).unwrap();
                    // One name for all: exactly one of them gets it.
                    let shared = dir.join(format!("shared-{round}"));
                    match OpenOptions::new().write(true).create_new(true).open(shared) {
                        Ok(_) => drop(taken.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EEXIST)),
                    }
                    assert!(names(dir).contains(&format!("moved-{thread}-{round}")));
                    fs::remove_file(path("link")).unwrap();
                    if round % 2 == 0 {
                        fs::remove_file(path("moved")).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(taken.into_inner(), 10);
    let left = names(&dir);
    assert_eq!(left.len(), THREADS * 5 + 10);
    for name in left.iter().filter(|name| name.starts_with("moved")) {
        let expected = name.trim_start_matches("moved-").replace('-', " ");
        assert_eq!(fs::read_to_string(dir.join(name)).unwrap(), expected);
    }
}

#[test]
fn sixty_four_threads_share_a_file() {
    const RECORD: usize = 1000;
    const ROUNDS: usize = 30;
    let mount = mounted!();
    let path = mount.path("f");
    File::create(&path).unwrap();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let path = &path;
            scope.spawn(move || {
                let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
                let log = path.with_extension("log");
                let mut appender = OpenOptions::new().append(true).create(true).open(log).unwrap();
                let mut read = [0; RECORD];
                for round in 0..ROUNDS {
                    // Neighbours share blocks, and the file grows in no order.
                    let offset = ((round * THREADS + thread) * RECORD) as u64;
                    let data = [(thread + round) as u8; RECORD];
                    file.write_all_at(&data, offset).unwrap();
                    file.read_exact_at(&mut read, offset).unwrap();
                    assert_eq!(read, data);
                    appender.write_all(format!("{thread} {round}\n").as_bytes()).unwrap();
                    if round % 10 == 0 {
                        file.sync_data().unwrap();
                    }
                }
            });
        }
    });
    let data = fs::read(&path).unwrap();
    assert_eq!(data.len(), THREADS * ROUNDS * RECORD);
    for (index, record) in data.chunks(RECORD).enumerate() {
        let expected = (index % THREADS + index / THREADS) as u8;
        assert!(record.iter().all(|byte| *byte == expected), "record {index}");
    }
    let log = fs::read_to_string(path.with_extension("log")).unwrap();
    let mut lines: Vec<&str> = log.lines().collect();
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), THREADS * ROUNDS);
}

#[test]
fn a_million_lookups_and_forgets_leave_no_trace() {
    let mut mount = mounted!();
    shell(&mount.root(), "mkdir d; cd d; i=0; while [ $i -lt 500 ]; do : > f$i; i=$((i+1)); done");
    // The first ones fill what is filled once.
    mount.look_up(100_000);
    let before = mount.resident();
    mount.look_up(1_000_000);
    let grown = mount.resident().saturating_sub(before);
    assert!(grown < 8 << 20, "grown by {} KiB", grown >> 10);
}

#[test]
fn files_that_come_and_go_leave_no_trace() {
    let mount = mounted!();
    let come_and_go = |count: usize| {
        for index in 0..count {
            let path = mount.path(&format!("f{index}"));
            fs::write(&path, b"content").unwrap();
            fs::remove_file(&path).unwrap();
        }
    };
    // The cache of tag pages has its size then.
    come_and_go(10_000);
    // Workers that had nothing to do before take memory with their first requests, once, and on a busy
    // machine one after the other; what is left behind, each time.
    let mut grown = Vec::new();
    while grown.len() < 20 && grown.iter().all(|&grown| grown >= 1 << 20) {
        let before = mount.resident();
        come_and_go(5_000);
        grown.push(mount.resident().saturating_sub(before));
    }
    assert!(grown.len() < 20, "grown, each time, by {grown:?} bytes");
}

/// Any operation on names that others are changing.
fn anything(root: &Path, mut random: u64) {
    let mut next = || {
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        random >> 33
    };
    let path = |number: u64| root.join(format!("d{}/n{}", number % 3, number / 3 % 5));
    let (one, other) = (path(next()), path(next()));
    // Whether each works depends on the others; that it ends, and how the mount is afterwards, counts.
    let _ = match next() % 14 {
        0 => fs::write(&one, vec![7; (next() % 20_000) as usize]),
        1 => fs::rename(&one, &other),
        2 => fs::remove_file(&one),
        3 => fs::hard_link(&one, &other),
        4 => fs::read(&one).map(drop),
        5 => fs::create_dir(&one),
        6 => fs::remove_dir(&one),
        7 => fs::symlink_metadata(&one).map(drop),
        8 => fs::read_dir(one.parent().unwrap()).map(|entries| assert!(entries.count() < 100)),
        9 => OpenOptions::new().write(true).open(&one).and_then(|file| {
            file.set_len(next() % 10_000)?;
            file.sync_all()
        }),
        10 => std::os::unix::fs::symlink("nowhere", &one),
        11 => fs::read_link(&one).map(drop),
        12 => OpenOptions::new().append(true).create(true).open(&one).and_then(|mut file| {
            fs::remove_file(&one)?;
            file.write_all(b"without a name")?;
            file.set_len(3)
        }),
        _ => rustix::fs::setxattr(&one, "user.x", b"v", rustix::fs::XattrFlags::empty())
            .map_err(Into::into),
    };
}

/// Runs operations of all kinds on many threads until `end` has returned.
fn crowd(root: &Path, end: impl FnOnce()) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for thread in 0..16 {
            let over = &over;
            scope.spawn(move || {
                let mut round = 0;
                while !over.load(Ordering::Relaxed) {
                    anything(root, thread << 32 | round);
                    round += 1;
                }
            });
        }
        end();
        over.store(true, Ordering::Relaxed);
    });
}

/// Everything that is listed can be looked at, read and removed.
fn is_whole(mount: &Mount) {
    for dir in ["d0", "d1", "d2"] {
        for name in names(&mount.path(dir)) {
            let path = mount.path(dir).join(name);
            let metadata = fs::symlink_metadata(&path).unwrap();
            if metadata.is_file() {
                assert_eq!(fs::read(&path).unwrap().len() as u64, metadata.len());
                fs::remove_file(&path).unwrap();
            } else if metadata.is_symlink() {
                assert_eq!(fs::read_link(&path).unwrap(), Path::new("nowhere"));
                fs::remove_file(&path).unwrap();
            } else {
                fs::remove_dir(&path).unwrap();
            }
        }
        fs::remove_dir(mount.path(dir)).unwrap();
    }
}

fn three_directories(mount: &Mount) {
    for dir in ["d0", "d1", "d2"] {
        fs::create_dir(mount.path(dir)).unwrap();
    }
}

/// Commits share flushes; what waits for the disk, and what changes names, goes on beside
/// them, and a cut-off meets them anywhere.
#[test]
fn commits_at_once_last_beside_everything_else() {
    const COMMITTERS: u64 = 40;
    let mut mount = mounted!();
    three_directories(&mount);
    let root = mount.root();
    let path = |number: u64| format!("log{number}");
    // Before the first cut-off, on however busy a machine.
    let logs: Vec<File> = (0..COMMITTERS)
        .map(|number| File::create_new(mount.path(&path(number))).unwrap())
        .collect();
    let over = AtomicBool::new(false);
    let acknowledged: Vec<u64> = thread::scope(|scope| {
        let committers: Vec<_> = logs
            .iter()
            .map(|log| {
                let over = &over;
                scope.spawn(move || {
                    let (mut next, mut last) = (0, 0);
                    while !over.load(Ordering::Relaxed) {
                        next += 1;
                        let at = (next % 5) * 512;
                        let written = log.write_all_at(&u64::to_ne_bytes(next), at);
                        match written.and_then(|()| log.sync_data()) {
                            Ok(()) => last = next,
                            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EIO)),
                        }
                    }
                    last
                })
            })
            .collect();
        crowd(&root, || {
            for _ in 0..3 {
                thread::sleep(Duration::from_millis(700));
                mount.cut_off();
                thread::sleep(Duration::from_millis(50));
                mount.revalidate();
            }
            thread::sleep(Duration::from_millis(700));
        });
        over.store(true, Ordering::Relaxed);
        committers.into_iter().map(|committer| committer.join().unwrap()).collect()
    });
    drop(logs);
    assert!(acknowledged.iter().any(|&last| last > 0));
    mount.remount("");
    for (number, last) in (0..).zip(acknowledged) {
        let path = mount.path(&path(number));
        let log = fs::read(&path).unwrap();
        let kept = log.chunks(512).map(|slot| u64::from_ne_bytes(slot[..8].try_into().unwrap()));
        assert!(kept.max().unwrap_or(0) >= last, "{number} has lost {last}");
        fs::remove_file(path).unwrap();
    }
    is_whole(&mount);
}

#[test]
fn everything_at_once_leaves_a_whole_tree() {
    let mut mount = mounted!();
    three_directories(&mount);
    crowd(&mount.root(), || thread::sleep(Duration::from_secs(3)));
    mount.remount("");
    is_whole(&mount);
}

#[test]
fn everything_at_once_may_meet_a_cut_off() {
    let mut mount = mounted!();
    three_directories(&mount);
    let root = mount.root();
    crowd(&root, || {
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(500));
            mount.cut_off();
            assert_eq!(errno(fs::symlink_metadata(mount.path("d0"))), libc::EIO);
            thread::sleep(Duration::from_millis(100));
            mount.revalidate();
        }
        thread::sleep(Duration::from_millis(500));
    });
    is_whole(&mount);
}

#[test]
fn everything_at_once_may_meet_the_end_of_the_mount() {
    let mut mount = mounted!();
    three_directories(&mount);
    let root = mount.root();
    crowd(&root, || {
        thread::sleep(Duration::from_secs(1));
        let start = Instant::now();
        // Busy, so lazily; what is open goes on until it is closed.
        shell(Path::new("/"), &format!("umount --lazy '{}'", root.display()));
        assert!(start.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(200));
    });
    // What ran on was in the empty directory below.
    shell(Path::new("/"), &format!("rm -rf '{0}'; mkdir '{0}'", root.display()));
    mount.remount("");
    is_whole(&mount);
}
