//! Primitives, each under the name and parameters of its standard, and the memory secrets live in.
//!
//! Invariants: key bytes and key schedules exist only in locked memory (`sys::locked`), and the
//! stack on which a schedule was made is overwritten. Nothing here knows files or formats; labels
//! and nonces are the callers', except that [`nonce`] makes sure none is handed out twice.

pub mod aead;
pub mod kdf;
pub mod mac;
pub mod nonce;
pub mod random;
pub mod secret;
pub mod selftest;
pub mod siv;
pub mod wrap;
