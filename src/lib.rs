//! byokfs: a transparent encryption layer for MySQL and MariaDB data directories.
//!
//! The layers, arrows pointing down only:
//!
//! ```text
//! cli         one file per verb; exit codes
//! daemon      start order, readiness, control socket, cut-off, fence, guard
//! fuse        decode -> call -> reply; the one place that picks an errno
//! maintenance work on a volume as a whole: rotation of its keys, checks and repairs
//! vfs         POSIX semantics: inodes, handles, names, directories, xattrs
//! store       file format: layout, headers, tags, blocks, sessions
//! backing     the one I/O seam
//! key         gate, watcher, policy, envelope, providers (knows nothing of the four above)
//! vault       the embedded key vault (shares only wire types with `key`)
//! crypto      aead, kdf, nonce, secret memory
//! observe     log, audit
//! sync        locks
//! sys         every `unsafe`
//! ```
//!
//! `docs/DESIGN.md` says why, `docs/FORMAT.md` gives the bytes on disk.

#![deny(unsafe_code)]
#![warn(missing_debug_implementations, unreachable_pub)]

pub mod backing;
pub mod cli;
pub mod config;
pub mod crypto;
pub mod daemon;
pub mod error;
pub mod fuse;
pub mod key;
pub mod maintenance;
pub mod observe;
pub mod store;
pub(crate) mod sync;
#[allow(unsafe_code)]
pub mod sys;
pub mod vault;
pub mod vfs;

pub use error::{Error, Kind, Result};

#[global_allocator]
static ALLOCATOR: sys::alloc::ZeroOnFree = sys::alloc::ZeroOnFree;
