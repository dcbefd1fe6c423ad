//! `byokfs rotate kek`, `rekey` and `forget-key`: by the daemon where the volume is mounted, else
//! here, with the volume locked.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::backing::Backing;
use crate::backing::linux::LinuxBacking;
use crate::config::Config;
use crate::crypto;
use crate::daemon::control::Verb;
use crate::daemon::offline::when_free;
use crate::daemon::rotation::{self, Order, Site};
use crate::daemon::{check, harden, hex};
use crate::error::{Kind, Result};
use crate::key::envelope::Envelope;
use crate::observe::audit;
use crate::store::{Store, VolumeInfo};

use super::args::{ForgetKeyArgs, RekeyArgs, ReportArgs, RotateKekArgs, TargetArgs};
use super::output;
use super::target::Target;

/// Two conversations with key services, and a rotation or revalidation that is under way.
const TIMEOUT: Duration = Duration::from_secs(300);

pub(super) fn kek(args: RotateKekArgs) -> Result<()> {
    let RotateKekArgs { report, to, algorithm } = args;
    rotate(&report, to, algorithm, false)
}

pub(super) fn rekey(args: RekeyArgs) -> Result<()> {
    let RekeyArgs { report, to, algorithm } = args;
    rotate(&report, Some(to), algorithm, true)
}

fn rotate(
    args: &ReportArgs,
    to: Option<String>,
    algorithm: Option<String>,
    rekey: bool,
) -> Result<()> {
    // A wrong name is the same error whether or not a daemon is asked.
    let known = algorithm.as_deref().map(rotation::algorithm).transpose()?;
    let answer = match mounted(&args.target)? {
        Some(mut target) => target.call(Verb::RotateKek { to, algorithm, rekey }, TIMEOUT)?,
        None => {
            let volume = Unmounted::open(&args.target)?;
            let order = Order { to, algorithm: known, rekey, followed: false };
            let dir = volume.backing.root();
            let before = Envelope::load(&dir)?.kid;
            let rotated = rotation::rotate(&volume.site(&dir), &order)?;
            rotation::outcome(&volume.info, &before, rotated.as_ref(), &dir)?
        }
    };
    for warning in answer["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        output::warning(warning);
    }
    if args.json {
        return output::json(&answer);
    }
    let text = |field: &str| answer[field].as_str().unwrap_or("?").to_owned();
    if answer["changed"] == Value::Bool(true) {
        output::line(&format!("from {}", text("from")))?;
        output::line(&format!("to   {}", text("to")))
    } else {
        output::line(&format!("already {}, which is the current version", text("to")))
    }
}

pub(super) fn forget(args: ForgetKeyArgs) -> Result<()> {
    let ForgetKeyArgs { target, kid, no_copies } = args;
    match mounted(&target)? {
        Some(mut target) => target.call(Verb::ForgetKey { kid, no_copies }, TIMEOUT).map(drop),
        None => {
            let volume = Unmounted::open(&target)?;
            let dir = volume.backing.root();
            rotation::forget(&volume.site(&dir), &kid, no_copies)
        }
    }
}

/// None when nothing is mounted there. A mount whose daemon does not answer is an error: it has
/// the volume.
fn mounted(args: &TargetArgs) -> Result<Option<Target>> {
    match Target::find(args) {
        Ok(target) => Ok(Some(target)),
        Err(error) if error.kind == Kind::NotMounted && args.target.is_dir() => Ok(None),
        Err(error) => Err(error),
    }
}

/// A volume that nobody else has.
struct Unmounted {
    back: PathBuf,
    config: Config,
    config_dir: PathBuf,
    info: VolumeInfo,
    backing: std::sync::Arc<LinuxBacking>,
    _lock: Box<dyn std::fmt::Debug + Send + Sync>,
}

impl Unmounted {
    fn open(args: &TargetArgs) -> Result<Unmounted> {
        let config = Config::load(args.config.config.as_deref(), &[])?;
        let back = check::resolve("the backing directory", &args.target)?;
        // It will hold the volume key.
        harden::process("byokfs-rotate")?;
        crypto::selftest::run()?;
        let backing = LinuxBacking::open(&back)?;
        let info = Store::inspect(&*backing)?;
        let lock = when_free(&back, || Store::lock(&*backing))?;
        if let Some(file) = &config.audit.file {
            check::parent_dir(file)?;
            audit::install(file, &[("volume", hex::uuid(&info.uuid))])?;
        }
        let config_dir = config.dir.0.clone();
        Ok(Unmounted { back, config, config_dir, info, backing, _lock: lock })
    }

    fn site<'a>(&'a self, dir: &'a crate::backing::NodeRef) -> Site<'a> {
        Site {
            dir,
            back: &self.back,
            info: &self.info,
            config: &self.config,
            config_dir: &self.config_dir,
        }
    }
}
