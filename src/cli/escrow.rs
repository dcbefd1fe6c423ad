//! `byokfs escrow`: a backup of a volume's key, made by its key service or noted as made.

use std::path::{Path, PathBuf};

use crate::backing::Backing;
use crate::backing::linux::LinuxBacking;
use crate::config::Config;
use crate::daemon::pins::{self, Standing};
use crate::daemon::rotation::unconfirmed;
use crate::daemon::volume::expect_own_envelope;
use crate::daemon::{check, escrow, mountinfo, settings};
use crate::error::Result;
use crate::key::envelope::Envelope;
use crate::store::Store;

use super::args::EscrowArgs;
use super::output;

pub(super) fn run(args: EscrowArgs) -> Result<()> {
    let config = Config::load(args.target.config.config.as_deref(), &[])?;
    let back = backing_directory(&args.target.target)?;
    let backing = LinuxBacking::open(&back)?;
    let info = Store::inspect(&*backing)?;
    let envelope = Envelope::load(&backing.root())?;
    expect_own_envelope(&envelope, &info)?;
    // Of a planted envelope it would be another key that is said to be safe.
    match pins::read(&config.dir.0, &info.uuid)?.standing(&back, &envelope.kid) {
        Standing::Confirmed => {}
        standing => return Err(unconfirmed(&standing, &envelope)),
    }
    let kid = envelope.kid;
    let file = args.file.as_deref();
    let written = match file {
        Some(file) => {
            let provider = settings::provider(&config, &kid)?;
            Some(escrow::back_up(&*provider, &kid, &back, file)?)
        }
        None => None,
    };
    pins::note_escrow(&config.dir.0, &info.uuid, escrow::note(&kid, file)?)?;
    if let Some(written) = written {
        written.keep();
    }
    output::line(&match file {
        Some(file) => format!("{kid} is backed up to {}", file.display()),
        None => format!("noted: {kid} is backed up elsewhere"),
    })
}

/// Of a backing directory, itself; of a mount point, that of its mount.
pub(super) fn backing_directory(given: &Path) -> Result<PathBuf> {
    let mounted = std::path::absolute(given).ok().map(|path| mountinfo::find(&path)).transpose()?;
    match mounted.flatten() {
        Some(mount) => Ok(mount.source),
        None => check::resolve("the key, mount point or backing directory", given),
    }
}
