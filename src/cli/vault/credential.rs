//! `vault identity add-secret`, `add-certificate`, `add-federated`, `credentials`, `remove-credential`:
//! what an application proves itself with at the token endpoint.

use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::Args;
use serde_json::{Value, json};
use ureq::http::Method;

use super::client::Client;
use super::key::{Moment, checked_time};
use super::{Target, checked_name, date, unexpected};
use crate::cli::output;
use crate::error::{Context, Error, Kind, Result};
use crate::vault::{VaultDir, new_header_secret, write_new};

#[derive(Debug, Args)]
pub(super) struct SecretArgs {
    /// Name of the identity
    #[arg(value_parser = checked_name)]
    name: String,
    /// File for the secret, which is made here; must not be there yet
    #[arg(long, value_name = "FILE")]
    secret_file: PathBuf,
    /// When it ends, as 2027-01-31T00:00:00Z [default: never]
    #[arg(long, value_name = "TIME|none", value_parser = checked_time)]
    expires: Option<Moment>,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
pub(super) struct CertificateArgs {
    /// Name of the identity
    #[arg(value_parser = checked_name)]
    name: String,
    /// The certificate in PEM, without its key
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// When it ends, as 2027-01-31T00:00:00Z [default: never]
    #[arg(long, value_name = "TIME|none", value_parser = checked_time)]
    expires: Option<Moment>,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
pub(super) struct FederatedArgs {
    /// Name of the identity
    #[arg(value_parser = checked_name)]
    name: String,
    /// Issuer of the tokens that are taken
    #[arg(long)]
    issuer: String,
    /// Whom they are about, as system:serviceaccount:NAMESPACE:NAME
    #[arg(long)]
    subject: String,
    /// For whom they are [default: api://AzureADTokenExchange]
    #[arg(long)]
    audience: Option<String>,
    /// The issuer's public keys: a JWKS, or a public key or certificate in PEM
    #[arg(long, value_name = "FILE")]
    keys_file: PathBuf,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Name of the identity
    #[arg(value_parser = checked_name)]
    name: String,
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    /// Name of the identity
    #[arg(value_parser = checked_name)]
    name: String,
    /// Id of the credential
    #[arg(long, value_parser = checked_name)]
    id: String,
    #[command(flatten)]
    target: Target,
}

/// As with header secrets: made and written here, and the vault gets the hash.
pub(super) fn add_secret(args: SecretArgs) -> Result<()> {
    let client = connect(&args.target)?;
    let secret = new_header_secret()?;
    let hash = digest(&SHA256, secret.expose().as_bytes());
    write_new(&args.secret_file, secret.expose().as_bytes(), 0o600)?;
    let body = json!({
        "secretSha256": URL_SAFE_NO_PAD.encode(hash.as_ref()),
        "expires": args.expires.and_then(|Moment(time)| time),
    });
    let made = client.administer(Method::POST, &path(&args.name), Some(&body));
    if let Err(error) = &made
        && matches!(error.kind, Kind::Denied | Kind::Usage)
    {
        // After a definite no, nobody knows this secret.
        std::fs::remove_file(&args.secret_file)
            .context(|| format!("cannot remove {}", args.secret_file.display()))?;
    }
    show(args.target.json, &made?)
}

pub(super) fn add_certificate(args: CertificateArgs) -> Result<()> {
    let pem = read(&args.file)?;
    if pem.contains("PRIVATE KEY") {
        return Err(Error::usage(format!(
            "{} holds a private key, which must not leave its owner; pass the certificate alone",
            args.file.display()
        )));
    }
    let body = json!({
        "certificate": pem,
        "expires": args.expires.and_then(|Moment(time)| time),
    });
    add(&args.target, &args.name, &body)
}

pub(super) fn add_federated(args: FederatedArgs) -> Result<()> {
    let mut federated = json!({
        "issuer": args.issuer,
        "subject": args.subject,
        "keys": read(&args.keys_file)?,
    });
    if let Some(audience) = args.audience {
        federated["audience"] = json!(audience);
    }
    add(&args.target, &args.name, &json!({ "federated": federated }))
}

pub(super) fn list(args: ListArgs) -> Result<()> {
    let mut reply = connect(&args.target)?.administer(Method::GET, &path(&args.name), None)?;
    let Value::Array(all) = reply["value"].take() else { return Err(unexpected("value")) };
    if args.target.json {
        return output::json(&all);
    }
    let lines = all.iter().map(line).collect::<Result<Vec<_>>>()?;
    output::text(&lines.concat())
}

pub(super) fn remove(args: RemoveArgs) -> Result<()> {
    let path = format!("{}/{}", path(&args.name), args.id);
    connect(&args.target)?.administer(Method::DELETE, &path, None)?;
    if args.target.json {
        return output::json(&json!({ "removed": args.id }));
    }
    output::line(&format!("removed {}", args.id))
}

fn add(target: &Target, name: &str, body: &Value) -> Result<()> {
    let made = connect(target)?.administer(Method::POST, &path(name), Some(body))?;
    show(target.json, &made)
}

fn show(as_json: bool, credential: &Value) -> Result<()> {
    if as_json { output::json(credential) } else { output::text(&line(credential)?) }
}

fn line(credential: &Value) -> Result<String> {
    let text = |field: &str| {
        credential[field].as_str().ok_or_else(|| unexpected(field)).map(str::to_owned)
    };
    let (id, kind) = (text("id")?, text("kind")?);
    Ok(format!("{id}  {kind:<11}  expires {}\n", date(&credential["expires"])))
}

fn path(name: &str) -> String {
    format!("/identities/{name}/credentials")
}

fn read(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).context(|| format!("cannot read {}", file.display()))
}

fn connect(target: &Target) -> Result<Client> {
    Client::connect(VaultDir::new(&target.vault))
}
