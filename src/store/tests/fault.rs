//! A disk that fails.

use rustix::io::Errno;

use super::support::{Mounted, Volume, in_memory, mount, pattern, read_all};
use crate::backing::fault::{Call, FaultBacking, Rule};
use crate::backing::memory::Options;
use crate::error::{FsError, FsResult};
use crate::store::file::{Durability, File};
use crate::store::layout::{BLOCK_LEN, GROUP_PLAIN};

const LEN: usize = 40 * BLOCK_LEN + 77;

fn os_error<T>(result: FsResult<T>) -> Option<Errno> {
    match result {
        Err(FsError::Os(errno)) => Some(errno),
        _ => None,
    }
}

/// Every write of an operation fails in turn, whole or in part, once or from then on.
fn each_write_fails(
    case: &str,
    prepare: impl Fn(&File) -> Vec<u8>,
    operation: impl Fn(&File) -> FsResult<()>,
    new: &[u8],
) {
    let kinds = [
        (Errno::IO, None, false),
        (Errno::NOSPC, Some(0), false),
        (Errno::NOSPC, Some(BLOCK_LEN), false),
        (Errno::IO, Some(2 * BLOCK_LEN), true),
    ];
    for call in [Call::Write, Call::SetLen, Call::PunchHole, Call::Allocate] {
        for (errno, partial, lasting) in kinds {
            for after in 0.. {
                let case = format!("{case}: {call:?} {after}, {errno:?}, {partial:?}");
                let volume = Volume::new();
                let file = volume.create("f");
                let old = prepare(&file);
                volume.faults.arm(Rule { call, after, lasting, errno, partial });
                let done = operation(&file);
                if !volume.faults.disarm() {
                    // This operation makes no more such calls.
                    done.unwrap();
                    break;
                }
                match done {
                    Ok(()) => assert!(read_all(&file) == new, "{case}"),
                    done => {
                        // The log's failures are EIO, whatever the disk said.
                        let error = os_error(done);
                        assert!(error == Some(errno) || error == Some(Errno::IO), "{case}");
                        assert!(read_all(&file) == old, "{case}: changed by a failure");
                    }
                }
                drop(file);
                // The next mount finds all of it or nothing, and nothing is in the way of a retry.
                let volume = volume.reopen();
                let file = volume.open("f");
                let now = read_all(&file);
                assert!(now == old || now == new, "{case}: neither old nor new");
                operation(&file).unwrap();
                assert!(read_all(&file) == new, "{case}: again");
            }
        }
    }
}

fn write(file: &File, offset: u64, data: &[u8]) -> FsResult<()> {
    file.write_at(data, offset, Durability::default()).map(|_| ())
}

#[test]
fn overwrites_leave_old_or_new() {
    let old = pattern(LEN, 1);
    let data = pattern(9000, 2);
    let mut new = old.clone();
    new[5000..14_000].copy_from_slice(&data);
    each_write_fails(
        "overwrite",
        |file| {
            write(file, 0, &old).unwrap();
            old.clone()
        },
        |file| write(file, 5000, &data),
        &new,
    );
}

#[test]
fn extending_writes_leave_the_file_as_it_was() {
    let old = pattern(LEN, 1);
    let data = pattern(GROUP_PLAIN as usize, 2);
    let mut new = old.clone();
    new.resize(LEN + 10_000, 0);
    new.extend_from_slice(&data);
    each_write_fails(
        "extend",
        |file| {
            write(file, 0, &old).unwrap();
            // Leaves entries past the end behind.
            write(file, LEN as u64, &[5; 20_000]).unwrap();
            file.truncate(LEN as u64).unwrap();
            old.clone()
        },
        |file| write(file, LEN as u64 + 10_000, &data),
        &new,
    );
}

#[test]
fn first_writes_leave_an_empty_file() {
    let data = pattern(LEN, 2);
    each_write_fails("first", |_| Vec::new(), |file| write(file, 0, &data), &data);
}

#[test]
fn truncation_happens_or_does_not() {
    let old = pattern(LEN, 1);
    each_write_fails(
        "truncate",
        |file| {
            write(file, 0, &old).unwrap();
            old.clone()
        },
        |file| file.truncate(10_000),
        &old[..10_000],
    );
    let mut new = old[..10_000].to_vec();
    new.resize(LEN, 0);
    each_write_fails(
        "truncate up",
        |file| {
            write(file, 0, &old).unwrap();
            file.truncate(10_000).unwrap();
            old[..10_000].to_vec()
        },
        |file| file.truncate(LEN as u64),
        &new,
    );
}

#[test]
fn holes_and_space() {
    let old = pattern(LEN, 1);
    let prepare = |file: &File| {
        write(file, 0, &old).unwrap();
        old.clone()
    };
    let mut new = old.clone();
    new[3 * BLOCK_LEN + 5..20 * BLOCK_LEN + 9].fill(0);
    let (from, len) = (3 * BLOCK_LEN as u64 + 5, 17 * BLOCK_LEN as u64 + 4);
    each_write_fails("zero", prepare, |file| file.zero_range(from, len, true), &new);
    each_write_fails("punch", prepare, |file| file.punch_hole(from, len), &new);
    let mut new = old.clone();
    new.resize(LEN + 600_000, 0);
    each_write_fails("allocate", prepare, |file| file.allocate(LEN as u64, 600_000, false), &new);
}

/// The checkpoint that has brought everything home cannot set the time of modification there.
#[test]
fn a_failed_checkpoint_does_not_move_the_time_of_modification() {
    for call in [Call::Attribute, Call::Metadata] {
        for after in 0.. {
            let volume = Volume::new();
            let file = volume.create("f");
            write(&file, 0, b"content").unwrap();
            let shown = file.times().unwrap().mtime.unwrap();
            let id = file.backing().metadata().unwrap().id;
            let rule = Rule { call, after, lasting: false, errno: Errno::IO, partial: None };
            volume.faults.arm(rule);
            let done = volume.store.checkpoint();
            if !volume.faults.disarm() {
                done.unwrap();
                break;
            }
            let mtime = || {
                let mut metadata = file.backing().metadata().unwrap();
                assert_eq!(metadata.id, id);
                volume.store.amend(&mut metadata);
                metadata.mtime
            };
            assert_eq!(mtime(), shown, "{call:?} {after}");
            volume.store.checkpoint().unwrap();
            assert_eq!(mtime(), shown, "{call:?} {after}");
            assert_eq!(
                file.backing().metadata().unwrap().mtime,
                shown,
                "{call:?} {after}: at home"
            );
        }
    }
}

/// Every call of a checkpoint fails in turn: nothing is lost, nothing is wrong, and the next one
/// succeeds.
#[test]
fn a_failed_checkpoint_costs_nothing() {
    let old = pattern(GROUP_PLAIN as usize + 5 * BLOCK_LEN, 1);
    let mut new = old.clone();
    new[100..9000].fill(7);
    new[200_000..300_000].fill(0);
    new.truncate(GROUP_PLAIN as usize + 77);
    for call in [Call::Write, Call::Sync, Call::Read, Call::SetLen, Call::PunchHole] {
        for (lasting, partial) in [(false, None), (false, Some(1000)), (true, None)] {
            for after in 0.. {
                let case = format!("{call:?} {after} {partial:?}");
                let volume = Volume::new();
                let (file, other) = (volume.create("f"), volume.create("g"));
                write(&file, 0, &old).unwrap();
                write(&other, 0, &old[..50_000]).unwrap();
                volume.store.checkpoint().unwrap();
                write(&file, 100, &[7; 8900]).unwrap();
                file.punch_hole(200_000, 100_000).unwrap();
                file.truncate(new.len() as u64).unwrap();
                write(&other, 10, b"changed").unwrap();
                volume.faults.arm(Rule { call, after, lasting, errno: Errno::IO, partial });
                let done = volume.store.checkpoint();
                if !volume.faults.disarm() {
                    done.unwrap();
                    break;
                }
                assert!(read_all(&file) == new, "{case}");
                let poisoned = volume.store.log_status().unwrap().poisoned.is_some();
                let goes_on = write(&other, 20, b"more");
                assert_eq!(goes_on.is_ok(), !poisoned, "{case}");
                if !poisoned {
                    volume.store.checkpoint().unwrap();
                    assert!(read_all(&file) == new, "{case}: at home");
                }
                drop((file, other));
                let volume = volume.reopen();
                assert!(read_all(&volume.open("f")) == new, "{case}: after a mount");
                let other = read_all(&volume.open("g"));
                assert_eq!(&other[10..17], b"changed", "{case}");
                assert_eq!(&other[20..24] == b"more", !poisoned, "{case}");
            }
        }
    }
}

/// Only what is likely to be flushed next is handed to the disk before that.
#[test]
fn a_commit_is_written_out_before_its_flush_where_each_write_is_flushed() {
    let volume = Volume::new();
    let file = volume.create("f");
    let refused = |lasting| {
        let call = Call::StartWriteOut;
        volume.faults.arm(Rule { call, after: 0, lasting, errno: Errno::IO, partial: None });
    };
    let commit = |writes: usize| {
        (0..writes).for_each(|at| write(&file, at as u64, b"x").unwrap());
        file.sync(false).unwrap();
    };
    refused(true);
    commit(2);
    commit(2);
    commit(1);
    assert!(!volume.faults.disarm(), "after each of these something else may come");
    commit(1);
    file.sync(false).unwrap();
    refused(false);
    write(&file, 0, b"acknowledged").unwrap();
    assert!(volume.faults.disarm());
    assert_eq!(os_error(file.sync(false)), Some(Errno::IO), "nobody knows what the disk has");
    assert_eq!(os_error(write(&file, 0, b"more")), Some(Errno::IO));
    assert_eq!(&read_all(&file), b"acknowledged");
    drop(file);
    assert_eq!(read_all(&volume.reopen().open("f")), b"acknowledged");
}

#[test]
fn a_failed_flush_is_final() {
    let volume = Volume::new();
    let file = volume.create("f");
    write(&file, 0, b"content").unwrap();
    let rule = Rule { call: Call::Sync, after: 0, lasting: false, errno: Errno::IO, partial: None };
    volume.faults.arm(rule);
    assert_eq!(os_error(file.sync(true)), Some(Errno::IO));
    assert_eq!(os_error(file.sync(true)), Some(Errno::IO), "not as if nothing had happened");
    assert_eq!(os_error(write(&file, 0, b"more")), Some(Errno::IO));
    assert_eq!(read_all(&file), b"content");
    drop(file);
    let volume = volume.reopen();
    let file = volume.open("f");
    write(&file, 0, b"CONTENT").unwrap();
    volume.faults.arm(rule);
    let flushed = Durability::Flushed;
    assert_eq!(os_error(file.write_at(b"x", 0, flushed)), Some(Errno::IO));
    assert_eq!(os_error(write(&file, 0, b"y")), Some(Errno::IO), "until the next mount");
    assert!(volume.store.log_status().unwrap().poisoned.is_some());
}

#[test]
fn short_reads_of_the_disk_are_damage_not_zeros() {
    let volume = Volume::new();
    let file = volume.create("f");
    let data = pattern(LEN, 4);
    write(&file, 0, &data).unwrap();
    volume.store.checkpoint().unwrap();
    let short =
        Rule { call: Call::Read, after: 0, lasting: true, errno: Errno::IO, partial: Some(100) };
    volume.faults.arm(short);
    let mut buf = vec![1; LEN];
    assert!(matches!(file.read_at(&mut buf, 0), Err(FsError::Integrity(_))));
    assert!(buf.iter().all(|&byte| byte == 0));
    volume.faults.disarm();
    // Once is no more than a second try.
    volume.faults.arm(Rule { lasting: false, ..short });
    assert!(read_all(&file) == data);
    volume.faults.arm(Rule { partial: None, lasting: true, ..short });
    assert_eq!(os_error(file.read_at(&mut buf, 0)), Some(Errno::IO));
    volume.faults.disarm();
    assert!(read_all(&file) == data);
}

/// What a file may hold, given what its operations have answered.
#[derive(Clone)]
struct Possible {
    now: Vec<Vec<u8>>,
    /// Since the last flush that went well.
    lasting: Vec<Vec<u8>>,
}

impl Possible {
    fn of(content: Vec<u8>) -> Possible {
        Possible { now: vec![content.clone()], lasting: vec![content] }
    }

    /// An operation that may or may not have been done, after an error.
    fn after(&mut self, done: bool, apply: impl Fn(&mut Vec<u8>)) {
        let mut new = self.now.clone();
        new.iter_mut().for_each(&apply);
        if done {
            self.now = new.clone();
        } else {
            self.now.extend(new.clone());
        }
        self.lasting.extend(new);
        self.now.sort_unstable();
        self.now.dedup();
    }

    fn flushed(&mut self) {
        self.lasting = self.now.clone();
    }
}

fn put(content: &mut Vec<u8>, at: usize, data: &[u8]) {
    content.resize(content.len().max(at + data.len()), 0);
    content[at..at + data.len()].copy_from_slice(data);
}

/// Some of everything, on a volume that may fail at any time.
fn a_life(mounted: &Mounted, file: &File, possible: &mut Possible) {
    let start = possible.now[0].len();
    let write = |possible: &mut Possible, at: usize, len: usize, durability, seed| {
        let data = pattern(len, seed);
        let done = file.write_at(&data, at as u64, durability).is_ok();
        possible.after(done, |content| put(content, at, &data));
        if done && durability == Durability::Flushed {
            possible.flushed();
        }
    };
    write(possible, 100, 600, Durability::Handed, 11);
    write(possible, start, 150_000, Durability::Handed, 12);
    if file.sync(true).is_ok() {
        possible.flushed();
    }
    let done = file.truncate(start as u64 + 90_001).is_ok();
    possible.after(done, |content| content.resize(start + 90_001, 0));
    write(possible, 5000, 16_384, Durability::OnDevice, 13);
    let _ = mounted.store.checkpoint();
    let done = file.punch_hole(8192, 20_000).is_ok();
    possible.after(done, |content| {
        let end = content.len().min(28_192);
        content[8192.min(end)..end].fill(0);
    });
    write(possible, 700, 512, Durability::Flushed, 14);
    let _ = mounted.store.checkpoint();
    write(possible, 1200, 5000, Durability::Handed, 15);
    // Reading tells nothing new, and never anything wrong.
    let mut bytes = vec![0; file.size() as usize];
    if file.read_at(&mut bytes, 0).is_ok() {
        assert!(possible.now.contains(&bytes), "read while the disk fails");
    }
    let _ = mounted.store.close();
}

fn rules() -> Vec<Rule> {
    let mut rules = Vec::new();
    for lasting in [false, true] {
        for errno in [Errno::IO, Errno::NOSPC] {
            rules.push(Rule { call: Call::Any, after: 0, lasting, errno, partial: None });
            // Short writes: of none, of a sector, which comes whole or not at all, and of a page.
            for partial in [0, 512, 4096] {
                let partial = Some(partial);
                rules.push(Rule { call: Call::Write, after: 0, lasting, errno, partial });
            }
        }
    }
    rules
}

/// Not every call is tried, unless there is time: of the many that look through the log, few.
fn tried(after: usize) -> bool {
    let step = if after < 60 { 3 } else { 61 };
    after.is_multiple_of(step) || std::env::var_os("BYOKFS_CRASH_SEEDS").is_some()
}

#[test]
fn whatever_fails_in_a_life_loses_nothing_that_was_promised() {
    let (backing, mounted) = in_memory();
    let old = pattern(30_000, 1);
    let file = mounted.create("f");
    write(&file, 0, &old).unwrap();
    file.sync(true).unwrap();
    mounted.store.checkpoint().unwrap();
    mounted.store.sync_all().unwrap();
    drop((file, mounted));
    let trace = backing.trace();
    for rule in rules() {
        for after in (0..).filter(|&after| tried(after)) {
            let case = format!("{:?} after {after}", Rule { after, ..rule });
            let backing = trace.at(trace.len());
            let (faulty, faults) = FaultBacking::new(backing.clone());
            let mounted = mount(faulty).unwrap();
            let file = mounted.open("f");
            let mut possible = Possible::of(old.clone());
            faults.arm(Rule { after, ..rule });
            a_life(&mounted, &file, &mut possible);
            let failed = faults.disarm();
            assert!(possible.now.contains(&read_all(&file)), "{case}: at once");
            drop((file, mounted));
            // The daemon is gone, the kernel has what it was handed.
            let second = backing.trace();
            let content = mount(second.at(second.len())).unwrap().content("f").unwrap().unwrap();
            assert!(possible.now.contains(&content), "{case}: after a mount");
            // And the power.
            let options = Options { budget: 1, ..Options::default() };
            for crash in second.crashes(second.len(), &options) {
                let mounted = mount(second.materialise(&crash)).unwrap();
                let content = mounted.content("f").unwrap().unwrap();
                assert!(possible.lasting.contains(&content), "{case}: after a power cut");
            }
            if !failed {
                break;
            }
        }
    }
}

#[test]
fn whatever_fails_in_a_recovery_is_made_good_by_the_next() {
    let (backing, mounted) = in_memory();
    let file = mounted.create("f");
    let mut want = pattern(400_000, 1);
    write(&file, 0, &want).unwrap();
    file.sync(true).unwrap();
    mounted.store.sync_all().unwrap();
    mounted.store.checkpoint().unwrap();
    for (at, len, seed) in [(100, 5000, 2), (400_000, 200_000, 3), (300_000, 512, 4)] {
        let data = pattern(len, seed);
        write(&file, at as u64, &data).unwrap();
        put(&mut want, at, &data);
    }
    file.punch_hole(8192, 8192).unwrap();
    want[8192..16_384].fill(0);
    // A name whose file never came to be, so that something is to be moved aside as well.
    mounted
        .store
        .tree()
        .create_unnamed()
        .and_then(|new| mounted.store.tree().link_file(&*new, b"unborn"))
        .unwrap();
    drop((file, mounted));
    let trace = backing.trace();
    for rule in rules() {
        for after in (0..).filter(|&after| tried(after)) {
            let case = format!("{:?} after {after}", Rule { after, ..rule });
            let backing = trace.at(trace.len());
            let (faulty, faults) = FaultBacking::new(backing.clone());
            faults.arm(Rule { after, ..rule });
            let first = mount(faulty);
            let failed = faults.disarm();
            match first {
                Ok(mounted) => {
                    let content = mounted.content("f");
                    assert!(content == Some(Ok(want.clone())), "{case}: at once");
                }
                Err(error) => assert!(failed, "{case}: {error}"),
            }
            let second = backing.trace();
            let options = Options { budget: 1, ..Options::default() };
            for crash in second.crashes(second.len(), &options) {
                let mounted = mount(second.materialise(&crash)).unwrap();
                assert!(
                    mounted.content("f") == Some(Ok(want.clone())),
                    "{case}: after a power cut"
                );
            }
            let again = mount(second.at(second.len())).unwrap();
            assert!(again.content("f") == Some(Ok(want.clone())), "{case}: again");
            assert!(again.try_open("unborn").is_none(), "{case}");
            if !failed {
                break;
            }
        }
    }
}
