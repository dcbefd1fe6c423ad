//! The embedded key vault as its clients see it: the real binary, real TLS, real tokens, the real
//! routes.

mod access;
mod command_line;
mod drills;
mod harness;
mod import;
mod keys;
mod kill;
mod login;
mod mhsm;
mod permissions;
#[path = "../support/ports.rs"]
mod ports;
mod protocol;
mod service;
mod tokens;
