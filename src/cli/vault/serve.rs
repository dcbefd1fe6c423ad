//! `vault init` and `vault serve`.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use ::log::LevelFilter;
use clap::Args;
use serde_json::json;

use super::checked_name;
use crate::cli::output;
use crate::error::Result;
use crate::observe::log;
use crate::vault::{self, Flavor, InitOptions, ServeOptions, VaultDir};

#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// The directory: missing or empty
    #[arg(env = "BYOKFS_VAULT")]
    dir: PathBuf,
    /// The vault's name: it also answers as NAME.vault.localhost
    #[arg(long, default_value = "vault")]
    name: String,
    /// What to behave as: a key vault, or a Managed HSM
    #[arg(long, default_value = "vault", value_parser = checked_flavor)]
    flavor: Flavor,
    /// Permissions by role assignments (Azure RBAC) instead of access policies
    #[arg(long)]
    rbac: bool,
    /// Address to listen on
    #[arg(long, default_value_t = IpAddr::from(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen on; 0: a free one, kept from the first start on
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Port of the identity endpoint on 127.0.0.1; 0: as above
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    identity_port: u16,
    /// The region it says it is in
    #[arg(long, default_value = "local")]
    region: String,
    /// Tenant id of its tokens [default: random]
    #[arg(long)]
    tenant: Option<String>,
    /// Days that a deleted key can be recovered: 7 to 90
    #[arg(long, default_value_t = 90, value_name = "DAYS")]
    retention_days: u16,
    /// Let deleted keys be purged before their retention ends
    #[arg(long)]
    no_purge_protection: bool,
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// The vault's directory
    #[arg(env = "BYOKFS_VAULT")]
    dir: PathBuf,
    /// Port to listen on; 0: a free one [default: that of the last run]
    #[arg(long)]
    port: Option<u16>,
    /// Port of the identity endpoint on 127.0.0.1 [default: that of the last run]
    #[arg(long)]
    identity_port: Option<u16>,
    /// How long a token is good for
    #[arg(long, default_value_t = 3600, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=86400))]
    token_lifetime: u64,
    /// Let faults be set, for drills and tests
    #[arg(long)]
    drills: bool,
    /// Requests in ten seconds before callers are told to wait [default: no limit]
    #[arg(long, value_name = "REQUESTS", value_parser = clap::value_parser!(u32).range(1..))]
    rate_limit: Option<u32>,
    /// Serve the IMDS endpoint too, for the host that has this identity
    #[arg(long, value_name = "IDENTITY", value_parser = checked_name)]
    imds: Option<String>,
}

fn checked_flavor(text: &str) -> Result<Flavor, String> {
    Flavor::from_name(text).ok_or_else(|| "the flavor is vault or mhsm".to_owned())
}

pub(super) fn init(args: InitArgs) -> Result<()> {
    let dir = VaultDir::new(args.dir);
    let made = vault::init(
        &dir,
        &InitOptions {
            name: args.name,
            flavor: args.flavor,
            roles: args.rbac,
            host: args.host,
            port: args.port,
            identity_port: args.identity_port,
            region: args.region,
            tenant: args.tenant,
            retention_days: args.retention_days,
            purge_protection: !args.no_purge_protection,
        },
    )?;
    if args.json {
        return output::json(&json!({
            "vault": dir.path(),
            "caFile": made.ca_certificate,
            "tenantId": made.tenant,
        }));
    }
    output::text(&format!(
        "vault   {}\nCA file {}\ntenant  {}\nstart it with `byokfs vault serve {0}`\n",
        dir.path().display(),
        made.ca_certificate.display(),
        made.tenant
    ))
}

pub(super) fn serve(args: ServeArgs) -> Result<()> {
    log::install(log::Target::Stderr, LevelFilter::Info)?;
    vault::serve(
        &VaultDir::new(args.dir),
        &ServeOptions {
            port: args.port,
            identity_port: args.identity_port,
            token_lifetime: Duration::from_secs(args.token_lifetime),
            drills: args.drills,
            rate_limit: args.rate_limit,
            imds: args.imds,
        },
    )
}
