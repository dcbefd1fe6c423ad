//! The token endpoint of applications, as Microsoft Entra ID has it: client credentials in, access token out.
//!
//! On the TLS listener, below the tenant's id, with the documents by which clients find it. A
//! client proves itself with a secret, a certificate or a federated token. Only this one grant
//! is here: no users, no refresh tokens.

use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use url::form_urlencoded;

use super::api::{Reply, Request, Vault};
use super::assertion::{self, Unproven};
use super::audit::Event;
use super::codec;
use super::drill::{Endpoint, delivery};
use super::host::Origin;
use super::identity::header_sha256;
use super::refusal::Refusal;
use super::store::credentials::{self, Credential, Proof};
use super::store::identities;
use super::token::{self, Subject};

const ASSERTION_TYPE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/// What is asked of the endpoint of a tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LoginRoute {
    tenant: String,
    kind: LoginKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LoginKind {
    TokenV1,
    TokenV2,
    Configuration,
    Keys,
}

impl LoginRoute {
    /// None: not a path of this endpoint.
    pub(crate) fn parse(path: &str) -> Option<LoginRoute> {
        let lower = path.to_ascii_lowercase();
        let segments: Vec<&str> = lower.trim_matches('/').split('/').collect();
        let (&tenant, rest) = segments.split_first()?;
        // The other routes' own beginnings are nobody's tenant.
        if matches!(tenant, "keys" | "deletedkeys" | "rng" | "byokfs") {
            return None;
        }
        let kind = match rest {
            ["oauth2", "token"] => LoginKind::TokenV1,
            ["oauth2", "v2.0", "token"] => LoginKind::TokenV2,
            [".well-known", "openid-configuration"]
            | ["v2.0", ".well-known", "openid-configuration"] => LoginKind::Configuration,
            ["discovery", "keys"] | ["discovery", "v2.0", "keys"] => LoginKind::Keys,
            _ => return None,
        };
        Some(LoginRoute { tenant: tenant.to_owned(), kind })
    }
}

/// A refusal in this endpoint's words.
#[derive(Debug)]
pub(crate) struct LoginRefusal {
    status: u16,
    error: &'static str,
    /// Of the AADSTS error.
    number: u32,
    message: String,
}

impl LoginRefusal {
    fn new(status: u16, error: &'static str, number: u32, message: impl Into<String>) -> Self {
        LoginRefusal { status, error, number, message: message.into() }
    }

    pub(crate) fn tenant_not_found(tenant: &str) -> LoginRefusal {
        LoginRefusal::new(
            400,
            "invalid_request",
            90002,
            format!(
                "Tenant '{tenant}' not found. Check to make sure you have the correct tenant ID and \
                 are signing into the correct cloud."
            ),
        )
    }

    pub(crate) fn application_not_found(client_id: &str, tenant: &str) -> LoginRefusal {
        LoginRefusal::new(
            400,
            "unauthorized_client",
            700016,
            format!(
                "Application with identifier '{client_id}' was not found in the directory \
                 '{tenant}'."
            ),
        )
    }

    pub(crate) fn application_disabled(client_id: &str) -> LoginRefusal {
        LoginRefusal::new(
            400,
            "unauthorized_client",
            7000112,
            format!("Application '{client_id}' is disabled."),
        )
    }

    pub(crate) fn wrong_secret(client_id: &str) -> LoginRefusal {
        LoginRefusal::new(
            401,
            "invalid_client",
            7000215,
            format!("Invalid client secret provided for app '{client_id}'."),
        )
    }

    pub(crate) fn secret_expired(client_id: &str) -> LoginRefusal {
        LoginRefusal::new(
            401,
            "invalid_client",
            7000222,
            format!("The provided client secret keys for app '{client_id}' are expired."),
        )
    }

    fn reply(&self, now: i64) -> Reply {
        let time = OffsetDateTime::from_unix_timestamp(now)
            .ok()
            .and_then(|time| time.format(&Rfc3339).ok())
            .unwrap_or_default();
        let (trace, correlation) =
            (codec::new_uuid().unwrap_or_default(), codec::new_uuid().unwrap_or_default());
        Reply::json(
            self.status,
            &json!({
                "error": self.error,
                "error_description": format!(
                    "AADSTS{}: {} Trace ID: {trace} Correlation ID: {correlation} Timestamp: {time}",
                    self.number, self.message
                ),
                "error_codes": [self.number],
                "timestamp": time,
                "trace_id": trace,
                "correlation_id": correlation,
            }),
        )
    }
}

impl From<Refusal> for LoginRefusal {
    fn from(_: Refusal) -> LoginRefusal {
        LoginRefusal::new(500, "server_error", 90033, "A transient error has occurred.")
    }
}

impl Vault {
    /// The reply, and the error's word if it is one.
    pub(crate) fn login(
        &self,
        request: &Request,
        origin: &Origin,
        route: &LoginRoute,
        now: i64,
        event: &mut Event,
    ) -> (Reply, Option<&'static str>) {
        event.operation = "TokenIssue";
        let faults = self.drill_token(Endpoint::Login);
        let client_id = Form::parse(&request.body).client_id.unwrap_or_default();
        let refused = Vault::login_refusal(&faults, &route.tenant, &printable(&client_id));
        let answer = match refused {
            Some(refusal) => Err(refusal),
            None => self.answer_login(request, origin, route, now, event),
        };
        let (mut reply, reason) = match answer {
            Ok(value) => (Reply::ok(&value), None),
            Err(refusal) => (refusal.reply(now), Some(refusal.error)),
        };
        reply.headers.push(("cache-control", "no-store".into()));
        if !faults.is_empty() {
            event.drill = Some(faults.iter().map(|fault| fault.kind.name()).collect());
            Vault::drill_token_answer(&faults, &mut reply);
            reply.delivery = delivery(&faults);
        }
        (reply, reason)
    }

    fn answer_login(
        &self,
        request: &Request,
        origin: &Origin,
        route: &LoginRoute,
        now: i64,
        event: &mut Event,
    ) -> Result<Value, LoginRefusal> {
        let tenant = route.tenant.as_str();
        if !self.access.current().has_tenant(tenant) {
            return Err(LoginRefusal::tenant_not_found(&printable(tenant)));
        }
        let base = format!("{}/{tenant}", origin.url);
        let expected = match route.kind {
            LoginKind::TokenV1 | LoginKind::TokenV2 => "POST",
            LoginKind::Configuration | LoginKind::Keys => "GET",
        };
        if request.method != expected {
            let message = format!("This endpoint only accepts {expected} requests.");
            return Err(LoginRefusal::new(405, "invalid_request", 900561, message));
        }
        match route.kind {
            LoginKind::Configuration => Ok(json!({
                "issuer": format!("{base}/v2.0"),
                "authorization_endpoint": format!("{base}/oauth2/v2.0/authorize"),
                "token_endpoint": format!("{base}/oauth2/v2.0/token"),
                "jwks_uri": format!("{base}/discovery/v2.0/keys"),
                "token_endpoint_auth_methods_supported": ["client_secret_post", "private_key_jwt"],
                "response_types_supported": ["code"],
                "subject_types_supported": ["pairwise"],
                "id_token_signing_alg_values_supported": ["RS256"],
                "tenant_region_scope": Value::Null,
            })),
            LoginKind::Keys => Ok(json!({ "keys": [self.tokens.jwk()] })),
            LoginKind::TokenV1 | LoginKind::TokenV2 => {
                let audiences = [
                    format!("{base}/oauth2/v2.0/token"),
                    format!("{base}/oauth2/token"),
                    format!("{base}/v2.0"),
                ];
                self.client_credentials(&Form::parse(&request.body), route, &audiences, now, event)
            }
        }
    }

    fn client_credentials(
        &self,
        form: &Form,
        route: &LoginRoute,
        audiences: &[String],
        now: i64,
        event: &mut Event,
    ) -> Result<Value, LoginRefusal> {
        let required = |name: &str, value: &Option<String>| {
            value.clone().filter(|value| !value.is_empty()).ok_or_else(|| {
                let message =
                    format!("The request body must contain the following parameter: '{name}'.");
                LoginRefusal::new(400, "invalid_request", 900144, message)
            })
        };
        let grant = required("grant_type", &form.grant_type)?;
        if grant != "client_credentials" {
            let message = "The app requested an unsupported grant type.";
            return Err(LoginRefusal::new(400, "unsupported_grant_type", 70003, message));
        }
        let client_id = printable(&required("client_id", &form.client_id)?);
        let audience = match route.kind {
            LoginKind::TokenV1 => required("resource", &form.resource)?,
            _ => audience_of_scope(&required("scope", &form.scope)?)?,
        };
        let found = self.store.read(|tx| {
            let identity = identities::find_by_client_id(tx, &client_id)?;
            let credentials = match &identity {
                Some(identity) => credentials::of(tx, &identity.object_id)?,
                None => Vec::new(),
            };
            Ok::<_, Refusal>(identity.map(|identity| (identity, credentials)))
        })?;
        let (identity, credentials) = found
            .filter(|(identity, _)| identity.tenant.eq_ignore_ascii_case(&route.tenant))
            .ok_or_else(|| LoginRefusal::application_not_found(&client_id, &route.tenant))?;
        let identity = std::sync::Arc::new(identity);
        event.caller = Some(std::sync::Arc::clone(&identity));
        if !identity.enabled {
            return Err(LoginRefusal::application_disabled(&client_id));
        }
        match (&form.client_secret, &form.client_assertion) {
            (Some(secret), None) => check_secret(secret, &client_id, &credentials, now)?,
            (None, Some(assertion)) => {
                if form.client_assertion_type.as_deref() != Some(ASSERTION_TYPE) {
                    let message = "The client assertion type is not supported.";
                    return Err(LoginRefusal::new(400, "invalid_request", 900144, message));
                }
                check_assertion(assertion, &identity.client_id, audiences, credentials, now)?;
            }
            _ => {
                let message = "The request body must contain the following parameter: \
                               'client_assertion' or 'client_secret'.";
                return Err(LoginRefusal::new(401, "invalid_client", 7000218, message));
            }
        }
        let subject = Subject {
            object_id: &identity.object_id,
            client_id: &identity.client_id,
            tenant: &identity.tenant,
        };
        let issued = self.tokens.issue(subject, &audience, now).map_err(Refusal::from)?;
        let (token, expires) = issued;
        let lifetime = expires - now;
        Ok(match route.kind {
            // Version 1 sends its numbers as strings.
            LoginKind::TokenV1 => json!({
                "token_type": "Bearer",
                "expires_in": lifetime.to_string(),
                "ext_expires_in": lifetime.to_string(),
                "expires_on": expires.to_string(),
                "resource": audience,
                "access_token": token,
            }),
            _ => json!({
                "token_type": "Bearer",
                "expires_in": lifetime,
                "ext_expires_in": lifetime,
                "access_token": token,
            }),
        })
    }

    /// The issuer of the tokens that this vault takes.
    pub(crate) fn issuer(&self) -> String {
        token::issuer(&self.access.current().tenant)
    }
}

fn check_secret(
    secret: &str,
    client_id: &str,
    credentials: &[Credential],
    now: i64,
) -> Result<(), LoginRefusal> {
    let hash = header_sha256(secret);
    let mut found = None;
    for credential in credentials {
        if let Proof::Secret { sha256 } = &credential.proof
            && bool::from(sha256.ct_eq(&hash))
        {
            found = Some(credential);
        }
    }
    let credential = found.ok_or_else(|| LoginRefusal::wrong_secret(client_id))?;
    if credential.expires.is_some_and(|expires| expires <= now) {
        return Err(LoginRefusal::secret_expired(client_id));
    }
    Ok(())
}

fn check_assertion(
    assertion: &str,
    client_id: &str,
    audiences: &[String],
    credentials: Vec<Credential>,
    now: i64,
) -> Result<(), LoginRefusal> {
    let proofs: Vec<Proof> = credentials
        .into_iter()
        .filter(|credential| credential.expires.is_none_or(|expires| expires > now))
        .map(|credential| credential.proof)
        .collect();
    assertion::check(assertion, client_id, audiences, &proofs, now).map_err(|reason| {
        let (error, number, message) = match reason {
            Unproven::Signature => (
                "invalid_client",
                700027,
                "The certificate with identifier used to sign the client assertion is not \
                 registered on application, or its signature is invalid.",
            ),
            Unproven::Expired => {
                ("invalid_client", 700024, "Client assertion is not within its valid time range.")
            }
            Unproven::NoMatch => (
                "invalid_client",
                70021,
                "No matching federated identity record found for presented assertion.",
            ),
            Unproven::Malformed => ("invalid_client", 50027, "JWT token is invalid or malformed."),
        };
        LoginRefusal::new(401, error, number, message)
    })
}

/// `RESOURCE/.default`; a slash at the end of the resource itself is kept.
fn audience_of_scope(scope: &str) -> Result<String, LoginRefusal> {
    let mut resources = scope
        .split(' ')
        .filter(|one| !matches!(*one, "" | "openid" | "profile" | "offline_access"));
    let resource = resources.next().and_then(|scope| scope.strip_suffix("/.default"));
    match (resource, resources.next()) {
        (Some(resource), None) if (1..=512).contains(&resource.len()) => Ok(resource.to_owned()),
        _ => Err(LoginRefusal::new(
            400,
            "invalid_scope",
            1_002_012,
            "The provided value for scope is not valid. Client credential flows must have a scope \
             value with /.default suffixed to the resource identifier.",
        )),
    }
}

fn printable(text: &str) -> String {
    text.chars().filter(char::is_ascii_graphic).take(64).collect()
}

/// The allocator overwrites these strings when they go.
#[derive(Default)]
struct Form {
    grant_type: Option<String>,
    client_id: Option<String>,
    client_secret: Option<String>,
    client_assertion: Option<String>,
    client_assertion_type: Option<String>,
    scope: Option<String>,
    resource: Option<String>,
}

impl Form {
    fn parse(body: &[u8]) -> Form {
        let mut form = Form::default();
        for (name, value) in form_urlencoded::parse(body) {
            let field = match name.as_ref() {
                "grant_type" => &mut form.grant_type,
                "client_id" => &mut form.client_id,
                "client_secret" => &mut form.client_secret,
                "client_assertion" => &mut form.client_assertion,
                "client_assertion_type" => &mut form.client_assertion_type,
                "scope" => &mut form.scope,
                "resource" => &mut form.resource,
                _ => continue,
            };
            *field = Some(value.into_owned());
        }
        form
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_below_a_tenant_are_the_endpoints() {
        let kind = |path: &str| LoginRoute::parse(path).map(|route| route.kind);
        assert_eq!(kind("/T1/oauth2/v2.0/token"), Some(LoginKind::TokenV2));
        assert_eq!(kind("/t1/oauth2/token/"), Some(LoginKind::TokenV1));
        let configuration = Some(LoginKind::Configuration);
        assert_eq!(kind("/t1/v2.0/.well-known/openid-configuration"), configuration);
        assert_eq!(kind("/t1/discovery/v2.0/keys"), Some(LoginKind::Keys));
        for path in [
            "/",
            "/keys",
            "/keys/kek/wrapkey",
            "/keys/oauth2/token",
            "/Keys/discovery/keys",
            "/oauth2/v2.0/token",
        ] {
            assert_eq!(kind(path), None, "{path}");
        }
        assert_eq!(LoginRoute::parse("/T1/oauth2/token").unwrap().tenant, "t1");
    }

    #[test]
    fn a_scope_names_one_resource() {
        let audience = |scope: &str| audience_of_scope(scope).ok();
        assert_eq!(audience("https://v/.default"), Some("https://v".into()));
        assert_eq!(audience("https://v//.default"), Some("https://v/".into()));
        assert_eq!(audience("openid https://v/.default"), Some("https://v".into()));
        for bad in ["", "https://v", "/.default", "a/.default b/.default"] {
            assert_eq!(audience(bad), None, "{bad}");
        }
    }
}
