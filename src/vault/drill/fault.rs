//! One fault: what it does, to which requests, how often.

use serde::{Deserialize, Serialize};

use super::Asked;
use crate::vault::permission::Permission;

const MAX_MILLISECONDS: u64 = 600_000;
const MAX_SECONDS: i64 = 100 * 366 * 86400;

/// Who answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Endpoint {
    /// The key routes.
    Vault,
    /// The managed identity endpoints.
    Identity,
    /// The token endpoint of applications.
    Login,
}

macro_rules! kinds {
    ($($variant:ident = $name:literal, $endpoint:ident, $about:literal;)+) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum FaultKind { $($variant),+ }

        impl FaultKind {
            const ALL: &'static [FaultKind] = &[$(FaultKind::$variant),+];

            pub(crate) const fn name(self) -> &'static str {
                match self { $(FaultKind::$variant => $name),+ }
            }

            /// Where it happens unless it is told.
            const fn endpoint(self) -> Endpoint {
                match self { $(FaultKind::$variant => Endpoint::$endpoint),+ }
            }

            const fn about(self) -> &'static str {
                match self { $(FaultKind::$variant => $about),+ }
            }
        }
    };
}

kinds! {
    KeyDisabled = "key-disabled", Vault, "reads show enabled=false, every use is 403 KeyDisabled";
    KeyExpired = "key-expired", Vault, "reads show an expiry in the past; wrap, encrypt and sign are 403, the rest works";
    KeyNotYetValid = "key-not-yet-valid", Vault, "reads show a start in the future; wrap, encrypt and sign are 403, the rest works";
    KeyDeleted = "key-deleted", Vault, "404 KeyNotFound, as for a deleted or purged key or version";
    BeingDeleted = "being-deleted", Vault, "409 Conflict / ObjectIsBeingDeleted";
    BeingRecovered = "being-recovered", Vault, "409 Conflict / ObjectIsBeingRecovered";
    ForbiddenByPolicy = "forbidden-by-policy", Vault, "403 ForbiddenByPolicy";
    AccessDenied = "access-denied", Vault, "403 AccessDenied, the older word for it";
    ForbiddenByRbac = "forbidden-by-rbac", Vault, "403 ForbiddenByRbac";
    ForbiddenByFirewall = "forbidden-by-firewall", Vault, "403 ForbiddenByFirewall";
    ForbiddenByConnection = "forbidden-by-connection", Vault, "403 ForbiddenByConnection";
    HsmAccessDenied = "hsm-access-denied", Vault, "403 AccessDenied in the words of a Managed HSM";
    OtherTenant = "other-tenant", Vault, "401, and the challenge names another tenant";
    WrongAudience = "wrong-audience", Vault, "401 AKV10022: the token is for somebody else";
    TokenExpired = "token-expired", Vault, "401: the token has expired";
    Throttled = "throttled", Vault, "429; --retry-after SECONDS, or none";
    Status = "status", Vault, "--status CODE (default 503), with the service's error shape";
    BadParameter = "bad-parameter", Vault, "400 BadParameter on unwrap and decrypt";
    OtherKey = "other-key", Vault, "unwrap and decrypt answer other bytes than were wrapped";
    ProxyForbidden = "proxy-forbidden", Vault, "403 without the service's error shape, as of a proxy";
    WrongBody = "wrong-body", Vault, "200 with a body that is not the service's";
    Latency = "latency", Vault, "answers come --milliseconds later";
    Hang = "hang", Vault, "no answer, the connection stays open";
    Close = "close", Vault, "no answer, the connection is closed";
    Truncate = "truncate", Vault, "the connection is closed after --bytes of the body";
    Trickle = "trickle", Vault, "one byte of the body each --milliseconds";
    RefuseConnections = "refuse-connections", Vault, "the TLS port is closed, as if the vault were gone";
    UntrustedCertificate = "untrusted-certificate", Vault, "the server's certificate is of an unknown authority";
    ClockShift = "clock-shift", Vault, "the vault's clock is --seconds ahead (or behind)";
    TokenLifetime = "token-lifetime", Vault, "tokens issued from now on live --seconds";
    PropagationDelay = "propagation-delay", Vault, "changes of permissions, roles and rules hold after --seconds";
    IdentityNotFound = "identity-not-found", Identity, "400 Identity not found";
    TenantNotFound = "tenant-not-found", Login, "400 AADSTS90002";
    AppNotFound = "app-not-found", Login, "400 AADSTS700016";
    AppDisabled = "app-disabled", Login, "400 AADSTS7000112";
    SecretWrong = "secret-wrong", Login, "401 AADSTS7000215";
    SecretExpired = "secret-expired", Login, "401 AADSTS7000222";
}

impl FaultKind {
    pub(crate) fn from_name(name: &str) -> Option<FaultKind> {
        FaultKind::ALL.iter().copied().find(|kind| kind.name() == name)
    }

    /// Name and meaning of each.
    pub(crate) fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
        FaultKind::ALL.iter().map(|kind| (kind.name(), kind.about()))
    }

    /// Holds for the whole vault, not for one request.
    pub(crate) const fn is_setting(self) -> bool {
        matches!(
            self,
            FaultKind::RefuseConnections
                | FaultKind::UntrustedCertificate
                | FaultKind::ClockShift
                | FaultKind::TokenLifetime
                | FaultKind::PropagationDelay
        )
    }

    /// Can happen at every endpoint.
    const fn is_everywhere(self) -> bool {
        matches!(
            self,
            FaultKind::Throttled
                | FaultKind::Status
                | FaultKind::WrongBody
                | FaultKind::ProxyForbidden
                | FaultKind::Latency
                | FaultKind::Hang
                | FaultKind::Close
                | FaultKind::Truncate
                | FaultKind::Trickle
        )
    }

    const fn needs_seconds(self) -> bool {
        matches!(
            self,
            FaultKind::ClockShift | FaultKind::TokenLifetime | FaultKind::PropagationDelay
        )
    }

    const fn takes_milliseconds(self) -> bool {
        matches!(self, FaultKind::Latency | FaultKind::Trickle)
    }
}

/// As the administrator sends it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct FaultRequest {
    pub(crate) kind: String,
    pub(crate) key: Option<String>,
    #[serde(default)]
    pub(crate) operations: Vec<String>,
    pub(crate) count: Option<u64>,
    pub(crate) endpoint: Option<Endpoint>,
    pub(crate) status: Option<u16>,
    pub(crate) retry_after: Option<u64>,
    pub(crate) seconds: Option<i64>,
    pub(crate) milliseconds: Option<u64>,
    pub(crate) bytes: Option<usize>,
}

#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) id: u64,
    pub(crate) kind: FaultKind,
    pub(crate) endpoint: Endpoint,
    pub(crate) key: Option<String>,
    /// Empty: every one.
    pub(crate) operations: Vec<String>,
    /// How often still; None: until it is cleared.
    pub(crate) left: Option<u64>,
    pub(crate) hits: u64,
    pub(crate) status: u16,
    pub(crate) retry_after: Option<u64>,
    pub(crate) seconds: i64,
    pub(crate) milliseconds: u64,
    pub(crate) bytes: usize,
}

impl FaultRequest {
    pub(super) fn check(self, id: u64) -> Result<Fault, String> {
        let kind = FaultKind::from_name(&self.kind)
            .ok_or_else(|| format!("there is no fault '{}'", self.kind.escape_debug()))?;
        let endpoint = self.endpoint.unwrap_or(kind.endpoint());
        if endpoint != kind.endpoint() && !kind.is_everywhere() {
            return Err(format!("the fault {} does not happen there", kind.name()));
        }
        let limited = self.key.is_some() || !self.operations.is_empty();
        if limited && (kind.is_setting() || endpoint != Endpoint::Vault) {
            return Err(format!("the fault {} is not one of a key or operation", kind.name()));
        }
        if kind.is_setting() && self.count.is_some() {
            return Err(format!("the fault {} is not counted", kind.name()));
        }
        // What would be ignored, or never hit, makes a drill that proves nothing.
        for (given, taken, what) in [
            (self.status.is_some(), kind == FaultKind::Status, "status"),
            (self.retry_after.is_some(), kind == FaultKind::Throttled, "Retry-After"),
            (self.seconds.is_some(), kind.needs_seconds(), "seconds"),
            (self.milliseconds.is_some(), kind.takes_milliseconds(), "milliseconds"),
            (self.bytes.is_some(), kind == FaultKind::Truncate, "bytes"),
        ] {
            if given && !taken {
                return Err(format!("the fault {} takes no {what}", kind.name()));
            }
        }
        let known =
            |name: &String| Permission::ALL.iter().any(|one| one.name().eq_ignore_ascii_case(name));
        if let Some(unknown) = self.operations.iter().find(|name| !known(name)) {
            return Err(format!("there is no operation '{}'", unknown.escape_debug()));
        }
        if self.count == Some(0) {
            return Err("a fault happens once at least".to_owned());
        }
        if kind.needs_seconds() && self.seconds.is_none() {
            return Err(format!("the fault {} needs seconds", kind.name()));
        }
        let seconds = self.seconds.unwrap_or(0);
        let allowed = match kind {
            FaultKind::ClockShift => -MAX_SECONDS..=MAX_SECONDS,
            FaultKind::TokenLifetime => 1..=MAX_SECONDS,
            _ => 0..=MAX_SECONDS,
        };
        if !allowed.contains(&seconds) {
            return Err("the seconds are out of range".to_owned());
        }
        let status = self.status.unwrap_or(503);
        if !(400..=599).contains(&status) {
            return Err("the status is 400 to 599".to_owned());
        }
        let milliseconds = self.milliseconds.unwrap_or(1000);
        if milliseconds > MAX_MILLISECONDS {
            return Err(format!("the milliseconds are at most {MAX_MILLISECONDS}"));
        }
        Ok(Fault {
            id,
            kind,
            endpoint,
            key: self.key,
            operations: self.operations,
            left: self.count,
            hits: 0,
            status,
            retry_after: self.retry_after,
            seconds,
            milliseconds,
            bytes: self.bytes.unwrap_or(16),
        })
    }
}

impl Fault {
    pub(super) fn matches(&self, asked: Asked<'_>) -> bool {
        let key = self
            .key
            .as_deref()
            .is_none_or(|own| asked.key.is_some_and(|asked| asked.eq_ignore_ascii_case(own)));
        let operation = self.operations.is_empty()
            || asked.operation.is_some_and(|asked| {
                self.operations.iter().any(|own| own.eq_ignore_ascii_case(asked))
            });
        !self.kind.is_setting() && self.endpoint == asked.endpoint && key && operation
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "id": self.id,
            "kind": self.kind.name(),
            "endpoint": self.endpoint,
            "key": self.key,
            "operations": self.operations,
            "left": self.left,
            "hits": self.hits,
            "status": (self.kind == FaultKind::Status).then_some(self.status),
            "retryAfter": self.retry_after,
            "seconds": self.kind.needs_seconds().then_some(self.seconds),
            "milliseconds": self.kind.takes_milliseconds().then_some(self.milliseconds),
            "bytes": (self.kind == FaultKind::Truncate).then_some(self.bytes),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(value: serde_json::Value) -> Result<Fault, String> {
        serde_json::from_value::<FaultRequest>(value).map_err(|e| e.to_string())?.check(1)
    }

    #[test]
    fn every_fault_is_in_the_manual() {
        let manual = include_str!("../../../docs/VAULT.md");
        for kind in FaultKind::ALL {
            assert!(manual.contains(&format!("`{}`", kind.name())), "{}", kind.name());
        }
    }

    #[test]
    fn names_are_distinct_and_nonsense_is_refused() {
        use serde_json::json;
        for kind in FaultKind::ALL {
            assert_eq!(FaultKind::from_name(kind.name()), Some(*kind));
        }
        for bad in [
            json!({ "kind": "fly" }),
            json!({ "kind": "clock-shift" }),
            json!({ "kind": "close", "count": 0 }),
            json!({ "kind": "clock-shift", "seconds": 1, "key": "kek" }),
            json!({ "kind": "refuse-connections", "count": 1 }),
            json!({ "kind": "key-disabled", "endpoint": "identity" }),
            json!({ "kind": "secret-expired", "key": "kek" }),
            json!({ "kind": "status", "status": 200 }),
            json!({ "kind": "token-lifetime", "seconds": 0 }),
            json!({ "kind": "latency", "milliseconds": 600_001 }),
            json!({ "kind": "close", "fly": 1 }),
            json!({ "kind": "close", "status": 500 }),
            json!({ "kind": "status", "retryAfter": 5 }),
            json!({ "kind": "hang", "milliseconds": 5 }),
            json!({ "kind": "trickle", "bytes": 5 }),
            json!({ "kind": "throttled", "operations": ["unwrap"] }),
        ] {
            assert!(check(bad.clone()).is_err(), "{bad}");
        }
        check(json!({ "kind": "close", "endpoint": "identity" })).unwrap();
        check(json!({ "kind": "clock-shift", "seconds": -5 })).unwrap();
    }
}
