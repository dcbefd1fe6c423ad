//! What byokfs tells its operator: the log for people, the audit trail for programs.

pub mod audit;
pub mod log;
