//! `byokfs status`. Exit code 0 whenever the daemon answers: the state is in what it prints.

use std::fmt::Write;
use std::time::Duration;

use serde_json::Value;

use crate::daemon::control::Verb;
use crate::error::Result;

use super::args::ReportArgs;
use super::output;
use super::target::Target;

const TIMEOUT: Duration = Duration::from_secs(30);

pub(super) fn run(args: ReportArgs) -> Result<()> {
    let answer = Target::find(&args.target)?.call(Verb::Status, TIMEOUT)?;
    if args.json { output::json(&answer) } else { output::text(&render(&answer)) }
}

/// For people: what there is of the fields they look for, in this order.
pub(super) fn render(status: &Value) -> String {
    const LINES: [(&str, &str); 13] = [
        ("state", "state"),
        ("reason", "reason"),
        ("reason_text", "meaning"),
        ("since", "since"),
        ("kek", "key"),
        ("last_success", "last success"),
        ("last_probe", "last probe"),
        ("last_error", "last error"),
        ("next_probe", "next probe"),
        ("mnt", "mount point"),
        ("back", "backing directory"),
        ("volume", "volume"),
        ("pid", "daemon"),
    ];
    let mut text = String::new();
    for (field, label) in LINES {
        let value = match &status[field] {
            Value::Null => continue,
            Value::String(value) => value.clone(),
            value => value.to_string(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:<18} {value}", format!("{label}:"));
    }
    if let Some(counters) = status["counters"].as_object() {
        for (name, value) in counters {
            let _ = writeln!(text, "{:<18} {value}", format!("{}:", name.replace('_', " ")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn absent_fields_have_no_line() {
        let status = json!({
            "state": "Inaccessible", "reason": "KeyDisabled", "since": "2026-01-02T03:04:05Z",
            "last_error": null, "pid": 7, "counters": {"integrity_failures": 2},
        });
        assert_eq!(
            render(&status),
            "state:             Inaccessible\n\
             reason:            KeyDisabled\n\
             since:             2026-01-02T03:04:05Z\n\
             daemon:            7\n\
             integrity failures: 2\n"
        );
    }
}
