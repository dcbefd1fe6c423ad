//! A Managed HSM: its challenge, errors, roles, keys and random bytes.

use serde_json::{Value, json};

use crate::harness::{API, Vault, b64, identity};

#[test]
fn challenge_headers_and_errors_are_those_of_an_hsm() {
    let vault = Vault::new(&["--flavor", "mhsm", "--name", "hsm1"]);
    let server = vault.serve();
    let admin = server.admin();
    let url = format!("{}/keys?{API}", server.url);
    let port = server.url.rsplit(':').next().unwrap();
    let host = format!("hsm1.managedhsm.localhost:{port}");
    let challenge = server.send("GET", &url, &[("host", &host)], b"").unwrap();
    assert_eq!((challenge.status, &challenge.body), (401, &Value::Null));
    assert_eq!(challenge.header("content-length"), "0");
    let expected = format!("resource=\"https://managedhsm.localhost:{port}\"");
    assert!(challenge.header("www-authenticate").ends_with(&expected));
    let answer = server.call(&admin, "GET", "/keys/none", Value::Null);
    assert_eq!((answer.status, answer.code().as_str()), (404, "KeyNotFound"));
    assert!(answer.headers.contains_key("x-ms-server-latency"));
    assert!(!answer.headers.contains_key("x-ms-keyvault-service-version"));

    let token = identity(&vault, &server, "db", "all");
    let answer = server.call(&token, "GET", "/keys/kek", Value::Null);
    assert_eq!((answer.status, answer.code().as_str()), (403, "AccessDenied"));
    let message = answer.body["error"]["message"].as_str().unwrap();
    let start = "Not authorized to access Microsoft.KeyVault/managedHsm/keys/read/action on \
                 /keys/kek (Activity ID: ";
    assert!(message.starts_with(start), "{message}");
    let assign = ["role", "assign", "--identity", "db", "--role"];
    vault.cli_json(&[&assign[..], &["Managed HSM Crypto User"]].concat());
    assert_eq!(server.call(&token, "GET", "/keys", Value::Null).status, 200);
    assert_eq!(server.call(&token, "GET", "/deletedkeys", Value::Null).status, 403);
    // Roles of vaults, and policies, are not known here.
    let output = vault.cli(&[&assign[..], &["Key Vault Crypto User"]].concat());
    assert_eq!(output.status.code(), Some(2));
    let output = vault.cli(&["update", "--enable-rbac-authorization", "false"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn symmetric_keys_wrap_rotate_and_come_back_from_a_backup() {
    let vault = Vault::new(&["--flavor", "mhsm", "--no-purge-protection"]);
    let server = vault.serve();
    let admin = server.admin();
    let create = |body: Value| server.call(&admin, "POST", "/keys/kek/create", body);
    for (bits, algorithm) in [(128, "A128KW"), (192, "A192KW"), (256, "A256KW")] {
        let bundle = create(json!({ "kty": "oct-HSM", "key_size": bits })).ok();
        assert_eq!(bundle["key"]["kty"], "oct-HSM");
        assert_eq!(bundle["key"]["key_ops"], json!(["wrapKey", "unwrapKey"]));
        assert!(bundle["key"].get("n").is_none() && bundle["key"].get("k").is_none());
        let kid = bundle["key"]["kid"].as_str().unwrap();
        let path = kid.strip_prefix(&server.url).unwrap();
        let body = json!({ "alg": algorithm, "value": b64(&[7; 32]) });
        let wrapped = server.call(&admin, "POST", &format!("{path}/wrapkey"), body).ok();
        let unwrap = json!({ "alg": algorithm, "value": wrapped["value"] });
        let path = format!("{path}/unwrapkey");
        let opened = server.call(&admin, "POST", &path, unwrap.clone()).ok();
        assert_eq!(opened["value"], b64(&[7; 32]).as_str());

        // A new version is another key of the same size; a backup holds both.
        server.call(&admin, "POST", "/keys/kek/rotate", json!({})).ok();
        let newest = server.call(&admin, "POST", "/keys/kek/unwrapkey", unwrap.clone());
        assert_eq!((newest.status, newest.code().as_str()), (400, "BadParameter"));
        let backup = server.call(&admin, "POST", "/keys/kek/backup", json!({})).ok();
        server.call(&admin, "DELETE", "/keys/kek", Value::Null).ok();
        server.call(&admin, "DELETE", "/deletedkeys/kek", Value::Null).ok();
        server.call(&admin, "POST", "/keys/restore", backup).ok();
        assert_eq!(server.call(&admin, "POST", &path, unwrap).status, 200);
        server.call(&admin, "DELETE", "/keys/kek", Value::Null).ok();
        server.call(&admin, "DELETE", "/deletedkeys/kek", Value::Null).ok();
    }
    for bad in [
        json!({ "kty": "oct-HSM", "key_size": 512 }),
        json!({ "kty": "oct" }),
        json!({ "kty": "RSA" }),
    ] {
        assert_eq!(create(bad.clone()).status, 400, "{bad}");
    }
    create(json!({ "kty": "RSA-HSM", "key_size": 2048 })).ok();
    let jwk: Value = serde_json::from_str(include_str!("imported.jwk.json")).unwrap();
    let imported = server.call(&admin, "PUT", "/keys/imported", json!({ "key": jwk })).ok();
    assert_eq!(imported["key"]["kty"], "RSA-HSM");
    let made = vault.cli_json(&["key", "create", "--name", "aes", "--kty", "oct-HSM"]);
    assert_eq!(made["key"]["kty"], "oct-HSM");
    let sign = json!({ "alg": "RS256", "value": b64(&[1; 32]) });
    assert_ne!(server.call(&admin, "POST", "/keys/aes/sign", sign).status, 200);
}

#[test]
fn random_bytes_are_given_by_an_hsm_alone() {
    let hsm = Vault::new(&["--flavor", "mhsm"]);
    let server = hsm.serve();
    let admin = server.admin();
    let ask = |count: Value| server.call(&admin, "POST", "/rng", json!({ "count": count }));
    let one = ask(json!(128)).ok();
    assert_eq!(one["value"].as_str().unwrap().len(), 171);
    assert_ne!(one, ask(json!(128)).ok());
    for bad in [json!(0), json!(129), json!("5"), json!(-1)] {
        assert_eq!(ask(bad).status, 400);
    }
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let answer = server.call(&server.admin(), "POST", "/rng", json!({ "count": 5 }));
    assert_eq!(answer.status, 404);
}
