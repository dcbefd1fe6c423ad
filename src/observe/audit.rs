//! The audit trail: one JSON object per line, appended with a single write, by a thread that holds
//! up nobody if the file hangs ([`super::writer`]).
//!
//! `event` and `status` are stable names ([`Name`], [`Status`]); `time` is RFC 3339 in UTC.
//! Events that do not go through stages have no `status`. No event holds a secret or a token.
//! A trail that cannot be written is reported in the log and never stops an operation.
//!
//! The file must not lie on a byokfs mount of this process: the daemon may not touch its own
//! mount. `daemon::start` refuses such a path.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::writer::Lines;
use super::{append_to, ends_within_a_line};
use crate::error::{Context, IntegrityFailure, Result};
use crate::sync::Mutex;

/// Identical integrity failures within this time are counted, not written again.
const REPEAT_AFTER: Duration = Duration::from_secs(60);
/// Distinct integrity failures written within [`REPEAT_AFTER`]; the rest are counted.
const DISTINCT_LIMIT: usize = 1000;

/// What happened. The names are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Name {
    VolumeCreated,
    VolumeMounted,
    VolumeUnmounted,
    /// A mount found changes in the log that no checkpoint had brought home.
    Recovered,
    /// The volume got another log, or the log another size or place.
    LogChanged,
    /// A write or flush of the log failed: writes fail until the volume is mounted again.
    LogFailed,
    /// The volume is being cut off, or was.
    MakeInaccessible,
    /// The volume is being brought back, or was.
    MakeAccessible,
    /// A stop of the database server.
    Fence,
    /// One step of it.
    FenceStep,
    /// The daemon ended without unmounting; its guard takes over.
    DaemonDied,
    /// The guard ended; the daemon serves on without one.
    GuardDied,
    /// The key service cannot be reached or trusted; the volume still serves.
    KeyDegraded,
    /// Fully serving again.
    KeyRecovered,
    /// Something about the key service's answers that a person should see.
    KeyAlert,
    KeyExpiryWarning,
    /// Still Inaccessible, for another reason.
    ReasonChanged,
    /// The volume could not open by itself although the key is good again.
    HealFailed,
    KekRotated,
    VolumeKeyRotated,
    /// `byokfs fsck` has restored copies, brought the log home, and perhaps moved things to `lost/`.
    VolumeRepaired,
    /// A key version that copies might have needed was taken off the list.
    KeyForgotten,
    /// A rotation of data encryption keys began, was ended or came to its end.
    DekRotated,
    /// Data encryption keys that nothing needs any more are gone for good.
    DekDestroyed,
    IntegrityFailure,
    UnmountRefused,
}

impl Name {
    pub const fn as_str(self) -> &'static str {
        match self {
            Name::VolumeCreated => "VolumeCreated",
            Name::VolumeMounted => "VolumeMounted",
            Name::VolumeUnmounted => "VolumeUnmounted",
            Name::Recovered => "Recovered",
            Name::LogChanged => "LogChanged",
            Name::LogFailed => "LogFailed",
            Name::MakeInaccessible => "MakeInaccessible",
            Name::MakeAccessible => "MakeAccessible",
            Name::Fence => "Fence",
            Name::FenceStep => "FenceStep",
            Name::DaemonDied => "DaemonDied",
            Name::GuardDied => "GuardDied",
            Name::KeyDegraded => "KeyDegraded",
            Name::KeyRecovered => "KeyRecovered",
            Name::KeyAlert => "KeyAlert",
            Name::ReasonChanged => "ReasonChanged",
            Name::HealFailed => "HealFailed",
            Name::KeyExpiryWarning => "KeyExpiryWarning",
            Name::KekRotated => "KekRotated",
            Name::VolumeKeyRotated => "VolumeKeyRotated",
            Name::VolumeRepaired => "VolumeRepaired",
            Name::KeyForgotten => "KeyForgotten",
            Name::DekRotated => "DekRotated",
            Name::DekDestroyed => "DekDestroyed",
            Name::IntegrityFailure => "IntegrityFailure",
            Name::UnmountRefused => "UnmountRefused",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Started,
    Succeeded,
    Failed,
}

impl Status {
    pub const fn as_str(self) -> &'static str {
        match self {
            Status::Started => "Started",
            Status::Succeeded => "Succeeded",
            Status::Failed => "Failed",
        }
    }
}

/// One line of the trail.
#[derive(Clone, Debug)]
pub struct Event {
    name: Name,
    fields: Map<String, Value>,
}

impl Event {
    pub fn new(name: Name) -> Event {
        Event { name, fields: Map::new() }
    }

    pub fn status(self, status: Status) -> Event {
        self.with("status", status.as_str())
    }

    pub fn with(mut self, field: &'static str, value: impl Into<Value>) -> Event {
        self.fields.insert(field.to_owned(), value.into());
        self
    }
}

/// Where the trail goes, and what every line of it carries.
struct Trail {
    lines: Lines,
    context: Map<String, Value>,
}

#[derive(Default)]
struct Repeats {
    since: Option<Instant>,
    seen: HashMap<(&'static str, String, Option<u64>), u64>,
    dropped: u64,
}

/// Is handed each event's name and line; must not wait, nor emit.
pub type Listener = Box<dyn Fn(Name, &str) + Send>;

static TRAIL: Mutex<Option<Trail>> = Mutex::new(None);
static LISTENER: Mutex<Option<Listener>> = Mutex::new(None);
static REPEATS: Mutex<Option<Repeats>> = Mutex::new(None);

/// Opens the trail at `path` (created with mode 0600) for this process. `context` is added to
/// every line: the volume and its mount point.
pub fn install(path: &Path, context: &[(&'static str, String)]) -> Result<()> {
    let file =
        append_to(path).context(|| format!("cannot open the audit log {}", path.display()))?;
    let name = path.display().to_string();
    let complaint = move |what: &str| ::log::error!("cannot write the audit log {name}: {what}");
    let lines = Lines::start("audit-log", file, ends_within_a_line(path), Box::new(complaint))?;
    let context =
        context.iter().map(|(key, value)| ((*key).to_owned(), value.clone().into())).collect();
    *TRAIL.lock() = Some(Trail { lines, context });
    Ok(())
}

/// Has every event of this process handed to `listener` too.
pub fn forward(listener: Listener) {
    *LISTENER.lock() = Some(listener);
}

/// Writes one event, to the trail if there is one, and to the log.
pub fn emit(event: Event) {
    let name = event.name;
    let mut line = Map::new();
    line.insert("time".into(), timestamp(SystemTime::now()).into());
    line.insert("event".into(), event.name.as_str().into());
    line.extend(event.fields);
    let trail = TRAIL.lock();
    if let Some(trail) = trail.as_ref() {
        line.extend(trail.context.clone());
    }
    let mut text = Value::Object(line).to_string();
    ::log::info!(target: "audit", "{text}");
    text.push('\n');
    if let Some(listener) = LISTENER.lock().as_ref() {
        listener(name, &text);
    }
    if let Some(trail) = trail.as_ref() {
        trail.lines.put(text.into_bytes());
    }
}

/// Bytes on the backing storage failed their authentication. `path` is the logical one, empty
/// where it cannot be read. The same failure again within a minute is only counted.
pub fn integrity_failure(failure: &IntegrityFailure, path: &str, backing_path: &str) {
    let Some((repeated, dropped)) = admit(failure, Instant::now()) else { return };
    let mut event = Event::new(Name::IntegrityFailure)
        .with("what", failure.what)
        .with("file_id", failure.file_id.as_str())
        .with("backing_path", backing_path)
        .with("detail", failure.detail.as_str());
    if let Some(index) = failure.index {
        event = event.with("index", index);
    }
    if !path.is_empty() {
        event = event.with("path", path);
    }
    if repeated > 0 {
        event = event.with("repeated", repeated);
    }
    if dropped > 0 {
        event = event.with("not_written", dropped);
    }
    emit(event);
}

/// Whether to write this failure: with how often it was seen, and how many others were dropped,
/// in the window that has just ended.
fn admit(failure: &IntegrityFailure, now: Instant) -> Option<(u64, u64)> {
    let mut guard = REPEATS.lock();
    let repeats = guard.get_or_insert_with(Repeats::default);
    let key = (failure.what, failure.file_id.clone(), failure.index);
    let mut ended = (0, 0);
    if repeats.since.is_none_or(|since| now.duration_since(since) >= REPEAT_AFTER) {
        ended = (repeats.seen.get(&key).map_or(0, |count| count - 1), repeats.dropped);
        *repeats = Repeats { since: Some(now), ..Repeats::default() };
    }
    if let Some(count) = repeats.seen.get_mut(&key) {
        *count += 1;
        return None;
    }
    if repeats.seen.len() >= DISTINCT_LIMIT {
        repeats.dropped += 1;
        return None;
    }
    repeats.seen.insert(key, 1);
    Some(ended)
}

/// RFC 3339 in UTC; the epoch for a time that has no such form.
pub fn timestamp(time: SystemTime) -> String {
    // Not `OffsetDateTime::from`, which panics after the year 9999, where a key may well end.
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let nanos = i128::try_from(since.as_nanos()).unwrap_or(i128::MAX);
    match OffsetDateTime::from_unix_timestamp_nanos(nanos) {
        Ok(date) => date.format(&Rfc3339).unwrap_or_else(|_| "1970-01-01T00:00:00Z".to_owned()),
        Err(_) => "9999-12-31T23:59:59Z".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn every_time_has_a_text() {
        let at =
            |seconds| timestamp(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(1_700_000_000), "2023-11-14T22:13:20Z");
        // What CKA_END_DATE 99991231 gives, and the latest that a key service can name.
        for late in [253_402_300_800, i64::MAX as u64] {
            assert_eq!(at(late), "9999-12-31T23:59:59Z");
        }
    }

    fn failure(index: u64) -> IntegrityFailure {
        IntegrityFailure {
            what: "block",
            file_id: "ab".into(),
            index: Some(index),
            detail: String::new(),
        }
    }

    #[test]
    fn lines_are_json_with_stable_fields_and_the_file_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        install(&path, &[("volume", "v-1".into())]).unwrap();
        emit(Event::new(Name::MakeInaccessible).status(Status::Started).with("reason", "x"));
        let text = std::fs::read_to_string(&path).unwrap();
        let line: Value = serde_json::from_str(
            text.lines().find(|line| line.contains("MakeInaccessible")).unwrap(),
        )
        .unwrap();
        assert_eq!(line["event"], "MakeInaccessible");
        assert_eq!(line["status"], "Started");
        assert_eq!(line["volume"], "v-1");
        OffsetDateTime::parse(line["time"].as_str().unwrap(), &Rfc3339).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn identical_failures_are_counted_and_distinct_ones_bounded() {
        let now = Instant::now();
        *REPEATS.lock() = None;
        assert_eq!(admit(&failure(1), now), Some((0, 0)));
        assert_eq!(admit(&failure(1), now), None);
        assert_eq!(admit(&failure(1), now), None);
        for index in 2..=DISTINCT_LIMIT as u64 + 5 {
            admit(&failure(index), now);
        }
        assert_eq!(admit(&failure(1), now + REPEAT_AFTER), Some((2, 5)));
    }
}
