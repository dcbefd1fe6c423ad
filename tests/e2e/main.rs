//! The real binary on real mounts, with a real key vault and real database servers.
//!
//! Each test has a sandbox of its own: a directory with a running vault, a volume and a mount.
//! What needs root, /dev/fuse, loop devices or MariaDB says `skipped: ...` on standard error where
//! it is missing. Waits are bounded and generous; how long something takes never decides a test.

#[path = "../support/mod.rs"]
#[allow(dead_code)] // not every test binary needs all of it
mod support;

mod alert;
mod backing;
mod bad_input;
mod check_key;
mod copies;
mod escrow;
mod fsck;
mod hsm;
mod log_change;
mod mariadb;
mod mariadb_cut_off;
mod memory;
mod pkcs11;
mod plaintext;
mod revoke;
mod rotate_deks;
mod rotate_volume;
mod rotation;
mod services;
mod tamper;
mod transport;
