//! Every fault shows what it says, where it says, as often as it says, and ends when it is cleared.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{
    Answer, Server, Vault, b64, clear_faults, fault, identity, now, revoke, text,
};

struct Stage {
    vault: Vault,
    server: Server,
    token: String,
    wrapped: Value,
}

impl Stage {
    fn new() -> Stage {
        let vault = Vault::new(&["--name", "kv1"]);
        let server = vault.serve_with(&["--drills"]);
        server.create_key(&server.admin(), "kek");
        let token = identity(&vault, &server, "db", "all");
        let wrapped = wrap(&server, &token).ok()["value"].clone();
        Stage { vault, server, token, wrapped }
    }

    fn get(&self) -> Answer {
        self.server.call(&self.token, "GET", "/keys/kek", Value::Null)
    }

    fn unwrap(&self) -> Answer {
        let body = json!({ "alg": "RSA-OAEP-256", "value": self.wrapped });
        self.server.call(&self.token, "POST", "/keys/kek/unwrapkey", body)
    }

    fn is_well(&self) {
        let bundle = self.get().ok();
        assert_eq!(bundle["attributes"]["enabled"], true);
        assert_eq!(self.unwrap().ok()["value"], b64(&[7; 32]).as_str());
        wrap(&self.server, &self.token).ok();
    }
}

fn wrap(server: &Server, token: &str) -> Answer {
    let body = json!({ "alg": "RSA-OAEP-256", "value": b64(&[7; 32]) });
    server.call(token, "POST", "/keys/kek/wrapkey", body)
}

/// Status and codes, in one.
fn shape(answer: &Answer) -> String {
    format!("{} {}", answer.status, answer.code())
}

#[test]
fn every_condition_of_a_key_shows_as_at_the_service() {
    let stage = Stage::new();
    // Fault, then what get, wrap and unwrap answer.
    for (kind, get, wrapped, unwrapped) in [
        ("key-disabled", "200 -", "403 Forbidden/KeyDisabled", "403 Forbidden/KeyDisabled"),
        ("key-expired", "200 -", "403 Forbidden/KeyExpired", "200 -"),
        ("key-not-yet-valid", "200 -", "403 Forbidden/KeyNotYetValid", "200 -"),
        ("key-deleted", "404 KeyNotFound", "404 KeyNotFound", "404 KeyNotFound"),
        ("bad-parameter", "200 -", "200 -", "400 BadParameter"),
        ("other-key", "200 -", "200 -", "200 -"),
    ] {
        fault(&stage.vault, &[kind]);
        let bundle = stage.get();
        assert_eq!(shape(&bundle), get, "{kind}");
        let attributes = &bundle.body["attributes"];
        match kind {
            "key-disabled" => assert_eq!(attributes["enabled"], false),
            "key-expired" => assert!(attributes["exp"].as_i64().unwrap() < now()),
            "key-not-yet-valid" => assert!(attributes["nbf"].as_i64().unwrap() > now()),
            _ => {}
        }
        assert_eq!(shape(&wrap(&stage.server, &stage.token)), wrapped, "{kind}");
        let opened = stage.unwrap();
        assert_eq!(shape(&opened), unwrapped, "{kind}");
        if kind == "other-key" {
            assert_ne!(opened.body["value"], b64(&[7; 32]).as_str());
        }
        clear_faults(&stage.vault);
        stage.is_well();
    }
    for (kind, expected) in [
        ("being-deleted", "409 Conflict/ObjectIsBeingDeleted"),
        ("being-recovered", "409 Conflict/ObjectIsBeingRecovered"),
        ("forbidden-by-policy", "403 Forbidden/ForbiddenByPolicy"),
        ("access-denied", "403 Forbidden/AccessDenied"),
        ("forbidden-by-rbac", "403 Forbidden/ForbiddenByRbac"),
        ("forbidden-by-firewall", "403 Forbidden/ForbiddenByFirewall"),
        ("forbidden-by-connection", "403 Forbidden/ForbiddenByConnection"),
        ("hsm-access-denied", "403 AccessDenied"),
        ("other-tenant", "401 Unauthorized"),
        ("wrong-audience", "401 Unauthorized"),
        ("token-expired", "401 Unauthorized"),
        ("throttled", "429 Throttled"),
        ("status", "503 ServiceUnavailable"),
        ("proxy-forbidden", "403 -"),
        ("wrong-body", "200 -"),
    ] {
        fault(&stage.vault, &[kind]);
        for answer in [stage.get(), stage.unwrap(), wrap(&stage.server, &stage.token)] {
            assert_eq!(shape(&answer), expected, "{kind}");
            match kind {
                "proxy-forbidden" | "wrong-body" => assert!(answer.body.is_null(), "{kind}"),
                "other-tenant" => {
                    let challenge = answer.header("www-authenticate");
                    assert!(challenge.contains("/00000000-0000-0000-0000-00000000d411\""));
                }
                "throttled" => assert!(!answer.headers.contains_key("retry-after")),
                _ => assert!(answer.body["error"]["message"].is_string(), "{kind}"),
            }
        }
        clear_faults(&stage.vault);
        stage.is_well();
    }
    fault(&stage.vault, &["throttled", "--retry-after", "7"]);
    assert_eq!(stage.get().header("retry-after"), "7");
    clear_faults(&stage.vault);
    fault(&stage.vault, &["status", "--status", "500"]);
    assert_eq!(shape(&stage.get()), "500 InternalServerError");
}

#[test]
fn a_fault_keeps_to_its_key_operation_and_count() {
    let stage = Stage::new();
    stage.server.create_key(&stage.server.admin(), "other");
    fault(&stage.vault, &["throttled", "--key", "kek", "--operation", "unwrapKey", "--count", "2"]);
    stage.get().ok();
    stage.server.call(&stage.token, "GET", "/keys/other", Value::Null).ok();
    assert_eq!(stage.unwrap().status, 429);
    let listed = stage.vault.cli_json(&["fault", "list"]);
    assert_eq!((&listed[0]["hits"], &listed[0]["left"]), (&json!(1), &json!(1)));
    assert_eq!(stage.unwrap().status, 429);
    stage.is_well();
    assert!(stage.vault.cli_json(&["fault", "list"]).as_array().unwrap().is_empty());
    // One of two is cleared.
    let first = fault(&stage.vault, &["key-deleted", "--operation", "get"]);
    fault(&stage.vault, &["status"]);
    stage.vault.cli_json(&["fault", "clear", &first]);
    assert_eq!(stage.get().status, 503);
    assert_eq!(stage.vault.cli(&["fault", "clear", &first]).status.code(), Some(7));
    // What happened is in the audit log, and named a drill; so is who asked for it.
    let log = std::fs::read_to_string(stage.vault.dir.join("audit.jsonl")).unwrap();
    let asked = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .find(|line| line["operationName"] == "FaultSet")
        .expect("nobody set a fault");
    assert_eq!(asked["byokfs"]["caller"], "admin");
    assert_eq!(asked["byokfs"]["drill"].as_array().map(Vec::len), Some(1));
    let is_hit =
        |line: &str| line.contains("\"drill\":[\"throttled\"]") && line.contains("KeyUnwrap");
    assert!(log.lines().any(is_hit));
}

#[test]
fn faults_need_drills_and_the_administrator() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let output = vault.cli(&["fault", "set", "close"]);
    assert_eq!(output.status.code(), Some(7));
    assert!(text(&output.stderr).contains("--drills"), "{}", text(&output.stderr));
    assert!(vault.cli(&["fault", "kinds"]).status.success());
    let made = vault.cli_json(&["identity", "create", "db"]);
    let header = std::fs::read_to_string(made["headerFile"].as_str().unwrap()).unwrap();
    let url = server.identity_url.replace("/msi/token", "/byokfs/faults");
    for headers in [&[("X-IDENTITY-HEADER", header.as_str())][..], &[]] {
        assert_eq!(server.send("GET", &url, headers, b"").unwrap().status, 403);
    }
    drop(server);
    let _server = vault.serve_with(&["--drills"]);
    for bad in
        [&["fly"][..], &["clock-shift"], &["status", "--status", "200"], &["close", "--at", "moon"]]
    {
        let output = vault.cli(&[&["fault", "set"], bad].concat());
        assert_eq!(output.status.code(), Some(2), "{bad:?}");
    }
}

#[test]
fn answers_come_late_in_part_or_not_at_all() {
    let stage = Stage::new();
    fault(&stage.vault, &["latency", "--milliseconds", "700"]);
    let start = Instant::now();
    stage.get().ok();
    assert!(start.elapsed() >= Duration::from_millis(700));
    clear_faults(&stage.vault);

    let body = json!({ "alg": "RSA-OAEP-256", "value": stage.wrapped });
    let try_unwrap = || stage.server.try_call(&stage.token, "POST", "/keys/kek/unwrapkey", &body);
    for bytes in ["0", "1", "40"] {
        fault(&stage.vault, &["truncate", "--bytes", bytes, "--count", "1"]);
        assert!(try_unwrap().is_err(), "after {bytes} bytes");
        stage.is_well();
    }
    fault(&stage.vault, &["close", "--count", "1"]);
    assert!(try_unwrap().is_err());
    stage.is_well();
    fault(&stage.vault, &["trickle", "--milliseconds", "1", "--count", "1"]);
    assert_eq!(try_unwrap().unwrap().ok()["value"], b64(&[7; 32]).as_str());

    // Hanging: the connection stays, the answer does not come, and others are served.
    fault(&stage.vault, &["hang", "--operation", "list"]);
    let agent = ureq::Agent::config_builder()
        .tls_config(
            ureq::tls::TlsConfig::builder()
                .provider(ureq::tls::TlsProvider::Rustls)
                .unversioned_rustls_crypto_provider(std::sync::Arc::new(
                    rustls::crypto::ring::default_provider(),
                ))
                .disable_verification(true)
                .build(),
        )
        .timeout_global(Some(Duration::from_millis(500)))
        .build()
        .new_agent();
    let url = format!("{}/keys?api-version=7.4", stage.server.url);
    let hung = agent.get(&url).header("authorization", format!("Bearer {}", stage.token)).call();
    assert!(matches!(hung, Err(ureq::Error::Timeout(_))), "{hung:?}");
    stage.is_well();
}

#[test]
fn the_vault_disappears_and_comes_back_at_the_same_place() {
    let stage = Stage::new();
    let address = stage.server.url.strip_prefix("https://").unwrap().to_owned();
    let id = fault(&stage.vault, &["refuse-connections"]);
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(&address).is_ok() {
        assert!(Instant::now() < deadline, "the port is still open");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(stage.server.try_call(&stage.token, "GET", "/keys", &Value::Null).is_err());
    stage.vault.cli_json(&["fault", "clear", &id]);
    let deadline = Instant::now() + Duration::from_secs(20);
    while TcpStream::connect(&address).is_err() {
        assert!(Instant::now() < deadline, "the port is not open again");
        std::thread::sleep(Duration::from_millis(20));
    }
    stage.is_well();

    fault(&stage.vault, &["untrusted-certificate"]);
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match stage.server.try_call(&stage.token, "GET", "/keys", &Value::Null) {
            Err(error) if format!("{error:?}").to_lowercase().contains("cert") => break,
            _ => assert!(Instant::now() < deadline, "the certificate is still trusted"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    clear_faults(&stage.vault);
    let deadline = Instant::now() + Duration::from_secs(20);
    while stage.server.try_call(&stage.token, "GET", "/keys", &Value::Null).is_err() {
        assert!(Instant::now() < deadline, "the certificate is not trusted again");
        std::thread::sleep(Duration::from_millis(20));
    }
    stage.is_well();
}

#[test]
fn clock_tokens_and_propagation_follow_their_settings() {
    let stage = Stage::new();
    let admin = stage.server.admin();
    let attributes = json!({ "attributes": { "exp": now() + 3600 } });
    stage.server.call(&admin, "PATCH", "/keys/kek", attributes).ok();
    fault(&stage.vault, &["clock-shift", "--seconds", "7200"]);
    // The old token is past its end for the shifted clock; a new one is not.
    assert_eq!(stage.get().status, 401);
    let token = stage.server.token_of(&stage.vault.dir.join("identities/db.header"));
    let answer = wrap(&stage.server, &token);
    assert_eq!(shape(&answer), "403 Forbidden/KeyExpired");
    let format = time::macros::format_description!(
        "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
    );
    let date = time::PrimitiveDateTime::parse(answer.header("date"), format).unwrap();
    assert!((date.assume_utc().unix_timestamp() - now() - 7200).abs() < 60);
    clear_faults(&stage.vault);
    stage.is_well();

    fault(&stage.vault, &["token-lifetime", "--seconds", "77"]);
    let header = std::fs::read_to_string(stage.vault.dir.join("identities/db.header")).unwrap();
    let reply = stage.server.ask_token(&header, &stage.server.url).ok();
    assert_eq!(reply["expires_in"], "77");
    clear_faults(&stage.vault);
    let reply = stage.server.ask_token(&header, &stage.server.url).ok();
    assert_eq!(reply["expires_in"], "3600");

    // A removed permission goes on until the change has got about.
    fault(&stage.vault, &["propagation-delay", "--seconds", "100000"]);
    revoke(&stage.vault, "db", "unwrapKey");
    stage.unwrap().ok();
    clear_faults(&stage.vault);
    assert_eq!(shape(&stage.unwrap()), "403 Forbidden/ForbiddenByPolicy");
}

#[test]
fn identity_and_token_endpoints_have_their_faults() {
    let stage = Stage::new();
    let header = std::fs::read_to_string(stage.vault.dir.join("identities/db.header")).unwrap();
    let ask = || stage.server.ask_token(&header, "x");
    fault(&stage.vault, &["identity-not-found", "--count", "1"]);
    assert_eq!(
        ask().body,
        json!({ "error": "invalid_request", "error_description": "Identity not found" })
    );
    for status in ["404", "410", "500", "503"] {
        fault(&stage.vault, &["status", "--at", "identity", "--status", status, "--count", "1"]);
        assert_eq!(ask().status.to_string(), status);
    }
    fault(&stage.vault, &["throttled", "--at", "identity", "--retry-after", "3", "--count", "1"]);
    let answer = ask();
    assert_eq!((answer.status, answer.header("retry-after")), (429, "3"));
    ask().ok();
    fault(&stage.vault, &["close", "--at", "identity"]);
    let address = stage.server.identity_url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address.split('/').next().unwrap()).unwrap();
    write!(stream, "GET /msi/token HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert_eq!(text(&answer), "");
    clear_faults(&stage.vault);

    let tenant = stage.vault.cli_json(&["show"])["tenantId"].as_str().unwrap().to_owned();
    let url = format!("{}/{tenant}/oauth2/v2.0/token", stage.server.url);
    for (kind, status, number) in [
        ("tenant-not-found", 400, 90002),
        ("app-not-found", 400, 700016),
        ("app-disabled", 400, 7000112),
        ("secret-wrong", 401, 7000215),
        ("secret-expired", 401, 7000222),
    ] {
        fault(&stage.vault, &[kind, "--count", "1"]);
        let answer = stage.server.send("POST", &url, &[], b"client_id=app").unwrap();
        assert_eq!(
            (answer.status, &answer.body["error_codes"][0]),
            (status, &json!(number)),
            "{kind}"
        );
    }
}

#[test]
fn a_vault_that_has_disappeared_still_stops() {
    let Stage { vault, server, .. } = Stage::new();
    fault(&vault, &["refuse-connections"]);
    assert_eq!(server.stop(), Some(0));
    // And starts again without its faults.
    let server = vault.serve_with(&["--drills"]);
    server.call(&server.admin(), "GET", "/keys", Value::Null).ok();
    assert!(vault.cli_json(&["fault", "list"]).as_array().unwrap().is_empty());
}
