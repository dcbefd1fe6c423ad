//! What a crash in the middle of something leaves, and what is left of damage that was written
//! over: found for what it is, and made good.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::expected::{compare, error, is_made_good, note, stays, warning};
use super::support::{
    BLOCKS, PAGE, SECTOR, SIZE, Volume, block, flip, get, open, pattern, put, tag_page,
    with_filesystem, write_at,
};
use crate::maintenance::check::Repair;
use crate::vfs::types::ROOT;
use crate::vfs::{Caller, Filesystem};

/// One more file in the root, of which only the name is on the disk.
fn never_flushed() -> (Volume, PathBuf) {
    const ME: Caller = Caller { uid: 0, gid: 0, pid: 1 };
    let volume = Volume::killed(|fs| {
        let made = fs.create(ME, ROOT, b"new", 0o644, 0).unwrap();
        fs.release(made.handle);
    });
    let known = [&volume.big, &volume.small, &volume.directory, &volume.long, &volume.side];
    let known = [&known[..], &[&volume.link, &volume.long_link]].concat();
    let entries = fs::read_dir(volume.path("tree")).unwrap();
    let mut new = entries.map(|entry| entry.unwrap().path());
    let new = new.find(|path| !known.contains(&path)).unwrap();
    fs::write(&new, "").unwrap();
    (volume, new)
}

#[test]
fn a_name_without_a_file() {
    for repair in [Repair::Safe, Repair::All] {
        let (volume, new) = never_flushed();
        let checked = volume.check();
        compare(&checked, &[note("log-pending"), note("never-flushed").of("/new").at(0)]);
        let found = &checked.findings[1];
        assert_eq!(found.backing_path, new.to_str().unwrap());
        assert!(found.repair.is_some());
        let codes = volume.check_without_key().codes();
        assert_eq!(codes, ["log-pending", "never-flushed"]);
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        let moved = inode(&new);
        let repaired = volume.repair(repair);
        assert_eq!((repaired.summary.repaired, repaired.summary.left), (1, 0));
        assert!(!new.exists());
        let mut lost = fs::read_dir(volume.path("lost")).unwrap();
        assert!(lost.any(|entry| inode(&entry.unwrap().path()) == moved), "it was removed");
        assert_eq!(volume.check().codes(), ["lost"]);
    }
}

#[test]
fn copies_of_headers_that_were_never_written() {
    for copy in 0..2 {
        let volume = Volume::killed(|_| {});
        put(&volume.big, copy * PAGE, &[0; PAGE as usize]);
        let unwritten = note("header-copy-unwritten").of("/big").at(copy * PAGE);
        let checked = volume.check();
        compare(&checked, &[note("log-pending"), unwritten]);
        assert_eq!(checked.findings[1].backing_path, volume.big.to_str().unwrap());
        let codes = volume.check_without_key().codes();
        assert_eq!(codes, ["log-pending", "header-copy-unwritten"]);
        is_made_good(&volume);
        assert!(get(&volume.big, 0, PAGE as usize) == get(&volume.big, PAGE, PAGE as usize));
    }
}

fn append(fs: &Filesystem) {
    let handle = open(fs, "big");
    write_at(fs, handle, SIZE, b"more");
    fs.release(handle);
}

#[test]
fn copies_that_are_older() {
    for copy in 0..2 {
        let at = copy * PAGE;
        let volume = Volume::new();
        let older = get(&volume.big, at, PAGE as usize);
        volume.opened(|store| with_filesystem(store, append));
        let newer = get(&volume.big, 0, 2 * PAGE as usize);
        put(&volume.big, at, &older);
        let checked = volume.check();
        compare(&checked, &[note("header-copy-older").of("/big").at(at)]);
        assert_eq!(checked.findings[0].backing_path, volume.big.to_str().unwrap());
        assert_eq!(volume.check_without_key().codes(), ["header-copy-older"]);
        is_made_good(&volume);
        assert!(get(&volume.big, 0, 2 * PAGE as usize) == newer);

        let volume = Volume::new();
        let header = volume.path("volume");
        let older = get(&header, at, PAGE as usize);
        let mut kept = None;
        volume.opened(|store| kept = Some(store.clone()));
        // Another log has the header written anew.
        kept.unwrap().replace_log(None, Some(12 << 20)).unwrap();
        let newer = fs::read(&header).unwrap();
        put(&header, at, &older);
        let checked = volume.check();
        compare(&checked, &[note("volume-header-copy-older").at(at)]);
        assert_eq!(checked.findings[0].backing_path, header.to_str().unwrap());
        assert_eq!(volume.check_without_key().codes(), ["volume-header-copy-older"]);
        is_made_good(&volume);
        assert!(fs::read(&header).unwrap() == newer);
    }
}

/// Its blocks go home beside the log, and a power cut takes them.
#[test]
fn a_record_whose_blocks_are_not_there() {
    let volume = Volume::killed(|fs| {
        let handle = open(fs, "big");
        write_at(fs, handle, BLOCKS * PAGE, &pattern(600_000, 9));
        fs.release(handle);
    });
    assert_eq!(volume.check().codes(), ["log-pending"]);
    let home = fs::File::options().write(true).open(&volume.big).unwrap();
    home.set_len(block(BLOCKS)).unwrap();
    let checked = volume.check();
    compare(&checked, &[note("log-pending"), note("log-incomplete")]);
    let incomplete = checked.findings.iter().find(|one| one.code.name() == "log-incomplete");
    assert!(incomplete.unwrap().backing_path.starts_with(volume.path("log.").to_str().unwrap()));
    is_made_good(&volume);
    assert_eq!(volume.check().summary.blocks, BLOCKS + 3);
}

#[test]
fn blocks_that_went_with_their_tag_sector() {
    let volume = Volume::new();
    let at = tag_page(1) + 2 * SECTOR;
    flip(&volume.big, at + 40);
    compare(&volume.check(), &[error("tag-sector").of("/big").at(at).blocks(150, 165)]);
    let rewrite = |first: u64, count: u64| {
        volume.opened(|store| {
            with_filesystem(store, |fs| {
                let handle = open(fs, "big");
                write_at(fs, handle, first * PAGE, &pattern(count * PAGE, 4));
                fs.release(handle);
            });
        });
    };
    // One of the blocks of that sector is there again, the others are given up.
    rewrite(155, 1);
    let lost = |first, past| error("block-lost").of("/big").at(block(first)).blocks(first, past);
    let checked = volume.check();
    compare(&checked, &[lost(150, 155), lost(156, 165)]);
    assert_eq!(checked.findings[0].backing_path, volume.big.to_str().unwrap());
    assert_eq!(volume.check_without_key().codes(), ["block-lost", "block-lost"]);
    stays(&volume);
    rewrite(150, 15);
    assert!(volume.check().findings.is_empty());
}

/// Two headers of one generation that say different things: nobody can tell which is right.
#[test]
fn copies_that_differ() {
    let volume = Volume::new();
    let shorter = (SIZE - 4).to_le_bytes();
    let other = super::forge::header(&volume, &volume.big, |header| {
        header[56..64].copy_from_slice(&shorter);
    });
    put(&volume.big, 0, &other);
    compare(&volume.check(), &[warning("header-copy").of("/big").at(PAGE)]);
    stays(&volume);
}
