//! Another size or place for a volume's intent log, or a new log in the place of a lost one:
//! `byokfs log`.

use std::path::{Path, PathBuf};

use super::offline::Offline;
use crate::error::{Error, Result};
use crate::observe::audit::{Event, Name, Status, emit};

/// What is to become of the log.
#[derive(Clone, Debug)]
pub enum Change {
    /// Bytes in all.
    Resize(u64),
    /// To this directory; the volume's own is one too.
    Move(PathBuf),
    /// Bytes in all; None: as for a new volume.
    Discard(Option<u64>),
}

impl Change {
    const fn name(&self) -> &'static str {
        match self {
            Change::Resize(_) => "resize",
            Change::Move(_) => "move",
            Change::Discard(_) => "discard",
        }
    }
}

pub fn change(volume: &Offline, change: &Change) -> Result<()> {
    let event = |status| Event::new(Name::LogChanged).status(status).with("change", change.name());
    emit(event(Status::Started));
    match carry_out(volume, change) {
        Ok(()) => {
            emit(event(Status::Succeeded));
            Ok(())
        }
        Err(error) => {
            emit(event(Status::Failed).with("error", error.to_string()));
            Err(error)
        }
    }
}

fn carry_out(volume: &Offline, change: &Change) -> Result<()> {
    let (to, size) = match change {
        Change::Discard(size) => {
            let _key = volume.key()?;
            return volume.store.discard_log(*size);
        }
        Change::Resize(size) => (None, Some(*size)),
        Change::Move(to) => (Some(directory(to)?), None),
    };
    let _key = volume.key()?;
    volume.recover()?;
    volume.close()?;
    volume.store.replace_log(to.as_deref(), size)
}

fn directory(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|error| {
        Error::usage(format!(
            "{} is not a directory that the log could be in: {error}",
            path.display()
        ))
    })
}
