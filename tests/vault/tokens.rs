//! The challenge, the identity endpoint, and every way a token can be wrong.

use std::time::{Duration, Instant};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use crate::harness::{API, Server, Vault, b64, identity};

fn is_challenge(server: &Server, answer: &crate::harness::Answer) -> bool {
    let header = answer.header("www-authenticate");
    answer.status == 401
        && answer.body["error"]["code"] == "Unauthorized"
        && header.starts_with("Bearer authorization=\"https://login.microsoftonline.com/")
        && header.ends_with(&format!(", resource=\"{}\"", server.url))
}

#[test]
fn a_request_without_token_gets_the_challenge_before_anything_else_is_looked_at() {
    let vault = Vault::new(&["--tenant", "tenant-1"]);
    let server = vault.serve();
    for (method, path, body) in [
        ("GET", format!("/keys?{API}"), ""),
        ("GET", "/keys".to_owned(), ""),
        ("POST", format!("/keys/kek/unwrapkey?{API}"), "not json"),
        ("GET", "/no/such/route".to_owned(), ""),
        ("GET", "/byokfs/identities".to_owned(), ""),
    ] {
        let url = format!("{}{path}", server.url);
        let answer = server.send(method, &url, &[], body.as_bytes()).unwrap();
        assert!(is_challenge(&server, &answer), "{method} {path}");
        assert_eq!(
            answer.body["error"]["message"],
            "AKV10000: Request is missing a Bearer or PoP token."
        );
        assert!(answer.header("www-authenticate").contains("/tenant-1\""));
    }
    let url = format!("{}/keys?{API}", server.url);
    for header in ["Bearer", "Bearer ", "Basic YTpi", "x"] {
        let answer = server.send("GET", &url, &[("authorization", header)], b"").unwrap();
        assert!(is_challenge(&server, &answer), "{header}");
    }
}

#[test]
fn the_identity_endpoint_answers_as_app_service_does() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let made = vault.cli_json(&["identity", "create", "db"]);
    let header = std::fs::read_to_string(made["headerFile"].as_str().unwrap()).unwrap();
    let answer = server.ask_token(&header, &server.url);
    assert_eq!(answer.status, 200);
    let expires: i64 = answer.body["expires_on"].as_str().unwrap().parse().unwrap();
    assert!((3500..=3600).contains(&(expires - crate::harness::now())));
    assert_eq!(answer.body["token_type"], "Bearer");
    assert_eq!(answer.body["resource"], server.url.as_str());
    assert_eq!(answer.body["client_id"], made["clientId"]);

    let ask = |query: &str, header: Option<&str>| {
        let url = format!("{}?{query}", server.identity_url);
        let headers: Vec<_> =
            header.map(|value| ("X-IDENTITY-HEADER", value)).into_iter().collect();
        let answer = server.send("GET", &url, &headers, b"").unwrap();
        (answer.status, answer.body["error_description"].as_str().unwrap_or_default().to_owned())
    };
    let good = "api-version=2019-08-01&resource=x";
    let client = made["clientId"].as_str().unwrap();
    assert_eq!(ask(good, Some(&header)).0, 200);
    assert_eq!(ask(&format!("{good}&client_id={client}"), Some(&header)).0, 200);
    let not_found = (400, "Identity not found".to_owned());
    assert_eq!(ask(&format!("{good}&client_id=other"), Some(&header)), not_found);
    assert_eq!(ask(good, Some(&b64(&[1; 32]))), not_found);
    assert_eq!(ask(good, Some("")), not_found);
    assert_eq!(ask(good, None).0, 401);
    assert_eq!(ask("api-version=2019-08-01", Some(&header)).0, 400);
    assert_eq!(ask("api-version=1&resource=x", Some(&header)).0, 400);
    assert_eq!(ask("resource=x", Some(&header)).0, 400);
    // No token for whoever only knows the hash that the vault keeps.
    let listed = server.send("POST", &server.identity_url, &[("X-IDENTITY-HEADER", &header)], b"");
    assert_eq!(listed.unwrap().status, 405);
}

#[test]
fn a_deleted_identity_gets_no_token_and_its_tokens_end() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let token = identity(&vault, &server, "db", "list");
    let header = std::fs::read_to_string(vault.dir.join("identities/db.header")).unwrap();
    server.call(&token, "GET", "/keys", Value::Null).ok();
    vault.cli_json(&["identity", "delete", "db"]);
    let answer = server.call(&token, "GET", "/keys", Value::Null);
    assert!(is_challenge(&server, &answer));
    let answer = server.ask_token(&header, &server.url);
    assert_eq!(answer.status, 400);
    assert_eq!(
        answer.body,
        json!({ "error": "invalid_request", "error_description": "Identity not found" })
    );
    // A new identity of that name is another one.
    identity(&vault, &server, "db", "list");
    assert!(is_challenge(&server, &server.call(&token, "GET", "/keys", Value::Null)));
}

#[test]
fn wrong_audiences_and_foreign_signatures_are_refused() {
    let vault = Vault::new(&["--tenant", "t1"]);
    let other = Vault::new(&["--tenant", "t1"]);
    let (server, other_server) = (vault.serve(), other.serve());
    let header = std::fs::read_to_string(vault.dir.join("admin.header")).unwrap();
    for audience in ["https://vault.azure.net", "https://management.azure.com", &other_server.url] {
        let token = server.ask_token(&header, audience).ok();
        let answer =
            server.call(token["access_token"].as_str().unwrap(), "GET", "/keys", Value::Null);
        assert!(is_challenge(&server, &answer), "{audience}");
    }

    // The other vault's administrator, asking for this vault's audience.
    let other_header = std::fs::read_to_string(other.dir.join("admin.header")).unwrap();
    let foreign = other_server.ask_token(&other_header, &server.url).ok();
    let foreign = foreign["access_token"].as_str().unwrap();
    assert!(is_challenge(&server, &server.call(foreign, "GET", "/keys", Value::Null)));

    // The claims of a good token, signed or decorated otherwise.
    let good = server.admin();
    let claims: Value = {
        use base64::Engine as _;
        let part = good.split('.').nth(1).unwrap();
        let engine = base64::engine::general_purpose::URL_SAFE_NO_PAD;
        serde_json::from_slice(&engine.decode(part).unwrap()).unwrap()
    };
    let own_key = aws_lc_rs::signature::EcdsaKeyPair::generate_pkcs8(
        &aws_lc_rs::signature::ECDSA_P256_SHA256_FIXED_SIGNING,
        &aws_lc_rs::rand::SystemRandom::new(),
    )
    .unwrap();
    let forged = jsonwebtoken::encode(
        &Header::new(Algorithm::ES256),
        &claims,
        &EncodingKey::from_ec_der(own_key.as_ref()),
    )
    .unwrap();
    let symmetric = jsonwebtoken::encode(
        &Header::new(Algorithm::HS256),
        &claims,
        &EncodingKey::from_secret(b"guess"),
    )
    .unwrap();
    let unsigned = format!("{}.{}.", b64(br#"{"alg":"none"}"#), good.split('.').nth(1).unwrap());
    let mut changed = claims.clone();
    changed["exp"] = json!(i64::MAX);
    let parts: Vec<&str> = good.split('.').collect();
    let longer = format!("{}.{}.{}", parts[0], b64(changed.to_string().as_bytes()), parts[2]);
    server.call(&good, "GET", "/keys", Value::Null).ok();
    for token in [forged, symmetric, unsigned, longer, "a.b.c".into(), "x".repeat(4000)] {
        assert!(
            is_challenge(&server, &server.call(&token, "GET", "/keys", Value::Null)),
            "{token}"
        );
    }
}

#[test]
fn tokens_expire() {
    let vault = Vault::new(&[]);
    let server = vault.serve_with(&["--token-lifetime", "1"]);
    let token = server.admin();
    let start = Instant::now();
    loop {
        let answer = server.call(&token, "GET", "/keys", Value::Null);
        if answer.status == 401 {
            assert!(is_challenge(&server, &answer));
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "the token does not expire");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn tokens_outlive_a_restart() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let token = server.admin();
    server.kill();
    vault.serve().call(&token, "GET", "/keys", Value::Null).ok();
}
