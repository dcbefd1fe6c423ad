//! `byokfs check-key`: the requirements on a key as a table, each tried for real.
//!
//! Exit code 0 when nothing fails (warnings may be there), that of [`Kind::Denied`] when something
//! does, and that of [`Kind::Unreachable`] when the key service did not say.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::backing::Backing;
use crate::backing::linux::LinuxBacking;
use crate::config::Config;
use crate::crypto;
use crate::daemon::pins::{self, Pin, Standing};
use crate::daemon::{escrow, harden, settings, volume};
use crate::error::{Error, Kind, Result};
use crate::key::custody;
use crate::key::envelope::Envelope;
use crate::key::provider;
use crate::key::reason::Reason;
use crate::key::requirement::{Report, Row, Verdict};
use crate::store::Store;

use super::args::CheckKeyArgs;
use super::escrow::backing_directory;
use super::output;

/// For all the calls of a check.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Answer<'a> {
    verdict: Verdict,
    #[serde(flatten)]
    report: &'a Report,
}

pub(super) fn run(args: CheckKeyArgs) -> Result<()> {
    let config = Config::load(args.config.config.as_deref(), &[])?;
    let volume =
        if provider::is_key(&args.key) { None } else { Some(Checked::find(&args.key, &config)?) };
    let envelope = volume.as_ref().map(|volume| volume.envelope.clone());
    let kid = envelope.as_ref().map_or(&args.key, |envelope| &envelope.kid);
    let provider = settings::provider(&config, kid)?;
    harden::process("byokfs-check")?;
    crypto::selftest::run()?;

    let mut requirements = settings::requirements(&config, kid, false);
    requirements.strict |= args.strict;
    let mut report = custody::survey(&*provider, kid, envelope.as_ref(), &requirements, LIMIT)
        .map_err(|error| volume::name_the_service(error.into(), kid))?;
    if let Some(volume) = &volume {
        report.rows.extend(volume.place_row(requirements.strict));
        report.rows.push(volume.escrow_row(requirements.strict));
    }
    if args.json {
        output::json(&Answer { verdict: report.verdict(), report: &report })?;
    } else {
        output::line(&report.kid)?;
        output::text(&report.to_string())?;
    }
    match report.failures().count() {
        0 => Ok(()),
        failed => {
            let message = format!("{failed} of the requirements on {} are not met", report.kid);
            Err(Error::new(Kind::Denied, message))
        }
    }
}

/// A volume whose key is checked, and what this host knows of it.
struct Checked {
    back: PathBuf,
    envelope: Envelope,
    /// None: a volume can be checked where it is not mounted.
    pin: Option<Pin>,
}

impl Checked {
    /// By the backing directory, or a mount point.
    fn find(name: &str, config: &Config) -> Result<Checked> {
        let back = backing_directory(Path::new(name))?;
        let backing = LinuxBacking::open(&back)?;
        let info = Store::inspect(&*backing)?;
        let envelope = Envelope::load(&backing.root())?;
        volume::expect_own_envelope(&envelope, &info)?;
        let pin = pins::find(&config.dir.0, &info.uuid)?;
        Ok(Checked { back, envelope, pin })
    }

    /// Of a volume that would be mounted and stay shut: a key can be as it should be and not be
    /// this volume's.
    fn place_row(&self, strict: bool) -> Option<Row> {
        let standing = self.pin.as_ref()?.standing(&self.back, &self.envelope.kid);
        let (found, verdict, fix) = match standing {
            Standing::Confirmed => return None,
            Standing::Elsewhere => (
                "never opened here".to_owned(),
                if strict { Verdict::Fail } else { Verdict::Warn },
                "confirm a copy, or a volume that was moved, with `byokfs revalidate MNT`",
            ),
            Standing::OtherKey(known) => (
                format!("last opened here with {known}"),
                Verdict::Fail,
                "confirm an older copy that was restored with `byokfs revalidate MNT \
                 --accept-key`; if there is none, somebody has replaced the envelope",
            ),
        };
        let (requirement, reason) = ("the volume's place", Some(Reason::NotConfirmed));
        Some(Row { requirement, found, verdict, fix, reason })
    }

    fn escrow_row(&self, strict: bool) -> Row {
        let escrow = self.pin.as_ref().and_then(|pin| pin.escrow.as_ref());
        escrow::row(escrow, &self.envelope.kid, strict)
    }
}
