//! `byokfs revalidate`.

use std::time::Duration;

use crate::daemon::control::Verb;
use crate::error::Result;

use super::args::ReportArgs;
use super::target::Target;
use super::{output, status};

/// Longer than a whole check of the key, with a cut-off under way before it.
const TIMEOUT: Duration = Duration::from_secs(300);

pub(super) fn run(args: ReportArgs) -> Result<()> {
    let answer = Target::find(&args.target)?.call(Verb::Revalidate, TIMEOUT)?;
    if args.json { output::json(&answer) } else { output::text(&status::render(&answer)) }
}
