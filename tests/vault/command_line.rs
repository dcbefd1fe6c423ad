//! The verbs: output, exit codes, and the conditions under which a server does not start.

use std::os::unix::fs::PermissionsExt as _;

use serde_json::Value;

use crate::harness::{Vault, byokfs, now, text};

fn set_mode(path: &std::path::Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Exit code and standard error.
fn failed(vault: &Vault, args: &[&str]) -> (i32, String) {
    let output = vault.cli(args);
    (output.status.code().unwrap(), text(&output.stderr))
}

#[test]
fn keys_from_the_command_line() {
    let vault = Vault::new(&[]);
    let _server = vault.serve();
    let output =
        vault.cli(&["key", "create", "--name", "kek", "--expires", "2030-01-01T00:00:00Z"]);
    let kid = text(&output.stdout);
    let url = std::fs::read_to_string(vault.dir.join("url")).unwrap();
    assert!(kid.starts_with(&format!("{}/keys/kek/", url.trim())), "{kid}");
    assert_eq!(kid.lines().count(), 1);

    let show = |args: &[&str]| vault.cli_json(&[&["key"], args].concat());
    let bundle = show(&["show", "--name", "kek"]);
    assert_eq!(bundle["key"]["kid"], kid.trim());
    assert_eq!(bundle["attributes"]["exp"], 1_893_456_000);
    assert_eq!(bundle["key"]["n"].as_str().unwrap().len(), 512);
    let set = |args: &[&str]| show(&[&["set-attributes", "--name", "kek"], args].concat());
    assert_eq!(set(&["--enabled", "false"])["attributes"]["enabled"], false);
    assert_eq!(set(&["--enabled", "true"])["attributes"]["enabled"], true);
    assert!(set(&["--expires", "none"])["attributes"].get("exp").is_none());
    assert_eq!(set(&["--not-before", "2020-01-01T00:00:00Z"])["attributes"]["nbf"], 1_577_836_800);
    assert_eq!(set(&["--tags", "a=1,b=2"])["tags"]["b"], "2");
    show(&["rotate", "--name", "kek"]);
    assert_eq!(show(&["list-versions", "--name", "kek"]).as_array().unwrap().len(), 2);
    assert_eq!(show(&["list"]).as_array().unwrap().len(), 1);
    assert!(show(&["delete", "--name", "kek"])["deletedDate"].is_i64());
    assert_eq!(show(&["list-deleted"]).as_array().unwrap().len(), 1);
    assert!(show(&["show-deleted", "--name", "kek"])["recoveryId"].is_string());
    assert_eq!(failed(&vault, &["key", "purge", "--name", "kek"]).0, 7);
    show(&["recover", "--name", "kek"]);
    for args in [
        &["key", "show", "--name", "kek"][..],
        &["key", "list"],
        &["key", "list-versions", "--name", "kek"],
        &["identity", "list"],
    ] {
        let output = vault.cli(args);
        assert!(output.status.success() && !output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn a_rotation_policy_is_set_and_shown() {
    let vault = Vault::new(&[]);
    let _server = vault.serve();
    vault.cli_json(&["key", "create", "--name", "kek", "--size", "2048"]);
    let policy = |args: &[&str]| vault.cli_json(&[&["key", "rotation-policy"], args].concat());
    let before = policy(&["show", "--name", "kek"]);
    assert_eq!(before["lifetimeActions"][0]["action"]["type"], "Notify");
    let set = policy(&["update", "--name", "kek", "--rotate-after", "P90D", "--expires-in", "P1Y"]);
    assert_eq!(set["lifetimeActions"][0]["trigger"]["timeAfterCreate"], "P90D");
    assert_eq!(policy(&["show", "--name", "kek"])["attributes"]["expiryTime"], "P1Y");
    let output = vault.cli(&["key", "rotation-policy", "show", "--name", "kek"]);
    assert!(text(&output.stdout).contains("P90D after creation"), "{}", text(&output.stdout));
    let off = policy(&["update", "--name", "kek"]);
    assert_eq!(off["lifetimeActions"].as_array().unwrap().len(), 0);
    for bad in [&["--rotate-after", "soon"][..], &["--rotate-before-expiry", "P30D"]] {
        let args = [&["key", "rotation-policy", "update", "--name", "kek"], bad].concat();
        assert_eq!(failed(&vault, &args).0, 2, "{bad:?}");
    }
}

#[test]
fn a_purged_key_comes_back_from_its_backup() {
    let vault = Vault::new(&["--no-purge-protection"]);
    let _server = vault.serve();
    let file = vault.dir.join("kek.backup");
    let file = file.to_str().unwrap();
    let kid = vault.cli_json(&["key", "create", "--name", "kek"])["key"]["kid"].clone();
    vault.cli_json(&["key", "backup", "--name", "kek", "--file", file]);
    assert_eq!(failed(&vault, &["key", "backup", "--name", "kek", "--file", file]).0, 1);
    assert_eq!(failed(&vault, &["key", "restore", "--file", file]).0, 7);
    vault.cli_json(&["key", "delete", "--name", "kek"]);
    vault.cli_json(&["key", "purge", "--name", "kek"]);
    let restored = vault.cli_json(&["key", "restore", "--file", file]);
    assert_eq!(restored["key"]["kid"], kid);
}

#[test]
fn more_keys_than_a_page_are_all_listed() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let admin = server.admin();
    for n in 0..27 {
        server.create_key(&admin, &format!("k{n:02}"));
    }
    assert_eq!(vault.cli_json(&["key", "list"]).as_array().unwrap().len(), 27);
}

#[test]
fn identities_from_the_command_line() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let made = vault.cli_json(&["identity", "create", "db"]);
    let header = vault.dir.join("identities/db.header");
    assert_eq!(made["headerFile"], header.to_str().unwrap());
    assert_eq!(made["endpoint"], server.identity_url.as_str());
    assert_eq!(std::fs::metadata(&header).unwrap().permissions().mode() & 0o777, 0o600);
    let granted = vault.cli_json(&[
        "grant",
        "--identity",
        "db",
        "--key-permissions",
        "get,list,wrapKey,unwrapKey",
    ]);
    assert_eq!(
        granted["keyPermissions"],
        serde_json::json!(["get", "list", "wrapKey", "unwrapKey"])
    );
    let left = vault.cli_json(&["revoke", "--identity", "db", "--key-permissions", "list"]);
    assert_eq!(left["keyPermissions"], serde_json::json!(["get", "wrapKey", "unwrapKey"]));
    assert_eq!(vault.cli_json(&["identity", "list"]).as_array().unwrap().len(), 2);

    // A second one of that name changes neither the identity nor its secret.
    let secret = std::fs::read(&header).unwrap();
    assert_eq!(failed(&vault, &["identity", "create", "db"]).0, 9);
    let elsewhere = vault.dir.join("elsewhere");
    let args = ["identity", "create", "db", "--header-file", elsewhere.to_str().unwrap()];
    assert_eq!(failed(&vault, &args).0, 7);
    assert!(!elsewhere.exists());
    assert_eq!(std::fs::read(&header).unwrap(), secret);
    vault.cli_json(&["identity", "delete", "db"]);
    assert!(!header.exists());
    assert_eq!(failed(&vault, &["identity", "delete", "db"]).0, 7);
    assert_eq!(failed(&vault, &["identity", "delete", "admin"]).0, 2);
}

#[test]
fn the_secret_of_an_identity_that_is_deleted_in_another_case_goes_too() {
    let vault = Vault::new(&[]);
    let _server = vault.serve();
    vault.cli_json(&["identity", "create", "db"]);
    vault.cli_json(&["identity", "delete", "DB"]);
    assert!(!vault.dir.join("identities/db.header").exists());
    vault.cli_json(&["identity", "create", "db"]);
}

/// Runs the command where no file can be written to, as on a full disk.
fn without_room(vault: &Vault, args: &[&str]) -> (i32, String) {
    let output = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 0; exec \"$0\" vault \"$@\""])
        .arg(env!("CARGO_BIN_EXE_byokfs"))
        .args(args)
        .env("BYOKFS_VAULT", &vault.dir)
        .output()
        .unwrap();
    (output.status.code().unwrap(), text(&output.stderr))
}

#[test]
fn a_file_that_could_not_be_written_is_not_left_behind() {
    let vault = Vault::new(&[]);
    let _server = vault.serve();
    vault.cli_json(&["key", "create", "--name", "kek", "--size", "2048"]);
    let file = vault.dir.join("kek.backup");
    let backup = ["key", "backup", "--name", "kek", "--file", file.to_str().unwrap()];
    for (args, written) in [
        (&["identity", "create", "db"][..], vault.dir.join("identities/db.header")),
        (&backup, file.clone()),
    ] {
        let (code, said) = without_room(&vault, args);
        assert!(code != 0 && said.contains("cannot write"), "{args:?}: {code} {said}");
        assert!(!written.exists(), "{args:?}");
        vault.cli_json(args);
    }
}

#[test]
fn wrong_arguments_are_exit_2() {
    let vault = Vault::new(&[]);
    let _server = vault.serve();
    for args in [
        &["key", "create"][..],
        &["key", "create", "--name", "a_b"],
        &["key", "create", "--name", "k", "--size", "1024"],
        &["key", "create", "--name", "k", "--kty", "EC"],
        &["key", "create", "--name", "k", "--expires", "soon"],
        &["key", "create", "--name", "k", "--ops", "fly"],
        &["key", "set-attributes", "--name", "k"],
        &["key", "set-attributes", "--name", "k", "--enabled", "maybe"],
        &["identity", "create", "a/b"],
        &["grant", "--identity", "db", "--key-permissions", "fly"],
        &["grant", "--identity", "db", "--key-permissions", ""],
        &["fly"],
    ] {
        let (code, said) = failed(&vault, args);
        assert_eq!(code, 2, "{args:?}: {said}");
        assert!(said.starts_with("byokfs: "), "{said}");
    }
    let output = byokfs().args(["vault", "key", "list"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "without --vault");
}

#[test]
fn a_vault_that_does_not_run_is_exit_8() {
    let vault = Vault::new(&[]);
    let (code, said) = failed(&vault, &["key", "list"]);
    assert_eq!(code, 8);
    assert!(said.contains("byokfs vault serve"), "{said}");
    // Killed: the files that say where it listened are still there.
    vault.serve().kill();
    assert_eq!(failed(&vault, &["key", "list"]).0, 8);
    assert!(vault.dir.join("url").exists());
    // Stopped: they are gone, and the next start listens at the same place.
    let server = vault.serve();
    let url = server.url.clone();
    assert_eq!(server.stop(), Some(0));
    assert!(!vault.dir.join("url").exists() && !vault.dir.join("identity.url").exists());
    assert_eq!(failed(&vault, &["key", "list"]).0, 8);
    assert_eq!(vault.serve().url, url);
}

#[test]
fn init_leaves_what_is_there_alone() {
    let vault = Vault::new(&[]);
    let before = std::fs::read(vault.dir.join("vault.db")).unwrap();
    let output = byokfs().args(["vault", "init"]).arg(&vault.dir).output().unwrap();
    assert_eq!(output.status.code(), Some(9));
    assert_eq!(std::fs::read(vault.dir.join("vault.db")).unwrap(), before);
    for bad in [&["--name", "x"][..], &["--retention-days", "5"], &["--host", "nowhere"]] {
        let elsewhere = vault.dir.join("no");
        let output = byokfs().args(["vault", "init"]).arg(&elsewhere).args(bad).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{bad:?}");
        assert!(!elsewhere.exists());
    }
}

#[test]
fn a_server_refuses_open_modes_a_foreign_root_key_and_company() {
    let vault = Vault::new(&[]);
    let refused = |expected: i32, word: &str| {
        let output = vault.cli(&["serve"]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(expected), "{said}");
        assert!(said.contains(word), "{said}");
    };
    let root = vault.dir.join("root.key");
    for mode in [0o644, 0o640, 0o660] {
        set_mode(&root, mode);
        refused(7, "root.key");
    }
    set_mode(&root, 0o600);
    set_mode(&vault.dir, 0o755);
    refused(7, "0700");
    set_mode(&vault.dir, 0o700);

    let good = std::fs::read(&root).unwrap();
    std::fs::write(&root, [9; 32]).unwrap();
    refused(6, "root key");
    std::fs::write(&root, &good[..31]).unwrap();
    refused(6, "root.key");
    std::fs::write(&root, &good).unwrap();
    set_mode(&root, 0o600);

    let server = vault.serve();
    refused(9, "already serves");
    let port = server.url.rsplit(':').next().unwrap().to_owned();
    let other = Vault::new(&[]);
    let output = other.cli(&["serve", "--port", &port]);
    assert_eq!(output.status.code(), Some(9));
    assert_eq!(
        byokfs().args(["vault", "serve", "/nonexistent"]).output().unwrap().status.code(),
        Some(4)
    );
}

#[test]
fn a_damaged_database_is_refused_not_served() {
    let vault = Vault::new(&[]);
    std::fs::write(vault.dir.join("vault.db"), vec![7; 8192]).unwrap();
    assert_eq!(failed(&vault, &["serve"]).0, 6);
}

#[test]
fn calls_are_in_the_audit_log_and_secrets_nowhere() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let token = crate::harness::identity(&vault, &server, "db", "get");
    let admin = server.admin();
    let bundle = server.create_key(&admin, "kek");
    let version = bundle["key"]["kid"].as_str().unwrap().rsplit('/').next().unwrap();
    server.call(&token, "GET", "/keys/kek", Value::Null).ok();
    let secret = crate::harness::b64(&[0x42; 32]);
    let body = serde_json::json!({ "alg": "RSA-OAEP-256", "value": secret });
    assert_eq!(server.call(&token, "POST", "/keys/kek/wrapkey", body.clone()).status, 403);
    server.call(&admin, "POST", "/keys/kek/wrapkey", body).ok();
    let header = std::fs::read_to_string(vault.dir.join("identities/db.header")).unwrap();

    let log = std::fs::read_to_string(vault.dir.join("audit.jsonl")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let find = |operation: &str, caller: &str| {
        lines
            .iter()
            .find(|line| line["operationName"] == operation && line["byokfs"]["caller"] == caller)
            .unwrap_or_else(|| panic!("{operation} by {caller} is not in the log"))
    };
    let get = find("KeyGet", "db");
    assert_eq!(
        (&get["resultType"], &get["byokfs"]["keyVersion"]),
        (&"Success".into(), &version.into())
    );
    let wrap = find("KeyWrap", "db");
    assert_eq!(
        (&wrap["properties"]["httpStatusCode"], &wrap["resultSignature"]),
        (&403.into(), &"Forbidden".into())
    );
    assert_eq!(wrap["byokfs"]["reason"], "ForbiddenByPolicy");
    assert!(wrap["resultDescription"].as_str().unwrap().contains("wrapKey permission"));
    let claim = "http://schemas.microsoft.com/identity/claims/objectidentifier";
    assert_eq!(wrap["identity"]["claim"][claim].as_str().unwrap().len(), 36);
    assert_eq!(get["properties"]["id"], bundle["key"]["kid"]);
    assert_eq!(get["operationVersion"], "7.4");
    assert_eq!(
        (&get["category"], &get["callerIpAddress"]),
        (&"AuditEvent".into(), &"127.0.0.1".into())
    );
    find("KeyCreate", "admin");
    find("TokenIssue", "db");
    assert_eq!(find("PermissionsGrant", "admin")["byokfs"]["subject"], "db");
    for word in [&token, &admin, &secret, &header] {
        assert!(!log.contains(word.as_str()), "a secret is in the audit log");
    }
    // At rest: no header secret, no private key in the clear.
    let database = std::fs::read(vault.dir.join("vault.db")).unwrap();
    let rsa_private_key = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
    assert!(!database.windows(rsa_private_key.len()).any(|window| window == rsa_private_key));
    assert!(!database.windows(header.len()).any(|window| window == header.as_bytes()));
    assert!(now() > 0);
}
