//! Standard output and standard error of the verbs.

use std::io::{self, Write};

use serde::Serialize;

use crate::error::{Context, Error, Kind, Result};

/// `byokfs: message` on standard error.
pub fn error(error: &Error) {
    let line = format!("byokfs: {error}\n");
    // Nowhere is left to say that standard error is gone; the exit code still tells.
    let _ = io::stderr().write_all(line.as_bytes());
}

/// `byokfs: warning: message` on standard error.
pub fn warning(message: &str) {
    let line = format!("byokfs: warning: {message}\n");
    let _ = io::stderr().write_all(line.as_bytes());
}

/// Replaces the line of standard error, which is a terminal, by this one.
pub fn progress(line: &str) {
    let _ = write!(io::stderr(), "\r\x1b[K{line}");
}

/// Ends such a line.
pub fn end_progress() {
    let _ = io::stderr().write_all(b"\r\x1b[K");
}

pub fn line(line: &str) -> Result<()> {
    text(&format!("{line}\n"))
}

/// As one write. A reader that has gone away (`| head`) is no failure.
pub fn text(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context(|| "cannot write to standard output".to_owned()),
    }
}

/// `value` as one indented JSON object.
pub fn json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::new(Kind::Io, "cannot write JSON").with_source(error))?;
    line(&text)
}
