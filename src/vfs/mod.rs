//! POSIX semantics over encrypted names and contents; knows nothing of FUSE.
//!
//! [`Filesystem`] has one method for each operation, in plain types ([`types`]), and answers an
//! [`FsError`](crate::error::FsError). What each operation promises is docs/SEMANTICS.md.
//!
//! Invariants:
//! - Every operation asks the gate first, also those that use no key: once it is shut, all answer
//!   the cut-off error, except that handles and nodes can always be released. The gate is asked
//!   again before plaintext (data, names, link targets, attribute values) is handed out.
//! - One backing inode is one [`inode::Inode`], however many names it has. Its number is never
//!   given to another one, and it works as long as it is referenced, whether or not it has a name.
//! - A file has its owner, mode and header before it has a name.
//! - No credential of this process is ever changed on behalf of a caller.
//!
//! Permissions are the kernel's to check (`default_permissions`), and so are locks.

mod acl;
mod attr;
pub mod audit;
mod create;
mod dir;
mod entry;
mod file;
mod filesystem;
mod handle;
mod inode;
mod keys;
mod long_name;
mod name;
mod remove;
mod rename;
mod space;
mod symlink;
pub mod types;
mod unsettled;
mod value;
pub mod verify;
mod xattr;

#[cfg(test)]
mod tests;

pub use crate::store::PendingFlush;
pub use audit::{AuditSink, IntegrityEvent};
pub use dir::{DirItem, DirSink, Plus};
pub use filesystem::{Filesystem, FilesystemOptions};
pub use types::{Attr, Caller, Created, Entry, SetAttr, WriteRequest};
