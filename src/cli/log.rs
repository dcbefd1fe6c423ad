//! `byokfs log`: another size or place for the intent log, while nobody has the volume.

use crate::config::Config;
use crate::daemon::log_change::{self, Change};
use crate::daemon::offline::Offline;
use crate::error::{Error, Result};

use super::args::{LogVerb, TargetArgs};
use super::output;

pub(super) fn run(verb: LogVerb) -> Result<()> {
    let (target, change) = match verb {
        LogVerb::Resize { target, size } => (target, Change::Resize(size)),
        LogVerb::Move { target, to } => {
            // Before the working directory is another.
            let to = std::path::absolute(&to)
                .map_err(|error| Error::usage(format!("{}: {error}", to.display())))?;
            (target, Change::Move(to))
        }
        LogVerb::Discard { target, size } => (target, Change::Discard(size)),
    };
    let TargetArgs { target, config } = target;
    let config = Config::load(config.config.as_deref(), &[])?;
    let volume = Offline::open(&target, config, "byokfs-log", false)?;
    log_change::change(&volume, &change)?;
    output::line(match change {
        Change::Resize(_) => "the log has its new size",
        Change::Move(_) => "the log is in its new place",
        Change::Discard(_) => {
            "the volume has a new, empty log; check it with `byokfs fsck` before it is used"
        }
    })
}
