//! What a starting daemon tells its guard, and the guard the verb: JSON lines on standard output.

use std::fs::File;
use std::io::{self, BufRead, Write};

use serde::{Deserialize, Serialize};

use super::mountinfo::Device;
use crate::error::{Context, Error, Kind, Result};
use crate::sys;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Report {
    /// The file system is in the mount table under this number, and may not serve yet.
    Mounted(Device),
    /// The mount serves.
    Ready,
    /// The mount is there and answers errors until its volume is revalidated: why.
    Shut(String),
    Failed(Failure),
}

/// An [`Error`] on its way through a pipe or socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    pub kind: String,
    pub message: String,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Failure {
        Failure { kind: error.kind.name().to_owned(), message: error.to_string() }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        Error::new(Kind::from_name(&failure.kind).unwrap_or(Kind::Io), failure.message)
    }
}

impl Report {
    /// Writes the line. That nobody reads it any more does not stop a daemon.
    pub fn send(&self) {
        let line = match serde_json::to_string(self) {
            Ok(line) => line + "\n",
            Err(error) => return log::error!("cannot report: {error}"),
        };
        let mut out = io::stdout().lock();
        if let Err(error) = out.write_all(line.as_bytes()).and_then(|()| out.flush()) {
            log::warn!("nobody takes this report: {}: {error}", line.trim_end());
        }
    }

    pub fn parse(line: &str) -> Result<Report> {
        serde_json::from_str(line)
            .map_err(|error| Error::new(Kind::Io, "an unknown report").with_source(error))
    }
}

/// Waits for the mount to serve, or for the error. Of a mount that is there and shut, why it is.
pub fn wait(reports: impl BufRead) -> Result<Option<String>> {
    for line in reports.lines() {
        let line = line.context(|| "cannot read from the mount's guard".to_owned())?;
        match Report::parse(&line)? {
            Report::Mounted(_) => {}
            Report::Ready => return Ok(None),
            Report::Shut(why) => return Ok(Some(why)),
            Report::Failed(failure) => return Err(failure.into()),
        }
    }
    Err(Error::new(Kind::Io, "the daemon ended before the mount was ready; its log says why"))
}

/// Nothing more is reported: standard output becomes /dev/null, so that the reader sees its end.
pub fn close() -> Result<()> {
    File::options()
        .write(true)
        .open("/dev/null")
        .and_then(sys::stdio::replace_stdout)
        .context(|| "cannot close standard output".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_outcome_counts() {
        let text = "{\"mounted\":{\"major\":0,\"minor\":5}}\n\"ready\"\n";
        assert_eq!(wait(text.as_bytes()).unwrap(), None);
        let shut = serde_json::to_string(&Report::Shut("a copy".into())).unwrap();
        assert_eq!(wait(shut.as_bytes()).unwrap().as_deref(), Some("a copy"));
        let failed = Report::Failed((&Error::new(Kind::Denied, "no")).into());
        let text = serde_json::to_string(&failed).unwrap();
        let error = wait(text.as_bytes()).unwrap_err();
        assert_eq!((error.kind, error.to_string()), (Kind::Denied, "no".to_owned()));
        assert!(wait(&b""[..]).unwrap_err().to_string().contains("log says why"));
    }
}
