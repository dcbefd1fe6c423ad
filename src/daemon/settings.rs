//! The configuration in the words of the layers below.

use crate::config::{self, Config};
use crate::fuse;
use crate::key::{policy, provider, requirement, watcher};

pub fn provider(config: &config::Key) -> provider::Settings {
    let identity = match config.identity {
        config::Identity::AppService => provider::Identity::AppService(provider::AppService {
            endpoint: config.identity_endpoint.clone(),
            header_file: config.identity_header_file.clone(),
            client_id: config.client_id.clone(),
        }),
    };
    provider::Settings {
        identity,
        ca_file: config.ca_file.clone(),
        verify_challenge_resource: match config.verify_challenge {
            config::VerifyChallenge::Auto => provider::ChallengeCheck::Auto,
            config::VerifyChallenge::On => provider::ChallengeCheck::On,
            config::VerifyChallenge::Off => provider::ChallengeCheck::Off,
        },
    }
}

/// What a key must be; `tolerant` as the volume was made.
pub fn requirements(config: &Config, tolerant: bool) -> requirement::Settings {
    requirement::Settings {
        strict: config.key.strict_requirements,
        tolerant,
        region: config.key.region.clone(),
        tenant: config.key.tenant_id.clone(),
        on_expired: on_expired(config),
    }
}

fn on_expired(config: &Config) -> policy::OnExpired {
    match config.watcher.on_expired {
        config::OnExpired::Inaccessible => policy::OnExpired::Inaccessible,
        config::OnExpired::Warn => policy::OnExpired::Warn,
    }
}

pub fn watcher(config: &Config) -> watcher::Settings {
    let from = &config.watcher;
    watcher::Settings {
        interval: from.interval,
        deadline: from.deadline,
        shut_within: config.cut_off_lead(),
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
