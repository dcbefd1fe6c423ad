//! Each operation needs its own permission, and no other.

use serde_json::{Value, json};

use crate::harness::{Answer, Server, Vault, b64, grant, identity, revoke};

/// Calls the operation that `permission` is for; on a vault without purge protection.
fn use_permission(server: &Server, admin: &str, token: &str, permission: &str) -> Answer {
    let wrap = |operation: &str, value: Vec<u8>| {
        let body = json!({ "alg": "RSA-OAEP-256", "value": b64(&value) });
        server.call(token, "POST", &format!("/keys/kek/{operation}"), body)
    };
    let wrapped = || {
        let body = json!({ "alg": "RSA-OAEP-256", "value": b64(&[7; 32]) });
        let reply = server.call(admin, "POST", "/keys/kek/wrapkey", body).ok();
        json!({ "alg": "RSA-OAEP-256", "value": reply["value"] })
    };
    let deleted = |name: &str| {
        server.create_key(admin, name);
        server.call(admin, "DELETE", &format!("/keys/{name}"), Value::Null).ok();
    };
    match permission {
        "get" => server.call(token, "GET", "/keys/kek", Value::Null),
        "list" => server.call(token, "GET", "/keys/kek/versions", Value::Null),
        "create" => server.call(token, "POST", "/keys/new/create", json!({ "kty": "RSA" })),
        "import" => {
            let jwk: Value = serde_json::from_str(include_str!("imported.jwk.json")).unwrap();
            server.call(token, "PUT", "/keys/imported", json!({ "key": jwk }))
        }
        "getRotationPolicy" => server.call(token, "GET", "/keys/kek/rotationpolicy", Value::Null),
        "setRotationPolicy" => {
            let body = json!({ "attributes": { "expiryTime": "P1Y" } });
            server.call(token, "PUT", "/keys/kek/rotationpolicy", body)
        }
        "update" => server.call(token, "PATCH", "/keys/kek", json!({ "tags": {} })),
        "rotate" => server.call(token, "POST", "/keys/kek/rotate", json!({})),
        "backup" => server.call(token, "POST", "/keys/kek/backup", json!({})),
        "delete" => {
            // There or not: without the permission nobody learns which.
            let _ = server.call(admin, "POST", "/keys/short/create", json!({ "kty": "RSA" }));
            server.call(token, "DELETE", "/keys/short", Value::Null)
        }
        "recover" => {
            let name = "recoverable";
            if server.call(admin, "GET", &format!("/deletedkeys/{name}"), Value::Null).status == 404
            {
                deleted(name);
            }
            server.call(token, "POST", &format!("/deletedkeys/{name}/recover"), json!({}))
        }
        "purge" => {
            if server.call(admin, "GET", "/deletedkeys/purgeable", Value::Null).status == 404 {
                deleted("purgeable");
            }
            server.call(token, "DELETE", "/deletedkeys/purgeable", Value::Null)
        }
        "restore" => {
            let body = if server.call(admin, "GET", "/deletedkeys/gone", Value::Null).status == 404
            {
                server.create_key(admin, "gone");
                let backup = server.call(admin, "POST", "/keys/gone/backup", json!({})).ok();
                server.call(admin, "DELETE", "/keys/gone", Value::Null).ok();
                server.call(admin, "DELETE", "/deletedkeys/gone", Value::Null).ok();
                backup
            } else {
                unreachable!()
            };
            let answer = server.call(token, "POST", "/keys/restore", body);
            // Away again, for the next round.
            if answer.status == 200 {
                server.call(admin, "DELETE", "/keys/gone", Value::Null).ok();
                server.call(admin, "DELETE", "/deletedkeys/gone", Value::Null).ok();
            }
            answer
        }
        "wrapKey" => wrap("wrapkey", vec![1; 32]),
        "encrypt" => wrap("encrypt", vec![1; 32]),
        "unwrapKey" => server.call(token, "POST", "/keys/kek/unwrapkey", wrapped()),
        "decrypt" => server.call(token, "POST", "/keys/kek/decrypt", wrapped()),
        "sign" => {
            let body = json!({ "alg": "RS256", "value": b64(&[1; 32]) });
            server.call(token, "POST", "/keys/kek/sign", body)
        }
        "verify" => {
            let body = json!({ "alg": "RS256", "digest": b64(&[1; 32]), "value": b64(&[1; 256]) });
            server.call(token, "POST", "/keys/kek/verify", body)
        }
        other => panic!("no operation for {other}"),
    }
}

const PERMISSIONS: [&str; 19] = [
    "getRotationPolicy",
    "setRotationPolicy",
    "import",
    "get",
    "list",
    "create",
    "update",
    "rotate",
    "backup",
    "delete",
    "recover",
    "purge",
    "restore",
    "wrapKey",
    "encrypt",
    "unwrapKey",
    "decrypt",
    "sign",
    "verify",
];

#[test]
fn each_operation_needs_its_permission_and_no_other() {
    let vault = Vault::new(&["--name", "kv1", "--no-purge-protection"]);
    let server = vault.serve();
    let admin = server.admin();
    server.create_key(&admin, "kek");
    let token = identity(&vault, &server, "db", "all");
    for permission in PERMISSIONS {
        revoke(&vault, "db", permission);
        let answer = use_permission(&server, &admin, &token, permission);
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (403, "Forbidden/ForbiddenByPolicy"),
            "all but {permission}"
        );
        let message = answer.body["error"]["message"].as_str().unwrap();
        assert!(message.starts_with("The user, group or application 'appid="), "{message}");
        assert!(
            message.contains(&format!(
                "does not have keys {permission} permission on key vault 'kv1;location=local'"
            )),
            "{message}"
        );
        revoke(&vault, "db", "all");
        grant(&vault, "db", permission);
        let answer = use_permission(&server, &admin, &token, permission);
        assert!(answer.status < 300, "only {permission}: {} {}", answer.status, answer.body);
        grant(&vault, "db", "all");
    }
}

#[test]
fn identities_are_the_administrators_alone() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let token = identity(&vault, &server, "db", "all");
    for (method, path, body) in [
        ("GET", "/byokfs/identities", Value::Null),
        ("POST", "/byokfs/identities", json!({ "name": "x", "headerSha256": b64(&[1; 32]) })),
        ("DELETE", "/byokfs/identities/db", Value::Null),
        ("POST", "/byokfs/identities/db/grant", json!({ "keyPermissions": ["get"] })),
        ("POST", "/byokfs/identities/db/revoke", json!({ "keyPermissions": ["get"] })),
    ] {
        assert_eq!(server.call(&token, method, path, body).status, 403, "{method} {path}");
    }
    let admin = server.admin();
    for (method, path, body, status) in [
        ("DELETE", "/byokfs/identities/admin", Value::Null, 400),
        ("POST", "/byokfs/identities/admin/revoke", json!({ "keyPermissions": ["get"] }), 400),
        ("POST", "/byokfs/identities/db/grant", json!({ "keyPermissions": ["fly"] }), 400),
        ("POST", "/byokfs/identities/no/grant", json!({ "keyPermissions": ["get"] }), 404),
        ("DELETE", "/byokfs/identities/no", Value::Null, 404),
        ("POST", "/byokfs/identities", json!({ "name": "DB", "headerSha256": b64(&[1; 32]) }), 409),
        ("POST", "/byokfs/identities", json!({ "name": "x", "headerSha256": b64(&[1; 31]) }), 400),
        (
            "POST",
            "/byokfs/identities",
            json!({ "name": "a/b", "headerSha256": b64(&[1; 32]) }),
            400,
        ),
    ] {
        let answer = server.call(&admin, method, path, body);
        assert_eq!(answer.status, status, "{method} {path} {}", answer.body);
    }
}

#[test]
fn a_new_identity_may_do_nothing() {
    let vault = Vault::new(&["--no-purge-protection"]);
    let server = vault.serve();
    let admin = server.admin();
    server.create_key(&admin, "kek");
    let token = identity(&vault, &server, "db", "");
    for permission in PERMISSIONS {
        assert_eq!(use_permission(&server, &admin, &token, permission).status, 403, "{permission}");
    }
}
