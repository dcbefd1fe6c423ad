//! `byokfs rotate volume`: another volume key, while nobody has the volume.

use std::io::IsTerminal;

use serde_json::json;

use crate::config::Config;
use crate::daemon::offline::Offline;
use crate::daemon::volume_key;
use crate::error::Result;

use super::args::ReportArgs;
use super::output;

pub(super) fn run(args: ReportArgs) -> Result<()> {
    let config = Config::load(args.target.config.config.as_deref(), &[])?;
    let volume = Offline::open(&args.target.target, config, "byokfs-rotate", false)?;
    let terminal = std::io::stderr().is_terminal();
    let mut told = |files| {
        if terminal && files % 64 == 0 {
            output::progress(&format!("{files} files"));
        }
    };
    let outcome = volume_key::rotate(&volume, &mut told);
    if terminal {
        output::end_progress();
    }
    let outcome = outcome?;
    if outcome.adopted.unreadable > 0 {
        output::warning(&format!(
            "{} files have headers that cannot be read, and stay as they are",
            outcome.adopted.unreadable
        ));
    }
    if args.json {
        return output::json(&json!({
            "from": outcome.from,
            "to": outcome.to,
            "files": outcome.adopted.files,
            "unreadable_files": outcome.adopted.unreadable,
            "resumed": outcome.resumed,
        }));
    }
    output::line(&format!(
        "volume key {} in the place of {}, in {} files",
        outcome.to, outcome.from, outcome.adopted.files
    ))
}
