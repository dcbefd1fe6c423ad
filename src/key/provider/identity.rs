//! Who asks the key service: what the configuration says of it. Secrets are named by their files.

use std::path::PathBuf;

#[derive(Clone, Debug)]
pub enum Identity {
    /// Managed identity over an App Service style endpoint.
    AppService(AppService),
    /// Managed identity over the instance metadata service of a virtual machine.
    Imds(Imds),
    /// An application with a secret.
    ClientSecret(Application, PathBuf),
    /// An application with a certificate: a PEM file with it and its RSA key.
    ClientCertificate(Application, PathBuf),
    /// An application that trusts the tokens of another issuer, as of Kubernetes. None: the
    /// environment's AZURE_FEDERATED_TOKEN_FILE.
    WorkloadIdentity(Application, Option<PathBuf>),
}

impl Default for Identity {
    fn default() -> Identity {
        Identity::AppService(AppService::default())
    }
}

#[derive(Clone, Debug, Default)]
pub struct AppService {
    /// None: the environment's IDENTITY_ENDPOINT.
    pub endpoint: Option<String>,
    /// A file that holds the header's secret and only its owner may read. None: the environment's
    /// IDENTITY_HEADER.
    pub header_file: Option<PathBuf>,
    /// Of a user-assigned identity.
    pub client_id: Option<String>,
}

#[derive(Clone, Debug, Default)]
pub struct Imds {
    /// None: 169.254.169.254.
    pub endpoint: Option<String>,
    /// Of a user-assigned identity.
    pub client_id: Option<String>,
}

/// An application registered in a directory. Without a value the environment's AZURE_TENANT_ID,
/// AZURE_CLIENT_ID and AZURE_AUTHORITY_HOST are taken, and the public cloud's authority.
#[derive(Clone, Debug, Default)]
pub struct Application {
    pub tenant: Option<String>,
    pub client_id: Option<String>,
    pub authority: Option<String>,
}
