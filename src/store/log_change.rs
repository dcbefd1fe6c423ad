//! Giving a volume another log: another size, another place, or a new one where the old is lost.
//!
//! Nobody uses the volume meanwhile. The new log is complete and on stable storage before the
//! volume header names it; that is the moment from which on it counts.

use std::path::Path;

use super::intent_log::{Log, Size};
use super::keys::{self, KeySource, MacKeys};
use super::log_place::{self, Found};
use super::{Store, volume};
use crate::crypto::random;
use crate::error::{Error, Kind, Result};

impl Store {
    /// Bytes of the log there is, in all, and where it is.
    pub fn log_size(&self) -> Option<u64> {
        self.shared.log.get().map(|log| log.size())
    }

    /// Another log, of `size` bytes in all, in the directory `to`; None: as it is. The volume was
    /// opened, recovered and closed, and only goes away after this. The gate is open.
    pub fn replace_log(&self, to: Option<&Path>, size: Option<u64>) -> Result<()> {
        let is_empty = self.shared.log.get().is_some_and(|log| log.is_closed());
        if !is_empty {
            let message = "the log still holds changes, which must go home first";
            return Err(Error::new(Kind::Busy, message));
        }
        let size = size.or(self.log_size()).unwrap_or(0);
        let macs = self.key_source().with(keys::anchor_macs)?;
        let old = self.look_for_log(&macs, false)?;
        self.put_in_place(&macs, &old, to, size, true)
    }

    /// A new log in the place of one that cannot be recovered from: what only that had is lost. The
    /// gate is open; nothing else was done with the volume.
    pub fn discard_log(&self, size: Option<u64>) -> Result<()> {
        let shown = self.backing.display_path();
        let source = self.key_source();
        self.check_header(&source)?;
        let table = self.load_sessions(&source)?.0;
        match self.find_log(&source, &table) {
            Ok(_) => {
                let message = format!(
                    "the log of {shown} is sound: a mount brings home what it holds, and nothing \
                     needs to be lost"
                );
                return Err(Error::new(Kind::Busy, message));
            }
            // Also where the disk that it was on is gone.
            Err(error) if matches!(error.kind, Kind::Corrupt | Kind::Io) => {
                log::warn!("discarded: {error}");
            }
            Err(error) => return Err(error),
        }
        let macs = self.key_source().with(keys::anchor_macs)?;
        let old = self.look_for_log(&macs, true)?;
        let size = match size {
            Some(size) => size,
            None => super::default_log_size(&*self.backing)
                .map_err(|error| Error::io(format!("cannot examine {shown}"), error))?,
        };
        self.put_in_place(&macs, &old, None, size, false)
    }

    fn key_source(&self) -> KeySource<'_> {
        KeySource::Gate(&self.shared.gate)
    }

    fn look_for_log(&self, macs: &MacKeys, lost: bool) -> Result<Found> {
        let (uuid, log_id) = (&self.header.uuid, &self.header.log_id);
        Found::look(&*self.backing, uuid, log_id, Some(macs), false, lost)
    }

    fn put_in_place(
        &self,
        macs: &MacKeys,
        old: &Found,
        to: Option<&Path>,
        size: u64,
        clean: bool,
    ) -> Result<()> {
        let backing = &*self.backing;
        let place = log_place::destination(backing, &self.header.uuid, old, to)?;
        log_place::prepare(backing, &place)?;
        let mut header = self.header.clone();
        header.log_id = random::bytes()?;
        header.generation += 1;
        let files = log_place::of_new_log(&place);
        Log::format(&files, Size::of_total(size), header.log_id, macs, clean)?;
        // By the volume key that it names, which is not the current one while that is being changed.
        let volume_macs = self.key_source().with(keys::volume_macs)?;
        let shown = backing.display_path();
        let key = volume_macs.get(header.volume_key_id).ok_or_else(|| {
            Error::corrupt(format!("{shown}/volume names a volume key that is not there"))
        })?;
        let pages = header.encode(key);
        volume::rewrite(&self.root, &pages, &shown)?;
        let ids = (&header.uuid, &header.log_id);
        log_place::finish(backing, ids, macs, old.places(), &place)
    }
}
