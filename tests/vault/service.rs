//! The vault as a service: many clients, limits, a new certificate, the whole vault in a file.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{API, Server, Vault, agent, b64, identity, text};

const CLIENTS: usize = 200;
const ROUNDS: usize = 5;

#[test]
fn two_hundred_clients_at_once_are_all_served() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    server.create_key(&server.admin(), "kek");
    let token = identity(&vault, &server, "db", "all");
    let ready = Barrier::new(CLIENTS);
    let ca = vault.dir.join("ca.pem");
    let served: usize = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (ready, server, token, ca) = (&ready, &server, &token, &ca);
                scope.spawn(move || {
                    // Each with a connection of its own.
                    let agent = agent(ca);
                    let call = |operation: &str, value: &str| {
                        let url = format!("{}/keys/kek/{operation}?{API}", server.url);
                        let body = json!({ "alg": "RSA-OAEP-256", "value": value }).to_string();
                        let mut reply = agent
                            .post(url)
                            .header("authorization", format!("Bearer {token}"))
                            .send(body)
                            .unwrap();
                        assert_eq!(reply.status(), 200);
                        let text = reply.body_mut().read_to_string().unwrap();
                        serde_json::from_str::<Value>(&text).unwrap()["value"]
                            .as_str()
                            .unwrap()
                            .to_owned()
                    };
                    let secret = b64(&[u8::try_from(number).unwrap(); 32]);
                    ready.wait();
                    for _ in 0..ROUNDS {
                        let wrapped = call("wrapkey", &secret);
                        assert_eq!(call("unwrapkey", &wrapped), secret);
                    }
                    ROUNDS
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    assert_eq!(served, CLIENTS * ROUNDS);
    let log = std::fs::read_to_string(vault.dir.join("audit.jsonl")).unwrap();
    assert_eq!(log.matches("\"KeyUnwrap\"").count(), CLIENTS * ROUNDS);
}

#[test]
fn whoever_asks_too_often_is_told_when_to_come_back() {
    let vault = Vault::new(&[]);
    let server = vault.serve_with(&["--rate-limit", "20"]);
    let admin = server.admin();
    let throttled = (0..60)
        .map(|_| server.call(&admin, "GET", "/keys", Value::Null))
        .find(|answer| answer.status != 200)
        .expect("sixty requests at once are not too many");
    assert_eq!((throttled.status, throttled.code().as_str()), (429, "Throttled"));
    let wait: u64 = throttled.header("retry-after").parse().unwrap();
    assert!((1..=10).contains(&wait));
    // Management is not counted, and after the wait there is room again.
    vault.cli_json(&["show"]);
    let deadline = Instant::now() + Duration::from_secs(30);
    while server.call(&admin, "GET", "/keys", Value::Null).status != 200 {
        assert!(Instant::now() < deadline, "there is never room again");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The server's certificate as a new connection sees it.
fn certificate(server: &Server, vault: &Vault) -> Vec<u8> {
    use std::io::{Read as _, Write as _};
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(vault.dir.join("ca.pem")).unwrap();
    use rustls::pki_types::pem::PemObject as _;
    roots.add(rustls::pki_types::CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(std::sync::Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .unwrap()
    .with_root_certificates(roots)
    .with_no_client_auth();
    let address = server.url.strip_prefix("https://").unwrap();
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let name = "localhost".try_into().unwrap();
    let mut connection = rustls::ClientConnection::new(std::sync::Arc::new(config), name).unwrap();
    let mut tls = rustls::Stream::new(&mut connection, &mut stream);
    tls.write_all(b"GET /keys HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
    tls.read_exact(&mut [0; 1]).unwrap();
    connection.peer_certificates().unwrap()[0].to_vec()
}

#[test]
fn sighup_renews_the_certificate_and_reopens_the_log() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let admin = server.admin();
    let before = certificate(&server, &vault);
    assert_eq!(certificate(&server, &vault), before);
    std::fs::rename(vault.dir.join("audit.jsonl"), vault.dir.join("audit.1")).unwrap();
    let pid = rustix::process::Pid::from_raw(server.pid()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while certificate(&server, &vault) == before {
        assert!(Instant::now() < deadline, "the certificate stays");
        std::thread::sleep(Duration::from_millis(50));
    }
    // The connection that was open goes on.
    server.call(&admin, "GET", "/keys", Value::Null).ok();
    let log = std::fs::read_to_string(vault.dir.join("audit.jsonl")).unwrap();
    assert!(log.contains("\"KeyList\""));
}

#[test]
fn what_sighup_asks_for_is_done_though_a_rotation_cannot_be() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    server.create_key(&server.admin(), "kek");
    vault.cli_json(&["key", "rotation-policy", "update", "-n", "kek", "--rotate-after", "P90D"]);
    let database = rusqlite::Connection::open(vault.dir.join("vault.db")).unwrap();
    database.execute("UPDATE version SET tags = 'damaged'", []).unwrap();
    drop(database);
    let before = certificate(&server, &vault);
    std::fs::rename(vault.dir.join("audit.jsonl"), vault.dir.join("audit.1")).unwrap();
    let pid = rustix::process::Pid::from_raw(server.pid()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while certificate(&server, &vault) == before {
        assert!(Instant::now() < deadline, "the certificate stays");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(vault.dir.join("audit.jsonl").exists());
}

#[test]
fn a_whole_vault_comes_back_from_its_backup_and_root_key() {
    let vault = Vault::new(&["--name", "kv1"]);
    let server = vault.serve();
    let admin = server.admin();
    // Long enough that chance does not write it into what is encrypted.
    let name = "key-of-the-whole-vault";
    let bundle = server.create_key(&admin, name);
    let kid = bundle["key"]["kid"].as_str().unwrap();
    let token = identity(&vault, &server, "db", "get,unwrapKey");
    let body = json!({ "alg": "RSA-OAEP-256", "value": b64(&[7; 32]) });
    let wrapped = server.call(&admin, "POST", &format!("/keys/{name}/wrapkey"), body).ok();
    let path = kid.strip_prefix(&server.url).unwrap().to_owned();

    // While it is served.
    let elsewhere = tempfile::tempdir().unwrap();
    let file = elsewhere.path().join("vault.backup");
    let file_arg = file.to_str().unwrap();
    // Nothing is made in the directory that could be left there.
    let modified = || vault.dir.metadata().unwrap().modified().unwrap();
    let before = modified();
    vault.cli_json(&["backup", "--file", file_arg]);
    assert_eq!(modified(), before);
    assert_eq!(vault.cli(&["backup", "--file", file_arg]).status.code(), Some(9));
    let backup = std::fs::read(&file).unwrap();
    let readable = backup.windows(name.len()).any(|window| window == name.as_bytes());
    assert!(!readable, "the backup is readable");
    let root = elsewhere.path().join("root.key");
    std::fs::copy(vault.dir.join("root.key"), &root).unwrap();
    assert_eq!(server.stop(), Some(0));

    let restored = elsewhere.path().join("restored");
    let restore = |dir: &std::path::Path, file: &std::path::Path, root: &std::path::Path| {
        let output = crate::harness::byokfs()
            .args(["vault", "restore"])
            .arg(dir)
            .arg("--file")
            .arg(file)
            .arg("--root-key-file")
            .arg(root)
            .output()
            .unwrap();
        (output.status.code().unwrap(), text(&output.stderr))
    };
    // A wrong root key, a changed backup and an occupied directory are refused.
    let other = Vault::new(&[]);
    assert_eq!(restore(&restored, &file, &other.dir.join("root.key")).0, 6);
    let mut changed = backup.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    let changed_file = elsewhere.path().join("changed");
    for bytes in [&changed[..], &backup[..backup.len() - 1], b"BYOKFSVB", b"", b"nonsense"] {
        std::fs::write(&changed_file, bytes).unwrap();
        assert_eq!(restore(&restored, &changed_file, &root).0, 6);
    }
    assert!(!restored.exists());
    assert_eq!(restore(&other.dir, &file, &root).0, 9);

    // A root key that is in its place already stays: it may be the only one.
    std::fs::create_dir(&restored).unwrap();
    let in_place = restored.join("root.key");
    std::fs::rename(&root, &in_place).unwrap();
    std::fs::hard_link(&in_place, elsewhere.path().join("link")).unwrap();
    let (code, said) = restore(&restored, &file, &in_place);
    assert_eq!(code, 0, "{said}");
    let links = std::os::unix::fs::MetadataExt::nlink(&in_place.metadata().unwrap());
    assert_eq!(links, 2, "it was replaced");
    // The same keys under the same ids, trusted by the same file, for the same tokens.
    let vault = Vault::at(elsewhere, restored);
    let server = vault.serve();
    let answer = server.call(&token, "GET", &path, Value::Null).ok();
    assert_eq!(answer["key"]["kid"], kid);
    let body = json!({ "alg": "RSA-OAEP-256", "value": wrapped["value"] });
    let opened = server.call(&token, "POST", &format!("{path}/unwrapkey"), body).ok();
    assert_eq!(opened["value"], b64(&[7; 32]).as_str());
    server.create_key(&server.admin(), "new");
}

#[test]
fn backups_and_changes_do_not_get_into_each_others_way() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let admin = server.admin();
    server.create_key(&admin, "kek");
    let elsewhere = tempfile::tempdir().unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| {
            let mut changes = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let body = json!({ "tags": { "change": changes.to_string() } });
                server.call(&admin, "PATCH", "/keys/kek", body).ok();
                changes += 1;
            }
            changes
        });
        for number in 0..5 {
            let file = elsewhere.path().join(number.to_string());
            vault.cli_json(&["backup", "--file", file.to_str().unwrap()]);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(changes.join().unwrap() > 0);
    });
}
