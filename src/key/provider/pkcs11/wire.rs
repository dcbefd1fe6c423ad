//! What a session and its process say to each other: one line of JSON each way. Both are of the
//! same program, and the process lives as long as the session: there are no versions of this.

use serde::{Deserialize, Serialize};

use super::super::{Class, KeyInfo, ProviderError, VersionInfo};
use crate::key::reason::Reason;

#[derive(Serialize, Deserialize)]
pub(super) enum Request {
    Open { module: String, token: String, serial: Option<String>, pin: Option<String> },
    Key { kid: String },
    Versions { kid: String },
    Algorithm { kid: String, wish: Option<String> },
    Wrap { kid: String, algorithm: String, value: String },
    Unwrap { kid: String, algorithm: String, value: String },
}

#[derive(Serialize, Deserialize)]
pub(super) enum Answer {
    Opened,
    Key(Key),
    Versions(Vec<Version>),
    Algorithm(String),
    Bytes(String),
    Failed(Failure),
}

/// [`KeyInfo`], as far as a token knows it.
#[derive(Serialize, Deserialize)]
pub(super) struct Key {
    pub(super) kid: String,
    pub(super) key_type: String,
    pub(super) bits: Option<u32>,
    pub(super) operations: Vec<String>,
    pub(super) not_before: Option<i64>,
    pub(super) expires: Option<i64>,
    pub(super) exportable: Option<bool>,
    pub(super) destroyable: Option<bool>,
}

impl Key {
    pub(super) fn into_info(self) -> KeyInfo {
        KeyInfo {
            kid: self.kid,
            key_type: self.key_type,
            bits: self.bits,
            operations: self.operations,
            // A token has no such switch; a key that may not decrypt lacks the operation.
            enabled: true,
            not_before: self.not_before,
            expires: self.expires,
            // As of versions, with which it is compared.
            created: self.not_before,
            exportable: self.exportable,
            destroyable: self.destroyable,
            ..KeyInfo::default()
        }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct Version {
    pub(super) kid: String,
    pub(super) not_before: Option<i64>,
    pub(super) expires: Option<i64>,
}

impl From<Version> for VersionInfo {
    fn from(version: Version) -> VersionInfo {
        let Version { kid, not_before, expires } = version;
        // Tokens do not tell when a key was made: its start date orders the versions.
        VersionInfo { kid, enabled: true, not_before, expires, created: not_before }
    }
}

/// A [`ProviderError`] on its way.
#[derive(Serialize, Deserialize)]
pub(super) struct Failure {
    class: String,
    reason: String,
    code: Option<String>,
    message: String,
}

impl From<&ProviderError> for Failure {
    fn from(error: &ProviderError) -> Failure {
        Failure {
            class: error.class.name().to_owned(),
            reason: error.reason().name().to_owned(),
            code: error.code.clone(),
            message: error.message().to_owned(),
        }
    }
}

impl From<Failure> for ProviderError {
    fn from(failure: Failure) -> ProviderError {
        let reason = Reason::from_name(&failure.reason).unwrap_or(Reason::Unreachable);
        let class = match failure.class.as_str() {
            "Revoked" => Class::Revoked(reason),
            "Denied" => Class::Denied(reason),
            _ => Class::Transient(reason),
        };
        let mut error = ProviderError::new(class, failure.message);
        error.code = failure.code;
        error
    }
}
