//! Why a key is lost, as status, audit log and policy name it.
//!
//! The names are stable: they appear in `byokfs status --json`, in audit events and in runbooks.

use std::fmt;

use crate::error::CutOff;

/// The cause of an Inaccessible or Degraded volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Not opened since the daemon started.
    NotOpened,
    /// The volume lies elsewhere than where it was opened last, or names another key version.
    NotConfirmed,
    /// The key is disabled.
    KeyDisabled,
    /// The key is past its expiry date.
    KeyExpired,
    /// The key's activation date is in the future.
    KeyNotYetValid,
    /// The key was deleted and may be recoverable.
    KeyDeleted,
    /// The key, or the version the volume needs, does not exist: purged, or never there.
    KeyNotFound,
    /// The identity may no longer get, list, wrap or unwrap with the key.
    PermissionRevoked,
    /// The key service refuses this machine's address.
    NetworkDenied,
    /// The identity does not exist any more, or is disabled.
    IdentityGone,
    /// The identity's own secret is wrong or expired, or its directory is gone.
    CredentialInvalid,
    /// The key service does not accept the identity's token: audience, issuer or tenant.
    TokenRefused,
    /// The service does not take the wrapped key for this key: the envelope was changed or
    /// belongs to another key.
    WrongKeyOrCorruptEnvelope,
    /// The key unwraps to other bytes than it did when the volume was made.
    KeyMaterialMismatch,
    /// The server's certificate is not trusted.
    TlsUntrusted,
    /// Something between here and the key service answers in its place.
    ProxyDenied,
    /// The key service's name does not exist (any more).
    VaultGone,
    /// The key could not be checked for too long.
    Unreachable,
    /// An administrator cut the key off by hand.
    Operator,
}

impl Reason {
    pub const ALL: [Reason; 19] = [
        Reason::NotOpened,
        Reason::NotConfirmed,
        Reason::KeyDisabled,
        Reason::KeyExpired,
        Reason::KeyNotYetValid,
        Reason::KeyDeleted,
        Reason::KeyNotFound,
        Reason::PermissionRevoked,
        Reason::NetworkDenied,
        Reason::IdentityGone,
        Reason::CredentialInvalid,
        Reason::TokenRefused,
        Reason::WrongKeyOrCorruptEnvelope,
        Reason::KeyMaterialMismatch,
        Reason::TlsUntrusted,
        Reason::ProxyDenied,
        Reason::VaultGone,
        Reason::Unreachable,
        Reason::Operator,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Reason::NotOpened => "NotOpened",
            Reason::NotConfirmed => "NotConfirmed",
            Reason::KeyDisabled => "KeyDisabled",
            Reason::KeyExpired => "KeyExpired",
            Reason::KeyNotYetValid => "KeyNotYetValid",
            Reason::KeyDeleted => "KeyDeleted",
            Reason::KeyNotFound => "KeyNotFound",
            Reason::PermissionRevoked => "PermissionRevoked",
            Reason::NetworkDenied => "NetworkDenied",
            Reason::IdentityGone => "IdentityGone",
            Reason::CredentialInvalid => "CredentialInvalid",
            Reason::TokenRefused => "TokenRefused",
            Reason::WrongKeyOrCorruptEnvelope => "WrongKeyOrCorruptEnvelope",
            Reason::KeyMaterialMismatch => "KeyMaterialMismatch",
            Reason::TlsUntrusted => "TlsUntrusted",
            Reason::ProxyDenied => "ProxyDenied",
            Reason::VaultGone => "VaultGone",
            Reason::Unreachable => "Unreachable",
            Reason::Operator => "Operator",
        }
    }

    pub fn from_name(name: &str) -> Option<Reason> {
        Reason::ALL.into_iter().find(|reason| reason.name() == name)
    }

    /// What happened, for a person; goes after "the volume is Inaccessible: ".
    pub const fn describe(self) -> &'static str {
        match self {
            Reason::NotOpened => "its key has not been obtained yet",
            Reason::NotConfirmed => {
                "it is a copy, was moved here, or names another key version than the last time; \
                 confirm it with `byokfs revalidate`"
            }
            Reason::KeyDisabled => "the key is disabled; enable it",
            Reason::KeyExpired => "the key has expired; extend or remove its expiry date",
            Reason::KeyNotYetValid => "the key's activation date is in the future; change it",
            Reason::KeyDeleted => "the key was deleted; recover it",
            Reason::KeyNotFound => {
                "the key service has no such key or version; recover it, or restore its backup"
            }
            Reason::PermissionRevoked => {
                "the identity lacks a permission on the key; grant get, list, wrapKey and unwrapKey"
            }
            Reason::NetworkDenied => {
                "the key service refuses this machine's address; check its network rules"
            }
            Reason::IdentityGone => "the identity does not exist any more; assign it again",
            Reason::CredentialInvalid => "the identity's secret is wrong or expired; renew it",
            Reason::TokenRefused => {
                "the key service refuses the identity's token; check tenant and identity"
            }
            Reason::WrongKeyOrCorruptEnvelope => {
                "the key service cannot unwrap the volume's envelope with this key"
            }
            Reason::KeyMaterialMismatch => "the key unwraps to other key material than recorded",
            Reason::TlsUntrusted => {
                "the key service's certificate is not trusted; check ca_file, and who answers there"
            }
            Reason::ProxyDenied => "a proxy answers in the key service's place",
            Reason::VaultGone => "the key service's name does not exist; recover the vault",
            Reason::Unreachable => "the key could not be checked for too long",
            Reason::Operator => "an administrator cut it off",
        }
    }

    /// The errno class that file-system operations answer with meanwhile.
    pub const fn cut_off(self) -> CutOff {
        match self {
            Reason::KeyExpired | Reason::KeyNotYetValid => CutOff::Expired,
            Reason::NotOpened
            | Reason::NotConfirmed
            | Reason::TlsUntrusted
            | Reason::ProxyDenied
            | Reason::VaultGone
            | Reason::Unreachable => CutOff::Unreachable,
            Reason::KeyDisabled
            | Reason::KeyDeleted
            | Reason::KeyNotFound
            | Reason::PermissionRevoked
            | Reason::NetworkDenied
            | Reason::IdentityGone
            | Reason::CredentialInvalid
            | Reason::TokenRefused
            | Reason::WrongKeyOrCorruptEnvelope
            | Reason::KeyMaterialMismatch
            | Reason::Operator => CutOff::Revoked,
        }
    }

    /// Whether the volume may open by itself once a full check succeeds. After everything else
    /// a person decides, by `byokfs revalidate`.
    pub const fn heals_by_itself(self) -> bool {
        matches!(self, Reason::Unreachable)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_round_trip() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_name(reason.name()), Some(reason));
            assert!(!reason.describe().is_empty());
        }
        assert_eq!(Reason::from_name("nonsense"), None);
    }

    #[test]
    fn each_has_its_place_in_the_runbook() {
        let runbook = include_str!("../../docs/RUNBOOK.md");
        for reason in Reason::ALL {
            assert!(runbook.contains(&format!("\n## {reason}\n")), "{reason}");
        }
    }
}
