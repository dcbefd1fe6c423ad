//! A volume that nobody has mounted, opened to be looked at, not used: what is wrong with each of
//! its files, found by the decoders that read them otherwise.
//!
//! [`Volume::open`] looks at what all files have in common, and puts what the log holds over them
//! in memory, by the ordinary recovery; [`Volume::begin`] and the [`FileCheck`] it returns look at
//! one file. Without a key everything is believed that has the right form, and blocks are not
//! opened. Nothing here changes the disk but [`restore`], which is for repairs.
//!
//! Nothing is judged here: a [`Flaw`] says what is not as it should be, and where. Damage is a flaw
//! and never an error; errors are for what keeps the check from going on.

mod file;
mod flaw;
mod nonces;
mod plain;
pub mod restore;

use std::collections::HashSet;
use std::sync::Arc;

pub(in crate::store) use file::read_flaw;
pub use file::{FileCheck, Opened, Scratch, Tally};
pub use flaw::{Flaw, Sink, What};
pub(in crate::store) use flaw::{Joined, of_block, of_group, of_sectors};

use super::intent_log::{self, Found, Log, LogFile, Proof, STREAMS};
use super::keys::{KeySource, MacKeys};
use super::layout::BLOCK;
use super::session::{self, SessionTable};
use super::{LOCK, Recovery, Store, VolumeInfo, VolumeLock, cannot_lock, keys, log_place, volume};
use crate::backing::{Access, Backing, NodeRef};
use crate::error::{Error, Kind, Result};
use crate::key::gate::Gate;

/// What the log says of the volume as a whole.
#[derive(Debug, Default)]
struct LogState {
    /// Nobody has written to the volume since it was closed.
    closed: bool,
    /// The files of its records: an unfinished checkpoint may have been at work on them.
    named: HashSet<[u8; 16]>,
}

/// A volume opened for a check.
#[derive(Debug)]
pub struct Volume {
    store: Arc<Store>,
    keyed: bool,
    sessions: Arc<SessionTable>,
    log: LogState,
    /// What the log held, where it could be put into force.
    recovery: Option<Recovery>,
}

/// Keeps others out without changing anything; None where there is no lock file, so that nobody
/// can have the volume mounted.
pub fn lock(backing: &dyn Backing) -> Result<Option<VolumeLock>> {
    match backing.lock_existing(LOCK) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        locked => locked.map(Some).map_err(|error| cannot_lock(backing, error)),
    }
}

impl Volume {
    /// The caller holds the volume's lock. With a gate, which must be open, everything is proved.
    /// Fails where there is no volume header to go by, and where the key is lost meanwhile.
    pub fn open(
        backing: Arc<dyn Backing>,
        gate: Option<Arc<Gate>>,
        sink: &mut Sink<'_>,
    ) -> Result<Volume> {
        let (root, shown) = (backing.root(), backing.display_path());
        let header = volume::read(&root, &shown)?;
        let keyed = gate.is_some();
        let store = Store::assemble(backing, gate.unwrap_or_else(Gate::new), true, header, None)?;
        let (sessions, log) = Default::default();
        let mut volume = Volume { store, keyed, sessions, log, recovery: None };
        volume.check_header(&root, &shown, sink)?;
        let sessions = volume.check_sessions(&root, &shown, sink)?;
        if let Some(place) = volume.check_place(&shown, sink)? {
            let at = place.log_files();
            volume.check_anchors(&at, sink)?;
            if sessions || !keyed {
                volume.check_log(&at, sink)?;
            }
        }
        Ok(volume)
    }

    pub fn info(&self) -> &VolumeInfo {
        self.store.info()
    }

    /// What reads names with the volume's keys.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    pub fn tree(&self) -> NodeRef {
        self.store.tree()
    }

    pub fn is_keyed(&self) -> bool {
        self.keyed
    }

    /// The volume was closed, and nobody has written to it since.
    pub fn is_closed(&self) -> bool {
        self.log.closed
    }

    /// None where the log could not be read, or not be put into force.
    pub fn recovery(&self) -> Option<&Recovery> {
        self.recovery.as_ref()
    }

    fn keys(&self) -> KeySource<'_> {
        KeySource::Gate(self.store.gate())
    }

    fn check_header(&self, root: &NodeRef, shown: &str, sink: &mut Sink<'_>) -> Result<()> {
        let copies = volume::copies(root, shown)?;
        let place = format!("{shown}/volume");
        let newest = copies.iter().flatten().max().copied();
        for (copy, generation) in copies.into_iter().enumerate() {
            let flaw = |what, detail: &str| {
                Flaw::of(what, &place, format!("copy {} of the volume header {detail}", name(copy)))
                    .at(copy as u64 * BLOCK)
            };
            match generation {
                None => sink(flaw(What::VolumeHeaderCopy, "is damaged")),
                old if old < newest => sink(flaw(What::VolumeHeaderCopyOlder, "is older")),
                _ => {}
            }
        }
        if self.keyed {
            let keys = self.keys().with(keys::volume_macs)?;
            if !self.store.header.is_authentic(&keys) {
                let detail = "it was not written with this volume key: it belongs to another \
                              volume, or was changed";
                sink(Flaw::of(What::VolumeHeader, &place, detail));
            }
            match self.keys().with(|keyring| self.store.metadata_key(keyring)) {
                Ok(_) => {}
                Err(error) if error.kind == Kind::Corrupt => {
                    let detail = "the key of names and attributes, wrapped in it, does not unwrap";
                    sink(Flaw::of(What::VolumeHeader, &place, detail));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// False where no table serves.
    fn check_sessions(&mut self, root: &NodeRef, shown: &str, sink: &mut Sink<'_>) -> Result<bool> {
        let keys = match self.keyed {
            true => Some(self.keys().with(keys::sessions_macs)?),
            false => None,
        };
        let uuid = &self.store.header.uuid;
        let copies = SessionTable::copies(root, uuid, keys.as_ref(), shown)?;
        let newest = copies.iter().flatten().map(SessionTable::generation).max();
        let names = session::FILES.map(|name| format!("{shown}/{}", String::from_utf8_lossy(name)));
        let Some(newest) = newest else {
            let detail = "both copies of the session table are missing or damaged";
            sink(Flaw::of(What::Sessions, &names[0], detail));
            return Ok(false);
        };
        if let [Some(a), Some(b)] = &copies
            && a.generation() == b.generation()
            && a != b
        {
            let detail = "the two copies of the session table differ";
            sink(Flaw::of(What::SessionsCopy, &names[1], detail));
        }
        for (copy, name) in copies.iter().zip(&names) {
            match copy {
                None => {
                    let detail = "this copy of the session table is missing or damaged";
                    sink(Flaw::of(What::SessionsCopy, name, detail));
                }
                Some(table) if table.generation() < newest => {
                    let detail = format!(
                        "this copy of the session table is older: {} sessions",
                        table.len()
                    );
                    sink(Flaw::of(What::SessionsCopyOlder, name, detail));
                }
                Some(_) => {}
            }
        }
        let table = copies.into_iter().flatten().max_by_key(SessionTable::generation);
        let table = table.unwrap_or_default();
        self.sessions = Arc::new(table.clone());
        *self.store.shared.sessions.write() = table;
        Ok(true)
    }

    /// Where the log's files are, or ought to be; None where that cannot be found out.
    fn check_place(&self, shown: &str, sink: &mut Sink<'_>) -> Result<Option<log_place::Found>> {
        let keys = self.anchor_keys()?;
        let (backing, header) = (&*self.store.backing, &self.store.header);
        let (uuid, log_id) = (&header.uuid, &header.log_id);
        let look = log_place::Found::look(backing, uuid, log_id, keys.as_ref(), false, false);
        let link = format!("{shown}/log");
        let place = match look {
            Ok(place) => place,
            Err(error) => {
                sink(Flaw::of(What::Log, &link, error.to_string()));
                return Ok(None);
            }
        };
        if !place.is_settled(backing)? {
            let detail = "a change of the log's size or place was cut short";
            sink(Flaw::of(What::LogUnsettled, &link, detail));
        }
        Ok(Some(place))
    }

    fn anchor_keys(&self) -> Result<Option<MacKeys>> {
        if self.keyed { self.keys().with(keys::anchor_macs).map(Some) } else { Ok(None) }
    }

    fn check_anchors(&self, at: &[LogFile; STREAMS], sink: &mut Sink<'_>) -> Result<()> {
        let keys = self.anchor_keys()?;
        for (copies, at) in intent_log::anchor_copies(at, keys.as_ref())?.into_iter().zip(at) {
            // What the log as a whole is unfit for is said by `check_log`.
            if copies.iter().all(Option::is_none) {
                continue;
            }
            for (copy, anchor) in copies.iter().enumerate() {
                if anchor.is_none() {
                    let detail = format!("copy {} of the log's anchor is damaged", name(copy));
                    let flaw = Flaw::of(What::AnchorCopy, &at.path(), detail);
                    sink(flaw.at(copy as u64 * BLOCK));
                }
            }
        }
        Ok(())
    }

    fn check_log(&mut self, at: &[LogFile; STREAMS], sink: &mut Sink<'_>) -> Result<()> {
        let place = at[0].path();
        let found = match self.find_log(at) {
            Ok(found) => found,
            Err(error) if is_final(&error) => return Err(error),
            Err(error) => {
                sink(Flaw::of(What::Log, &place, error.to_string()));
                return Ok(());
            }
        };
        self.log.closed = found.clean && found.records.is_empty();
        self.log.named = found.records.iter().map(|record| record.draft.file_id).collect();
        if !self.log.closed {
            let detail = format!(
                "the volume was not closed; the log holds {} changes of {} files",
                found.records.len(),
                self.log.named.len()
            );
            sink(Flaw::of(What::LogPending, &place, detail));
        }
        if !self.keyed {
            return Ok(());
        }
        *self.store.found.lock() = Some(found);
        match self.store.recover() {
            Ok(recovery) => {
                if recovery.of_removed_files > 0 {
                    let detail = format!(
                        "{} changes in the log are of files that are not there",
                        recovery.of_removed_files
                    );
                    sink(Flaw::of(What::LogRemoved, &place, detail));
                }
                if recovery.incomplete > 0 {
                    let detail = format!(
                        "{} changes in the log, which nobody was promised, are not complete",
                        recovery.incomplete
                    );
                    sink(Flaw::of(What::LogIncomplete, &place, detail));
                }
                self.recovery = Some(recovery);
            }
            Err(error) if is_final(&error) => return Err(error),
            Err(error) => sink(Flaw::of(What::LogReplay, &place, error.to_string())),
        }
        Ok(())
    }

    fn find_log(&self, at: &[LogFile; STREAMS]) -> Result<Found> {
        if self.keyed {
            return self.store.find_log(&self.keys(), &self.sessions);
        }
        Log::find(at, &self.store.header.log_id, Proof::Form, Access::Read)
    }
}

/// Not damage, but the end of the check.
fn is_final(error: &Error) -> bool {
    error.kind == Kind::Inaccessible
}

pub(super) fn name(copy: usize) -> &'static str {
    if copy == 0 { "A" } else { "B" }
}
