//! Damage anywhere: whatever a reader would notice, a check finds. (That what a crash leaves is
//! clean is tested with the crash states themselves, in the store.)

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use super::support::{KEY, Volume, flip, keyring, open_gate};
use crate::backing::Backing;
use crate::backing::linux::LinuxBacking;
use crate::error::Result;
use crate::store::Store;
use crate::vfs::types::ROOT;
use crate::vfs::{Caller, DirItem, DirSink, Filesystem, Plus};

#[derive(Default)]
struct Listing(Vec<(Vec<u8>, u64)>, u64);

impl DirSink for Listing {
    fn has_room(&self, _: usize) -> bool {
        true
    }

    fn push(&mut self, item: &DirItem<'_>) {
        self.1 = item.next;
        if item.name != b"." && item.name != b".." {
            self.0.push((item.name.to_vec(), item.entry.map_or(0, |entry| entry.node)));
        }
    }
}

/// All that a reader gets of a directory and what is below it; errors as such.
fn read(fs: &Filesystem, node: u64, path: &str, seen: &mut Vec<String>) {
    const ME: Caller = Caller { uid: 0, gid: 0, pid: 1 };
    let handle = fs.opendir(node).unwrap();
    let mut listing = Listing::default();
    if let Err(error) = fs.readdir(handle, 0, Plus::Yes, &mut listing) {
        seen.push(format!("{path}: {error}"));
    }
    fs.release(handle);
    for (name, child) in listing.0 {
        let path = format!("{path}/{}", String::from_utf8_lossy(&name));
        let attr = match fs.getattr(child) {
            Ok(attr) => attr,
            Err(error) => {
                seen.push(format!("{path}: {error}"));
                continue;
            }
        };
        seen.push(format!("{path}: {:?} {}", attr.kind, attr.size));
        let names = fs.listxattr(ME, child).unwrap_or_else(|error| error.to_string().into());
        for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            seen.push(format!("{path}: {name:?} {:?}", fs.getxattr(child, name)));
        }
        match attr.kind {
            crate::backing::FileKind::Directory => read(fs, child, &path, seen),
            crate::backing::FileKind::Symlink => {
                seen.push(format!("{path}: {:?}", fs.readlink(child)));
            }
            _ => match fs.open(child, libc::O_RDONLY as u32, false) {
                Err(error) => seen.push(format!("{path}: {error}")),
                Ok(handle) => {
                    for at in (0..attr.size).step_by(4096) {
                        let mut bytes = vec![0; 4096];
                        let got = fs.read(handle, at, &mut bytes).map_err(|e| e.to_string());
                        let digest = ring::digest::digest(&ring::digest::SHA256, &bytes);
                        seen.push(format!("{path}: {at} {got:?} {digest:?}"));
                    }
                    fs.release(handle);
                }
            },
        }
    }
}

/// What a read-only mount shows.
fn mounted(root: &Path) -> Result<Vec<String>> {
    let backing: Arc<dyn Backing> = LinuxBacking::open_noatime(root)?;
    let store = Store::open(backing, open_gate(KEY), true)?;
    store.start_session(&keyring(KEY))?;
    store.recover()?;
    let mut seen = Vec::new();
    super::support::with_filesystem(&store, |fs| read(fs, ROOT, "", &mut seen));
    seen.sort();
    Ok(seen)
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            files(&path, found);
        } else if meta.is_file() && meta.len() > 0 {
            found.push(path);
        }
    }
}

fn noticed_is_found(volume: &Volume, pristine: &[String], path: &Path, at: u64) {
    flip(path, at);
    let checked = volume.check();
    let noticed = mounted(&volume.path("")).map_or(true, |seen| seen != pristine);
    flip(path, at);
    let found = checked.summary.left > 0;
    assert!(found || !noticed, "{} at {at}: {:#?}", path.display(), checked.findings);
}

#[test]
fn whatever_a_reader_notices_is_found() {
    let closed = Volume::new();
    let killed = Volume::killed(|fs| {
        let handle = super::support::open(fs, "big");
        for i in 0..6 {
            super::support::write_at(fs, handle, i * 9000, &[i as u8; 6000]);
            fs.fsync(handle, true).unwrap();
        }
        fs.release(handle);
    });
    for volume in [&closed, &killed] {
        let pristine = mounted(&volume.path("")).unwrap();
        assert!(pristine.len() > 300);
        let mut all = Vec::new();
        files(&volume.path(""), &mut all);
        all.sort();
        let mut random = crate::backing::memory::Random::new(7);
        for path in &all {
            let len = fs::metadata(path).unwrap().len();
            // The heads of files say the most.
            for _ in 0..6 {
                noticed_is_found(volume, &pristine, path, random.below(len));
                noticed_is_found(volume, &pristine, path, random.below(len.min(12_288)));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// What each file of the tree is made of proves itself: no bit of it changes unseen.
    #[test]
    fn no_bit_of_a_page_or_a_sealed_block_changes_unseen(
        positions in proptest::collection::vec((0_u64..300, 0_u64..4096, 0_u64..4), 1..12),
    ) {
        let volume = Volume::new();
        for (block, byte, kind) in positions {
            let at = match kind {
                0 => byte + block % 2 * 4096,
                1 => 8192 + byte,
                2 => super::support::tag_page(block / 120) + byte,
                _ => super::support::block(block) + byte,
            };
            flip(&volume.big, at);
            let checked = volume.check();
            prop_assert_eq!(checked.summary.left, 1, "byte {}: {:#?}", at, checked.findings);
            flip(&volume.big, at);
        }
    }
}
