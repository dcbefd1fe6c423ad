//! Where integrity failures are reported to.

use std::fmt::Debug;

use crate::error::IntegrityFailure;

/// Bytes on the backing storage that failed their authentication, and whose they are.
#[derive(Clone, Debug)]
pub struct IntegrityEvent {
    pub failure: IntegrityFailure,
    /// Path below the mount point; empty when the name itself cannot be read.
    pub logical_path: String,
    /// Path on the backing file system.
    pub backing_path: String,
}

/// Takes the events of a file system. It must not call back into it.
pub trait AuditSink: Debug + Send + Sync {
    fn integrity_failure(&self, event: &IntegrityEvent);
}

/// Reports to the log only.
#[derive(Debug)]
pub struct LogOnly;

impl AuditSink for LogOnly {
    fn integrity_failure(&self, event: &IntegrityEvent) {
        log::error!(
            "{} of {:?} ({}) fails its integrity check: {}",
            event.failure.what,
            event.logical_path,
            event.backing_path,
            event.failure.detail,
        );
    }
}
