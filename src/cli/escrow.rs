//! `byokfs escrow`: a backup of a volume's key, made by its key service or noted as made.

use std::path::{Path, PathBuf};

use crate::backing::Backing;
use crate::backing::linux::LinuxBacking;
use crate::config::Config;
use crate::daemon::{check, escrow, mountinfo, pins, settings};
use crate::error::Result;
use crate::key::envelope::Envelope;
use crate::store::Store;

use super::args::EscrowArgs;
use super::output;

pub(super) fn run(args: EscrowArgs) -> Result<()> {
    let config = Config::load(args.target.config.config.as_deref(), &[])?;
    let back = backing_directory(&args.target.target)?;
    let backing = LinuxBacking::open(&back)?;
    let uuid = Store::inspect(&*backing)?.uuid;
    let kid = Envelope::load(&backing.root())?.kid;
    // Without a pin here it is not this host's volume.
    pins::read(&config.dir.0, &uuid)?;
    let file = args.file.as_deref();
    let written = match file {
        Some(file) => {
            let provider = settings::provider(&config, &kid)?;
            Some(escrow::back_up(&*provider, &kid, &back, file)?)
        }
        None => None,
    };
    pins::note_escrow(&config.dir.0, &uuid, escrow::note(&kid, file)?)?;
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
