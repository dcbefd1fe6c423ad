//! `vault identity`, `vault grant`, `vault revoke`.

use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use ureq::http::Method;

use super::client::Client;
use super::{Target, checked_name, unexpected};
use crate::cli::output;
use crate::error::{Context, Error, Kind, Result};
use crate::vault::{Permissions, VaultDir, new_header_secret, write_new};

#[derive(Debug, Args)]
pub(super) struct IdentityArgs {
    #[command(subcommand)]
    verb: IdentityVerb,
}

#[derive(Debug, Subcommand)]
enum IdentityVerb {
    /// Create an identity without permissions; writes its header secret to a file
    Create(CreateArgs),
    /// Delete an identity; its tokens end at once
    Delete(DeleteArgs),
    /// List the identities and their permissions
    List(ListArgs),
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// Name of the identity
    #[arg(value_parser = checked_name)]
    name: String,
    /// File for the header secret [default: identities/NAME.header in the vault's directory]
    #[arg(long, value_name = "FILE")]
    header_file: Option<PathBuf>,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct DeleteArgs {
    /// Name of the identity
    #[arg(value_parser = checked_name)]
    name: String,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
pub(super) struct PermissionArgs {
    /// Name of the identity
    #[arg(long, value_parser = checked_name)]
    identity: String,
    /// Key permissions, as get,list,wrapKey,unwrapKey; all: every one
    #[arg(long, value_name = "PERMISSION,...")]
    key_permissions: Permissions,
    #[command(flatten)]
    target: Target,
}

pub(super) fn run(args: IdentityArgs) -> Result<()> {
    match args.verb {
        IdentityVerb::Create(args) => create(args),
        IdentityVerb::Delete(args) => delete(args),
        IdentityVerb::List(args) => list(args),
    }
}

pub(super) fn grant(args: PermissionArgs) -> Result<()> {
    change(args, "grant")
}

pub(super) fn revoke(args: PermissionArgs) -> Result<()> {
    change(args, "revoke")
}

/// The secret is made here and written first; the vault gets its hash only. So a killed command
/// leaves at worst a secret that opens nothing.
fn create(args: CreateArgs) -> Result<()> {
    let client = connect(&args.target)?;
    let header_file = match args.header_file {
        Some(file) => std::path::absolute(&file)
            .context(|| format!("cannot make sense of the path {}", file.display()))?,
        None => default_header_file(&client, &args.name)?,
    };
    let secret = new_header_secret()?;
    let hash = digest(&SHA256, secret.expose().as_bytes());
    write_new(&header_file, secret.expose().as_bytes(), 0o600).map_err(|error| {
        if header_file.exists() {
            Error::new(
                Kind::Busy,
                format!(
                    "{} is there already; `byokfs vault identity delete {}` removes an identity \
                     with its file",
                    header_file.display(),
                    args.name
                ),
            )
        } else {
            error
        }
    })?;
    let body = json!({
        "name": args.name,
        "headerSha256": URL_SAFE_NO_PAD.encode(hash.as_ref()),
    });
    let made = client
        .administer(Method::POST, "/identities", Some(&body))
        .and_then(|identity| Ok((identity, client.identity_endpoint()?)));
    let (mut identity, endpoint) = match made {
        Ok(made) => made,
        Err(error) => {
            // After a definite no, nobody knows this secret.
            if matches!(error.kind, Kind::Denied | Kind::Usage) {
                remove(&header_file)?;
            }
            return Err(error);
        }
    };
    identity["endpoint"] = json!(endpoint);
    identity["headerFile"] = json!(header_file);
    if args.target.json {
        return output::json(&identity);
    }
    output::text(&format!(
        "identity    {}\nclient id   {}\nprincipal   {}\ntenant      {}\nendpoint    {}\nheader file {}\n",
        text(&identity, "name")?,
        text(&identity, "clientId")?,
        text(&identity, "principalId")?,
        text(&identity, "tenantId")?,
        endpoint,
        header_file.display(),
    ))
}

fn delete(args: DeleteArgs) -> Result<()> {
    let client = connect(&args.target)?;
    let path = format!("/identities/{}", args.name);
    let identity = client.administer(Method::DELETE, &path, None)?;
    remove(&client.dir().identity_header(&args.name))?;
    if args.target.json {
        return output::json(&identity);
    }
    output::line(&format!("deleted {}", args.name))
}

fn list(args: ListArgs) -> Result<()> {
    let client = connect(&args.target)?;
    let mut reply = client.administer(Method::GET, "/identities", None)?;
    let identities = reply["value"].take();
    if args.target.json {
        return output::json(&identities);
    }
    let mut lines = String::new();
    for identity in identities.as_array().ok_or_else(|| unexpected("value"))? {
        lines.push_str(&format!(
            "{}  {}  {}\n",
            text(identity, "name")?,
            text(identity, "clientId")?,
            permissions(identity)
        ));
    }
    output::text(&lines)
}

fn change(args: PermissionArgs, verb: &str) -> Result<()> {
    if args.key_permissions.is_empty() {
        return Err(Error::usage("no key permission is named"));
    }
    let client = connect(&args.target)?;
    let identity = client.administer(
        Method::POST,
        &format!("/identities/{}/{verb}", args.identity),
        Some(&json!({ "keyPermissions": args.key_permissions.names() })),
    )?;
    if args.target.json {
        return output::json(&identity);
    }
    output::line(&format!("{}  {}", text(&identity, "name")?, permissions(&identity)))
}

fn connect(target: &Target) -> Result<Client> {
    Client::connect(VaultDir::new(&target.vault))
}

fn default_header_file(client: &Client, name: &str) -> Result<PathBuf> {
    let file = client.dir().identity_header(name);
    if let Some(parent) = file.parent() {
        use std::os::unix::fs::DirBuilderExt as _;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .context(|| format!("cannot create {}", parent.display()))?;
    }
    std::path::absolute(&file).context(|| format!("cannot make sense of {}", file.display()))
}

fn remove(file: &Path) -> Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {}", file.display()), error))
        }
        _ => Ok(()),
    }
}

fn permissions(identity: &Value) -> String {
    let names: Vec<&str> = identity["keyPermissions"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    if names.is_empty() { "-".to_owned() } else { names.join(",") }
}

fn text<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    value[field].as_str().ok_or_else(|| unexpected(field))
}
