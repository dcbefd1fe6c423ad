//! `kill -9` while keys, identities and permissions change: what was acknowledged is there, what
//! was not is there whole or not at all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Answer, Server, Vault, b64};

const ROUNDS: u64 = 12;
const DEK: [u8; 32] = [0x42; 32];

/// What the vault acknowledged, and what it may or may not have done.
#[derive(Default)]
struct Ledger {
    /// Key name -> key id of each acknowledged version, and what it wrapped.
    versions: BTreeMap<String, Vec<(String, Value)>>,
    /// The tag last acknowledged on the key `steady`, and the last one asked for.
    tag: u64,
    tag_asked: u64,
    /// Is `deletable` deleted? None: asked, not acknowledged.
    deleted: Option<bool>,
    identities: Vec<String>,
    /// Requests sent so far: the killer goes by it, not by a clock that a busy machine slows.
    sent: Arc<AtomicU64>,
}

impl Ledger {
    fn send(
        &self,
        (server, admin): (&Server, &str),
        method: &str,
        path: &str,
        body: &Value,
    ) -> Result<Value, ureq::Error> {
        self.sent.fetch_add(1, Ordering::SeqCst);
        server.try_call(admin, method, path, body).map(Answer::ok)
    }
}

/// Changes things until the server is gone.
fn work(server: &Server, admin: &str, round: u64, ledger: &mut Ledger) -> Result<(), ureq::Error> {
    let at = (server, admin);
    for step in 0.. {
        let name = format!("k{}", (round + step) % 5);
        let body = json!({ "kty": "RSA", "key_size": 2048 });
        let made = ledger.send(at, "POST", &format!("/keys/{name}/create"), &body)?;
        let kid = made["key"]["kid"].as_str().unwrap().to_owned();
        let versions = ledger.versions.entry(name.clone()).or_default();
        versions.push((kid.clone(), Value::Null));
        let path = kid.strip_prefix(&server.url).unwrap();
        let body = json!({ "alg": "RSA-OAEP-256", "value": b64(&DEK) });
        let wrapped = ledger.send(at, "POST", &format!("{path}/wrapkey"), &body)?;
        if let Some(last) = ledger.versions.get_mut(&name).and_then(|list| list.last_mut()) {
            last.1 = wrapped["value"].clone();
        }
        for _ in 0..5 {
            ledger.tag_asked += 1;
            let body = json!({ "tags": { "n": ledger.tag_asked.to_string() } });
            ledger.send(at, "PATCH", "/keys/steady", &body)?;
            ledger.tag = ledger.tag_asked;
        }
        let (method, path, then) = match ledger.deleted {
            Some(true) => ("POST", "/deletedkeys/deletable/recover", false),
            _ => ("DELETE", "/keys/deletable", true),
        };
        ledger.deleted = None;
        ledger.send(at, method, path, &json!({}))?;
        ledger.deleted = Some(then);
        let name = format!("i-{round}-{step}");
        let hash = [(round * 31 + step) as u8, round as u8, step as u8].repeat(11);
        let body = json!({ "name": name, "headerSha256": b64(&hash[..32]) });
        ledger.send(at, "POST", "/byokfs/identities", &body)?;
        ledger.identities.push(name);
    }
    Ok(())
}

fn check(server: &Server, admin: &str, ledger: &mut Ledger) {
    for (name, versions) in &ledger.versions {
        let newest = server.call(admin, "GET", &format!("/keys/{name}"), Value::Null).ok();
        assert!(newest["key"]["n"].is_string());
        for (kid, wrapped) in versions {
            let path = kid.strip_prefix(&server.url).unwrap();
            let bundle = server.call(admin, "GET", path, Value::Null).ok();
            assert_eq!(bundle["key"]["kid"], kid.as_str());
            if wrapped.is_string() {
                let body = json!({ "alg": "RSA-OAEP-256", "value": wrapped });
                let opened = server.call(admin, "POST", &format!("{path}/unwrapkey"), body).ok();
                assert_eq!(opened["value"], b64(&DEK).as_str());
            }
        }
    }
    // Whatever was made without an answer is whole: listed, shown and usable.
    let all = server.call(admin, "GET", "/keys", Value::Null).ok();
    for item in all["value"].as_array().unwrap() {
        let path = item["kid"].as_str().unwrap().strip_prefix(&server.url).unwrap().to_owned();
        let body = json!({ "alg": "RSA-OAEP-256", "value": b64(&DEK) });
        let wrapped = server.call(admin, "POST", &format!("{path}/wrapkey"), body).ok();
        let body = json!({ "alg": "RSA-OAEP-256", "value": wrapped["value"] });
        server.call(admin, "POST", &format!("{path}/unwrapkey"), body).ok();
    }
    let steady = server.call(admin, "GET", "/keys/steady", Value::Null).ok();
    let tag: u64 = steady["tags"]["n"].as_str().unwrap().parse().unwrap();
    assert!((ledger.tag..=ledger.tag_asked).contains(&tag), "{tag}");
    let live = server.call(admin, "GET", "/keys/deletable", Value::Null).status == 200;
    let gone = server.call(admin, "GET", "/deletedkeys/deletable", Value::Null).status == 200;
    assert_ne!(live, gone);
    if let Some(deleted) = ledger.deleted {
        assert_eq!(gone, deleted);
    }
    (ledger.tag, ledger.deleted) = (tag, Some(gone));
    let identities = server.call(admin, "GET", "/byokfs/identities", Value::Null).ok();
    let names: Vec<&str> = identities["value"]
        .as_array()
        .unwrap()
        .iter()
        .map(|identity| identity["name"].as_str().unwrap())
        .collect();
    for name in &ledger.identities {
        assert!(names.contains(&name.as_str()), "the identity {name} is gone");
    }
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    let vault = Vault::new(&[]);
    let mut ledger = Ledger { deleted: Some(false), ..Ledger::default() };
    let server = vault.serve();
    let admin = server.admin();
    server.create_key(&admin, "deletable");
    server.create_key(&admin, "steady");
    server.call(&admin, "PATCH", "/keys/steady", json!({ "tags": { "n": "0" } })).ok();
    let url = server.url.clone();
    let mut server = server;
    for round in 0..ROUNDS {
        let pid = rustix::process::Pid::from_raw(server.pid()).unwrap();
        let sent = Arc::clone(&ledger.sent);
        // In another place each round; within a request by a delay of its own.
        let enough = sent.load(Ordering::SeqCst) + 1 + (round * 5) % 23;
        let killer = std::thread::spawn(move || {
            while sent.load(Ordering::SeqCst) < enough {
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(Duration::from_micros((round * 3571) % 25_000));
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        });
        assert!(work(&server, &admin, round, &mut ledger).is_err());
        killer.join().unwrap();
        server.kill();
        server = vault.serve();
        assert_eq!(server.url, url, "the port changed");
        check(&server, &admin, &mut ledger);
    }
    assert!(ledger.versions.values().map(Vec::len).sum::<usize>() > 5);
}
