//! What recovery makes of single states that chance would seldom bring.

use rustix::io::Errno;

use super::support::{Mounted, in_memory, mount, pattern, unrecovered};
use crate::backing::Access;
use crate::backing::fault::{Call, FaultBacking, Rule};
use crate::backing::memory::Trace;
use crate::store::intent_log::FILES;
use crate::store::layout::{BLOCK, BLOCK_LEN, block_at, tag_page_at};
use crate::store::{File, WriteMode};

/// Enough to go home directly.
const LARGE: usize = 256 << 10;

fn write(file: &File, offset: u64, data: &[u8]) {
    file.write_at(data, offset, WriteMode::default()).unwrap();
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
        // Refused is as good.
        if let Ok(mounted) = mount(after) {
            assert!(mounted.content("f") == want, "closed before: {clean}");
        }
    }
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
