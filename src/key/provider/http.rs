//! HTTPS for key services: one deadline for everything, bounded bodies, no surprises.
//!
//! - A [`Client`] lives for one session. Its connections, and the decrypted bytes in their
//!   buffers, end with it; the allocator zeroes what they leave.
//! - No proxy from the environment, no redirects, no cookies, no retries, no status turned into
//!   an error: the caller sees what was answered.
//! - TLS 1.2 and 1.3 with AES-128-GCM and ChaCha20-Poly1305 only. Both are offered everywhere,
//!   and so no AES-256 key schedule of a TLS library is ever in this process' memory: one that a
//!   memory scan finds after a cut-off is a volume's, and a defect.
//! - Trusted are the system's authorities and those of `ca_file`, read anew for each session.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::CipherSuite;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, TlsProvider};
use ureq::{Agent, http};

use super::secret_file::regular_file;
use super::{Class, ProviderError, ProviderResult};
use crate::crypto::secret::SecretString;
use crate::key::clock::BootTime;
use crate::key::reason::Reason;

/// More than any answer of a key service; a longer one is not read to its end.
const BODY_LIMIT: usize = 256 * 1024;

/// More than all the authorities of the world.
const CA_LIMIT: u64 = 16 * 1024 * 1024;

const CIPHER_SUITES: [CipherSuite; 6] = [
    CipherSuite::TLS13_AES_128_GCM_SHA256,
    CipherSuite::TLS13_CHACHA20_POLY1305_SHA256,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
];

/// Connections of one session.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    deadline: BootTime,
}

#[derive(Debug)]
pub(super) struct Request<'a> {
    pub method: http::Method,
    pub url: &'a str,
    /// Sent as `Authorization: Bearer`.
    pub bearer: Option<&'a SecretString>,
    pub headers: &'a [(&'a str, &'a str)],
    /// JSON, unless a header says otherwise; may hold a secret, and is zeroed when freed.
    pub body: Vec<u8>,
}

/// An answer, whatever its status. The body may hold a secret; it is zeroed when freed.
pub(super) struct Response {
    pub status: u16,
    pub headers: http::HeaderMap,
    pub body: Vec<u8>,
}

impl Client {
    pub(super) fn new(ca_file: Option<&Path>, deadline: BootTime) -> ProviderResult<Client> {
        let roots = trusted_roots(ca_file)?;
        let mut crypto = rustls::crypto::ring::default_provider();
        crypto.cipher_suites.retain(|suite| CIPHER_SUITES.contains(&suite.suite()));
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(Arc::new(crypto))
            .root_certs(RootCerts::from(roots))
            .build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .user_agent(concat!("byokfs/", env!("CARGO_PKG_VERSION")))
            .accept("application/json")
            .max_response_header_size(32 * 1024)
            .build()
            .new_agent();
        Ok(Client { agent, deadline })
    }

    /// The answer to `request`, complete, before the deadline.
    pub(super) fn send(&self, request: Request<'_>) -> ProviderResult<Response> {
        let left = self.deadline.remaining();
        if left.is_zero() {
            return Err(ProviderError::unreachable("no answer in time"));
        }
        let mut builder = http::Request::builder().method(request.method).uri(request.url);
        for &(name, value) in request.headers {
            builder = builder.header(name, value);
        }
        if let Some(bearer) = request.bearer {
            let value = http::HeaderValue::try_from(format!("Bearer {}", bearer.expose()));
            let mut value = value.map_err(|_| unsendable("the token"))?;
            value.set_sensitive(true);
            builder = builder.header(http::header::AUTHORIZATION, value);
        }
        let typed = |(name, _): &(&str, &str)| name.eq_ignore_ascii_case("content-type");
        if !request.body.is_empty() && !request.headers.iter().any(typed) {
            builder = builder.header(http::header::CONTENT_TYPE, "application/json");
        }
        let built = builder.body(request.body).map_err(|_| unsendable("the request"))?;
        let timed =
            self.agent.configure_request(built).timeout_global(Some(left.max(MIN_TIMEOUT))).build();
        let answer = self.agent.run(timed).map_err(|error| transport_error(&error))?;
        let (head, mut body) = answer.into_parts();
        let mut bytes = Vec::new();
        let mut reader = body.as_reader().take(BODY_LIMIT as u64 + 1);
        reader.read_to_end(&mut bytes).map_err(|error| io_error(&error))?;
        if bytes.len() > BODY_LIMIT {
            return Err(ProviderError::unreachable("the answer is too long"));
        }
        Ok(Response { status: head.status.as_u16(), headers: head.headers, body: bytes })
    }
}

/// Zero would mean "no timeout" to some of the layers below.
const MIN_TIMEOUT: Duration = Duration::from_millis(1);

impl Response {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// `Retry-After` in seconds; the form with a date is not used by key services.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        self.header("retry-after")?.trim().parse().ok().map(Duration::from_secs)
    }

    /// The server's clock, in seconds since the epoch.
    pub(super) fn date(&self) -> Option<i64> {
        use time::OffsetDateTime;
        use time::format_description::well_known::Rfc2822;
        let date = OffsetDateTime::parse(self.header("date")?, &Rfc2822).ok()?;
        Some(date.unix_timestamp())
    }
}

fn unsendable(what: &str) -> ProviderError {
    let class = Class::Denied(Reason::CredentialInvalid);
    ProviderError::new(class, format!("{what} holds characters that HTTP does not allow"))
}

fn trusted_roots(ca_file: Option<&Path>) -> ProviderResult<Vec<Certificate<'static>>> {
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        log::debug!("a system certificate is left out: {error}");
    }
    let mut roots: Vec<_> =
        system.certs.iter().map(|cert| Certificate::from_der(cert).to_owned()).collect();
    if let Some(path) = ca_file {
        roots.extend(read_ca_file(path).map_err(|why| {
            let class = Class::Transient(Reason::TlsUntrusted);
            ProviderError::new(class, format!("ca_file {}: {why}", path.display()))
        })?);
    }
    Ok(roots)
}

fn read_ca_file(path: &Path) -> Result<Vec<Certificate<'static>>, String> {
    let mut pem = Vec::new();
    let read = regular_file(path).and_then(|file| file.take(CA_LIMIT).read_to_end(&mut pem));
    read.map_err(|error| error.to_string())?;
    let mut certificates = Vec::new();
    for item in ureq::tls::parse_pem(&pem) {
        if let PemItem::Certificate(certificate) = item.map_err(|error| error.to_string())? {
            certificates.push(certificate);
        }
    }
    if certificates.is_empty() { Err("holds no certificate".into()) } else { Ok(certificates) }
}

/// Checks `ca_file` when the provider is made, so that a typing error is told at once.
pub(super) fn check_ca_file(path: Option<&PathBuf>) -> Result<(), String> {
    path.map_or(Ok(()), |path| {
        read_ca_file(path).map(drop).map_err(|why| format!("{}: {why}", path.display()))
    })
}

/// What a failure below HTTP means: never a word about the key.
fn transport_error(error: &ureq::Error) -> ProviderError {
    match error {
        ureq::Error::Io(error) => io_error(error),
        ureq::Error::Rustls(error) => tls_error(error),
        ureq::Error::Timeout(_) => ProviderError::unreachable("no answer in time"),
        ureq::Error::HostNotFound => {
            ProviderError::new(Class::Transient(Reason::VaultGone), "the host name has no address")
        }
        other => ProviderError::unreachable(other.to_string()),
    }
}

fn io_error(error: &std::io::Error) -> ProviderError {
    if let Some(inner) = error.get_ref() {
        if let Some(tls) = inner.downcast_ref::<rustls::Error>() {
            return tls_error(tls);
        }
        if let Some(inner) = inner.downcast_ref::<ureq::Error>() {
            return transport_error(inner);
        }
    }
    let text = error.to_string();
    // What getaddrinfo says of a name that does not exist (EAI_NONAME), as opposed to a resolver
    // that does not answer; std keeps only the text.
    if text.contains("Name or service not known") || text.contains("No address associated") {
        return ProviderError::new(Class::Transient(Reason::VaultGone), text);
    }
    if error.kind() == std::io::ErrorKind::TimedOut {
        return ProviderError::unreachable("no answer in time");
    }
    ProviderError::unreachable(text)
}

fn tls_error(error: &rustls::Error) -> ProviderError {
    let reason = match error {
        rustls::Error::InvalidCertificate(_)
        | rustls::Error::NoCertificatesPresented
        | rustls::Error::UnsupportedNameType
        | rustls::Error::InvalidCertRevocationList(_) => Reason::TlsUntrusted,
        _ => Reason::Unreachable,
    };
    ProviderError::new(Class::Transient(reason), format!("TLS: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_cipher_suite_has_an_aes_256_schedule() {
        let mut crypto = rustls::crypto::ring::default_provider();
        let before = crypto.cipher_suites.len();
        crypto.cipher_suites.retain(|suite| CIPHER_SUITES.contains(&suite.suite()));
        assert_eq!(crypto.cipher_suites.len(), CIPHER_SUITES.len());
        assert!(crypto.cipher_suites.len() < before);
        for suite in &crypto.cipher_suites {
            assert!(!format!("{:?}", suite.suite()).contains("AES_256"));
        }
    }

    #[test]
    fn a_passed_deadline_sends_nothing() {
        let client = Client::new(None, BootTime::now()).unwrap();
        let error = client.send(Request {
            method: http::Method::GET,
            url: "https://127.0.0.1:1/",
            bearer: None,
            headers: &[],
            body: Vec::new(),
        });
        assert_eq!(error.err().unwrap().class, Class::Transient(Reason::Unreachable));
    }

    #[test]
    fn a_bad_ca_file_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("ca.pem");
        assert!(check_ca_file(Some(&empty)).unwrap_err().contains("ca.pem"));
        std::fs::write(&empty, "no certificate here").unwrap();
        assert!(check_ca_file(Some(&empty)).unwrap_err().contains("no certificate"));
        let error = Client::new(Some(&empty), BootTime::now()).unwrap_err();
        assert_eq!(error.reason(), Reason::TlsUntrusted);
        assert!(check_ca_file(None).is_ok());
    }

    #[test]
    fn name_errors_are_told_from_resolver_errors() {
        let gone = std::io::Error::other(
            "failed to lookup address information: Name or service not known",
        );
        assert_eq!(io_error(&gone).reason(), Reason::VaultGone);
        let again = std::io::Error::other(
            "failed to lookup address information: Temporary failure in name resolution",
        );
        assert_eq!(io_error(&again).reason(), Reason::Unreachable);
    }
}
