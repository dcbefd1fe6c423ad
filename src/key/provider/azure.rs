//! Azure Key Vault and Managed HSM, and the embedded key vault, over their REST API.
//!
//! One provider speaks for one vault, the one of its key's URL. What each answer means is in
//! [`super::azure_error`], how a token is had in [`super::azure_auth`] and
//! [`super::azure_identity`].

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ureq::http::Method;
use url::{Host, Url};

use super::azure_auth::{Challenge, Tokens};
use super::azure_error::{classify, unreadable};
use super::base64url;
use super::http::{Client, Request, Response, check_ca_file};
use super::{
    Algorithm, ChallengeCheck, Class, KeyInfo, Provider, ProviderError, ProviderResult,
    ServiceTime, Session, Settings, VersionInfo, significant_bits,
};
use crate::crypto::secret::SecretBytes;
use crate::error::{Error, Kind, Result};
use crate::key::clock::BootTime;
use crate::key::reason::Reason;
use crate::sys::stack;

const API_VERSION: &str = "7.4";
/// Pages of 25: far more versions than a key may have.
const PAGE_LIMIT: usize = 100;
/// How long a deleted key is asked after; the answer only makes the reason more precise.
const DELETED_KEY_LIMIT: Duration = Duration::from_secs(2);

/// A key's URL: `https://HOST[:PORT]/keys/NAME[/VERSION]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyUrl {
    base: Url,
    name: String,
    version: Option<String>,
}

impl KeyUrl {
    pub fn parse(text: &str) -> Result<KeyUrl> {
        let refuse = |why: &str| {
            Error::usage(format!(
                "{text} is not the URL of a key ({why}): expected https://HOST/keys/NAME or \
                 https://HOST/keys/NAME/VERSION"
            ))
        };
        let url = Url::parse(text).map_err(|error| refuse(&error.to_string()))?;
        if url.scheme() != "https" || url.host().is_none() {
            return Err(refuse("not https"));
        }
        let bare = url.username().is_empty() && url.password().is_none();
        if !bare || url.query().is_some() || url.fragment().is_some() {
            return Err(refuse("it has a user, a query or a fragment"));
        }
        let path: Vec<&str> = url.path().trim_matches('/').split('/').collect();
        let (name, version) = match path.as_slice() {
            ["keys", name] => (*name, None),
            ["keys", name, version] => (*name, Some(*version)),
            _ => return Err(refuse("wrong path")),
        };
        let plain = |text: &str| {
            (1..=127).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        if !plain(name) || !version.is_none_or(plain) {
            return Err(refuse("wrong characters in the name or version"));
        }
        let (name, version) = (name.to_owned(), version.map(str::to_owned));
        let mut base = url;
        base.set_path("/");
        Ok(KeyUrl { base, name, version })
    }

    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn without_version(&self) -> String {
        format!("{}keys/{}", self.base, self.name)
    }

    /// The address of this key, or of an operation on it.
    fn endpoint(&self, operation: &str) -> String {
        let KeyUrl { base, name, version } = self;
        let version = version.as_ref().map_or(String::new(), |version| format!("/{version}"));
        format!("{base}keys/{name}{version}{operation}?api-version={API_VERSION}")
    }

    /// Whether `kid`, as a service names a version, is this key (of this version, if it has one).
    fn is(&self, kid: &str) -> bool {
        KeyUrl::parse(kid).is_ok_and(|other| {
            other.name.eq_ignore_ascii_case(&self.name)
                && other.version.is_some()
                && (self.version.is_none() || self.version == other.version)
        })
    }
}

/// A vault with all its keys, or one key with all its versions: what a configuration section may be
/// for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VaultScope {
    base: Url,
    /// In lower case: names of keys are the same in any.
    key: Option<String>,
}

impl VaultScope {
    pub(super) fn parse(text: &str) -> std::result::Result<VaultScope, String> {
        let mut base = Url::parse(text).map_err(|error| error.to_string())?;
        if base.host().is_none() {
            return Err("no host".into());
        }
        let bare = base.username().is_empty() && base.password().is_none();
        if !bare || base.query().is_some() || base.fragment().is_some() {
            return Err("it has a user, a query or a fragment".into());
        }
        if matches!(base.path().trim_matches('/'), "" | "keys") {
            base.set_path("/");
            return Ok(VaultScope { base, key: None });
        }
        let key = KeyUrl::parse(text).map_err(|_| "neither a vault nor a key of one")?;
        if key.version.is_some() {
            return Err("it names a version: leave that out, it is for all of them".into());
        }
        Ok(VaultScope { base: key.base, key: Some(key.name.to_ascii_lowercase()) })
    }

    /// How closely it fits the key; None: not at all.
    pub(super) fn fit(&self, kid: &str) -> Option<usize> {
        let asked = KeyUrl::parse(kid).ok().filter(|asked| asked.base == self.base)?;
        match &self.key {
            None => Some(0),
            Some(key) => asked.name.eq_ignore_ascii_case(key).then_some(1),
        }
    }
}

/// One vault.
pub struct Azure {
    base: Url,
    ca_file: Option<PathBuf>,
    challenge_check: ChallengeCheck,
    tokens: Tokens,
}

impl Azure {
    /// For the vault that `kid` lies in.
    pub fn new(kid: &str, settings: &Settings) -> Result<Azure> {
        let base = KeyUrl::parse(kid)?.base;
        check_ca_file(settings.ca_file.as_ref())
            .map_err(|why| Error::new(Kind::Config, format!("ca_file {why}")))?;
        Ok(Azure {
            base,
            ca_file: settings.ca_file.clone(),
            challenge_check: settings.verify_challenge_resource,
            tokens: Tokens::new(&settings.identity)?,
        })
    }
}

impl fmt::Debug for Azure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Azure").field("base", &self.base.as_str()).finish_non_exhaustive()
    }
}

impl Provider for Azure {
    fn name(&self) -> &'static str {
        "azure"
    }

    fn names_version(&self, url: &str) -> bool {
        KeyUrl::parse(url).is_ok_and(|key| key.version.is_some())
    }

    fn session(&self, deadline: BootTime) -> ProviderResult<Box<dyn Session + '_>> {
        let client = Client::new(self.ca_file.as_deref(), deadline)?;
        Ok(Box::new(AzureSession { azure: self, client, deadline }))
    }
}

struct AzureSession<'a> {
    azure: &'a Azure,
    client: Client,
    deadline: BootTime,
}

impl Session for AzureSession<'_> {
    fn get_key(&mut self, kid: &str) -> ProviderResult<KeyInfo> {
        let key = self.key(kid)?;
        let response = self.call(Method::GET, &key.endpoint(""), Vec::new())?;
        if response.status != 200 {
            let error = classify(&response, "get");
            return Err(self.tell_deleted_from_purged(&key, error));
        }
        let service_time = response.date().map(|unix| ServiceTime { unix, heard: BootTime::now() });
        let bundle: KeyBundle = parse(&response)?;
        let info = bundle.into_info().ok_or_else(|| unreadable("key"))?;
        expect_kid(&key, &info.kid)?;
        let region = response.header("x-ms-keyvault-region").map(str::to_owned);
        let tenant = self.azure.tokens.challenge().and_then(|challenge| challenge.tenant);
        let identity_tenant = self.azure.tokens.issuing_tenant();
        Ok(KeyInfo { region, tenant, identity_tenant, service_time, ..info })
    }

    fn list_versions(&mut self, kid: &str) -> ProviderResult<Vec<VersionInfo>> {
        let key = KeyUrl { version: None, ..self.key(kid)? };
        let mut next = Some(key.endpoint("/versions"));
        let mut versions = Vec::new();
        for _ in 0..PAGE_LIMIT {
            let Some(url) = next.take() else { return Ok(versions) };
            let response = self.call(Method::GET, &url, Vec::new())?;
            if response.status != 200 {
                return Err(classify(&response, "list"));
            }
            let page: KeyPage = parse(&response)?;
            for item in page.value {
                versions.push(item.into_info(&key).ok_or_else(|| unreadable("list of versions"))?);
            }
            next = page.next_link.filter(|link| !link.is_empty());
            if let Some(link) = &next {
                self.own_url(link)?;
            }
        }
        Ok(versions)
    }

    fn wrap(
        &mut self,
        kid: &str,
        algorithm: Algorithm,
        plain: &SecretBytes,
    ) -> ProviderResult<Vec<u8>> {
        let key = self.key(kid)?;
        let response = stack::with_burnt_stack(|| {
            let body = operation_body(algorithm, plain.expose())?;
            self.call(Method::POST, &key.endpoint("/wrapkey"), body)
        })?;
        if response.status != 200 {
            return Err(classify(&response, "wrapKey"));
        }
        let result: OperationResult<'_> = parse(&response)?;
        expect_kid(&key, result.kid)?;
        base64url::decode(result.value).ok_or_else(|| unreadable("wrapped value"))
    }

    fn unwrap(
        &mut self,
        kid: &str,
        algorithm: Algorithm,
        wrapped: &[u8],
    ) -> ProviderResult<SecretBytes> {
        let key = self.key(kid)?;
        let body = operation_body(algorithm, wrapped)?;
        let response = self.call(Method::POST, &key.endpoint("/unwrapkey"), body)?;
        if response.status != 200 {
            return Err(classify(&response, "unwrapKey"));
        }
        stack::with_burnt_stack(|| {
            let result: OperationResult<'_> = parse(&response)?;
            expect_kid(&key, result.kid)?;
            base64url::decode_secret(result.value)?.ok_or_else(|| unreadable("unwrapped value"))
        })
    }

    fn back_up(&mut self, kid: &str) -> ProviderResult<Vec<u8>> {
        let key = KeyUrl { version: None, ..self.key(kid)? };
        let response = self.call(Method::POST, &key.endpoint("/backup"), Vec::new())?;
        if response.status != 200 {
            return Err(classify(&response, "backup"));
        }
        let backup: Backup<'_> = parse(&response)?;
        if backup.value.is_empty() {
            return Err(unreadable("backup"));
        }
        // As `az keyvault key backup` writes it.
        base64url::decode(backup.value).ok_or_else(|| unreadable("backup"))
    }
}

impl AzureSession<'_> {
    /// `kid` comes from an envelope that anyone may have written: no other host is asked.
    fn key(&self, kid: &str) -> ProviderResult<KeyUrl> {
        match KeyUrl::parse(kid) {
            Ok(key) if key.base == self.azure.base => Ok(key),
            _ => Err(ProviderError::new(
                Class::Denied(Reason::WrongKeyOrCorruptEnvelope),
                format!("{kid} is not a key of {}", self.azure.base),
            )),
        }
    }

    fn own_url(&self, link: &str) -> ProviderResult<()> {
        let own = Url::parse(link).is_ok_and(|url| url.origin() == self.azure.base.origin());
        if own { Ok(()) } else { Err(unreadable("link to the next page")) }
    }

    /// Sends a request as this identity. The first request of all goes without a token and
    /// without its body, to learn what the service asks for; a token that is refused is replaced
    /// once.
    fn call(&self, method: Method, url: &str, body: Vec<u8>) -> ProviderResult<Response> {
        let tokens = &self.azure.tokens;
        let mut challenge = tokens.challenge();
        if challenge.is_none() {
            let response = self.send(method.clone(), url, None, Vec::new())?;
            if response.status != 401 {
                return Ok(response);
            }
            challenge = Some(self.challenge(&response)?);
        }
        let Some(challenge) = challenge else { return Err(unreadable("challenge")) };
        let response = self.send(method.clone(), url, Some(&challenge), body.clone())?;
        if response.status != 401 {
            return Ok(response);
        }
        tokens.forget();
        let challenge = self.challenge(&response)?;
        let response = self.send(method, url, Some(&challenge), body)?;
        // A Managed HSM's 401 has no body. With its challenge it is the service's word all the same,
        // and so soon after a fresh token a refusal.
        if response.status == 401 {
            // What it wants may have changed by the next session.
            tokens.forget_challenge();
            if self.challenge(&response).is_ok() {
                let class = Class::Denied(Reason::TokenRefused);
                return Err(ProviderError { class, ..classify(&response, "token") });
            }
        }
        Ok(response)
    }

    fn send(
        &self,
        method: Method,
        url: &str,
        challenge: Option<&Challenge>,
        body: Vec<u8>,
    ) -> ProviderResult<Response> {
        let token = match challenge {
            Some(challenge) => Some(self.azure.tokens.get(&self.client, challenge)?),
            None => None,
        };
        self.client.send(Request { method, url, bearer: token.as_deref(), headers: &[], body })
    }

    fn challenge(&self, response: &Response) -> ProviderResult<Challenge> {
        let header = response.header("www-authenticate");
        let Some(challenge) = header.and_then(Challenge::parse) else {
            return Err(classify(response, "token"));
        };
        let host = match self.azure.base.host() {
            Some(Host::Domain(name)) => Host::Domain(name),
            Some(Host::Ipv4(address)) => Host::Ipv4(address),
            Some(Host::Ipv6(address)) => Host::Ipv6(address),
            None => return Err(unreadable("challenge")),
        };
        challenge.check(&host, self.azure.challenge_check)?;
        Ok(challenge)
    }

    /// A 404 is final either way; asking after the deleted key says which way back there is.
    fn tell_deleted_from_purged(&self, key: &KeyUrl, mut error: ProviderError) -> ProviderError {
        if error.class != Class::Revoked(Reason::KeyNotFound) {
            return error;
        }
        let limit = self.deadline.min(BootTime::now() + DELETED_KEY_LIMIT);
        let url = format!("{}deletedkeys/{}?api-version={API_VERSION}", self.azure.base, key.name);
        let asked = Client::new(self.azure.ca_file.as_deref(), limit).and_then(|client| {
            let short = AzureSession { azure: self.azure, client, deadline: limit };
            short.call(Method::GET, &url, Vec::new())
        });
        if asked.is_ok_and(|response| response.status == 200) {
            error.class = Class::Revoked(Reason::KeyDeleted);
        }
        error
    }
}

#[derive(Serialize)]
struct Operation<'a> {
    alg: &'static str,
    value: &'a str,
}

fn operation_body(algorithm: Algorithm, value: &[u8]) -> ProviderResult<Vec<u8>> {
    let value = base64url::encode(value);
    let body = serde_json::to_vec(&Operation { alg: algorithm.name(), value: &value });
    body.map_err(|_| unreadable("request"))
}

#[derive(Deserialize)]
struct OperationResult<'a> {
    #[serde(borrow)]
    kid: &'a str,
    #[serde(borrow)]
    value: &'a str,
}

#[derive(Deserialize)]
struct Backup<'a> {
    #[serde(borrow)]
    value: &'a str,
}

#[derive(Deserialize)]
struct KeyBundle {
    key: Jwk,
    #[serde(default)]
    attributes: Attributes,
}

#[derive(Deserialize)]
struct Jwk {
    kid: String,
    kty: String,
    #[serde(default)]
    key_ops: Vec<String>,
    n: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Attributes {
    /// Always there, but in an answer that is not the service's.
    enabled: Option<bool>,
    nbf: Option<i64>,
    exp: Option<i64>,
    created: Option<i64>,
    recovery_level: Option<String>,
    recoverable_days: Option<u32>,
    exportable: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeyPage {
    #[serde(default)]
    value: Vec<KeyItem>,
    next_link: Option<String>,
}

#[derive(Deserialize)]
struct KeyItem {
    kid: String,
    #[serde(default)]
    attributes: Attributes,
}

impl KeyBundle {
    fn into_info(self) -> Option<KeyInfo> {
        let KeyBundle { key, attributes } = self;
        Some(KeyInfo {
            bits: key.n.as_deref().and_then(modulus_bits),
            kid: key.kid,
            key_type: key.kty,
            operations: key.key_ops,
            enabled: attributes.enabled?,
            not_before: attributes.nbf,
            expires: attributes.exp,
            created: attributes.created,
            recovery_level: attributes.recovery_level,
            recoverable_days: attributes.recoverable_days,
            exportable: attributes.exportable,
            ..KeyInfo::default()
        })
    }
}

impl KeyItem {
    /// None: it is not a version of this key. One that is may be followed, so its host is the one
    /// that was asked, whatever it says.
    fn into_info(self, of: &KeyUrl) -> Option<VersionInfo> {
        let KeyItem { kid, attributes } = self;
        let version = KeyUrl::parse(&kid).ok().filter(|_| of.is(&kid))?.version?;
        Some(VersionInfo {
            kid: format!("{}/{version}", of.without_version()),
            enabled: attributes.enabled.unwrap_or(false),
            not_before: attributes.nbf,
            expires: attributes.exp,
            created: attributes.created,
        })
    }
}

fn modulus_bits(modulus: &str) -> Option<u32> {
    significant_bits(&base64url::decode(modulus)?)
}

fn expect_kid(key: &KeyUrl, kid: &str) -> ProviderResult<()> {
    if key.is(kid) {
        return Ok(());
    }
    Err(ProviderError::new(
        Class::Denied(Reason::WrongKeyOrCorruptEnvelope),
        format!("the service answered for another key than {}: {kid}", key.name),
    ))
}

fn parse<'a, T: Deserialize<'a>>(response: &'a Response) -> ProviderResult<T> {
    serde_json::from_slice(&response.body).map_err(|_| unreadable("answer"))
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    use super::*;

    #[test]
    fn key_urls() {
        let key = KeyUrl::parse("https://kv1.vault.azure.net/keys/kek/0123abcd").unwrap();
        assert_eq!((key.name(), key.version()), ("kek", Some("0123abcd")));
        assert_eq!(
            key.endpoint("/wrapkey"),
            "https://kv1.vault.azure.net/keys/kek/0123abcd/wrapkey?api-version=7.4"
        );
        assert_eq!(key.without_version(), "https://kv1.vault.azure.net/keys/kek");
        let current = KeyUrl::parse("https://127.0.0.1:8443/keys/kek/").unwrap();
        assert_eq!(current.endpoint(""), "https://127.0.0.1:8443/keys/kek?api-version=7.4");
        assert!(current.is("https://elsewhere/keys/KEK/0123"));
        assert!(!current.is("https://127.0.0.1:8443/keys/kek"));
        assert!(!key.is("https://kv1.vault.azure.net/keys/kek/4567"));
        for bad in [
            "",
            "kek",
            "http://kv/keys/kek",
            "https://kv/secrets/kek",
            "https://kv/keys/",
            "https://kv/keys/a/b/c",
            "https://kv/keys/a_b",
            "https://user@kv/keys/kek",
            "https://kv/keys/kek?x=1",
            "https://kv/keys/../kek",
        ] {
            assert_eq!(KeyUrl::parse(bad).unwrap_err().kind, Kind::Usage, "{bad}");
        }
    }

    #[test]
    fn modulus_sizes() {
        assert_eq!(modulus_bits(&URL_SAFE_NO_PAD.encode([0x80; 256])), Some(2048));
        assert_eq!(modulus_bits(&URL_SAFE_NO_PAD.encode([0x01; 256])), Some(2041));
        assert_eq!(modulus_bits(&URL_SAFE_NO_PAD.encode([0, 0x80])), Some(8));
        assert_eq!(modulus_bits(""), None);
        assert_eq!(modulus_bits("!"), None);
    }
}

#[cfg(test)]
#[path = "azure_tests.rs"]
mod wire_tests;
