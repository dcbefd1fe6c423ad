//! The managed identity endpoint, as App Service has it: header secret in, access token out.
//!
//! Plain http, so on loopback only; the header secret says whose token is wanted.

use std::net::IpAddr;

use aws_lc_rs::digest::{SHA256, digest};
use serde_json::json;
use url::form_urlencoded;

use super::api::{Reply, Vault};
use super::audit::{Event, Outcome};
use super::store::identities;
use super::wire::TokenReply;
use super::{codec, refusal::Refusal};

/// Where it is, below the identity endpoint's origin.
pub(crate) const PATH: &str = "/msi/token";
const KNOWN_API_VERSIONS: [&str; 2] = ["2019-08-01", "2017-09-01"];
const MAX_RESOURCE: usize = 512;

#[derive(Debug)]
pub(crate) struct TokenRequest {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) header: Option<HeaderSecret>,
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

struct Denied {
    status: u16,
    error: &'static str,
    description: &'static str,
}

const fn denied(status: u16, error: &'static str, description: &'static str) -> Denied {
    Denied { status, error, description }
}

impl Vault {
    pub(crate) fn token(&self, request: &TokenRequest) -> Reply {
        let mut event = Event { operation: "TokenIssue", ..Event::default() };
        let answer = self.issue_token(request, &mut event);
        let (status, reason, body) = match answer {
            Ok(body) => (200, None, body),
            Err(Denied { status, error, description }) => (
                status,
                Some(error),
                json!({ "error": error, "error_description": description }).to_string(),
            ),
        };
        let request_id = codec::new_uuid().unwrap_or_default();
        let outcome = Outcome {
            status,
            reason,
            request_id: &request_id,
            client: Some(request.client.to_string()),
        };
        self.audit.record(&event, &outcome, (self.clock)());
        Reply {
            status,
            headers: vec![
                ("content-type", "application/json; charset=utf-8".into()),
                ("cache-control", "no-store".into()),
            ],
            body: Some(body.into_bytes()),
        }
    }

    fn issue_token(&self, request: &TokenRequest, event: &mut Event) -> Result<String, Denied> {
        if !request.path.trim_end_matches('/').eq_ignore_ascii_case(PATH) {
            return Err(denied(404, "not_found", "There is no such endpoint"));
        }
        if request.method != "GET" {
            return Err(denied(405, "invalid_request", "Only GET is allowed"));
        }
        let HeaderSecret(secret) = request.header.as_ref().ok_or(denied(
            401,
            "invalid_request",
            "The X-IDENTITY-HEADER is missing",
        ))?;
        let (mut resource, mut api_version, mut client_id) = (None, None, None);
        for (name, value) in form_urlencoded::parse(request.query.as_bytes()) {
            match name.to_ascii_lowercase().as_str() {
                "resource" => resource = Some(value.into_owned()),
                "api-version" => api_version = Some(value.into_owned()),
                "client_id" | "clientid" => client_id = Some(value.into_owned()),
                _ => {}
            }
        }
        if !api_version.is_some_and(|version| KNOWN_API_VERSIONS.contains(&version.as_str())) {
            return Err(denied(400, "invalid_request", "The api-version is missing or unknown"));
        }
        let resource = resource
            .filter(|text| (1..=MAX_RESOURCE).contains(&text.len()))
            .ok_or(denied(400, "invalid_request", "The resource is missing or too long"))?;

        let internal = |_: Refusal| denied(500, "server_error", "See the vault's log");
        let hash = header_sha256(secret);
        let identity = self
            .store
            .read(|tx| Ok::<_, Refusal>(identities::find_by_header(tx, &hash)?))
            .map_err(internal)?
            // A client id asks for one of several identities; this header has one.
            .filter(|identity| {
                client_id.as_ref().is_none_or(|id| id.eq_ignore_ascii_case(&identity.client_id))
            })
            .ok_or(denied(400, "invalid_request", "Identity not found"))?;
        event.caller = Some(identity.clone());
        let (token, expires_on) = self
            .tokens
            .issue(&identity.object_id, &identity.client_id, &resource, (self.clock)())
            .map_err(|error| internal(error.into()))?;
        let reply = TokenReply {
            access_token: &token,
            expires_on: expires_on.to_string(),
            resource: &resource,
            token_type: "Bearer",
            client_id: &identity.client_id,
        };
        serde_json::to_string(&reply).map_err(|error| {
            log::error!("cannot write a token reply: {error}");
            denied(500, "server_error", "See the vault's log")
        })
    }
}
