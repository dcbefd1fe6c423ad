//! The vault's own certificate authority and the server's certificate.
//!
//! A client trusts `ca.pem`. The server's certificate is issued anew at every start and long before
//! it expires, for the names of [`super::host::Hosts`]; only the authority's key lasts, sealed in
//! the database.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SerialNumber,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration, OffsetDateTime};

use crate::crypto::random;
use crate::crypto::secret::SecretBytes;
use crate::error::{Error, Kind, Result};
use crate::sync::Mutex;

const CA_LIFETIME: Duration = Duration::days(3650);
/// [`ISSUED_IN_ADVANCE`] tolerates clocks that are behind.
const SERVER_LIFETIME: Duration = Duration::days(90);
const RENEWED_AFTER: Duration = Duration::days(30);
const ISSUED_IN_ADVANCE: Duration = Duration::hours(24);

/// A new authority: its certificate (PEM) and its private key (PKCS#8).
pub(crate) fn new_authority(vault_name: &str) -> Result<(String, SecretBytes)> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let params = authority_params(vault_name)?;
    let certificate = params.self_signed(&key).map_err(failed)?;
    Ok((certificate.pem(), SecretBytes::from_vec_wiping(key.serialize_der())?))
}

/// Issues the server's certificates for as long as it runs.
pub(crate) struct CertificateIssuer {
    vault_name: String,
    ca_pem: String,
    authority_key: SecretBytes,
    names: Vec<String>,
    issued: Mutex<OffsetDateTime>,
}

impl CertificateIssuer {
    pub(crate) fn new(
        vault_name: &str,
        ca_pem: &str,
        authority_key: SecretBytes,
        names: Vec<String>,
    ) -> CertificateIssuer {
        let (vault_name, ca_pem) = (vault_name.to_owned(), ca_pem.to_owned());
        let issued = Mutex::new(OffsetDateTime::UNIX_EPOCH);
        CertificateIssuer { vault_name, ca_pem, authority_key, names, issued }
    }

    /// With a new certificate.
    pub(crate) fn server_config(&self) -> Result<rustls::ServerConfig> {
        let names = self.names.clone();
        let config = server_config(&self.vault_name, &self.ca_pem, &self.authority_key, names)?;
        *self.issued.lock() = OffsetDateTime::now_utc();
        Ok(config)
    }

    pub(crate) fn is_renewal_due(&self) -> bool {
        is_due(*self.issued.lock(), OffsetDateTime::now_utc())
    }

    /// With a certificate that nobody trusts, for a drill.
    pub(crate) fn foreign_config(&self) -> Result<rustls::ServerConfig> {
        let (ca_pem, key) = new_authority("nobody")?;
        server_config("nobody", &ca_pem, &key, self.names.clone())
    }
}

/// Also when it was issued in what is the future now: a clock that was ahead has been set back, and
/// clients find the certificate not yet valid.
fn is_due(issued: OffsetDateTime, now: OffsetDateTime) -> bool {
    !(-ISSUED_IN_ADVANCE / 2..=RENEWED_AFTER).contains(&(now - issued))
}

/// The TLS configuration of a server with a fresh certificate for `names`.
fn server_config(
    vault_name: &str,
    ca_pem: &str,
    authority_key: &SecretBytes,
    names: Vec<String>,
) -> Result<rustls::ServerConfig> {
    let authority_key = KeyPair::from_pkcs8_der_and_sign_algo(
        &PrivatePkcs8KeyDer::from(authority_key.expose()),
        &PKCS_ECDSA_P256_SHA256,
    )
    .map_err(failed)?;
    let issuer = Issuer::new(authority_params(vault_name)?, authority_key);

    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = CertificateParams::new(names).map_err(failed)?;
    params.distinguished_name = distinguished_name(vault_name);
    params.serial_number = Some(serial_number()?);
    params.not_before = OffsetDateTime::now_utc() - ISSUED_IN_ADVANCE;
    params.not_after = OffsetDateTime::now_utc() + SERVER_LIFETIME;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &issuer).map_err(failed)?;

    let ca = pem_certificate(ca_pem)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .map_err(failed)?
    .with_no_client_auth()
    .with_single_cert(vec![certificate.der().clone(), ca], key)
    .map_err(failed)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn pem_certificate(pem: &str) -> Result<rustls::pki_types::CertificateDer<'static>> {
    use rustls::pki_types::pem::PemObject as _;
    rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| Error::corrupt("ca.pem is not a certificate").with_source(error))
}

/// Everything of the authority's certificate that its issued certificates must agree with is
/// derived from the vault's name.
fn authority_params(vault_name: &str) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, format!("byokfs vault {vault_name} authority"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial_number()?);
    params.not_before = OffsetDateTime::now_utc() - ISSUED_IN_ADVANCE;
    params.not_after = OffsetDateTime::now_utc() + CA_LIFETIME;
    Ok(params)
}

fn distinguished_name(vault_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, format!("byokfs vault {vault_name}"));
    name
}

fn serial_number() -> Result<SerialNumber> {
    let mut bytes: [u8; 16] = random::bytes()?;
    // Positive, and not shorter than it looks.
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(Kind::Io, "cannot make the vault's certificate").with_source(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_issues_certificates_for_addresses_and_names() {
        let (pem, key) = new_authority("kv1").unwrap();
        assert!(pem.starts_with("-----BEGIN CERTIFICATE-----"));
        let names = ["127.0.0.1", "::1", "localhost", "kv1.vault.localhost"];
        server_config("kv1", &pem, &key, names.map(String::from).to_vec()).unwrap();
    }

    #[test]
    fn damaged_material_is_an_error() {
        let (pem, key) = new_authority("kv1").unwrap();
        assert!(server_config("kv1", "nonsense", &key, vec!["localhost".into()]).is_err());
        let wrong = SecretBytes::from_vec_wiping(vec![1; 40]).unwrap();
        assert!(server_config("kv1", &pem, &wrong, vec!["localhost".into()]).is_err());
    }

    #[test]
    fn a_certificate_is_renewed_when_it_is_old() {
        let (pem, key) = new_authority("kv1").unwrap();
        let issuer = CertificateIssuer::new("kv1", &pem, key, vec!["localhost".into()]);
        assert!(issuer.is_renewal_due());
        issuer.server_config().unwrap();
        assert!(!issuer.is_renewal_due());
        *issuer.issued.lock() -= RENEWED_AFTER + Duration::seconds(1);
        assert!(issuer.is_renewal_due());
        issuer.foreign_config().unwrap();
    }

    #[test]
    fn a_certificate_of_a_clock_that_was_ahead_is_renewed() {
        let (pem, key) = new_authority("kv1").unwrap();
        let issuer = CertificateIssuer::new("kv1", &pem, key, vec!["localhost".into()]);
        issuer.server_config().unwrap();
        *issuer.issued.lock() += ISSUED_IN_ADVANCE;
        assert!(issuer.is_renewal_due());
    }
}
