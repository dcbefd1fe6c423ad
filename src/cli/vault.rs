//! `byokfs vault`: the embedded key vault's verbs.
//!
//! `init`, `serve`, `backup` and `restore` work on the vault's directory. All others are calls to the running server:
//! a token from its identity endpoint, then its REST routes, as any client does it.

mod archive;
mod client;
mod credential;
mod fault;
mod identity;
mod import;
mod key;
mod role;
mod rotation_policy;
mod rules;
mod serve;

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::error::{Error, Result};
use crate::vault::is_key_name;

#[derive(Debug, Args)]
pub struct VaultArgs {
    #[command(subcommand)]
    verb: VaultVerb,
}

#[derive(Debug, Subcommand)]
enum VaultVerb {
    /// Create a key vault in an empty directory
    Init(serve::InitArgs),
    /// Serve a key vault until SIGTERM or SIGINT
    Serve(serve::ServeArgs),
    /// Keys: create, show, list, change, delete, recover
    Key(key::KeyArgs),
    /// Identities that may get tokens
    Identity(identity::IdentityArgs),
    /// Give an identity key permissions
    Grant(identity::PermissionArgs),
    /// Take key permissions from an identity
    Revoke(identity::PermissionArgs),
    /// Roles of identities, for a vault that goes by them
    Role(role::RoleArgs),
    /// Addresses that may reach the keys
    NetworkRule(rules::RuleArgs),
    /// Show what holds for the whole vault
    Show(rules::ShowArgs),
    /// Change what holds for the whole vault
    Update(rules::UpdateArgs),
    /// Write the whole vault to a file that only its root key opens
    Backup(archive::BackupArgs),
    /// Make a vault from such a file and its root key
    Restore(archive::RestoreArgs),
    /// Faults on purpose, for drills and tests
    Fault(fault::FaultArgs),
}

/// Which vault, and how to answer.
#[derive(Debug, Args)]
struct Target {
    /// The vault's directory
    #[arg(long, env = "BYOKFS_VAULT", value_name = "DIR")]
    vault: PathBuf,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: VaultArgs) -> Result<()> {
    match args.verb {
        VaultVerb::Init(args) => serve::init(args),
        VaultVerb::Serve(args) => serve::serve(args),
        VaultVerb::Key(args) => key::run(args),
        VaultVerb::Identity(args) => identity::run(args),
        VaultVerb::Grant(args) => identity::grant(args),
        VaultVerb::Revoke(args) => identity::revoke(args),
        VaultVerb::Role(args) => role::run(args),
        VaultVerb::NetworkRule(args) => rules::rule(args),
        VaultVerb::Show(args) => rules::show(args),
        VaultVerb::Update(args) => rules::update(args),
        VaultVerb::Backup(args) => archive::backup(args),
        VaultVerb::Restore(args) => archive::restore(args),
        VaultVerb::Fault(args) => fault::run(args),
    }
}

/// For names of keys and identities alike.
fn checked_name(text: &str) -> Result<String, String> {
    if is_key_name(text) {
        Ok(text.to_owned())
    } else {
        Err("a name is 1 to 127 letters, digits and dashes".to_owned())
    }
}

/// Unix seconds as RFC 3339, for people.
fn date(seconds: &serde_json::Value) -> String {
    seconds
        .as_i64()
        .and_then(|seconds| time::OffsetDateTime::from_unix_timestamp(seconds).ok())
        .and_then(|at| at.format(&time::format_description::well_known::Rfc3339).ok())
        .unwrap_or_else(|| "-".to_owned())
}

/// A reply without something that it always has.
fn unexpected(what: &str) -> Error {
    Error::new(crate::Kind::Io, format!("the vault's answer has no {what}"))
}
