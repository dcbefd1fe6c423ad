//! A volume whose key is in a hardware security module: every step of its life, and every way to
//! lose the key.

use std::fs;

use serde_json::Value;

use crate::hsm::{Hsm, MODULE, Step, has_hsm};
use crate::memory::volume_key_by;
use crate::support::sandbox::{Sandbox, path};
use crate::support::scan::{Needle, scan};
use crate::support::{can_mount, until};

const USAGE: i32 = 2;
const CONFIG: i32 = 3;
const DENIED: i32 = 7;
const UNREACHABLE: i32 = 8;

/// A sandbox whose configuration names a token with one key, of the id 1.
fn with_key() -> (Sandbox, Hsm) {
    let sandbox = Sandbox::bare();
    let mut hsm = Hsm::new(sandbox.path("").as_path());
    hsm.make("kek", 1);
    configure(&sandbox, &hsm);
    (sandbox, hsm)
}

fn configure(sandbox: &Sandbox, hsm: &Hsm) {
    sandbox.configure("");
    let file = sandbox.path("config/byokfs.toml");
    let key = format!(
        "[key]\npkcs11_module = \"{MODULE}\"\npkcs11_pin_file = \"{}\"\n",
        path(&hsm.pin_file())
    );
    let config = fs::read_to_string(&file).unwrap();
    fs::write(&file, config.replace("[key]\n", &key)).unwrap();
}

fn init(sandbox: &Sandbox, kek: &str) {
    sandbox.byokfs(&["init", path(&sandbox.back()), "--kek", kek]).ok();
}

fn table(sandbox: &Sandbox, key: &str) -> Value {
    let answer = sandbox.byokfs(&["check-key", key, "--json"]);
    serde_json::from_str(&answer.out).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

/// The verdict of a requirement; "" where it is not in the table.
fn verdict(table: &Value, requirement: &str) -> String {
    let rows = table["rows"].as_array().unwrap();
    let row = rows.iter().find(|row| row["requirement"] == requirement);
    row.map_or(String::new(), |row| row["verdict"].as_str().unwrap().to_owned())
}

#[test]
fn a_tokens_key_is_checked() {
    if !has_hsm() {
        return;
    }
    let (sandbox, mut hsm) = with_key();
    let good = table(&sandbox, &Hsm::uri("kek", None));
    assert_eq!(good["kid"], Hsm::uri("kek", Some(1)).as_str());
    for requirement in [
        "key type",
        "key size",
        "key operations",
        "not exportable",
        "permission get",
        "permission list",
        "permission wrapKey",
        "permission unwrapKey",
    ] {
        assert_eq!(verdict(&good, requirement), "Ok", "{requirement}: {good}");
    }
    assert_eq!(good["verdict"], "Warn", "it can be destroyed: {good}");
    assert_eq!(verdict(&good, "purge protection"), "Warn");

    hsm.step(&Step::Make { label: "loose".into(), id: 2, bits: 2048, extractable: true });
    assert_eq!(verdict(&table(&sandbox, &Hsm::uri("loose", None)), "not exportable"), "Warn");
    hsm.step(&Step::Make { label: "small".into(), id: 3, bits: 1024, extractable: false });
    assert_eq!(verdict(&table(&sandbox, &Hsm::uri("small", None)), "key size"), "Fail");
    hsm.step(&Step::Decrypts(1, false));
    let forbidden = table(&sandbox, &Hsm::uri("kek", None));
    assert_eq!(verdict(&forbidden, "key operations"), "Fail");
    assert_eq!(verdict(&forbidden, "permission unwrapKey"), "Fail");
    assert_eq!(verdict(&table(&sandbox, &Hsm::uri("none", None)), "key exists"), "Fail");

    // Versions are told apart by their start.
    hsm.step(&Step::Decrypts(1, true));
    hsm.make("kek", 4);
    let both = sandbox.byokfs(&["check-key", &Hsm::uri("kek", None)]).fails(DENIED);
    assert!(both.contains("requirements"), "{both}");
    hsm.step(&Step::Starts(4, "2026-01-02".into()));
    assert_eq!(table(&sandbox, &Hsm::uri("kek", None))["kid"], Hsm::uri("kek", Some(4)).as_str());
    let older = table(&sandbox, &Hsm::uri("kek", Some(1)));
    assert_eq!(verdict(&older, "key version"), "Warn");
}

#[test]
fn what_is_misconfigured_is_told() {
    if !has_hsm() {
        return;
    }
    let (sandbox, hsm) = with_key();
    let kek = Hsm::uri("kek", None);
    let check = |key: &str| sandbox.byokfs(&["check-key", key]);
    check("pkcs11:token=x").fails(USAGE);
    check(&format!("{kek}?module-path=/tmp/x.so")).fails(USAGE);
    let gone = check("pkcs11:token=elsewhere;object=kek").fails(UNREACHABLE);
    assert!(gone.contains("no token called elsewhere"), "{gone}");
    hsm.write_pin("9999");
    let message = check(&kek).fails(DENIED);
    assert!(!message.contains("9999"), "{message}");
    let file = sandbox.path("config/byokfs.toml");
    let config = fs::read_to_string(&file).unwrap();
    fs::write(&file, config.replace(MODULE, "/nonexistent/module.so")).unwrap();
    let message = check(&kek).fails(CONFIG);
    assert!(message.contains("/nonexistent/module.so"), "{message}");
    // A library that is none.
    fs::write(&file, config.replace(MODULE, "/etc/passwd")).unwrap();
    check(&kek).fails(UNREACHABLE);
}

#[test]
fn a_volume_lives_on_a_tokens_key() {
    if !can_mount() || !has_hsm() {
        return;
    }
    let (mut sandbox, _hsm) = with_key();
    init(&sandbox, &Hsm::uri("kek", None));
    let info = sandbox.byokfs(&["info", path(&sandbox.back()), "--json"]).ok();
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["provider"], "pkcs11");
    // The algorithm is the token's best: SoftHSM 2.6 knows OAEP with SHA-1 only.
    let algorithm = info["algorithm"].as_str().unwrap();
    assert!(["RSA-OAEP", "RSA-OAEP-256"].contains(&algorithm), "{info}");
    assert_eq!(info["kek"], Hsm::uri("kek", Some(1)).as_str());

    sandbox.mount();
    fs::write(sandbox.mnt().join("file"), "content").unwrap();
    sandbox.umount();
    sandbox.mount();
    assert_eq!(fs::read_to_string(sandbox.mnt().join("file")).unwrap(), "content");
    assert_eq!(verdict(&table(&sandbox, path(&sandbox.mnt())), "the volume's envelope"), "Ok");
    sandbox.umount();

    // An envelope that the token does not take is refused, and not taken for an outage.
    let file = sandbox.back().join("envelope.json");
    let mut envelope: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let canary = envelope["canary"]["wrapped"].as_str().unwrap().to_owned();
    let first = if canary.starts_with('A') { "B" } else { "A" };
    envelope["canary"]["wrapped"] = format!("{first}{}", &canary[1..]).into();
    fs::write(&file, envelope.to_string()).unwrap();
    let message =
        sandbox.byokfs(&["mount", path(&sandbox.back()), path(&sandbox.mnt())]).fails(DENIED);
    assert!(message.contains("not wrapped with this key"), "{message}");
}

#[test]
fn no_key_is_left_in_memory_after_the_cut_off() {
    if !can_mount() || !has_hsm() {
        return;
    }
    let (mut sandbox, mut hsm) = with_key();
    init(&sandbox, &Hsm::uri("kek", None));
    sandbox.mount();
    fs::write(sandbox.mnt().join("file"), "content").unwrap();
    let probe = sandbox.status()["last_success"].clone();
    until("a probe", || sandbox.status()["last_success"] != probe);
    let key = volume_key_by(&sandbox, &hsm.settings()).expose().to_vec();
    let key = [Needle { name: "volume key".into(), key }];
    assert!(!scan(sandbox.daemon(), &key).is_empty(), "the search finds nothing at all");
    hsm.step(&Step::Decrypts(1, false));
    sandbox.until_inaccessible();
    let clean = || {
        let found = scan(sandbox.daemon(), &key);
        println!("{found:?}");
        found.is_empty()
    };
    until("a memory without keys", clean);
    // Foreign code was never in it.
    let maps = fs::read_to_string(format!("/proc/{}/maps", sandbox.daemon())).unwrap();
    assert!(!maps.contains("softhsm"), "{maps}");
}

/// One loss: how it happens, what it is called, and its way back.
type Loss = (fn(&mut Hsm), &'static str, fn(&mut Hsm));

#[test]
fn every_way_to_lose_a_tokens_key_and_every_way_back() {
    if !can_mount() || !has_hsm() {
        return;
    }
    let (mut sandbox, mut hsm) = with_key();
    init(&sandbox, &Hsm::uri("kek", Some(1)));
    sandbox.mount();
    let file = sandbox.mnt().join("file");
    fs::write(&file, "content").unwrap();
    let losses: [Loss; 5] = [
        (
            |hsm| hsm.step(&Step::Decrypts(1, false)),
            "PermissionRevoked",
            |hsm| hsm.step(&Step::Decrypts(1, true)),
        ),
        (
            |hsm| hsm.step(&Step::Ends(1, "2020-01-01".into())),
            "KeyExpired",
            |hsm| hsm.step(&Step::Ends(1, "2090-01-01".into())),
        ),
        (
            |hsm| hsm.step(&Step::Starts(1, "2090-01-01".into())),
            "KeyNotYetValid",
            |hsm| hsm.step(&Step::Starts(1, "2020-01-01".into())),
        ),
        (
            |hsm| {
                copy_tree(&hsm.tokens(), &hsm.tokens().with_extension("backup"));
                hsm.step(&Step::Delete(1));
            },
            "KeyNotFound",
            |hsm| {
                fs::remove_dir_all(hsm.tokens()).unwrap();
                fs::rename(hsm.tokens().with_extension("backup"), hsm.tokens()).unwrap();
            },
        ),
        (
            |hsm| hsm.step(&Step::ChangePin { from: "0000".into(), to: "1111".into() }),
            "CredentialInvalid",
            |hsm| hsm.write_pin("1111"),
        ),
    ];
    for (lose, reason, mend) in losses {
        lose(&mut hsm);
        until(&format!("the loss that is called {reason}"), || {
            let status = sandbox.status();
            status["state"] == "Inaccessible" && status["reason"] == reason
        });
        assert!(fs::read(&file).is_err(), "{reason}");
        sandbox.byokfs(&["revalidate", path(&sandbox.mnt())]).fails(DENIED);
        mend(&mut hsm);
        sandbox.revalidate();
        assert_eq!(fs::read_to_string(&file).unwrap(), "content", "{reason}");
    }

    // The PIN is set back to what the file holds all along: a person's word has it tried again, by
    // the watcher too.
    let change = |hsm: &mut Hsm, from: &str, to: &str| {
        hsm.step(&Step::ChangePin { from: from.into(), to: to.into() });
    };
    change(&mut hsm, "1111", "2222");
    sandbox.until_inaccessible();
    change(&mut hsm, "2222", "1111");
    sandbox.revalidate();
    for _ in 0..4 {
        let last = sandbox.status()["last_probe"]["at"].clone();
        until("another probe", || sandbox.status()["last_probe"]["at"] != last);
    }
    assert_eq!(sandbox.state(), "Available");

    // A token that is away says nothing about the key.
    let away = hsm.tokens().with_extension("away");
    fs::rename(hsm.tokens(), &away).unwrap();
    fs::create_dir(hsm.tokens()).unwrap();
    until("the token to be missed", || sandbox.state() == "Degraded");
    assert_eq!(sandbox.status()["reason"], "VaultGone");
    assert_eq!(fs::read_to_string(&file).unwrap(), "content");
    fs::remove_dir(hsm.tokens()).unwrap();
    fs::rename(&away, hsm.tokens()).unwrap();
    until("the token to be back", || sandbox.state() == "Available");
}

#[test]
fn a_volume_moves_from_a_vault_to_a_token_and_back() {
    if !can_mount() || !has_hsm() {
        return;
    }
    let sandbox = Sandbox::bare();
    let mut hsm = Hsm::new(sandbox.path("").as_path());
    hsm.make("kek", 1);
    configure(&sandbox, &hsm);
    init(&sandbox, &sandbox.kek());
    let mut sandbox = sandbox;
    sandbox.mount();
    let file = sandbox.mnt().join("file");
    fs::write(&file, "content").unwrap();
    let rotate = |sandbox: &Sandbox, to: &str| {
        sandbox.byokfs(&["rotate", "kek", path(&sandbox.mnt()), "--to", to]).ok();
    };
    rotate(&sandbox, &Hsm::uri("kek", Some(1)));
    assert_eq!(sandbox.status()["kek"], Hsm::uri("kek", Some(1)).as_str());
    // Now the vault means nothing to it.
    sandbox.stop_vault();
    let probe = sandbox.status()["last_success"].clone();
    until("a probe of the token", || sandbox.status()["last_success"] != probe);
    assert_eq!(sandbox.state(), "Available");
    sandbox.umount();
    sandbox.mount();
    assert_eq!(fs::read_to_string(&file).unwrap(), "content");

    // Named without an id, a later version is followed.
    rotate(&sandbox, &Hsm::uri("kek", None));
    hsm.make("kek", 2);
    hsm.step(&Step::Starts(2, "2026-01-02".into()));
    until("the later version", || sandbox.status()["kek"] == Hsm::uri("kek", Some(2)).as_str());
    sandbox.start_vault();
    configure(&sandbox, &hsm);
    rotate(&sandbox, &sandbox.kek());
    hsm.step(&Step::Delete(1));
    hsm.step(&Step::Delete(2));
    let probe = sandbox.status()["last_success"].clone();
    until("a probe of the vault", || sandbox.status()["last_success"] != probe);
    assert_eq!(sandbox.state(), "Available");
    assert_eq!(fs::read_to_string(&file).unwrap(), "content");
}

fn copy_tree(from: &std::path::Path, to: &std::path::Path) {
    let copied = std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(copied.success());
}
