//! The audit log: one JSON line per call, a record as the real service's `AuditEvent` log has them.
//!
//! Who, what, on which key version, with which result. No tokens, no header secrets, no values.
//! What the real records do not have is under `byokfs`.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::access::Needed;
use super::store::identities::Identity;
use crate::error::{Context, Result};
use crate::sync::Mutex;

const OBJECT_ID_CLAIM: &str = "http://schemas.microsoft.com/identity/claims/objectidentifier";

#[derive(Debug)]
pub(crate) struct AuditLog {
    path: PathBuf,
    resource_id: String,
    log: Mutex<Log>,
}

#[derive(Debug)]
struct Log {
    file: File,
    /// It ends within a line, as a full disk or a power cut leaves it.
    cut_off: bool,
}

/// One call, filled in as it is understood.
#[derive(Debug, Default)]
pub(crate) struct Event {
    pub(crate) operation: &'static str,
    pub(crate) caller: Option<Arc<Identity>>,
    pub(crate) key: Option<String>,
    pub(crate) version: Option<String>,
    pub(crate) needed: Option<Needed>,
    pub(crate) algorithm: Option<String>,
    pub(crate) api_version: Option<String>,
    /// Identity that an administrative call acts on.
    pub(crate) subject: Option<String>,
    /// The faults that hit it.
    pub(crate) drill: Option<Vec<&'static str>>,
}

/// How the call ended.
#[derive(Debug, Default)]
pub(crate) struct Outcome<'a> {
    pub(crate) status: u16,
    /// The code of a refusal.
    pub(crate) reason: Option<&'a str>,
    /// Its message.
    pub(crate) description: &'a str,
    pub(crate) request_id: &'a str,
    pub(crate) client: Option<IpAddr>,
    pub(crate) user_agent: Option<&'a str>,
    /// What was asked, without its query.
    pub(crate) target: Option<String>,
    pub(crate) api_version: Option<String>,
    pub(crate) duration: Duration,
}

fn open(path: &Path) -> Result<Log> {
    OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .and_then(|file| Ok(Log { cut_off: is_cut_off(&file)?, file }))
        .context(|| format!("cannot open the audit log {}", path.display()))
}

fn is_cut_off(file: &File) -> std::io::Result<bool> {
    let mut last = [b'\n'];
    if let Some(at) = file.metadata()?.len().checked_sub(1) {
        file.read_exact_at(&mut last, at)?;
    }
    Ok(last != [b'\n'])
}

impl AuditLog {
    pub(crate) fn open(path: &Path, resource_id: String) -> Result<AuditLog> {
        Ok(AuditLog { path: path.to_owned(), resource_id, log: Mutex::new(open(path)?) })
    }

    /// After the file was moved away.
    pub(crate) fn reopen(&self) -> Result<()> {
        let log = open(&self.path)?;
        *self.log.lock() = log;
        Ok(())
    }

    /// A call that cannot be recorded is still answered; the failure goes to the server's log.
    pub(crate) fn record(&self, event: &Event, outcome: &Outcome<'_>, now: i64) {
        let line = self.line(event, outcome, now);
        let mut log = self.log.lock();
        // One write per line: lines of a killed server may be missing, never mixed.
        let text = format!("{}{line}\n", if log.cut_off { "\n" } else { "" });
        log.cut_off = match log.file.write_all(text.as_bytes()) {
            Ok(()) => false,
            Err(error) => {
                log::error!("cannot write the vault's audit log: {error}");
                is_cut_off(&log.file).unwrap_or(true)
            }
        };
    }

    fn line(&self, event: &Event, outcome: &Outcome<'_>, now: i64) -> Value {
        let time = OffsetDateTime::from_unix_timestamp(now)
            .ok()
            .and_then(|time| time.format(&Rfc3339).ok())
            .unwrap_or_default();
        let success = outcome.status < 400;
        let mut properties = Map::new();
        if let Some(target) = &outcome.target {
            // The object itself, without what is done with it.
            if let (Some(key), Some((origin, _))) = (&event.key, target.split_once("/keys/")) {
                let version = event.version.as_deref().map(|version| format!("/{version}"));
                let id = format!("{origin}/keys/{key}{}", version.unwrap_or_default());
                properties.insert("id".into(), json!(id));
            }
            properties.insert("requestUri".into(), json!(target));
        }
        if let Some(agent) = outcome.user_agent {
            properties.insert("clientInfo".into(), json!(agent));
        }
        if let Some(algorithm) = &event.algorithm {
            properties.insert("algorithm".into(), json!(algorithm));
        }
        properties.insert("httpStatusCode".into(), json!(outcome.status));
        let mut line = json!({
            "time": time,
            "resourceId": self.resource_id,
            "operationName": if event.operation.is_empty() { "Unknown" } else { event.operation },
            "operationVersion": outcome.api_version,
            "category": "AuditEvent",
            "resultType": if success { "Success" } else { "Failure" },
            "resultSignature": signature(outcome.status),
            "resultDescription": outcome.description,
            "durationMs": outcome.duration.as_millis().to_string(),
            "callerIpAddress": outcome.client,
            "correlationId": outcome.request_id,
            "identity": event.caller.as_ref().map(|caller| json!({
                "claim": { OBJECT_ID_CLAIM: caller.object_id, "appid": caller.client_id },
            })),
            "properties": properties,
        });
        let mut own = Map::new();
        for (name, value) in [
            ("caller", event.caller.as_ref().map(|caller| caller.name.as_str())),
            ("key", event.key.as_deref()),
            ("keyVersion", event.version.as_deref()),
            ("subject", event.subject.as_deref()),
            ("reason", outcome.reason),
        ] {
            if let Some(value) = value {
                own.insert(name.into(), json!(value));
            }
        }
        if let Some(drill) = &event.drill {
            own.insert("drill".into(), json!(drill));
        }
        line["byokfs"] = Value::Object(own);
        line
    }
}

/// The status in a word, as the real records have it.
fn signature(status: u16) -> String {
    match axum::http::StatusCode::from_u16(status).ok().and_then(|code| code.canonical_reason()) {
        Some(reason) => reason.to_owned(),
        None => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_cut_off_takes_no_other_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        std::fs::write(&path, "{\"time\":").unwrap();
        let log = AuditLog::open(&path, String::new()).unwrap();
        log.record(&Event::default(), &Outcome::default(), 0);
        log.record(&Event::default(), &Outcome::default(), 0);
        let text = std::fs::read_to_string(&path).unwrap();
        let whole = text.lines().filter(|line| serde_json::from_str::<Value>(line).is_ok());
        assert_eq!(whole.count(), 2, "{text}");
    }

    #[test]
    fn each_call_is_one_line_in_the_shape_of_the_service() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let log = AuditLog::open(&path, "/subscriptions/x".into()).unwrap();
        let outcome = Outcome {
            status: 403,
            reason: Some("KeyDisabled"),
            description: "no",
            request_id: "r",
            target: Some("https://v:1/keys/kek/abc/unwrapkey".into()),
            duration: Duration::from_millis(7),
            ..Outcome::default()
        };
        let event = Event {
            operation: "KeyUnwrap",
            key: Some("line\nbreak".into()),
            version: Some("abc".into()),
            ..Event::default()
        };
        log.record(&event, &outcome, 0);
        let moved = dir.path().join("moved");
        std::fs::rename(&path, &moved).unwrap();
        log.reopen().unwrap();
        log.record(&Event::default(), &Outcome { status: 200, ..Outcome::default() }, 1);
        let line = |path: &Path| {
            let text = std::fs::read_to_string(path).unwrap();
            assert_eq!(text.lines().count(), 1);
            serde_json::from_str::<Value>(&text).unwrap()
        };
        let first = line(&moved);
        assert_eq!(first["category"], "AuditEvent");
        assert_eq!(first["operationName"], "KeyUnwrap");
        assert_eq!((&first["resultType"], &first["durationMs"]), (&json!("Failure"), &json!("7")));
        assert_eq!(first["resultSignature"], "Forbidden");
        assert_eq!(first["properties"]["id"], "https://v:1/keys/line\nbreak/abc");
        assert_eq!(first["properties"]["httpStatusCode"], 403);
        assert_eq!(first["byokfs"]["reason"], "KeyDisabled");
        assert_eq!(first["time"], "1970-01-01T00:00:00Z");
        assert_eq!(line(&path)["resultType"], "Success");
    }
}
