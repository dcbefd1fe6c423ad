//! The administrator's client: a token from the identity endpoint, then calls over TLS that trust
//! nothing but the vault's own authority.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::http::{Method, Request, Response};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};
use url::Url;

use crate::crypto::secret::SecretString;
use crate::error::{Context, Error, Kind, Result};
use crate::vault::{API_VERSION, VaultDir};

/// Making a large RSA key takes seconds.
const TIMEOUT: Duration = Duration::from_secs(60);
const MAX_REPLY: u64 = 16 * 1024 * 1024;
const FAULTS_PATH: &str = "/byokfs/faults";

/// What reaches the vault's identity endpoint as the administrator.
pub(super) struct Administration {
    dir: VaultDir,
    agent: Agent,
    identity_url: String,
    header: SecretString,
}

pub(super) struct Client {
    dir: VaultDir,
    agent: Agent,
    url: String,
    token: SecretString,
}

impl Administration {
    /// `Unreachable` when no server runs on the directory.
    pub(super) fn connect(dir: VaultDir) -> Result<Administration> {
        let header = VaultDir::read_header(&dir.admin_header())?;
        let identity_url = dir.read_url(&dir.identity_url_file())?;
        let ca_path = dir.ca_certificate();
        let pem =
            std::fs::read(&ca_path).context(|| format!("cannot read {}", ca_path.display()))?;
        let ca = Certificate::from_pem(&pem).map_err(|error| {
            Error::corrupt(format!("{} is not a certificate", ca_path.display())).with_source(error)
        })?;
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .root_certs(RootCerts::new_with_certs(&[ca]))
            .build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .timeout_global(Some(TIMEOUT))
            .max_redirects(0)
            // The vault is here: a proxy of the environment has no part in it.
            .proxy(None)
            .build()
            .new_agent();
        Ok(Administration { dir, agent, identity_url, header })
    }

    /// Faults are set where no fault reaches: at the identity endpoint.
    pub(super) fn faults(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value> {
        let mut url = parse_url(&self.identity_url)?;
        url.set_path(&format!("{FAULTS_PATH}{path}"));
        self.call(method, &url, body)
    }

    fn call(&self, method: Method, url: &Url, body: Option<&Value>) -> Result<Value> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(url.as_str())
            .header("X-IDENTITY-HEADER", self.header.expose())
            .body(body)
            .map_err(|error| unusable(url.as_str()).with_source(error))?;
        let response = self
            .agent
            .run(request)
            .map_err(|error| unreachable(&self.dir, &self.identity_url, error))?;
        read(response, &self.identity_url)
    }
}

impl Client {
    /// `Unreachable` when no server runs on the directory.
    pub(super) fn connect(dir: VaultDir) -> Result<Client> {
        let url = dir.read_url(&dir.url_file())?;
        let administration = Administration::connect(dir)?;
        let mut ask = parse_url(&administration.identity_url)?;
        // The audience of a vault under an address is its own origin.
        ask.query_pairs_mut()
            .append_pair("api-version", "2019-08-01")
            .append_pair("resource", &url);
        let token = match administration.call(Method::GET, &ask, None)? {
            Value::Object(mut fields) => fields.remove("access_token"),
            _ => None,
        };
        let Some(Value::String(token)) = token else {
            return Err(super::unexpected("access_token"));
        };
        let Administration { dir, agent, .. } = administration;
        Ok(Client { dir, agent, url, token: SecretString::from_string_wiping(token)? })
    }

    pub(super) fn get(&self, path: &str) -> Result<Value> {
        self.call(Method::GET, &self.data_plane(path), None)
    }

    pub(super) fn put(&self, path: &str, body: &Value) -> Result<Value> {
        self.call(Method::PUT, &self.data_plane(path), Some(body))
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.call(Method::POST, &self.data_plane(path), Some(body))
    }

    pub(super) fn patch(&self, path: &str, body: &Value) -> Result<Value> {
        self.call(Method::PATCH, &self.data_plane(path), Some(body))
    }

    pub(super) fn delete(&self, path: &str) -> Result<Value> {
        self.call(Method::DELETE, &self.data_plane(path), None)
    }

    /// Every item of a list, page by page.
    pub(super) fn list(&self, path: &str) -> Result<Vec<Value>> {
        let mut items = Vec::new();
        let mut next = Some(self.data_plane(path));
        while let Some(url) = next {
            // The token goes to this vault only.
            if !url.starts_with(&format!("{}/", self.url)) {
                return Err(Error::new(Kind::Denied, "the vault's next page is somewhere else"));
            }
            let mut page = self.call(Method::GET, &url, None)?;
            match page["value"].take() {
                Value::Array(values) => items.extend(values),
                _ => return Err(super::unexpected("value")),
            }
            next = page["nextLink"].as_str().map(str::to_owned);
        }
        Ok(items)
    }

    /// The management routes, which have no api-version.
    pub(super) fn administer(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value> {
        self.call(method, &format!("{}/byokfs{path}", self.url), body)
    }

    pub(super) fn identity_endpoint(&self) -> Result<String> {
        self.dir.read_url(&self.dir.identity_url_file())
    }

    pub(super) fn dir(&self) -> &VaultDir {
        &self.dir
    }

    fn data_plane(&self, path: &str) -> String {
        format!("{}{path}?api-version={API_VERSION}", self.url)
    }

    fn call(&self, method: Method, url: &str, body: Option<&Value>) -> Result<Value> {
        let request = Request::builder()
            .method(method)
            .uri(url)
            .header("authorization", format!("Bearer {}", self.token.expose()))
            .header("accept", "application/json");
        let request = match body {
            Some(body) => request.header("content-type", "application/json").body(body.to_string()),
            None => request.body(String::new()),
        }
        .map_err(|error| unusable(url).with_source(error))?;
        let response =
            self.agent.run(request).map_err(|error| unreachable(&self.dir, &self.url, error))?;
        read(response, url)
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("url", &self.url).finish_non_exhaustive()
    }
}

/// The JSON of a success; null for no content.
fn read(mut response: Response<ureq::Body>, url: &str) -> Result<Value> {
    let status = response.status();
    let text =
        response.body_mut().with_config().limit(MAX_REPLY).read_to_string().map_err(|error| {
            Error::new(Kind::Unreachable, format!("cannot read the answer of {url}"))
                .with_source(error)
        })?;
    let value: Value = if text.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(&text).map_err(|_| {
            Error::new(
                Kind::Unreachable,
                format!("{url} does not answer in JSON: is it the vault?"),
            )
        })?
    };
    if status.is_success() {
        return Ok(value);
    }
    let said = value["error"]["message"]
        .as_str()
        .or_else(|| value["error_description"].as_str())
        .unwrap_or("no reason given");
    let kind = match status.as_u16() {
        400 | 413 => Kind::Usage,
        408 | 429 | 500.. => Kind::Unreachable,
        _ => Kind::Denied,
    };
    Err(Error::new(kind, format!("the vault says no ({}): {}", status.as_u16(), one_line(said))))
}

/// The service breaks some of its messages into lines.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn parse_url(text: &str) -> Result<Url> {
    Url::parse(text).map_err(|error| unusable(text).with_source(error))
}

fn unusable(url: &str) -> Error {
    Error::corrupt(format!("'{url}' is no usable URL"))
}

fn unreachable(dir: &VaultDir, url: &str, error: ureq::Error) -> Error {
    Error::new(
        Kind::Unreachable,
        format!(
            "the vault does not answer at {url}; is `byokfs vault serve {}` running?",
            dir.path().display()
        ),
    )
    .with_source(error)
}
