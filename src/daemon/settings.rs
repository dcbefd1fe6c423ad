//! The configuration in the words of the layers below.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::config::{self, Config};
use crate::error::Result;
use crate::fuse;
use crate::key::provider::Provider;
use crate::key::{policy, provider, requirement, watcher};

/// Whoever is asked about that key, as the section says that is for it.
pub fn provider(config: &Config, kid: &str) -> Result<Arc<dyn Provider>> {
    provider::for_key(kid, &access(config.key_for(kid)))
}

fn access(config: &config::Key) -> provider::Settings {
    provider::Settings {
        identity: identity(config),
        ca_file: config.ca_file.clone(),
        verify_challenge_resource: match config.verify_challenge {
            config::VerifyChallenge::Auto => provider::ChallengeCheck::Auto,
            config::VerifyChallenge::On => provider::ChallengeCheck::On,
            config::VerifyChallenge::Off => provider::ChallengeCheck::Off,
        },
        pkcs11: provider::pkcs11::Settings {
            module: config.pkcs11_module.clone(),
            pin_file: config.pkcs11_pin_file.clone(),
            program: None,
        },
    }
}

fn identity(config: &config::Key) -> provider::Identity {
    use provider::Identity;
    let client_id = config.client_id.clone();
    let application = || provider::Application {
        tenant: config.tenant_id.clone(),
        client_id: config.client_id.clone(),
        authority: config.authority.clone(),
    };
    // The configuration is valid only with the file that its identity needs.
    let file = |file: &Option<PathBuf>| file.clone().unwrap_or_default();
    match config.identity {
        config::Identity::AppService => Identity::AppService(provider::AppService {
            endpoint: config.identity_endpoint.clone(),
            header_file: config.identity_header_file.clone(),
            client_id,
        }),
        config::Identity::Imds => {
            let endpoint = config.identity_endpoint.clone();
            Identity::Imds(provider::Imds { endpoint, client_id })
        }
        config::Identity::WorkloadIdentity => {
            Identity::WorkloadIdentity(application(), config.federated_token_file.clone())
        }
        config::Identity::ClientSecret => {
            Identity::ClientSecret(application(), file(&config.client_secret_file))
        }
        config::Identity::ClientCertificate => {
            Identity::ClientCertificate(application(), file(&config.client_certificate_file))
        }
    }
}

/// What that key must be; `tolerant` as the volume was made.
pub fn requirements(config: &Config, kid: &str, tolerant: bool) -> requirement::Settings {
    let key = config.key_for(kid);
    requirement::Settings {
        strict: key.strict_requirements,
        tolerant,
        region: key.region.clone(),
        tenant: key.tenant_id.clone(),
        on_expired: on_expired(config),
    }
}

fn on_expired(config: &Config) -> policy::OnExpired {
    match config.watcher.on_expired {
        config::OnExpired::Inaccessible => policy::OnExpired::Inaccessible,
        config::OnExpired::Warn => policy::OnExpired::Warn,
    }
}

/// A newer version of a key that could not be followed is tried again, several times an hour.
const FOLLOW_AGAIN: Duration = Duration::from_secs(10 * 60);

pub fn watcher(config: &Config) -> watcher::Settings {
    let from = &config.watcher;
    watcher::Settings {
        interval: from.interval,
        deadline: from.deadline,
        shut_within: config.cut_off_lead(),
        follow_again: FOLLOW_AGAIN,
        policy: policy::Settings {
            confirm_after: from.confirm_after,
            confirm_within: from.confirm_within,
            max_staleness: from.max_staleness,
            cut_off_lead: config.cut_off_lead(),
            on_expired: on_expired(config),
            auto_heal_window: from.auto_heal_window,
        },
    }
}

pub fn errno(config: &config::Mount) -> fuse::CutOffErrno {
    match config.errno {
        config::CutOffErrno::Eio => fuse::CutOffErrno::Eio,
        config::CutOffErrno::Key => fuse::CutOffErrno::Key,
    }
}

pub fn transport(config: &config::Mount) -> fuse::Transport {
    match config.transport {
        config::Transport::Auto => fuse::Transport::Auto,
        config::Transport::Dev => fuse::Transport::Dev,
        config::Transport::Uring => fuse::Transport::Uring,
    }
}
