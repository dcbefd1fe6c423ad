//! `[key]`: how to reach the key service, as whom, and what its key must be.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::units::{optional_path, optional_text};

/// How to reach the key service and as whom; which key it is, the volume says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Key {
    pub identity: Identity,
    /// Of a managed identity. None: the environment's IDENTITY_ENDPOINT, or the machine's metadata
    /// service.
    #[serde(with = "optional_text")]
    pub identity_endpoint: Option<String>,
    /// None: the environment's IDENTITY_HEADER.
    #[serde(with = "optional_path")]
    pub identity_header_file: Option<PathBuf>,
    /// Of an application, or of a user-assigned identity; None: the system-assigned one.
    #[serde(with = "optional_text")]
    pub client_id: Option<String>,
    /// The directory of an application, and the one that the key service must trust; None:
    /// whichever the identity is of.
    #[serde(with = "optional_text")]
    pub tenant_id: Option<String>,
    /// Where an application gets its tokens. None: the environment's AZURE_AUTHORITY_HOST, or the
    /// public cloud.
    #[serde(with = "optional_text")]
    pub authority: Option<String>,
    #[serde(with = "optional_path")]
    pub client_secret_file: Option<PathBuf>,
    /// PEM: the certificate and its private key.
    #[serde(with = "optional_path")]
    pub client_certificate_file: Option<PathBuf>,
    /// None: the environment's AZURE_FEDERATED_TOKEN_FILE.
    #[serde(with = "optional_path")]
    pub federated_token_file: Option<PathBuf>,
    /// Extra trusted certificates (PEM); None: the system's store alone.
    #[serde(with = "optional_path")]
    pub ca_file: Option<PathBuf>,
    pub verify_challenge: VerifyChallenge,
    /// Where the key must be; None: anywhere.
    #[serde(with = "optional_text")]
    pub region: Option<String>,
    /// What the requirement check only warns of refuses the key too.
    pub strict_requirements: bool,
    /// The shared library of a hardware security module.
    #[serde(with = "optional_path")]
    pub pkcs11_module: Option<PathBuf>,
    /// None: the token asks for none.
    #[serde(with = "optional_path")]
    pub pkcs11_pin_file: Option<PathBuf>,
}

impl Key {
    /// Every file that is named here, by its key.
    pub fn files(&self) -> [(&'static str, Option<&Path>); 7] {
        [
            ("identity_header_file", self.identity_header_file.as_deref()),
            ("client_secret_file", self.client_secret_file.as_deref()),
            ("client_certificate_file", self.client_certificate_file.as_deref()),
            ("federated_token_file", self.federated_token_file.as_deref()),
            ("ca_file", self.ca_file.as_deref()),
            ("pkcs11_module", self.pkcs11_module.as_deref()),
            ("pkcs11_pin_file", self.pkcs11_pin_file.as_deref()),
        ]
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Identity {
    /// A managed identity over the App Service style endpoint.
    #[default]
    AppService,
    /// A managed identity over the metadata service of a virtual machine.
    Imds,
    /// An application that shows a token of another issuer.
    WorkloadIdentity,
    ClientSecret,
    ClientCertificate,
}

/// Whether a vault is given a token only for the domain that it lies in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifyChallenge {
    /// On; an address, or a host name without a domain, only for itself.
    #[default]
    Auto,
    On,
    Off,
}
