//! One request to one reply: name it was sent to, token, route, version, permission, action, audit.
//!
//! Synchronous; the server runs it on blocking threads. The order of the checks is part of the
//! protocol: clients send their first request without token and body and expect the challenge.

mod admin;
mod backup;
mod byok;
mod crypto;
mod deleted;
mod keys;
mod paging;
mod random;
mod rotation;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use serde::de::DeserializeOwned;
use serde_json::Value;
use url::form_urlencoded;

use super::access::{AccessControl, Denial, Needed};
use super::audit::{AuditLog, Event, Outcome};
use super::drill::{Asked, Delivery, Drills, Endpoint, Fault, delivery};
use super::host::{Hosts, Origin};
use super::limit::RateLimit;
use super::login::LoginRoute;
use super::material::KeyMaterial;
use super::network::NetworkDenial;
use super::refusal::Refusal;
use super::role;
use super::route::Route;
use super::seal::Sealer;
use super::settings::{Flavor, Settings};
use super::store::identities::{self, Identity};
use super::store::{Store, keys as key_store};
use super::token::TokenAuthority;
use super::wire::Wire;
use super::{Clock, codec};
use crate::error::Result;
use crate::sync::Mutex;

/// Of a request; only a restored key with very many versions comes near it.
pub(crate) const MAX_BODY: usize = 4 * 1024 * 1024;

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) host: String,
    /// The value of the `Authorization` header.
    pub(crate) authorization: Option<Authorization>,
    pub(crate) client_request_id: Option<String>,
    pub(crate) user_agent: Option<String>,
    pub(crate) client: Option<IpAddr>,
    pub(crate) body: Vec<u8>,
}

/// Not for logs.
pub(crate) struct Authorization(pub(crate) String);

impl std::fmt::Debug for Authorization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[authorization]")
    }
}

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    /// None: no content.
    pub(crate) body: Option<Vec<u8>>,
    pub(crate) delivery: Delivery,
}

/// The state behind the routes.
pub(crate) struct Vault {
    pub(crate) settings: Settings,
    pub(crate) store: Store,
    pub(crate) sealer: Sealer,
    pub(crate) tokens: TokenAuthority,
    pub(crate) access: AccessControl,
    pub(crate) hosts: Hosts,
    pub(crate) audit: AuditLog,
    pub(crate) clock: Clock,
    pub(crate) drills: Drills,
    pub(crate) limit: RateLimit,
    /// The identity of the host that the IMDS endpoint is of; None: there is no such endpoint.
    pub(crate) imds: Option<String>,
    /// Parsed keys by row id, so that an unwrap costs one RSA operation and nothing else.
    materials: Mutex<HashMap<i64, Arc<KeyMaterial>>>,
    /// RSA keys are made one at a time, so that making them leaves processors for using them.
    generating: Mutex<()>,
    /// Requests that make one, or wait to.
    generations: AtomicUsize,
}

/// The longest lifetime that `serve` takes, and a margin for clocks.
const LONGEST_TOKEN: i64 = 86400 + 3600;
/// Beyond this the cache starts over.
const CACHED_KEYS: usize = 256;

/// What `serve` decides.
#[derive(Debug, Clone, Default)]
pub(crate) struct Mode {
    pub(crate) drills: bool,
    /// Requests in ten seconds; None: any number.
    pub(crate) rate_limit: Option<u32>,
    pub(crate) imds: Option<String>,
}

/// What an action needs to know of the call it serves.
pub(crate) struct Call<'a> {
    pub(crate) request: &'a Request,
    pub(crate) origin: &'a Origin,
    query: Query,
    now: i64,
}

impl Vault {
    pub(crate) fn new(
        settings: Settings,
        store: Store,
        sealer: Sealer,
        tokens: TokenAuthority,
        audit: AuditLog,
        clock: Clock,
        mode: Mode,
    ) -> Result<Vault> {
        let drills = Drills::new(mode.drills);
        Ok(Vault {
            hosts: Hosts::new(&settings.name, settings.flavor, settings.host),
            access: AccessControl::load(&store)?,
            settings,
            store,
            sealer,
            tokens,
            audit,
            clock: drills.shifted(clock),
            drills,
            limit: RateLimit::new(mode.rate_limit),
            imds: mode.imds,
            materials: Mutex::default(),
            generating: Mutex::new(()),
            generations: AtomicUsize::new(0),
        })
    }

    /// Answers any request; never fails.
    pub(crate) fn handle(&self, request: &Request) -> Reply {
        let (start, now) = (Instant::now(), (self.clock)());
        let request_id = codec::new_uuid().unwrap_or_default();
        let mut event = Event::default();
        let origin = self.hosts.origin(&request.host);
        let login = origin.as_ref().zip(LoginRoute::parse(&request.path));
        let (mut reply, reason, description) = match login {
            Some((origin, route)) => {
                let (reply, reason) = self.login(request, origin, &route, now, &mut event);
                (reply, reason, String::new())
            }
            None => self.answer_keys(request, origin.as_ref(), now, &mut event),
        };
        let outcome = Outcome {
            status: reply.status,
            reason,
            description: &description,
            request_id: &request_id,
            client: request.client,
            user_agent: request.user_agent.as_deref(),
            target: origin.as_ref().map(|origin| format!("{}{}", origin.url, request.path)),
            api_version: event.api_version.clone(),
            duration: start.elapsed(),
        };
        self.audit.record(&event, &outcome, now);
        self.add_headers(request, &mut reply, request_id, start);
        reply
    }

    /// With the reason and the message of a refusal.
    fn answer_keys(
        &self,
        request: &Request,
        origin: Option<&Origin>,
        now: i64,
        event: &mut Event,
    ) -> (Reply, Option<&'static str>, String) {
        let mut faults = Vec::new();
        let answer = self.answer(request, origin, now, event, &mut faults);
        let (mut reply, reason, description) = match answer {
            Ok(reply) => (reply, None, String::new()),
            Err(refusal) => {
                let reply = self.refuse(origin, &refusal);
                (reply, Some(refusal.reason()), refusal.message)
            }
        };
        if !faults.is_empty() {
            event.drill = Some(faults.iter().map(|fault| fault.kind.name()).collect::<Vec<_>>());
            self.drill_answer(
                &faults,
                event.needed.map(|needed| needed.by_policy),
                now,
                &mut reply,
            );
            reply.delivery = delivery(&faults);
        }
        (reply, reason, description)
    }

    fn answer(
        &self,
        request: &Request,
        origin: Option<&Origin>,
        now: i64,
        event: &mut Event,
        faults: &mut Vec<Fault>,
    ) -> Result<Reply, Refusal> {
        let origin = origin.filter(|origin| !origin.is_login).ok_or_else(|| {
            Refusal::new(421, "BadParameter", "This vault does not answer to that host name.")
        })?;
        let route = Route::parse(&request.method, &request.path);
        let is_management = matches!(&route, Ok(Route::Admin(_)));
        if !is_management && !self.limit.take() {
            return Err(Refusal::throttled());
        }
        event.operation = "Authentication";
        let caller = self.authenticate(request, origin, now)?;
        event.caller = Some(Arc::clone(&caller));
        event.operation = "";
        let route = route?;
        event.operation = route.operation_name();
        let (key, version) = route.key();
        (event.key, event.version) = (key.map(Into::into), version.map(Into::into));
        let call = Call { request, origin, query: Query::parse(&request.query), now };
        match route.needs() {
            None => {
                if !caller.is_admin {
                    return Err(Refusal::not_an_administrator());
                }
            }
            Some(needed) => {
                event.needed = Some(needed);
                let operation = Some(needed.by_policy.name());
                *faults = self.drills.hit(Asked { endpoint: Endpoint::Vault, operation, key });
                event.api_version = Some(call.query.require_api_version()?.to_owned());
                if let Some(refusal) =
                    self.drill_refusal(faults, &call, &caller, needed.by_policy, key)
                {
                    return Err(refusal);
                }
                self.authorise(&call, &caller, needed, key)?;
            }
        }
        self.act(&call, route, event)
    }

    fn act(&self, call: &Call<'_>, route: Route, event: &mut Event) -> Result<Reply, Refusal> {
        match route {
            Route::ListKeys => self.list_keys(call, false),
            Route::ListDeleted => self.list_keys(call, true),
            Route::ListVersions { name } => self.list_versions(call, &name),
            Route::GetKey { name, version } => self.get_key(call, &name, version.as_deref(), event),
            Route::UpdateKey { name, version } => {
                self.update_key(call, &name, version.as_deref(), event)
            }
            Route::CreateKey { name } => self.create_key(call, &name, event),
            Route::ImportKey { name } => self.import_key(call, &name, event),
            Route::GetRotationPolicy { name } => self.get_rotation_policy(call, &name),
            Route::SetRotationPolicy { name } => self.set_rotation_policy(call, &name),
            Route::RotateKey { name } => self.rotate_key(call, &name, event),
            Route::DeleteKey { name } => self.delete_key(call, &name),
            Route::BackupKey { name } => self.backup_key(&name),
            Route::RestoreKey => self.restore_key(call, event),
            Route::Use { name, version, operation } => {
                self.use_key(call, &name, version.as_deref(), operation, event)
            }
            Route::GetDeleted { name } => self.get_deleted(call, &name),
            Route::RecoverDeleted { name } => self.recover_deleted(call, &name, event),
            Route::PurgeDeleted { name } => self.purge_deleted(&name),
            Route::Random => self.random(call),
            Route::Admin(route) => self.administer(call, route, event),
        }
    }

    /// Whose token this is; 401 for anything less than a good token of an identity that exists.
    fn authenticate(
        &self,
        request: &Request,
        origin: &Origin,
        now: i64,
    ) -> Result<Arc<Identity>, Refusal> {
        let Some(Authorization(header)) = &request.authorization else {
            return Err(Refusal::missing_token());
        };
        let token = match header.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
            _ => return Err(Refusal::missing_token()),
        };
        if token.is_empty() {
            return Err(Refusal::missing_token());
        }
        let access = self.access.current();
        let claims = self.tokens.verify(token, &access.tenant, &origin.resource, now)?;
        let identity = access.identity(&claims.oid);
        identity.filter(|identity| identity.client_id == claims.appid).ok_or_else(|| {
            Refusal::unauthorized("Error validating token: its identity does not exist.")
        })
    }

    fn authorise(
        &self,
        call: &Call<'_>,
        caller: &Identity,
        needed: Needed,
        key: Option<&str>,
    ) -> Result<(), Refusal> {
        let client = call.request.client;
        let Err(denial) = self.access.judge(caller, client, needed, key, call.now) else {
            return Ok(());
        };
        let (vault, location) = (self.settings.name.as_str(), self.settings.region.as_str());
        let principal = self.principal(caller);
        let hsm = self.settings.flavor == Flavor::Mhsm;
        Err(match denial {
            Denial::Policy => {
                Refusal::by_policy(&principal, needed.by_policy.name(), vault, location)
            }
            Denial::Role if hsm => Refusal::by_hsm_role(
                &role::data_action(needed.by_role, true),
                &key.map_or_else(|| "/keys".to_owned(), |key| format!("/keys/{key}")),
                &codec::new_uuid()?,
            ),
            Denial::Role => Refusal::by_role(
                &principal,
                &role::data_action(needed.by_role, false),
                &self.resource_id(key),
                vault,
                location,
            ),
            Denial::Network(NetworkDenial::Firewall) => {
                let client = client.map(|client| client.to_string()).unwrap_or_default();
                Refusal::by_firewall(&client, &principal, vault, location)
            }
            Denial::Network(NetworkDenial::PublicAccess) => {
                Refusal::by_connection(&principal, vault, location)
            }
        })
    }

    /// The caller as refusals name it.
    pub(crate) fn principal(&self, caller: &Identity) -> String {
        format!("appid={};oid={};iss={}", caller.client_id, caller.object_id, self.issuer())
    }

    pub(crate) fn resource_id(&self, key: Option<&str>) -> String {
        self.settings.resource_id(key)
    }

    fn refuse(&self, origin: Option<&Origin>, refusal: &Refusal) -> Reply {
        let hsm = self.settings.flavor == Flavor::Mhsm;
        let body = if hsm { refusal.flat_body() } else { refusal.body() };
        let mut reply = Reply::json(refusal.status, &body);
        if refusal.status == 401
            && let Some(origin) = origin
        {
            if hsm {
                reply.headers.clear();
                reply.body = Some(Vec::new());
            }
            reply.headers.push((
                "www-authenticate",
                format!(
                    "Bearer authorization=\"https://login.microsoftonline.com/{}\", \
                     resource=\"{}\"",
                    self.access.current().tenant,
                    origin.resource
                ),
            ));
        }
        if refusal.status == 429 {
            reply.headers.push(("retry-after", self.limit.retry_after().to_string()));
        }
        reply
    }

    fn add_headers(
        &self,
        request: &Request,
        reply: &mut Reply,
        request_id: String,
        start: Instant,
    ) {
        if !reply.headers.iter().any(|(name, _)| *name == "cache-control") {
            reply.headers.push(("cache-control", "no-cache".into()));
        }
        reply.headers.extend([
            ("x-ms-keyvault-region", self.settings.region.clone()),
            ("x-ms-request-id", request_id),
            ("x-content-type-options", "nosniff".into()),
            ("strict-transport-security", "max-age=31536000;includeSubDomains".into()),
        ]);
        match self.settings.flavor {
            Flavor::Vault => reply.headers.extend([
                ("pragma", "no-cache".into()),
                ("expires", "-1".into()),
                ("x-ms-keyvault-service-version", env!("CARGO_PKG_VERSION").into()),
            ]),
            Flavor::Mhsm => reply.headers.extend([
                ("x-ms-server-latency", start.elapsed().as_millis().to_string()),
                ("x-frame-options", "SAMEORIGIN".into()),
                ("content-security-policy", "default-src 'self'".into()),
            ]),
        }
        if self.drills.is_shifted()
            && let Some(date) = http_date((self.clock)())
        {
            reply.headers.push(("date", date));
        }
        if let Some(client) = request.client {
            let family = if client.is_ipv4() { "InterNetwork" } else { "InterNetworkV6" };
            reply.headers.push((
                "x-ms-keyvault-network-info",
                format!("conn_type=Ipv4;addr={client};act_addr_fam={family};"),
            ));
        }
        if let Some(id) = &request.client_request_id {
            reply.headers.push(("x-ms-client-request-id", id.clone()));
        }
    }

    fn wire<'a>(&'a self, call: &'a Call<'_>) -> Wire<'a> {
        Wire { origin: &call.origin.url, recovery: &self.settings.recovery }
    }

    /// Removes deleted keys whose retention is over.
    pub(crate) fn purge_due(&self) -> Result<()> {
        let now = (self.clock)();
        if !self.store.read(|tx| Ok::<_, crate::Error>(key_store::has_purge_due(tx, now)?))? {
            return Ok(());
        }
        let purged =
            self.store.write(|tx| Ok::<_, crate::Error>(key_store::purge_due(tx, now)?))?;
        self.forget_materials();
        for name in purged {
            log::info!("the retention of the deleted key {name} is over: purged");
        }
        Ok(())
    }

    /// Removes deleted identities whose tokens have all expired, and tries again to learn who may what.
    pub(crate) fn forget_due(&self) -> Result<()> {
        let now = (self.clock)();
        self.access.recover(&self.store, now)?;
        let then = now - LONGEST_TOKEN;
        if self.access.current().has_deleted_before(then) {
            self.store.write(|tx| Ok::<_, crate::Error>(identities::forget_deleted(tx, then)?))?;
            self.access.reload(&self.store, now)?;
        }
        Ok(())
    }

    fn forget_materials(&self) {
        self.materials.lock().clear();
    }

    fn remember_material(&self, id: i64, key: Arc<KeyMaterial>) {
        let mut keys = self.materials.lock();
        if keys.len() >= CACHED_KEYS {
            keys.clear();
        }
        keys.insert(id, key);
    }
}

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vault").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// As `Date` headers have it.
fn http_date(now: i64) -> Option<String> {
    let format = time::macros::format_description!(
        "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
    );
    time::OffsetDateTime::from_unix_timestamp(now).ok()?.format(format).ok()
}

impl Reply {
    pub(crate) fn json(status: u16, body: &Value) -> Reply {
        Reply {
            status,
            headers: vec![("content-type", "application/json; charset=utf-8".into())],
            body: Some(body.to_string().into_bytes()),
            delivery: Delivery::default(),
        }
    }

    pub(crate) fn ok(body: &Value) -> Reply {
        Reply::json(200, body)
    }

    fn no_content() -> Reply {
        Reply { status: 204, headers: Vec::new(), body: None, delivery: Delivery::default() }
    }
}

impl Call<'_> {
    fn body<T: DeserializeOwned>(&self) -> Result<T, Refusal> {
        // The parser's message is not passed on: it could quote a value.
        serde_json::from_slice(&self.request.body).map_err(|_| {
            Refusal::bad_parameter("The request body is not valid JSON for this operation.")
        })
    }
}

struct Query {
    api_version: Option<String>,
    max_results: Option<String>,
    skip_token: Option<String>,
}

impl Query {
    fn parse(text: &str) -> Query {
        let mut query = Query { api_version: None, max_results: None, skip_token: None };
        for (name, value) in form_urlencoded::parse(text.as_bytes()) {
            match name.to_ascii_lowercase().as_str() {
                "api-version" => query.api_version = Some(value.into_owned()),
                "maxresults" => query.max_results = Some(value.into_owned()),
                "$skiptoken" => query.skip_token = Some(value.into_owned()),
                _ => {}
            }
        }
        query
    }

    /// Versions this vault does not know are taken: a new client must not break on a date.
    fn require_api_version(&self) -> Result<&str, Refusal> {
        let version = self.api_version.as_deref().unwrap_or_default();
        let plausible = (1..=32).contains(&version.len())
            && version.starts_with(|first: char| first.is_ascii_digit())
            && version
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'));
        if plausible {
            Ok(version)
        } else {
            Err(Refusal::bad_parameter("api-version must be specified."))
        }
    }
}

#[cfg(test)]
mod tests;
