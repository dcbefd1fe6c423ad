//! The process behind a mount: start order, readiness, control socket, cut-off, fence, guard.

pub mod alert;
pub mod check;
pub mod control;
pub mod cutoff;
pub mod dek_rotation;
pub mod escrow;
pub mod fence;
pub mod guard;
pub mod harden;
pub mod hex;
pub mod keeper;
pub mod log_change;
pub mod mountinfo;
pub mod notify;
pub mod offline;
pub mod pins;
pub mod plan;
pub mod repair;
pub mod report;
pub mod rotation;
pub mod settings;
pub mod start;
pub mod users;
pub mod volume;
pub mod volume_key;
