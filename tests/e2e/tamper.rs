//! Damage in the backing directory: the read of it is EIO, an audit event names the file, and the
//! rest of the file, and every other file, still reads.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::support::can_mount;
use crate::support::sandbox::Sandbox;
use crate::support::tree;

/// docs/FORMAT.md: two header pages, the generation page of the first region, then groups of a tag
/// page and 120 blocks; a tag page is eight sectors of 15 entries.
const PAGE: u64 = 4096;
const BLOCKS: u64 = 300;
const GROUP: u64 = 121 * PAGE;
const SECTOR: u64 = 512;
const PER_SECTOR: u64 = 15;

const GENERATIONS: u64 = 2 * PAGE;

fn tag_page(group: u64) -> u64 {
    GENERATIONS + PAGE + group * GROUP
}

fn tag_sector(index: u64) -> u64 {
    tag_page(index / 8) + index % 8 * SECTOR
}

fn block(index: u64) -> u64 {
    tag_page(index / 120) + PAGE + index % 120 * PAGE
}

/// Two files of [`BLOCKS`] blocks with different contents, and their backing files.
struct Pair {
    sandbox: Sandbox,
    backing: [PathBuf; 2],
    pristine: [Vec<u8>; 2],
}

const NAMES: [&str; 2] = ["victim-one", "victim-two"];

fn content(which: usize) -> Vec<u8> {
    (0..BLOCKS * PAGE).map(|at| (at / PAGE * 31 + at + which as u64 * 7) as u8).collect()
}

impl Pair {
    fn new() -> Pair {
        let sandbox = Sandbox::mounted();
        let backing = [0, 1].map(|which| {
            let before = tree::files(&sandbox.tree());
            let path = sandbox.mnt().join(NAMES[which]);
            fs::write(&path, content(which)).unwrap();
            File::open(&path).unwrap().sync_all().unwrap();
            let after = tree::files(&sandbox.tree());
            after.into_iter().find(|path| !before.contains(path)).expect("a new backing file")
        });
        fs::write(sandbox.mnt().join("bystander"), "unharmed").unwrap();
        sandbox.umount();
        let pristine = [0, 1].map(|which: usize| fs::read(&backing[which]).unwrap());
        Pair { sandbox, backing, pristine }
    }

    /// Applies `damage` to fresh copies while unmounted; afterwards exactly these blocks of each
    /// file fail to read.
    #[track_caller]
    fn check(&mut self, what: &str, damage: impl FnOnce(&[File; 2]), failing: [&BTreeSet<u64>; 2]) {
        for which in 0..2 {
            fs::write(&self.backing[which], &self.pristine[which]).unwrap();
        }
        damage(&[0, 1].map(|which: usize| open(&self.backing[which])));
        let events = self.sandbox.audit("IntegrityFailure").len();
        self.sandbox.mount();
        for which in 0..2 {
            let found = failing_blocks(&self.sandbox.mnt().join(NAMES[which]), &content(which));
            assert_eq!(found, *failing[which], "{what}: failing blocks of {}", NAMES[which]);
            let named = self.sandbox.audit("IntegrityFailure")[events..]
                .iter()
                .any(|event| event.to_string().contains(NAMES[which]));
            assert_eq!(
                named,
                !failing[which].is_empty(),
                "{what}: an audit event names {}",
                NAMES[which]
            );
        }
        assert_eq!(fs::read_to_string(self.sandbox.mnt().join("bystander")).unwrap(), "unharmed");
        self.sandbox.umount();
    }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// Reads block by block: each is right or EIO.
fn failing_blocks(path: &Path, content: &[u8]) -> BTreeSet<u64> {
    let Ok(file) = File::open(path) else { return (0..BLOCKS).collect() };
    let fails = |index: &u64| {
        let mut bytes = vec![0; PAGE as usize];
        match file.read_exact_at(&mut bytes, index * PAGE) {
            Ok(()) => {
                let from = (index * PAGE) as usize;
                assert!(
                    bytes == content[from..from + PAGE as usize],
                    "block {index} is wrong, not refused"
                );
                false
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(5), "block {index}: {error}");
                true
            }
        }
    };
    (0..BLOCKS).filter(fails).collect()
}

fn flip(file: &File, at: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn swap(a: &File, at_a: u64, b: &File, at_b: u64, len: u64) {
    let (mut from_a, mut from_b) = (vec![0; len as usize], vec![0; len as usize]);
    a.read_exact_at(&mut from_a, at_a).unwrap();
    b.read_exact_at(&mut from_b, at_b).unwrap();
    assert_ne!(from_a, from_b);
    a.write_all_at(&from_b, at_a).unwrap();
    b.write_all_at(&from_a, at_b).unwrap();
}

fn blocks(range: Range<u64>) -> BTreeSet<u64> {
    range.collect()
}

fn set(ranges: &[Range<u64>]) -> BTreeSet<u64> {
    ranges.iter().cloned().flatten().collect()
}

#[test]
fn damage_while_unmounted_is_found_named_and_contained() {
    if !can_mount() {
        return;
    }
    let mut pair = Pair::new();
    let none = set(&[]);
    let all = blocks(0..BLOCKS);
    let sector = |index: u64| index * PER_SECTOR..(index + 1) * PER_SECTOR;
    let group = |index: u64| index * 120..(index + 1) * 120;

    pair.check("no damage", |_| {}, [&none, &none]);
    pair.check("a bit of a block", |[a, _]| flip(a, block(5) + 77), [&blocks(5..6), &none]);
    pair.check(
        "the last block",
        |[a, _]| flip(a, block(BLOCKS - 1)),
        [&blocks(BLOCKS - 1..BLOCKS), &none],
    );
    for (what, at) in [
        ("MAC", 3),
        ("group id", 25),
        ("tag", 32 + 32 * 4 + 1),
        ("counter", 32 + 17),
        ("slot", 32 + 29),
    ] {
        let damage = |[a, _]: &[File; 2]| flip(a, tag_sector(9) + at);
        pair.check(&format!("a bit of a tag sector's {what}"), damage, [&set(&[sector(9)]), &none]);
    }
    for copy in 0..2 {
        let damage = |[a, _]: &[File; 2]| flip(a, copy * PAGE + 100);
        pair.check(&format!("header copy {copy}"), damage, [&none, &none]);
    }
    pair.check(
        "both header copies",
        |[a, _]| (0..2).for_each(|copy| flip(a, copy * PAGE + 100)),
        [&all, &none],
    );
    pair.check("a bit of the generations", |[a, _]| flip(a, GENERATIONS + 40), [&all, &none]);
    pair.check(
        "blocks swapped",
        |[a, _]| swap(a, block(5), a, block(140), PAGE),
        [&set(&[5..6, 140..141]), &none],
    );
    pair.check(
        "tag sectors swapped",
        |[a, _]| swap(a, tag_sector(1), a, tag_sector(10), SECTOR),
        [&set(&[sector(1), sector(10)]), &none],
    );
    pair.check(
        "tag pages swapped",
        |[a, _]| swap(a, tag_page(0), a, tag_page(1), PAGE),
        [&set(&[group(0), group(1)]), &none],
    );
    pair.check(
        "a group swapped with its tags",
        |[a, _]| swap(a, tag_page(0), a, tag_page(1), GROUP),
        [&set(&[group(0), group(1)]), &none],
    );
    let five = blocks(5..6);
    pair.check(
        "blocks swapped between files",
        |[a, b]| swap(a, block(5), b, block(5), PAGE),
        [&five, &five],
    );
    let first = set(&[sector(0)]);
    pair.check(
        "tag sectors swapped between files",
        |[a, b]| swap(a, tag_sector(0), b, tag_sector(0), SECTOR),
        [&first, &first],
    );
    let group_one = set(&[group(1)]);
    pair.check(
        "groups swapped between files",
        |[a, b]| swap(a, tag_page(1), b, tag_page(1), GROUP),
        [&group_one, &group_one],
    );
    pair.check("headers swapped between files", |[a, b]| swap(a, 0, b, 0, 2 * PAGE), [&all, &all]);
    pair.check(
        "a block of zeros",
        |[a, _]| a.write_all_at(&[0; PAGE as usize], block(5)).unwrap(),
        [&five, &none],
    );
}

#[test]
fn damage_while_mounted_is_found_and_a_whole_overwrite_heals_it() {
    if !can_mount() {
        return;
    }
    let mut pair = Pair::new();
    pair.sandbox.mount();
    let path = pair.sandbox.mnt().join(NAMES[0]);
    let expected = content(0);
    assert_eq!(failing_blocks(&path, &expected), set(&[]));
    flip(&open(&pair.backing[0]), block(7) + 9);
    assert_eq!(failing_blocks(&path, &expected), blocks(7..8));
    assert!(!pair.sandbox.audit("IntegrityFailure").is_empty());
    let file = open(&path);
    // Part of it would need the rest, which nobody can vouch for.
    assert!(file.write_at(b"part", 7 * PAGE + 10).is_err());
    file.write_all_at(&expected[(7 * PAGE) as usize..(8 * PAGE) as usize], 7 * PAGE).unwrap();
    assert_eq!(failing_blocks(&path, &expected), set(&[]));
}

#[test]
fn a_damaged_name_harms_no_other() {
    if !can_mount() {
        return;
    }
    let mut pair = Pair::new();
    let name = pair.backing[0].file_name().unwrap().to_str().unwrap().to_owned();
    let first = if name.starts_with('A') { "B" } else { "A" };
    let damaged = pair.backing[0].with_file_name(format!("{first}{}", &name[1..]));
    fs::rename(&pair.backing[0], &damaged).unwrap();
    pair.sandbox.mount();
    assert!(File::open(pair.sandbox.mnt().join(NAMES[0])).is_err());
    assert_eq!(failing_blocks(&pair.sandbox.mnt().join(NAMES[1]), &content(1)), set(&[]));
    // The listing leaves it out, or fails: it does not make a name up.
    if let Ok(entries) = fs::read_dir(pair.sandbox.mnt()) {
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_str().expect("an invented name");
            assert!(NAMES.contains(&name) || name == "bystander", "{name}");
        }
    }
    assert!(!pair.sandbox.audit("IntegrityFailure").is_empty());
}

#[test]
fn a_backing_that_changes_underneath_harms_only_what_was_changed() {
    if !can_mount() {
        return;
    }
    let mut pair = Pair::new();
    pair.sandbox.mount();
    let mnt = pair.sandbox.mnt();
    let named = |pair: &Pair, name: &str| {
        let events = pair.sandbox.audit("IntegrityFailure");
        events.iter().any(|event| event["path"].as_str().is_some_and(|path| path.contains(name)))
    };
    let bystander = || assert_eq!(fs::read_to_string(mnt.join("bystander")).unwrap(), "unharmed");
    let directory = mnt.join("directory");
    let before = tree::paths(&pair.sandbox.tree());
    fs::create_dir(&directory).unwrap();
    let after = tree::paths(&pair.sandbox.tree());
    let backing = after.into_iter().find(|path| !before.contains(path)).expect("its backing");
    fs::write(directory.join("inner"), "inner").unwrap();

    // Cut short.
    open(&pair.backing[0]).set_len(block(100)).unwrap();
    assert_eq!(failing_blocks(&mnt.join(NAMES[0]), &content(0)), blocks(100..BLOCKS));
    assert!(named(&pair, NAMES[0]));
    bystander();

    // Replaced by something else: whoever knew the old inode may go on with it.
    let foreign = pair.sandbox.path("foreign");
    fs::write(&foreign, vec![7; pair.pristine[1].len()]).unwrap();
    fs::rename(&foreign, &pair.backing[1]).unwrap();
    if let Ok(text) = fs::read(mnt.join(NAMES[1])) {
        assert!(text == content(1));
    }
    bystander();

    // Moved out of the volume: an error or what is still known of it, and back again.
    let moved = pair.sandbox.path("moved");
    fs::rename(&backing, &moved).unwrap();
    if let Ok(text) = fs::read_to_string(directory.join("inner")) {
        assert_eq!(text, "inner");
    }
    assert!(fs::read_dir(&mnt).is_ok());
    bystander();
    pair.sandbox.umount();

    pair.sandbox.mount();
    assert!(!directory.exists());
    assert!(fs::read(mnt.join(NAMES[1])).is_err());
    assert!(named(&pair, NAMES[1]));
    bystander();
    fs::rename(&moved, &backing).unwrap();
    pair.sandbox.umount();
    pair.sandbox.mount();
    assert_eq!(fs::read_to_string(directory.join("inner")).unwrap(), "inner");
    bystander();
}
