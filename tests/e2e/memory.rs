//! The daemon's whole memory, searched as root before and after the cut-off.
//!
//! The test gets the volume key the way the daemon does, from the vault with the envelope, and
//! derives the other keys by the library's own functions and docs/FORMAT.md.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use byokfs::crypto::secret::Secret;
use byokfs::crypto::{kdf, wrap};
use byokfs::key::clock::BootTime;
use byokfs::key::keyring::Keyring;
use byokfs::key::provider::{self, Algorithm, AppService, Identity, Settings};
use serde_json::Value;

use crate::support::sandbox::Sandbox;
use crate::support::scan::{Finding, Needle, scan};
use crate::support::{can_mount, tree, until};

/// A word that is read and written through the mount all the time.
const PAYLOAD: &[u8; 32] = b"payload-that-nobody-else-has-9f3";

/// Every key of the volume, and of each file in it.
fn keys(sandbox: &Sandbox) -> Vec<Needle> {
    let mut needles = Vec::new();
    let mut add = |name: String, key: &Secret<32>| {
        needles.push(Needle { name, key: key.expose().to_vec() });
    };
    let volume_key = volume_key(sandbox);
    add("volume key".to_owned(), &volume_key);
    let keyring = Keyring::new(1, volume_key.try_clone().unwrap());
    for label in ["volume mac", "session table mac", "file header mac", "pending write mac"] {
        add(label.to_owned(), &keyring.derive(&format!("byokfs {label} v1"), &[]).unwrap());
    }
    for purpose in NAME_KEYS {
        for half in ["s2v", "ctr"] {
            add(format!("{purpose} {half}"), &keyring.derive(purpose, half.as_bytes()).unwrap());
        }
    }
    let sessions = fs::read(sandbox.back().join("sessions.a")).unwrap();
    let salts: Vec<&[u8]> = sessions[64..].chunks_exact(40).map(|entry| &entry[8..]).collect();
    assert!(!salts.is_empty());
    for file in tree::files(&sandbox.tree()) {
        let mut header = [0; 512];
        fs::File::open(&file).unwrap().read_exact_at(&mut header, 0).unwrap();
        let id = &header[32..48];
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let mut unwrapped = |what: &str, label: &str, at: usize| {
            let kek = keyring.derive(label, id).unwrap();
            let key = wrap::unwrap(&kek, header[at..at + 40].try_into().unwrap()).unwrap();
            let key = key.unwrap_or_else(|| panic!("{what} of {name} does not unwrap"));
            add(format!("kek of the {what} of {name}"), &kek);
            add(format!("{what} of {name}"), &key);
            key
        };
        unwrapped("mac key", "byokfs file mac wrap v1", 144);
        let dek = unwrapped("DEK", "byokfs dek wrap v1", 192 + 8);
        for (session, salt) in salts.iter().enumerate() {
            let key = kdf::derive(&dek, salt, "byokfs block key v1", id).unwrap();
            add(format!("block key {session} of {name}"), &key);
        }
    }
    needles
}

const NAME_KEYS: [&str; 2] = ["byokfs names v1", "byokfs values v1"];

fn volume_key(sandbox: &Sandbox) -> Secret<32> {
    volume_key_by(
        sandbox,
        &Settings {
            identity: Identity::AppService(AppService {
                endpoint: Some(sandbox.identity_endpoint()),
                header_file: Some(sandbox.path("config/identity.header")),
                client_id: None,
            }),
            ca_file: Some(sandbox.path("vault/ca.pem")),
            ..Settings::default()
        },
    )
}

/// The volume key, from the service that the envelope names.
pub fn volume_key_by(sandbox: &Sandbox, settings: &Settings) -> Secret<32> {
    let envelope = fs::read_to_string(sandbox.back().join("envelope.json")).unwrap();
    let envelope: Value = serde_json::from_str(&envelope).unwrap();
    let text = |value: &Value| value.as_str().expect("a text in the envelope").to_owned();
    let kid = text(&envelope["kek"]["kid"]);
    let algorithm = Algorithm::from_name(&text(&envelope["kek"]["algorithm"])).unwrap();
    let wrapped = base64::Engine::decode(
        &base64::engine::general_purpose::URL_SAFE_NO_PAD,
        text(&envelope["volume_key"]["wrapped"]),
    )
    .unwrap();
    let provider = provider::for_key(&kid, settings).unwrap();
    let mut session = provider.session(BootTime::now() + Duration::from_secs(30)).unwrap();
    let key = session.unwrap(&kid, algorithm, &wrapped).unwrap();
    Secret::new_with(|bytes| bytes.copy_from_slice(key.expose())).unwrap()
}

fn describe(found: &[Finding]) -> String {
    found.iter().map(|finding| format!("\n  {finding:?}")).collect()
}

#[test]
fn no_key_and_no_payload_is_left_in_memory_after_the_cut_off() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted();
    let (mnt, daemon) = (sandbox.mnt(), sandbox.daemon());
    let guard = sandbox.guard().expect("a guard");
    // Never what was read: another thread may have cut that file off to write it anew.
    let content = PAYLOAD.repeat(20_000);
    for file in 0..5 {
        fs::write(mnt.join(format!("file {file}")), &content).unwrap();
    }
    let work = || {
        for file in 0..5 {
            fs::read(mnt.join(format!("file {file}")))?;
            fs::write(mnt.join(format!("file {file}")), &content)?;
            fs::read_dir(&mnt)?.for_each(drop);
        }
        std::io::Result::Ok(())
    };
    for round in 0..2 {
        work().unwrap();
        let needles = keys(&sandbox);
        // The scan finds what is there, or it would prove nothing.
        let before = scan(daemon, &needles);
        let has = |what: &str| before.iter().any(|finding| finding.what.starts_with(what));
        assert!(has("volume key"), "round {round}: {}", describe(&before));
        assert!(has("block key"), "round {round}: {}", describe(&before));
        assert!(has("AES-256 key schedule"), "round {round}: {}", describe(&before));
        // The guard never has any.
        let guarded = scan(guard, &needles);
        assert!(guarded.is_empty(), "in the guard: {}", describe(&guarded));

        // Keys in use at the very moment of the cut-off.
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..3).map(|_| scope.spawn(|| while work().is_ok() {})).collect();
            sandbox.revoke();
            workers.into_iter().for_each(|worker| worker.join().unwrap());
        });
        let cut_off = |round: usize| {
            let events = sandbox.audit("MakeInaccessible");
            events.iter().filter(|event| event["status"] == "Succeeded").count() > round
        };
        until("the end of the cut-off", || cut_off(round));
        // Nor is what went through the mount.
        let mut needles = needles;
        needles.push(Needle { name: "payload".to_owned(), key: PAYLOAD.to_vec() });
        let after = scan(daemon, &needles);
        assert!(after.is_empty(), "round {round}, after the cut-off: {}", describe(&after));
        sandbox.recover();
    }
}
