//! `byokfs check-key`: the table for keys that meet the requirements and for keys that do not.

use std::fs;

use serde_json::Value;

use crate::support::can_mount;
use crate::support::process::{Answer, run};
use crate::support::sandbox::{IDENTITY, KEY, Sandbox, path};

const USAGE: i32 = 2;
const CONFIG: i32 = 3;
const DENIED: i32 = 7;
const UNREACHABLE: i32 = 8;

fn check(sandbox: &Sandbox, args: &[&str]) -> Answer {
    sandbox.byokfs(&[&["check-key"], args].concat())
}

fn table(answer: &Answer) -> Value {
    serde_json::from_str(&answer.out).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

/// Verdict of a requirement, and why it is refused.
#[track_caller]
fn row(table: &Value, requirement: &str) -> (String, Option<String>) {
    let rows = table["rows"].as_array().unwrap();
    let row = rows.iter().find(|row| row["requirement"] == requirement);
    let row = row.unwrap_or_else(|| panic!("no row {requirement}: {table}"));
    let text = |field: &str| row[field].as_str().map(str::to_owned);
    (text("verdict").unwrap(), text("reason"))
}

#[test]
fn a_good_key_meets_every_requirement() {
    let sandbox = Sandbox::bare();
    let answer = check(&sandbox, &[&sandbox.kek(), "--strict"]);
    let text = answer.ok();
    for requirement in [
        "key type",
        "key size",
        "key operations",
        "enabled",
        "activation",
        "expiry",
        "soft delete for 90 days",
        "purge protection",
        "tenant",
        "region",
        "permission get",
        "permission list",
        "key version",
        "permission wrapKey",
        "permission unwrapKey",
    ] {
        let line = text.lines().find(|line| line.starts_with(requirement));
        assert!(line.is_some_and(|line| line.ends_with(" ok")), "{requirement}: {text}");
    }
    let json = table(&check(&sandbox, &[&sandbox.kek(), "--json"]));
    assert_eq!(json["verdict"], "Ok");
    assert!(json["kid"].as_str().unwrap().starts_with(&sandbox.kek()), "with its version: {json}");
}

#[test]
fn what_is_missing_is_told_with_its_remedy() {
    let sandbox = Sandbox::bare();
    sandbox.vault(&["key", "set-attributes", "--name", KEY, "--expires", "2090-01-01T00:00:00Z"]);
    let warned = check(&sandbox, &[&sandbox.kek()]).ok();
    assert!(warned.contains("2090-01-01T00:00:00Z"), "{warned}");
    assert!(warned.contains("WARN  remove the expiry date"), "{warned}");
    let strict = check(&sandbox, &[&sandbox.kek(), "--strict", "--json"]);
    assert_eq!(row(&table(&strict), "expiry").0, "Fail");
    strict.fails(DENIED);

    sandbox.enable_key(false);
    let answer = check(&sandbox, &[&sandbox.kek(), "--json"]);
    assert_eq!(row(&table(&answer), "enabled"), ("Fail".into(), Some("KeyDisabled".into())));
    answer.fails(DENIED);
    sandbox.enable_key(true);

    for (permission, requirement) in [
        ("get", "permission get"),
        ("list", "permission list"),
        ("wrapKey", "permission wrapKey"),
        ("unwrapKey", "permission unwrapKey"),
    ] {
        let change = |verb| {
            sandbox.vault(&[verb, "--identity", IDENTITY, "--key-permissions", permission]);
        };
        change("revoke");
        let answer = check(&sandbox, &[&sandbox.kek(), "--json"]);
        let refused = row(&table(&answer), requirement);
        assert_eq!(refused, ("Fail".into(), Some("PermissionRevoked".into())), "{permission}");
        answer.fails(DENIED);
        change("grant");
    }
    sandbox.vault(&["key", "delete", "--name", KEY]);
    let answer = check(&sandbox, &[&sandbox.kek(), "--json"]);
    assert_eq!(row(&table(&answer), "key exists"), ("Fail".into(), Some("KeyDeleted".into())));
    answer.fails(DENIED);
}

#[test]
fn region_and_tenant_are_compared_with_the_configuration() {
    let sandbox = Sandbox::bare();
    let configure = |line: &str| {
        sandbox.configure("");
        let file = sandbox.path("config/byokfs.toml");
        let config = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, config.replace("[key]\n", &format!("[key]\n{line}\n"))).unwrap();
    };
    configure("region = \"Local\"");
    check(&sandbox, &[&sandbox.kek()]).ok();
    configure("region = \"westeurope\"");
    let answer = check(&sandbox, &[&sandbox.kek(), "--json"]);
    assert_eq!(row(&table(&answer), "region").0, "Fail");
    let message = answer.fails(DENIED);
    assert!(message.contains("1 of the requirements"), "{message}");
    // The same check refuses a new volume.
    let message = sandbox.init().fails(DENIED);
    assert!(message.contains("region"), "{message}");

    configure("tenant_id = \"00000000-0000-0000-0000-000000000000\"");
    let answer = check(&sandbox, &[&sandbox.kek(), "--json"]);
    assert_eq!(row(&table(&answer), "tenant"), ("Fail".into(), Some("TokenRefused".into())));
    answer.fails(DENIED);
}

#[test]
fn a_volume_is_checked_by_its_name() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted();
    for name in [sandbox.mnt(), sandbox.back()] {
        let json = table(&check(&sandbox, &[path(&name), "--json"]));
        assert_eq!(row(&json, "the volume's envelope").0, "Ok");
        assert_eq!(sandbox.needed_keys(&name).len(), 1);
        let answer = sandbox.byokfs(&["info", "--keys", path(&name)]);
        assert_eq!(answer.err, "", "nothing to warn of");
        sandbox.byokfs(&["info", path(&name)]).ok();
    }
    let (mnt, other) = (sandbox.mnt(), sandbox.kek());
    let answer = sandbox.byokfs(&["revalidate", path(&mnt), "--accept-key", &other]);
    assert!(answer.fails(DENIED).contains("none is accepted"));
    let trail = |event: &str| sandbox.audit(event).len();
    assert_eq!(trail("MakeInaccessible"), 0, "a check changes nothing");
    sandbox.vault(&["key", "set-attributes", "--name", KEY, "--expires", "2090-01-01T00:00:00Z"]);
    let answer = sandbox.byokfs(&["revalidate", path(&sandbox.mnt())]);
    assert!(answer.err.contains("warning: expiry: 2090-01-01T00:00:00Z"), "{answer}");
    answer.ok();
}

/// Each key here is as it should be; whether it is this volume's, the pin knows.
#[test]
fn a_volume_is_checked_for_what_this_host_knows_of_it() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::bare();
    sandbox.init().ok();
    let (back, copy) = (sandbox.back(), sandbox.path("copy"));
    let old = fs::read(back.join("envelope.json")).unwrap();
    let place = "the volume's place";
    let answer = check(&sandbox, &[path(&back), "--json"]).ok();
    assert!(!answer.contains(place), "{answer}");

    run("cp", &["-a", path(&back), path(&copy)]);
    let answer = check(&sandbox, &[path(&copy), "--json"]);
    assert_eq!(row(&table(&answer), place), ("Warn".into(), Some("NotConfirmed".into())));
    answer.ok();
    check(&sandbox, &[path(&copy), "--strict"]).fails(DENIED);

    sandbox.create_key("second", &["--kty", "RSA", "--size", "2048"]);
    sandbox.byokfs(&["rotate", "kek", path(&back), "--to", &sandbox.key_url("second")]).ok();
    check(&sandbox, &[path(&back)]).ok();
    fs::write(back.join("envelope.json"), old).unwrap();
    let answer = check(&sandbox, &[path(&back), "--json"]);
    assert_eq!(row(&table(&answer), place), ("Fail".into(), Some("NotConfirmed".into())));
    answer.fails(DENIED);

    let pin = fs::read_dir(sandbox.path("config/volumes.d")).unwrap().next().unwrap().unwrap();
    fs::write(pin.path(), "nonsense").unwrap();
    let message = check(&sandbox, &[path(&back)]).fails(CONFIG);
    assert!(message.contains("is not a volume's pin"), "{message}");
    fs::remove_file(pin.path()).unwrap();
    check(&sandbox, &[path(&back)]).ok();
}

#[test]
fn silence_is_not_a_verdict() {
    let mut sandbox = Sandbox::bare();
    let kek = sandbox.kek();
    sandbox.stop_vault();
    let message = check(&sandbox, &[&kek]).fails(UNREACHABLE);
    assert!(message.contains(&kek), "{message}");
    check(&sandbox, &["https://kv.example/secrets/x"]).fails(USAGE);
}
