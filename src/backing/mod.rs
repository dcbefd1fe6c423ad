//! The one seam between byokfs and the disk.
//!
//! Everything that reads or writes the backing directory goes through [`Backing`], [`Node`] and
//! [`File`], so that a test can record it, fail any call, or cut the power between two of them.
//! Nothing here knows of encryption: names and bytes are those on the disk.
//!
//! Durability is as the kernel's own: [`File::sync_data`] and [`File::sync_all`] are
//! `fdatasync(2)` and `fsync(2)`, [`Node::sync`] is `fsync(2)` of a directory. A failed sync is
//! final for that file: the caller must not retry it as if nothing had happened.

pub mod fault;
pub mod linux;
pub mod memory;
pub mod small_file;

use std::any::Any;
use std::fmt::Debug;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::error::Result;

/// Identity of an inode for as long as it is referenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId {
    pub dev: u64,
    pub ino: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    Regular,
    Directory,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
}

/// Seconds and nanoseconds since the epoch; negative seconds are before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp {
    pub sec: i64,
    pub nsec: u32,
}

/// The time of day.
pub fn now() -> Timestamp {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let since = now.unwrap_or_default();
    Timestamp { sec: i64::try_from(since.as_secs()).unwrap_or(0), nsec: since.subsec_nanos() }
}

/// `stat(2)` of a backing inode: `size` and `blocks` are the disk's, not the plaintext's.
#[derive(Clone, Debug)]
pub struct Metadata {
    pub id: NodeId,
    pub kind: FileKind,
    /// Permission, set-id and sticky bits (07777).
    pub mode: u32,
    pub nlink: u64,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u64,
    pub size: u64,
    /// In units of 512 bytes.
    pub blocks: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    /// Reads what is metadata to its callers: the access time stays.
    Peek,
    ReadWrite,
}

/// For `utimensat(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    Keep,
    Now,
    At(Timestamp),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    Replace,
    NoReplace,
    Exchange,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrMode {
    CreateOrReplace,
    Create,
    Replace,
}

#[derive(Clone, Copy, Debug)]
pub struct StatFs {
    pub block_size: u64,
    pub blocks: u64,
    pub blocks_free: u64,
    pub blocks_available: u64,
    pub files: u64,
    pub files_free: u64,
    pub name_max: u64,
}

/// One entry of a directory as the disk has it, without `.` and `..`.
#[derive(Clone, Debug)]
pub struct DirEntry {
    pub name: Vec<u8>,
    pub ino: u64,
    /// None where the backing file system does not say.
    pub kind: Option<FileKind>,
    /// Position after this entry, for [`DirStream::seek`].
    pub next: u64,
}

pub type NodeRef = Arc<dyn Node>;
pub type FileRef = Arc<dyn File>;

/// A backing directory that holds a volume.
pub trait Backing: Debug + Send + Sync {
    /// The directory itself.
    fn root(&self) -> NodeRef;
    fn statfs(&self) -> io::Result<StatFs>;
    /// `syncfs(2)`: everything written so far is on stable storage afterwards.
    fn sync_fs(&self) -> io::Result<()>;
    /// Takes the lock that keeps a second writer out, for as long as the returned guard lives;
    /// `WouldBlock` when another process holds it. `name` is a file in the root, created if absent.
    fn lock(&self, name: &[u8]) -> io::Result<Box<dyn Debug + Send + Sync>>;
    /// The same for who must change nothing: `NotFound` where the file is not there.
    fn lock_existing(&self, name: &[u8]) -> io::Result<Box<dyn Debug + Send + Sync>>;
    /// Path for messages.
    fn display_path(&self) -> String;
    /// Another directory of this host, by its absolute path.
    fn elsewhere(&self, path: &Path) -> Result<Arc<dyn Backing>>;
}

/// An inode, referenced (it does not go away, its id is not reused) but not opened for I/O.
///
/// Names are single components; implementations never follow a symbolic link and never leave
/// the directory they are asked about.
pub trait Node: Debug + Send + Sync {
    fn id(&self) -> NodeId;
    fn metadata(&self) -> io::Result<Metadata>;
    fn open(&self, access: Access) -> io::Result<FileRef>;

    fn lookup(&self, name: &[u8]) -> io::Result<NodeRef>;
    fn read_dir(&self) -> io::Result<Box<dyn DirStream>>;
    /// A regular file without a name (O_TMPFILE), mode 0600, that [`Node::link_file`] may name:
    /// a new file is complete on disk before anyone can look it up. Inherits from this directory
    /// what a created file would (set-gid group, default ACL).
    fn create_unnamed(&self) -> io::Result<FileRef>;
    /// Names `file` (from [`Node::create_unnamed`]) here; `AlreadyExists` if the name is taken.
    fn link_file(&self, file: &dyn File, name: &[u8]) -> io::Result<()>;
    /// A hard link to `target` here.
    fn link_node(&self, target: &dyn Node, name: &[u8]) -> io::Result<()>;
    fn mkdir(&self, name: &[u8], mode: u32) -> io::Result<NodeRef>;
    fn mknod(&self, name: &[u8], kind: FileKind, mode: u32, rdev: u64) -> io::Result<NodeRef>;
    fn symlink(&self, name: &[u8], target: &[u8]) -> io::Result<NodeRef>;
    fn read_link(&self) -> io::Result<Vec<u8>>;
    fn unlink(&self, name: &[u8]) -> io::Result<()>;
    fn rmdir(&self, name: &[u8]) -> io::Result<()>;
    fn rename(
        &self,
        name: &[u8],
        to: &dyn Node,
        to_name: &[u8],
        mode: RenameMode,
    ) -> io::Result<()>;
    /// `fsync(2)` of this directory: the names in it are durable afterwards.
    fn sync(&self) -> io::Result<()>;

    fn set_mode(&self, mode: u32) -> io::Result<()>;
    fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()>;
    fn set_times(&self, atime: SetTime, mtime: SetTime) -> io::Result<()>;
    fn get_xattr(&self, name: &[u8]) -> io::Result<Vec<u8>>;
    fn set_xattr(&self, name: &[u8], value: &[u8], mode: XattrMode) -> io::Result<()>;
    fn list_xattrs(&self) -> io::Result<Vec<Vec<u8>>>;
    fn remove_xattr(&self, name: &[u8]) -> io::Result<()>;

    fn as_any(&self) -> &dyn Any;
}

pub trait DirStream: Debug + Send {
    /// None at the end.
    fn next_entry(&mut self) -> io::Result<Option<DirEntry>>;
    /// To a position from [`DirEntry::next`]; 0 is the start.
    fn seek(&mut self, position: u64) -> io::Result<()>;
}

/// A file opened for I/O.
pub trait File: Debug + Send + Sync {
    fn metadata(&self) -> io::Result<Metadata>;
    /// The inode, for everything that is not I/O.
    fn node(&self) -> io::Result<NodeRef>;
    /// Reads until `buf` is full or the file ends; returns the bytes read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `data`, or fails; after a failure any part of it may be on disk.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
    /// Writes all of the `parts` one after another from `offset`, as [`File::write_at`] does.
    fn write_parts_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()>;
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Reserves space; `keep_size` leaves the length alone. The range reads as it did, or as zeros.
    fn allocate(&self, offset: u64, len: u64, keep_size: bool) -> io::Result<()>;
    /// Gives the space of the range back; it reads as zeros, the length stays.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;
    /// The start of the next data (or hole) at or after `offset`; None past the last data.
    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>>;
    fn seek_hole(&self, offset: u64) -> io::Result<Option<u64>>;
    /// `fdatasync(2)`.
    fn sync_data(&self) -> io::Result<()>;
    /// `fsync(2)`.
    fn sync_all(&self) -> io::Result<()>;
    /// Hands the range to the device without flushing the device's cache: what a plain O_DIRECT
    /// write into allocated space promises (`sync_file_range(2)`, all three flags).
    fn write_out(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Begins to hand the range to the device, for the sake of a flush to come. That one is told what
    /// becomes of it (`sync_file_range(2)`, without waiting).
    fn start_write_out(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Of an empty file: has what is overwritten in it overwritten in its place, where the file
    /// system would write a copy, for which there may be no space (btrfs: `FS_NOCOW_FL`). Does
    /// nothing where it never copies, or cannot do otherwise.
    fn overwrite_in_place(&self) {}

    fn as_any(&self) -> &dyn Any;
}
