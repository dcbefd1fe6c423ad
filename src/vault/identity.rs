//! The managed identity endpoints, as App Service and as IMDS have them. Plain http, so on loopback only.
//!
//! App Service: the header secret says which host asks. IMDS has no secret: whoever can connect is
//! the host, so it is off unless `serve` is told whose endpoint it is. Either way the host's own
//! (system-assigned) identity answers, or one of those assigned to it if its client or object id is given.

use std::net::IpAddr;
use std::time::Instant;

use aws_lc_rs::digest::{SHA256, digest};
use serde_json::json;
use url::form_urlencoded;

use super::api::{Reply, Vault};
use super::audit::{Event, Outcome};
use super::drill::{Endpoint, delivery};
use super::store::identities::{self, Identity};
use super::token::Subject;
use super::wire::TokenReply;
use super::{codec, refusal::Refusal};

/// Where it is, below the identity endpoint's origin.
pub(crate) const PATH: &str = "/msi/token";
pub(crate) const IMDS_PATH: &str = "/metadata/identity/oauth2/token";
const APP_SERVICE_VERSIONS: [&str; 2] = ["2019-08-01", "2017-09-01"];
const MAX_RESOURCE: usize = 512;

#[derive(Debug)]
pub(crate) struct TokenRequest {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) header: Option<HeaderSecret>,
    /// `Metadata: true`.
    pub(crate) metadata: bool,
    /// Came through a proxy: IMDS answers only who is on the machine.
    pub(crate) forwarded: bool,
    pub(crate) client: IpAddr,
}

/// Not for logs.
pub(crate) struct HeaderSecret(pub(crate) String);

impl std::fmt::Debug for HeaderSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[header secret]")
    }
}

/// What an identity is known by.
pub(crate) fn header_sha256(secret: &str) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, secret.as_bytes()).as_ref());
    hash
}

pub(crate) struct Denied {
    pub(crate) status: u16,
    pub(crate) error: &'static str,
    pub(crate) description: &'static str,
}

pub(crate) const fn denied(status: u16, error: &'static str, description: &'static str) -> Denied {
    Denied { status, error, description }
}

const NOT_FOUND: Denied = denied(400, "invalid_request", "Identity not found");

/// What is asked for.
struct Query {
    resource: String,
    client_id: Option<String>,
    object_id: Option<String>,
}

impl Vault {
    pub(crate) fn token(&self, request: &TokenRequest) -> Reply {
        let start = Instant::now();
        let mut event = Event { operation: "TokenIssue", ..Event::default() };
        let faults = self.drill_token(Endpoint::Identity);
        let answer = self.issue_token(request, &mut event);
        let (status, reason, body) = match answer {
            Ok(body) => (200, None, body),
            Err(Denied { status, error, description }) => (
                status,
                Some(error),
                json!({ "error": error, "error_description": description }).to_string(),
            ),
        };
        let mut reply = Reply {
            status,
            headers: vec![
                ("content-type", "application/json; charset=utf-8".into()),
                ("cache-control", "no-store".into()),
            ],
            body: Some(body.into_bytes()),
            delivery: delivery(&faults),
        };
        if !faults.is_empty() {
            event.drill = Some(faults.iter().map(|fault| fault.kind.name()).collect());
            Vault::drill_token_answer(&faults, &mut reply);
        }
        let request_id = codec::new_uuid().unwrap_or_default();
        let outcome = Outcome {
            status: reply.status,
            reason,
            request_id: &request_id,
            client: Some(request.client),
            duration: start.elapsed(),
            ..Outcome::default()
        };
        self.audit.record(&event, &outcome, (self.clock)());
        reply
    }

    fn issue_token(&self, request: &TokenRequest, event: &mut Event) -> Result<String, Denied> {
        let path = request.path.trim_end_matches('/');
        let is_imds = path.eq_ignore_ascii_case(IMDS_PATH) && self.imds.is_some();
        if !is_imds && !path.eq_ignore_ascii_case(PATH) {
            return Err(denied(404, "not_found", "There is no such endpoint"));
        }
        if request.method != "GET" {
            return Err(denied(405, "invalid_request", "Only GET is allowed"));
        }
        if is_imds {
            self.imds_token(request, event)
        } else {
            self.app_service_token(request, event)
        }
    }

    fn app_service_token(
        &self,
        request: &TokenRequest,
        event: &mut Event,
    ) -> Result<String, Denied> {
        let HeaderSecret(secret) = request.header.as_ref().ok_or(denied(
            401,
            "invalid_request",
            "The X-IDENTITY-HEADER is missing",
        ))?;
        let (query, api_version) = parse(&request.query)?;
        if !APP_SERVICE_VERSIONS.contains(&api_version.as_str()) {
            return Err(denied(400, "invalid_request", "The api-version is missing or unknown"));
        }
        let hash = header_sha256(secret);
        let host = self
            .store
            .read(|tx| Ok::<_, Refusal>(identities::find_by_header(tx, &hash)?))
            .map_err(internal)?
            .ok_or(NOT_FOUND)?;
        self.answer_token(host, &query, event)
    }

    fn imds_token(&self, request: &TokenRequest, event: &mut Event) -> Result<String, Denied> {
        if !request.metadata {
            return Err(denied(400, "bad_request_102", "Required metadata header not specified"));
        }
        if request.forwarded {
            return Err(denied(400, "invalid_request", "X-Forwarded-For is not allowed"));
        }
        let (query, api_version) = parse(&request.query)?;
        if api_version.is_empty() {
            return Err(denied(400, "invalid_request", "The api-version is missing"));
        }
        let name = self.imds.as_deref().ok_or(NOT_FOUND)?;
        let host = self
            .store
            .read(|tx| Ok::<_, Refusal>(identities::find(tx, name)?))
            .map_err(internal)?
            .ok_or(NOT_FOUND)?;
        self.answer_token(host, &query, event)
    }

    /// The host's own identity, or the one of its assigned ones that was asked for.
    fn answer_token(
        &self,
        host: Identity,
        query: &Query,
        event: &mut Event,
    ) -> Result<String, Denied> {
        let is_meant = |identity: &Identity| {
            let same = |given: &Option<String>, own: &str| {
                given.as_ref().is_none_or(|given| given.eq_ignore_ascii_case(own))
            };
            same(&query.client_id, &identity.client_id)
                && same(&query.object_id, &identity.object_id)
        };
        let identity = if is_meant(&host) {
            host
        } else {
            self.store
                .read(|tx| Ok::<_, Refusal>(identities::assigned_to(tx, &host.object_id)?))
                .map_err(internal)?
                .into_iter()
                .find(is_meant)
                .ok_or(NOT_FOUND)?
        };
        if !identity.enabled {
            return Err(NOT_FOUND);
        }
        let now = (self.clock)();
        let subject = Subject {
            object_id: &identity.object_id,
            client_id: &identity.client_id,
            tenant: &identity.tenant,
        };
        let issued = self.tokens.issue(subject, &query.resource, now);
        let (token, expires_on) = issued.map_err(|error| internal(error.into()))?;
        let reply = TokenReply {
            access_token: &token,
            expires_on: expires_on.to_string(),
            expires_in: (expires_on - now).to_string(),
            resource: &query.resource,
            token_type: "Bearer",
            client_id: &identity.client_id,
        };
        let text = serde_json::to_string(&reply).map_err(|error| {
            log::error!("cannot write a token reply: {error}");
            denied(500, "server_error", "See the vault's log")
        })?;
        event.caller = Some(identity.into());
        Ok(text)
    }
}

fn internal(_: Refusal) -> Denied {
    denied(500, "server_error", "See the vault's log")
}

/// The query and its api-version, empty if there is none.
fn parse(text: &str) -> Result<(Query, String), Denied> {
    let (mut resource, mut api_version) = (None, String::new());
    let (mut client_id, mut object_id) = (None, None);
    for (name, value) in form_urlencoded::parse(text.as_bytes()) {
        let value = value.into_owned();
        match name.to_ascii_lowercase().as_str() {
            "resource" => resource = Some(value),
            "api-version" => api_version = value,
            "client_id" | "clientid" => client_id = Some(value),
            "object_id" | "principal_id" => object_id = Some(value),
            // Resource ids are of a management plane that is not here: none is assigned.
            "mi_res_id" | "msi_res_id" => return Err(NOT_FOUND),
            _ => {}
        }
    }
    let resource = resource
        .filter(|text| (1..=MAX_RESOURCE).contains(&text.len()))
        .ok_or(denied(400, "invalid_request", "The resource is missing or too long"))?;
    Ok((Query { resource, client_id, object_id }, api_version))
}
