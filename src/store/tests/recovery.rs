//! What recovery makes of single states that chance would seldom bring.

use rustix::io::Errno;

use super::support::{Mounted, in_memory, mount, pattern, revalidate, unrecovered};
use crate::backing::Access;
use crate::backing::fault::{Call, FaultBacking, Rule};
use crate::backing::memory::{Options, Trace};
use crate::error::{FsError, Kind};
use crate::store::intent_log::FILES;
use crate::store::layout::{BLOCK, BLOCK_LEN, block_at, tag_page_at};
use crate::store::{Durability, File};

/// Enough to go home directly.
const LARGE: usize = 256 << 10;

fn write(file: &File, offset: u64, data: &[u8]) {
    file.write_at(data, offset, Durability::default()).unwrap();
}

/// Where the file's own bytes between two positions were written.
fn writes_home(trace: &Trace, file: &File, from: u64, to: u64) -> Vec<usize> {
    let ino = file.backing().metadata().unwrap().id.ino;
    trace.find(|line| {
        let place = line.strip_prefix(&format!("write inode {ino} at "));
        let at = place.and_then(|rest| rest.split(',').next()?.parse().ok());
        at.is_some_and(|at: u64| (from..to).contains(&at))
    })
}

#[test]
fn a_missing_block_that_was_replaced_counts_only_if_what_replaced_it_does() {
    let (backing, mounted) = in_memory();
    let file = mounted.create("f");
    write(&file, 0, b"first");
    file.sync(true).unwrap();
    mounted.store.sync_all().unwrap();
    let start = 16 * BLOCK;
    write(&file, start, &pattern(LARGE, 1));
    let second = start + LARGE as u64;
    write(&file, second, &pattern(LARGE, 2));
    // Over the first, with its content in the log.
    write(&file, start, &pattern(LARGE, 3));
    let trace = backing.trace();
    // The kernel had written the log back, but neither of the blocks.
    let mut lost = trace.clone();
    let home = writes_home(&trace, &file, block_at(16), block_at(16 + 128));
    assert!(home.len() >= 2, "both went home directly");
    home.iter().rev().for_each(|&at| lost = lost.without(at));
    let mounted = mount(lost.at(lost.len())).unwrap();
    let content = mounted.content("f").unwrap().unwrap();
    assert_eq!(content, b"first", "nothing of what was not flushed is there, nor in the way");
}

/// The kernel could not write back some of what it was handed, has told the daemon before this one, and
/// shows it still. What recovery does with that must not last on the disk without it.
#[test]
fn what_the_kernel_shows_and_the_disk_does_not_have_is_written_again() {
    let old = pattern(100 * BLOCK_LEN, 1);
    let over = (50 * BLOCK, pattern(20 * BLOCK_LEN, 2));
    let past = (100 * BLOCK, pattern(LARGE, 3));
    for (offset, data) in [over, past] {
        let (backing, mounted) = in_memory();
        let file = mounted.create("f");
        write(&file, 0, &old);
        file.sync(true).unwrap();
        mounted.store.checkpoint().unwrap();
        mounted.store.sync_all().unwrap();
        let start = backing.position();
        write(&file, offset, &data);
        let end = backing.position();
        drop((file, mounted));
        let mut new = old.clone();
        new.resize(new.len().max(offset as usize + data.len()), 0);
        new[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
        let mounted = mount(backing.clone()).unwrap();
        assert!(mounted.content("f") == Some(Ok(new.clone())));
        let trace = backing.trace();
        let writes = trace.find(|line| line.contains("write inode"));
        for lost in writes.into_iter().filter(|at| (start..end).contains(at)) {
            let line = trace.describe(lost + 1);
            let line = line.lines().last().unwrap_or_default();
            let trace = trace.without(lost);
            for cut in end..=trace.len() {
                for crash in trace.crashes(cut, &Options { budget: 3, ..Options::default() }) {
                    let case = || format!("without {line}, {}{crash:?}", trace.describe(cut));
                    let mounted = mount(trace.materialise(&crash))
                        .unwrap_or_else(|error| panic!("{}: {error}", case()));
                    let content = mounted.content("f").unwrap();
                    let content = content.unwrap_or_else(|error| panic!("{}: {error}", case()));
                    let settled = cut == trace.len();
                    assert!(content == new || !settled && content == old, "{}", case());
                }
            }
        }
    }
}

/// The same of a new file, of which the log has nothing: what is acknowledged of it rests on its header.
#[test]
fn a_header_that_the_disk_does_not_have_is_written_again() {
    let (backing, mounted) = in_memory();
    let start = backing.position();
    let file = mounted.create("f");
    let end = backing.position();
    mounted.store.sync_all().unwrap();
    drop((file, mounted));
    let mounted = mount(backing.clone()).unwrap();
    let file = mounted.open("f");
    let data = pattern(3000, 1);
    write(&file, 0, &data);
    file.sync(true).unwrap();
    let trace = backing.trace();
    let writes = trace.find(|line| line.contains("write inode"));
    let lost: Vec<_> = writes.into_iter().filter(|at| (start..end).contains(at)).collect();
    assert!(!lost.is_empty());
    for lost in lost {
        let trace = trace.without(lost);
        for crash in trace.crashes(trace.len(), &Options { budget: 3, ..Options::default() }) {
            let mounted = mount(trace.materialise(&crash)).unwrap();
            assert!(mounted.content("f") == Some(Ok(data.clone())), "{crash:?}");
        }
    }
}

#[test]
fn what_could_not_be_brought_home_can_be_brought_again() {
    let (backing, mounted) = in_memory();
    let file = mounted.create("f");
    let data = pattern(300_000, 1);
    write(&file, 0, &data);
    mounted.store.sync_all().unwrap();
    drop((file, mounted));
    let trace = backing.trace();
    for call in [Call::Write, Call::Sync, Call::SetLen, Call::Read] {
        for after in 0.. {
            let (faulty, faults) = FaultBacking::new(trace.at(trace.len()));
            let mounted = unrecovered(faulty, false).unwrap();
            let rule = Rule { call, after, lasting: true, errno: Errno::NOSPC, partial: None };
            faults.arm(rule);
            let done = mounted.store.recover();
            if !faults.disarm() {
                done.unwrap();
                break;
            }
            done.unwrap_err();
            let refused = mounted.try_open("f").unwrap();
            let poisoned = mounted.store.log_status().is_some_and(|log| log.poisoned.is_some());
            if poisoned {
                continue;
            }
            drop(refused);
            mounted.store.recover().unwrap_or_else(|error| panic!("{call:?} {after}: {error}"));
            assert!(mounted.content("f") == Some(Ok(data.clone())), "{call:?} {after}");
        }
    }
}

#[test]
fn what_was_cut_off_stays_away_though_the_smaller_size_was_home_before_the_log_was_replayed() {
    // Blocks that the log writes, and where it then truncates: within a group, and across groups.
    for (written, size) in [(165, 138 * BLOCK), (300, 138 * BLOCK + 9), (300, 100), (300, 0)] {
        let (backing, mounted) = in_memory();
        let file = mounted.create("f");
        write(&file, 0, &pattern(50_000, 1));
        file.truncate(400 * BLOCK).unwrap();
        file.sync(true).unwrap();
        mounted.store.checkpoint().unwrap();
        write(&file, written * BLOCK, &pattern(3 * BLOCK_LEN, 2));
        file.truncate(size).unwrap();
        let before = backing.trace().len();
        mounted.store.checkpoint().unwrap();
        let trace = backing.trace();
        let mut expected = pattern(50_000, 1);
        expected.resize(400 * BLOCK as usize, 0);
        expected[size as usize..].fill(0);
        for cut in before..=trace.len() {
            let mounted = mount(trace.at(cut)).unwrap();
            let file = mounted.open("f");
            assert_eq!(file.size(), size, "cut at {cut}");
            file.truncate(400 * BLOCK).unwrap();
            let found = mounted.content("f").unwrap();
            assert!(found == Ok(expected.clone()), "{written}, {size}: cut at {cut}: {found:.60?}");
            // And what comes home of it.
            mounted.store.checkpoint().unwrap();
            write(&file, 399 * BLOCK, &pattern(BLOCK_LEN, 3));
            let found = mounted.content("f").unwrap();
            assert!(found.is_ok(), "{written}, {size}: cut at {cut}: {found:.60?}");
        }
    }
}

/// Pages 0 and 1 of the log's first file, the older first.
fn anchors(mounted: &Mounted) -> [u64; 2] {
    let root = mounted.store.envelope_dir();
    let file = root.lookup(FILES[0]).unwrap().open(Access::Read).unwrap();
    let mut generations = [[0; 8]; 2];
    for (page, generation) in generations.iter_mut().enumerate() {
        file.read_at(generation, (page * BLOCK_LEN + 32) as u64).unwrap();
    }
    let [a, b] = generations.map(u64::from_le_bytes);
    if a < b { [0, BLOCK] } else { [BLOCK, 0] }
}

#[test]
fn one_damaged_anchor_never_hides_what_was_flushed() {
    for clean in [true, false] {
        let (backing, mounted) = in_memory();
        let file = mounted.create("f");
        write(&file, 0, &pattern(10_000, 1));
        file.sync(true).unwrap();
        mounted.store.sync_all().unwrap();
        if clean {
            mounted.store.close().unwrap();
        }
        drop((file, mounted));
        let trace = backing.trace();
        let backing = trace.at(trace.len());
        let mut before = vec![0; 2 * BLOCK_LEN];
        let log = crate::backing::Backing::root(&*backing).lookup(FILES[0]).unwrap();
        log.open(Access::Read).unwrap().read_at(&mut before, 0).unwrap();
        let mounted = mount(backing.clone()).unwrap();
        let file = mounted.open("f");
        write(&file, 0, &pattern(9000, 2));
        file.sync(true).unwrap();
        let want = mounted.content("f");
        let newer = anchors(&mounted)[1];
        drop((file, mounted));
        let trace = backing.trace();
        let after = trace.at(trace.len());
        let log = crate::backing::Backing::root(&*after).lookup(FILES[0]).unwrap();
        log.open(Access::ReadWrite).unwrap().write_at(&[0x5a; 512], newer).unwrap();
        // Refused would be as good.
        assert!(mount(after).unwrap().content("f") == want, "closed before: {clean}");
        // Both put back as they were in an earlier life.
        let after = trace.at(trace.len());
        let log = crate::backing::Backing::root(&*after).lookup(FILES[0]).unwrap();
        log.open(Access::ReadWrite).unwrap().write_at(&before, 0).unwrap();
        assert_eq!(mount(after).err().unwrap().kind, Kind::Corrupt, "closed before: {clean}");
    }
}

#[test]
fn a_session_table_that_was_put_back_hides_no_records() {
    let (backing, mounted) = in_memory();
    let tables = [b"sessions.a", b"sessions.b"];
    let table = |mounted: &Mounted| {
        let root = mounted.store.envelope_dir();
        let file = root.lookup(tables[0]).unwrap().open(Access::Read).unwrap();
        let mut bytes = vec![0; file.metadata().unwrap().size as usize];
        file.read_at(&mut bytes, 0).unwrap();
        bytes
    };
    let before = table(&mounted);
    let file = mounted.create("f");
    write(&file, 0, b"of the first session");
    file.sync(true).unwrap();
    mounted.store.sync_all().unwrap();
    revalidate(&mounted.store, &mounted.gate);
    write(&file, 0, b"of the second session");
    file.sync(true).unwrap();
    drop((file, mounted));
    let trace = backing.trace();
    let after = trace.at(trace.len());
    for name in tables {
        let file = crate::backing::Backing::root(&*after).lookup(name).unwrap();
        file.open(Access::ReadWrite).unwrap().write_at(&before, 0).unwrap();
    }
    let refused = mount(after).err().unwrap();
    assert!(
        refused.kind == Kind::Corrupt && refused.to_string().contains("session 2"),
        "{refused}"
    );
}

#[test]
fn a_sector_of_an_unfinished_checkpoint_does_not_pass_for_the_next_ones() {
    let (backing, mounted) = in_memory();
    let file = mounted.create("f");
    write(&file, 0, &pattern(BLOCK_LEN, 1));
    mounted.store.sync_all().unwrap();
    mounted.store.checkpoint().unwrap();
    let trace = backing.trace();
    // The power goes when the tag page is there, and nothing says yet that it counts.
    let tags = writes_home(&trace, &file, tag_page_at(0), tag_page_at(0) + 1);
    let crashed = trace.at(tags[0] + 1);
    let mut old = vec![0; 512];
    let read = |backing: &crate::backing::memory::MemoryBacking, buf: &mut [u8]| {
        let tree = crate::backing::Backing::root(backing).lookup(b"tree").unwrap();
        let file = tree.lookup(b"f").unwrap().open(Access::ReadWrite).unwrap();
        file.read_at(buf, tag_page_at(0)).unwrap();
        file
    };
    read(&crashed, &mut old);
    let mounted = mount(crashed.clone()).unwrap();
    let file = mounted.open("f");
    assert!(mounted.content("f") == Some(Ok(pattern(BLOCK_LEN, 1))));
    drop(file);
    let mut now = vec![0; 512];
    read(&crashed, &mut now);
    assert_ne!(now[16..24], old[16..24], "the same generation, twice");
}

/// A checkpoint was cut when blocks and tags were at home and the header was not. Its records were on
/// stable storage, all of them, though no other says so.
#[test]
fn what_an_unfinished_checkpoint_relied_on_is_not_dropped() {
    let (backing, mounted) = in_memory();
    let file = mounted.create("f");
    write(&file, 0, &pattern(20_000, 1));
    mounted.store.checkpoint().unwrap();
    mounted.store.sync_all().unwrap();
    let start = 16 * BLOCK;
    write(&file, start, &pattern(LARGE, 2));
    write(&file, 100, b"in the other stream");
    file.sync(true).unwrap();
    mounted.store.checkpoint().unwrap();
    let trace = backing.trace();
    let header = *writes_home(&trace, &file, 0, 1).last().unwrap();
    let state = || trace.at(header);
    let want = mounted.content("f").unwrap();
    assert!(mount(state()).unwrap().content("f") == Some(want));

    let flipped = state();
    let tree = crate::backing::Backing::root(&*flipped).lookup(b"tree").unwrap();
    let home = tree.lookup(b"f").unwrap().open(Access::ReadWrite).unwrap();
    home.write_at(&[0x5a; 16], block_at(20) + 7).unwrap();
    let mounted = mount(flipped).unwrap();
    let file = mounted.open("f");
    assert_eq!(file.size(), start + LARGE as u64);
    let mut block = vec![0; BLOCK_LEN];
    assert!(matches!(file.read_at(&mut block, 20 * BLOCK), Err(FsError::Integrity(_))));
    file.read_at(&mut block, 0).unwrap();
    assert_eq!(&block[100..119], b"in the other stream");

    let cut = state();
    let log = crate::backing::Backing::root(&*cut).lookup(FILES[1]).unwrap();
    let log = log.open(Access::ReadWrite).unwrap();
    log.write_at(&vec![0; 1 << 20], 2 * BLOCK).unwrap();
    assert_eq!(mount(cut).err().unwrap().kind, Kind::Corrupt);
}
