//! What a power cut leaves of names: every state of a trace, recovered and looked through.
//!
//! A script notes after each of its operations which name leads to which file, and what has been
//! promised. Whatever the cut leaves of a name must be what it was at some time since the last promise
//! about it, and of a file some content since the last about that. Whatever is listed can be looked
//! up and read, and nothing is reported as damaged.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::power_cut::{Machine, in_memory, mount_as};
use super::{ME, list, write};
use crate::backing::RenameMode;
use crate::backing::memory::{MemoryBacking, Options, Trace};
use crate::error::FsError;
use crate::vfs::Plus;
use crate::vfs::types::ROOT;
use rustix::io::Errno;

/// Longer than fits on the disk.
const LONG: &str = "a name of more than a hundred and seventy-five letters, which has a file of its own \
                    beside its entry, in which it is written out, sealed, since what there is room \
                    for in a name of the disk is not enough for it";
const LONGER: &str = "another name of more than a hundred and seventy-five letters, which has a file \
                      of its own beside its entry, in which it is written out, sealed, since what \
                      there is room for in a name of the disk is not enough for it either";

type FileNo = usize;

struct File {
    node: u64,
    handle: u64,
    /// A name of it was promised.
    named: bool,
}

#[derive(Clone, Default)]
struct Step {
    position: usize,
    names: BTreeMap<String, FileNo>,
    contents: Vec<Vec<u8>>,
    promised_names: BTreeSet<String>,
    promised_files: BTreeSet<FileNo>,
}

struct Script {
    backing: Arc<MemoryBacking>,
    machine: Machine,
    dirs: BTreeMap<String, u64>,
    files: Vec<File>,
    now: Step,
    steps: Vec<Step>,
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

impl Script {
    fn new() -> Script {
        let (backing, machine) = in_memory();
        let dirs = BTreeMap::from([(String::new(), ROOT)]);
        let (files, now) = (Vec::new(), Step::default());
        Script { backing, machine, dirs, files, steps: vec![now.clone()], now }
    }

    fn place<'a>(&self, path: &'a str) -> (u64, &'a [u8]) {
        let (dir, name) = split(path);
        (self.dirs[dir], name.as_bytes())
    }

    /// The operation is done.
    fn note(&mut self) {
        self.now.position = self.backing.position();
        self.steps.push(self.now.clone());
        self.now.promised_names.clear();
        self.now.promised_files.clear();
    }

    fn mkdir(&mut self, path: &str) {
        let (dir, name) = self.place(path);
        let entry = self.machine.fs.mkdir(ME, dir, name, 0o755, 0).unwrap();
        self.dirs.insert(path.to_owned(), entry.node);
        self.note();
    }

    fn create(&mut self, path: &str, text: &str) -> FileNo {
        let (dir, name) = self.place(path);
        let created = self.machine.fs.create(ME, dir, name, 0o644, 0).unwrap();
        let number = self.add(created.entry.node, created.handle);
        self.now.names.insert(path.to_owned(), number);
        self.note();
        if !text.is_empty() {
            self.write(number, text);
        }
        number
    }

    fn unnamed(&mut self, text: &str) -> FileNo {
        let created = self.machine.fs.create_unnamed(ME, ROOT, 0o644, 0).unwrap();
        let number = self.add(created.entry.node, created.handle);
        self.note();
        self.write(number, text);
        number
    }

    fn add(&mut self, node: u64, handle: u64) -> FileNo {
        self.files.push(File { node, handle, named: false });
        self.now.contents.push(Vec::new());
        self.files.len() - 1
    }

    fn write(&mut self, file: FileNo, text: &str) {
        // Nothing of what was there before is left.
        let text = format!("{text:40}").into_bytes();
        self.machine.fs.write(self.files[file].handle, &write(&text)).unwrap();
        self.now.contents[file] = text;
        self.note();
    }

    fn fsync(&mut self, file: FileNo) {
        self.machine.fs.fsync(self.files[file].handle, false).unwrap();
        self.promise(file);
        self.note();
    }

    fn fdatasync(&mut self, file: FileNo) {
        self.machine.fs.fsync(self.files[file].handle, true).unwrap();
        self.promise(file);
        self.note();
    }

    fn promise(&mut self, file: FileNo) {
        self.now.promised_files.insert(file);
        let of_it: Vec<String> = self.names_of(file);
        if !of_it.is_empty() && !std::mem::replace(&mut self.files[file].named, true) {
            self.now.promised_names.extend(of_it);
        }
    }

    fn names_of(&self, file: FileNo) -> Vec<String> {
        let names = self.now.names.iter().filter(|(_, of)| **of == file);
        names.map(|(name, _)| name.clone()).collect()
    }

    /// Everything that was ever in the directory is as it is now, and what was written before is there.
    fn fsync_dir(&mut self, path: &str) {
        let handle = self.machine.fs.opendir(self.dirs[path]).unwrap();
        self.machine.fs.fsyncdir(handle).unwrap();
        self.machine.fs.release(handle);
        let all = self.steps.iter().flat_map(|step| step.names.keys());
        self.now.promised_names.extend(all.filter(|name| split(name).0 == path).cloned());
        self.now.promised_files.extend(0..self.files.len());
        let here: Vec<FileNo> = self.now.names.values().copied().collect();
        for file in here {
            self.files[file].named |= self.names_of(file).iter().any(|name| split(name).0 == path);
        }
        self.note();
    }

    fn close(&mut self, file: FileNo) {
        self.machine.fs.release(self.files[file].handle);
    }

    fn forget(&mut self, file: FileNo) {
        self.machine.fs.forget(self.files[file].node, 1);
        self.note();
    }

    fn unlink(&mut self, path: &str) {
        let (dir, name) = self.place(path);
        self.machine.fs.unlink(dir, name).unwrap();
        self.now.names.remove(path);
        self.note();
    }

    fn link(&mut self, file: FileNo, path: &str) {
        let (dir, name) = self.place(path);
        self.machine.fs.link(self.files[file].node, dir, name).unwrap();
        self.now.names.insert(path.to_owned(), file);
        self.note();
    }

    fn rename(&mut self, from: &str, to: &str, mode: RenameMode) {
        let ((from_dir, from_name), (to_dir, to_name)) = (self.place(from), self.place(to));
        self.machine.fs.rename(from_dir, from_name, to_dir, to_name, mode).unwrap();
        let moved = self.now.names.remove(from).unwrap();
        let over = self.now.names.insert(to.to_owned(), moved);
        if let Some(over) = over.filter(|_| mode == RenameMode::Exchange) {
            self.now.names.insert(from.to_owned(), over);
        } else if over.is_some() {
            // Its content came first.
            self.now.promised_files.insert(moved);
        }
        self.note();
    }

    fn checkpoint(&mut self) {
        self.machine.store.checkpoint().unwrap();
        self.note();
    }

    /// What a few seconds bring about.
    fn flush(&mut self) {
        self.machine.store.sync_all().unwrap();
        let all = self.steps.iter().flat_map(|step| step.names.keys());
        self.now.promised_names.extend(all.cloned());
        self.now.promised_files.extend(0..self.files.len());
        self.files.iter_mut().for_each(|file| file.named = true);
        self.note();
    }

    fn check(&self, name: &str) {
        let trace = self.backing.trace();
        let mut states = 0;
        let options = Options { budget: 12, ..Options::default() };
        for cut in 0..=trace.len() {
            for crash in trace.crashes(cut, &options) {
                // Every fifth as somebody would who only reads.
                let after = mount_as(trace.materialise(&crash), states % 5 == 4);
                if let Err(error) = self.judge(cut, &after) {
                    panic!("{name}: {error} after\n{}{crash:?}", trace.describe(cut));
                }
                states += 1;
            }
        }
        assert!(states > trace.len(), "{name}: {states} of {}", trace.len());
        self.no_plaintext(&trace);
    }

    fn judge(&self, cut: usize, after: &Machine) -> Result<(), String> {
        let begun = self.steps.iter().position(|step| step.position > cut);
        let last = begun.unwrap_or(self.steps.len() - 1);
        let since = |promised: &dyn Fn(&Step) -> bool| {
            let mut steps = self.steps[..=last].iter();
            let first = steps.rposition(|step| step.position <= cut && promised(step));
            &self.steps[first.unwrap_or(0)..=last]
        };
        let paths: BTreeSet<&String> = self.steps.iter().flat_map(|s| s.names.keys()).collect();
        for path in paths {
            let found = content(after, path)?;
            let mut allowed = since(&|step| step.promised_names.contains(path)).iter();
            let right = allowed.any(|step| match (step.names.get(path), &found) {
                (None, None) => true,
                (Some(file), Some(found)) => {
                    let mut contents = since(&|step| step.promised_files.contains(file)).iter();
                    contents.any(|step| step.contents.get(*file) == Some(found))
                }
                _ => false,
            });
            if !right {
                return Err(format!("{path:?} is {:?}", found.map(String::from_utf8)));
            }
        }
        self.look_through(after)
    }

    fn look_through(&self, after: &Machine) -> Result<(), String> {
        for dir in self.dirs.keys() {
            let Some(node) = node_of(after, dir)? else { continue };
            let listed = list(&after.fs, node, 3, Plus::No).map_err(|e| format!("{dir}: {e}"))?;
            for name in listed.names.into_iter().filter(|name| name != "." && name != "..") {
                let path = if dir.is_empty() { name } else { format!("{dir}/{name}") };
                let unborn = after.fs.read_only();
                if !self.dirs.contains_key(&path) && content(after, &path)?.is_none() && !unborn {
                    return Err(format!("{path} is listed, and is not there"));
                }
            }
        }
        match after.events.0.lock().first() {
            Some(event) => Err(format!("{event:?}")),
            None => Ok(()),
        }
    }

    /// Neither names nor contents are on the disk as they are.
    fn no_plaintext(&self, trace: &Trace) {
        let contents = self.steps.iter().flat_map(|step| step.contents.iter().cloned());
        let names = self.steps.iter().flat_map(|step| step.names.keys());
        let names = names.map(|name| split(name).1.as_bytes().to_vec());
        // Shorter ones may be there by chance.
        for canary in contents.chain(names).filter(|canary| canary.len() >= 8) {
            let found = trace.brings(|bytes| memchr::memmem::find(bytes, &canary).is_some());
            assert!(!found, "{:?} is on the disk", String::from_utf8_lossy(&canary));
        }
    }
}

fn node_of(machine: &Machine, path: &str) -> Result<Option<u64>, String> {
    let mut node = ROOT;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        node = match machine.fs.lookup(node, name.as_bytes()) {
            Ok(entry) => entry.node,
            Err(FsError::Os(Errno::NOENT)) => return Ok(None),
            Err(error) => return Err(format!("{path}: {error}")),
        };
    }
    Ok(Some(node))
}

fn content(machine: &Machine, path: &str) -> Result<Option<Vec<u8>>, String> {
    let Some(node) = node_of(machine, path)? else { return Ok(None) };
    let handle = machine.fs.open(node, 0, false).map_err(|error| format!("{path}: {error}"))?;
    let mut bytes = vec![0; 1000];
    let read = machine.fs.read(handle, 0, &mut bytes);
    machine.fs.release(handle);
    bytes.truncate(read.map_err(|error| format!("{path}: {error}"))?);
    Ok(Some(bytes))
}

#[test]
fn a_file_that_is_made_and_never_written() {
    let mut script = Script::new();
    let file = script.create("empty", "");
    script.close(file);
    script.forget(file);
    script.fsync_dir("");
    script.create("another", "");
    script.check("made");
}

#[test]
fn a_file_in_new_directories() {
    let mut script = Script::new();
    script.mkdir("d");
    script.mkdir("d/e");
    let first = script.create("d/e/first", "the content of the first");
    script.fsync(first);
    let second = script.create("d/e/second", "the content of the second");
    script.fdatasync(second);
    script.create("d/e/third", "");
    script.fsync_dir("d/e");
    script.check("directories");
}

#[test]
fn a_file_that_replaces_another() {
    let mut script = Script::new();
    let old = script.create("table", "the old content");
    script.fsync(old);
    script.fsync_dir("");
    let new = script.create("table.tmp", "the new content");
    script.close(new);
    script.forget(new);
    script.rename("table.tmp", "table", RenameMode::Replace);
    let newer = script.create("table.tmp", "newer content");
    script.fsync(newer);
    script.rename("table.tmp", "table", RenameMode::Replace);
    script.fsync_dir("");
    // One that has nothing in it.
    let nothing = script.create("table.tmp", "");
    script.close(nothing);
    script.forget(nothing);
    script.rename("table.tmp", "table", RenameMode::Replace);
    script.check("replaced");
}

#[test]
fn two_that_change_places() {
    let mut script = Script::new();
    let (a, b) = (script.create("a", "the one content"), script.create("b", "the other content"));
    script.fsync(a);
    script.rename("a", "b", RenameMode::Exchange);
    script.fsync(b);
    script.fsync_dir("");
    script.rename("b", LONG, RenameMode::NoReplace);
    script.rename(LONG, "a", RenameMode::Exchange);
    script.fsync_dir("");
    script.check("exchanged");
}

#[test]
fn files_that_are_unlinked_while_they_are_open() {
    let mut script = Script::new();
    let gone = script.create("gone", "of one that goes");
    let stays = script.create("stays", "of one that stays");
    script.fsync(gone);
    script.fsync(stays);
    script.unlink("gone");
    script.write(gone, "written without a name");
    script.fsync(gone);
    script.checkpoint();
    script.write(gone, "and written once again");
    script.close(gone);
    script.forget(gone);
    let again = script.create("gone", "another file of that name");
    script.write(stays, "something else");
    script.fsync(stays);
    script.checkpoint();
    script.fsync(again);
    script.fsync_dir("");
    script.check("unlinked");
}

#[test]
fn files_that_get_their_name_late() {
    let mut script = Script::new();
    let early = script.unnamed("flushed before it has a name");
    script.fsync(early);
    script.link(early, "early");
    script.fsync(early);
    let late = script.unnamed("not flushed before that");
    script.link(late, "late");
    script.flush();
    let never = script.unnamed("never has a name at all");
    script.fsync(never);
    script.close(never);
    script.forget(never);
    script.check("late");
}

#[test]
fn hard_links() {
    let mut script = Script::new();
    script.mkdir("d");
    script.mkdir("e");
    script.flush();
    let file = script.create("d/one", "of all names");
    script.link(file, "e/two");
    script.fsync(file);
    script.unlink("e/two");
    script.fsync_dir("e");
    script.link(file, "three");
    script.unlink("d/one");
    script.fsync_dir("d");
    script.write(file, "something new");
    script.fsync_dir("");
    script.check("links");
}

#[test]
fn long_names() {
    let mut script = Script::new();
    let file = script.create(LONG, "of a long name");
    script.fsync(file);
    script.rename(LONG, LONGER, RenameMode::NoReplace);
    script.fsync_dir("");
    script.link(file, LONG);
    script.unlink(LONGER);
    script.create(LONGER, "another of that name");
    script.unlink(LONG);
    script.fsync_dir("");
    script.check("long");
}

#[test]
fn a_file_that_has_lost_the_name_it_was_seen_with_last() {
    let mut script = Script::new();
    script.mkdir("d");
    script.mkdir("e");
    script.flush();
    let file = script.create("d/one", "of the one that stays");
    script.link(file, "e/two");
    script.unlink("e/two");
    script.fdatasync(file);
    script.check("unlinked");

    let mut script = Script::new();
    script.mkdir("d");
    script.mkdir("e");
    let other = script.create("e/other", "of another");
    script.flush();
    let file = script.create("d/one", "of the one that stays");
    script.link(file, "e/two");
    script.rename("e/other", "e/two", RenameMode::Replace);
    script.fdatasync(file);
    script.fdatasync(other);
    script.check("replaced");
}
