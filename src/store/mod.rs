//! The file format: plaintext files of any size over authenticated ciphertext.
//!
//! `docs/FORMAT.md` gives the bytes. A [`Store`] is one opened volume below the name layer: it
//! turns backing files into plaintext [`File`]s, and knows nothing of names, owners and modes.
//! It sees keys only through the leases of the gate, and holds one only while a cipher works,
//! never across I/O.
//!
//! Every change goes through the [`intent_log`]: what is acknowledged survives the daemon, and, from
//! the flush on that was asked for, a power cut. [`recovery`] puts what the log holds back into
//! force; the [`checkpointer`] brings it to the files.

mod block;
mod cache;
mod checkpointer;
mod file;
mod header;
mod intent_log;
mod keys;
mod layout;
mod log_change;
mod log_place;
pub mod lost;
mod newborn;
mod page;
mod range_lock;
mod recovery;
mod registry;
mod rotation;
mod session;
mod sleeper;
mod times;
pub mod verify;
mod volume;
mod volume_key;

use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use parking_lot::RwLock;
use rustix::io::Errno;

pub use file::{Durability, File, Times};
pub use intent_log::PendingFlush;
use intent_log::Usage;
pub use layout::{BLOCK_LEN, MAX_SIZE};
pub use recovery::Recovery;
pub use rotation::{Pace, Rotated};
pub use volume_key::Adopted;

use self::cache::{BufferPool, PageCache};
use self::checkpointer::{Background, Checkpointer, DirtyFiles};
use self::header::{DekSlot, Header, HeaderError};
use self::intent_log::{Log, Proof, Scope, Size as LogSize};
use self::keys::{KeySource, Keys, hex};
use self::layout::HEADERS_LEN;
use self::newborn::Newborn;
use self::registry::Registry;
use self::rotation::Retired;
use self::session::{Salt, SessionEntry, SessionTable};
use self::times::SettledTimes;
use self::volume::VolumeHeader;
use crate::backing::{Access, Backing, FileKind, FileRef, Metadata, NodeId, NodeRef, SetTime};
use crate::crypto::nonce::Counter;
use crate::crypto::random;
use crate::crypto::secret::Secret;
use crate::error::{Context, Error, FsError, FsResult, Kind, Result};
use crate::key::gate::{Gate, Keyring, Wipe};
use crate::sync::Mutex;

pub const FORMAT_VERSION: u32 = 1;
/// Names are stored as they are, not encrypted.
pub const FEATURE_PLAINTEXT_NAMES: u64 = 1 << 0;

const TREE: &[u8] = b"tree";
const LOCK: &[u8] = b"lock";
/// Tag pages of 4 GiB of hot plaintext.
const PAGE_CACHE_BYTES: usize = 36 << 20;

/// What a volume says about itself without its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeInfo {
    pub uuid: [u8; 16],
    pub format: u32,
    pub features: u64,
    /// Seconds since the epoch.
    pub created: u64,
    /// One of the two copies of the volume header is damaged; the other served.
    pub damaged_copy: bool,
}

/// How a volume is to be made; it stays so.
#[derive(Clone, Copy, Debug, Default)]
pub struct FormatOptions {
    /// File names go to the disk as they are.
    pub plaintext_names: bool,
    /// Bytes of the intent log in all; None for [`default_log_size`].
    pub log_size: Option<u64>,
}

/// The smallest intent log, in all; a smaller one that is asked for becomes this.
pub const MIN_LOG_SIZE: u64 = 2 * LogSize::MIN;

/// 256 MiB, or an eighth of the space there is, if that is less.
fn default_log_size(backing: &dyn Backing) -> std::io::Result<u64> {
    let space = backing.statfs()?;
    Ok((space.blocks_available * space.block_size / 8).clamp(MIN_LOG_SIZE, 256 << 20))
}

/// How full the intent log is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogStatus {
    /// Bytes in use and in all, of the stream that is fuller.
    pub used: u64,
    pub capacity: u64,
    pub dirty_files: usize,
    pub checkpoints: u64,
    /// Why the volume takes no more writes until it is mounted again.
    pub poisoned: Option<String>,
    /// Why the last checkpoint failed.
    pub checkpoint_failure: Option<String>,
}

/// From one start to the next one, or to the end of the daemon.
#[derive(Debug)]
struct Session {
    counter: Counter,
    entry: SessionEntry,
}

/// What the files of a volume have in common.
struct Shared {
    gate: Arc<Gate>,
    backing: Arc<dyn Backing>,
    volume: [u8; 16],
    log_id: [u8; 16],
    read_only: bool,
    keys: Keys,
    pages: PageCache,
    buffers: BufferPool,
    sessions: RwLock<SessionTable>,
    session: RwLock<Option<Arc<Session>>>,
    log: OnceLock<Arc<Log>>,
    dirty: DirtyFiles,
    checkpointer: Checkpointer,
    settled_times: SettledTimes,
    newborn: Newborn,
    unborn: OnceLock<HashSet<NodeId>>,
    registry: Registry,
    retired: Retired,
    /// The daemon before this one did not come to its end. Of a header that was written as its file was
    /// made, and not since, it may know that the kernel could not write it, which shows it still: nothing
    /// may rest on it before it is written again.
    after_crash: AtomicBool,
    cache_ids: AtomicU64,
}

impl Shared {
    fn next_cache_id(&self) -> u64 {
        self.cache_ids.fetch_add(1, Ordering::Relaxed)
    }

    fn salt(&self, session: u32) -> Option<Salt> {
        self.sessions.read().get(session).map(|entry| entry.salt)
    }

    fn session(&self) -> FsResult<Arc<Session>> {
        self.session.read().clone().ok_or_else(|| Errno::ROFS.into())
    }

    fn forget(&self, node: NodeId) {
        self.registry.forget(node);
    }

    fn log(&self) -> FsResult<&Arc<Log>> {
        self.log.get().ok_or_else(|| Errno::IO.into())
    }

    fn read_header(&self, file: &FileRef) -> FsResult<Header> {
        let mut pages = [0; HEADERS_LEN as usize];
        file.read_at(&mut pages, 0)?;
        let lease = self.gate.lease()?;
        let keys = self.keys.header_macs(&lease)?;
        let decoded = match Header::decode(&pages, &self.volume, &keys) {
            Ok(decoded) => decoded,
            Err(_) if self.is_unborn(file)? => return Err(Errno::NOENT.into()),
            Err(error) => {
                let detail = match error {
                    HeaderError::Damaged => "neither copy of the file header is authentic",
                    HeaderError::Unsupported => "the file header is of a format not known here",
                };
                return Err(FsError::integrity("header", "", None, detail));
            }
        };
        lease.still_open()?;
        if decoded.damaged_copy {
            log::warn!(
                "file {}: one copy of its header is damaged; the other serves, and the next \
                 change of size restores both",
                hex(&decoded.header.file_id)
            );
        }
        Ok(decoded.header)
    }

    /// A crash has left its name and nothing else, which a read-only mount cannot move away.
    fn is_unborn(&self, file: &FileRef) -> FsResult<bool> {
        let Some(unborn) = self.unborn.get() else { return Ok(false) };
        Ok(unborn.contains(&file.metadata()?.id))
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("Shared");
        f.field("volume", &hex(&self.volume)).field("read_only", &self.read_only);
        f.finish_non_exhaustive()
    }
}

impl Wipe for Shared {
    fn wipe(&self) {
        self.keys.wipe();
        self.buffers.wipe();
    }
}

/// Keeps every other user of a volume out while it lives.
pub type VolumeLock = Box<dyn fmt::Debug + Send + Sync>;

/// An opened volume below the name layer.
#[derive(Debug)]
pub struct Store {
    backing: Arc<dyn Backing>,
    root: NodeRef,
    tree: NodeRef,
    header: VolumeHeader,
    info: VolumeInfo,
    shared: Arc<Shared>,
    /// Found at the start of the first session, for [`Store::recover`].
    found: Mutex<Option<intent_log::Found>>,
    /// What the log held is in force, but perhaps not home.
    replayed: OnceLock<Recovery>,
    recovery: OnceLock<Recovery>,
    background: Mutex<Option<Background>>,
    /// Kept locked.
    log_places: Mutex<Vec<Arc<log_place::Place>>>,
    /// Keeps a second writer out. None where nobody can write.
    _lock: Option<VolumeLock>,
}

impl Store {
    /// Makes an empty volume in an empty directory.
    pub fn format(
        backing: &dyn Backing,
        keyring: &Keyring,
        options: FormatOptions,
    ) -> Result<VolumeInfo> {
        let shown = backing.display_path();
        let root = backing.root();
        let _lock = lock(backing)?;
        let mut entries = root.read_dir().context(|| format!("cannot read {shown}"))?;
        while let Some(entry) = entries.next_entry().context(|| format!("cannot read {shown}"))? {
            if entry.name != LOCK {
                return Err(Error::new(
                    Kind::Busy,
                    format!("{shown} is not empty; a volume is made in an empty directory"),
                ));
            }
        }
        let features = if options.plaintext_names { FEATURE_PLAINTEXT_NAMES } else { 0 };
        let mut header = VolumeHeader::new(keyring, features, seconds_since_epoch())?;
        let pages = header.encode(keys::volume_macs(keyring)?.current().1);
        SessionTable::default().store(
            &root,
            &header.uuid,
            &keys::sessions_macs(keyring)?,
            [true, true],
            &shown,
        )?;
        let total = match options.log_size {
            Some(total) => total,
            None => default_log_size(backing).context(|| format!("cannot examine {shown}"))?,
        };
        let macs = keys::anchor_macs(keyring)?;
        let files = log_place::of_new_volume(backing);
        Log::format(&files, LogSize::of_total(total), header.log_id, &macs, true)?;
        // The header last: a directory without it is not a volume.
        let write = || -> std::io::Result<()> {
            // Its mode is that of the mount's root directory: open to its users, as any new file system.
            root.mkdir(TREE, 0o755)?.sync()?;
            let file = root.create_unnamed()?;
            file.write_at(&pages, 0)?;
            file.sync_all()?;
            root.link_file(&*file, volume::FILE)?;
            root.sync()
        };
        write().context(|| format!("cannot make a volume in {shown}"))?;
        Ok(header.info(false))
    }

    /// Whether a file of the volume's root has this name; with `leftover`, one that a change of the
    /// log has until it is complete.
    pub fn is_root_name(name: &[u8], leftover: bool) -> bool {
        if leftover {
            return name == log_place::NEW_LINK || log_place::NEW_FILES.contains(&name);
        }
        [TREE, LOCK, volume::FILE, lost::DIRECTORY, log_place::LINK].contains(&name)
            || session::FILES.contains(&name)
            || intent_log::FILES.contains(&name)
    }

    /// Needs no key and changes nothing.
    pub fn inspect(backing: &dyn Backing) -> Result<VolumeInfo> {
        let (header, damaged) = volume::read(&backing.root(), &backing.display_path())?;
        Ok(header.info(damaged))
    }

    /// Takes the writer lock. Needs no key; no file can be read before [`Store::start_session`].
    pub fn open(backing: Arc<dyn Backing>, gate: Arc<Gate>, read_only: bool) -> Result<Arc<Store>> {
        let shown = backing.display_path();
        let root = backing.root();
        // Nothing is made in what is no volume.
        volume::read(&root, &shown)?;
        let lock = match lock(&*backing) {
            Err(error) if read_only && is_read_only_fs(&error) => None,
            locked => Some(locked?),
        };
        // Again: whoever had the volume until now may have given it another log or volume key.
        let (header, damaged) = volume::read(&root, &shown)?;
        if damaged {
            log::warn!(
                "one copy of the volume header in {shown}/volume is damaged; the other serves"
            );
        }
        Store::assemble(backing, gate, read_only, (header, damaged), lock)
    }

    /// A store over a header that was read, under a lock that is held.
    fn assemble(
        backing: Arc<dyn Backing>,
        gate: Arc<Gate>,
        read_only: bool,
        (header, damaged): (VolumeHeader, bool),
        lock: Option<VolumeLock>,
    ) -> Result<Arc<Store>> {
        let root = backing.root();
        let shown = backing.display_path();
        let tree = root.lookup(TREE).context(|| format!("cannot open {shown}/tree"))?;
        let shared = Arc::new(Shared {
            gate,
            backing: backing.clone(),
            volume: header.uuid,
            log_id: header.log_id,
            read_only,
            keys: Keys::new(),
            pages: PageCache::new(PAGE_CACHE_BYTES),
            buffers: BufferPool::default(),
            sessions: RwLock::default(),
            session: RwLock::default(),
            log: OnceLock::new(),
            dirty: DirtyFiles::default(),
            checkpointer: Checkpointer::default(),
            settled_times: SettledTimes::default(),
            newborn: Newborn::default(),
            unborn: OnceLock::new(),
            registry: Registry::default(),
            retired: Retired::default(),
            after_crash: AtomicBool::new(false),
            cache_ids: AtomicU64::new(0),
        });
        let wipe: Arc<dyn Wipe> = shared.clone();
        shared.gate.register(Arc::downgrade(&wipe));
        let info = header.info(damaged);
        Ok(Arc::new(Store {
            backing,
            root,
            tree,
            header,
            info,
            shared,
            found: Mutex::default(),
            replayed: OnceLock::new(),
            recovery: OnceLock::new(),
            background: Mutex::default(),
            log_places: Mutex::default(),
            _lock: lock,
        }))
    }

    /// At mount and at each revalidation, before the gate opens: checks the volume against the
    /// key, and, unless read-only, draws the salt of a new session and makes it durable.
    pub fn start_session(&self, keyring: &Keyring) -> Result<()> {
        self.start_session_with(&KeySource::Held(keyring))
    }

    /// The same with the keys that the gate was opened with.
    pub fn start_session_by_gate(&self) -> Result<()> {
        self.start_session_with(&KeySource::Gate(&self.shared.gate))
    }

    fn start_session_with(&self, keys: &KeySource<'_>) -> Result<()> {
        let shown = self.backing.display_path();
        self.check_header(keys)?;
        let macs = keys.with(keys::sessions_macs)?;
        let uuid = &self.header.uuid;
        let (mut table, damaged) = self.load_sessions(keys)?;
        if self.recovery.get().is_none() && self.shared.log.get().is_none() {
            *self.found.lock() = Some(self.find_log(keys, &table)?);
        }
        let mut session = None;
        if !self.shared.read_only {
            let volume_key_id = keys.with(|keyring| Ok(keyring.id()))?;
            let entry = SessionEntry { salt: random::bytes()?, volume_key_id };
            let number = table.add(entry)?;
            table.store(&self.root, uuid, &macs, damaged, &shown)?;
            session = Some(Arc::new(Session { counter: Counter::new(number), entry }));
        }
        *self.shared.sessions.write() = table;
        *self.shared.session.write() = session;
        Ok(())
    }

    fn check_header(&self, keys: &KeySource<'_>) -> Result<()> {
        if self.header.is_authentic(&keys.with(keys::volume_macs)?) {
            return Ok(());
        }
        let shown = self.backing.display_path();
        Err(Error::corrupt(format!(
            "{shown}/volume was not written with this volume key; it belongs to another volume, or \
             was changed"
        )))
    }

    /// With which of its copies are damaged, or older than the other.
    fn load_sessions(&self, keys: &KeySource<'_>) -> Result<(SessionTable, [bool; 2])> {
        let shown = self.backing.display_path();
        let macs = keys.with(keys::sessions_macs)?;
        let (table, damaged) = SessionTable::load(&self.root, &self.header.uuid, &macs, &shown)?;
        if damaged.contains(&true) {
            log::warn!(
                "one copy of the session table in {shown} is damaged or out of date; the other serves"
            );
        }
        Ok((table, damaged))
    }

    /// Keeps every other user of the volume out, for as long as what is returned lives.
    pub fn lock(backing: &dyn Backing) -> Result<VolumeLock> {
        lock(backing)
    }

    fn find_log(&self, keys: &KeySource<'_>, table: &SessionTable) -> Result<intent_log::Found> {
        let shown = self.backing.display_path();
        let made = Mutex::new(std::collections::HashMap::new());
        let session_key = |session: u32| {
            let mut made = made.lock();
            if let Some(key) = made.get(&session) {
                return Some(Arc::clone(key));
            }
            let entry = table.get(session)?;
            let log_id = &self.header.log_id;
            let key = keys.with(|keyring| keys::log_mac(keyring, entry, log_id));
            let key = Arc::new(key.map_err(|error| log::error!("{error}")).ok()??);
            made.insert(session, Arc::clone(&key));
            Some(key)
        };
        let access = if self.shared.read_only { Access::Read } else { Access::ReadWrite };
        let macs = keys.with(keys::anchor_macs)?;
        let VolumeHeader { uuid, log_id, .. } = &self.header;
        let write = !self.shared.read_only;
        // From an earlier try: a lock is not taken twice.
        self.log_places.lock().clear();
        let place =
            log_place::Found::look(&*self.backing, uuid, log_id, Some(&macs), write, false)?;
        let proof = Proof::Keys(&macs, &session_key);
        let found = Log::find(&place.log_files(), log_id, proof, access)?;
        if found.damaged_copy {
            log::warn!("one copy of a log's anchor of {shown} is damaged; the other serves");
        }
        if write {
            place.settle(&*self.backing, (uuid, log_id), &macs)?;
        }
        *self.log_places.lock() = place.places().to_vec();
        Ok(found)
    }

    /// When the gate is open for the first time: puts back into force what the log holds, and,
    /// unless read-only, brings it home. No file is opened before that, so whoever asks for one
    /// first does it, if nobody has. Can be tried again after a failure.
    pub fn recover(&self) -> Result<Recovery> {
        let mut slot = self.found.lock();
        if let Some(done) = self.recovery.get() {
            return Ok(done.clone());
        }
        let report = match self.replayed.get() {
            Some(report) => report.clone(),
            None => self.put_into_force(&mut slot)?,
        };
        let start = std::time::Instant::now();
        if !self.shared.read_only {
            // Twice, so that both copies of the anchor know of the numbers from here on: one that
            // does not, alone, would hide all that is logged now.
            for _ in 0..2 {
                self.checkpoint().map_err(|error| self.cannot_bring_home(&error))?;
            }
        }
        let report = Recovery { duration: report.duration + start.elapsed(), ..report };
        Ok(self.recovery.get_or_init(|| report).clone())
    }

    /// The first half of recovery.
    fn put_into_force(&self, slot: &mut Option<intent_log::Found>) -> Result<Recovery> {
        let Some(found) = slot.take() else {
            return Err(Error::new(Kind::Io, "the log of this volume could not be recovered"));
        };
        match self.flush_and_replay(&found) {
            Ok(report) => {
                if self.shared.log.set(found.resume()).is_err() {
                    return Err(Error::new(Kind::Busy, "recovery ran twice"));
                }
                Ok(self.replayed.get_or_init(|| report).clone())
            }
            Err(error) => {
                self.shared.dirty.clear();
                *slot = Some(found);
                Err(error)
            }
        }
    }

    fn flush_and_replay(&self, found: &intent_log::Found) -> Result<Recovery> {
        if !self.shared.read_only {
            // Whatever an earlier daemon left in the kernel's hands: names above all.
            let shown = || format!("cannot flush {}", self.backing.display_path());
            self.backing.sync_fs().context(shown)?;
            found.make_durable()?;
            self.shared.after_crash.store(!found.clean, Ordering::Release);
        }
        self.replay(found)
    }

    fn cannot_bring_home(&self, error: &FsError) -> Error {
        let shown = self.backing.display_path();
        let message = format!("cannot bring home what the log in {shown} holds: {error}");
        match error {
            FsError::CutOff(_) => Error::new(Kind::Inaccessible, message),
            FsError::Integrity(_) => Error::corrupt(message),
            FsError::Os(errno) => Error::io(message, (*errno).into()),
        }
    }

    fn ready(&self) -> FsResult<()> {
        if self.recovery.get().is_some() {
            return Ok(());
        }
        self.gate().check()?;
        self.recover().map(drop).map_err(|error| {
            log::error!("{error}");
            Errno::IO.into()
        })
    }

    /// From here on checkpoints and flushes happen by themselves. `on_failure` is told, once, why
    /// the volume takes no more writes until it is mounted again.
    pub fn start_background(&self, on_failure: impl Fn(&str) + Send + 'static) -> Result<()> {
        if !self.shared.read_only {
            *self.background.lock() = Some(Background::start(self.shared.clone(), on_failure)?);
        }
        Ok(())
    }

    /// Brings home what the log holds. Needs the keys.
    pub fn checkpoint(&self) -> FsResult<()> {
        if self.shared.read_only { Ok(()) } else { self.shared.checkpoint() }
    }

    /// The last checkpoint: nobody can reach the volume any more. The next mount has nothing to look
    /// for then.
    pub fn close(&self) -> FsResult<()> {
        if self.shared.read_only { Ok(()) } else { self.shared.close() }
    }

    pub fn log_status(&self) -> Option<LogStatus> {
        let log = self.shared.log.get()?;
        let usages =
            [intent_log::Stream::Hot, intent_log::Stream::Bulk].map(|stream| log.usage(stream));
        let part = |usage: &Usage| usage.used as f64 / usage.capacity as f64;
        let Usage { used, capacity } =
            usages.into_iter().max_by(|a, b| part(a).total_cmp(&part(b)))?;
        Some(LogStatus {
            used,
            capacity,
            dirty_files: self.shared.dirty.len(),
            checkpoints: self.shared.checkpointer.count.load(Ordering::Relaxed),
            poisoned: log.poisoned(),
            checkpoint_failure: self.shared.checkpointer.failure(),
        })
    }

    /// Makes of a backing file's metadata what the file shows: while the log has changes of it,
    /// times and space are not the backing file's.
    pub fn amend(&self, metadata: &mut Metadata) {
        let file = self.shared.registry.get(metadata.id);
        if let Some(file) = &file {
            metadata.blocks = file.kept512(metadata.blocks);
        }
        match file.and_then(|file| file.times()) {
            Some(times) => {
                metadata.mtime = times.mtime.unwrap_or(metadata.mtime);
                metadata.ctime = times.ctime;
            }
            None => {
                let settled = self.shared.settled_times.get(metadata.id, metadata.ctime);
                metadata.ctime = settled.unwrap_or(metadata.ctime);
            }
        }
    }

    /// To be called when attributes or names of a file were changed.
    pub fn touched(&self, node: NodeId) {
        if let Some(file) = self.shared.registry.get(node) {
            file.touch();
        }
        // After that: a checkpoint that ends meanwhile settles what was shown before.
        self.shared.settled_times.forget(node);
    }

    /// Sets the times of an inode, and those that its file shows while the log has changes of it.
    pub fn set_times(&self, node: &NodeRef, atime: SetTime, mtime: SetTime) -> FsResult<()> {
        match self.shared.registry.get(node.id()) {
            Some(file) => file.set_times(node, atime, mtime),
            None => Ok(node.set_times(atime, mtime)?),
        }
    }

    /// A file that had no name was given one: its next flush owes that too.
    pub fn named(&self, node: NodeId) {
        let number = self.shared.newborn.add(node);
        if let Some(file) = self.shared.registry.get(node) {
            file.name_is_new(number);
        }
    }

    /// What was written to a file is on stable storage afterwards, if the log has anything of it, and
    /// a new file is there at all.
    pub fn flush_file(&self, node: &NodeRef) -> FsResult<()> {
        match self.shared.registry.get(node.id()) {
            Some(file) => file.sync(false),
            None if !self.shared.newborn.contains(node.id()) => Ok(()),
            // The number may be that of a file that is gone, given to something else since.
            None if node.metadata()?.kind != FileKind::Regular => Ok(()),
            None => {
                let file = node.open(Access::Peek)?;
                self.shared.flush_names(Scope::Inode(node.id()), || file.sync_all())
            }
        }
    }

    /// Files that were made and not flushed since are on stable storage afterwards, names and all. A
    /// failure is final.
    pub fn flush_new_files(&self) -> FsResult<()> {
        if self.shared.newborn.mark().is_some() { self.flush_all_names() } else { Ok(()) }
    }

    /// The names in these directories are on stable storage afterwards. A failure is final, but
    /// for one to open a directory: that flush has not begun, and is still owed.
    pub fn flush_names<'a>(
        &self,
        mut directories: impl Iterator<Item = &'a NodeRef>,
    ) -> FsResult<()> {
        directories.try_for_each(|directory| {
            let mut not_tried = false;
            self.shared.flush_names(Scope::Inode(directory.id()), || match directory.sync() {
                // One that is gone has none.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                Err(error) if is_want_of_descriptors(&error) => {
                    log::warn!("names cannot be flushed now: {error}");
                    not_tried = true;
                    Ok(())
                }
                synced => synced,
            })?;
            if not_tried { Err(Errno::IO.into()) } else { Ok(()) }
        })
    }

    /// All names are on stable storage afterwards, and everything at home. A failure is final.
    pub fn flush_all_names(&self) -> FsResult<()> {
        self.shared.sync_fs(true)
    }

    /// Everything acknowledged so far is on stable storage afterwards, except names and attributes.
    pub fn flush_log(&self) -> FsResult<()> {
        match self.shared.log.get() {
            Some(log) if !self.shared.read_only => log.flush(),
            _ => Ok(()),
        }
    }

    /// To be called when nobody can reach an inode any more, except by a name, if it has one.
    pub fn forsaken(&self, node: NodeId) {
        if let Some(file) = self.shared.registry.get(node) {
            self.shared.dirty.bury(file);
        }
    }

    pub fn info(&self) -> &VolumeInfo {
        &self.info
    }

    pub fn is_read_only(&self) -> bool {
        self.shared.read_only
    }

    pub fn backing(&self) -> &Arc<dyn Backing> {
        &self.backing
    }

    pub fn gate(&self) -> &Arc<Gate> {
        &self.shared.gate
    }

    /// The key of names and small values.
    pub fn metadata_key(&self, keyring: &Keyring) -> Result<Secret<32>> {
        let VolumeHeader { uuid, volume_key_id, wrapped_metadata_key, .. } = &self.header;
        let key = keys::metadata_key(keyring, *volume_key_id, uuid, wrapped_metadata_key)?;
        key.ok_or_else(|| {
            let shown = self.backing.display_path();
            Error::corrupt(format!("the key of names in {shown}/volume does not unwrap"))
        })
    }

    /// The backing directory of the logical root.
    pub fn tree(&self) -> NodeRef {
        self.tree.clone()
    }

    /// Where the envelope is kept: a directory of plain files.
    pub fn envelope_dir(&self) -> NodeRef {
        self.root.clone()
    }

    /// Makes an empty, unnamed backing file, open for writing, a file of this volume.
    pub fn create_file(&self, file: FileRef) -> FsResult<Arc<File>> {
        if self.shared.read_only {
            return Err(Errno::ROFS.into());
        }
        self.ready()?;
        let mut id = [0; 16];
        random::fill(&mut id).map_err(|_| Errno::IO)?;
        let header = {
            let lease = self.shared.gate.lease()?;
            let keyring = lease.keyring();
            let wrapped = keys::new_dek(keyring, keyring.id(), &id)?;
            let dek = DekSlot { id: 0, wrapped, made: seconds_since_epoch() };
            let mac_key = keys::new_mac_key(keyring, keyring.id(), &id)?;
            lease.still_open()?;
            Header::new(id, keyring.id(), dek, mac_key)
        };
        file::write_header(&self.shared, &file, &header)?;
        let node = file.metadata()?.id;
        let newborn = Some(self.shared.newborn.add(node));
        self.shared.registry.get_or_insert(node, || {
            Ok(File::new(self.shared.clone(), file.clone(), node, header, newborn))
        })
    }

    /// One [`File`] per inode, however often it is opened. On a writable volume `file` must be
    /// open for writing.
    pub fn open_file(&self, file: FileRef) -> FsResult<Arc<File>> {
        self.ready()?;
        self.open_home(file)
    }

    fn open_home(&self, file: FileRef) -> FsResult<Arc<File>> {
        let node = file.metadata()?.id;
        self.shared.registry.get_or_insert(node, || {
            let header = self.shared.read_header(&file)?;
            let mut newborn = self.shared.newborn.number(node);
            if newborn.is_none()
                && header.is_first()
                && self.shared.after_crash.load(Ordering::Acquire)
            {
                file::write_header(&self.shared, &file, &header)?;
                newborn = Some(self.shared.newborn.add(node));
            }
            Ok(File::new(self.shared.clone(), file.clone(), node, header, newborn))
        })
    }

    /// The size of a file that need not be open.
    pub fn plain_size(&self, node: &NodeRef) -> FsResult<u64> {
        Ok(self.file_usage(node)?.0)
    }

    /// Size, and allocated space in units of 512 bytes, of a file that need not be open.
    pub fn file_usage(&self, node: &NodeRef) -> FsResult<(u64, u64)> {
        self.ready()?;
        if let Some(file) = self.shared.registry.get(node.id()) {
            return Ok((file.size(), file.blocks512()?));
        }
        let metadata = node.metadata()?;
        if metadata.kind != FileKind::Regular {
            return Err(Errno::INVAL.into());
        }
        let file = node.open(Access::Peek)?;
        let size = match self.shared.read_header(&file) {
            // Opened and written to since: then it is in the registry.
            Err(FsError::Integrity(failure)) => match self.shared.registry.get(node.id()) {
                Some(file) => file.size(),
                None => return Err(FsError::Integrity(failure)),
            },
            header => header?.size,
        };
        Ok((size, file::plain_blocks(metadata.blocks, size)))
    }

    /// Everything written so far, names too, is on stable storage afterwards. Needs no keys.
    pub fn sync_all(&self) -> FsResult<()> {
        self.flush_log()?;
        self.shared.sync_fs(false)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        *self.background.get_mut() = None;
        // They hold what holds them.
        self.shared.dirty.clear();
    }
}

/// open(2) fails so, fsync(2) never.
fn is_want_of_descriptors(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

fn seconds_since_epoch() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn is_read_only_fs(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref());
    source.and_then(Errno::from_io_error) == Some(Errno::ROFS)
}

fn lock(backing: &dyn Backing) -> Result<VolumeLock> {
    backing.lock(LOCK).map_err(|error| cannot_lock(backing, error))
}

fn cannot_lock(backing: &dyn Backing, error: std::io::Error) -> Error {
    let shown = backing.display_path();
    if error.kind() == std::io::ErrorKind::WouldBlock {
        let message = format!("{shown} is in use by another byokfs; unmount it there first");
        return Error::new(Kind::Busy, message);
    }
    Error::io(format!("cannot lock {shown}/lock"), error)
}

#[cfg(test)]
mod tests;
