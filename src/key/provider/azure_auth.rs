//! Tokens for Azure Key Vault: the bearer challenge, and the tokens kept that answer it.
//!
//! The vault says in its 401 for which resource a token must be issued. Before the identity
//! ([`super::azure_identity`]) is asked for one, the vault's host must lie in that resource's
//! domain, or any server could make this client fetch a token for another service and hand it
//! over. Which authority issues tokens is the configuration's matter, never the challenge's.
//!
//! A token is kept until shortly before it expires, and not longer than [`MAX_AGE`] while a newer
//! one can be had: an identity that is deleted is only noticed when a token is asked for.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use url::{Host, Url};

use super::azure_identity::Credential;
use super::azure_token::{Token, malformed};
use super::http::Client;
use super::{ChallengeCheck, Class, Identity, ProviderError, ProviderResult};
use crate::crypto::secret::SecretString;
use crate::error::Result;
use crate::key::clock::BootTime;
use crate::key::reason::Reason;
use crate::key::wall_clock;
use crate::sync::Mutex;

/// How long a token is used although it would be valid longer.
const MAX_AGE: Duration = Duration::from_secs(5 * 60);
/// How long before its end a token is replaced.
const SPARE: i64 = 300;

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
        if check == ChallengeCheck::Off {
            return Ok(());
        }
        let has_domain = matches!(host, Host::Domain(name) if name.contains('.'));
        let resource = Url::parse(&self.resource).ok();
        let domain = resource.as_ref().and_then(Url::host_str).unwrap_or("");
        let host = host.to_string();
        // Else any address, in an envelope that anyone may have written, could ask for a token of
        // any service, and would be handed it.
        if check == ChallengeCheck::Auto && !has_domain && domain == host {
            return Ok(());
        }
        if !domain.is_empty() && host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.')) {
            return Ok(());
        }
        Err(ProviderError::new(
            Class::Transient(Reason::TlsUntrusted),
            format!(
                "{host} asks for a token for {}, which is not its domain: no token is sent; see \
                 verify_challenge",
                self.resource
            ),
        ))
    }
}

/// Fetches and keeps tokens for one identity.
pub(super) struct Tokens {
    credential: Credential,
    cached: Mutex<Option<Cached>>,
}

struct Cached {
    challenge: Challenge,
    token: Arc<SecretString>,
    /// Directory that issued the token.
    tenant: Option<String>,
    /// Seconds since the epoch.
    expires: i64,
    fetched: BootTime,
}

impl Tokens {
    pub(super) fn new(identity: &Identity) -> Result<Tokens> {
        Ok(Tokens { credential: Credential::new(identity)?, cached: Mutex::new(None) })
    }

    /// What the service last asked for, if it ever did.
    pub(super) fn challenge(&self) -> Option<Challenge> {
        self.cached.lock().as_ref().map(|cached| cached.challenge.clone())
    }

    /// The identity's own directory, as its last token says.
    pub(super) fn issuing_tenant(&self) -> Option<String> {
        self.cached.lock().as_ref().and_then(|cached| cached.tenant.clone())
    }

    /// A token that answers `challenge`: the one kept, or a new one.
    pub(super) fn get(
        &self,
        client: &Client,
        challenge: &Challenge,
    ) -> ProviderResult<Arc<SecretString>> {
        let mut cached = self.cached.lock();
        let now = wall_clock();
        let kept = cached.as_ref().filter(|kept| kept.challenge == *challenge);
        if let Some(kept) = kept
            && now < kept.expires.saturating_sub(SPARE)
            && BootTime::now().since(kept.fetched) < MAX_AGE
        {
            return Ok(kept.token.clone());
        }
        match self.credential.fetch(client, &challenge.resource) {
            Ok(Token { secret, expires, fetched, tenant }) => {
                let (challenge, token) = (challenge.clone(), Arc::new(secret));
                *cached =
                    Some(Cached { challenge, token: Arc::clone(&token), tenant, expires, fetched });
                Ok(token)
            }
            // The token endpoint is down for a moment: the kept token still speaks for us.
            Err(ProviderError { class: Class::Transient(_), .. })
                if kept.is_some_and(|kept| now < kept.expires) =>
            {
                log::debug!("the token endpoint does not answer; using the token at hand");
                kept.map(|kept| kept.token.clone()).ok_or_else(|| malformed("token"))
            }
            Err(error) => {
                // Who issued the kept token does not stand by it any more: it is not to speak for us
                // when the endpoint is down later.
                if !matches!(error.class, Class::Transient(_))
                    && let Some(kept) = cached.as_mut()
                {
                    kept.expires = 0;
                }
                Err(error.during(self.credential.errand()))
            }
        }
    }

    /// The service refuses a token that answers its challenge: it is asked for another.
    pub(super) fn forget_challenge(&self) {
        *self.cached.lock() = None;
    }

    /// The service refused the kept token: the next one is fetched.
    pub(super) fn forget(&self) {
        if let Some(kept) = self.cached.lock().as_mut() {
            kept.expires = 0;
        }
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("credential", &self.credential).finish_non_exhaustive()
    }
}

#[cfg(test)]
impl Tokens {
    /// As after [`MAX_AGE`].
    pub(super) fn age(&self) {
        if let Some(kept) = self.cached.lock().as_mut() {
            kept.fetched = BootTime::ZERO;
        }
    }
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
        let asks = |resource: &str, host: Host<&str>, check| {
            Challenge { resource: resource.into(), tenant: None }.check(&host, check).is_ok()
        };
        let allowed = |host, check| asks("https://vault.azure.net", host, check);
        let domain = |name| Host::Domain(name);
        for check in [ChallengeCheck::Auto, ChallengeCheck::On] {
            assert!(allowed(domain("kv1.vault.azure.net"), check));
            assert!(!allowed(domain("vault.azure.net"), check));
            assert!(!allowed(domain("kv1.evil.example"), check));
            assert!(!allowed(domain("kv1evilvault.azure.net"), check));
        }
        let address = || Host::Ipv4([127, 0, 0, 1].into());
        for (resource, host) in [
            ("https://127.0.0.1:8443", address()),
            ("https://localhost:8443", domain("localhost")),
            ("https://[::1]:8443", Host::Ipv6(std::net::Ipv6Addr::LOCALHOST)),
        ] {
            assert!(asks(resource, host.clone(), ChallengeCheck::Auto), "{resource}");
            assert!(!asks(resource, host.clone(), ChallengeCheck::On), "{resource}");
            assert!(!allowed(host.clone(), ChallengeCheck::Auto), "{resource}");
            assert!(allowed(host, ChallengeCheck::Off), "{resource}");
        }
        assert!(!asks("https://127.0.0.2", address(), ChallengeCheck::Auto));
        assert!(!asks("https://kv1.example", domain("kv1.example"), ChallengeCheck::Auto));
        assert!(allowed(domain("kv1.evil.example"), ChallengeCheck::Off));
    }
}
