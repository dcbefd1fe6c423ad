//! The customer's key: how it is reached, watched and cut off.
//!
//! Knows nothing of `fuse`, `vfs` or `store`: those see keys only through a [`gate::Lease`].

pub mod clock;
pub mod gate;
pub mod keyring;
pub mod policy;
pub mod provider;
pub mod reason;

use std::time::{SystemTime, UNIX_EPOCH};

/// The local clock, in seconds since the epoch.
pub(crate) fn wall_clock() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.ok().and_then(|since| i64::try_from(since.as_secs()).ok()).unwrap_or(0)
}
