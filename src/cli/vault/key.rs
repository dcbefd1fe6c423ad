//! `vault key`: the verbs of `az keyvault key`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::client::Client;
use super::import;
use super::rotation_policy;
use super::{Target, checked_name, date, unexpected};
use crate::cli::output;
use crate::error::{Context, Error, Result};
use crate::vault::{VaultDir, write_new};

#[derive(Debug, Args)]
pub(super) struct KeyArgs {
    #[command(subcommand)]
    verb: KeyVerb,
}

#[derive(Debug, Subcommand)]
enum KeyVerb {
    /// Create a key, or a new version of it; prints its key id
    Create(CreateArgs),
    /// Show a key
    Show(VersionArgs),
    /// List the keys
    List(ListArgs),
    /// List the versions of a key
    ListVersions(NameArgs),
    /// Enable or disable a key, set its dates, operations and tags
    SetAttributes(SetArgs),
    /// Delete a key with all of its versions; it can be recovered
    Delete(NameArgs),
    /// List the deleted keys
    ListDeleted(ListArgs),
    /// Show a deleted key
    ShowDeleted(NameArgs),
    /// Bring a deleted key back
    Recover(NameArgs),
    /// Destroy a deleted key for good; refused by purge protection
    Purge(NameArgs),
    /// Create a new version like the newest one
    Rotate(NameArgs),
    /// When new versions are made by themselves, and how long a version lives
    RotationPolicy(rotation_policy::PolicyArgs),
    /// Write a key with all of its versions to a file that only this vault can read
    Backup(BackupArgs),
    /// Bring a purged key back from its backup
    Restore(RestoreArgs),
    /// Bring a key in from a PEM, PKCS#12 or key transfer (BYOK) file
    Import(import::ImportArgs),
    /// Write the public half of an RSA key to a file, as PEM
    Download(DownloadArgs),
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    target: Target,
}

#[derive(Debug, Args)]
struct DownloadArgs {
    #[command(flatten)]
    key: VersionArgs,
    /// The file to write; must not be there yet
    #[arg(long, short)]
    file: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct NameArgs {
    /// Name of the key
    #[arg(long, short, value_parser = checked_name)]
    pub(super) name: String,
    #[command(flatten)]
    pub(super) target: Target,
}

#[derive(Debug, Args)]
struct VersionArgs {
    #[command(flatten)]
    key: NameArgs,
    /// The version [default: the newest]
    #[arg(long, value_parser = checked_name)]
    version: Option<String>,
}

#[derive(Debug, Args)]
struct BackupArgs {
    #[command(flatten)]
    key: NameArgs,
    /// The file to write; must not be there yet
    #[arg(long, short)]
    file: PathBuf,
}

#[derive(Debug, Args)]
struct RestoreArgs {
    /// The file that `backup` wrote
    #[arg(long, short)]
    file: PathBuf,
    #[command(flatten)]
    target: Target,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kty {
    #[value(name = "RSA")]
    Rsa,
    #[value(name = "RSA-HSM")]
    RsaHsm,
    #[value(name = "oct-HSM")]
    OctHsm,
}

impl Kty {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Kty::Rsa => "RSA",
            Kty::RsaHsm => "RSA-HSM",
            Kty::OctHsm => "oct-HSM",
        }
    }
}

#[derive(Debug, Args)]
struct CreateArgs {
    #[command(flatten)]
    key: NameArgs,
    /// Type of the key; HSM keys are software keys too
    #[arg(long, value_enum, ignore_case = true, default_value = "RSA")]
    kty: Kty,
    /// Bits: 2048, 3072 or 4096 of RSA [default: 3072], 128, 192 or 256 of oct-HSM [default: 256]
    #[arg(long, value_parser = checked_size)]
    size: Option<u64>,
    #[command(flatten)]
    attributes: AttributeArgs,
}

#[derive(Debug, Args)]
struct SetArgs {
    #[command(flatten)]
    key: VersionArgs,
    #[command(flatten)]
    attributes: AttributeArgs,
}

#[derive(Debug, Args)]
pub(super) struct AttributeArgs {
    /// Whether the key may be used
    #[arg(long, value_name = "true|false", action = clap::ArgAction::Set)]
    enabled: Option<bool>,
    /// Expiry, as 2027-01-31T00:00:00Z; none: unset
    #[arg(long, value_name = "TIME|none", value_parser = checked_time)]
    expires: Option<Moment>,
    /// Not valid before, as 2026-01-31T00:00:00Z; none: unset
    #[arg(long, value_name = "TIME|none", value_parser = checked_time)]
    not_before: Option<Moment>,
    /// What it may be used for, as wrapKey,unwrapKey
    #[arg(long, value_delimiter = ',', value_name = "OP,...")]
    ops: Option<Vec<String>>,
    /// Tags, as name=value
    #[arg(long, value_delimiter = ',', value_name = "NAME=VALUE,...", value_parser = checked_tag)]
    tags: Option<Vec<(String, String)>>,
}

/// None: the date is unset.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment(pub(super) Option<i64>);

pub(super) fn checked_time(text: &str) -> Result<Moment, String> {
    if text.eq_ignore_ascii_case("none") {
        return Ok(Moment(None));
    }
    OffsetDateTime::parse(text, &Rfc3339)
        .map(|time| Moment(Some(time.unix_timestamp())))
        .map_err(|_| "a time is written as 2027-01-31T00:00:00Z, or none".to_owned())
}

fn checked_size(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(bits @ (128 | 192 | 256 | 2048 | 3072 | 4096)) => Ok(bits),
        _ => Err("the size is 2048, 3072 or 4096, or 128, 192 or 256 of oct-HSM".to_owned()),
    }
}

fn checked_tag(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("a tag is written as name=value".to_owned()),
    }
}

impl AttributeArgs {
    fn is_empty(&self) -> bool {
        self.enabled.is_none()
            && self.expires.is_none()
            && self.not_before.is_none()
            && self.ops.is_none()
            && self.tags.is_none()
    }

    /// The fields of a create or update request.
    pub(super) fn fields(self) -> Map<String, Value> {
        let mut attributes = Map::new();
        if let Some(enabled) = self.enabled {
            attributes.insert("enabled".into(), json!(enabled));
        }
        if let Some(Moment(exp)) = self.expires {
            attributes.insert("exp".into(), json!(exp));
        }
        if let Some(Moment(nbf)) = self.not_before {
            attributes.insert("nbf".into(), json!(nbf));
        }
        let mut fields = Map::new();
        if !attributes.is_empty() {
            fields.insert("attributes".into(), Value::Object(attributes));
        }
        if let Some(ops) = self.ops {
            fields.insert("key_ops".into(), json!(ops));
        }
        if let Some(tags) = self.tags {
            fields.insert("tags".into(), json!(tags.into_iter().collect::<BTreeMap<_, _>>()));
        }
        fields
    }
}

pub(super) fn run(args: KeyArgs) -> Result<()> {
    match args.verb {
        KeyVerb::Create(args) => create(args),
        KeyVerb::Show(args) => {
            let (client, path) = version_path(&args)?;
            show_bundle(args.key.target.json, &client.get(&path)?)
        }
        KeyVerb::List(args) => list(args.target, "/keys"),
        KeyVerb::ListVersions(args) => {
            let path = format!("/keys/{}/versions", args.name);
            list(args.target, &path)
        }
        KeyVerb::SetAttributes(args) => set_attributes(args),
        KeyVerb::Delete(args) => {
            let client = connect(&args.target)?;
            show_bundle(args.target.json, &client.delete(&format!("/keys/{}", args.name))?)
        }
        KeyVerb::ListDeleted(args) => list(args.target, "/deletedkeys"),
        KeyVerb::ShowDeleted(args) => {
            let client = connect(&args.target)?;
            show_bundle(args.target.json, &client.get(&format!("/deletedkeys/{}", args.name))?)
        }
        KeyVerb::Recover(args) => {
            let path = format!("/deletedkeys/{}/recover", args.name);
            let client = connect(&args.target)?;
            show_bundle(args.target.json, &client.post(&path, &json!({}))?)
        }
        KeyVerb::Purge(args) => {
            let client = connect(&args.target)?;
            client.delete(&format!("/deletedkeys/{}", args.name))?;
            if args.target.json {
                return output::json(&json!({ "purged": args.name }));
            }
            output::line(&format!("purged {}", args.name))
        }
        KeyVerb::Rotate(args) => {
            let client = connect(&args.target)?;
            let path = format!("/keys/{}/rotate", args.name);
            show_kid(args.target.json, &client.post(&path, &json!({}))?)
        }
        KeyVerb::RotationPolicy(args) => rotation_policy::run(args),
        KeyVerb::Backup(args) => backup(args),
        KeyVerb::Restore(args) => restore(args),
        KeyVerb::Import(args) => import::run(args),
        KeyVerb::Download(args) => download(args),
    }
}

fn backup(args: BackupArgs) -> Result<()> {
    let client = connect(&args.key.target)?;
    let reply = client.post(&format!("/keys/{}/backup", args.key.name), &json!({}))?;
    let value = reply["value"].as_str().ok_or_else(|| unexpected("value"))?;
    write_new(&args.file, value.as_bytes(), 0o600)?;
    if args.key.target.json {
        return output::json(&json!({ "key": args.key.name, "file": args.file }));
    }
    output::line(&format!("wrote {} to {}", args.key.name, args.file.display()))
}

/// As `openssl pkey -pubin` and the tools of HSM vendors read it.
fn download(args: DownloadArgs) -> Result<()> {
    let (client, path) = version_path(&args.key)?;
    let bundle = client.get(&path)?;
    let number = |name: &str| {
        let text = bundle["key"][name].as_str()?;
        URL_SAFE_NO_PAD.decode(text).ok()
    };
    let (Some(n), Some(e)) = (number("n"), number("e")) else {
        return Err(Error::usage("the key is symmetric: it has no public half"));
    };
    let pem = public_pem(&n, &e).ok_or_else(|| unexpected("usable public key"))?;
    write_new(&args.file, pem.as_bytes(), 0o644)?;
    if args.key.key.target.json {
        return output::json(&json!({ "kid": bundle["key"]["kid"], "file": args.file }));
    }
    output::line(&format!("wrote {} to {}", args.key.key.name, args.file.display()))
}

/// SubjectPublicKeyInfo of an RSA key.
fn public_pem(n: &[u8], e: &[u8]) -> Option<String> {
    use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
    use aws_lc_rs::rsa::{PublicEncryptingKey, PublicKeyComponents};
    let key: PublicEncryptingKey = PublicKeyComponents { n, e }.try_into().ok()?;
    let der: PublicKeyX509Der<'_> = key.as_der().ok()?;
    pkcs8::der::pem::encode_string("PUBLIC KEY", pkcs8::LineEnding::LF, der.as_ref()).ok()
}

fn restore(args: RestoreArgs) -> Result<()> {
    let client = connect(&args.target)?;
    let bytes =
        std::fs::read(&args.file).context(|| format!("cannot read {}", args.file.display()))?;
    // As `backup` writes it; or the bytes themselves, as `az` and `byokfs escrow` write them.
    let is_text = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_\r\n".contains(byte);
    let value = if bytes.iter().all(is_text) {
        String::from_utf8_lossy(&bytes).trim().to_owned()
    } else {
        URL_SAFE_NO_PAD.encode(&bytes)
    };
    let bundle = client.post("/keys/restore", &json!({ "value": value }))?;
    show_bundle(args.target.json, &bundle)
}

fn connect(target: &Target) -> Result<Client> {
    Client::connect(VaultDir::new(&target.vault))
}

fn version_path(args: &VersionArgs) -> Result<(Client, String)> {
    let version = args.version.as_deref().unwrap_or_default();
    Ok((connect(&args.key.target)?, format!("/keys/{}/{version}", args.key.name)))
}

fn create(args: CreateArgs) -> Result<()> {
    let client = connect(&args.key.target)?;
    let mut body = args.attributes.fields();
    let size = args.size.unwrap_or(match args.kty {
        Kty::OctHsm => 256,
        Kty::Rsa | Kty::RsaHsm => 3072,
    });
    body.insert("kty".into(), json!(args.kty.name()));
    body.insert("key_size".into(), json!(size));
    let bundle = client.post(&format!("/keys/{}/create", args.key.name), &Value::Object(body))?;
    show_kid(args.key.target.json, &bundle)
}

fn set_attributes(args: SetArgs) -> Result<()> {
    if args.attributes.is_empty() {
        return Err(Error::usage(
            "nothing to set: pass --enabled, --expires, --not-before, --ops or --tags",
        ));
    }
    let (client, path) = version_path(&args.key)?;
    let bundle = client.patch(&path, &Value::Object(args.attributes.fields()))?;
    show_bundle(args.key.key.target.json, &bundle)
}

fn list(target: Target, path: &str) -> Result<()> {
    let items = connect(&target)?.list(path)?;
    if target.json {
        return output::json(&items);
    }
    let mut text = String::new();
    for item in &items {
        let kid = item["kid"].as_str().ok_or_else(|| unexpected("kid"))?;
        text.push_str(&format!("{kid}  {}\n", summary(item)));
    }
    output::text(&text)
}

/// What a new key is wanted for: its id, and nothing else.
pub(super) fn show_kid(json: bool, bundle: &Value) -> Result<()> {
    if json {
        return output::json(bundle);
    }
    output::line(bundle["key"]["kid"].as_str().ok_or_else(|| unexpected("kid"))?)
}

fn show_bundle(json: bool, bundle: &Value) -> Result<()> {
    if json {
        return output::json(bundle);
    }
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let attributes = &bundle["attributes"];
    let ops: Vec<&str> = bundle["key"]["key_ops"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let mut lines = vec![
        ("key id", text(&bundle["key"]["kid"])),
        ("type", format!("{} {}", text(&bundle["key"]["kty"]), bits(&bundle["key"]["n"]))),
        ("state", summary(bundle)),
        ("created", date(&attributes["created"])),
        ("updated", date(&attributes["updated"])),
        ("not before", date(&attributes["nbf"])),
        ("expires", date(&attributes["exp"])),
        ("operations", ops.join(",")),
        (
            "recovery",
            format!(
                "{}, {} days",
                text(&attributes["recoveryLevel"]),
                attributes["recoverableDays"]
            ),
        ),
    ];
    if let Some(tags) = bundle["tags"].as_object() {
        let tags: Vec<String> =
            tags.iter().map(|(name, value)| format!("{name}={}", text(value))).collect();
        lines.push(("tags", tags.join(",")));
    }
    if bundle["deletedDate"].is_i64() {
        lines.push(("deleted", date(&bundle["deletedDate"])));
        lines.push(("purged on", date(&bundle["scheduledPurgeDate"])));
    }
    let mut out = String::new();
    for (name, value) in lines {
        out.push_str(&format!("{name:<11} {value}\n"));
    }
    output::text(&out)
}

/// Enabled or not, and whether its dates stand in the way.
fn summary(item: &Value) -> String {
    let attributes = &item["attributes"];
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let mut words = vec![match attributes["enabled"].as_bool() {
        Some(true) => "enabled",
        Some(false) => "disabled",
        None => "-",
    }];
    if item["deletedDate"].is_i64() {
        words.push("deleted");
    }
    if attributes["exp"].as_i64().is_some_and(|exp| exp <= now) {
        words.push("expired");
    }
    if attributes["nbf"].as_i64().is_some_and(|nbf| nbf > now) {
        words.push("not yet valid");
    }
    words.join(", ")
}

/// Size of an RSA modulus in base64url.
fn bits(modulus: &Value) -> usize {
    modulus.as_str().map_or(0, |text| text.len() * 6 / 8 * 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_sizes_and_tags_are_checked() {
        assert_eq!(checked_time("2027-01-31T00:00:00Z").unwrap().0, Some(1_801_353_600));
        assert_eq!(checked_time("None").unwrap().0, None);
        assert!(checked_time("tomorrow").is_err());
        assert!(checked_time("2027-01-31").is_err());
        assert!(checked_size("1024").is_err());
        assert!(checked_tag("=x").is_err());
        assert_eq!(checked_tag("a=b=c").unwrap(), ("a".into(), "b=c".into()));
    }

    #[test]
    fn the_size_of_a_modulus_is_read_from_its_length() {
        for size in [2048usize, 3072, 4096] {
            let text = "A".repeat((size / 8 * 4).div_ceil(3));
            assert_eq!(bits(&json!(text)), size);
        }
    }
}
