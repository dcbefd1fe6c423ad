//! What Key Vault's refusals mean: the table of conditions, row by row.
//!
//! The rule behind it: only an answer in Key Vault's own form says anything about the key. A 403
//! from a proxy, a captive portal's page or a broken answer never does, however final it sounds;
//! and a Key Vault refusal is never taken for an outage.

use serde::Deserialize;

use super::http::Response;
use super::{Class, ProviderError, scrub};
use crate::key::reason::Reason;

#[derive(Deserialize)]
struct ErrorBody {
    error: ErrorDetail,
}

#[derive(Deserialize)]
struct ErrorDetail {
    code: Option<String>,
    message: Option<String>,
    #[serde(alias = "innerError")]
    innererror: Option<InnerError>,
}

#[derive(Deserialize)]
struct InnerError {
    code: Option<String>,
}

/// For a response that is not a success; `operation` is the permission that was used.
pub(super) fn classify(response: &Response, operation: &str) -> ProviderError {
    let body: Option<ErrorBody> = serde_json::from_slice(&response.body).ok();
    let detail = body.map(|body| body.error).filter(|detail| detail.code.is_some());
    let class = match &detail {
        Some(detail) => by_service(response.status, detail),
        None => without_word_of_the_service(response.status),
    };
    let (code, message) = detail.map_or((None, None), |detail| {
        let inner = detail.innererror.and_then(|inner| inner.code);
        let code = match (detail.code, inner) {
            (Some(code), Some(inner)) => Some(format!("{code}/{inner}")),
            (code, _) => code,
        };
        (code, detail.message)
    });
    let message = message.filter(|message| !message.is_empty());
    let message = message.unwrap_or_else(|| match class.reason() {
        Reason::ProxyDenied => "something other than the key service answers in its place".into(),
        _ => "the key service refuses".into(),
    });
    let mut error = ProviderError::new(class, message).during(operation);
    error.status = Some(response.status);
    error.code = code.map(|code| scrub(&code));
    error.retry_after = response.retry_after();
    error
}

/// A success that cannot be read: not a refusal.
pub(super) fn unreadable(what: &str) -> ProviderError {
    ProviderError::unreachable(format!("the key service sent a malformed {what}"))
}

fn by_service(status: u16, detail: &ErrorDetail) -> Class {
    let code = detail.code.as_deref().unwrap_or("");
    let inner = detail.innererror.as_ref().and_then(|inner| inner.code.as_deref()).unwrap_or("");
    match status {
        400 => Class::Denied(Reason::WrongKeyOrCorruptEnvelope),
        401 => Class::Denied(Reason::TokenRefused),
        403 => forbidden(code, inner, detail.message.as_deref().unwrap_or("")),
        404 if code.eq_ignore_ascii_case("VaultNotFound") => Class::Transient(Reason::VaultGone),
        404 if code.eq_ignore_ascii_case("KeyNotFound") => Class::Revoked(Reason::KeyNotFound),
        // Not the word for it that is known: to be said twice.
        404 => Class::Denied(Reason::KeyNotFound),
        _ => Class::Transient(Reason::Unreachable),
    }
}

fn forbidden(code: &str, inner: &str, message: &str) -> Class {
    let is = |name: &str| inner.eq_ignore_ascii_case(name) || code.eq_ignore_ascii_case(name);
    if is("KeyDisabled") || message.contains("not allowed on a disabled key") {
        Class::Revoked(Reason::KeyDisabled)
    } else if is("KeyExpired") || message.contains("not allowed on an expired key") {
        Class::Revoked(Reason::KeyExpired)
    } else if is("KeyNotYetValid") {
        Class::Revoked(Reason::KeyNotYetValid)
    } else if is("ForbiddenByFirewall") || is("ForbiddenByConnection") {
        Class::Denied(Reason::NetworkDenied)
    } else {
        // ForbiddenByPolicy, ForbiddenByRbac, AccessDenied, and whatever comes to be.
        Class::Denied(Reason::PermissionRevoked)
    }
}

fn without_word_of_the_service(status: u16) -> Class {
    match status {
        300..=399 | 400..=407 | 410..=428 => Class::Transient(Reason::ProxyDenied),
        _ => Class::Transient(Reason::Unreachable),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(status: u16, body: &str) -> ProviderError {
        let headers = ureq::http::HeaderMap::new();
        classify(&Response { status, headers, body: body.into() }, "unwrapKey")
    }

    fn vault_error(code: &str, inner: Option<&str>, message: &str) -> String {
        let inner = inner.map(|code| serde_json::json!({ "code": code }));
        serde_json::json!({"error": {"code": code, "message": message, "innererror": inner}})
            .to_string()
    }

    #[test]
    fn the_table_of_conditions() {
        use Class::{Denied, Revoked, Transient};
        let rows = [
            (403, "Forbidden", Some("KeyDisabled"), Revoked(Reason::KeyDisabled)),
            (403, "Forbidden", Some("KeyExpired"), Revoked(Reason::KeyExpired)),
            (403, "Forbidden", Some("KeyNotYetValid"), Revoked(Reason::KeyNotYetValid)),
            (404, "KeyNotFound", None, Revoked(Reason::KeyNotFound)),
            (404, "VaultNotFound", None, Transient(Reason::VaultGone)),
            (404, "NotFound", None, Denied(Reason::KeyNotFound)),
            (409, "Conflict", Some("ObjectIsBeingDeleted"), Transient(Reason::Unreachable)),
            (409, "Conflict", Some("ObjectIsBeingRecovered"), Transient(Reason::Unreachable)),
            (403, "Forbidden", Some("ForbiddenByPolicy"), Denied(Reason::PermissionRevoked)),
            (403, "Forbidden", Some("AccessDenied"), Denied(Reason::PermissionRevoked)),
            (403, "Forbidden", Some("ForbiddenByRbac"), Denied(Reason::PermissionRevoked)),
            (403, "ForbiddenByRbac", None, Denied(Reason::PermissionRevoked)),
            (403, "AccessDenied", None, Denied(Reason::PermissionRevoked)),
            (403, "Forbidden", Some("ForbiddenByFirewall"), Denied(Reason::NetworkDenied)),
            (403, "Forbidden", Some("ForbiddenByConnection"), Denied(Reason::NetworkDenied)),
            (401, "Unauthorized", None, Denied(Reason::TokenRefused)),
            (429, "Throttled", None, Transient(Reason::Unreachable)),
            (500, "InternalServerError", None, Transient(Reason::Unreachable)),
            (503, "ServiceUnavailable", None, Transient(Reason::Unreachable)),
            (400, "BadParameter", None, Denied(Reason::WrongKeyOrCorruptEnvelope)),
        ];
        for (status, code, inner, class) in rows {
            let error = case(status, &vault_error(code, inner, "x"));
            assert_eq!(error.class, class, "{status} {code} {inner:?}");
            assert_eq!(error.status, Some(status));
            assert!(error.code.as_deref().unwrap().starts_with(code));
        }
    }

    #[test]
    fn nothing_that_is_not_the_services_own_word_counts_as_one() {
        for body in ["", "<html>Access denied</html>", "{}", r#"{"error":"no"}"#, r#"{"error":{}}"#]
        {
            for status in [302, 400, 401, 403, 404, 407] {
                assert_eq!(case(status, body).class, Class::Transient(Reason::ProxyDenied));
            }
            for status in [408, 429, 500, 502, 503, 504] {
                assert_eq!(case(status, body).class, Class::Transient(Reason::Unreachable));
            }
        }
    }

    #[test]
    fn messages_say_what_was_tried_and_nothing_of_the_caller() {
        let message = "Caller is not authorized to perform action on resource.\r\nCaller: appid=7";
        let body = vault_error("Forbidden", Some("ForbiddenByRbac"), message);
        assert_eq!(
            case(403, &body).to_string(),
            "unwrapKey: Caller is not authorized to perform action on resource. (HTTP 403, \
             Forbidden/ForbiddenByRbac)"
        );
    }

    #[test]
    fn a_disabled_key_is_told_by_its_message_too() {
        let body =
            vault_error("Forbidden", None, "Operation unwrapKey is not allowed on a disabled key.");
        assert_eq!(case(403, &body).class, Class::Revoked(Reason::KeyDisabled));
    }
}
