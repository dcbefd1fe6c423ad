//! Headers, error shapes, api-version, host names, paths, paging, limits.

use serde_json::{Value, json};

use crate::harness::{API, Vault, b64};

#[test]
fn replies_have_the_headers_of_the_service() {
    let vault = Vault::new(&["--region", "westeurope"]);
    let server = vault.serve();
    let url = format!("{}/keys?{API}", server.url);
    let authorization = format!("Bearer {}", server.admin());
    let headers = [("authorization", authorization.as_str()), ("x-ms-client-request-id", "abc-1")];
    let answer = server.send("GET", &url, &headers, b"").unwrap();
    assert_eq!(answer.status, 200);
    for (name, value) in [
        ("content-type", "application/json; charset=utf-8"),
        ("x-ms-keyvault-region", "westeurope"),
        ("x-ms-client-request-id", "abc-1"),
        ("cache-control", "no-cache"),
        ("pragma", "no-cache"),
        ("expires", "-1"),
        ("x-content-type-options", "nosniff"),
    ] {
        assert_eq!(answer.header(name), value, "{name}");
    }
    assert_eq!(answer.header("x-ms-request-id").len(), 36);
    assert!(answer.header("date").ends_with("GMT"));
}

#[test]
fn the_quirks_of_the_paths_reach_the_same_key() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let admin = server.admin();
    let bundle = server.create_key(&admin, "kek");
    let kid = bundle["key"]["kid"].as_str().unwrap();
    let version = kid.rsplit('/').next().unwrap();
    for path in [
        "/keys/kek".to_owned(),
        "/keys/kek/".to_owned(),
        "/Keys/kek/".to_owned(),
        "/keys/KEK".to_owned(),
        format!("/keys/kek/{version}"),
        format!("/keys/kek/{}", version.to_uppercase()),
    ] {
        let answer = server.call(&admin, "GET", &path, Value::Null).ok();
        assert_eq!(answer["key"]["kid"], kid, "{path}");
    }
    let body = json!({ "alg": "RSA-OAEP-256", "value": b64(&[5; 32]) });
    for path in [
        "/keys/kek/wrapkey".to_owned(),
        "/keys/kek/wrapKey".to_owned(),
        "/keys/kek//wrapkey".to_owned(),
        "/keys/kek//WRAPKEY".to_owned(),
        format!("/keys/kek/{version}/wrapKey"),
    ] {
        let answer = server.call(&admin, "POST", &path, body.clone()).ok();
        assert_eq!(answer["kid"], kid, "{path}");
        assert!(!answer["value"].as_str().unwrap().contains('='));
    }
    let patched = server.call(&admin, "PATCH", "/keys/kek/", json!({ "tags": { "a": "b" } })).ok();
    assert_eq!(patched["tags"]["a"], "b");
}

#[test]
fn bad_requests_get_the_error_shape() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let admin = server.admin();
    server.create_key(&admin, "kek");
    let unknown = "0".repeat(32);
    for (method, path, body, status, code) in [
        ("GET", "/keys/none", Value::Null, 404, "KeyNotFound"),
        ("GET", &*format!("/keys/kek/{unknown}"), Value::Null, 404, "KeyNotFound"),
        ("GET", "/keys/k_k", Value::Null, 400, "BadParameter"),
        ("GET", "/keys?maxresults=26", Value::Null, 400, "BadParameter"),
        ("GET", "/keys?maxresults=0", Value::Null, 400, "BadParameter"),
        ("GET", "/keys?$skiptoken=%21", Value::Null, 400, "BadParameter"),
        ("GET", "/keys/kek/versions?$skiptoken=eA", Value::Null, 400, "BadParameter"),
        ("POST", "/keys/new/create", Value::Null, 400, "BadParameter"),
        ("POST", "/keys/new/create", json!({ "kty": "oct" }), 400, "BadParameter"),
        (
            "POST",
            "/keys/new/create",
            json!({ "kty": "RSA", "key_size": 1024 }),
            400,
            "BadParameter",
        ),
        (
            "POST",
            "/keys/new/create",
            json!({ "kty": "RSA", "key_ops": ["fly"] }),
            400,
            "BadParameter",
        ),
        (
            "POST",
            "/keys/new/create",
            json!({ "kty": "RSA", "public_exponent": 3 }),
            400,
            "BadParameter",
        ),
        ("POST", "/keys/kek/unwrapkey", json!({ "alg": "RSA-OAEP" }), 400, "BadParameter"),
        (
            "POST",
            "/keys/kek/unwrapkey",
            json!({ "alg": "RSA-OAEP", "value": "AAAA" }),
            400,
            "BadParameter",
        ),
        (
            "POST",
            "/keys/kek/unwrapkey",
            json!({ "alg": "A256KW", "value": "AAAA" }),
            400,
            "BadParameter",
        ),
        (
            "POST",
            "/keys/kek/wrapkey",
            json!({ "alg": "RSA-OAEP", "value": "!" }),
            400,
            "BadParameter",
        ),
        ("POST", "/keys/kek/wrapkey", json!([1, 2]), 400, "BadParameter"),
        ("PATCH", "/keys/kek", json!({ "attributes": { "exp": "soon" } }), 400, "BadParameter"),
        (
            "PATCH",
            "/keys/kek",
            json!({ "attributes": { "nbf": 9, "exp": 9 } }),
            400,
            "BadParameter",
        ),
        ("POST", "/keys/kek", Value::Null, 405, "MethodNotAllowed"),
        ("GET", "/secrets/kek", Value::Null, 404, "NotFound"),
        ("GET", "/deletedkeys/kek", Value::Null, 404, "KeyNotFound"),
        ("POST", "/keys/restore", json!({ "value": "AAAA" }), 400, "BadParameter"),
    ] {
        let answer = server.call(&admin, method, path, body.clone());
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (status, code),
            "{method} {path} {body}"
        );
        assert!(answer.body["error"]["message"].is_string());
    }
    assert_eq!(server.call(&admin, "GET", "/keys/new", Value::Null).status, 404);
}

#[test]
fn the_api_version_is_mandatory_and_any_later_one_is_taken() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let authorization = format!("Bearer {}", server.admin());
    let headers = [("authorization", authorization.as_str())];
    let status = |query: &str| {
        let url = format!("{}/keys{query}", server.url);
        let answer = server.send("GET", &url, &headers, b"").unwrap();
        (answer.status, answer.code())
    };
    for query in ["", "?api-version=", "?api-version=x", "?maxresults=5"] {
        assert_eq!(status(query), (400, "BadParameter".into()), "{query}");
    }
    for version in [
        "7.0",
        "7.1",
        "7.2",
        "7.3",
        "7.4",
        "7.5",
        "7.6",
        "2025-07-01",
        "7.6-preview.2",
        "2031-01-01",
    ] {
        assert_eq!(status(&format!("?api-version={version}")).0, 200, "{version}");
    }
}

#[test]
fn key_ids_repeat_the_name_that_was_asked_and_other_names_are_refused() {
    let vault = Vault::new(&["--name", "kv1"]);
    let server = vault.serve();
    let port = server.url.rsplit(':').next().unwrap().to_owned();
    let header = std::fs::read_to_string(vault.dir.join("admin.header")).unwrap();

    // By address, with the Host header that a resolver of *.localhost would lead to.
    let host = format!("kv1.vault.localhost:{port}");
    let resource = format!("https://vault.localhost:{port}");
    let url = format!("{}/keys/kek/create?{API}", server.url);
    let challenge = server.send("POST", &url, &[("host", &host)], b"").unwrap();
    assert_eq!(challenge.status, 401);
    assert!(challenge.header("www-authenticate").ends_with(&format!("resource=\"{resource}\"")));
    let token = server.ask_token(&header, &resource).ok();
    let authorization = format!("Bearer {}", token["access_token"].as_str().unwrap());
    let headers = [("host", host.as_str()), ("authorization", &authorization)];
    let made = server.send("POST", &url, &headers, br#"{"kty":"RSA"}"#).unwrap().ok();
    assert!(made["key"]["kid"].as_str().unwrap().starts_with(&format!("https://{host}/keys/kek/")));
    // A token for that audience is none for the other.
    assert_eq!(server.send("POST", &url, &headers[1..], b"").unwrap().status, 401);

    for bad in ["evil.example", "vault.localhost", "kv2.vault.localhost"] {
        let headers = [("host", bad), ("authorization", &authorization)];
        assert_eq!(server.send("POST", &url, &headers, b"").unwrap().status, 421, "{bad}");
    }
}

#[test]
fn lists_come_in_pages() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let admin = server.admin();
    let names: Vec<String> = (0..7).map(|n| format!("k{n}")).collect();
    for name in &names {
        server.create_key(&admin, name);
    }
    for _ in 0..3 {
        server.call(&admin, "POST", "/keys/k0/rotate", json!({})).ok();
    }
    let walk = |path: &str| {
        let authorization = format!("Bearer {admin}");
        let mut next = Some(format!("{}{path}?{API}&maxresults=3", server.url));
        let mut pages = Vec::new();
        while let Some(url) = next {
            let page =
                server.send("GET", &url, &[("authorization", &authorization)], b"").unwrap().ok();
            let items = page["value"].as_array().unwrap();
            pages.push(
                items
                    .iter()
                    .map(|item| item["kid"].as_str().unwrap().to_owned())
                    .collect::<Vec<_>>(),
            );
            next = page["nextLink"].as_str().map(str::to_owned);
        }
        pages
    };
    let pages = walk("/keys");
    assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 1]);
    let expected: Vec<String> =
        names.iter().map(|name| format!("{}/keys/{name}", server.url)).collect();
    assert_eq!(pages.concat(), expected);

    let versions = walk("/keys/k0/versions").concat();
    assert_eq!(versions.len(), 4);
    let newest = server.call(&admin, "GET", "/keys/k0", Value::Null).ok();
    assert_eq!(newest["key"]["kid"], versions[3].as_str());
    // A page that ends with the last item has no successor.
    let page = server.call(&admin, "GET", "/keys?maxresults=7", Value::Null).ok();
    assert!(page["nextLink"].is_null());
    server.call(&admin, "DELETE", "/keys/k0", Value::Null).ok();
    assert_eq!(walk("/keys").concat().len(), 6);
    assert_eq!(walk("/deletedkeys").concat().len(), 1);
}

#[test]
fn oversized_and_broken_requests_leave_the_server_well() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let admin = server.admin();
    let authorization = format!("Bearer {admin}");
    let url = format!("{}/keys/kek/create?{API}", server.url);
    let huge = vec![b' '; 5 * 1024 * 1024];
    // The server may answer and hang up before all of it is sent.
    if let Ok(answer) = server.send("POST", &url, &[("authorization", &authorization)], &huge) {
        assert_eq!(answer.status, 413);
    }
    for body in [&b"{"[..], b"\xff\xfe", b"null", b"[]", &[b'['; 100_000]] {
        let answer = server.send("POST", &url, &[("authorization", &authorization)], body).unwrap();
        assert_eq!((answer.status, answer.code().as_str()), (400, "BadParameter"));
    }
    // Not TLS at all.
    use std::io::Write as _;
    let address = server.url.strip_prefix("https://").unwrap();
    let mut plain = std::net::TcpStream::connect(address).unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    drop(plain);
    server.call(&admin, "GET", "/keys", Value::Null).ok();
}

#[test]
fn a_client_that_trusts_another_authority_does_not_connect() {
    let (vault, other) = (Vault::new(&[]), Vault::new(&[]));
    let server = vault.serve();
    let stranger = crate::harness::agent(&other.dir.join("ca.pem"));
    let error = stranger.get(format!("{}/keys", server.url)).call().unwrap_err();
    assert!(format!("{error:?}").to_lowercase().contains("cert"), "{error:?}");
}
