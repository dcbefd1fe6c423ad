//! The embedded key vault: the key routes of Azure Key Vault, served from one directory.
//!
//! Duty: keep RSA keys that never leave it, use them for callers whose tokens and permissions
//! allow it, and answer as the real service answers, so that the same client works on both.
//!
//! ```text
//! server     TLS listener, identity endpoint, signals (the only async code)
//! api        one request -> one reply: authenticate, route, authorise, act, audit
//! access     who may do what from where: identities, policies, roles, network rules
//! identity   managed identity endpoints: header secret -> token
//! login      token endpoint of applications: secret, certificate or federated token -> token
//! drill      faults on purpose
//! store      SQLite: keys, versions, identities; every change is one transaction
//! ```
//!
//! Invariants:
//! - A change is answered only after its transaction is on stable storage; a killed server
//!   leaves every change whole or not there.
//! - Private keys are on disk only sealed under the root key, bound to their name and version.
//! - Every request is authenticated before its route, its parameters or its body count.
//!
//! It shares no code with `key`: what the two agree on is the protocol. It does not keep
//! secrets or certificates for callers, and it is no HSM: `RSA-HSM` keys are software keys too.

mod access;
mod api;
mod archive;
mod assertion;
mod audit;
mod certificate;
mod codec;
mod dir;
mod drill;
mod host;
mod identity;
mod init;
mod limit;
mod login;
mod material;
mod network;
mod permission;
mod refusal;
mod role;
mod rotation;
mod route;
mod seal;
mod server;
mod settings;
mod store;
mod token;
mod wire;

pub use archive::{Restored, backup, restore};
pub use dir::{VaultDir, write_new};
pub use init::{InitOptions, Initialised, init, new_header_secret};
pub use network::Cidr;
pub use permission::{Permission, Permissions};
pub use role::Role;
pub use server::{ServeOptions, serve};
pub use settings::Flavor;
pub use wire::{API_VERSION, is_key_name, is_vault_name};

use std::sync::Arc;

/// Seconds since the epoch; a closure so that tests can move it.
pub(crate) type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

pub(crate) fn system_clock() -> Clock {
    Arc::new(|| time::OffsetDateTime::now_utc().unix_timestamp())
}
