//! The audit log: one JSON line per call, in the shape of the real service's `AuditEvent` rows.
//!
//! Who, what, on which key version, with which result. No tokens, no header secrets, no values.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use parking_lot::Mutex;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::store::identities::Identity;
use crate::error::{Context, Result};

#[derive(Debug)]
pub(crate) struct AuditLog {
    file: Mutex<File>,
}

/// One call, filled in as it is understood.
#[derive(Debug, Default)]
pub(crate) struct Event {
    pub(crate) operation: &'static str,
    pub(crate) caller: Option<Identity>,
    pub(crate) key: Option<String>,
    pub(crate) version: Option<String>,
    /// Identity that an administrative call acts on.
    pub(crate) subject: Option<String>,
}

/// How the call ended.
#[derive(Debug)]
pub(crate) struct Outcome<'a> {
    pub(crate) status: u16,
    /// The code of a refusal.
    pub(crate) reason: Option<&'a str>,
    pub(crate) request_id: &'a str,
    pub(crate) client: Option<String>,
}

impl AuditLog {
    pub(crate) fn open(path: &Path) -> Result<AuditLog> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .context(|| format!("cannot open the audit log {}", path.display()))?;
        Ok(AuditLog { file: Mutex::new(file) })
    }

    /// A call that cannot be recorded is still answered; the failure goes to the server's log.
    pub(crate) fn record(&self, event: &Event, outcome: &Outcome<'_>, now: i64) {
        let time = OffsetDateTime::from_unix_timestamp(now)
            .ok()
            .and_then(|time| time.format(&Rfc3339).ok())
            .unwrap_or_default();
        let success = outcome.status < 400;
        let mut line = json!({
            "time": time,
            "category": "AuditEvent",
            "operationName": if event.operation.is_empty() { "Unknown" } else { event.operation },
            "resultType": if success { "Success" } else { "Failure" },
            "httpStatusCode": outcome.status,
            "callerIpAddress": outcome.client,
            "correlationId": outcome.request_id,
            "identity": event.caller.as_ref().map(|caller| json!({
                "name": caller.name,
                "oid": caller.object_id,
                "appid": caller.client_id,
            })),
        });
        for (name, value) in [
            ("key", event.key.as_deref()),
            ("keyVersion", event.version.as_deref()),
            ("subject", event.subject.as_deref()),
            ("resultSignature", outcome.reason),
        ] {
            if let Some(value) = value {
                line[name] = json!(value);
            }
        }
        // One write per line: lines of a killed server may be missing, never mixed.
        let text = format!("{line}\n");
        if let Err(error) = self.file.lock().write_all(text.as_bytes()) {
            log::error!("cannot write the vault's audit log: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_call_is_one_line_of_json() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let log = AuditLog::open(&path).unwrap();
        let outcome =
            Outcome { status: 403, reason: Some("KeyDisabled"), request_id: "r", client: None };
        let event =
            Event { operation: "KeyUnwrap", key: Some("line\nbreak".into()), ..Event::default() };
        log.record(&event, &outcome, 0);
        log.record(&Event::default(), &Outcome { status: 200, reason: None, ..outcome }, 1);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["resultSignature"], "KeyDisabled");
        assert_eq!(lines[0]["time"], "1970-01-01T00:00:00Z");
        assert_eq!(lines[1]["resultType"], "Success");
    }
}
