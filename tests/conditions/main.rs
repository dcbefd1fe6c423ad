//! The table of conditions (docs/KEYS.md), each row under a running watcher: the state it leads to,
//! the reason, whether at once, after confirmation or after long silence, and the way back.
//!
//! The server is a fake that misbehaves as each row says; the rows that the embedded key vault can
//! play are in tests/key_vault.rs against that. No row is decided by exact times: what happens at
//! once does so on the first failing probe, what is confirmed on the second, and what is only
//! unreachable serves on for as long as it may.

mod fake;
mod rig;
mod table;
mod watching;
