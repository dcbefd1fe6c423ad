//! What fsync of a new file promises, whatever happened to it between creation and that.

use std::sync::Arc;
use std::time::Duration;

use super::{Events, ME, keyring, write};
use crate::backing::fault::{Call, FaultBacking, Rule};
use crate::backing::memory::{MemoryBacking, Options};
use crate::backing::{Backing, RenameMode};
use crate::error::FsError;
use crate::key::gate::{BootTime, Gate};
use crate::store::{FormatOptions, Store};
use crate::vfs::types::{ROOT, SetAttr};
use crate::vfs::{AuditSink, Filesystem, FilesystemOptions};
use rustix::io::Errno;

const READ_WRITE: u32 = libc::O_RDWR as u32;
const TEXT: &[u8] = b"acknowledged";

pub(super) struct Machine {
    pub fs: Arc<Filesystem>,
    pub store: Arc<Store>,
    pub events: Arc<Events>,
}

/// A new volume in memory, mounted; its recording starts now.
pub(super) fn in_memory() -> (Arc<MemoryBacking>, Machine) {
    let backing = MemoryBacking::new();
    let options = FormatOptions { log_size: Some(8 << 20), ..FormatOptions::default() };
    Store::format(&*backing, &keyring(), options).unwrap();
    let machine = mount(backing.clone());
    backing.settle();
    (backing, machine)
}

pub(super) fn mount(backing: Arc<dyn Backing>) -> Machine {
    mount_as(backing, false)
}

pub(super) fn mount_as(backing: Arc<dyn Backing>, read_only: bool) -> Machine {
    let gate = Gate::new();
    let store = Store::open(Arc::clone(&backing), Arc::clone(&gate), read_only).unwrap();
    store.start_session(&keyring()).unwrap();
    assert!(gate.open(keyring(), BootTime::now() + Duration::from_secs(600)));
    store.recover().unwrap();
    let events = Arc::new(Events::default());
    let sink: Arc<dyn AuditSink> = Arc::clone(&events) as _;
    let options = FilesystemOptions { read_only };
    let fs = Filesystem::new(Arc::clone(&store), backing, gate, sink, options);
    Machine { fs, store, events }
}

impl Machine {
    fn content(&self, name: &str) -> Option<Vec<u8>> {
        let entry = match self.fs.lookup(ROOT, name.as_bytes()) {
            Err(FsError::Os(Errno::NOENT)) => return None,
            entry => entry.unwrap(),
        };
        Some(self.text(entry.node))
    }

    fn text(&self, node: u64) -> Vec<u8> {
        let handle = self.fs.open(node, libc::O_RDONLY as u32, false).unwrap();
        let mut bytes = [0; 64];
        let count = self.fs.read(handle, 0, &mut bytes).unwrap();
        self.fs.release(handle);
        bytes[..count].to_vec()
    }

    fn flush(&self, name: &str) {
        let entry = self.fs.lookup(ROOT, name.as_bytes()).unwrap();
        let handle = self.fs.open(entry.node, READ_WRITE, false).unwrap();
        self.fs.fsync(handle, false).unwrap();
        self.fs.release(handle);
    }
}

/// Runs `work`, cuts the power the moment it has returned, and expects `name` with TEXT in it in
/// every state that this may leave.
fn survives(name: &str, work: impl Fn(&Machine)) {
    let (backing, machine) = in_memory();
    work(&machine);
    let trace = backing.trace();
    let mut states = 0;
    let options = Options { budget: 200, ..Options::default() };
    for crash in trace.crashes(trace.len(), &options) {
        let after = mount(trace.materialise(&crash));
        assert_eq!(after.content(name).as_deref(), Some(TEXT), "{crash:?}");
        states += 1;
    }
    assert!(states > 0);
}

#[test]
fn a_file_that_was_closed_before_it_was_flushed() {
    survives("a", |machine| {
        let created = machine.fs.create(ME, ROOT, b"a", 0o644, 0).unwrap();
        machine.fs.write(created.handle, &write(TEXT)).unwrap();
        machine.fs.release(created.handle);
        machine.fs.forget(created.entry.node, 1);
        machine.flush("a");
    });
}

#[test]
fn a_file_that_a_checkpoint_brought_home_before_it_was_flushed() {
    survives("a", |machine| {
        let created = machine.fs.create(ME, ROOT, b"a", 0o644, 0).unwrap();
        machine.fs.write(created.handle, &write(TEXT)).unwrap();
        machine.fs.release(created.handle);
        machine.fs.forget(created.entry.node, 1);
        machine.store.checkpoint().unwrap();
        machine.flush("a");
    });
}

#[test]
fn a_file_that_replaced_another_before_it_was_flushed() {
    survives("a", |machine| {
        for name in [&b"a"[..], b"b"] {
            let created = machine.fs.create(ME, ROOT, name, 0o644, 0).unwrap();
            machine.fs.write(created.handle, &write(TEXT)).unwrap();
            machine.fs.release(created.handle);
        }
        machine.flush("a");
        machine.fs.rename(ROOT, b"b", ROOT, b"a", RenameMode::Replace).unwrap();
        machine.flush("a");
    });
}

#[test]
fn a_file_that_got_its_name_after_its_first_flush() {
    survives("a", |machine| {
        let created = machine.fs.create_unnamed(ME, ROOT, 0o644, 0).unwrap();
        machine.fs.write(created.handle, &write(TEXT)).unwrap();
        machine.fs.fsync(created.handle, true).unwrap();
        machine.fs.link(created.entry.node, ROOT, b"a").unwrap();
        machine.fs.fsync(created.handle, true).unwrap();
    });
}

#[test]
fn a_file_that_got_its_name_while_it_was_flushed() {
    let (backing, machine) = in_memory();
    drop(machine);
    let (faulty, faults) = FaultBacking::new(backing.clone());
    let machine = mount(faulty);
    let created = machine.fs.create_unnamed(ME, ROOT, 0o644, 0).unwrap();
    machine.fs.write(created.handle, &write(TEXT)).unwrap();
    let (fs, node) = (machine.fs.clone(), created.entry.node);
    faults.arm_hook(Call::Sync, move || {
        fs.link(node, ROOT, b"a").unwrap();
    });
    machine.fs.fsync(created.handle, true).unwrap();
    // That one was too early for the name.
    machine.fs.fsync(created.handle, true).unwrap();
    let trace = backing.trace();
    let options = Options { budget: 200, ..Options::default() };
    for crash in trace.crashes(trace.len(), &options) {
        let after = mount(trace.materialise(&crash));
        assert_eq!(after.content("a").as_deref(), Some(TEXT), "{crash:?}");
    }
}

#[test]
fn a_file_in_a_directory_that_changed_places_with_another() {
    let (backing, machine) = in_memory();
    let fs = &machine.fs;
    let make = |node, name: &[u8]| {
        let created = fs.create(ME, node, name, 0o644, 0).unwrap();
        fs.write(created.handle, &write(TEXT)).unwrap();
        fs.fsync(created.handle, true).unwrap();
        fs.release(created.handle);
    };
    let mut inner = Vec::new();
    for (outside, inside) in [(b"a", b"x"), (b"b", b"y")] {
        let outer = fs.mkdir(ME, ROOT, outside, 0o755, 0).unwrap().node;
        let node = fs.mkdir(ME, outer, inside, 0o755, 0).unwrap().node;
        make(node, b"old");
        inner.push((outer, node));
    }
    fs.rename(inner[0].0, b"x", inner[1].0, b"y", RenameMode::Exchange).unwrap();
    make(inner[1].1, b"new");
    let trace = backing.trace();
    let options = Options { budget: 200, ..Options::default() };
    for crash in trace.crashes(trace.len(), &options) {
        let after = mount(trace.materialise(&crash));
        let down = |node, name: &[u8]| after.fs.lookup(node, name).unwrap().node;
        let node = down(down(down(ROOT, b"a"), b"x"), b"new");
        assert_eq!(after.text(node), TEXT, "{crash:?}");
    }
}

/// The kernel may tell of it once: the next flush that succeeds proves nothing.
#[test]
fn a_directory_that_cannot_be_flushed_is_the_end_of_acknowledgements() {
    for after in 0..3 {
        let (backing, machine) = in_memory();
        drop(machine);
        let (faulty, faults) = FaultBacking::new(backing);
        let machine = mount(faulty);
        let first = machine.fs.create(ME, ROOT, b"first", 0o644, 0).unwrap();
        machine.fs.fsync(first.handle, true).unwrap();
        let outer = machine.fs.mkdir(ME, ROOT, b"d", 0o755, 0).unwrap().node;
        let inner = machine.fs.mkdir(ME, outer, b"e", 0o755, 0).unwrap().node;
        let created = machine.fs.create(ME, inner, b"a", 0o644, 0).unwrap();
        machine.fs.write(created.handle, &write(TEXT)).unwrap();
        let errno = Errno::NOSPC;
        faults.arm(Rule { call: Call::SyncDir, after, lasting: false, errno, partial: None });
        for handle in [created.handle, created.handle, first.handle] {
            let answer = machine.fs.write(first.handle, &write(TEXT)).map(drop);
            let answer = answer.and_then(|()| machine.fs.fsync(handle, true));
            assert!(matches!(answer, Err(FsError::Os(Errno::IO))), "after {after}: {answer:?}");
        }
        assert!(machine.store.log_status().unwrap().poisoned.is_some());
        assert_eq!(machine.text(created.entry.node), TEXT);
    }
}

#[test]
fn a_link_with_a_long_target_has_it_as_long_as_it_is_there() {
    let (backing, machine) = in_memory();
    let target = [b'x'; 2000];
    for name in [b"a", b"b"] {
        machine.fs.symlink(ME, ROOT, name, &target).unwrap();
    }
    machine.store.sync_all().unwrap();
    machine.fs.unlink(ROOT, b"a").unwrap();
    machine.fs.rename(ROOT, b"b", ROOT, b"c", RenameMode::Replace).unwrap();
    machine.fs.symlink(ME, ROOT, b"a", b"short").unwrap();
    machine.fs.rename(ROOT, b"a", ROOT, b"c", RenameMode::Replace).unwrap();
    let trace = backing.trace();
    let mut found = 0;
    for cut in 0..=trace.len() {
        for crash in trace.crashes(cut, &Options::default()) {
            let after = mount(trace.materialise(&crash));
            for name in [b"a", b"b", b"c"] {
                let Ok(entry) = after.fs.lookup(ROOT, name) else { continue };
                let read =
                    after.fs.readlink(entry.node).unwrap_or_else(|e| panic!("{e} {crash:?}"));
                assert!(read == target || read == b"short");
                found += 1;
            }
        }
    }
    assert!(found > trace.len());
}

/// As a server does with the index of its binary logs: the new index is flushed, given its name, and
/// from then on only the log itself is flushed.
#[test]
fn names_changed_before_another_file_was_flushed() {
    for replaces in [false, true] {
        survives("index", |machine| {
            let fs = &machine.fs;
            let log = fs.create(ME, ROOT, b"log", 0o644, 0).unwrap();
            fs.fsync(log.handle, true).unwrap();
            fs.mkdir(ME, ROOT, b"dir", 0o755, 0).unwrap();
            let dir = fs.lookup(ROOT, b"dir").unwrap().node;
            for (name, text) in [(&b"index"[..], &b"old"[..]), (b"new", TEXT)] {
                let made = fs.create(ME, if name == b"new" { dir } else { ROOT }, name, 0o644, 0);
                let made = made.unwrap();
                fs.write(made.handle, &write(text)).unwrap();
                fs.fsync(made.handle, false).unwrap();
                fs.release(made.handle);
            }
            if !replaces {
                fs.unlink(ROOT, b"index").unwrap();
            }
            fs.rename(dir, b"new", ROOT, b"index", RenameMode::Replace).unwrap();
            fs.rmdir(ROOT, b"dir").unwrap();
            fs.write(log.handle, &write(b"goes on")).unwrap();
            fs.fsync(log.handle, true).unwrap();
        });
    }
}

#[test]
fn a_flush_of_names_that_failed_is_not_tried_again() {
    let (backing, machine) = in_memory();
    drop(machine);
    let (faulty, faults) = FaultBacking::new(backing);
    let machine = mount(faulty);
    let created = machine.fs.create(ME, ROOT, b"a", 0o644, 0).unwrap();
    machine.fs.write(created.handle, &write(TEXT)).unwrap();
    machine.fs.fsync(created.handle, false).unwrap();
    machine.fs.rename(ROOT, b"a", ROOT, b"b", RenameMode::Replace).unwrap();
    let errno = Errno::IO;
    faults.arm(Rule { call: Call::SyncDir, after: 0, lasting: false, errno, partial: None });
    // The file itself owes nothing, the names before it do.
    for _ in 0..2 {
        let answer = machine.fs.fsync(created.handle, true);
        assert!(matches!(answer, Err(FsError::Os(Errno::IO))), "{answer:?}");
    }
}

#[test]
fn a_flush_of_names_that_could_not_begin_is_tried_again() {
    let (backing, machine) = in_memory();
    drop(machine);
    let (faulty, faults) = FaultBacking::new(backing);
    let machine = mount(faulty);
    let created = machine.fs.create(ME, ROOT, b"a", 0o644, 0).unwrap();
    machine.fs.fsync(created.handle, false).unwrap();
    machine.fs.rename(ROOT, b"a", ROOT, b"b", RenameMode::Replace).unwrap();
    let errno = Errno::MFILE;
    faults.arm(Rule { call: Call::SyncDir, after: 0, lasting: false, errno, partial: None });
    let answer = machine.fs.fsync(created.handle, true);
    assert!(matches!(answer, Err(FsError::Os(Errno::IO))), "{answer:?}");
    machine.fs.write(created.handle, &write(TEXT)).unwrap();
    machine.fs.fsync(created.handle, true).unwrap();
}

/// The disk tells of a failure once: whoever hears of it first tells the others.
#[test]
fn a_flush_of_names_that_failed_beside_another_operation_is_known_to_fsync() {
    for operation in 0..3 {
        let (backing, machine) = in_memory();
        drop(machine);
        let (faulty, faults) = FaultBacking::new(backing);
        let machine = mount(faulty);
        let created = machine.fs.create(ME, ROOT, b"a", 0o644, 0).unwrap();
        let long = [b'n'; 200];
        machine.fs.mkdir(ME, ROOT, &long, 0o755, 0).unwrap();
        machine.fs.symlink(ME, ROOT, b"l", &[b't'; 2000]).unwrap();
        machine.fs.fsync(created.handle, false).unwrap();
        machine.fs.rename(ROOT, b"a", ROOT, b"b", RenameMode::Replace).unwrap();
        let errno = Errno::IO;
        faults.arm(Rule { call: Call::SyncDir, after: 0, lasting: false, errno, partial: None });
        match operation {
            0 => machine.fs.rmdir(ROOT, &long).unwrap(),
            1 => machine.fs.unlink(ROOT, b"l").unwrap(),
            _ => drop(machine.fs.mkdir(ME, ROOT, &[b'm'; 200], 0o755, 0).unwrap_err()),
        }
        assert!(faults.disarm());
        let answer = machine.fs.fsync(created.handle, true);
        assert!(matches!(answer, Err(FsError::Os(Errno::IO))), "{operation}: {answer:?}");
    }
}

/// MySQL takes EROFS from `fsync` for success, and acknowledges.
#[test]
fn a_disk_that_turned_read_only_answers_eio_to_every_flush() {
    for (call, names, attributes) in [
        (Call::SyncDir, 1, false),
        (Call::Sync, 20, false),
        (Call::Sync, 0, true),
        (Call::Sync, 0, false),
    ] {
        let (backing, machine) = in_memory();
        drop(machine);
        let (faulty, faults) = FaultBacking::new(backing);
        let machine = mount(faulty);
        let created = machine.fs.create(ME, ROOT, b"a", 0o644, 0).unwrap();
        machine.fs.fsync(created.handle, false).unwrap();
        for number in 0..names {
            let dir = machine.fs.mkdir(ME, ROOT, format!("{number}").as_bytes(), 0o755, 0);
            let made = machine.fs.symlink(ME, dir.unwrap().node, b"s", b"t");
            made.unwrap();
        }
        if attributes {
            let change = SetAttr { mode: Some(0o600), ..SetAttr::default() };
            machine.fs.setattr(created.entry.node, &change).unwrap();
        }
        machine.fs.write(created.handle, &write(TEXT)).unwrap();
        faults.arm(Rule { call, after: 0, lasting: false, errno: Errno::ROFS, partial: None });
        for _ in 0..2 {
            let answer = machine.fs.fsync(created.handle, false);
            assert!(matches!(answer, Err(FsError::Os(Errno::IO))), "{call:?}: {answer:?}");
        }
    }
}

#[test]
fn nor_does_the_flush_of_a_directory_answer_erofs() {
    for (call, new_file) in [(Call::Sync, true), (Call::SyncDir, true), (Call::SyncDir, false)] {
        let (backing, machine) = in_memory();
        drop(machine);
        let (faulty, faults) = FaultBacking::new(backing);
        let machine = mount(faulty);
        let dir = machine.fs.opendir(ROOT).unwrap();
        if new_file {
            machine.fs.create(ME, ROOT, b"a", 0o644, 0).unwrap();
        }
        faults.arm(Rule { call, after: 0, lasting: false, errno: Errno::ROFS, partial: None });
        for _ in 0..2 {
            let answer = machine.fs.fsyncdir(dir);
            assert!(matches!(answer, Err(FsError::Os(Errno::IO))), "{call:?}: {answer:?}");
        }
    }
}
