//! `byokfs init`: makes a volume, or nothing.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::backing::Backing;
use crate::backing::linux::LinuxBacking;
use crate::config::Config;
use crate::crypto;
use crate::daemon::pins::{self, Pin, Place as PinnedPlace};
use crate::daemon::{check, escrow, harden, hex, mountinfo, settings, volume};
use crate::error::{Context, Error, Kind, Result};
use crate::key::custody::{self, Enrolment};
use crate::observe::audit::{self, Event, Name};
use crate::store::{FormatOptions, Store};

use super::args::InitArgs;
use super::output;

/// For the full check of the key, and to wrap and unwrap with it.
const ENROL_LIMIT: Duration = Duration::from_secs(60);

pub(super) fn run(args: InitArgs) -> Result<()> {
    let config = Config::load(args.config.config.as_deref(), &[])?;
    let provider = settings::provider(&config, &args.kek)?;
    let given = std::path::absolute(&args.back)
        .map_err(|error| Error::usage(format!("{}: {error}", args.back.display())))?;
    // Before the working directory is another.
    let escrow = args.escrow.as_deref().map(std::path::absolute).transpose();
    let escrow = escrow.map_err(|error| Error::usage(format!("--escrow: {error}")))?;
    // It will hold the volume key.
    harden::process("byokfs-init")?;
    crypto::selftest::run()?;
    let place = Place::prepare(&given)?;

    let tolerant = args.no_requirements;
    let settings = settings::requirements(&config, &args.kek, tolerant);
    // Before the key is used, so that there never is a volume without it.
    let escrow = escrow.as_deref();
    let backup = escrow.map(|file| escrow::back_up(&*provider, &args.kek, &place.path, file));
    let backup = backup.transpose()?;
    let enrolled = custody::enrol(&*provider, &args.kek, None, &settings, ENROL_LIMIT);
    let enrolment = match enrolled {
        Ok(enrolment) => enrolment,
        Err(refusal) => {
            if let Some(report) = &refusal.report {
                output::text(&report.to_string())?;
            }
            return Err(volume::name_the_service(refusal.error, &args.kek));
        }
    };
    for row in enrolment.report.warnings() {
        output::warning(&format!("{}: {}; {}", row.requirement, row.found, row.fix));
    }
    let pin = Pin {
        fingerprint: enrolment.fingerprint,
        fingerprint_next: None,
        requirements: !tolerant,
        places: Some(vec![PinnedPlace {
            host: pins::this_host(),
            back: place.path.clone(),
            kek: enrolment.info.kid.clone(),
            kek_next: None,
        }]),
        escrow: escrow.map(|file| escrow::note(&enrolment.info.kid, Some(file))).transpose()?,
    };
    let options = FormatOptions { plaintext_names: args.plaintext_names, log_size: args.log_size };
    let (uuid, pin_path) = place.fill(&config, &enrolment, &pin, options)?;
    match backup {
        Some(backup) => backup.keep(),
        None => output::warning(escrow::HINT),
    }
    tell_audit(&config, &uuid, &place.path, &enrolment.info.kid);
    output::line(&format!("volume {uuid} in {}", place.path.display()))?;
    output::line(&format!("key    {}", enrolment.info.kid))?;
    output::line(&format!("pin    {}", pin_path.display()))
}

/// The backing directory to be; what was made of it goes again unless it was [`Place::fill`]ed.
struct Place {
    path: PathBuf,
    made: bool,
    /// What is in it now was made here.
    begun: std::cell::Cell<bool>,
    complete: std::cell::Cell<bool>,
}

impl Place {
    fn prepare(back: &Path) -> Result<Place> {
        let failed = || format!("cannot make a volume in {}", back.display());
        let made = !back.try_exists().context(failed)?;
        if made {
            fs::DirBuilder::new().mode(0o700).create(back).context(failed)?;
        }
        let path = fs::canonicalize(back).context(failed)?;
        let place = Place { path, made, begun: false.into(), complete: false.into() };
        if mountinfo::at(&place.path)?.is_some_and(|mount| mount.fs_type == mountinfo::FS_TYPE) {
            let message = format!("{} is a byokfs mount itself", back.display());
            return Err(place.not_ours(Error::new(Kind::Busy, message)));
        }
        let mut entries = fs::read_dir(&place.path).context(failed)?;
        if entries.next().is_some() {
            let message =
                format!("{} is not empty; a volume needs an empty directory", back.display());
            return Err(place.not_ours(Error::new(Kind::Busy, message)));
        }
        Ok(place)
    }

    /// What is there is somebody else's.
    fn not_ours(&self, error: Error) -> Error {
        self.complete.set(true);
        error
    }

    fn fill(
        &self,
        config: &Config,
        enrolment: &Enrolment,
        pin: &Pin,
        options: FormatOptions,
    ) -> Result<(String, PathBuf)> {
        let backing = LinuxBacking::open(&self.path)?;
        // It was empty before the key service was asked. What somebody, another `init` for example,
        // has put there since is not ours to tidy up.
        self.begun.set(true);
        let info = Store::format(&*backing, &enrolment.keyring, options).map_err(|error| {
            match error.kind {
                Kind::Busy => self.not_ours(error),
                _ => error,
            }
        })?;
        enrolment.envelope(info.uuid).save(&backing.root())?;
        // Last: a volume without a pin cannot be mounted, a pin without a volume does no harm.
        let pin_path = pins::create(&config.dir.0, &info.uuid, pin)?;
        self.complete.set(true);
        Ok((hex::uuid(&info.uuid), pin_path))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.complete.get() {
            return;
        }
        let removed = match (self.begun.get(), self.made) {
            (false, true) => fs::remove_dir(&self.path),
            (false, false) => Ok(()),
            (true, true) => fs::remove_dir_all(&self.path),
            (true, false) => self.empty(),
        };
        if let Err(error) = removed {
            output::warning(&format!("cannot tidy {} up: {error}", self.path.display()));
        }
    }
}

impl Place {
    /// All that is in it was made here.
    fn empty(&self) -> std::io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

/// The volume is made; that its trail cannot be written is a warning.
fn tell_audit(config: &Config, uuid: &str, back: &Path, kid: &str) {
    let Some(file) = &config.audit.file else { return };
    let installed =
        check::parent_dir(file).and_then(|()| audit::install(file, &[("volume", uuid.to_owned())]));
    match installed {
        Ok(()) => audit::emit(
            Event::new(Name::VolumeCreated).with("back", back.to_string_lossy()).with("kek", kid),
        ),
        Err(error) => output::warning(&error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key service may take a minute to answer, or to refuse.
    #[test]
    fn what_others_put_there_meanwhile_stays() {
        let dir = tempfile::tempdir().unwrap();
        let back = dir.path().join("back");
        for made in [true, false] {
            if !made {
                fs::create_dir(&back).unwrap();
            }
            let place = Place::prepare(&back).unwrap();
            fs::write(back.join("theirs"), "").unwrap();
            drop(place);
            assert!(back.join("theirs").exists(), "made: {made}");
            fs::remove_dir_all(&back).unwrap();
        }
        drop(Place::prepare(&back).unwrap());
        assert!(!back.exists(), "made for nothing");
        let place = Place::prepare(&back).unwrap();
        place.begun.set(true);
        fs::write(back.join("ours"), "").unwrap();
        drop(place);
        assert!(!back.exists());
    }
}
