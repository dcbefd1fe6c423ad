//! `byokfs revalidate`.

use std::time::Duration;

use serde_json::Value;

use crate::daemon::control::Verb;
use crate::error::Result;

use super::args::RevalidateArgs;
use super::target::Target;
use super::{output, status};

/// Longer than a whole check of the key, with a cut-off under way before it.
const TIMEOUT: Duration = Duration::from_secs(300);

pub(super) fn run(args: RevalidateArgs) -> Result<()> {
    let RevalidateArgs { report: args, accept_key } = args;
    let answer = Target::find(&args.target)?.call(Verb::Revalidate { accept_key }, TIMEOUT)?;
    if args.json {
        return output::json(&answer);
    }
    let text = |row: &Value, field: &str| row[field].as_str().unwrap_or_default().to_owned();
    for row in answer["requirements"]["rows"].as_array().into_iter().flatten() {
        if row["verdict"] == "Warn" {
            let [requirement, found, fix] = ["requirement", "found", "fix"].map(|at| text(row, at));
            output::warning(&format!("{requirement}: {found}; {fix}"));
        }
    }
    output::text(&status::render(&answer))
}
