//! Tokens for Azure Key Vault: the bearer challenge and the managed identity that answers it.
//!
//! The vault says in its 401 for which resource a token must be issued. Before the identity is
//! asked for one, the vault's host must lie in that resource's domain, or any server could make
//! this client fetch a token for another service and hand it over.
//!
//! A token is kept until shortly before it expires, and not longer than [`MAX_AGE`] while a newer
//! one can be had: an identity that is deleted is only noticed when a token is asked for.

use std::fmt;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Deserialize;
use ureq::http::Method;
use url::{Host, Url};

use super::http::{Client, Request, Response};
use super::{AppService, ChallengeCheck, Class, Identity, ProviderError, ProviderResult};
use crate::crypto::secret::SecretString;
use crate::error::{Context, Error, Kind, Result};
use crate::key::clock::BootTime;
use crate::key::reason::Reason;
use crate::key::wall_clock;

/// How long a token is used although it would be valid longer.
const MAX_AGE: Duration = Duration::from_secs(5 * 60);
/// How long before its end a token is replaced.
const SPARE: i64 = 300;
const API_VERSION: &str = "2019-08-01";

/// What a 401 of a vault asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    pub resource: String,
    /// First path segment of the authority.
    pub tenant: Option<String>,
}

impl Challenge {
    /// Reads `WWW-Authenticate: Bearer authorization="...", resource="..."`; Managed HSM and
    /// older services use other names for the same.
    pub(super) fn parse(header: &str) -> Option<Challenge> {
        let (scheme, parameters) = header.trim().split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut resource, mut tenant) = (None, None);
        for parameter in parameters.split(',') {
            let Some((name, value)) = parameter.split_once('=') else { continue };
            let value = value.trim().trim_matches('"');
            match name.trim().to_ascii_lowercase().as_str() {
                "resource" => resource = Some(value.to_owned()),
                "scope" => {
                    resource = resource.or(Some(value.trim_end_matches("/.default").to_owned()));
                }
                "authorization" | "authorization_uri" => {
                    let url = Url::parse(value).ok()?;
                    tenant =
                        url.path_segments().and_then(|mut path| path.next().map(str::to_owned));
                }
                _ => {}
            }
        }
        Some(Challenge { resource: resource?, tenant: tenant.filter(|tenant| !tenant.is_empty()) })
    }

    /// Whether `host` may be given a token for the resource it asks for.
    pub(super) fn check(&self, host: &Host<&str>, check: ChallengeCheck) -> ProviderResult<()> {
        let has_domain = matches!(host, Host::Domain(name) if name.contains('.'));
        if check == ChallengeCheck::Off || check == ChallengeCheck::Auto && !has_domain {
            return Ok(());
        }
        let resource = Url::parse(&self.resource).ok();
        let domain = resource.as_ref().and_then(Url::host_str).unwrap_or("");
        let host = host.to_string();
        if !domain.is_empty() && host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.')) {
            return Ok(());
        }
        Err(ProviderError::new(
            Class::Transient(Reason::TlsUntrusted),
            format!(
                "{host} asks for a token for {}, which is not its domain: no token is sent; see \
                 verify_challenge_resource",
                self.resource
            ),
        ))
    }
}

/// Fetches and keeps tokens for one identity.
pub(super) struct Tokens {
    endpoint: Url,
    header: SecretString,
    client_id: Option<String>,
    cached: Mutex<Option<Cached>>,
}

struct Cached {
    challenge: Challenge,
    token: std::sync::Arc<SecretString>,
    /// Seconds since the epoch.
    expires: i64,
    fetched: BootTime,
}

impl Tokens {
    pub(super) fn new(identity: &Identity) -> Result<Tokens> {
        let Identity::AppService(settings) = identity;
        let endpoint = identity_endpoint(settings)?;
        let header = identity_header(settings)?;
        let client_id = settings.client_id.clone().filter(|id| !id.is_empty());
        Ok(Tokens { endpoint, header, client_id, cached: Mutex::new(None) })
    }

    /// What the service last asked for, if it ever did.
    pub(super) fn challenge(&self) -> Option<Challenge> {
        self.cached.lock().as_ref().map(|cached| cached.challenge.clone())
    }

    /// A token that answers `challenge`: the one kept, or a new one.
    pub(super) fn get(
        &self,
        client: &Client,
        challenge: &Challenge,
    ) -> ProviderResult<std::sync::Arc<SecretString>> {
        let mut cached = self.cached.lock();
        let now = wall_clock();
        let kept = cached.as_ref().filter(|kept| kept.challenge == *challenge);
        if let Some(kept) = kept
            && now < kept.expires - SPARE
            && BootTime::now().since(kept.fetched) < MAX_AGE
        {
            return Ok(kept.token.clone());
        }
        match self.fetch(client, challenge) {
            Ok(fresh) => {
                let token = fresh.token.clone();
                *cached = Some(fresh);
                Ok(token)
            }
            // The identity endpoint is down for a moment: the kept token still speaks for us.
            Err(ProviderError { class: Class::Transient(_), .. })
                if kept.is_some_and(|kept| now < kept.expires) =>
            {
                log::debug!("the identity endpoint does not answer; using the token at hand");
                kept.map(|kept| kept.token.clone()).ok_or_else(|| malformed("token"))
            }
            Err(error) => Err(error.during("asking the managed identity for a token")),
        }
    }

    /// The service refused the kept token: the next one is fetched.
    pub(super) fn forget(&self) {
        if let Some(kept) = self.cached.lock().as_mut() {
            kept.expires = 0;
        }
    }

    fn fetch(&self, client: &Client, challenge: &Challenge) -> ProviderResult<Cached> {
        let mut url = self.endpoint.clone();
        {
            let mut query = url.query_pairs_mut();
            query.append_pair("api-version", API_VERSION);
            query.append_pair("resource", &challenge.resource);
            if let Some(id) = &self.client_id {
                query.append_pair("client_id", id);
            }
        }
        let response = client.send(Request {
            method: Method::GET,
            url: url.as_str(),
            bearer: None,
            headers: &[("X-IDENTITY-HEADER", self.header.expose())],
            body: Vec::new(),
        })?;
        if response.status != 200 {
            return Err(classify(&response));
        }
        let answer: TokenAnswer<'_> =
            serde_json::from_slice(&response.body).map_err(|_| malformed("answer"))?;
        let expires = answer.expires(wall_clock()).ok_or_else(|| malformed("expiry"))?;
        let token = SecretString::from_string_wiping(answer.access_token.to_owned());
        let token = token.map_err(|error| ProviderError::unreachable(error.to_string()))?;
        crate::sys::stack::burn();
        let (challenge, fetched) = (challenge.clone(), BootTime::now());
        Ok(Cached { challenge, token: token.into(), expires, fetched })
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("endpoint", &self.endpoint.as_str()).finish_non_exhaustive()
    }
}

/// `expires_on` is a string in some services and a number in others; some send `expires_in`.
#[derive(Deserialize)]
struct TokenAnswer<'a> {
    access_token: &'a str,
    expires_on: Option<TextOrNumber>,
    expires_in: Option<TextOrNumber>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TextOrNumber {
    Number(i64),
    Text(String),
}

impl TextOrNumber {
    fn number(&self) -> Option<i64> {
        match self {
            TextOrNumber::Number(number) => Some(*number),
            TextOrNumber::Text(text) => text.parse().ok(),
        }
    }
}

impl TokenAnswer<'_> {
    fn expires(&self, now: i64) -> Option<i64> {
        let absolute = self.expires_on.as_ref().and_then(TextOrNumber::number);
        let relative = self.expires_in.as_ref().and_then(TextOrNumber::number);
        absolute.or(relative.map(|seconds| now.saturating_add(seconds)))
    }
}

fn malformed(what: &str) -> ProviderError {
    ProviderError::unreachable(format!("the identity endpoint sent a malformed {what}"))
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenError {
    error: String,
    error_description: String,
    message: String,
}

/// Refusals of an identity endpoint: rows 14 to 17 of the table of conditions.
fn classify(response: &Response) -> ProviderError {
    let body: Option<TokenError> = serde_json::from_slice(&response.body).ok();
    let Some(body) = body.filter(|_| response.status < 500) else {
        let class = match response.status {
            403 => Class::Transient(Reason::ProxyDenied),
            _ => Class::Transient(Reason::Unreachable),
        };
        return finish(class, response, "the identity endpoint does not work", None);
    };
    let text =
        if body.error_description.is_empty() { &body.message } else { &body.error_description };
    let lower = text.to_ascii_lowercase();
    let not_found = ["identity not found", "no managed identity", "has not been assigned"];
    let class = match response.status {
        404 | 408 | 410 | 429 => Class::Transient(Reason::Unreachable),
        _ if text.contains("AADSTS7000112") => Class::Revoked(Reason::IdentityGone),
        _ if text.contains("AADSTS700016") => Class::Denied(Reason::IdentityGone),
        _ if not_found.iter().any(|phrase| lower.contains(phrase)) => {
            Class::Denied(Reason::IdentityGone)
        }
        _ => Class::Denied(Reason::CredentialInvalid),
    };
    let text = if text.is_empty() { "the identity endpoint refuses" } else { text };
    finish(class, response, text, Some(body.error.clone()).filter(|code| !code.is_empty()))
}

fn finish(class: Class, response: &Response, text: &str, code: Option<String>) -> ProviderError {
    let mut error = ProviderError::new(class, text);
    error.status = Some(response.status);
    error.code = code;
    error.retry_after = response.retry_after();
    error
}

fn identity_endpoint(settings: &AppService) -> Result<Url> {
    let text = match &settings.endpoint {
        Some(endpoint) if !endpoint.is_empty() => endpoint.clone(),
        _ => std::env::var("IDENTITY_ENDPOINT").map_err(|_| {
            config("identity_endpoint is not set, and IDENTITY_ENDPOINT is not in the environment")
        })?,
    };
    let url =
        Url::parse(&text).map_err(|why| config(format!("identity_endpoint {text}: {why}")))?;
    // The header's secret and the token travel as they are: not over a network.
    let local = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback() || address.is_link_local(),
        Some(Host::Ipv6(address)) => IpAddr::V6(address).is_loopback(),
        None => false,
    };
    if url.scheme() == "https" || url.scheme() == "http" && local {
        Ok(url)
    } else {
        Err(config(format!("identity_endpoint {text}: must be https, or http on this machine")))
    }
}

fn identity_header(settings: &AppService) -> Result<SecretString> {
    match &settings.header_file {
        Some(path) => read_secret_file(path),
        None => match std::env::var("IDENTITY_HEADER") {
            Ok(header) => SecretString::from_string_wiping(header),
            Err(_) => Err(config(
                "identity_header_file is not set, and IDENTITY_HEADER is not in the environment",
            )),
        },
    }
}

/// A secret in a file that nobody but its owner, who is we or root, may read.
fn read_secret_file(path: &Path) -> Result<SecretString> {
    use std::io::Read;
    let name = || format!("identity_header_file {}", path.display());
    let mut file = std::fs::File::open(path).context(name)?;
    let metadata = file.metadata().context(name)?;
    let me = rustix::process::geteuid().as_raw();
    if metadata.permissions().mode() & 0o077 != 0 || ![0, me].contains(&metadata.uid()) {
        let why = "is readable by others, or another's: chown it and chmod it to 0600";
        return Err(config(format!("{} {why}", name())));
    }
    let mut text = String::new();
    file.by_ref().take(4096).read_to_string(&mut text).context(name)?;
    let trimmed = text.trim_end().len();
    text.truncate(trimmed);
    if text.is_empty() {
        return Err(config(format!("{} is empty", name())));
    }
    SecretString::from_string_wiping(text)
}

fn config(message: impl Into<String>) -> Error {
    Error::new(Kind::Config, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_of_vault_and_hsm_are_read() {
        let vault = "Bearer authorization=\"https://login.microsoftonline.com/72f9-ab\", \
                     resource=\"https://vault.azure.net\"";
        let challenge = Challenge::parse(vault).unwrap();
        assert_eq!(challenge.resource, "https://vault.azure.net");
        assert_eq!(challenge.tenant.as_deref(), Some("72f9-ab"));
        let scope = "bearer authorization_uri=\"https://login/t\", \
                     scope=\"https://managedhsm.azure.net/.default\"";
        assert_eq!(Challenge::parse(scope).unwrap().resource, "https://managedhsm.azure.net");
        for bad in ["", "Bearer", "Basic realm=\"x\"", "Bearer authorization=\"https://x/y\""] {
            assert_eq!(Challenge::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_token_goes_only_to_the_resources_own_domain() {
        let challenge = Challenge { resource: "https://vault.azure.net".into(), tenant: None };
        let allowed = |host, check| challenge.check(&host, check).is_ok();
        let domain = |name| Host::Domain(name);
        for check in [ChallengeCheck::Auto, ChallengeCheck::On] {
            assert!(allowed(domain("kv1.vault.azure.net"), check));
            assert!(!allowed(domain("vault.azure.net"), check));
            assert!(!allowed(domain("kv1.evil.example"), check));
            assert!(!allowed(domain("kv1evilvault.azure.net"), check));
        }
        assert!(allowed(Host::Ipv4([127, 0, 0, 1].into()), ChallengeCheck::Auto));
        assert!(allowed(domain("localhost"), ChallengeCheck::Auto));
        assert!(!allowed(Host::Ipv4([127, 0, 0, 1].into()), ChallengeCheck::On));
        assert!(allowed(domain("kv1.evil.example"), ChallengeCheck::Off));
    }

    #[test]
    fn refusals_of_the_identity_follow_the_table() {
        let case = |status, body: &str| {
            let headers = ureq::http::HeaderMap::new();
            classify(&Response { status, headers, body: body.into() }).class
        };
        let body = |error: &str, text: &str| {
            format!("{{\"error\":\"{error}\",\"error_description\":\"{text}\"}}")
        };
        let gone = Class::Denied(Reason::IdentityGone);
        assert_eq!(case(400, &body("invalid_request", "Identity not found")), gone);
        assert_eq!(case(400, &body("unauthorized_client", "AADSTS700016: no application")), gone);
        assert_eq!(
            case(400, r#"{"statusCode":400,"message":"No Managed Identity found for it"}"#),
            gone
        );
        let disabled = case(401, &body("unauthorized_client", "AADSTS7000112: disabled"));
        assert_eq!(disabled, Class::Revoked(Reason::IdentityGone));
        for number in ["7000215", "7000222", "90002"] {
            let class = case(401, &body("invalid_client", &format!("AADSTS{number}: no")));
            assert_eq!(class, Class::Denied(Reason::CredentialInvalid), "{number}");
        }
        for status in [404, 410, 429, 500, 503] {
            assert_eq!(case(status, &body("x", "y")), Class::Transient(Reason::Unreachable));
        }
        assert_eq!(case(403, "<html>blocked</html>"), Class::Transient(Reason::ProxyDenied));
        assert_eq!(case(400, "not json"), Class::Transient(Reason::Unreachable));
    }

    #[test]
    fn expiry_is_read_in_every_form() {
        for (text, expected) in [
            (r#"{"access_token":"t","expires_on":"1700000000"}"#, Some(1_700_000_000)),
            (r#"{"access_token":"t","expires_on":1700000000}"#, Some(1_700_000_000)),
            (r#"{"access_token":"t","expires_in":"60"}"#, Some(1060)),
            (r#"{"access_token":"t"}"#, None),
        ] {
            let answer: TokenAnswer<'_> = serde_json::from_str(text).unwrap();
            assert_eq!(answer.expires(1000), expected, "{text}");
        }
    }

    #[test]
    fn the_identity_endpoint_must_be_local_or_https() {
        let parse = |text: &str| {
            let endpoint = Some(text.to_owned());
            identity_endpoint(&AppService { endpoint, ..AppService::default() })
        };
        for good in ["http://127.0.0.1:41/msi/token", "http://169.254.130.2:8081/x", "https://x.y/"]
        {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in ["http://10.0.0.1/x", "http://example.org/", "ftp://127.0.0.1/", "nonsense"] {
            assert_eq!(parse(bad).unwrap_err().kind, Kind::Config, "{bad}");
        }
    }

    #[test]
    fn the_header_file_must_be_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("header");
        std::fs::write(&path, "s3cret\n").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        assert!(read_secret_file(&path).unwrap_err().to_string().contains("0600"));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        assert!(read_secret_file(&path).unwrap().ct_eq("s3cret"));
        std::fs::write(&path, "\n").unwrap();
        assert!(read_secret_file(&path).is_err());
    }
}
