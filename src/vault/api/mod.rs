//! One request to one reply: name it was sent to, token, route, version, permission, action, audit.
//!
//! Synchronous; the server runs it on blocking threads. The order of the checks is part of the
//! protocol: clients send their first request without token and body and expect the challenge.

mod admin;
mod backup;
mod crypto;
mod deleted;
mod keys;
mod paging;
mod rotation;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde_json::Value;
use url::form_urlencoded;

use super::audit::{AuditLog, Event, Outcome};
use super::host::{Hosts, Origin};
use super::material::PrivateKey;
use super::permission::Permission;
use super::refusal::Refusal;
use super::route::Route;
use super::seal::Sealer;
use super::settings::Settings;
use super::store::identities::{self, Identity};
use super::store::{Store, keys as key_store};
use super::token::TokenAuthority;
use super::wire::Wire;
use super::{Clock, codec};
use crate::error::Result;

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) host: String,
    /// The value of the `Authorization` header.
    pub(crate) authorization: Option<Authorization>,
    pub(crate) client_request_id: Option<String>,
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
}

/// The state behind the routes.
pub(crate) struct Vault {
    pub(crate) settings: Settings,
    pub(crate) store: Store,
    pub(crate) sealer: Sealer,
    pub(crate) tokens: TokenAuthority,
    pub(crate) hosts: Hosts,
    pub(crate) audit: AuditLog,
    pub(crate) clock: Clock,
    /// Parsed private keys by row id, so that an unwrap costs one RSA operation and nothing else.
    private_keys: Mutex<HashMap<i64, Arc<PrivateKey>>>,
    /// RSA keys are made one at a time, so that making them leaves processors for using them.
    generating: Mutex<()>,
    /// Requests that make one, or wait to.
    generations: AtomicUsize,
}

/// Beyond this the cache starts over.
const CACHED_KEYS: usize = 256;

/// What an action needs to know of the call it serves.
struct Call<'a> {
    request: &'a Request,
    origin: &'a Origin,
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
    ) -> Vault {
        Vault {
            hosts: Hosts::new(&settings.name, settings.host),
            settings,
            store,
            sealer,
            tokens,
            audit,
            clock,
            private_keys: Mutex::default(),
            generating: Mutex::new(()),
            generations: AtomicUsize::new(0),
        }
    }

    /// Answers any request; never fails.
    pub(crate) fn handle(&self, request: &Request) -> Reply {
        let now = (self.clock)();
        let request_id = codec::new_uuid().unwrap_or_default();
        let mut event = Event::default();
        let answer = self.answer(request, now, &mut event);
        let (mut reply, reason) = match answer {
            Ok(reply) => (reply, None),
            Err(refusal) => (self.refuse(request, &refusal), Some(refusal.reason())),
        };
        let outcome = Outcome {
            status: reply.status,
            reason,
            request_id: &request_id,
            client: request.client.map(|address| address.to_string()),
        };
        self.audit.record(&event, &outcome, now);
        self.add_headers(request, &mut reply, request_id);
        reply
    }

    fn answer(&self, request: &Request, now: i64, event: &mut Event) -> Result<Reply, Refusal> {
        let origin = self.hosts.origin(&request.host).ok_or_else(|| {
            Refusal::new(421, "BadParameter", "This vault does not answer to that host name.")
        })?;
        let caller = self.authenticate(request, &origin, now)?;
        event.caller = Some(caller.clone());
        let route = Route::parse(&request.method, &request.path)?;
        event.operation = route.operation_name();
        let (key, version) = route.key();
        (event.key, event.version) = (key.map(Into::into), version.map(Into::into));
        let call = Call { request, origin: &origin, query: Query::parse(&request.query), now };
        match route.permission() {
            None => {
                if !caller.is_admin {
                    return Err(Refusal::not_an_administrator());
                }
            }
            Some(permission) => {
                call.query.require_api_version()?;
                self.authorise(&caller, permission)?;
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
            Route::Admin(route) => self.administer(call, route, event),
        }
    }

    /// Whose token this is; 401 for anything less than a good token of an identity that exists.
    fn authenticate(
        &self,
        request: &Request,
        origin: &Origin,
        now: i64,
    ) -> Result<Identity, Refusal> {
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
        let claims = self.tokens.verify(token, &origin.resource, now)?;
        let identity: Option<Identity> = self
            .store
            .read(|tx| Ok::<_, Refusal>(identities::find_by_object_id(tx, &claims.oid)?))?;
        identity.filter(|identity| identity.client_id == claims.appid).ok_or_else(|| {
            Refusal::unauthorized("Error validating token: its identity does not exist.")
        })
    }

    fn authorise(&self, caller: &Identity, permission: Permission) -> Result<(), Refusal> {
        if caller.is_admin || caller.permissions.contains(permission) {
            return Ok(());
        }
        let principal = format!(
            "appid={};oid={};iss={}",
            caller.client_id,
            caller.object_id,
            self.tokens.issuer()
        );
        let Settings { name, region, .. } = &self.settings;
        Err(Refusal::by_policy(&principal, permission.name(), name, region))
    }

    fn refuse(&self, request: &Request, refusal: &Refusal) -> Reply {
        let mut reply = Reply::json(refusal.status, &refusal.body());
        if refusal.status == 401
            && let Some(origin) = self.hosts.origin(&request.host)
        {
            reply.headers.push((
                "www-authenticate",
                format!(
                    "Bearer authorization=\"https://login.microsoftonline.com/{}\", \
                     resource=\"{}\"",
                    self.settings.tenant, origin.resource
                ),
            ));
        }
        if refusal.status == 429 {
            reply.headers.push(("retry-after", "1".into()));
        }
        reply
    }

    fn add_headers(&self, request: &Request, reply: &mut Reply, request_id: String) {
        reply.headers.extend([
            ("cache-control", "no-cache".into()),
            ("pragma", "no-cache".into()),
            ("expires", "-1".into()),
            ("x-ms-keyvault-region", self.settings.region.clone()),
            ("x-ms-keyvault-service-version", env!("CARGO_PKG_VERSION").into()),
            ("x-ms-request-id", request_id),
            ("x-content-type-options", "nosniff".into()),
            ("strict-transport-security", "max-age=31536000;includeSubDomains".into()),
        ]);
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
        self.forget_private_keys();
        for name in purged {
            log::info!("the retention of the deleted key {name} is over: purged");
        }
        Ok(())
    }

    fn forget_private_keys(&self) {
        self.private_keys.lock().clear();
    }

    fn remember_private_key(&self, id: i64, key: Arc<PrivateKey>) {
        let mut keys = self.private_keys.lock();
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

impl Reply {
    fn json(status: u16, body: &Value) -> Reply {
        Reply {
            status,
            headers: vec![("content-type", "application/json; charset=utf-8".into())],
            body: Some(body.to_string().into_bytes()),
        }
    }

    fn ok(body: &Value) -> Reply {
        Reply::json(200, body)
    }

    fn no_content() -> Reply {
        Reply { status: 204, headers: Vec::new(), body: None }
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
mod tests {
    use std::sync::atomic::{AtomicI64, Ordering};

    use serde_json::json;

    use super::*;
    use crate::crypto::secret::Secret;
    use crate::vault::store;
    use crate::vault::wire::Recovery;

    const DAY: i64 = 86400;

    /// A vault in a directory of its own, whose clock a test moves.
    struct Bench {
        dir: tempfile::TempDir,
        vault: Vault,
        now: Arc<AtomicI64>,
    }

    impl Bench {
        fn new() -> Bench {
            let (dir, store) = store::tests::store();
            let settings = Settings {
                vault_id: "id".into(),
                name: "kv1".into(),
                tenant: "t".into(),
                region: "local".into(),
                recovery: Recovery { days: 7, purge_protection: true },
                host: IpAddr::from([127, 0, 0, 1]),
                port: 0,
                identity_port: 0,
                ca_pem: String::new(),
            };
            let admin = Identity {
                name: identities::ADMIN.into(),
                object_id: "oid".into(),
                client_id: "app".into(),
                header_sha256: [0; 32],
                permissions: Default::default(),
                is_admin: true,
                created: 0,
            };
            store.write(|tx| Ok::<_, crate::Error>(identities::insert(tx, &admin)?)).unwrap();
            let key = super::super::token::new_signing_key().unwrap();
            let tokens = TokenAuthority::new(&key, "t", 1000 * DAY).unwrap();
            let audit = AuditLog::open(&dir.path().join("audit.jsonl")).unwrap();
            let now = Arc::new(AtomicI64::new(1_800_000_000));
            let clock = Arc::clone(&now);
            let vault = Vault::new(
                settings,
                store,
                Sealer::new(Secret::random().unwrap(), "id"),
                tokens,
                audit,
                Arc::new(move || clock.load(Ordering::Relaxed)),
            );
            Bench { dir, vault, now }
        }

        fn pass(&self, seconds: i64) {
            self.now.fetch_add(seconds, Ordering::Relaxed);
            self.vault.purge_due().unwrap();
            self.vault.rotate_due().unwrap();
        }

        fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
            let now = self.now.load(Ordering::Relaxed);
            let (token, _) =
                self.vault.tokens.issue("oid", "app", "https://127.0.0.1", now).unwrap();
            let reply = self.vault.handle(&Request {
                method: method.into(),
                path: path.into(),
                query: "api-version=7.4".into(),
                host: "127.0.0.1".into(),
                authorization: Some(Authorization(format!("Bearer {token}"))),
                client_request_id: None,
                client: None,
                body: body.to_string().into_bytes(),
            });
            let body =
                reply.body.map_or(Value::Null, |body| serde_json::from_slice(&body).unwrap());
            (reply.status, body)
        }

        fn versions(&self) -> usize {
            let (_, list) = self.call("GET", "/keys/kek/versions", Value::Null);
            list["value"].as_array().map_or(0, Vec::len)
        }
    }

    #[test]
    fn a_deleted_key_is_purged_when_its_retention_ends() {
        let bench = Bench::new();
        bench.call("POST", "/keys/kek/create", json!({ "kty": "RSA" }));
        assert_eq!(bench.call("DELETE", "/keys/kek", Value::Null).0, 200);
        bench.pass(7 * DAY - 1);
        assert_eq!(bench.call("GET", "/deletedkeys/kek", Value::Null).0, 200);
        bench.pass(1);
        assert_eq!(bench.call("GET", "/deletedkeys/kek", Value::Null).0, 404);
        assert_eq!(bench.call("POST", "/keys/kek/create", json!({ "kty": "RSA" })).0, 200);
    }

    #[test]
    fn a_policy_rotates_each_version_once_and_no_disabled_key() {
        let bench = Bench::new();
        bench.call("POST", "/keys/kek/create", json!({ "kty": "RSA" }));
        let policy = json!({
            "lifetimeActions": [
                { "trigger": { "timeAfterCreate": "P30D" }, "action": { "type": "Rotate" } },
            ],
            "attributes": { "expiryTime": "P60D" },
        });
        assert_eq!(bench.call("PUT", "/keys/kek/rotationpolicy", policy).0, 200);
        bench.pass(30 * DAY - 1);
        assert_eq!(bench.versions(), 1);
        bench.pass(1);
        bench.pass(1);
        assert_eq!(bench.versions(), 2);
        let (_, newest) = bench.call("GET", "/keys/kek", Value::Null);
        let attributes = &newest["attributes"];
        let lifetime =
            attributes["exp"].as_i64().unwrap() - attributes["created"].as_i64().unwrap();
        assert_eq!(lifetime, 60 * DAY);
        let off = json!({ "attributes": { "enabled": false } });
        bench.call("PATCH", "/keys/kek", off);
        bench.pass(100 * DAY);
        assert_eq!(bench.versions(), 2);
        let audit = std::fs::read_to_string(bench.dir.path().join("audit.jsonl")).unwrap();
        assert_eq!(audit.matches("KeyRotateByPolicy").count(), 1);
    }

    #[test]
    fn dates_are_the_clocks_to_the_second() {
        let bench = Bench::new();
        let now = bench.now.load(Ordering::Relaxed);
        let attributes = json!({ "nbf": now + 10, "exp": now + 20 });
        let body = json!({ "kty": "RSA", "attributes": attributes });
        bench.call("POST", "/keys/kek/create", body);
        let wrap = || {
            let body = json!({ "alg": "RSA-OAEP-256", "value": "AAAA" });
            bench.call("POST", "/keys/kek/wrapkey", body).0
        };
        let mut seen = Vec::new();
        for _ in 0..4 {
            seen.push(wrap());
            bench.pass(9);
            seen.push(wrap());
            bench.pass(1);
        }
        assert_eq!(seen[..6], [403, 403, 200, 200, 403, 403]);
    }

    #[test]
    fn a_private_key_changed_on_disk_is_not_used() {
        let bench = Bench::new();
        bench.call("POST", "/keys/kek/create", json!({ "kty": "RSA" }));
        let damage = "UPDATE version SET private = zeroblob(length(private))";
        bench.vault.store.write(|tx| Ok::<_, crate::Error>(tx.execute_batch(damage)?)).unwrap();
        bench.vault.forget_private_keys();
        let body = json!({ "alg": "RSA-OAEP-256", "value": "AAAA" });
        let (status, said) = bench.call("POST", "/keys/kek/wrapkey", body);
        assert_eq!((status, &said["error"]["code"]), (500, &json!("InternalServerError")));
    }
}
