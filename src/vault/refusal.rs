//! What the vault says when it says no: status, code, inner code and message of the real service.
//!
//! Messages name keys and permissions, never tokens, never the address or name of the caller
//! beyond what the real service puts there.

use serde_json::{Value, json};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) code: &'static str,
    pub(crate) inner: Option<&'static str>,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(status: u16, code: &'static str, message: impl Into<String>) -> Refusal {
        Refusal { status, code, inner: None, message: message.into() }
    }

    pub(crate) fn with_inner(mut self, inner: &'static str) -> Refusal {
        self.inner = Some(inner);
        self
    }

    pub(crate) fn bad_parameter(message: impl Into<String>) -> Refusal {
        Refusal::new(400, "BadParameter", message)
    }

    pub(crate) fn unauthorized(message: impl Into<String>) -> Refusal {
        Refusal::new(401, "Unauthorized", message)
    }

    pub(crate) fn missing_token() -> Refusal {
        Refusal::unauthorized("AKV10000: Request is missing a Bearer or PoP token.")
    }

    pub(crate) fn no_such_route() -> Refusal {
        Refusal::new(404, "NotFound", "There is no such resource in this key vault.")
    }

    pub(crate) fn method_not_allowed(method: &str) -> Refusal {
        Refusal::new(
            405,
            "MethodNotAllowed",
            format!("The method {method} is not allowed on this resource."),
        )
    }

    pub(crate) fn key_not_found(name: &str) -> Refusal {
        Refusal::new(
            404,
            "KeyNotFound",
            format!(
                "A key with (name/id) {name} was not found in this key vault. If you recently \
                 deleted this key you may be able to recover it using the correct recovery \
                 command. For help resolving this issue, please see \
                 https://go.microsoft.com/fwlink/?linkid=2125182"
            ),
        )
    }

    pub(crate) fn deleted_key_not_found(name: &str) -> Refusal {
        Refusal::new(404, "KeyNotFound", format!("Deleted Key not found: {name}"))
    }

    pub(crate) fn deleted_but_recoverable(name: &str) -> Refusal {
        Refusal::new(
            409,
            "Conflict",
            format!(
                "Key {name} is currently in a deleted but recoverable state, and its name cannot \
                 be reused; in this state, the key can only be recovered or purged."
            ),
        )
        .with_inner("ObjectIsDeletedButRecoverable")
    }

    /// A moment of the real service; this one deletes and recovers at once, except in drills.
    pub(crate) fn being(name: &str, what: &'static str) -> Refusal {
        let inner =
            if what == "deleted" { "ObjectIsBeingDeleted" } else { "ObjectIsBeingRecovered" };
        Refusal::new(409, "Conflict", format!("Key {name} is currently being {what}."))
            .with_inner(inner)
    }

    pub(crate) fn already_exists(what: &str, name: &str) -> Refusal {
        Refusal::new(409, "Conflict", format!("{what} {name} already exists."))
    }

    pub(crate) fn key_disabled(operation: &str) -> Refusal {
        forbidden(format!("Operation {operation} is not allowed on a disabled key."))
            .with_inner("KeyDisabled")
    }

    /// The inner codes of this and the next one are not confirmed for the real service: clients
    /// must go by the status and the key's attributes.
    pub(crate) fn key_expired(operation: &str) -> Refusal {
        forbidden(format!("Operation {operation} is not allowed on an expired key."))
            .with_inner("KeyExpired")
    }

    pub(crate) fn key_not_yet_valid(operation: &str) -> Refusal {
        forbidden(format!("Operation {operation} is not allowed on a key that is not yet valid."))
            .with_inner("KeyNotYetValid")
    }

    pub(crate) fn operation_not_permitted(operation: &str) -> Refusal {
        forbidden(format!("Operation {operation} is not permitted on this key."))
            .with_inner("KeyOperationForbidden")
    }

    pub(crate) fn purge_protected(vault: &str, location: &str) -> Refusal {
        forbidden(format!(
            "Operation \"purge\" is not allowed because purge protection is enabled for this \
             vault. Key Vault service will automatically purge it after the retention period has \
             passed.\r\nVault: {vault};location={location}"
        ))
    }

    pub(crate) fn by_policy(
        caller: &str,
        permission: &str,
        vault: &str,
        location: &str,
    ) -> Refusal {
        forbidden(format!(
            "The user, group or application '{caller}' does not have keys {permission} permission \
             on key vault '{vault};location={location}'. For help resolving this issue, please \
             see https://go.microsoft.com/fwlink/?linkid=2125287"
        ))
        .with_inner("ForbiddenByPolicy")
    }

    pub(crate) fn by_role(
        caller: &str,
        action: &str,
        resource: &str,
        vault: &str,
        location: &str,
    ) -> Refusal {
        forbidden(format!(
            "Caller is not authorized to perform action on resource.\r\nIf role assignments, deny \
             assignments or role definitions were changed recently, please observe propagation \
             time.\r\nCaller: {caller}\r\nAction: '{action}'\r\nResource: '{resource}'\r\n\
             Assignment: (not found)\r\nDenyAssignmentId: null\r\nDecisionReason: null \r\n\
             Vault: {vault};location={location}\r\n"
        ))
        .with_inner("ForbiddenByRbac")
    }

    pub(crate) fn by_firewall(client: &str, caller: &str, vault: &str, location: &str) -> Refusal {
        forbidden(format!(
            "Client address is not authorized and caller is not a trusted service.\r\nClient \
             address: {client}\r\nCaller: {caller}\r\nVault: {vault};location={location}"
        ))
        .with_inner("ForbiddenByFirewall")
    }

    pub(crate) fn by_connection(caller: &str, vault: &str, location: &str) -> Refusal {
        forbidden(format!(
            "Public network access is disabled and request is not from a trusted service nor via \
             an approved private link.\r\nCaller: {caller}\r\nVault: {vault};location={location}"
        ))
        .with_inner("ForbiddenByConnection")
    }

    /// A Managed HSM's own words for a missing role.
    pub(crate) fn by_hsm_role(action: &str, scope: &str, activity: &str) -> Refusal {
        Refusal::new(
            403,
            "AccessDenied",
            format!("Not authorized to access {action} on {scope} (Activity ID: {activity})"),
        )
    }

    /// Code and message are not confirmed for the real service; status and header are.
    pub(crate) fn throttled() -> Refusal {
        Refusal::new(
            429,
            "Throttled",
            "Request was not processed because too many requests were received.",
        )
    }

    pub(crate) fn not_an_administrator() -> Refusal {
        forbidden("Only the administrator of this vault manages identities and permissions.")
            .with_inner("ForbiddenByPolicy")
    }

    /// Something broke here: the cause goes to the server's log, never to the caller.
    pub(crate) fn internal() -> Refusal {
        Refusal::new(500, "InternalServerError", "The vault met an internal error; see its log.")
    }

    pub(crate) fn body(&self) -> Value {
        let mut error = json!({ "code": self.code, "message": self.message });
        if let Some(inner) = self.inner {
            error["innererror"] = json!({ "code": inner });
        }
        json!({ "error": error })
    }

    /// As a Managed HSM writes it: flat, the reason in front.
    pub(crate) fn flat_body(&self) -> Value {
        json!({ "error": { "code": self.reason(), "message": self.message } })
    }

    /// What the audit log records: the most specific code.
    pub(crate) fn reason(&self) -> &'static str {
        self.inner.unwrap_or(self.code)
    }
}

fn forbidden(message: impl Into<String>) -> Refusal {
    Refusal::new(403, "Forbidden", message)
}

impl From<crate::error::Error> for Refusal {
    fn from(error: crate::error::Error) -> Refusal {
        log::error!("{error}");
        Refusal::internal()
    }
}

impl From<rusqlite::Error> for Refusal {
    fn from(error: rusqlite::Error) -> Refusal {
        log::error!("the vault's database: {error}");
        Refusal::internal()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_have_the_shape_of_the_service() {
        let body = Refusal::key_disabled("unwrapKey").body();
        assert_eq!(body["error"]["code"], "Forbidden");
        assert_eq!(body["error"]["innererror"]["code"], "KeyDisabled");
        assert_eq!(
            body["error"]["message"],
            "Operation unwrapKey is not allowed on a disabled key."
        );
        assert!(Refusal::key_not_found("k").body()["error"].get("innererror").is_none());
    }
}
