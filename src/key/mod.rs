//! The customer's key: how it is reached, watched and cut off.
//!
//! Knows nothing of `fuse`, `vfs` or `store`: those see keys only through a [`gate::Lease`].
//!
//! ```text
//! watcher ---> policy     what an outcome means (pure)
//!    |    ---> gate       leases on the keyring; fails closed
//!    v
//!  probe, custody, requirement ---> envelope   (wrapped volume key, canary)
//!                              ---> provider   (azure, pkcs11)
//! ```
//!
//! How a volume gets its key. At `init`, [`custody::enrol`] makes a volume key and an envelope;
//! its fingerprint is pinned in the host's configuration. At a mount:
//!
//! 1. [`envelope::Envelope::load`] from the volume's root; [`provider::for_key`] with its `kid`.
//! 2. [`gate::Gate::new`] (shut), and [`watcher::Watcher::start`] with a [`watcher::Handler`].
//! 3. [`custody::revalidate`] with the pinned fingerprint: the full check, and the volume key.
//! 4. The store starts a session with the keyring of the [`custody::Revalidated`].
//! 5. [`watcher::Watcher::admit`] opens the gate and watches from then on.
//!
//! [`rewrap::rewrap`] makes an envelope's successor under another key; once that is saved,
//! [`watcher::Watcher::rotated`] has its key watched.
//!
//! After a cut-off ([`watcher::Handler::cut_off`]), `byokfs revalidate` and
//! [`watcher::Handler::heal`] do steps 3 to 5 again. Only `admit` opens a gate that is watched.

pub mod clock;
pub mod custody;
pub mod envelope;
pub mod gate;
pub mod keyring;
pub mod policy;
mod probe;
pub mod provider;
pub mod reason;
pub mod requirement;
pub mod rewrap;
#[cfg(test)]
mod testing;
pub mod watcher;

use std::time::{SystemTime, UNIX_EPOCH};

/// The local clock, in seconds since the epoch.
pub(crate) fn wall_clock() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.ok().and_then(|since| i64::try_from(since.as_secs()).ok()).unwrap_or(0)
}
