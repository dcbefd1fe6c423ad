//! The customer's key: how it is reached, watched and cut off.
//!
//! Knows nothing of `fuse`, `vfs` or `store`: those see keys only through a [`gate::Lease`].

pub mod clock;
pub mod gate;
pub mod keyring;
pub mod reason;
