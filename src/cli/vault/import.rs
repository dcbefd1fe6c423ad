//! `vault key import`: keys from PEM, PKCS#12 and key transfer (BYOK) files.
//!
//! The private key goes to the vault over its own TLS, as a JSON Web Key, which is how the real
//! service takes it. A transfer file goes as it is: only the vault can open it.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::Args;
use der::asn1::{AnyRef, OctetStringRef, UintRef};
use der::{Decode as _, Reader as _, SliceReader};
use p12_keystore::{KeyStore, Pkcs12ImportPolicy};
use serde_json::{Map, Value, json};

use super::client::Client;
use super::key::{AttributeArgs, NameArgs, show_kid};
use crate::crypto::secret::SecretString;
use crate::error::{Context, Error, Result};
use crate::vault::VaultDir;

/// Far above any key.
const MAX_FILE: u64 = 1024 * 1024;

#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    #[command(flatten)]
    key: NameArgs,
    #[command(flatten)]
    source: SourceArgs,
    /// File with the password of the PEM or PFX file; its first line counts
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// As an RSA-HSM key
    #[arg(long)]
    hsm: bool,
    #[command(flatten)]
    attributes: AttributeArgs,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct SourceArgs {
    /// A private key in PEM: PKCS#8 (encrypted or not) or PKCS#1
    #[arg(long, value_name = "FILE")]
    pem_file: Option<PathBuf>,
    /// A private key in PKCS#12, as a .pfx or .p12 file
    #[arg(long, value_name = "FILE")]
    pfx_file: Option<PathBuf>,
    /// A key transfer blob, wrapped to a key exchange key of this vault
    #[arg(long, value_name = "FILE")]
    byok_file: Option<PathBuf>,
}

pub(super) fn run(args: ImportArgs) -> Result<()> {
    let password = args.password_file.as_deref().map(read_password).transpose()?;
    let mut jwk = match (&args.source.pem_file, &args.source.pfx_file, &args.source.byok_file) {
        (Some(file), None, None) => from_pem(file, password.as_ref())?,
        (None, Some(file), None) => from_pfx(file, password.as_ref())?,
        (None, None, Some(file)) => {
            let blob = URL_SAFE_NO_PAD.encode(read(file)?);
            Map::from_iter([
                ("kty".to_owned(), json!("RSA-HSM")),
                ("key_hsm".to_owned(), json!(blob)),
            ])
        }
        _ => return Err(Error::usage("pass one of --pem-file, --pfx-file and --byok-file")),
    };
    let mut body = args.attributes.fields();
    if let Some(ops) = body.remove("key_ops") {
        jwk.insert("key_ops".into(), ops);
    }
    body.insert("key".into(), Value::Object(jwk));
    if args.hsm {
        body.insert("Hsm".into(), json!(true));
    }
    let client = Client::connect(VaultDir::new(&args.key.target.vault))?;
    let bundle = client.put(&format!("/keys/{}", args.key.name), &Value::Object(body))?;
    show_kid(args.key.target.json, &bundle)
}

fn from_pem(file: &Path, password: Option<&SecretString>) -> Result<Map<String, Value>> {
    let bytes = read(file)?;
    let wrong = |what: &str| Error::usage(format!("{}: {what}", file.display()));
    let text = std::str::from_utf8(&bytes).map_err(|_| wrong("this is no PEM file"))?;
    // A certificate may stand before the key.
    let start = text
        .match_indices("-----BEGIN ")
        .map(|(at, _)| at)
        .find(|at| text[*at..].lines().next().is_some_and(|line| line.contains("PRIVATE KEY")))
        .ok_or_else(|| wrong("there is no private key in it"))?;
    let (label, document) = pkcs8::der::SecretDocument::from_pem(text[start..].trim())
        .map_err(|_| wrong("its private key is not well-formed PEM"))?;
    match label {
        "PRIVATE KEY" => from_pkcs8(document.as_bytes()),
        "RSA PRIVATE KEY" => from_pkcs1(document.as_bytes()),
        "ENCRYPTED PRIVATE KEY" => {
            let password = password
                .ok_or_else(|| wrong("its private key is encrypted: pass --password-file"))?;
            let encrypted = pkcs8::EncryptedPrivateKeyInfoRef::try_from(document.as_bytes())
                .map_err(|_| wrong("its private key is not well-formed"))?;
            let opened = encrypted
                .decrypt(password.expose())
                .map_err(|_| wrong("its private key does not open with that password"))?;
            from_pkcs8(opened.as_bytes())
        }
        _ => None,
    }
    .ok_or_else(|| wrong("its private key is not one of RSA"))
}

fn from_pfx(file: &Path, password: Option<&SecretString>) -> Result<Map<String, Value>> {
    let bytes = read(file)?;
    let wrong = |what: &str| Error::usage(format!("{}: {what}", file.display()));
    let password = password.map_or("", |password| password.expose());
    let store = KeyStore::from_pkcs12(&bytes, password, Pkcs12ImportPolicy::Relaxed)
        .map_err(|_| wrong("it is no PKCS#12 file, or has another password"))?;
    let (_, chain) = store
        .private_key_chain()
        .ok_or_else(|| wrong("there is no private key with a certificate in it"))?;
    from_pkcs8(chain.key().as_der()).ok_or_else(|| wrong("its private key is not one of RSA"))
}

/// None: not an RSA key.
fn from_pkcs8(der: &[u8]) -> Option<Map<String, Value>> {
    let info = pkcs8::PrivateKeyInfoRef::try_from(der).ok()?;
    let rsa = der::asn1::ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
    if info.algorithm.oid != rsa {
        return None;
    }
    let key: &OctetStringRef = info.private_key;
    from_pkcs1(key.as_bytes())
}

/// RSAPrivateKey of RFC 8017; None: it is something else.
fn from_pkcs1(der: &[u8]) -> Option<Map<String, Value>> {
    let sequence = AnyRef::from_der(der).ok()?;
    let mut reader = SliceReader::new(sequence.value()).ok()?;
    let version = UintRef::decode(&mut reader).ok()?;
    if sequence.header().tag() != der::Tag::Sequence || version.as_bytes() != [0] {
        return None;
    }
    let mut jwk = Map::from_iter([("kty".to_owned(), json!("RSA"))]);
    for name in ["n", "e", "d", "p", "q", "dp", "dq", "qi"] {
        let number = UintRef::decode(&mut reader).ok()?;
        jwk.insert(name.to_owned(), json!(URL_SAFE_NO_PAD.encode(number.as_bytes())));
    }
    reader.is_finished().then_some(jwk)
}

/// The allocator overwrites these bytes when they go.
fn read(file: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(file)
        .and_then(|opened| opened.take(MAX_FILE + 1).read_to_end(&mut bytes))
        .context(|| format!("cannot read {}", file.display()))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::usage(format!("{} is too long for a key", file.display())));
    }
    Ok(bytes)
}

fn read_password(file: &Path) -> Result<SecretString> {
    let text =
        std::fs::read_to_string(file).context(|| format!("cannot read {}", file.display()))?;
    let line = text.lines().next().unwrap_or_default().to_owned();
    SecretString::from_string_wiping(line)
}
