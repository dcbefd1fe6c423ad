//! The two error types of byokfs.
//!
//! [`Error`] is what a verb or the daemon's start fails with: a message for a person and a
//! [`Kind`] that decides the exit code. [`FsError`] is what a file-system operation fails
//! with; `fuse::reply` alone turns it into an errno.

use std::fmt;
use std::io;

use rustix::io::Errno;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as a program sees it. The exit codes are stable: `byokfs --help` lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The disk, the kernel or the network failed in a way that has no kind of its own.
    Io,
    /// Wrong arguments.
    Usage,
    /// The configuration file has an unknown key, a bad unit or a contradiction.
    Config,
    /// The directory is not a byokfs volume.
    NotAVolume,
    /// A newer format, or feature flags this version does not know.
    Unsupported,
    /// Something on disk fails its authentication.
    Corrupt,
    /// The key service, or a requirement on the key, says no.
    Denied,
    /// The key service cannot be reached or trusted now; trying again may help.
    Unreachable,
    /// Mounted elsewhere, not empty, or in use.
    Busy,
    /// Nothing is mounted there, or no daemon answers.
    NotMounted,
    /// The volume is mounted and its key is lost.
    Inaccessible,
}

impl Kind {
    pub const ALL: [Kind; 11] = [
        Kind::Io,
        Kind::Usage,
        Kind::Config,
        Kind::NotAVolume,
        Kind::Unsupported,
        Kind::Corrupt,
        Kind::Denied,
        Kind::Unreachable,
        Kind::Busy,
        Kind::NotMounted,
        Kind::Inaccessible,
    ];

    pub const fn exit_code(self) -> u8 {
        match self {
            Kind::Io => 1,
            Kind::Usage => 2,
            Kind::Config => 3,
            Kind::NotAVolume => 4,
            Kind::Unsupported => 5,
            Kind::Corrupt => 6,
            Kind::Denied => 7,
            Kind::Unreachable => 8,
            Kind::Busy => 9,
            Kind::NotMounted => 10,
            Kind::Inaccessible => 11,
        }
    }

    /// Stable name, as in `--json` output.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Io => "Io",
            Kind::Usage => "Usage",
            Kind::Config => "Config",
            Kind::NotAVolume => "NotAVolume",
            Kind::Unsupported => "Unsupported",
            Kind::Corrupt => "Corrupt",
            Kind::Denied => "Denied",
            Kind::Unreachable => "Unreachable",
            Kind::Busy => "Busy",
            Kind::NotMounted => "NotMounted",
            Kind::Inaccessible => "Inaccessible",
        }
    }

    pub fn from_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// What a verb fails with. The message is lower case, names the file or key and says what to do
/// next; it never holds a token or a secret.
#[derive(Debug)]
pub struct Error {
    pub kind: Kind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into(), source: None }
    }

    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        self.source = Some(source.into());
        self
    }

    pub fn io(message: impl Into<String>, source: io::Error) -> Error {
        Error::new(Kind::Io, message).with_source(source)
    }

    pub fn usage(message: impl Into<String>) -> Error {
        Error::new(Kind::Usage, message)
    }

    pub fn corrupt(message: impl Into<String>) -> Error {
        Error::new(Kind::Corrupt, message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// Names what was being done when an [`io::Error`] came up.
pub trait Context<T> {
    fn context(self, message: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, message: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::io(message(), source))
    }
}

impl<T> Context<T> for std::result::Result<T, Errno> {
    fn context(self, message: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::io(message(), source.into()))
    }
}

/// Why the gate refuses: carried by [`FsError::CutOff`] so that the reply can pick the errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutOff {
    /// The key was revoked, deleted, or its use forbidden.
    Revoked,
    /// The key is past its expiry or before its activation.
    Expired,
    /// The key could not be checked for too long.
    Unreachable,
}

/// Bytes on the backing storage that fail their authentication, or contradict each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IntegrityFailure {
    /// What failed: "header", "tag sector", "block", "name", "symlink", "xattr".
    pub what: &'static str,
    /// File id, hex; empty where the failure came before it was known.
    pub file_id: String,
    /// Index of the block or tag sector within its file, where there is one.
    pub index: Option<u64>,
    /// For the audit log and `fsck`: what was expected.
    pub detail: String,
}

/// What a file-system operation fails with.
#[derive(Debug)]
pub enum FsError {
    /// What POSIX prescribes, or what the backing file system answered.
    Os(Errno),
    /// Always EIO to the caller, and an `IntegrityFailure` audit event.
    Integrity(Box<IntegrityFailure>),
    /// The gate is shut.
    CutOff(CutOff),
}

impl FsError {
    pub fn integrity(
        what: &'static str,
        file_id: impl Into<String>,
        index: Option<u64>,
        detail: impl Into<String>,
    ) -> FsError {
        let (file_id, detail) = (file_id.into(), detail.into());
        FsError::Integrity(Box::new(IntegrityFailure { what, file_id, index, detail }))
    }
}

impl From<Errno> for FsError {
    fn from(errno: Errno) -> FsError {
        FsError::Os(errno)
    }
}

impl From<CutOff> for FsError {
    fn from(cut_off: CutOff) -> FsError {
        FsError::CutOff(cut_off)
    }
}

impl From<io::Error> for FsError {
    /// An error without an errno of its own is EIO: the disk's word is not to be guessed at.
    fn from(error: io::Error) -> FsError {
        FsError::Os(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

impl fmt::Display for FsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FsError::Os(errno) => errno.fmt(f),
            FsError::Integrity(failure) => {
                write!(f, "{} fails its integrity check", failure.what)?;
                if let Some(index) = failure.index {
                    write!(f, " at index {index}")?;
                }
                write!(f, " ({})", failure.detail)
            }
            FsError::CutOff(reason) => write!(f, "the volume is Inaccessible ({reason:?})"),
        }
    }
}

impl std::error::Error for FsError {}

pub type FsResult<T> = std::result::Result<T, FsError>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_distinct_and_names_round_trip() {
        let mut codes: Vec<u8> = Kind::ALL.iter().map(|kind| kind.exit_code()).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Kind::ALL.len());
        for kind in Kind::ALL {
            assert_eq!(Kind::from_name(kind.name()), Some(kind));
        }
    }
}
