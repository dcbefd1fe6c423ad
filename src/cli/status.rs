//! `byokfs status`. Exit code 0 whenever the daemon answers: the state is in what it prints.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Map, Value};

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
        ("reason_detail", "detail"),
        ("since", "since"),
        ("kek", "key"),
        ("last_success", "last success"),
        ("last_probe", "last probe"),
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
            Value::Object(probe) => describe_probe(probe),
            value => value.to_string(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:<18} {value}", format!("{label}:"));
    }
    if let Some(log) = status["log"].as_object() {
        let _ = writeln!(text, "{:<18} {}", "log:", describe_log(log));
    }
    if let Some(rotation) = status["rotation"].as_object() {
        let _ = writeln!(text, "{:<18} {}", "rotation:", describe_rotation(rotation));
    }
    if let Some(counters) = status["counters"].as_object() {
        for (name, value) in counters {
            let _ = writeln!(text, "{:<18} {value}", format!("{}:", name.replace('_', " ")));
        }
    }
    text
}

/// How full it is, and what is wrong with it.
fn describe_log(log: &Map<String, Value>) -> String {
    let number = |field: &str| log.get(field).and_then(Value::as_u64).unwrap_or(0);
    let percent = (number("used") * 100).checked_div(number("capacity")).unwrap_or(0);
    let mut text = format!("{percent}% full, {} files to bring home", number("dirty_files"));
    for (field, what) in [
        ("failure", "FAILED, writes fail until it is mounted again"),
        ("checkpoint_failure", "the last checkpoint failed"),
    ] {
        if let Some(reason) = log.get(field).and_then(Value::as_str) {
            let _ = write!(text, "; {what}: {reason}");
        }
    }
    text
}

/// How far a rotation of data encryption keys is.
pub(super) fn describe_rotation(rotation: &Map<String, Value>) -> String {
    let number = |field: &str| rotation.get(field).and_then(Value::as_u64);
    let state = rotation.get("state").and_then(Value::as_str).unwrap_or("?");
    let mut text = state.to_owned();
    if let (Some(files), Some(done)) = (number("files"), number("files_done")) {
        let _ = write!(text, ", {done} of {files} files");
    }
    if let (Some(bytes), Some(done)) = (number("bytes"), number("bytes_done")) {
        // One that has just begun has found nothing yet.
        let of_none = if state == "done" { 100 } else { 0 };
        let percent = (done * 100).checked_div(bytes).unwrap_or(of_none);
        let _ = write!(text, ", {percent}% of {} MiB", bytes >> 20);
    }
    if let Some(damaged) = number("damaged_files").filter(|&damaged| damaged > 0) {
        let _ = write!(text, ", {damaged} damaged files keep an old key");
    }
    if let Some(failure) = rotation.get("failure").and_then(Value::as_str) {
        let _ = write!(text, ": {failure}");
    }
    text
}

fn describe_probe(probe: &Map<String, Value>) -> String {
    let fields = ["at", "result", "reason", "detail"];
    let texts: Vec<&str> =
        fields.iter().filter_map(|field| probe.get(*field).and_then(Value::as_str)).collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_rotation_that_has_found_nothing_yet_is_not_done() {
        let rotation = |state: &str| {
            let rotation =
                json!({"state": state, "files": 0, "files_done": 0, "bytes": 0, "bytes_done": 0});
            describe_rotation(rotation.as_object().unwrap())
        };
        assert_eq!(rotation("running"), "running, 0 of 0 files, 0% of 0 MiB");
        assert_eq!(rotation("done"), "done, 0 of 0 files, 100% of 0 MiB");
    }

    #[test]
    fn absent_fields_have_no_line() {
        let status = json!({
            "state": "Inaccessible", "reason": "KeyDisabled", "since": "2026-01-02T03:04:05Z",
            "last_success": null, "pid": 7,
            "last_probe": {"at": "2026-01-02T03:04:05Z", "result": "Revoked", "reason": null},
            "log": {"used": 5, "capacity": 20, "dirty_files": 3, "failure": "log.hot: no", "checkpoint_failure": null},
            "counters": {"integrity_failures": 2},
        });
        assert_eq!(
            render(&status),
            "state:             Inaccessible\n\
             reason:            KeyDisabled\n\
             since:             2026-01-02T03:04:05Z\n\
             last probe:        2026-01-02T03:04:05Z, Revoked\n\
             daemon:            7\n\
             log:               25% full, 3 files to bring home; FAILED, writes fail until it is mounted again: log.hot: no\n\
             integrity failures: 2\n"
        );
    }
}
