//! Operations on a real mount, one module for each family.
//!
//! The file system is served by a process of its own (this binary again, see `harness`): a
//! process that waits for itself in a page fault waits for ever.

mod harness;
#[path = "../support/kernel.rs"]
mod kernel;

mod acl;
mod by_handle;
mod create;
mod crowd;
mod cut_off;
mod differential;
mod dir;
mod io;
mod link;
mod mapping;
mod names;
mod open_unlinked;
mod panics;
mod rename;
mod space;
mod symlink;
mod times;
mod users;
mod xattr;
