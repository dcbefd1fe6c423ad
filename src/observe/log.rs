//! The log for people: one line per record, to a file, the journal or standard error.
//!
//! What is written to may hang, and holds up nobody ([`super::writer`]).
//!
//! Callers never log secrets, tokens or key material; nothing here could filter them out.

use std::io::{self, Write};
use std::path::Path;

use env_logger::fmt::Formatter;
use log::{Level, LevelFilter, Record};

use super::writer::{Lines, Torn};
use super::{append_to, ends_within_a_line};
use crate::error::{Context, Error, Kind, Result};

/// Where the log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// Standard error; with the journal's priority prefixes when the journal reads it.
    Stderr,
    /// Appended to a file, created with mode 0600.
    File(&'a Path),
}

/// Sets the process's logger up; a second call fails.
pub fn install(target: Target<'_>, level: LevelFilter) -> Result<()> {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level.min(LevelFilter::Warn));
    builder.filter_module("byokfs", level).filter_module("audit", level.min(LevelFilter::Info));
    // A log that cannot be written has nobody to tell.
    let start = |target: Box<dyn Write + Send>, found_torn: Torn| {
        Lines::start("log", target, found_torn, Box::new(|_| ()))
    };
    let by_nobody = || Box::new(|| false);
    let lines = match target {
        Target::Stderr if journal_reads_stderr() => {
            builder.format(journal_line);
            start(Box::new(io::stderr()), by_nobody())?
        }
        Target::Stderr => {
            builder.format(plain_line);
            start(Box::new(io::stderr()), by_nobody())?
        }
        Target::File(path) => {
            let file =
                append_to(path).context(|| format!("cannot open the log {}", path.display()))?;
            builder.format(plain_line);
            start(Box::new(file), ends_within_a_line(path))?
        }
    };
    builder
        .target(env_logger::Target::Pipe(Box::new(lines)))
        .try_init()
        .map_err(|error| Error::new(Kind::Io, "cannot start the log").with_source(error))
}

/// Set by systemd for services whose standard error is the journal.
fn journal_reads_stderr() -> bool {
    std::env::var_os("JOURNAL_STREAM").is_some()
}

fn plain_line(out: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    let time = out.timestamp_millis();
    writeln!(out, "{time} {:<5} {}: {}", record.level(), record.target(), record.args())
}

/// The journal has its own time; `<N>` is its priority, as in syslog(3).
fn journal_line(out: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    let priority = match record.level() {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    writeln!(out, "<{priority}>{}: {}", record.target(), record.args())
}
