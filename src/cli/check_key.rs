//! `byokfs check-key`: the requirements on a key as a table, each tried for real.
//!
//! Exit code 0 when nothing fails (warnings may be there), that of [`Kind::Denied`] when something
//! does, and that of [`Kind::Unreachable`] when the key service did not say.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::backing::Backing;
use crate::backing::linux::LinuxBacking;
use crate::config::Config;
use crate::crypto;
use crate::daemon::pins::{self, Pin};
use crate::daemon::{escrow, harden, settings, volume};
use crate::error::{Error, Kind, Result};
use crate::key::custody;
use crate::key::envelope::Envelope;
use crate::key::provider;
use crate::key::requirement::{Report, Verdict};
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
        if provider::is_key(&args.key) { None } else { Some(of_volume(&args.key, &config.dir.0)?) };
    let envelope = volume.as_ref().map(|(envelope, _)| envelope.clone());
    let kid = envelope.as_ref().map_or(&args.key, |envelope| &envelope.kid);
    let provider = settings::provider(&config, kid)?;
    harden::process("byokfs-check")?;
    crypto::selftest::run()?;

    let mut requirements = settings::requirements(&config, kid, false);
    requirements.strict |= args.strict;
    let mut report = custody::survey(&*provider, kid, envelope.as_ref(), &requirements, LIMIT)
        .map_err(|error| volume::name_the_service(error.into(), kid))?;
    if let Some((envelope, pin)) = &volume {
        let escrow = pin.as_ref().and_then(|pin| pin.escrow.as_ref());
        report.rows.push(escrow::row(escrow, &envelope.kid, requirements.strict));
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

/// The envelope below a backing directory, or below that of a mount, and the volume's pin.
fn of_volume(name: &str, config_dir: &Path) -> Result<(Envelope, Option<Pin>)> {
    let backing = LinuxBacking::open(&backing_directory(Path::new(name))?)?;
    let info = Store::inspect(&*backing)?;
    let envelope = Envelope::load(&backing.root())?;
    volume::expect_own_envelope(&envelope, &info)?;
    // A volume can be checked where it is not mounted.
    Ok((envelope, pins::read(config_dir, &info.uuid).ok()))
}
