//! The table of conditions (docs/KEYS.md), each row under a running watcher: the state it leads to,
//! the reason, whether at once, after confirmation or after long silence, and the way back.
//!
//! What answers is the embedded key vault, `byokfs vault serve --drills`, a process of its own. A key
//! is lost in earnest wherever it can be, and by a drill where only the machinery of Azure could do
//! it. No row is decided by exact times: what happens at once does so on the first failing probe,
//! what is confirmed on the second, and what is only unreachable serves on for as long as it may.
//!
//! Answers that no vault gives (redirects, bodies without end, a proxy's 401) are tried against a
//! scripted server, in src/key/provider/azure_tests.rs: what becomes of each of their classes is
//! shown here.

mod enrolment;
mod names;
#[path = "../support/ports.rs"]
mod ports;
mod rig;
mod table;
mod vault;
mod watching;
mod wire;
