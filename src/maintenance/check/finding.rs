//! What a check finds, and what it means: one table of codes.

use std::ops::Range;

use serde::{Serialize, Serializer};

use crate::backing::Backing;
use crate::error::Error;
use crate::store::verify::What;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// As it may be, and worth knowing.
    Note,
    /// Nothing is lost yet.
    Warning,
    /// Something cannot be read, or the volume not be mounted.
    Error,
}

impl Severity {
    /// Stable.
    pub const fn name(self) -> &'static str {
        match self {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Error => "error",
        }
    }
}

impl Serialize for Severity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// What a repair does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    None,
    /// A redundant copy is written anew from the good one.
    Copy,
    /// The log is brought home, as a mount does.
    BringHome,
    /// What nobody can reach is moved to `lost/`.
    Quarantine,
}

impl Remedy {
    pub const fn text(self) -> Option<&'static str> {
        match self {
            Remedy::None => None,
            Remedy::Copy => Some("the good copy is written over it"),
            Remedy::BringHome => Some("the log is brought home, as by a mount"),
            Remedy::Quarantine => Some("it is moved to lost/"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// Of the store's own files.
    Store(What),
    Unlocked,
    Envelope,
    EnvelopeMissing,
    EnvelopePrevious,
    RetiringKey,
    Leftover,
    Foreign,
    Lost,
    MountPoint,
    Name,
    LongName,
    SideFile,
    Symlink,
    LinkTarget,
    Xattr,
    DuplicateFile,
}

struct Row(&'static str, Severity, Remedy, &'static str);

impl Code {
    /// Name, severity, remedy, and what it means for the data.
    const fn row(self) -> Row {
        use Remedy::{BringHome, Copy, None, Quarantine};
        use Severity::{Error, Note, Warning};
        const UNMOUNTABLE: &str = "the volume cannot be mounted: restore it from a backup";
        const SERVES: &str = "the other copy serves";
        const GONE: &str = "these bytes read as an error until they are written anew; the rest of \
                            the file reads";
        match self {
            Code::Store(what) => match what {
                What::VolumeHeader => Row("volume-header", Error, None, UNMOUNTABLE),
                What::VolumeHeaderCopy => Row("volume-header-copy", Warning, Copy, SERVES),
                What::VolumeHeaderCopyOlder => Row("volume-header-copy-older", Note, Copy, SERVES),
                What::Sessions => Row(
                    "sessions",
                    Error,
                    None,
                    "no block of the volume can be read: restore one of sessions.a and sessions.b \
                     from a backup",
                ),
                What::SessionsCopy => Row("sessions-copy", Warning, Copy, SERVES),
                What::SessionsCopyOlder => Row("sessions-copy-older", Note, Copy, SERVES),
                What::AnchorCopy => Row("anchor-copy", Warning, Copy, SERVES),
                What::Log => Row(
                    "log",
                    Error,
                    None,
                    "the volume cannot be mounted: put its own log back, restore the volume from a \
                     backup, or give up what only the log has by `byokfs log discard`. Files that the \
                     log names may look damaged and not be",
                ),
                What::LogUnsettled => Row(
                    "log-unsettled",
                    Note,
                    BringHome,
                    "nothing is lost: the next mount puts its names in order",
                ),
                What::LogReplay => Row(
                    "log-replay",
                    Error,
                    None,
                    "the volume cannot be mounted as it is. Put the file that is named right again, or \
                     move it out of tree/: the next mount gives up what the log has of it, and of \
                     no other. Files that the log names may look damaged and not be",
                ),
                What::LogPending => Row(
                    "log-pending",
                    Note,
                    BringHome,
                    "nothing is lost: the next mount brings them home",
                ),
                What::LogRemoved => Row(
                    "log-removed",
                    Note,
                    BringHome,
                    "the files were removed, or lost their headers; the next mount forgets the \
                     changes",
                ),
                What::LogIncomplete => Row(
                    "log-incomplete",
                    Note,
                    BringHome,
                    "what a crash leaves of writes that were not acknowledged as durable",
                ),
                What::Header => Row("header", Error, Quarantine, "nothing of the file can be read"),
                What::HeaderUnsupported => Row(
                    "header-format",
                    Error,
                    None,
                    "nothing of the file can be read: use a byokfs that knows its format",
                ),
                What::HeaderCopy => Row("header-copy", Warning, Copy, SERVES),
                What::HeaderCopyOlder => Row("header-copy-older", Note, Copy, SERVES),
                What::HeaderCopyUnwritten => Row("header-copy-unwritten", Note, Copy, SERVES),
                What::HeaderContent => Row(
                    "header-content",
                    Error,
                    None,
                    "the header is authentic and wrong: please report it; the file may not read",
                ),
                What::FileKey => {
                    Row("file-key", Error, None, "what is sealed with that key cannot be read")
                }
                What::NeverFlushed => Row(
                    "never-flushed",
                    Note,
                    BringHome,
                    "nobody was promised anything of the file: the next mount moves it to lost/",
                ),
                What::GenerationSector => Row("generation-sector", Error, None, GONE),
                What::Generation => Row(
                    "generation",
                    Error,
                    None,
                    "an older state of the header or of the pages was put back",
                ),
                What::TagSector => Row("tag-sector", Error, None, GONE),
                What::Block => Row("block", Error, None, GONE),
                What::BlockLost => Row("block-lost", Error, None, GONE),
                What::PastEnd => Row(
                    "past-end",
                    Warning,
                    None,
                    "it is not read; it must not come back when the file grows: please report it",
                ),
                What::Tail => Row(
                    "tail",
                    Warning,
                    None,
                    "it is not read; it must not come back when the file grows: please report it",
                ),
                What::Nonce => Row(
                    "nonce",
                    Error,
                    None,
                    "both blocks read, but who has the disk learns how they differ: please report \
                     it, and write the file anew",
                ),
                What::Length => Row("length", Note, None, "it takes space and does no harm"),
                What::Read => Row(
                    "read",
                    Error,
                    None,
                    "it cannot be read now: look after the disk, and check again",
                ),
            },
            Code::Unlocked => Row(
                "unlocked",
                Note,
                None,
                "nothing keeps a mount from beginning during the check, which may then find what is \
                 not there",
            ),
            Code::Envelope => Row(
                "envelope",
                Error,
                None,
                "the volume cannot be mounted: restore envelope.json from a backup",
            ),
            Code::EnvelopeMissing => Row(
                "envelope-missing",
                Warning,
                None,
                "the volume opens with envelope.prev.json, which may name an older key: restore \
                 envelope.json from a backup",
            ),
            Code::EnvelopePrevious => Row(
                "envelope-previous",
                Warning,
                None,
                "it would not serve, should envelope.json be lost; the next rotation replaces it",
            ),
            Code::RetiringKey => Row(
                "retiring-key",
                Note,
                None,
                "a rotation of the volume key was begun: finish it with `byokfs rotate volume`",
            ),
            Code::Leftover => Row(
                "leftover",
                Note,
                None,
                "an update that was cut short has left it; the next mount or update puts it in order",
            ),
            Code::Foreign => {
                Row("foreign", Note, None, "it is none of byokfs's, and not looked at")
            }
            Code::Lost => Row(
                "lost",
                Note,
                None,
                "recovery or a repair has moved it there; remove what nobody misses",
            ),
            Code::MountPoint => Row(
                "mount-point",
                Warning,
                None,
                "another file system is mounted there; what is below it is no part of the volume, \
                 and what it hides was not checked",
            ),
            Code::Name => Row(
                "name",
                Error,
                Quarantine,
                "a mount does not show it, so nobody can reach it; what is in it may be whole",
            ),
            Code::LongName => Row(
                "long-name",
                Error,
                Quarantine,
                "a mount does not show it, so nobody can reach it; what is in it may be whole",
            ),
            Code::SideFile => Row(
                "side-file",
                Note,
                Quarantine,
                "a crash may leave it; it takes space and does no harm",
            ),
            Code::Symlink => Row(
                "symlink",
                Error,
                None,
                "the link cannot be followed: remove it and make it anew",
            ),
            Code::LinkTarget => Row(
                "link-target",
                Note,
                Quarantine,
                "a crash may leave it; it takes space and does no harm",
            ),
            Code::Xattr => Row(
                "xattr",
                Error,
                None,
                "the attribute cannot be read: set it anew; the file itself is not concerned",
            ),
            Code::DuplicateFile => Row(
                "duplicate-file",
                Error,
                None,
                "one is a copy of the other, made below the mount; after a crash nobody can tell to \
                 which the log belongs: move one of them away",
            ),
        }
    }

    /// Stable.
    pub const fn name(self) -> &'static str {
        self.row().0
    }

    pub const fn severity(self) -> Severity {
        self.row().1
    }

    pub const fn remedy(self) -> Remedy {
        self.row().2
    }

    pub const fn meaning(self) -> &'static str {
        self.row().3
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// One thing that was found. Its fields are those of `--json`.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    pub severity: Severity,
    pub code: Code,
    /// Below the mount point; null where it cannot be read, or is of the volume as a whole.
    pub path: Option<String>,
    /// Other names of the same file, the first of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<String>,
    pub backing_path: String,
    /// Byte position in the backing file.
    pub at: Option<u64>,
    /// The first byte of the content concerned, and the first that is not.
    pub from: Option<u64>,
    pub to: Option<u64>,
    pub detail: String,
    pub meaning: &'static str,
    /// What a repair does about it; null for nothing.
    pub repair: Option<&'static str>,
    /// Whether it was done, where a repair was asked for.
    pub repaired: Option<bool>,
}

impl Finding {
    pub(super) fn new(code: Code, backing_path: String, detail: String) -> Finding {
        Finding {
            severity: code.severity(),
            code,
            path: None,
            also: Vec::new(),
            backing_path,
            at: None,
            from: None,
            to: None,
            detail,
            meaning: code.meaning(),
            repair: code.remedy().text(),
            repaired: None,
        }
    }

    /// Of a volume that has no header to go by.
    pub fn no_header(backing: &dyn Backing, error: &Error) -> Finding {
        let path = format!("{}/volume", backing.display_path());
        Finding::new(Code::Store(What::VolumeHeader), path, error.to_string())
    }

    pub(super) fn content(self, content: Option<Range<u64>>) -> Finding {
        let (from, to) = content.map_or((None, None), |range| (Some(range.start), Some(range.end)));
        Finding { from, to, ..self }
    }
}
