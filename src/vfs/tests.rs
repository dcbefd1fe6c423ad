//! The operations over a real directory and store, without FUSE.

mod names_cut;
mod power_cut;

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use rustix::io::Errno;
use tempfile::TempDir;

use super::types::ROOT;
use super::{
    AuditSink, Caller, DirItem, DirSink, Filesystem, FilesystemOptions, IntegrityEvent, Plus,
    SetAttr, WriteRequest,
};
use crate::backing::fault::{Call, FaultBacking, Faults, Rule};
use crate::backing::linux::LinuxBacking;
use crate::backing::memory::MemoryBacking;
use crate::backing::{Backing, FileKind, RenameMode, SetTime, Timestamp, XattrMode};
use crate::crypto::secret::Secret;
use crate::error::{CutOff, FsError, FsResult};
use crate::key::gate::{BootTime, Gate, Keyring, Reason};
use crate::store::{FormatOptions, Store};
use crate::sync::Mutex;

const ME: Caller = Caller { uid: 0, gid: 0, pid: 1 };

#[derive(Debug, Default)]
struct Events(Mutex<Vec<IntegrityEvent>>);

impl AuditSink for Events {
    fn integrity_failure(&self, event: &IntegrityEvent) {
        self.0.lock().push(event.clone());
    }
}

struct Volume {
    fs: Arc<Filesystem>,
    store: Arc<Store>,
    gate: Arc<Gate>,
    events: Arc<Events>,
    dir: TempDir,
}

fn keyring() -> Keyring {
    Keyring::new(1, Secret::new_with(|key| key.fill(3)).unwrap())
}

impl Volume {
    fn new() -> Volume {
        let dir = tempfile::tempdir().unwrap();
        let backing: Arc<dyn Backing> = LinuxBacking::open(dir.path()).unwrap();
        let options = FormatOptions { log_size: Some(12 << 20), ..FormatOptions::default() };
        Store::format(&*backing, &keyring(), options).unwrap();
        let gate = Gate::new();
        let store = Store::open(Arc::clone(&backing), Arc::clone(&gate), false).unwrap();
        let events = Arc::new(Events::default());
        let sink: Arc<dyn AuditSink> = Arc::clone(&events) as _;
        let options = FilesystemOptions::default();
        let fs = Filesystem::new(Arc::clone(&store), backing, Arc::clone(&gate), sink, options);
        let volume = Volume { fs, store, gate, events, dir };
        volume.open_gate();
        volume
    }

    fn open_gate(&self) {
        self.store.start_session(&keyring()).unwrap();
        assert!(self.gate.open(keyring(), BootTime::now() + Duration::from_secs(600)));
        self.store.recover().unwrap();
    }

    fn shut_gate(&self) {
        self.gate.shut(Reason::KeyDisabled);
        assert!(self.gate.drain(Duration::from_secs(5)));
        self.gate.wipe();
    }

    /// Creates a file with `text` in it; returns its node.
    fn file(&self, parent: u64, name: &str, text: &[u8]) -> u64 {
        let created = self.fs.create(ME, parent, name.as_bytes(), 0o644, 0).unwrap();
        self.fs.write(created.handle, &write(text)).unwrap();
        self.fs.release(created.handle);
        created.entry.node
    }

    fn text(&self, node: u64) -> FsResult<Vec<u8>> {
        let handle = self.fs.open(node, 0, false)?;
        let mut buf = vec![0; 1000];
        let read = self.fs.read(handle, 0, &mut buf);
        self.fs.release(handle);
        buf.truncate(read?);
        Ok(buf)
    }

    fn tree(&self) -> PathBuf {
        self.dir.path().join("tree")
    }

    /// The only entry of the encrypted tree.
    fn only_entry(&self) -> PathBuf {
        let mut entries = fs::read_dir(self.tree()).unwrap();
        let entry = entries.next().unwrap().unwrap().path();
        assert!(entries.next().is_none());
        entry
    }

    fn event(&self) -> IntegrityEvent {
        self.events.0.lock().last().cloned().expect("an event")
    }
}

fn write(data: &[u8]) -> WriteRequest<'_> {
    WriteRequest { offset: 0, data, flags: 0, from_cache: false, drop_set_id: false }
}

fn os<T: std::fmt::Debug>(result: FsResult<T>) -> Errno {
    match result {
        Err(FsError::Os(errno)) => errno,
        other => panic!("{other:?}"),
    }
}

fn is_cut_off<T>(result: FsResult<T>) -> bool {
    matches!(result, Err(FsError::CutOff(CutOff::Revoked)))
}

/// Takes a few entries at a time.
struct Names {
    room: usize,
    names: Vec<String>,
    nodes: Vec<u64>,
    next: u64,
}

impl DirSink for Names {
    fn has_room(&self, _name_len: usize) -> bool {
        self.room > 0
    }

    fn push(&mut self, item: &DirItem<'_>) {
        self.room -= 1;
        self.next = item.next;
        self.names.push(String::from_utf8_lossy(item.name).into_owned());
        self.nodes.extend(item.entry.map(|entry| entry.node));
    }
}

fn list(fs: &Filesystem, node: u64, at_a_time: usize, plus: Plus) -> FsResult<Names> {
    let handle = fs.opendir(node)?;
    let mut names = Names { room: 0, names: Vec::new(), nodes: Vec::new(), next: 0 };
    loop {
        names.room = at_a_time;
        let before = names.names.len();
        let next = names.next;
        fs.readdir(handle, next, plus, &mut names)?;
        if names.names.len() == before {
            fs.release(handle);
            names.names.sort();
            return Ok(names);
        }
    }
}

#[test]
fn a_file_is_made_found_and_removed() {
    let volume = Volume::new();
    let node = volume.file(ROOT, "f", b"text");
    let found = volume.fs.lookup(ROOT, b"f").unwrap();
    assert_eq!(found.node, node);
    assert_eq!((found.attr.size, found.attr.nlink), (4, 1));
    assert_eq!(volume.text(node).unwrap(), b"text");
    assert_eq!(os(volume.fs.create(ME, ROOT, b"f", 0o644, 0)), Errno::EXIST);
    volume.fs.unlink(ROOT, b"f").unwrap();
    assert_eq!(os(volume.fs.lookup(ROOT, b"f")), Errno::NOENT);
    assert_eq!(volume.text(node).unwrap(), b"text", "it is still referenced");
    volume.fs.forget(node, 2);
    assert_eq!(os(volume.fs.getattr(node)), Errno::STALE);
}

#[test]
fn node_ids_are_never_given_twice() {
    let volume = Volume::new();
    let mut ids = Vec::new();
    for _ in 0..50 {
        let node = volume.file(ROOT, "f", b"");
        volume.fs.unlink(ROOT, b"f").unwrap();
        volume.fs.forget(node, 1);
        ids.push(node);
    }
    let count = ids.len();
    ids.dedup();
    assert_eq!(ids.len(), count);
}

#[test]
fn a_million_lookups_and_forgets_leave_nothing() {
    let volume = Volume::new();
    let node = volume.file(ROOT, "f", b"");
    volume.fs.forget(node, 1);
    for _ in 0..20_000 {
        let entry = volume.fs.lookup(ROOT, b"f").unwrap();
        volume.fs.forget(entry.node, 1);
    }
    assert_eq!(volume.fs.known_nodes(), [ROOT]);
}

#[test]
fn a_listing_in_small_steps_names_each_entry_once() {
    let volume = Volume::new();
    let long = "n".repeat(255);
    let mut expected = vec![".".to_owned(), "..".to_owned(), long.clone()];
    volume.file(ROOT, &long, b"");
    for index in 0..40 {
        volume.file(ROOT, &format!("f{index}"), b"");
        expected.push(format!("f{index}"));
    }
    expected.sort();
    for at_a_time in [1, 3, 100] {
        let names = list(&volume.fs, ROOT, at_a_time, Plus::No).unwrap().names;
        assert_eq!(names, expected, "{at_a_time} at a time");
    }
    let before = volume.fs.known_nodes().len();
    let plus = list(&volume.fs, ROOT, 7, Plus::Yes).unwrap();
    assert_eq!((plus.names, plus.nodes.len()), (expected, 41));
    plus.nodes.iter().for_each(|node| volume.fs.forget(*node, 1));
    assert_eq!(volume.fs.known_nodes().len(), before, "what is looked up can be forgotten");
}

#[test]
fn everything_but_release_and_forget_fails_while_the_gate_is_shut() {
    let volume = Volume::new();
    let fs = &volume.fs;
    let node = volume.file(ROOT, "f", b"text");
    let link = fs.symlink(ME, ROOT, b"l", b"target").unwrap().node;
    fs.setxattr(node, b"user.a", b"v", XattrMode::Create, false).unwrap();
    let handle = fs.open(node, libc::O_RDWR as u32, false).unwrap();
    let dir = fs.opendir(ROOT).unwrap();
    let mut names = Names { room: 9, names: Vec::new(), nodes: Vec::new(), next: 0 };
    volume.shut_gate();
    assert!(is_cut_off(fs.lookup(ROOT, b"f")));
    assert!(is_cut_off(fs.getattr(node)));
    assert!(is_cut_off(fs.setattr(node, &SetAttr::default())));
    assert!(is_cut_off(fs.readlink(link)));
    assert!(is_cut_off(fs.open(node, 0, false)));
    assert!(is_cut_off(fs.read(handle, 0, &mut [0; 4])));
    assert!(is_cut_off(fs.write(handle, &write(b"x"))));
    assert!(is_cut_off(fs.fsync(handle, true)));
    assert!(is_cut_off(fs.fallocate(ME, handle, 0, 1, 0)));
    assert!(is_cut_off(fs.lseek(handle, 0, libc::SEEK_DATA as u32)));
    assert!(is_cut_off(fs.copy_file_range(ME, (handle, 0), (handle, 9), 1)));
    assert!(is_cut_off(fs.readdir(dir, 0, Plus::Yes, &mut names)));
    assert!(is_cut_off(fs.fsyncdir(dir)));
    assert!(is_cut_off(fs.opendir(ROOT)));
    assert!(is_cut_off(fs.statfs()));
    assert!(is_cut_off(fs.create(ME, ROOT, b"g", 0o644, 0)));
    assert!(is_cut_off(fs.mkdir(ME, ROOT, b"g", 0o755, 0)));
    assert!(is_cut_off(fs.mknod(ME, ROOT, b"g", FileKind::Fifo, 0o644, 0, 0)));
    assert!(is_cut_off(fs.symlink(ME, ROOT, b"g", b"t")));
    assert!(is_cut_off(fs.link(node, ROOT, b"g")));
    assert!(is_cut_off(fs.unlink(ROOT, b"f")));
    assert!(is_cut_off(fs.rmdir(ROOT, b"f")));
    assert!(is_cut_off(fs.rename(ROOT, b"f", ROOT, b"g", RenameMode::Replace)));
    assert!(is_cut_off(fs.getxattr(node, b"user.a")));
    assert!(is_cut_off(fs.setxattr(node, b"user.a", b"", XattrMode::Replace, false)));
    assert!(is_cut_off(fs.listxattr(ME, node)));
    assert!(is_cut_off(fs.removexattr(node, b"user.a")));
    assert!(names.names.is_empty());
    fs.release(dir);
    volume.open_gate();
    let mut buf = [0; 4];
    assert_eq!(fs.read(handle, 0, &mut buf).unwrap(), 4);
    assert_eq!(&buf, b"text", "the same handle serves again");
    assert_eq!(fs.getxattr(node, b"user.a").unwrap(), b"v");
    fs.release(handle);
}

#[test]
fn a_damaged_file_is_named_in_the_audit_can_be_looked_at_and_removed() {
    let volume = Volume::new();
    let dir = volume.fs.mkdir(ME, ROOT, b"db", 0o755, 0).unwrap().node;
    let node = volume.file(dir, "table.ibd", b"text");
    volume.fs.forget(node, 1);
    volume.store.checkpoint().unwrap();
    let on_disk = fs::read_dir(volume.only_entry()).unwrap().next().unwrap().unwrap().path();
    let len = fs::metadata(&on_disk).unwrap().len() as usize;
    fs::write(&on_disk, vec![0xa5; len]).unwrap();
    let entry = volume.fs.lookup(dir, b"table.ibd").unwrap();
    assert_eq!(entry.attr.size, 0);
    assert!(matches!(volume.text(entry.node), Err(FsError::Integrity(_))));
    let event = volume.event();
    assert_eq!(event.logical_path, "/db/table.ibd");
    assert_eq!(PathBuf::from(event.backing_path), on_disk);
    volume.fs.unlink(dir, b"table.ibd").unwrap();
}

#[test]
fn a_foreign_name_is_hidden_and_reported_once() {
    let volume = Volume::new();
    fs::write(volume.tree().join("not-ours"), "").unwrap();
    fs::write(volume.tree().join("QUJDREVGR0hJSktMTU5PUFFSU1RVVg"), "").unwrap();
    for _ in 0..3 {
        assert_eq!(list(&volume.fs, ROOT, 10, Plus::Yes).unwrap().names, [".", ".."]);
    }
    assert_eq!(volume.events.0.lock().len(), 2);
    let event = volume.event();
    assert_eq!((event.failure.what, event.logical_path.as_str()), ("name", ""));
}

#[test]
fn a_link_or_attribute_that_was_tampered_with_is_an_integrity_failure() {
    let volume = Volume::new();
    let link = volume.fs.symlink(ME, ROOT, b"l", b"somewhere").unwrap().node;
    let on_disk = volume.only_entry();
    let target = fs::read_link(&on_disk).unwrap().into_os_string().into_string().unwrap();
    let flipped = if target.starts_with('A') { 'B' } else { 'A' };
    volume.fs.forget(link, 1);
    fs::remove_file(&on_disk).unwrap();
    std::os::unix::fs::symlink(format!("{flipped}{}", &target[1..]), &on_disk).unwrap();
    let link = volume.fs.lookup(ROOT, b"l").unwrap();
    assert_eq!(link.attr.size, 9);
    assert!(matches!(volume.fs.readlink(link.node), Err(FsError::Integrity(_))));
    assert_eq!(
        (volume.event().failure.what, volume.event().logical_path.as_str()),
        ("symlink", "/l")
    );
}

#[test]
fn attribute_values_are_bound_to_their_names() {
    let volume = Volume::new();
    let node = volume.file(ROOT, "f", b"");
    let set = |name: &[u8], value: &[u8]| {
        volume.fs.setxattr(node, name, value, XattrMode::CreateOrReplace, false).unwrap();
    };
    set(b"user.a", b"one");
    set(b"user.b", b"two");
    let disk = LinuxBacking::open(&volume.tree()).unwrap().root();
    let entry = volume.only_entry().file_name().unwrap().to_str().unwrap().as_bytes().to_vec();
    let disk = disk.lookup(&entry).unwrap();
    let names = disk.list_xattrs().unwrap();
    let ours: Vec<_> = names.iter().filter(|name| name.starts_with(b"trusted.byokfs.")).collect();
    let value = disk.get_xattr(ours[0]).unwrap();
    disk.set_xattr(ours[1], &value, XattrMode::Replace).unwrap();
    let results = [volume.fs.getxattr(node, b"user.a"), volume.fs.getxattr(node, b"user.b")];
    assert_eq!(results.iter().filter(|r| matches!(r, Err(FsError::Integrity(_)))).count(), 1);
}

#[test]
fn names_are_checked() {
    let volume = Volume::new();
    let make = |name: &[u8]| volume.fs.mkdir(ME, ROOT, name, 0o755, 0);
    assert_eq!(os(make(&[b'n'; 256])), Errno::NAMETOOLONG);
    for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b"] {
        assert_eq!(os(make(bad)), Errno::INVAL);
    }
    assert!(make(&[0xff; 255]).is_ok());
}

#[test]
fn creation_is_undone_when_the_directory_is_gone() {
    let volume = Volume::new();
    let dir = volume.fs.mkdir(ME, ROOT, b"d", 0o755, 0).unwrap().node;
    volume.fs.rmdir(ROOT, b"d").unwrap();
    assert_eq!(os(volume.fs.create(ME, dir, b"f", 0o644, 0)), Errno::NOENT);
    assert_eq!(os(volume.fs.mkdir(ME, dir, &[b'n'; 200], 0o755, 0)), Errno::NOENT);
    assert_eq!(volume.fs.known_nodes().len(), 2);
}

#[test]
fn times_that_were_set_while_a_checkpoint_ended_stay() {
    let backing = MemoryBacking::new();
    Store::format(&*backing, &keyring(), FormatOptions::default()).unwrap();
    let (faulty, faults) = FaultBacking::new(backing);
    let machine = power_cut::mount(faulty);
    let created = machine.fs.create(ME, ROOT, b"f", 0o644, 0).unwrap();
    machine.fs.write(created.handle, &write(b"text")).unwrap();
    let node = created.entry.node;
    let time = Timestamp { sec: 1_000_000_000, nsec: 5 };
    let change = SetAttr { mtime: SetTime::At(time), ..SetAttr::default() };
    let (fs, (done, is_done)) = (machine.fs.clone(), mpsc::channel());
    // The checkpoint is about to set the time that the file has shown so far.
    faults.arm_hook(Call::Attribute, move || {
        std::thread::spawn(move || {
            fs.setattr(node, &change).unwrap();
            done.send(()).unwrap();
        });
        std::thread::sleep(Duration::from_millis(200));
    });
    machine.store.checkpoint().unwrap();
    is_done.recv().unwrap();
    assert_eq!(machine.fs.getattr(node).unwrap().mtime, time);
    machine.store.checkpoint().unwrap();
    assert_eq!(machine.fs.getattr(node).unwrap().mtime, time);
}

#[test]
fn an_exchange_moves_the_time_of_change_of_both() {
    let volume = Volume::new();
    let nodes = [volume.file(ROOT, "a", b"one"), volume.file(ROOT, "b", b"other")];
    let ctimes = || nodes.map(|node| volume.fs.getattr(node).unwrap().ctime);
    let before = ctimes();
    std::thread::sleep(Duration::from_millis(20));
    volume.fs.rename(ROOT, b"a", ROOT, b"b", RenameMode::Exchange).unwrap();
    let after = ctimes();
    assert!(before[0] < after[0] && before[1] < after[1], "{before:?} {after:?}");
}

#[test]
fn what_is_gone_takes_no_room_whichever_comes_last() {
    let volume = Volume::new();
    for release_first in [true, false] {
        let created = volume.fs.create(ME, ROOT, b"f", 0o644, 0).unwrap();
        volume.fs.write(created.handle, &write(b"text")).unwrap();
        volume.fs.unlink(ROOT, b"f").unwrap();
        if release_first {
            volume.fs.release(created.handle);
        }
        volume.fs.forget(created.entry.node, 1);
        if !release_first {
            volume.fs.release(created.handle);
        }
        assert_eq!(volume.store.log_status().unwrap().dirty_files, 0, "{release_first}");
    }
}

#[test]
fn too_many_nodes_are_noticed() {
    let volume = Volume::new();
    volume.fs.set_many_nodes(10);
    assert!(volume.fs.crowded(Duration::ZERO).is_empty());
    let first = volume.file(ROOT, "f0", b"");
    for index in 1..12 {
        volume.file(ROOT, &format!("f{index}"), b"");
    }
    let surplus = volume.fs.crowded(Duration::ZERO);
    assert_eq!((surplus.len(), surplus[0]), (8, first));
}

#[test]
fn plaintext_names_go_to_the_disk_as_they_are() {
    let mut volume = Volume::new();
    Arc::get_mut(&mut volume.fs).unwrap().plain_names = true;
    let long = "n".repeat(255);
    let mut expected = vec![".".to_owned(), "..".to_owned()];
    for name in ["short", &long, "%N.x"] {
        let dir = volume.fs.mkdir(ME, ROOT, name.as_bytes(), 0o755, 0).unwrap().node;
        volume.file(dir, name, b"sealed");
        assert!(volume.tree().join(name).join(name).is_file());
        assert_eq!(os(volume.fs.rmdir(ROOT, name.as_bytes())), Errno::NOTEMPTY);
        expected.push(name.to_owned());
    }
    expected.sort();
    assert_eq!(list(&volume.fs, ROOT, 2, Plus::Yes).unwrap().names, expected);
}

fn faulty_in_memory() -> (power_cut::Machine, Arc<Faults>) {
    let backing = MemoryBacking::new();
    Store::format(&*backing, &keyring(), FormatOptions::default()).unwrap();
    let (faulty, faults) = FaultBacking::new(backing);
    (power_cut::mount(faulty), faults)
}

fn once(call: Call, after: usize, errno: Errno) -> Rule {
    Rule { call, after, lasting: false, errno, partial: None }
}

#[test]
fn a_listing_that_failed_goes_on_where_it_was() {
    let (machine, faults) = faulty_in_memory();
    let fs = &machine.fs;
    for letter in [b'a', b'b', b'c'] {
        fs.mkdir(ME, ROOT, &[letter; 200], 0o755, 0).unwrap();
    }
    let handle = fs.opendir(ROOT).unwrap();
    let mut names = Names { room: 10, names: Vec::new(), nodes: Vec::new(), next: 0 };
    // There is no descriptor for the side file of the first.
    faults.arm(once(Call::Lookup, 0, Errno::MFILE));
    fs.readdir(handle, 0, Plus::No, &mut names).unwrap();
    assert_eq!(names.names, [".", ".."]);
    faults.arm(once(Call::Lookup, 0, Errno::MFILE));
    assert_eq!(os(fs.readdir(handle, names.next, Plus::No, &mut names)), Errno::MFILE);
    fs.readdir(handle, names.next, Plus::No, &mut names).unwrap();
    assert_eq!(names.names.len(), 5, "{:?}", names.names);
    assert!(machine.events.0.lock().is_empty());
}

#[test]
fn an_exchange_that_was_done_is_not_said_to_have_failed() {
    let (machine, faults) = faulty_in_memory();
    let fs = &machine.fs;
    let nodes = [b"a", b"b"].map(|name| fs.mkdir(ME, ROOT, name, 0o755, 0).unwrap().node);
    faults.arm(once(Call::Lookup, 2, Errno::MFILE));
    fs.rename(ROOT, b"a", ROOT, b"b", RenameMode::Exchange).unwrap();
    faults.disarm();
    assert_eq!([b"b", b"a"].map(|name| fs.lookup(ROOT, name).unwrap().node), nodes);
}

#[test]
fn a_link_that_is_removed_while_it_is_read_is_not_damaged() {
    let (machine, faults) = faulty_in_memory();
    let link = machine.fs.symlink(ME, ROOT, b"l", &[b't'; 2000]).unwrap().node;
    let fs = machine.fs.clone();
    faults.arm_hook(Call::Lookup, move || fs.unlink(ROOT, b"l").unwrap());
    assert_eq!(os(machine.fs.readlink(link)), Errno::NOENT);
    assert!(machine.events.0.lock().is_empty());
}
