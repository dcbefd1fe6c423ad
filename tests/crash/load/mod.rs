//! What runs on the volume when it crashes, and what must be there afterwards.

pub mod names;
pub mod records;
pub mod server;
pub mod sqlite;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The machine lost its power: what was acknowledged as durable is there.
    Power,
    /// The daemon was killed: every acknowledged write is there.
    Kill,
}

/// Whether a crash explains that a call has failed so.
pub fn is_of_a_crash(error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(libc::EIO | libc::ENOTCONN | libc::EROFS | libc::ECONNABORTED) => true,
        // What the kernel ends requests of a ring with, where it cannot hand them to a daemon that dies.
        Some(libc::ECANCELED | libc::EINTR) => true,
        _ => false,
    }
}

/// One kind of load. A ledger of what was acknowledged is kept in this process: off the volume.
pub trait Load {
    /// Once, on a new volume.
    fn prepare(&mut self, mnt: &Path);

    /// What is acknowledged once `gone` is set does not count. A server on a plain file system goes on
    /// for a moment after its disk has failed, and acknowledges what a machine without power could
    /// not have; on a volume that must not happen, so there it counts.
    fn ignore_after(&mut self, _gone: Arc<AtomicBool>) {}

    /// Starts to write. `crashed` tells that errors are to be expected by now.
    fn start(&mut self, mnt: &Path, crashed: &dyn Fn() -> bool);

    /// Acknowledgements so far, over all crashes.
    fn acknowledged(&self) -> u64;

    /// The machine is gone: whatever still runs is to end.
    fn end(&mut self);

    /// Panics, saying what is wrong. Leaves nothing running.
    fn verify(&mut self, mnt: &Path, crash: Crash);
}
