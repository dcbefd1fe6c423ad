//! Answers of token endpoints: a token, or a refusal and what it means.

use serde::Deserialize;

use super::http::Response;
use super::{Class, ProviderError, ProviderResult, scrub};
use crate::crypto::secret::SecretString;
use crate::key::clock::BootTime;
use crate::key::reason::Reason;
use crate::key::wall_clock;
use crate::sys::stack;

/// A token that was just issued.
pub(super) struct Token {
    pub secret: SecretString,
    /// Seconds since the epoch.
    pub expires: i64,
    pub fetched: BootTime,
    /// The directory that issued it, as the token says.
    pub tenant: Option<String>,
}

/// Reads the answer of any token endpoint.
pub(super) fn read(response: &Response) -> ProviderResult<Token> {
    if response.status != 200 {
        return Err(classify(response));
    }
    stack::with_burnt_stack(|| {
        let answer: TokenAnswer<'_> =
            serde_json::from_slice(&response.body).map_err(|_| malformed("answer"))?;
        let expires = answer.expires(wall_clock()).ok_or_else(|| malformed("expiry"))?;
        let secret = SecretString::from_string_wiping(answer.access_token.to_owned());
        let secret = secret.map_err(|error| ProviderError::unreachable(error.to_string()))?;
        let tenant = issuing_tenant(secret.expose());
        Ok(Token { secret, expires, fetched: BootTime::now(), tenant })
    })
}

/// `tid` of a JWT. Not verified: it is for the requirement check to compare, and decides nothing.
fn issuing_tenant(token: &str) -> Option<String> {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    #[derive(Deserialize)]
    struct Claims {
        tid: Option<String>,
    }
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    serde_json::from_slice::<Claims>(&claims).ok()?.tid
}

/// `expires_on` is a string in some services and a number in others; some send `expires_in`.
#[derive(Deserialize)]
struct TokenAnswer<'a> {
    access_token: &'a str,
    expires_on: Option<TextOrNumber>,
    expires_in: Option<TextOrNumber>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TextOrNumber {
    Number(i64),
    Text(String),
}

impl TextOrNumber {
    fn number(&self) -> Option<i64> {
        match self {
            TextOrNumber::Number(number) => Some(*number),
            TextOrNumber::Text(text) => text.parse().ok(),
        }
    }
}

impl TokenAnswer<'_> {
    fn expires(&self, now: i64) -> Option<i64> {
        let absolute = self.expires_on.as_ref().and_then(TextOrNumber::number);
        let relative = self.expires_in.as_ref().and_then(TextOrNumber::number);
        absolute.or(relative.map(|seconds| now.saturating_add(seconds)))
    }
}

pub(super) fn malformed(what: &str) -> ProviderError {
    ProviderError::unreachable(format!("the token endpoint sent a malformed {what}"))
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct TokenError {
    error: String,
    #[serde(rename = "error_description")]
    error_description: String,
    /// App Service has these two in their place.
    status_code: Option<u16>,
    message: String,
}

impl TokenError {
    /// Whether it has a token endpoint's form. Anything can answer with some JSON.
    fn is_its_word(&self) -> bool {
        !self.error.is_empty() || self.status_code.is_some() && !self.message.is_empty()
    }
}

/// Refusals of an identity endpoint: rows 14 to 17 of the table of conditions.
fn classify(response: &Response) -> ProviderError {
    let body: Option<TokenError> = serde_json::from_slice(&response.body).ok();
    let body = body.filter(|body| response.status < 500 && body.is_its_word());
    let Some(body) = body else {
        let class = match response.status {
            300..=399 | 403 | 407 => Class::Transient(Reason::ProxyDenied),
            _ => Class::Transient(Reason::Unreachable),
        };
        return finish(class, response, "the token endpoint does not work", None);
    };
    let text =
        if body.error_description.is_empty() { &body.message } else { &body.error_description };
    let lower = text.to_ascii_lowercase();
    let not_found = ["identity not found", "no managed identity", "has not been assigned"];
    let busy = ["temporarily_unavailable", "server_error"].contains(&body.error.as_str());
    let class = match response.status {
        _ if busy => Class::Transient(Reason::Unreachable),
        404 | 408 | 410 | 429 => Class::Transient(Reason::Unreachable),
        _ if text.contains("AADSTS7000112") => Class::Revoked(Reason::IdentityGone),
        _ if text.contains("AADSTS700016") => Class::Denied(Reason::IdentityGone),
        _ if not_found.iter().any(|phrase| lower.contains(phrase)) => {
            Class::Denied(Reason::IdentityGone)
        }
        _ => Class::Denied(Reason::CredentialInvalid),
    };
    let text = if text.is_empty() { "the token endpoint refuses" } else { text };
    finish(class, response, text, Some(body.error.clone()).filter(|code| !code.is_empty()))
}

fn finish(class: Class, response: &Response, text: &str, code: Option<String>) -> ProviderError {
    let mut error = ProviderError::new(class, text);
    error.status = Some(response.status);
    error.code = code.map(|code| scrub(&code));
    error.retry_after = response.retry_after();
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_the_identity_follow_the_table() {
        let case = |status, body: &str| {
            let headers = ureq::http::HeaderMap::new();
            classify(&Response { status, headers, body: body.into() }).class
        };
        let body = |error: &str, text: &str| {
            format!("{{\"error\":\"{error}\",\"error_description\":\"{text}\"}}")
        };
        let gone = Class::Denied(Reason::IdentityGone);
        assert_eq!(case(400, &body("invalid_request", "Identity not found")), gone);
        assert_eq!(case(400, &body("unauthorized_client", "AADSTS700016: no application")), gone);
        assert_eq!(
            case(400, r#"{"statusCode":400,"message":"No Managed Identity found for it"}"#),
            gone
        );
        let disabled = case(401, &body("unauthorized_client", "AADSTS7000112: disabled"));
        assert_eq!(disabled, Class::Revoked(Reason::IdentityGone));
        for number in ["7000215", "7000222", "90002"] {
            let class = case(401, &body("invalid_client", &format!("AADSTS{number}: no")));
            assert_eq!(class, Class::Denied(Reason::CredentialInvalid), "{number}");
        }
        for code in ["temporarily_unavailable", "server_error"] {
            assert_eq!(
                case(400, &body(code, "AADSTS90033")),
                Class::Transient(Reason::Unreachable)
            );
        }
        for status in [404, 410, 429, 500, 503] {
            assert_eq!(case(status, &body("x", "y")), Class::Transient(Reason::Unreachable));
        }
        for body in ["<html>blocked</html>", "{}", r#"{"message":"blocked"}"#, r#"{"error":{}}"#] {
            assert_eq!(case(403, body), Class::Transient(Reason::ProxyDenied), "{body}");
            assert_eq!(case(302, body), Class::Transient(Reason::ProxyDenied), "{body}");
            assert_eq!(case(400, body), Class::Transient(Reason::Unreachable), "{body}");
        }
        assert_eq!(case(400, "not json"), Class::Transient(Reason::Unreachable));
    }

    #[test]
    fn expiry_is_read_in_every_form() {
        for (text, expected) in [
            (r#"{"access_token":"t","expires_on":"1700000000"}"#, Some(1_700_000_000)),
            (r#"{"access_token":"t","expires_on":1700000000}"#, Some(1_700_000_000)),
            (r#"{"access_token":"t","expires_in":"60"}"#, Some(1060)),
            (r#"{"access_token":"t"}"#, None),
        ] {
            let answer: TokenAnswer<'_> = serde_json::from_str(text).unwrap();
            assert_eq!(answer.expires(1000), expected, "{text}");
        }
    }

    #[test]
    fn the_issuer_is_read_from_a_token_that_has_one() {
        use base64::Engine;
        use base64::engine::general_purpose::URL_SAFE_NO_PAD;
        let claims = URL_SAFE_NO_PAD.encode(r#"{"aud":"a","tid":"72f9-ab"}"#);
        assert_eq!(issuing_tenant(&format!("h.{claims}.s")).as_deref(), Some("72f9-ab"));
        for other in ["opaque", "a.!.c", "a.e30.c"] {
            assert_eq!(issuing_tenant(other), None);
        }
    }
}
