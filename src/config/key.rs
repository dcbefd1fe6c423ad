//! `[key]`: how to reach the key service, as whom, and what its key must be.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::units::{optional_path, optional_text};

/// How to reach the key service and as whom; which key it is, the volume says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Key {
    pub identity: Identity,
    /// None: the environment's IDENTITY_ENDPOINT.
    #[serde(with = "optional_text")]
    pub identity_endpoint: Option<String>,
    /// None: the environment's IDENTITY_HEADER.
    #[serde(with = "optional_path")]
    pub identity_header_file: Option<PathBuf>,
    /// Of a user-assigned identity; None: the system-assigned one.
    #[serde(with = "optional_text")]
    pub client_id: Option<String>,
    /// The directory that the key service must trust; None: whichever the identity is of.
    #[serde(with = "optional_text")]
    pub tenant_id: Option<String>,
    /// Extra trusted certificates (PEM); None: the system's store alone.
    #[serde(with = "optional_path")]
    pub ca_file: Option<PathBuf>,
    pub verify_challenge: VerifyChallenge,
    /// Where the key must be; None: anywhere.
    #[serde(with = "optional_text")]
    pub region: Option<String>,
    /// What the requirement check only warns of refuses the key too.
    pub strict_requirements: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Identity {
    /// A managed identity over the App Service style endpoint.
    #[default]
    AppService,
}

/// Whether a vault is given a token only for the domain that it lies in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifyChallenge {
    /// On, but for an address or a host name without a domain.
    #[default]
    Auto,
    On,
    Off,
}
