//! `byokfs sync`.

use std::time::Duration;

use crate::daemon::control::Verb;
use crate::error::Result;

use super::args::TargetArgs;
use super::target::Target;

/// A slow disk with much to write.
const TIMEOUT: Duration = Duration::from_secs(600);

pub(super) fn run(args: TargetArgs) -> Result<()> {
    Target::find(&args)?.call(Verb::Sync, TIMEOUT).map(drop)
}
