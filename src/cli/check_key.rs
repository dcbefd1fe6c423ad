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
use crate::daemon::{check, harden, mountinfo, settings, volume};
use crate::error::{Error, Kind, Result};
use crate::key::custody;
use crate::key::envelope::Envelope;
use crate::key::provider;
use crate::key::requirement::{Report, Verdict};

use super::args::CheckKeyArgs;
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
    let envelope = if provider::is_key(&args.key) { None } else { Some(of_volume(&args.key)?) };
    let kid = envelope.as_ref().map_or(&args.key, |envelope| &envelope.kid);
    let provider = provider::for_key(kid, &settings::provider(&config.key))?;
    harden::process("byokfs-check")?;
    crypto::selftest::run()?;

    let mut requirements = settings::requirements(&config, false);
    requirements.strict |= args.strict;
    let report = custody::survey(&*provider, kid, envelope.as_ref(), &requirements, LIMIT)
        .map_err(|error| volume::name_the_service(error.into(), kid))?;
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

/// The envelope below a backing directory, or below that of a mount.
fn of_volume(name: &str) -> Result<Envelope> {
    let given = Path::new(name);
    let mounted = std::path::absolute(given).ok().map(|path| mountinfo::find(&path)).transpose()?;
    let back = match mounted.flatten() {
        Some(mount) => mount.source,
        None => check::resolve("the key, mount point or backing directory", given)?,
    };
    Envelope::load(&LinuxBacking::open(&back)?.root())
}
