//! The FUSE protocol: decode, call [`vfs`](crate::vfs), reply. No policy lives here.
//!
//! - [`wire`] takes requests apart and puts replies together: bytes in, bytes out.
//! - [`adapter`] calls one operation for each request.
//! - [`reply`] is the one place that picks an errno.
//! - [`session`] mounts, [`init`] agrees on the protocol with the kernel.
//! - [`worker`] is what the threads that serve have in common, whose memory is their own: [`purge`]
//!   has it overwritten when the volume is cut off. Requests come to them in one of two ways: [`dev`]
//!   reads and writes /dev/fuse, [`ring`] has a queue for each CPU, over io_uring.
//! - [`trim`] keeps the number of nodes the kernel remembers below what descriptors allow.
//!
//! Spoken directly over /dev/fuse, with no library between: the number of a node must be one
//! thing and the inode number that `stat` shows another, a cut-off must reach every buffer that
//! held plaintext, and the ring needs the same requests from another source.
//!
//! The daemon must never touch its own mount: it would wait for itself.

mod adapter;
mod dev;
mod init;
mod purge;
mod reply;
mod ring;
mod session;
mod trim;
mod wire;
mod worker;

pub use purge::Purge;
pub use reply::CutOffErrno;
pub use session::{Flags, MountOptions, Mounted, Transport, mount, remount};
