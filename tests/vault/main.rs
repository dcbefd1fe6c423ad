//! The embedded key vault as its clients see it: the real binary, real TLS, real tokens, the real
//! routes.

mod command_line;
mod harness;
mod keys;
mod kill;
mod permissions;
mod protocol;
mod tokens;
