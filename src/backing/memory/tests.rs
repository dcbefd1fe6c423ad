use std::collections::HashSet;

use super::*;
use crate::backing::linux::LinuxBacking;

fn named(backing: &MemoryBacking, name: &[u8]) -> FileRef {
    let file = backing.root().create_unnamed().unwrap();
    backing.root().link_file(&*file, name).unwrap();
    file
}

fn content(backing: &MemoryBacking, name: &[u8]) -> Option<Vec<u8>> {
    let file = backing.root().lookup(name).ok()?.open(Access::Read).unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().size as usize];
    assert_eq!(file.read_at(&mut bytes, 0).unwrap(), bytes.len());
    Some(bytes)
}

/// Every content of `name` that a power cut now may leave; None is a missing file.
fn outcomes(backing: &MemoryBacking, name: &[u8], order: Order) -> HashSet<Option<Vec<u8>>> {
    let trace = backing.trace();
    let options = Options { orders: vec![order], budget: 2000, ..Options::default() };
    let crashes = trace.crashes(trace.len(), &options);
    crashes.iter().map(|crash| content(&trace.materialise(crash), name)).collect()
}

const BOTH: [Order; 2] = [Order::Journal, Order::Reordered];

#[test]
fn an_unsynced_write_is_absent_there_or_torn_in_every_way() {
    let backing = MemoryBacking::new();
    let file = named(&backing, b"f");
    file.write_at(&[1; 1536], 0).unwrap();
    backing.settle();
    file.write_at(&[2; 1536], 0).unwrap();
    for order in BOTH {
        let found = outcomes(&backing, b"f", order);
        let expected: HashSet<_> = (0..8)
            .map(|bits| Some((0..1536).map(|i| 1 + (bits >> (i / 512) & 1)).collect()))
            .collect();
        assert_eq!(found, expected);
    }
    file.sync_data().unwrap();
    for order in BOTH {
        assert_eq!(outcomes(&backing, b"f", order), HashSet::from([Some(vec![2; 1536])]));
    }
}

#[test]
fn a_size_may_come_without_data_unless_the_journal_is_ordered() {
    let backing = MemoryBacking::new();
    let file = named(&backing, b"f");
    backing.settle();
    file.write_at(&[1; 512], 0).unwrap();
    let (none, zeros, whole) = (Some(vec![]), Some(vec![0; 512]), Some(vec![1; 512]));
    let journal = HashSet::from([none.clone(), whole.clone()]);
    assert_eq!(outcomes(&backing, b"f", Order::Journal), journal);
    assert_eq!(outcomes(&backing, b"f", Order::Reordered), HashSet::from([none, zeros, whole]));
}

#[test]
fn data_past_a_lost_end_does_not_come_back() {
    let backing = MemoryBacking::new();
    let file = named(&backing, b"f");
    backing.settle();
    file.write_at(&[1; 700], 0).unwrap();
    let trace = backing.trace();
    for crash in trace.crashes(trace.len(), &Options::default()) {
        let after = trace.materialise(&crash);
        let file = after.root().lookup(b"f").unwrap().open(Access::ReadWrite).unwrap();
        if file.metadata().unwrap().size == 0 {
            file.set_len(700).unwrap();
            assert_eq!(content(&after, b"f"), Some(vec![0; 700]));
        }
    }
}

#[test]
fn a_name_is_durable_by_the_sync_of_its_directory() {
    let backing = MemoryBacking::new();
    let file = named(&backing, b"f");
    file.write_at(b"x", 0).unwrap();
    file.sync_all().unwrap();
    let (gone, there) = (None, Some(b"x".to_vec()));
    let either = HashSet::from([gone, there.clone()]);
    assert_eq!(outcomes(&backing, b"f", Order::Reordered), either);
    // A journal commits the name with the file.
    assert_eq!(outcomes(&backing, b"f", Order::Journal), HashSet::from([there.clone()]));
    backing.root().sync().unwrap();
    assert_eq!(outcomes(&backing, b"f", Order::Reordered), HashSet::from([there]));
}

#[test]
fn a_file_without_a_name_is_gone() {
    let backing = MemoryBacking::new();
    let file = backing.root().create_unnamed().unwrap();
    file.sync_all().unwrap();
    let trace = backing.trace();
    let after = trace.at(trace.len());
    assert_eq!(after.0.state.lock().image.last_ino(), ROOT);
    assert_eq!(file.metadata().unwrap().nlink, 0);
}

#[test]
fn a_rename_is_old_or_new_and_the_journal_keeps_order() {
    let backing = MemoryBacking::new();
    named(&backing, b"old").write_at(b"old", 0).unwrap();
    backing.settle();
    let root = backing.root();
    let new = named(&backing, b"tmp");
    new.write_at(b"new", 0).unwrap();
    root.rename(b"tmp", &*root, b"old", RenameMode::Replace).unwrap();
    let seen = outcomes(&backing, b"old", Order::Reordered);
    let (old, new) = (Some(b"old".to_vec()), Some(b"new".to_vec()));
    // Without an fsync of the file the name may come before size and data.
    assert_eq!(seen, HashSet::from([old.clone(), new.clone(), Some(vec![]), Some(vec![0; 3])]));
    assert_eq!(outcomes(&backing, b"old", Order::Journal), HashSet::from([old, new]));
}

#[test]
fn reordering_lets_a_later_name_come_first() {
    let backing = MemoryBacking::new();
    named(&backing, b"a");
    named(&backing, b"b");
    let trace = backing.trace();
    let first_missing = |order| {
        let options = Options { orders: vec![order], ..Options::default() };
        trace.crashes(trace.len(), &options).iter().any(|crash| {
            let after = trace.materialise(crash);
            content(&after, b"a").is_none() && content(&after, b"b").is_some()
        })
    };
    assert!(first_missing(Order::Reordered) && !first_missing(Order::Journal));
}

#[test]
fn what_is_written_as_it_was_makes_no_states_unless_it_was_not_so_for_long() {
    let backing = MemoryBacking::new();
    let file = named(&backing, b"f");
    file.write_at(&[1; 1024], 0).unwrap();
    backing.settle();
    let mut half = [1; 1024];
    half[700] = 2;
    file.write_at(&half, 0).unwrap();
    for order in BOTH {
        let found = outcomes(&backing, b"f", order);
        assert_eq!(found, HashSet::from([Some(vec![1; 1024]), Some(half.to_vec())]));
        let trace = backing.trace();
        let options = Options { orders: vec![order], ..Options::default() };
        assert_eq!(trace.crashes(trace.len(), &options).len(), 2);
    }
    // Again, over what may not be there.
    file.write_at(&half, 0).unwrap();
    file.punch_hole(0, 512).unwrap();
    file.write_at(&[0; 512], 0).unwrap();
    let mut punched = half;
    punched[..512].fill(0);
    for order in BOTH {
        let found = outcomes(&backing, b"f", order);
        let old = vec![1; 1024];
        assert!(
            [old, half.to_vec(), punched.to_vec()].into_iter().all(|c| found.contains(&Some(c)))
        );
    }
}

#[test]
fn a_moved_operation_is_done_at_another_time() {
    let backing = MemoryBacking::new();
    let file = named(&backing, b"f");
    backing.settle();
    file.write_at(b"a", 0).unwrap();
    file.write_at(b"b", 0).unwrap();
    let trace = backing.trace();
    assert_eq!(content(&trace.at(2), b"f"), Some(b"b".to_vec()));
    let moved = trace.moved(0, 1);
    assert_eq!(content(&moved.at(2), b"f"), Some(b"a".to_vec()));
    assert!(trace.brings(|bytes| bytes == b"a") && !trace.brings(|bytes| bytes == b"c"));
}

#[test]
fn a_device_without_a_volatile_cache_keeps_what_was_written_out() {
    let backing = MemoryBacking::new();
    let file = named(&backing, b"f");
    file.write_at(&[1; 4096], 0).unwrap();
    backing.settle();
    file.write_at(&[2; 4096], 0).unwrap();
    file.write_out(0, 2048).unwrap();
    let trace = backing.trace();
    let heads = |volatile_cache| {
        let options = Options { volatile_cache, budget: 1000, ..Options::default() };
        let crashes = trace.crashes(trace.len(), &options);
        let read = |crash| content(&trace.materialise(crash), b"f").unwrap()[..2048].to_vec();
        crashes.iter().map(read).collect::<HashSet<_>>()
    };
    assert_eq!(heads(false), HashSet::from([vec![2; 2048]]));
    assert_eq!(heads(true).len(), 16);
}

/// A record of two copies, the second written after the first is durable: one of them is always
/// whole. Without the flush between them the enumeration must find the state where neither is.
#[test]
fn a_missing_flush_is_found() {
    let backing = MemoryBacking::new();
    let file = named(&backing, b"f");
    file.write_at(&[1; 8192], 0).unwrap();
    backing.settle();
    file.write_at(&[2; 4096], 0).unwrap();
    file.sync_data().unwrap();
    file.write_at(&[2; 4096], 4096).unwrap();
    file.sync_data().unwrap();
    let trace = backing.trace();
    let is_lost = |trace: &Trace| {
        (0..=trace.len()).any(|cut| {
            trace.crashes(cut, &Options::default()).iter().any(|crash| {
                let bytes = content(&trace.materialise(crash), b"f").unwrap();
                bytes.chunks(4096).all(|copy| copy.iter().any(|&byte| byte != copy[0]))
            })
        })
    };
    assert!(!is_lost(&trace));
    assert!(is_lost(&trace.without(trace.syncs()[0])));
}

#[test]
fn one_writer_at_a_time() {
    let backing = MemoryBacking::new();
    let guard = backing.lock(b"lock").unwrap();
    assert_eq!(backing.lock(b"lock").unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(guard);
    backing.lock(b"lock").unwrap();
}

/// One random operation on a directory with few names; the answer as text.
fn step(root: &NodeRef, random: &mut Random) -> String {
    let name = |random: &mut Random| vec![b'a' + random.below(4) as u8];
    let show = |result: io::Result<String>| match result {
        Ok(text) => text,
        Err(error) => format!("{:?}", Errno::from_io_error(&error)),
    };
    let dir = if random.chance(3) {
        match root.lookup(b"a") {
            Ok(dir) if dir.metadata().unwrap().kind == FileKind::Directory => dir,
            _ => root.clone(),
        }
    } else {
        root.clone()
    };
    let one = name(random);
    let open = |name: &[u8]| dir.lookup(name)?.open(Access::ReadWrite);
    let (offset, len) = (random.below(20_000), random.below(9000));
    show(match random.below(13) {
        0 | 1 => dir
            .create_unnamed()
            .and_then(|file| dir.link_file(&*file, &one))
            .map(|()| "created".into()),
        2 => dir.mkdir(&one, 0o750).map(|_| "made".into()),
        3 => dir.unlink(&one).map(|()| "unlinked".into()),
        4 => dir.rmdir(&one).map(|()| "removed".into()),
        5 => {
            let mode = [RenameMode::Replace, RenameMode::NoReplace, RenameMode::Exchange];
            let mode = mode[random.below(3) as usize];
            root.rename(&one, &*dir, &name(random), mode).map(|()| "renamed".into())
        }
        6 => root
            .lookup(&one)
            .and_then(|node| dir.link_node(&*node, &name(random)))
            .map(|()| "linked".into()),
        7 => {
            let data = random.bytes(len as usize);
            open(&one).and_then(|file| file.write_at(&data, offset)).map(|()| "written".into())
        }
        8 => open(&one).and_then(|file| file.set_len(offset)).map(|()| "cut".into()),
        9 => {
            open(&one).and_then(|file| file.punch_hole(offset, len + 1)).map(|()| "punched".into())
        }
        10 => open(&one)
            .and_then(|file| file.allocate(offset, len + 1, random.chance(4)))
            .map(|()| "allocated".into()),
        11 => dir.symlink(&one, b"somewhere").map(|_| "symlinked".into()),
        _ => open(&one).and_then(|file| {
            let mut bytes = vec![0; len as usize];
            let count = file.read_at(&mut bytes, offset)?;
            bytes.truncate(count);
            Ok(format!("{bytes:?}"))
        }),
    })
}

fn tree(node: &NodeRef) -> String {
    let mut names = Vec::new();
    let mut dir = node.read_dir().unwrap();
    while let Some(entry) = dir.next_entry().unwrap() {
        names.push(entry.name);
    }
    names.sort();
    let mut text = String::new();
    for name in names {
        let node = node.lookup(&name).unwrap();
        let metadata = node.metadata().unwrap();
        text += &format!("{name:?} {:?} {}", metadata.kind, metadata.nlink);
        match metadata.kind {
            FileKind::Directory => text += &format!("({})", tree(&node)),
            FileKind::Symlink => text += &format!("{:?}", node.read_link().unwrap()),
            _ => text += &format!("{}", metadata.size),
        }
    }
    text
}

#[test]
fn does_what_linux_does() {
    for seed in 0..30 {
        let dir = tempfile::tempdir().unwrap();
        let disk = LinuxBacking::open(dir.path()).unwrap().root();
        let memory = MemoryBacking::new();
        let (mut of_disk, mut of_memory) = (Random::new(seed), Random::new(seed));
        for at in 0..120 {
            let expected = step(&disk, &mut of_disk);
            let found = step(&memory.root(), &mut of_memory);
            assert_eq!(found, expected, "seed {seed}, step {at}");
        }
        assert_eq!(tree(&memory.root()), tree(&disk), "seed {seed}");
        let trace = memory.trace();
        assert_eq!(tree(&trace.at(trace.len()).root()), tree(&disk), "seed {seed}");
    }
}
