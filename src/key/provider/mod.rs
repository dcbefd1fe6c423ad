//! Key services, behind one small trait.
//!
//! A [`Provider`] knows how to reach a service; a [`Session`] is one short conversation with it:
//! one probe, one revalidation, one enrolment. All of it ends by the session's deadline, whatever
//! the other side does, and nothing of it (connections, buffers, TLS keys) outlives the session.
//!
//! A provider reports; it decides nothing. It says what a failure means ([`Class`]) by the table
//! of conditions in docs/KEYS.md, and never retries, except that a token refused once is fetched
//! anew. What follows is for [`super::policy`].

pub mod azure;
mod azure_assertion;
mod azure_auth;
mod azure_error;
mod azure_identity;
mod azure_token;
mod base64url;
mod http;
mod identity;
pub mod pkcs11;
mod scope;
mod secret_file;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::clock::BootTime;
use super::reason::Reason;
use crate::crypto::secret::SecretBytes;
use crate::error::{Error, Kind, Result};
pub use identity::{AppService, Application, Identity, Imds};
pub use scope::Scope;

pub type ProviderResult<T> = std::result::Result<T, ProviderError>;

/// A key service.
pub trait Provider: fmt::Debug + Send + Sync {
    /// As the envelope names it: "azure", "pkcs11".
    fn name(&self) -> &'static str;
    /// A conversation that ends at `deadline`.
    fn session(&self, deadline: BootTime) -> ProviderResult<Box<dyn Session + '_>>;
    /// Whether a key that is named like this is one version of it, and not whichever is current.
    fn names_version(&self, url: &str) -> bool;
}

/// One conversation with a key service, with a key at a time.
///
/// `kid` is the full identifier of a key version; only [`Session::get_key`] also takes one
/// without a version, which means the current version.
pub trait Session {
    fn get_key(&mut self, kid: &str) -> ProviderResult<KeyInfo>;
    fn list_versions(&mut self, kid: &str) -> ProviderResult<Vec<VersionInfo>>;
    /// Has the service wrap: never with the public key here, or it would prove nothing.
    fn wrap(
        &mut self,
        kid: &str,
        algorithm: Algorithm,
        plain: &SecretBytes,
    ) -> ProviderResult<Vec<u8>>;
    fn unwrap(
        &mut self,
        kid: &str,
        algorithm: Algorithm,
        wrapped: &[u8],
    ) -> ProviderResult<SecretBytes>;
    /// A backup of the key with all of its versions, which only its service can restore.
    fn back_up(&mut self, kid: &str) -> ProviderResult<Vec<u8>> {
        Err(ProviderError::new(
            Class::Denied(Reason::PermissionRevoked),
            format!("the key service of {kid} hands out no backups of keys"),
        ))
    }
    /// What a volume key is best wrapped with by this key; `wish`, if the key can.
    fn algorithm(&mut self, info: &KeyInfo, wish: Option<Algorithm>) -> ProviderResult<Algorithm> {
        Ok(match (info.key_type.starts_with("oct"), wish) {
            (true, _) => Algorithm::A256Kw,
            (false, None | Some(Algorithm::A256Kw)) => Algorithm::RsaOaep256,
            (false, Some(wish)) => wish,
        })
    }
}

/// How a provider is reached and who asks; see config/byokfs.toml, `[key]` and `[[service]]`.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub identity: Identity,
    /// Trusted besides the system's certificate authorities (PEM).
    pub ca_file: Option<PathBuf>,
    /// Whether the service's challenge must name a domain that the key's host lies in.
    pub verify_challenge_resource: ChallengeCheck,
    pub pkcs11: pkcs11::Settings,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChallengeCheck {
    /// On; an IP address or a single-label host, which has no domain, may ask for itself only.
    #[default]
    Auto,
    On,
    Off,
}

/// Whether this names a key of some provider, and not a file.
pub fn is_key(name: &str) -> bool {
    name.starts_with("https://") || name.starts_with(pkcs11::SCHEME)
}

/// The provider for a key, by the form of its identifier.
pub fn for_key(kid: &str, settings: &Settings) -> Result<Arc<dyn Provider>> {
    if kid.starts_with(pkcs11::SCHEME) {
        return Ok(Arc::new(pkcs11::Pkcs11::new(kid, &settings.pkcs11)?));
    }
    if is_key(kid) {
        return Ok(Arc::new(azure::Azure::new(kid, settings)?));
    }
    Err(Error::new(
        Kind::Usage,
        format!(
            "{kid} is not the URL of a key: expected https://HOST/keys/NAME, .../VERSION, or \
             pkcs11:token=TOKEN;object=NAME"
        ),
    ))
}

/// The name of a version's key, which stands for its current version.
pub fn without_version(kid: &str) -> Result<String> {
    if kid.starts_with(pkcs11::SCHEME) {
        return pkcs11::without_version(kid);
    }
    azure::KeyUrl::parse(kid).map(|key| key.without_version())
}

/// How the key service encrypts a key with a key. Names as in RFC 7518 and Key Vault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    RsaOaep256,
    /// With SHA-1: for HSMs that know no other.
    RsaOaep,
    /// AES key wrap, for symmetric keys of a Managed HSM.
    A256Kw,
}

impl Algorithm {
    pub const ALL: [Algorithm; 3] = [Algorithm::RsaOaep256, Algorithm::RsaOaep, Algorithm::A256Kw];

    pub const fn name(self) -> &'static str {
        match self {
            Algorithm::RsaOaep256 => "RSA-OAEP-256",
            Algorithm::RsaOaep => "RSA-OAEP",
            Algorithm::A256Kw => "A256KW",
        }
    }

    pub fn from_name(name: &str) -> Option<Algorithm> {
        Algorithm::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }
}

/// What the service says of a key version. Times are seconds since the epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyInfo {
    /// Full, with the version.
    pub kid: String,
    /// "RSA", "RSA-HSM", "EC", "oct-HSM", ...
    pub key_type: String,
    /// Of the modulus, where there is one.
    pub bits: Option<u32>,
    pub operations: Vec<String>,
    pub enabled: bool,
    pub not_before: Option<i64>,
    pub expires: Option<i64>,
    pub created: Option<i64>,
    pub recovery_level: Option<String>,
    pub recoverable_days: Option<u32>,
    /// Whether the key can be taken out of its service, where the service says so.
    pub exportable: Option<bool>,
    /// For services that know no recovery: whether the key can be destroyed.
    pub destroyable: Option<bool>,
    /// Of the service, as it tells.
    pub region: Option<String>,
    /// Directory that the service trusts, from its challenge.
    pub tenant: Option<String>,
    /// Directory of the identity that asks, from its token.
    pub identity_tenant: Option<String>,
    /// The service's own time, and when it said so.
    pub service_time: Option<ServiceTime>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceTime {
    pub unix: i64,
    pub heard: BootTime,
}

impl ServiceTime {
    /// The service's time at `now`.
    pub fn at(self, now: BootTime) -> i64 {
        let elapsed = i64::try_from(now.since(self.heard).as_secs()).unwrap_or(i64::MAX);
        self.unix.saturating_add(elapsed)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionInfo {
    pub kid: String,
    pub enabled: bool,
    pub not_before: Option<i64>,
    pub expires: Option<i64>,
    pub created: Option<i64>,
}

/// Of an unsigned number, big end first: the size of an RSA modulus.
fn significant_bits(number: &[u8]) -> Option<u32> {
    let zeros = number.iter().take_while(|&&byte| byte == 0).count();
    let number = number.get(zeros..)?;
    let first = number.first()?;
    u32::try_from(number.len()).ok()?.checked_mul(8)?.checked_sub(first.leading_zeros())
}

/// What a failure means for the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The service's final word: cut off at once.
    Revoked(Reason),
    /// A denial that may be a slip of an operator or a change under way: confirm, then cut off.
    Denied(Reason),
    /// Nothing was said about the key: serve on for a while.
    Transient(Reason),
}

impl Class {
    pub const fn reason(self) -> Reason {
        match self {
            Class::Revoked(reason) | Class::Denied(reason) | Class::Transient(reason) => reason,
        }
    }

    /// Stable name, as in status.
    pub const fn name(self) -> &'static str {
        match self {
            Class::Revoked(_) => "Revoked",
            Class::Denied(_) => "Denied",
            Class::Transient(_) => "Transient",
        }
    }
}

/// A failed call to a key service. The message is fit for logs and for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProviderError {
    pub class: Class,
    /// HTTP status, where the service answered.
    pub status: Option<u16>,
    /// The service's own code: "Forbidden/KeyDisabled".
    pub code: Option<String>,
    message: String,
    /// How long the service asked to be left alone.
    pub retry_after: Option<Duration>,
}

impl ProviderError {
    pub fn new(class: Class, message: impl AsRef<str>) -> ProviderError {
        let message = scrub(message.as_ref());
        ProviderError { class, status: None, code: None, message, retry_after: None }
    }

    pub fn unreachable(message: impl AsRef<str>) -> ProviderError {
        ProviderError::new(Class::Transient(Reason::Unreachable), message)
    }

    pub fn reason(&self) -> Reason {
        self.class.reason()
    }

    pub fn message(&self) -> &str {
        &self.message
    }

    /// Prefixes what was being done.
    pub fn during(mut self, what: &str) -> ProviderError {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl fmt::Display for ProviderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match (self.status, &self.code) {
            (Some(status), Some(code)) => write!(f, " (HTTP {status}, {code})"),
            (Some(status), None) => write!(f, " (HTTP {status})"),
            (None, Some(code)) => write!(f, " ({code})"),
            (None, None) => Ok(()),
        }
    }
}

impl std::error::Error for ProviderError {}

impl From<ProviderError> for Error {
    fn from(error: ProviderError) -> Error {
        let kind = match error.class {
            Class::Transient(_) => Kind::Unreachable,
            Class::Revoked(_) | Class::Denied(_) => Kind::Denied,
        };
        Error::new(kind, error.to_string())
    }
}

/// Longest message kept: enough for every known one, and nobody can fill a log with it.
const MESSAGE_LIMIT: usize = 400;

/// Makes a service's message fit to be shown: without the lines that describe the caller (they
/// name identities and addresses), without anything that looks like a token, on one line.
fn scrub(message: &str) -> String {
    const PRIVATE: [&str; 4] = ["Caller:", "Client address:", "Assignment:", "DenyAssignmentId:"];
    let lines = message.split(['\r', '\n']).map(str::trim);
    let kept: Vec<String> = lines
        .filter(|line| !line.is_empty())
        .map(|line| {
            PRIVATE.iter().filter_map(|word| line.find(word)).min().map_or(line, |at| &line[..at])
        })
        .map(|line| {
            let words = line.split_whitespace();
            words
                .map(|word| if looks_secret(word) { "[redacted]" } else { word })
                .collect::<Vec<_>>()
                .join(" ")
        })
        .filter(|line| !line.is_empty())
        .collect();
    let mut text: String = kept.join(" ").chars().filter(|c| !c.is_control()).collect();
    if text.len() > MESSAGE_LIMIT {
        let end = (0..=MESSAGE_LIMIT).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
        text.push_str("...");
    }
    text
}

/// A JSON web token begins with the base64 of `{"`; no other word is that long without a
/// slash, as URLs have. A refusal by policy names the caller in the middle of its sentence.
fn looks_secret(word: &str) -> bool {
    let caller = ["appid=", "oid="].iter().any(|name| word.contains(name));
    word.contains("eyJ") && word.len() > 20 || word.len() > 100 && !word.contains('/') || caller
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn algorithms_round_trip() {
        for algorithm in Algorithm::ALL {
            assert_eq!(Algorithm::from_name(algorithm.name()), Some(algorithm));
        }
        assert_eq!(Algorithm::from_name("RSA1_5"), None);
    }

    #[test]
    fn messages_lose_callers_and_tokens() {
        let message = "Caller is not authorized to perform action on resource.\r\nIf role \
            assignments changed recently, please observe propagation time.\r\nCaller: \
            appid=11111;oid=2222\r\nAction: 'Microsoft.KeyVault/vaults/keys/wrap/action'\r\n\
            Assignment: (not found)\r\ntoken eyJhbGciOiJSUzI1NiJ9.eyJhdWQiOiJ4In0.c2ln";
        let error = ProviderError::new(Class::Denied(Reason::PermissionRevoked), message);
        assert!(error.message().starts_with("Caller is not authorized"));
        assert!(error.message().contains("keys/wrap/action"));
        for secret in ["appid", "2222", "eyJ", "Caller:", "Assignment"] {
            assert!(!error.message().contains(secret), "{secret} in {}", error.message());
        }
        let same_line =
            ProviderError::unreachable("no. Caller: appid=1; oid=2 Client address: 1.2.3.4");
        assert_eq!(same_line.message(), "no.");
        let by_policy = ProviderError::unreachable(
            "The user, group or application 'appid=11;oid=22;iss=https://sts.windows.net/33/' does \
             not have keys get permission on key vault 'kv1;location=westeurope'.",
        );
        assert_eq!(
            by_policy.message(),
            "The user, group or application [redacted] does not have keys get permission on key \
             vault 'kv1;location=westeurope'."
        );
        let long = ProviderError::unreachable("\u{e9} ".repeat(1000));
        assert!(long.message().len() <= MESSAGE_LIMIT + 3);
        assert!(!ProviderError::unreachable("a".repeat(200)).message().contains("aaa"));
    }

    #[test]
    fn only_transient_errors_are_worth_another_try() {
        let kind = |class| Error::from(ProviderError::new(class, "x")).kind;
        assert_eq!(kind(Class::Transient(Reason::Unreachable)), Kind::Unreachable);
        assert_eq!(kind(Class::Denied(Reason::NetworkDenied)), Kind::Denied);
        assert_eq!(kind(Class::Revoked(Reason::KeyDeleted)), Kind::Denied);
    }

    #[test]
    fn versions_are_of_keys() {
        let key = |kid: &str| without_version(kid).ok();
        let token = "pkcs11:token=t;object=kek";
        assert_eq!(key(&format!("{token};id=%01")).as_deref(), Some(token));
        assert_eq!(key("pkcs11:token=t;id=%01"), None);
        let vault = "https://kv1.vault.azure.net/keys/kek";
        assert_eq!(key(&format!("{vault}/01")).as_deref(), Some(vault));
    }

    #[test]
    fn the_service_clock_goes_on() {
        let heard = BootTime::now();
        let time = ServiceTime { unix: 1000, heard };
        assert_eq!(time.at(heard), 1000);
        assert_eq!(time.at(heard + Duration::from_secs(70)), 1070);
    }

    #[test]
    fn keys_that_no_provider_serves_are_refused() {
        for kid in ["", "kek", "http://127.0.0.1/keys/kek", "pkcs11:token=x"] {
            assert_eq!(for_key(kid, &Settings::default()).unwrap_err().kind, Kind::Usage);
        }
    }
}
