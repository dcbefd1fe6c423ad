//! Roles, network rules, tenants, disabled and deleted identities, managed identity endpoints.

use serde_json::{Value, json};

use crate::harness::{API, Answer, Server, Vault, b64, grant, identity};

fn role(vault: &Vault, verb: &str, identity: &str, role: &str, key: Option<&str>) {
    let mut args = vec!["role", verb, "--identity", identity, "--role", role];
    args.extend(key.into_iter().flat_map(|key| ["--key", key]));
    vault.cli_json(&args);
}

fn wrap(server: &Server, token: &str, key: &str) -> Answer {
    let body = json!({ "alg": "RSA-OAEP-256", "value": b64(&[1; 32]) });
    server.call(token, "POST", &format!("/keys/{key}/wrapkey"), body)
}

fn refusal(answer: &Answer) -> (u16, String) {
    (answer.status, answer.code())
}

#[test]
fn a_role_is_taken_from_all_of_one_name() {
    let vault = Vault::new(&["--rbac"]);
    let _server = vault.serve();
    const ROLE: &str = "Key Vault Crypto Service Encryption User";
    vault.cli_json(&["identity", "create", "db", "--user-assigned"]);
    role(&vault, "assign", "db", ROLE, None);
    // Its tokens stay good, and so does its role.
    vault.cli_json(&["identity", "delete", "db", "--keep-tokens"]);
    vault.cli_json(&["identity", "create", "db", "--user-assigned"]);
    role(&vault, "assign", "db", ROLE, None);
    role(&vault, "remove", "db", ROLE, None);
    assert_eq!(vault.cli_json(&["role", "list"]), json!([]));
}

#[test]
fn a_network_rule_is_removed_however_its_range_is_written() {
    let vault = Vault::new(&[]);
    let _server = vault.serve();
    let rule = |verb, range| vault.cli(&["network-rule", verb, "--ip-address", range]);
    for (added, removed) in
        [("192.0.2.7/24", "192.0.2.0/24"), ("2001:db8::1/32", "2001:db8::/32"), ("::1/0", "::/0")]
    {
        assert!(rule("add", added).status.success());
        assert!(rule("remove", removed).status.success());
        let left = vault.cli_json(&["network-rule", "list"]);
        assert_eq!(left["networkAcls"]["ipRules"], json!([]), "{added}");
    }
    // What did not take anything away does not say that it did.
    assert_eq!(rule("remove", "192.0.2.0/24").status.code(), Some(7));
}

#[test]
fn roles_allow_what_the_real_ones_do_and_policies_count_for_nothing() {
    let vault = Vault::new(&["--rbac", "--no-purge-protection"]);
    let server = vault.serve();
    let admin = server.admin();
    server.create_key(&admin, "kek");
    server.create_key(&admin, "other");
    let token = identity(&vault, &server, "db", "all");
    let by_role = (403, "Forbidden/ForbiddenByRbac".to_owned());
    let answer = wrap(&server, &token, "kek");
    assert_eq!(refusal(&answer), by_role);
    let message = answer.body["error"]["message"].as_str().unwrap();
    assert!(message.contains("Action: 'Microsoft.KeyVault/vaults/keys/wrap/action'"), "{message}");
    assert!(message.contains("Assignment: (not found)"), "{message}");

    // What each role allows, of: get, list, wrap, delete, create, rotation policy.
    let probe = |expected: [bool; 6], role_name: &str| {
        let calls = [
            ("GET", "/keys/kek", Value::Null),
            ("GET", "/keys", Value::Null),
            ("POST", "/keys/kek/wrapkey", json!({ "alg": "RSA-OAEP", "value": b64(&[1; 32]) })),
            ("DELETE", "/keys/other", Value::Null),
            ("POST", "/keys/new/create", json!({ "kty": "RSA" })),
            ("GET", "/keys/kek/rotationpolicy", Value::Null),
        ];
        for ((method, path, body), expected) in calls.into_iter().zip(expected) {
            let answer = server.call(&token, method, path, body);
            assert_eq!(answer.status < 300, expected, "{role_name}: {method} {path}");
            assert!(expected || refusal(&answer) == by_role, "{role_name}: {method} {path}");
        }
    };
    for (name, expected) in [
        ("Key Vault Crypto Service Encryption User", [true, true, true, false, false, false]),
        ("Key Vault Crypto User", [true, true, true, false, false, false]),
        ("Key Vault Reader", [true, true, false, false, false, true]),
        ("Key Vault Crypto Officer", [true, true, true, true, true, true]),
    ] {
        role(&vault, "assign", "db", name, None);
        probe(expected, name);
        role(&vault, "remove", "db", name, None);
    }
    probe([false; 6], "none");

    // On one key: that key and nothing else, not even the list.
    role(&vault, "assign", "db", "12338af0-0e69-4776-bea7-57ae8d297424", Some("kek"));
    assert_eq!(wrap(&server, &token, "kek").status, 200);
    server.create_key(&admin, "third");
    assert_eq!(refusal(&wrap(&server, &token, "third")), by_role);
    assert_eq!(refusal(&server.call(&token, "GET", "/keys", Value::Null)), by_role);
    assert_eq!(vault.cli_json(&["role", "list"]).as_array().unwrap().len(), 1);

    // Back to policies, which were there all the time.
    vault.cli_json(&["update", "--enable-rbac-authorization", "false"]);
    assert_eq!(wrap(&server, &token, "third").status, 200);
    // Assignments go with their identity.
    vault.cli_json(&["identity", "delete", "db"]);
    assert!(vault.cli_json(&["role", "list"]).as_array().unwrap().is_empty());
}

#[test]
fn network_rules_hold_for_the_keys_and_not_for_management() {
    let vault = Vault::new(&["--name", "kv1"]);
    let server = vault.serve();
    let admin = server.admin();
    server.create_key(&admin, "kek");
    let token = identity(&vault, &server, "db", "all");
    vault.cli_json(&["update", "--default-action", "deny"]);
    let answer = wrap(&server, &token, "kek");
    assert_eq!(refusal(&answer), (403, "Forbidden/ForbiddenByFirewall".into()));
    let message = answer.body["error"]["message"].as_str().unwrap();
    assert!(message.contains("Client address: 127.0.0.1\r\n"), "{message}");
    // The administrator's calls to keys are calls like any other; the challenge is for all.
    assert_eq!(server.call(&admin, "GET", "/keys", Value::Null).status, 403);
    let challenge = server.send("GET", &format!("{}/keys?{API}", server.url), &[], b"").unwrap();
    assert_eq!(challenge.status, 401);
    vault.cli_json(&["network-rule", "add", "--ip-address", "10.0.0.0/8"]);
    assert_eq!(wrap(&server, &token, "kek").status, 403);
    let shown = vault.cli_json(&["network-rule", "add", "--ip-address", "127.0.0.0/8"]);
    assert_eq!(shown["networkAcls"]["ipRules"].as_array().unwrap().len(), 2);
    assert_eq!(wrap(&server, &token, "kek").status, 200);
    vault.cli_json(&["network-rule", "remove", "--ip-address", "127.0.0.0/8"]);
    assert_eq!(wrap(&server, &token, "kek").status, 403);
    vault.cli_json(&["update", "--default-action", "allow"]);
    assert_eq!(wrap(&server, &token, "kek").status, 200);
    vault.cli_json(&["update", "--public-network-access", "disabled"]);
    let answer = wrap(&server, &token, "kek");
    assert_eq!(refusal(&answer), (403, "Forbidden/ForbiddenByConnection".into()));
    // Rules outlive a restart.
    server.kill();
    let server = vault.serve();
    assert_eq!(wrap(&server, &token, "kek").status, 403);
    vault.cli_json(&["update", "--public-network-access", "enabled"]);
    assert_eq!(wrap(&server, &token, "kek").status, 200);
    assert_eq!(
        vault.cli(&["network-rule", "add", "--ip-address", "10.0.0.0/33"]).status.code(),
        Some(2)
    );
}

#[test]
fn identities_of_other_tenants_get_tokens_and_nowhere() {
    let vault = Vault::new(&["--tenant", "t1"]);
    let server = vault.serve();
    let made = vault.cli_json(&["identity", "create", "guest", "--tenant", "T2"]);
    assert_eq!(made["tenantId"], "t2");
    grant(&vault, "guest", "all");
    let guest = server.token_of(&vault.dir.join("identities/guest.header"));
    let answer = server.call(&guest, "GET", "/keys", Value::Null);
    assert_eq!(answer.status, 401);
    assert!(answer.body["error"]["message"].as_str().unwrap().starts_with("AKV10032"));
    assert!(answer.header("www-authenticate").contains("/t1\""));

    // The vault moves: now the guest is at home, and who was at home is not.
    let local = identity(&vault, &server, "local", "all");
    server.call(&local, "GET", "/keys", Value::Null).ok();
    vault.cli_json(&["update", "--tenant", "t2"]);
    let answer = server.call(&local, "GET", "/keys", Value::Null);
    assert!(answer.status == 401 && answer.header("www-authenticate").contains("/t2\""));
    server.call(&guest, "GET", "/keys", Value::Null).ok();
    vault.cli_json(&["update", "--tenant", "t1"]);
    server.call(&local, "GET", "/keys", Value::Null).ok();
}

#[test]
fn a_host_asks_for_its_own_identity_or_one_assigned_to_it() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    vault.cli_json(&["identity", "create", "host"]);
    let shared = vault.cli_json(&["identity", "create", "shared", "--user-assigned"]);
    assert!(shared.get("headerFile").is_none());
    let header = std::fs::read_to_string(vault.dir.join("identities/host.header")).unwrap();
    let client = shared["clientId"].as_str().unwrap();
    let ask = |query: &str| {
        let url = format!("{}?api-version=2019-08-01&resource=x{query}", server.identity_url);
        server.send("GET", &url, &[("X-IDENTITY-HEADER", &header)], b"").unwrap()
    };
    let by_client = format!("&client_id={client}");
    assert_eq!(ask(&by_client).body["error_description"], "Identity not found");
    vault.cli_json(&["identity", "assign", "shared", "--host", "host"]);
    assert_eq!(ask(&by_client).ok()["client_id"], client);
    let by_object = format!("&object_id={}", shared["principalId"].as_str().unwrap());
    assert_eq!(ask(&by_object).ok()["client_id"], client);
    assert_ne!(ask("").ok()["client_id"], client);
    assert_eq!(ask("&mi_res_id=/subscriptions/x").status, 400);
    vault.cli_json(&["identity", "disable", "shared"]);
    assert_eq!(ask(&by_client).status, 400);
    vault.cli_json(&["identity", "enable", "shared"]);
    assert_eq!(ask(&by_client).status, 200);
    vault.cli_json(&["identity", "unassign", "shared", "--host", "host"]);
    assert_eq!(ask(&by_client).status, 400);
    assert_eq!(
        vault.cli(&["identity", "unassign", "shared", "--host", "host"]).status.code(),
        Some(7)
    );
}

#[test]
fn the_imds_endpoint_is_there_for_one_host_and_only_if_asked_for() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let made = vault.cli_json(&["identity", "create", "vm"]);
    let imds = |server: &Server| {
        server.identity_url.replace("/msi/token", "/metadata/identity/oauth2/token")
    };
    let query = "?api-version=2018-02-01&resource=https://vault.azure.net";
    let metadata = [("Metadata", "true")];
    let url = format!("{}{query}", imds(&server));
    assert_eq!(server.send("GET", &url, &metadata, b"").unwrap().status, 404);
    server.kill();
    assert_eq!(vault.cli(&["serve", "--imds", "nobody"]).status.code(), Some(2));

    let server = vault.serve_with(&["--imds", "vm"]);
    let url = format!("{}{query}", imds(&server));
    let reply = server.send("GET", &url, &metadata, b"").unwrap().ok();
    assert_eq!(reply["client_id"], made["clientId"]);
    for field in ["access_token", "expires_on", "expires_in", "resource", "token_type"] {
        assert!(reply[field].is_string(), "{field}");
    }
    assert_eq!(server.send("GET", &url, &[], b"").unwrap().status, 400);
    let forwarded = [("Metadata", "true"), ("X-Forwarded-For", "10.0.0.1")];
    assert_eq!(server.send("GET", &url, &forwarded, b"").unwrap().status, 400);
    let other = format!("{url}&client_id=11111111-1111-1111-1111-111111111111");
    let answer = server.send("GET", &other, &metadata, b"").unwrap();
    assert_eq!(
        (answer.status, &answer.body),
        (400, &json!({ "error": "invalid_request", "error_description": "Identity not found" }))
    );
}

#[test]
fn tokens_of_a_deleted_identity_end_or_live_on_as_was_said() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    server.create_key(&server.admin(), "kek");
    let token = identity(&vault, &server, "db", "wrapKey");
    let header = std::fs::read_to_string(vault.dir.join("identities/db.header")).unwrap();
    vault.cli_json(&["identity", "delete", "db", "--keep-tokens"]);
    assert_eq!(server.ask_token(&header, &server.url).status, 400);
    assert_eq!(wrap(&server, &token, "kek").status, 200);
    // A new one of that name has nothing of the old one.
    let second = identity(&vault, &server, "db", "");
    assert_eq!(wrap(&server, &second, "kek").status, 403);
    assert_eq!(wrap(&server, &token, "kek").status, 200);
    vault.cli_json(&["identity", "delete", "db"]);
    assert_eq!(wrap(&server, &second, "kek").status, 401);
}
