//! Rotating the data encryption keys of a volume's files, or of some of them, while they are used.
//!
//! What is wanted is a file in the volume's root ([`Job`]), so that a rotation goes on after a
//! crash. How far it has come stands in the headers of the files themselves: a file is done when
//! its one key was made after the job began. So nothing here can be out of step with the files.
//!
//! What this does not do: it starts no thread and speaks to nobody; `daemon` does.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::backing::{Access, FileKind, NodeRef, small_file};
use crate::error::{Context, Error, FsError, FsResult, Kind, Result};
use crate::store::{File, Store};

pub type FileId = [u8; 16];

const FILE: &[u8] = b"rotation.json";
const NEW_FILE: &[u8] = b"rotation.new.json";

const FORMAT: u32 = 1;
/// A million files.
const SIZE_LIMIT: u64 = 64 << 20;

/// Whether a file of the volume's root has this name; with `leftover`, one that a crash leaves.
pub fn is_root_name(name: &[u8], leftover: bool) -> bool {
    name == if leftover { NEW_FILE } else { FILE }
}

/// So many files, or so many bytes, share the checkpoints of one step.
const BATCH_FILES: usize = 128;
const BATCH_BYTES: u64 = 1 << 30;
/// Files that move while the tree is walked may be missed: it is walked again.
const WALKS: usize = 4;
/// How often somebody who waits looks whether to stop.
const STEP: Duration = Duration::from_millis(100);

/// What is to be rotated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Keys made by then are to be replaced; seconds since the epoch.
    pub before: u64,
    /// None: every file.
    pub files: Option<Vec<FileId>>,
    /// Bytes of plaintext a second; 0 for as many as go.
    pub rate: u64,
    /// Stopped by somebody, until somebody goes on with it.
    pub paused: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: u32,
    before: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    files: Option<Vec<String>>,
    rate: u64,
    paused: bool,
}

impl Job {
    /// The unfinished one of the volume with this root.
    pub fn load(root: &NodeRef) -> Result<Option<Job>> {
        let json = match small_file::read(root, FILE, SIZE_LIMIT) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            json => json.context(|| "cannot read rotation.json".to_owned())?,
        };
        Job::from_json(&json).map(Some)
    }

    fn from_json(json: &[u8]) -> Result<Job> {
        let bad = |why: &str| {
            Error::corrupt(format!(
                "rotation.json, the list of an unfinished rotation, is damaged ({why}): remove it \
                 from the backing directory, and begin another one with `byokfs rotate dek`"
            ))
        };
        let document: Document =
            serde_json::from_slice(json).map_err(|error| bad(&error.to_string()))?;
        let Document { format, before, files, rate, paused } = document;
        if format != FORMAT {
            let message = format!("rotation.json has format {format}; this version knows {FORMAT}");
            return Err(Error::new(Kind::Unsupported, message));
        }
        let files = files.map(|files| files.iter().map(|id| parse_id(id)).collect());
        let files = match files {
            Some(None) => return Err(bad("malformed file id")),
            Some(ids) => ids,
            None => None,
        };
        Ok(Job { before, files, rate, paused })
    }

    /// Durable when this returns.
    pub fn save(&self, root: &NodeRef) -> Result<()> {
        let document = Document {
            format: FORMAT,
            before: self.before,
            files: self.files.as_ref().map(|files| files.iter().map(id_text).collect()),
            rate: self.rate,
            paused: self.paused,
        };
        let failed = || "cannot write rotation.json".to_owned();
        let json = serde_json::to_vec_pretty(&document)
            .map_err(|error| Error::new(Kind::Io, failed()).with_source(error))?;
        small_file::replace(root, NEW_FILE, FILE, &json).context(failed)
    }

    /// There is no unfinished one any more.
    pub fn remove(root: &NodeRef) -> Result<()> {
        let failed = || "cannot remove rotation.json".to_owned();
        small_file::remove_if_there(root, FILE).context(failed)?;
        root.sync().context(failed)
    }
}

pub fn id_text(id: &FileId) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn parse_id(text: &str) -> Option<FileId> {
    let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits.then(|| u128::from_str_radix(text, 16).ok()).flatten().map(u128::to_be_bytes)
}

/// How far a rotation is. Bytes are of plaintext.
#[derive(Debug, Default)]
pub struct Progress {
    pub files: AtomicU64,
    pub files_done: AtomicU64,
    pub bytes: AtomicU64,
    pub bytes_done: AtomicU64,
    /// Blocks sealed again.
    pub blocks: AtomicU64,
    /// Keys destroyed.
    pub destroyed: AtomicU64,
    /// Files that keep an old key, since something in them cannot be read.
    pub damaged: AtomicU64,
}

impl Progress {
    fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }
}

/// What the one who started it may change while it runs.
#[derive(Debug, Default)]
pub struct Control {
    pub stop: AtomicBool,
    /// As [`Job::rate`].
    pub rate: AtomicU64,
}

/// Is told of each batch of files whose old keys are gone for good, with how many they were.
pub type Destroyed<'a> = dyn Fn(&[FileId], u64) + 'a;

/// How a rotation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Nothing is left to do, but for files that are damaged.
    Done,
    Stopped,
}

/// Does what is left of the job. An error leaves it to be gone on with.
pub fn run(
    store: &Store,
    job: &Job,
    progress: &Progress,
    control: &Control,
    destroyed: &Destroyed<'_>,
) -> FsResult<End> {
    let wanted = job.files.as_ref().map(|files| files.iter().copied().collect());
    let mut work = Work {
        store,
        before: job.before,
        wanted,
        progress,
        control,
        destroyed,
        hopeless: HashSet::new(),
        throttle: Throttle::default(),
    };
    work.count()?;
    for _ in 0..WALKS {
        match work.walk()? {
            ControlFlow::Break(()) => return Ok(End::Stopped),
            ControlFlow::Continue(0) => break,
            ControlFlow::Continue(_) => {}
        }
    }
    progress.damaged.store(work.hopeless.len() as u64, Ordering::Relaxed);
    Ok(End::Done)
}

/// The ids of the files that have these inodes, or lie below directories that do, as a [`Job`] wants
/// them: None where that is all of them.
pub fn files_at(store: &Store, inodes: &[u64]) -> FsResult<Option<Vec<FileId>>> {
    let tree = store.tree();
    if inodes.contains(&tree.id().ino) {
        return Ok(None);
    }
    let mut ids = HashSet::new();
    let chosen = |ino: u64| inodes.contains(&ino);
    let _to_the_end = visit(store, &chosen, &mut |file| {
        ids.insert(file.file_id());
        Ok(ControlFlow::Continue(()))
    })?;
    let mut ids: Vec<FileId> = ids.into_iter().collect();
    ids.sort_unstable();
    Ok(Some(ids))
}

fn all(_inode: u64) -> bool {
    true
}

struct Work<'a> {
    store: &'a Store,
    before: u64,
    wanted: Option<HashSet<FileId>>,
    progress: &'a Progress,
    control: &'a Control,
    destroyed: &'a Destroyed<'a>,
    /// Files that cannot be brought to one key.
    hopeless: HashSet<FileId>,
    throttle: Throttle,
}

impl Work<'_> {
    fn count(&mut self) -> FsResult<()> {
        let (mut files, mut bytes) = (0, 0);
        let _to_the_end = visit(self.store, &all, &mut |file| {
            if self.is_left(&file) {
                files += 1;
                bytes += file.size();
            }
            Ok(ControlFlow::Continue(()))
        })?;
        // Where it goes on after a cut-off, some is done.
        let Progress { files_done, bytes_done, .. } = self.progress;
        files += files_done.load(Ordering::Relaxed);
        bytes += bytes_done.load(Ordering::Relaxed);
        self.progress.files.store(files, Ordering::Relaxed);
        self.progress.bytes.store(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn is_left(&self, file: &File) -> bool {
        let id = file.file_id();
        self.wanted.as_ref().is_none_or(|wanted| wanted.contains(&id))
            && !self.hopeless.contains(&id)
            && self.store.needs_rotation(file, self.before)
    }

    /// Through the tree once; how many files there were to do.
    fn walk(&mut self) -> FsResult<ControlFlow<(), usize>> {
        let store = self.store;
        let (mut batch, mut bytes, mut found) = (Vec::new(), 0, 0);
        let ended = visit(store, &all, &mut |file| {
            if !self.is_left(&file) || batch.iter().any(|known| Arc::ptr_eq(known, &file)) {
                return Ok(ControlFlow::Continue(()));
            }
            found += 1;
            bytes += file.size();
            batch.push(file);
            if batch.len() < BATCH_FILES && bytes < BATCH_BYTES {
                return Ok(ControlFlow::Continue(()));
            }
            bytes = 0;
            self.rotate(std::mem::take(&mut batch))
        })?;
        let ended = if ended.is_continue() { self.rotate(batch)? } else { ended };
        Ok(match ended {
            ControlFlow::Continue(()) => ControlFlow::Continue(found),
            ControlFlow::Break(()) => ControlFlow::Break(()),
        })
    }

    fn rotate(&mut self, files: Vec<Arc<File>>) -> FsResult<ControlFlow<()>> {
        if files.is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        let (control, progress, throttle) = (self.control, self.progress, &mut self.throttle);
        let mut pace = |bytes| {
            Progress::add(&progress.bytes_done, bytes);
            throttle.wait(bytes, control)
        };
        let Some(rotated) = self.store.rotate_deks(&files, self.before, &mut pace)? else {
            return Ok(ControlFlow::Break(()));
        };
        let mut gone = Vec::new();
        let mut keys = 0;
        for (file, rotated) in files.iter().zip(rotated) {
            Progress::add(&progress.files_done, 1);
            Progress::add(&progress.blocks, rotated.blocks);
            if rotated.damaged > 0 {
                self.hopeless.insert(file.file_id());
                progress.damaged.store(self.hopeless.len() as u64, Ordering::Relaxed);
            }
            if rotated.destroyed > 0 {
                gone.push(file.file_id());
                keys += rotated.destroyed;
            }
        }
        Progress::add(&progress.destroyed, keys);
        if !gone.is_empty() {
            (self.destroyed)(&gone, keys);
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// Shows every file of the tree that is chosen by its inode or by that of a directory above it, in
/// no order. One that is removed meanwhile, or whose header cannot be read, is left out.
fn visit(
    store: &Store,
    chosen: &dyn Fn(u64) -> bool,
    show: &mut dyn FnMut(Arc<File>) -> FsResult<ControlFlow<()>>,
) -> FsResult<ControlFlow<()>> {
    let mut directories = vec![(store.tree(), false)];
    while let Some((directory, inherited)) = directories.pop() {
        let Some(mut entries) = there(directory.read_dir())? else { continue };
        while let Some(entry) = there(entries.next_entry())?.flatten() {
            let looked = |kind: FileKind| entry.kind.is_none_or(|said| said == kind);
            if !looked(FileKind::Regular) && !looked(FileKind::Directory) {
                continue;
            }
            let Some(node) = there(directory.lookup(&entry.name))? else { continue };
            let wanted = inherited || chosen(node.id().ino);
            match there(node.metadata())?.map(|metadata| metadata.kind) {
                Some(FileKind::Directory) => directories.push((node, wanted)),
                Some(FileKind::Regular) if wanted => {
                    let Some(opened) = there(node.open(Access::ReadWrite))? else { continue };
                    match store.open_file(opened) {
                        Ok(file) => {
                            if show(file)?.is_break() {
                                return Ok(ControlFlow::Break(()));
                            }
                        }
                        // Not a file of the volume, or one that nobody can read.
                        Err(FsError::Integrity(failure)) => log::debug!("left out: {failure:?}"),
                        Err(error) => return Err(error),
                    }
                }
                _ => {}
            }
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// None for what was removed meanwhile.
fn there<T>(found: std::io::Result<T>) -> FsResult<Option<T>> {
    match found {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ESTALE) => Ok(None),
        found => Ok(Some(found?)),
    }
}

/// Spreads work over time.
#[derive(Debug, Default)]
struct Throttle {
    /// When the last piece began, and how long it is in bytes: at which rate, may change meanwhile.
    last: Option<(Instant, u64)>,
}

impl Throttle {
    /// Waits until `bytes` more may be done.
    fn wait(&mut self, bytes: u64, control: &Control) -> ControlFlow<()> {
        loop {
            if control.stop.load(Ordering::Acquire) {
                return ControlFlow::Break(());
            }
            let rate = control.rate.load(Ordering::Relaxed);
            let left = self.last.map_or(Duration::ZERO, |(begun, bytes)| {
                let pause = bytes.saturating_mul(1_000_000).checked_div(rate).unwrap_or(0);
                Duration::from_micros(pause).saturating_sub(begun.elapsed())
            });
            if left.is_zero() {
                self.last = Some((Instant::now(), bytes));
                return ControlFlow::Continue(());
            }
            std::thread::sleep(STEP.min(left));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Backing;
    use crate::backing::linux::LinuxBacking;
    use crate::crypto::secret::Secret;
    use crate::key::gate::{BootTime, Gate, Keyring};
    use crate::store::{Durability, FormatOptions};
    use std::cell::RefCell;

    struct Volume {
        dir: tempfile::TempDir,
        store: Arc<Store>,
    }

    fn keyring() -> Keyring {
        Keyring::new(1, Secret::new_with(|key| key.fill(9)).unwrap())
    }

    fn open(dir: &std::path::Path) -> Arc<Store> {
        let gate = Gate::new();
        let backing = LinuxBacking::open(dir).unwrap();
        let store = Store::open(backing, Arc::clone(&gate), false).unwrap();
        store.start_session(&keyring()).unwrap();
        assert!(gate.open(keyring(), BootTime::now() + Duration::from_secs(600)));
        store.recover().unwrap();
        store
    }

    impl Volume {
        fn new() -> Volume {
            let dir = tempfile::tempdir().unwrap();
            let backing = LinuxBacking::open(dir.path()).unwrap();
            let options = FormatOptions { log_size: Some(12 << 20), ..FormatOptions::default() };
            Store::format(&*backing, &keyring(), options).unwrap();
            let store = open(dir.path());
            Volume { dir, store }
        }

        fn reopen(self) -> Volume {
            drop(self.store);
            Volume { store: open(self.dir.path()), dir: self.dir }
        }

        fn file(&self, directory: &NodeRef, name: &str, blocks: usize) -> Arc<File> {
            let backing = directory.create_unnamed().unwrap();
            let file = self.store.create_file(Arc::clone(&backing)).unwrap();
            directory.link_file(&*backing, name.as_bytes()).unwrap();
            file.write_at(&vec![3; blocks * 4096], 0, Durability::default()).unwrap();
            file
        }

        fn left(&self, before: u64) -> usize {
            let mut left = 0;
            let mut count = |file: Arc<File>| {
                left += usize::from(self.store.needs_rotation(&file, before));
                Ok(ControlFlow::Continue(()))
            };
            assert!(visit(&self.store, &all, &mut count).unwrap().is_continue());
            left
        }
    }

    fn job(before: u64) -> Job {
        Job { before, files: None, rate: 0, paused: false }
    }

    /// Later than any key of these tests was made.
    const LATER: u64 = 1 << 40;

    #[test]
    fn every_file_of_the_tree_or_those_that_were_named() {
        let volume = Volume::new();
        let tree = volume.store.tree();
        let deep = tree.mkdir(b"one", 0o700).unwrap().mkdir(b"two", 0o700).unwrap();
        for i in 0..BATCH_FILES + 20 {
            volume.file(if i % 2 == 0 { &tree } else { &deep }, &format!("f{i}"), i % 3);
        }
        let named = volume.file(&deep, "named", 200);
        tree.link_node(&*named.backing().node().unwrap(), b"again").unwrap();
        tree.symlink(b"link", b"x").unwrap();
        std::fs::write(volume.dir.path().join("tree/foreign"), "not a file of the volume").unwrap();
        let all = BATCH_FILES + 22;

        let (progress, control) = (Progress::default(), Control::default());
        let told = RefCell::new(Vec::new());
        let destroyed = |files: &[FileId], keys| told.borrow_mut().push((files.to_vec(), keys));
        let one = Job { files: Some(vec![named.file_id()]), ..job(LATER) };
        assert_eq!(volume.left(LATER), all);
        let end = run(&volume.store, &one, &progress, &control, &destroyed).unwrap();
        assert_eq!(end, End::Done);
        assert_eq!(*told.borrow(), [(vec![named.file_id()], 1)]);
        assert_eq!(progress.blocks.load(Ordering::Relaxed), 200);
        assert_eq!(volume.left(LATER), all - 2, "it has two names");

        told.borrow_mut().clear();
        let progress = Progress::default();
        let end = run(&volume.store, &job(LATER), &progress, &control, &destroyed).unwrap();
        assert_eq!((end, volume.left(LATER)), (End::Done, 0));
        assert_eq!(progress.files_done.load(Ordering::Relaxed), all as u64 - 2);
        assert_eq!(told.borrow().iter().map(|(_, keys)| keys).sum::<u64>(), all as u64 - 2);
        drop(named);
        assert_eq!(volume.reopen().left(LATER), 0);
    }

    #[test]
    fn directories_that_go_meanwhile_are_left_out() {
        let volume = Volume::new();
        let tree = volume.store.tree();
        for name in ["one", "two"] {
            let directory = tree.mkdir(name.as_bytes(), 0o700).unwrap();
            volume.file(&directory, "f", 1);
        }
        let path = volume.dir.path().join("tree");
        let mut shown = 0;
        // Whichever comes first: the other one waits for its turn, and its own is being read.
        let ended = visit(&volume.store, &all, &mut |_| {
            shown += 1;
            for name in ["one", "two"] {
                std::fs::remove_dir_all(path.join(name)).unwrap();
            }
            Ok(ControlFlow::Continue(()))
        });
        assert!(ended.unwrap().is_continue());
        assert_eq!(shown, 1);
    }

    #[test]
    fn it_can_be_stopped_and_gone_on_with() {
        let volume = Volume::new();
        let tree = volume.store.tree();
        for i in 0..5 {
            volume.file(&tree, &format!("f{i}"), 300);
        }
        let (progress, control) = (Progress::default(), Control::default());
        control.rate.store(1 << 20, Ordering::Relaxed);
        let end = std::thread::scope(|scope| {
            let run = scope.spawn(|| {
                run(&volume.store, &job(LATER), &progress, &control, &|_, _| {}).unwrap()
            });
            while progress.bytes_done.load(Ordering::Relaxed) == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            control.stop.store(true, Ordering::Release);
            run.join().unwrap()
        });
        assert_eq!((end, volume.left(LATER)), (End::Stopped, 5));
        let volume = volume.reopen();
        let end =
            run(&volume.store, &job(LATER), &Progress::default(), &Control::default(), &|_, _| {});
        assert_eq!((end.unwrap(), volume.left(LATER)), (End::Done, 0));
    }

    #[test]
    fn small_files_count_for_what_they_hold() {
        let volume = Volume::new();
        let tree = volume.store.tree();
        for i in 0..20 {
            volume.file(&tree, &format!("f{i}"), 3);
        }
        volume.file(&tree, "empty", 0);
        volume.file(&tree, "large", 1000);
        let (progress, control) = (Progress::default(), Control::default());
        run(&volume.store, &job(LATER), &progress, &control, &|_, _| {}).unwrap();
        let bytes = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        assert_eq!(bytes(&progress.bytes), 1060 * 4096);
        assert_eq!(bytes(&progress.bytes_done), 1060 * 4096);
    }

    /// As after a cut-off.
    #[test]
    fn one_that_goes_on_counts_on() {
        let volume = Volume::new();
        let tree = volume.store.tree();
        let first = volume.file(&tree, "first", 5);
        for i in 0..3 {
            volume.file(&tree, &format!("f{i}"), 1);
        }
        let (progress, control) = (Progress::default(), Control::default());
        let one = Job { files: Some(vec![first.file_id()]), ..job(LATER) };
        for job in [one, job(LATER)] {
            run(&volume.store, &job, &progress, &control, &|_, _| {}).unwrap();
        }
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        assert_eq!((get(&progress.files), get(&progress.files_done)), (4, 4));
        assert_eq!(get(&progress.bytes), get(&progress.bytes_done));
    }

    #[test]
    fn another_rate_holds_at_once() {
        let (mut throttle, control) = (Throttle::default(), Control::default());
        // A piece is due in 31 years, and then in 31 milliseconds.
        control.rate.store(1, Ordering::Relaxed);
        assert!(throttle.wait(1_000_000_000, &control).is_continue());
        std::thread::scope(|scope| {
            let next = scope.spawn(|| throttle.wait(1, &control));
            control.rate.store(32_000_000_000, Ordering::Relaxed);
            let limit = Instant::now() + Duration::from_secs(60);
            while !next.is_finished() && Instant::now() < limit {
                std::thread::sleep(Duration::from_millis(5));
            }
            control.stop.store(true, Ordering::Release);
            assert!(next.join().unwrap().is_continue());
        });
    }

    #[test]
    fn a_damaged_file_is_counted_and_the_rest_is_done() {
        let volume = Volume::new();
        let tree = volume.store.tree();
        volume.file(&tree, "good", 10);
        volume.file(&tree, "bad", 10);
        volume.store.checkpoint().unwrap();
        let path = volume.dir.path().join("tree/bad");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[16_384 + 5000] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let (progress, control) = (Progress::default(), Control::default());
        let end = run(&volume.store, &job(LATER), &progress, &control, &|_, _| {}).unwrap();
        assert_eq!((end, volume.left(LATER)), (End::Done, 1));
        assert_eq!(progress.damaged.load(Ordering::Relaxed), 1);
        assert_eq!(progress.destroyed.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_list_survives_and_nonsense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = LinuxBacking::open(dir.path()).unwrap().root();
        assert_eq!(Job::load(&root).unwrap(), None);
        let some = Job { before: 5, files: Some(vec![[7; 16], [0; 16]]), rate: 1, paused: true };
        for job in [&some, &job(9)] {
            job.save(&root).unwrap();
            assert_eq!(Job::load(&root).unwrap().as_ref(), Some(job));
        }
        for text in ["", "{}", r#"{"format":2,"before":1,"rate":0,"paused":false}"#] {
            std::fs::write(dir.path().join("rotation.json"), text).unwrap();
            assert!(Job::load(&root).is_err(), "{text}");
        }
        let odd = r#"{"format":1,"before":1,"rate":0,"paused":false,"files":["+1"]}"#;
        std::fs::write(dir.path().join("rotation.json"), odd).unwrap();
        assert_eq!(Job::load(&root).unwrap_err().kind, Kind::Corrupt);
        Job::remove(&root).unwrap();
        Job::remove(&root).unwrap();
        assert_eq!(Job::load(&root).unwrap(), None);
    }
}
