//! The vault's answers under a clock that a test moves.

use std::sync::atomic::{AtomicI64, Ordering};

use serde_json::json;

use super::*;
use crate::crypto::secret::Secret;
use crate::vault::store::{self, identities};
use crate::vault::token::Subject;
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
            flavor: Flavor::Vault,
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
            header_sha256: Some([0; 32]),
            tenant: "t".into(),
            permissions: Default::default(),
            is_admin: true,
            enabled: true,
            deleted: None,
            created: 0,
        };
        store
            .write(|tx| {
                store::set_setting(tx, "tenant", "t")?;
                Ok::<_, crate::Error>(identities::insert(tx, &admin)?)
            })
            .unwrap();
        let key = crate::vault::token::new_signing_key().unwrap();
        let tokens = TokenAuthority::new(&key, 1000 * DAY).unwrap();
        let audit = AuditLog::open(&dir.path().join("audit.jsonl"), String::new()).unwrap();
        let now = Arc::new(AtomicI64::new(1_800_000_000));
        let clock = Arc::clone(&now);
        let vault = Vault::new(
            settings,
            store,
            Sealer::new(Secret::random().unwrap(), "id"),
            tokens,
            audit,
            Arc::new(move || clock.load(Ordering::Relaxed)),
            Mode::default(),
        )
        .unwrap();
        Bench { dir, vault, now }
    }

    fn pass(&self, seconds: i64) {
        self.now.fetch_add(seconds, Ordering::Relaxed);
        self.vault.forget_due().unwrap();
        self.vault.purge_due().unwrap();
        self.vault.rotate_due().unwrap();
    }

    fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let now = self.now.load(Ordering::Relaxed);
        let subject = Subject { object_id: "oid", client_id: "app", tenant: "t" };
        let (token, _) = self.vault.tokens.issue(subject, "https://127.0.0.1", now).unwrap();
        let reply = self.vault.handle(&Request {
            method: method.into(),
            path: path.into(),
            query: "api-version=7.4".into(),
            host: "127.0.0.1".into(),
            authorization: Some(Authorization(format!("Bearer {token}"))),
            client_request_id: None,
            user_agent: None,
            client: None,
            body: body.to_string().into_bytes(),
        });
        let body = reply.body.map_or(Value::Null, |body| serde_json::from_slice(&body).unwrap());
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
    let lifetime = attributes["exp"].as_i64().unwrap() - attributes["created"].as_i64().unwrap();
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
    bench.vault.forget_materials();
    let body = json!({ "alg": "RSA-OAEP-256", "value": "AAAA" });
    let (status, said) = bench.call("POST", "/keys/kek/wrapkey", body);
    assert_eq!((status, &said["error"]["code"]), (500, &json!("InternalServerError")));
}

#[test]
fn an_identity_whose_tokens_were_kept_is_forgotten_when_they_have_ended() {
    let bench = Bench::new();
    let body = json!({ "name": "db" });
    assert_eq!(bench.call("POST", "/byokfs/identities", body).0, 200);
    let keep = json!({ "keepTokens": true });
    let (status, gone) = bench.call("DELETE", "/byokfs/identities/db", keep);
    assert_eq!(status, 200);
    let object_id = gone["principalId"].as_str().unwrap();
    bench.pass(DAY);
    assert!(bench.vault.access.current().identity(object_id).is_some());
    bench.pass(DAY);
    assert!(bench.vault.access.current().identity(object_id).is_none());
}

#[test]
fn what_is_backed_up_can_be_restored() {
    let bench = Bench::new();
    bench.call("POST", "/keys/kek/create", json!({ "kty": "RSA" }));
    let tags = (0..15).map(|number| (format!("{number:0256}"), "v".repeat(256))).collect();
    let backup = |versions: usize| {
        bench
            .vault
            .store
            .write(|tx| {
                let Some(key) = key_store::find(tx, "kek")? else { panic!("no key") };
                let Some(mut version) = key_store::find_version(tx, &key, None)? else {
                    panic!("no version")
                };
                version.tags = std::collections::BTreeMap::clone(&tags);
                for _ in 0..versions {
                    version.version = codec::new_version()?;
                    let private = bench.vault.sealer.seal_private("kek", &version.version, &[1])?;
                    key_store::insert_version(tx, &key, &mut version, &private)?;
                }
                Ok::<_, crate::Error>(())
            })
            .unwrap();
        bench.call("POST", "/keys/kek/backup", json!({}))
    };
    let (status, value) = backup(100);
    assert_eq!(status, 200);
    assert!(value.to_string().len() <= MAX_BODY);
    assert_eq!(backup(390).0, 400);
}
