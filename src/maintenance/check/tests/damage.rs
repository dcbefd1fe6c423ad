//! With the key.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::expected::{Expected, compare, error, finds, note, stays, warning};
use super::support::{
    BLOCKS, KEY, PAGE, SECTOR, SIZE, Volume, block, flip, get, keyring, open, open_gate, pattern,
    put, tag_page, write_at,
};
use crate::backing::Access;
use crate::crypto::secret::Secret;
use crate::error::Kind;
use crate::key::envelope::{Envelope, RetiringKey};
use crate::key::gate::{BootTime, Gate, Keyring, Reason};
use crate::maintenance::check::{Check, Finding, Options, Repair, Report};
use crate::store::{Durability, Store};
use crate::sys;

#[test]
fn nothing_is_wrong_with_a_volume_that_was_closed() {
    let volume = finds(|_| {}, &[]);
    let before = volume.fingerprint();
    let summary = volume.check().summary;
    assert_eq!((summary.files, summary.directories, summary.links), (4, 2, 2));
    assert_eq!(summary.blocks, BLOCKS + 3);
    assert!(summary.closed && summary.bytes > BLOCKS * PAGE);
    assert_eq!(volume.fingerprint(), before, "something has changed");
}

#[test]
fn a_volume_that_was_not_closed_is_clean_with_a_note() {
    let volume = Volume::killed(|fs| {
        let handle = open(fs, "big");
        write_at(fs, handle, 5000, b"over the first blocks");
        write_at(fs, handle, SIZE, &pattern(600_000, 9));
        fs.release(handle);
    });
    let before = volume.fingerprint();
    let checked = volume.check();
    assert_eq!(checked.codes(), ["log-pending"], "{:#?}", checked.findings);
    assert!(!checked.summary.closed && checked.summary.left == 0);
    let blocks = (SIZE + 600_000).div_ceil(PAGE);
    assert_eq!(checked.summary.blocks, blocks + 3);
    assert_eq!(volume.fingerprint(), before, "something has changed");
    // A block that lies in the log, of a record that nothing speaks for.
    let log = volume.path("log.hot");
    flip(&log, get_record(&log) + PAGE + 9);
    let checked = volume.check();
    assert!(checked.summary.errors == 0, "the end of the log is cut off: {:#?}", checked.findings);
}

fn newest_anchor(log: &Path) -> u64 {
    [0, PAGE].into_iter().max_by_key(|at| get(log, at + 32, 1)).unwrap()
}

/// Where the log's first live record is.
fn get_record(log: &Path) -> u64 {
    let newest = newest_anchor(log);
    u64::from_le_bytes(get(log, newest + 72, 8).try_into().unwrap())
}

#[test]
fn blocks_and_their_tags() {
    let data = block(5);
    let case = |damage: &dyn Fn(&Path), expected: Expected| {
        finds(|volume| damage(&volume.big), &[expected.of("/big")]);
    };
    case(&|big| flip(big, data + 77), error("block").at(data).blocks(5, 6));
    case(&|big| put(big, data, &[0; 2 * PAGE as usize]), error("block").at(data).blocks(5, 7));
    case(&|big| flip(big, block(BLOCKS - 1)), error("block").at(block(299)).blocks(299, 300));
    case(
        &|big| {
            let other = get(big, block(9), PAGE as usize);
            put(big, data, &other);
        },
        error("block").at(data).blocks(5, 6),
    );
    for byte in [0, 16, 24, 32 + 3 * 32 + 30, 511] {
        let at = tag_page(1) + SECTOR;
        case(&|big| flip(big, at + byte), error("tag-sector").at(at).blocks(135, 150));
    }
    // Of a part that the file does not reach.
    let at = tag_page(2) + 7 * SECTOR;
    case(&|big| flip(big, at + 40), warning("tag-sector").at(at));
    let at = tag_page(1) + 2 * SECTOR;
    case(
        &|big| put(big, at, &[7; 3 * SECTOR as usize]),
        error("tag-sector").at(at).blocks(150, 195),
    );
    case(&|big| flip(big, 3 * PAGE - 1), warning("generation-sector").at(3 * PAGE - SECTOR));
    case(&|big| flip(big, 2 * PAGE + 40), error("generation-sector").at(2 * PAGE).blocks(0, 300));
    case(
        &|big| {
            let file = fs::File::options().write(true).open(big).unwrap();
            file.set_len(block(250)).unwrap();
        },
        error("block").at(block(250)).blocks(250, 300),
    );
    case(
        &|big| {
            let file = fs::File::options().write(true).open(big).unwrap();
            file.set_len(block(400)).unwrap();
        },
        note("length").at(block(300)),
    );
}

#[test]
fn an_old_sector_that_was_put_back() {
    let volume = Volume::killed(|_| {});
    let volume_old = get(&volume.big, tag_page(0), SECTOR as usize);
    let checked = volume.repair(Repair::Safe);
    assert!(checked.summary.closed);
    // Written again, so that its sectors are of another checkpoint.
    let backing = volume.backing();
    let store = Store::open(backing, open_gate(KEY), false).unwrap();
    store.start_session(&keyring(KEY)).unwrap();
    store.recover().unwrap();
    let name = volume.big.file_name().unwrap().to_str().unwrap().as_bytes().to_vec();
    let node = store.tree().lookup(&name).unwrap();
    let file = store.open_file(node.open(Access::ReadWrite).unwrap()).unwrap();
    file.write_at(&[1; 100], 100, Durability::default()).unwrap();
    drop(file);
    store.close().unwrap();
    drop(store);
    assert!(volume.check().findings.is_empty());
    put(&volume.big, tag_page(0), &volume_old);
    let checked = volume.check();
    assert_eq!(checked.codes(), ["tag-sector"]);
    assert_eq!((checked.findings[0].from, checked.findings[0].to), (Some(0), Some(15 * PAGE)));
}

#[test]
fn headers_of_files() {
    for copy in 0..2 {
        let at = copy * PAGE;
        for byte in [0, 20, 57, 200, 4000] {
            finds(|v| flip(&v.big, at + byte), &[warning("header-copy").of("/big").at(at)]);
        }
    }
    let both = |v: &Volume| [30, PAGE + 30].map(|at| flip(&v.big, at));
    finds(|v| _ = both(v), &[error("header").of("/big").at(0)]);
    let blank = |v: &Volume| put(&v.big, 0, &[0; 2 * PAGE as usize]);
    finds(blank, &[error("header").of("/big").at(0)]);
    finds(|v| fs::write(&v.inner, "").unwrap(), &[error("header").of("/dir/inner").at(0)]);
    // Another file's.
    let volume = Volume::new();
    put(&volume.big, 0, &get(&volume.small, 0, 2 * PAGE as usize));
    let checked = volume.check();
    let mut codes = checked.codes();
    codes.sort_unstable();
    assert_eq!(codes, ["duplicate-file", "generation-sector", "generation-sector", "length"]);
    let twice = checked.findings.iter().find(|one| one.code.name() == "duplicate-file").unwrap();
    let mut names = [twice.path.as_deref().unwrap(), &twice.also[0]];
    names.sort_unstable();
    assert_eq!(names, ["/big", "/small"]);
}

#[test]
fn files_of_the_volume_itself() {
    for copy in 0..2 {
        let at = copy * PAGE;
        let damage = |v: &Volume| flip(&v.path("volume"), at + 70);
        finds(damage, &[warning("volume-header-copy").at(at)]);
        let damage = |v: &Volume| flip(&v.path("log.bulk"), at + 60);
        finds(damage, &[warning("anchor-copy").at(at)]);
    }
    let older = |v: &Volume| PAGE - newest_anchor(&v.path("log.hot"));
    let volume = Volume::new();
    flip(&volume.path("log.hot"), older(&volume) + 60);
    assert_eq!(volume.check().codes(), ["anchor-copy"]);
    // The one before it says less, and more is replayed.
    let volume = Volume::new();
    flip(&volume.path("log.hot"), PAGE - older(&volume) + 60);
    assert_eq!(volume.check().codes(), ["log-pending", "anchor-copy"]);
    for name in ["sessions.a", "sessions.b"] {
        finds(|v| flip(&v.path(name), 70), &[warning("sessions-copy")]);
        finds(|v| fs::remove_file(v.path(name)).unwrap(), &[warning("sessions-copy")]);
    }
    let volume = Volume::new();
    let older = fs::read(volume.path("sessions.b")).unwrap();
    let store = Store::open(volume.backing(), open_gate(KEY), false).unwrap();
    store.start_session(&keyring(KEY)).unwrap();
    store.recover().unwrap();
    store.close().unwrap();
    drop(store);
    fs::write(volume.path("sessions.b"), older).unwrap();
    assert_eq!(volume.check().codes(), ["sessions-copy-older"]);

    let missing = |v: &Volume| fs::remove_file(v.path("log.bulk")).unwrap();
    finds(missing, &[error("log")]);
    let foreign = |v: &Volume| {
        let other = Volume::new();
        fs::copy(other.path("log.hot"), v.path("log.hot")).unwrap();
    };
    finds(foreign, &[error("log")]);
    finds(|v| fs::write(v.path("envelope.json"), "{}").unwrap(), &[error("envelope")]);
    finds(|v| fs::remove_file(v.path("envelope.json")).unwrap(), &[error("envelope")]);
    let only_previous = |v: &Volume| {
        fs::rename(v.path("envelope.json"), v.path("envelope.prev.json")).unwrap();
    };
    finds(only_previous, &[warning("envelope-missing")]);
    let of_another = |v: &Volume| {
        fs::copy(Volume::new().path("envelope.json"), v.path("envelope.prev.json")).unwrap();
    };
    finds(of_another, &[warning("envelope-previous")]);
    finds(|v| fs::write(v.path("envelope.new.json"), "").unwrap(), &[note("leftover")]);
    finds(|v| fs::write(v.path("somebody's"), "").unwrap(), &[note("foreign")]);
    finds(|v| fs::remove_file(v.path("lock")).unwrap(), &[note("unlocked")]);
}

#[test]
fn an_envelope_with_a_volume_key_that_is_being_replaced() {
    let volume = Volume::new();
    let root = volume.backing().root();
    let envelope = Envelope::load(&root).unwrap();
    let retiring = Some(RetiringKey { id: 1, wrapped: vec![1] });
    let between = Envelope { volume_key_id: 2, retiring, ..envelope.clone() };
    between.save(&root).unwrap();
    let checked = volume.check();
    compare(&checked, &[note("retiring-key")]);
    let path = volume.path("envelope.json");
    assert_eq!(checked.findings[0].backing_path, path.to_str().unwrap());
    assert_eq!(volume.check_without_key().codes(), ["retiring-key"]);
    stays(&volume);
    // As the end of the rotation does it.
    Envelope { volume_key_id: 2, ..envelope }.save_in_place(&root).unwrap();
    Envelope::remove_previous(&root).unwrap();
    assert!(volume.check().findings.is_empty());
}

/// Something that is mounted until this goes.
struct Mounted(CString);

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = sys::fuse::unmount(&self.0, sys::fuse::Unmount::IfUnused);
        assert!(done.is_ok() || std::thread::panicking(), "{done:?}");
    }
}

#[test]
fn another_file_system_in_the_middle() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let volume = Volume::new();
    let dir = &volume.directory;
    let target = CString::new(dir.as_os_str().as_encoded_bytes()).unwrap();
    if sys::fuse::mount(c"none", &target, c"tmpfs", 0, c"").is_err() {
        // A container that may not.
        return;
    }
    let mounted = Mounted(target);
    fs::write(dir.join("somebody's"), "").unwrap();
    let checked = volume.check();
    compare(&checked, &[warning("mount-point").of("/dir")]);
    assert_eq!(checked.findings[0].backing_path, dir.to_str().unwrap());
    assert_eq!((checked.summary.files, checked.summary.directories), (3, 1));
    assert_eq!(volume.check_without_key().codes(), ["mount-point"]);
    stays(&volume);
    assert!(dir.join("somebody's").exists());
    drop(mounted);
    assert!(volume.check().findings.is_empty());
}

#[test]
fn a_session_table_that_is_lost_takes_every_block_along() {
    let volume = Volume::new();
    ["sessions.a", "sessions.b"].iter().for_each(|name| flip(&volume.path(name), 80));
    let checked = volume.check();
    assert!(checked.codes().contains(&"sessions"));
    let blocks = checked.findings.iter().filter(|finding| finding.code.name() == "block");
    assert!(blocks.clone().count() >= 4);
    assert!(blocks.clone().all(|finding| finding.detail.contains("session table")));
}

#[test]
fn another_volumes_key_proves_nothing() {
    let volume = Volume::new();
    let checked =
        super::support::check_backing(volume.backing(), Some(KEY + 1), Repair::No).unwrap();
    assert!(checked.codes().contains(&"volume-header"), "{:?}", checked.codes());
}

#[test]
fn a_volume_between_two_volume_keys() {
    let volume = Volume::new();
    let secret = |byte| Secret::new_with(|key: &mut [u8; 32]| key.fill(byte)).unwrap();
    let both = || Keyring::new(2, secret(9)).with_retiring(1, secret(KEY));
    let check = |keyring| {
        let gate = Gate::new();
        assert!(gate.open(keyring, BootTime::now() + Duration::from_secs(600)));
        let collected = super::support::Collected::default();
        let check = Check::new(volume.backing(), Options::default()).unwrap();
        check.run(Some(gate), &collected).unwrap()
    };
    assert_eq!(check(both()).left, 0);
    let gate = Gate::new();
    assert!(gate.open(both(), BootTime::now() + Duration::from_secs(600)));
    let store = Store::open(volume.backing(), gate, false).unwrap();
    store.start_session(&both()).unwrap();
    store.recover().unwrap();
    store.adopt_volume_key(&mut |_| {}).unwrap();
    store.close().unwrap();
    drop(store);
    assert_eq!(check(both()).left, 0);
    assert_eq!(check(Keyring::new(2, secret(9))).left, 0);
    assert!(check(Keyring::new(1, secret(KEY))).errors > 3);
    assert!(volume.check_without_key().findings.is_empty());
}

#[test]
fn records_of_the_log() {
    let volume = Volume::killed(|fs| {
        let handle = open(fs, "big");
        for i in 0..4 {
            write_at(fs, handle, i * 20_000, b"a record of its own");
            fs.fsync(handle, true).unwrap();
        }
        fs.release(handle);
    });
    assert_eq!(volume.check().codes(), ["log-pending"]);
    let log = volume.path("log.hot");
    // One that a later record says was durable.
    flip(&log, get_record(&log) + PAGE + 9);
    let checked = volume.check();
    assert_eq!(checked.codes(), ["log"], "{:#?}", checked.findings);
    assert!(checked.findings[0].detail.contains("stable storage"));
    flip(&log, get_record(&log) + PAGE + 9);
    // Its file is damaged where the log is to go: which one it is, is told.
    flip(&volume.big, 2 * PAGE + 40);
    let checked = volume.check();
    let told = checked.findings.iter().find(|one| one.code.name() == "log-replay").unwrap();
    assert!(told.detail.contains(volume.big.to_str().unwrap()), "{}", told.detail);
    flip(&volume.big, 2 * PAGE + 40);
    // Its file was removed, below the mount.
    let aside = volume.path("aside");
    fs::rename(&volume.big, &aside).unwrap();
    let codes = volume.check().codes();
    assert_eq!(codes, ["foreign", "log-pending", "log-removed"]);
    // Two of one file.
    fs::copy(&aside, &volume.big).unwrap();
    fs::rename(&aside, volume.directory.join("Zm9v")).unwrap();
    let codes = volume.check().codes();
    assert!(codes.contains(&"log-replay") && codes.contains(&"duplicate-file"), "{codes:?}");
}

#[test]
fn names() {
    let renamed = |path: &Path, name: &str| {
        fs::rename(path, path.with_file_name(name)).unwrap();
    };
    finds(|v| renamed(&v.small, "not!ours"), &[error("name")]);
    finds(|v| renamed(&v.small, "QUJDREVGR0hJSktMTU5PUFFSU1RVVg"), &[error("name")]);
    // What is below is looked at, under a path that nobody has.
    finds(
        |v| {
            flip(&v.inner, block(0));
            renamed(&v.directory, "QUJDREVGR0hJSktMTU5PUFFSU1RVVg");
        },
        &[error("name"), Expected { content: Some((0, 5)), ..error("block").at(block(0)) }],
    );
    finds(|v| fs::remove_file(&v.side).unwrap(), &[error("long-name")]);
    finds(|v| flip(&v.side, 3), &[error("long-name")]);
    finds(|v| flip(&v.side, 40), &[error("name")]);
    finds(
        |v| renamed(&v.side, "%N.AAAAAAAAAAAAAAAAAAAAAA"),
        &[error("long-name"), note("side-file")],
    );
    finds(|v| fs::remove_file(&v.long).unwrap(), &[note("side-file")]);
}

#[test]
fn links_and_attributes() {
    let relink = |path: &Path, target: &str| {
        fs::remove_file(path).unwrap();
        symlink(target, path).unwrap();
    };
    finds(|v| relink(&v.link, "not base64!"), &[error("symlink").of("/link")]);
    finds(|v| relink(&v.link, "QUJD"), &[error("symlink").of("/link")]);
    finds(
        |v| {
            let target = fs::read_link(&v.link).unwrap().into_os_string().into_string().unwrap();
            let other = if target.starts_with('A') { 'B' } else { 'A' };
            relink(&v.link, &format!("{other}{}", &target[1..]));
        },
        &[error("symlink").of("/link")],
    );
    finds(|v| flip(&v.target, 500), &[error("symlink").of("/long-link")]);
    finds(|v| fs::remove_file(&v.target).unwrap(), &[error("symlink").of("/long-link")]);
    finds(|v| fs::remove_file(&v.long_link).unwrap(), &[note("link-target")]);
    type Change = dyn Fn(&str, &[u8]) -> (String, Vec<u8>);
    let attribute = |v: &Volume, change: &Change| {
        let backing = v.backing().root().lookup(b"tree").unwrap();
        let name = v.small.file_name().unwrap().to_str().unwrap().as_bytes();
        let node = backing.lookup(name).unwrap();
        let disk = node.list_xattrs().unwrap().remove(0);
        let value = node.get_xattr(&disk).unwrap();
        let (name, value) = change(std::str::from_utf8(&disk).unwrap(), &value);
        node.remove_xattr(&disk).unwrap();
        node.set_xattr(name.as_bytes(), &value, crate::backing::XattrMode::Create).unwrap();
    };
    let value = |name: &str, value: &[u8]| (name.to_owned(), [&value[1..], b"x"].concat());
    finds(|v| attribute(v, &value), &[error("xattr").of("/small")]);
    let name = |name: &str, value: &[u8]| (format!("{name}AAAA"), value.to_vec());
    finds(|v| attribute(v, &name), &[error("xattr").of("/small")]);
}

#[test]
fn hard_links_are_one_file() {
    let volume = Volume::new();
    // Below the mount there is no way to make a name; another volume's would not do.
    let gate = open_gate(KEY);
    let store = Store::open(volume.backing(), gate.clone(), false).unwrap();
    store.start_session(&keyring(KEY)).unwrap();
    store.recover().unwrap();
    super::support::with_filesystem(&store, |fs| {
        let node = fs.lookup(crate::vfs::types::ROOT, b"big").unwrap().node;
        fs.link(node, crate::vfs::types::ROOT, b"second").unwrap();
    });
    store.close().unwrap();
    drop(store);
    assert!(volume.check().findings.is_empty());
    flip(&volume.big, block(3));
    let checked = volume.check();
    assert_eq!(checked.codes(), ["block"]);
    let mut names = vec![checked.findings[0].path.clone().unwrap()];
    names.extend(checked.findings[0].also.clone());
    names.sort_unstable();
    assert_eq!(names, ["/big", "/second"]);
    // And of one of which nothing can be read.
    [30, PAGE + 30].iter().for_each(|&at| flip(&volume.big, at));
    let checked = volume.check();
    assert_eq!(checked.codes(), ["header"]);
    let mut names = vec![checked.findings[0].path.clone().unwrap()];
    names.extend(checked.findings[0].also.clone());
    names.sort_unstable();
    assert_eq!(names, ["/big", "/second"]);
}

#[test]
fn a_copy_of_a_file_made_below_the_mount() {
    let volume = Volume::new();
    fs::copy(&volume.inner, volume.directory.join("Zm9v")).unwrap();
    let checked = volume.check();
    let mut codes = checked.codes();
    codes.sort_unstable();
    assert_eq!(codes, ["duplicate-file", "name"]);
}

#[test]
fn a_disk_that_does_not_read() {
    use crate::backing::fault::{Call, FaultBacking, Rule};
    let volume = Volume::new();
    let (backing, faults) = FaultBacking::new(volume.backing());
    let calls = {
        let before = faults.calls();
        super::support::check_backing(backing.clone(), Some(KEY), Repair::No).unwrap();
        faults.calls() - before
    };
    let mut told = HashMap::new();
    for call in [Call::Read, Call::Open, Call::Lookup, Call::Metadata] {
        for after in (0..calls).step_by(3) {
            let errno = rustix::io::Errno::IO;
            faults.arm(Rule { call, after, lasting: true, errno, partial: None });
            let checked = super::support::check_backing(backing.clone(), Some(KEY), Repair::No);
            if !faults.disarm() {
                break;
            }
            // The check says so, or ends: it never calls the volume clean.
            if let Ok(checked) = checked {
                assert!(checked.summary.errors > 0, "{call:?} {after}: {:?}", checked.codes());
                for finding in checked.findings {
                    told.insert((finding.code.name(), finding.path), finding.backing_path);
                }
            }
        }
    }
    for (path, backing) in [("/big", &volume.big), ("/dir/inner", &volume.inner)] {
        let found = told.get(&("read", Some(path.to_owned())));
        assert_eq!(found.map(Path::new), Some(&**backing), "{told:#?}");
    }
    assert!(volume.check().findings.is_empty());
}

/// Shuts the gate with the first finding.
struct LosesTheKey(Arc<Gate>);

impl Report for LosesTheKey {
    fn finding(&self, _: &Finding) -> crate::Result<()> {
        self.0.shut(Reason::KeyDisabled);
        self.0.wipe();
        Ok(())
    }

    fn trouble(&self, _: &str) {}
}

#[test]
fn a_key_that_is_lost_ends_the_check() {
    for damage in ["volume", "big"] {
        let volume = Volume::new();
        match damage {
            "volume" => flip(&volume.path("volume"), 70),
            _ => flip(&volume.big, 60),
        }
        let gate = open_gate(KEY);
        let options = Options { threads: 1, ..Options::default() };
        let check = Check::new(volume.backing(), options).unwrap();
        let error = check.run(Some(gate.clone()), &LosesTheKey(gate)).unwrap_err();
        assert_eq!(error.kind, Kind::Inaccessible, "{damage}: {error}");
    }
}
