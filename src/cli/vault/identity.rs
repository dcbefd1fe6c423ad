//! `vault identity`, `vault grant`, `vault revoke`.

use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use ureq::http::Method;

use super::client::Client;
use super::credential;
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
    /// Let a disabled identity get tokens again
    Enable(NameArgs),
    /// Give an identity no more tokens; those it has stay good
    Disable(NameArgs),
    /// Let a host ask for the tokens of an identity beside its own
    Assign(AssignArgs),
    /// Take that back
    Unassign(AssignArgs),
    /// Make a client secret for the token endpoint
    AddSecret(credential::SecretArgs),
    /// Take a certificate for the token endpoint
    AddCertificate(credential::CertificateArgs),
    /// Take another issuer's tokens at the token endpoint
    AddFederated(credential::FederatedArgs),
    /// List what an identity may prove itself with
    Credentials(credential::ListArgs),
    /// Take one of them away
    RemoveCredential(credential::RemoveArgs),
}

#[derive(Debug, Args)]
struct NameArgs {
    /// Name of the identity
    #[arg(value_parser = checked_name)]
    name: String,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct AssignArgs {
    /// Name of the identity
    #[arg(value_parser = checked_name)]
    name: String,
    /// The host, by the name of its own identity
    #[arg(long, value_parser = checked_name)]
    host: String,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// Name of the identity
    #[arg(value_parser = checked_name)]
    name: String,
    /// File for the header secret [default: identities/NAME.header in the vault's directory]
    #[arg(long, value_name = "FILE")]
    header_file: Option<PathBuf>,
    /// For hosts that it is assigned to, or for an application: no header secret of its own
    #[arg(long, conflicts_with = "header_file")]
    user_assigned: bool,
    /// Tenant that it lives in [default: the vault's]
    #[arg(long, value_name = "ID")]
    tenant: Option<String>,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct DeleteArgs {
    /// Name of the identity
    #[arg(value_parser = checked_name)]
    name: String,
    /// Tokens that it has stay good until they expire, as at the real service
    #[arg(long)]
    keep_tokens: bool,
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
        IdentityVerb::Enable(args) => {
            act(&args.target, Method::PATCH, &args.name, "", &json!({ "enabled": true }))
        }
        IdentityVerb::Disable(args) => {
            act(&args.target, Method::PATCH, &args.name, "", &json!({ "enabled": false }))
        }
        IdentityVerb::Assign(args) => {
            act(&args.target, Method::POST, &args.name, "/assign", &json!({ "host": args.host }))
        }
        IdentityVerb::Unassign(args) => {
            act(&args.target, Method::POST, &args.name, "/unassign", &json!({ "host": args.host }))
        }
        IdentityVerb::AddSecret(args) => credential::add_secret(args),
        IdentityVerb::AddCertificate(args) => credential::add_certificate(args),
        IdentityVerb::AddFederated(args) => credential::add_federated(args),
        IdentityVerb::Credentials(args) => credential::list(args),
        IdentityVerb::RemoveCredential(args) => credential::remove(args),
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
    if args.user_assigned {
        let mut body = json!({ "name": args.name });
        if let Some(tenant) = &args.tenant {
            body["tenant"] = json!(tenant);
        }
        let identity = client.administer(Method::POST, "/identities", Some(&body))?;
        if args.target.json {
            return output::json(&identity);
        }
        return output::text(&described(&identity)?);
    }
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
    let mut body = json!({
        "name": args.name,
        "headerSha256": URL_SAFE_NO_PAD.encode(hash.as_ref()),
    });
    if let Some(tenant) = &args.tenant {
        body["tenant"] = json!(tenant);
    }
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
        "{}endpoint    {}\nheader file {}\n",
        described(&identity)?,
        endpoint,
        header_file.display(),
    ))
}

fn described(identity: &Value) -> Result<String> {
    Ok(format!(
        "identity    {}\nclient id   {}\nprincipal   {}\ntenant      {}\n",
        text(identity, "name")?,
        text(identity, "clientId")?,
        text(identity, "principalId")?,
        text(identity, "tenantId")?,
    ))
}

/// A change whose answer is the identity as it is now.
fn act(target: &Target, method: Method, name: &str, action: &str, body: &Value) -> Result<()> {
    let path = format!("/identities/{name}{action}");
    let identity = connect(target)?.administer(method, &path, Some(body))?;
    if target.json {
        return output::json(&identity);
    }
    let state = if identity["enabled"] == true { "enabled" } else { "disabled" };
    output::line(&format!("{}  {state}  {}", text(&identity, "name")?, permissions(&identity)))
}

fn delete(args: DeleteArgs) -> Result<()> {
    let client = connect(&args.target)?;
    let path = format!("/identities/{}", args.name);
    let body = json!({ "keepTokens": args.keep_tokens });
    let identity = client.administer(Method::DELETE, &path, Some(&body))?;
    // Its file has its name as it was created, which may be in another case.
    remove(&client.dir().identity_header(text(&identity, "name")?))?;
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
