//! The process behind a mount: start order, readiness, control socket, cut-off, fence, guard.

pub mod fence;
pub mod mountinfo;
pub mod users;
