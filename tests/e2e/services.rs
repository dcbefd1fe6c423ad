//! Two key services for one volume: each with its own identity, authority and rules, named by
//! `[[service]]`. The second vault is that of a second sandbox, which trusts nothing of the first.

use std::fs;

use serde_json::Value;

use crate::hsm::{Hsm, MODULE, has_hsm};
use crate::support::process::run;
use crate::support::sandbox::{IDENTITY, KEY, Sandbox, path};
use crate::support::{can_mount, until};

const CONFIG: i32 = 3;
const DENIED: i32 = 7;
const UNREACHABLE: i32 = 8;

/// The section for the vault of `of`, asked as the identity whose header is in that file.
fn section_as(of: &Sandbox, header: &str, more: &str) -> String {
    format!(
        "\n[[service]]\nkeys = \"{}/\"\nidentity = \"app-service\"\nidentity_endpoint = \"{}\"\n\
         identity_header_file = \"{}\"\nca_file = \"{}\"\n{more}",
        of.url(),
        of.identity_endpoint(),
        path(&of.path(header)),
        path(&of.path("vault/ca.pem")),
    )
}

fn section(of: &Sandbox, more: &str) -> String {
    section_as(of, "config/identity.header", more)
}

/// The section for the token, and no word of it in `[key]`.
fn token_section(hsm: &Hsm) -> String {
    format!(
        "\n[[service]]\nkeys = \"{}\"\npkcs11_module = \"{MODULE}\"\npkcs11_pin_file = \"{}\"\n",
        Hsm::uri("kek", None).replace(";object=kek", ""),
        path(&hsm.pin_file()),
    )
}

fn probes(sandbox: &Sandbox, count: usize) {
    for _ in 0..count {
        let last = sandbox.status()["last_probe"]["at"].clone();
        until("another probe", || sandbox.status()["last_probe"]["at"] != last);
    }
}

fn content(sandbox: &Sandbox) -> String {
    fs::read_to_string(sandbox.mnt().join("file")).unwrap()
}

fn rows(sandbox: &Sandbox, key: &str) -> Value {
    let answer = sandbox.byokfs(&["check-key", key, "--json"]);
    serde_json::from_str(&answer.out).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

fn verdict(table: &Value, requirement: &str) -> String {
    let rows = table["rows"].as_array().unwrap();
    let row = rows.iter().find(|row| row["requirement"] == requirement).unwrap();
    row["verdict"].as_str().unwrap().to_owned()
}

#[test]
fn a_serving_volume_moves_to_a_vault_with_its_own_identity_and_back() {
    if !can_mount() {
        return;
    }
    let other = Sandbox::bare();
    let mut own = Sandbox::mounted();
    fs::write(own.mnt().join("file"), "content").unwrap();
    let (mnt, first, elsewhere) = (own.mnt(), own.kek(), other.kek());
    let rotate =
        |own: &Sandbox, to: &str| own.byokfs(&["rotate", "kek", path(&mnt), "--to", to, "--json"]);

    // [key] is for the other vault too, as long as no section is: nothing of it is trusted.
    rotate(&own, &elsewhere).fails(UNREACHABLE);
    // An authority that is trusted does not make an identity that is known.
    own.configure(&section_as(&other, "config/identity.header", "").replace(
        path(&other.path("config/identity.header")),
        path(&own.path("config/identity.header")),
    ));
    rotate(&own, &elsewhere).fails(DENIED);
    // Another section's rules: they hold for its keys alone.
    own.configure(&section(&other, "region = \"elsewhere\"\n"));
    rotate(&own, &elsewhere).fails(DENIED);
    assert_eq!(verdict(&rows(&own, &elsewhere), "region"), "Fail");
    assert_eq!(verdict(&rows(&own, &first), "region"), "Ok");
    // A section that is wrong is told, and changes nothing.
    own.configure(&section(&other, "ca_file_two = \"\"\n"));
    let message = rotate(&own, &elsewhere).fails(CONFIG);
    assert!(message.contains("ca_file_two"), "{message}");
    own.configure(
        &section(&other, "").replace(path(&other.path("vault/ca.pem")), path(&mnt.join("ca.pem"))),
    );
    let message = rotate(&own, &elsewhere).fails(CONFIG);
    assert!(message.contains("lies on the mount"), "{message}");
    probes(&own, 2);
    assert!(own.kek_in_use().starts_with(&first));
    assert_eq!(own.state(), "Available");

    // The section was written after the mount was made.
    own.configure(&section(&other, ""));
    rotate(&own, &elsewhere).ok();
    assert!(own.kek_in_use().starts_with(&elsewhere));
    own.stop_vault();
    probes(&own, 5);
    assert_eq!((own.state(), content(&own)), ("Available".into(), "content".into()));
    own.umount();
    own.mount();
    assert_eq!(content(&own), "content");
    assert_eq!(verdict(&rows(&own, path(&mnt)), "the volume's envelope"), "Ok");

    // Watched, followed and revalidated by the other vault's word.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let newer = other.vault(&["key", "rotate", "--name", KEY]).trim().to_owned();
    until("the newer version to be followed", || own.kek_in_use() == newer);
    other.enable_key(false);
    own.until_inaccessible();
    assert_eq!(own.status()["reason"], "KeyDisabled");
    own.byokfs(&["revalidate", path(&mnt)]).fails(DENIED);
    other.enable_key(true);
    own.revalidate();
    assert_eq!(content(&own), "content");

    // Backed up by the vault that has it.
    let backup = own.path("kek.backup");
    other.vault(&["grant", "--identity", IDENTITY, "--key-permissions", "backup"]);
    own.byokfs(&["escrow", path(&mnt), "--file", path(&backup)]).ok();
    assert!(fs::metadata(&backup).unwrap().len() > 0);

    // And back: the vault that was away is the one of [key].
    own.start_vault();
    own.configure(&section(&other, ""));
    rotate(&own, &first).ok();
    other.vault(&["key", "delete", "--name", KEY]);
    probes(&own, 5);
    assert_eq!((own.state(), content(&own)), ("Available".into(), "content".into()));
    assert!(own.audit("KekRotated").iter().any(|event| event["followed"] == true));
}

#[test]
fn a_volume_that_is_not_mounted_is_made_moved_and_copied_between_two_vaults() {
    if !can_mount() {
        return;
    }
    let (other, mut own) = (Sandbox::bare(), Sandbox::bare());
    own.configure(&section(&other, ""));
    let back = own.back();
    own.byokfs(&["init", path(&back), "--kek", &other.kek()]).ok();
    own.mount();
    fs::write(own.mnt().join("file"), "content").unwrap();
    own.umount();
    own.byokfs(&["rotate", "kek", path(&back), "--to", &own.kek()]).ok();
    // A copy is given the other vault's key; then each lives by its own.
    let copy = own.path("copy");
    run("cp", &["-a", path(&back), path(&copy)]);
    own.byokfs(&["rekey", path(&copy), "--to", &other.kek()]).ok();
    let copy_before = own.needed_keys(&copy);
    assert!(copy_before.iter().all(|(kid, _)| kid.starts_with(&other.url())), "{copy_before:?}");
    own.stop_vault();
    own.byokfs(&["check-key", path(&copy)]).ok();
    own.byokfs(&["check-key", path(&back)]).fails(UNREACHABLE);
    own.set_back(copy);
    own.mount();
    assert_eq!(content(&own), "content");
    other.enable_key(false);
    own.until_inaccessible();
}

#[test]
fn a_volume_moves_from_a_vault_to_a_token_of_its_own_section_and_back() {
    if !can_mount() || !has_hsm() {
        return;
    }
    let mut own = Sandbox::mounted();
    let mut hsm = Hsm::new(own.path("").as_path());
    hsm.make("kek", 1);
    fs::write(own.mnt().join("file"), "content").unwrap();
    let (mnt, token) = (own.mnt(), Hsm::uri("kek", Some(1)));
    let message = own.byokfs(&["rotate", "kek", path(&mnt), "--to", &token]).fails(CONFIG);
    assert!(message.contains("pkcs11_module"), "{message}");
    own.configure(&token_section(&hsm));
    own.byokfs(&["check-key", &token]).ok();
    own.byokfs(&["rotate", "kek", path(&mnt), "--to", &token]).ok();
    own.stop_vault();
    probes(&own, 5);
    assert_eq!((own.state(), own.kek_in_use()), ("Available".into(), token.clone()));
    own.umount();
    own.mount();
    assert_eq!(content(&own), "content");
    own.start_vault();
    own.configure(&token_section(&hsm));
    own.byokfs(&["rotate", "kek", path(&mnt), "--to", &own.kek()]).ok();
    fs::rename(hsm.tokens(), hsm.tokens().with_extension("away")).unwrap();
    probes(&own, 5);
    assert_eq!((own.state(), content(&own)), ("Available".into(), "content".into()));
}

/// As a host gets another identity: first the new one, then the old one goes.
#[test]
fn a_revalidation_asks_as_whom_the_configuration_says_by_now() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted();
    fs::write(sandbox.mnt().join("file"), "content").unwrap();
    let change_identity = |name: &str| {
        sandbox.create_identity(name);
        let permissions = ["--key-permissions", "get,list,wrapKey,unwrapKey"];
        sandbox.vault(&[&["grant", "--identity", name], &permissions[..]].concat());
        // As a new file: the old one stays what the daemon was started with.
        let header = sandbox.path(&format!("config/{name}.header"));
        fs::rename(sandbox.path("config/identity.header"), &header).unwrap();
        sandbox.configure("");
        let file = sandbox.path("config/byokfs.toml");
        let config = fs::read_to_string(&file).unwrap();
        let config = config.replace(path(&sandbox.path("config/identity.header")), path(&header));
        fs::write(&file, config).unwrap();
    };
    // While it serves.
    change_identity("second");
    sandbox.revalidate();
    sandbox.vault(&["identity", "delete", IDENTITY]);
    probes(&sandbox, 5);
    assert_eq!(sandbox.state(), "Available");
    // And when the old one is gone already.
    sandbox.vault(&["identity", "delete", "second"]);
    sandbox.until_inaccessible();
    change_identity("third");
    sandbox.revalidate();
    probes(&sandbox, 5);
    assert_eq!((sandbox.state(), content(&sandbox)), ("Available".into(), "content".into()));
}

/// What is asked of a mount reads the configuration anew, without the options of the mount.
#[test]
fn a_fence_whose_server_a_mount_option_names_is_no_hindrance_afterwards() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::bare();
    sandbox.init().ok();
    sandbox.configure("[fence]\nenabled = true");
    sandbox.try_mount().fails(CONFIG);
    let socket = sandbox.path("mysqld.sock");
    sandbox.try_mount_with(&["--fence-socket", path(&socket)]).ok();
    assert_eq!(sandbox.state(), "Available");
    sandbox.revoke();
    sandbox.recover();
    sandbox.byokfs(&["check-key", path(&sandbox.mnt())]).ok();
    sandbox.umount();
}
