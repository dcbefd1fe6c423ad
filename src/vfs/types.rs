//! What goes in and out of [`Filesystem`](super::Filesystem): plain structs.

use crate::backing::{FileKind, SetTime, Timestamp};

/// The node id of the root directory.
pub const ROOT: u64 = 1;

/// The longest name, in bytes of plaintext.
pub const NAME_MAX: usize = 255;

/// The longest symbolic link target, in bytes of plaintext.
pub const TARGET_MAX: usize = 4095;

/// Who asks, as the kernel reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
}

impl Caller {
    /// Stands for the capabilities that the kernel does not report.
    pub(crate) fn is_root(self) -> bool {
        self.uid == 0
    }
}

/// `stat(2)` of a logical inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// The inode number of the backing file: stable as long as the file exists.
    pub ino: u64,
    pub kind: FileKind,
    /// Permission, set-id and sticky bits (07777).
    pub mode: u32,
    pub nlink: u64,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    /// Of the plaintext.
    pub size: u64,
    /// What the file takes on the disk, in units of 512 bytes.
    pub blocks: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
}

/// A node that was looked up: its caller owes one [`forget`](super::Filesystem::forget).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    pub attr: Attr,
}

/// A file that was created and opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Created {
    pub entry: Entry,
    pub handle: u64,
}

/// Which attributes to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetAttr {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: SetTime,
    pub mtime: SetTime,
    /// Drop the set-id bits as a write by this caller would.
    pub drop_set_id: bool,
}

impl Default for SetAttr {
    fn default() -> SetAttr {
        SetAttr {
            mode: None,
            uid: None,
            gid: None,
            size: None,
            atime: SetTime::Keep,
            mtime: SetTime::Keep,
            drop_set_id: false,
        }
    }
}

/// A write, with the open file's flags at the time of the write: `fcntl(F_SETFL)` changes them
/// without a word to us.
#[derive(Clone, Copy, Debug)]
pub struct WriteRequest<'a> {
    pub offset: u64,
    pub data: &'a [u8],
    /// `O_*`.
    pub flags: u32,
    /// From a shared mapping: the flags say nothing, and the offset is meant.
    pub from_cache: bool,
    pub drop_set_id: bool,
}
