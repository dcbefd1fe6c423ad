//! How each kind of identity gets a token: the requests, and the secrets that they need.
//!
//! A secret's file is read when the configuration is checked, so that a mistake is told at once,
//! and then for each token, so that a renewed secret counts without a mount.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ureq::http::Method;
use url::form_urlencoded;
use url::{Host, Url};

use super::azure_assertion::assertion;
use super::azure_token::{self, Token};
use super::http::{Client, Request};
use super::identity::{AppService, Application, Identity, Imds};
use super::secret_file::SecretFile;
use super::{Class, ProviderError, ProviderResult};
use crate::crypto::secret::SecretString;
use crate::error::{Error, Kind, Result};
use crate::key::reason::Reason;

const APP_SERVICE_VERSION: &str = "2019-08-01";
const IMDS_VERSION: &str = "2018-02-01";
const IMDS_HOST: &str = "http://169.254.169.254";
const IMDS_PATH: &str = "/metadata/identity/oauth2/token";
const PUBLIC_CLOUD: &str = "https://login.microsoftonline.com";
const JWT_BEARER: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";
const FORM: (&str, &str) = ("Content-Type", "application/x-www-form-urlencoded");

pub(super) enum Credential {
    AppService { endpoint: Url, header: Header, client_id: Option<String> },
    Imds { endpoint: Url, client_id: Option<String> },
    Application { endpoint: Url, client_id: String, proof: Proof },
}

/// Where the secret header of App Service comes from.
pub(super) enum Header {
    File(SecretFile),
    Environment(Arc<SecretString>),
}

/// What an application shows to be itself.
pub(super) enum Proof {
    Secret(SecretFile),
    Certificate(SecretFile),
    Federated(SecretFile),
}

impl Credential {
    pub(super) fn new(identity: &Identity) -> Result<Credential> {
        match identity {
            Identity::AppService(settings) => app_service(settings),
            Identity::Imds(settings) => imds(settings),
            Identity::ClientSecret(settings, file) => {
                application(settings, Proof::Secret(SecretFile::private(SECRET_KEY, file)?))
            }
            Identity::ClientCertificate(settings, file) => {
                let file = SecretFile::private(CERTIFICATE_KEY, file)?;
                application(settings, Proof::Certificate(file))
            }
            Identity::WorkloadIdentity(settings, file) => {
                let file = match set(file.as_ref()) {
                    Some(file) => file.clone(),
                    None => variable("AZURE_FEDERATED_TOKEN_FILE", "federated_token_file")?.into(),
                };
                application(settings, Proof::Federated(SecretFile::any(FEDERATED_KEY, &file)?))
            }
        }
    }

    /// A new token for `resource`.
    pub(super) fn fetch(&self, client: &Client, resource: &str) -> ProviderResult<Token> {
        let response = match self {
            Credential::AppService { endpoint, header, client_id } => {
                let url = managed(endpoint, APP_SERVICE_VERSION, resource, client_id.as_deref());
                let secret = match header {
                    Header::Environment(secret) => Arc::clone(secret),
                    Header::File(file) => file.get(),
                };
                client.send(get(&url, &[("X-IDENTITY-HEADER", secret.expose())]))?
            }
            Credential::Imds { endpoint, client_id } => {
                let url = managed(endpoint, IMDS_VERSION, resource, client_id.as_deref());
                client.send(get(&url, &[("Metadata", "true")]))?
            }
            Credential::Application { endpoint, client_id, proof } => {
                let body = proof.form(endpoint, client_id, resource).map_err(unusable)?;
                client.send(Request {
                    method: Method::POST,
                    url: endpoint.as_str(),
                    bearer: None,
                    headers: &[FORM],
                    body,
                })?
            }
        };
        azure_token::read(&response)
    }

    /// What is being done while a token is fetched, for messages.
    pub(super) fn errand(&self) -> &'static str {
        match self {
            Credential::AppService { .. } | Credential::Imds { .. } => {
                "asking the managed identity for a token"
            }
            Credential::Application { .. } => "asking the directory for a token",
        }
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, endpoint) = match self {
            Credential::AppService { endpoint, .. } => ("AppService", endpoint),
            Credential::Imds { endpoint, .. } => ("Imds", endpoint),
            Credential::Application { endpoint, .. } => ("Application", endpoint),
        };
        f.debug_struct(kind).field("endpoint", &endpoint.as_str()).finish_non_exhaustive()
    }
}

impl Proof {
    /// The request's body. It holds a secret, and is zeroed when freed.
    fn form(&self, endpoint: &Url, client_id: &str, resource: &str) -> Result<Vec<u8>> {
        let mut form = form_urlencoded::Serializer::new(String::with_capacity(4096));
        form.append_pair("grant_type", "client_credentials");
        form.append_pair("client_id", client_id);
        form.append_pair("scope", &format!("{}/.default", resource.trim_end_matches('/')));
        match self {
            Proof::Secret(file) => {
                form.append_pair("client_secret", file.get().expose());
            }
            Proof::Certificate(file) => {
                let jwt = assertion(&file.get(), client_id, endpoint.as_str())
                    .map_err(|why| config(format!("{}: {why}", file.name())))?;
                form.append_pair("client_assertion_type", JWT_BEARER);
                form.append_pair("client_assertion", jwt.expose());
            }
            Proof::Federated(file) => {
                form.append_pair("client_assertion_type", JWT_BEARER);
                form.append_pair("client_assertion", file.get().expose());
            }
        }
        Ok(form.finish().into_bytes())
    }
}

const SECRET_KEY: &str = "client_secret_file";
const CERTIFICATE_KEY: &str = "client_certificate_file";
const FEDERATED_KEY: &str = "federated_token_file";

fn get<'a>(url: &'a Url, headers: &'a [(&'a str, &'a str)]) -> Request<'a> {
    Request { method: Method::GET, url: url.as_str(), bearer: None, headers, body: Vec::new() }
}

/// The request of a managed identity.
fn managed(endpoint: &Url, version: &str, resource: &str, client_id: Option<&str>) -> Url {
    let mut url = endpoint.clone();
    let mut query = url.query_pairs_mut();
    query.append_pair("api-version", version);
    query.append_pair("resource", resource);
    if let Some(id) = client_id {
        query.append_pair("client_id", id);
    }
    drop(query);
    url
}

/// A secret that cannot be read while the volume serves.
fn unusable(error: Error) -> ProviderError {
    ProviderError::new(Class::Transient(Reason::CredentialInvalid), error.to_string())
}

fn app_service(settings: &AppService) -> Result<Credential> {
    let text = match set(settings.endpoint.as_ref()) {
        Some(endpoint) => endpoint.clone(),
        None => variable("IDENTITY_ENDPOINT", "identity_endpoint")?,
    };
    let header = match &settings.header_file {
        Some(path) => Header::File(SecretFile::private("identity_header_file", path)?),
        None => {
            let header = variable("IDENTITY_HEADER", "identity_header_file")?;
            Header::Environment(SecretString::from_string_wiping(header)?.into())
        }
    };
    let endpoint = private_url("identity_endpoint", &text)?;
    Ok(Credential::AppService { endpoint, header, client_id: set(settings.client_id.clone()) })
}

fn imds(settings: &Imds) -> Result<Credential> {
    let host = std::env::var("AZURE_POD_IDENTITY_AUTHORITY_HOST").ok();
    let text = match (set(settings.endpoint.clone()), set(host)) {
        (Some(endpoint), _) => endpoint,
        (None, host) => {
            let host = host.unwrap_or_else(|| IMDS_HOST.into());
            format!("{}{IMDS_PATH}", host.trim_end_matches('/'))
        }
    };
    let endpoint = private_url("identity_endpoint", &text)?;
    Ok(Credential::Imds { endpoint, client_id: set(settings.client_id.clone()) })
}

fn application(settings: &Application, proof: Proof) -> Result<Credential> {
    let or_variable = |value: &Option<String>, name, key| match set(value.as_ref()) {
        Some(value) => Ok(value.clone()),
        None => variable(name, key),
    };
    let tenant = or_variable(&settings.tenant, "AZURE_TENANT_ID", "tenant_id")?;
    let client_id = or_variable(&settings.client_id, "AZURE_CLIENT_ID", "client_id")?;
    let authority = set(settings.authority.clone());
    let authority = authority.or_else(|| set(std::env::var("AZURE_AUTHORITY_HOST").ok()));
    let authority = authority.unwrap_or_else(|| PUBLIC_CLOUD.into());
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if !tenant.bytes().all(plain) {
        return Err(config(format!("tenant_id \"{tenant}\" is neither an id nor a domain")));
    }
    let text = format!("{}/{tenant}/oauth2/v2.0/token", authority.trim_end_matches('/'));
    let endpoint = private_url("authority", &text)?;
    // Tried, to tell a mistake at once.
    proof.form(&endpoint, &client_id, "").map(drop)?;
    Ok(Credential::Application { endpoint, client_id, proof })
}

/// "" is not set.
fn set<T: AsRef<std::ffi::OsStr>>(value: Option<T>) -> Option<T> {
    value.filter(|value| !value.as_ref().is_empty())
}

fn variable(name: &str, key: &str) -> Result<String> {
    set(std::env::var(name).ok())
        .ok_or_else(|| config(format!("{key} is not set, and {name} is not in the environment")))
}

/// Secrets and tokens travel as they are: not over a network without TLS.
fn private_url(key: &str, text: &str) -> Result<Url> {
    let url = Url::parse(text).map_err(|why| config(format!("{key} {text}: {why}")))?;
    let local = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback() || address.is_link_local(),
        Some(Host::Ipv6(address)) => IpAddr::V6(address).is_loopback(),
        None => false,
    };
    if url.scheme() == "https" || url.scheme() == "http" && local {
        Ok(url)
    } else {
        Err(config(format!("{key} {text}: must be https, or http on this machine")))
    }
}

fn config(message: impl Into<String>) -> Error {
    Error::new(Kind::Config, message)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn endpoints_must_be_local_or_https() {
        let parse = |text: &str| private_url("authority", text);
        for good in ["http://127.0.0.1:41/msi/token", "http://169.254.130.2:8081/x", "https://x.y/"]
        {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in ["http://10.0.0.1/x", "http://example.org/", "ftp://127.0.0.1/", "nonsense"] {
            assert_eq!(parse(bad).unwrap_err().kind, Kind::Config, "{bad}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        let message = |settings: Application| {
            let identity = Identity::ClientSecret(settings, file.clone());
            Credential::new(&identity).unwrap_err().to_string()
        };
        let missing = message(Application::default());
        assert!(missing.contains("client_secret_file") && missing.contains("secret"), "{missing}");
        std::fs::write(&file, "s").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
        let tenant = Some("72f9-ab".to_owned());
        assert!(message(Application { tenant, ..Application::default() }).contains("client_id"));
        let (tenant, client_id) = (Some("../x".to_owned()), Some("app-1".to_owned()));
        let bad = Application { tenant, client_id, authority: None };
        assert!(message(bad).contains("neither an id nor a domain"));
    }
}
