//! Keys that come from elsewhere: PEM, PKCS#12, key transfer blobs; and public halves that go out.

use std::path::{Path, PathBuf};
use std::process::Command;

use aes_kw::KwpAes256;
use aes_kw::cipher::KeyInit as _;
use aws_lc_rs::rsa::{
    OAEP_SHA1_MGF1SHA1, OaepPublicEncryptingKey, PublicEncryptingKey, PublicKeyComponents,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::harness::{Server, Vault, b64, text};

struct Openssl {
    dir: tempfile::TempDir,
}

impl Openssl {
    fn run(&self, args: &[&str]) -> Vec<u8> {
        let output = Command::new("openssl").args(args).current_dir(self.dir.path()).output();
        let output = output.expect("openssl is not installed: scripts/test installs it");
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        output.stdout
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// The modulus as a JSON Web Key has it.
fn modulus(openssl: &Openssl, key: &str) -> String {
    let out = text(&openssl.run(&["rsa", "-in", key, "-noout", "-modulus"]));
    let hex = out.trim().strip_prefix("Modulus=").unwrap();
    let bytes: Vec<u8> = (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect();
    b64(&bytes)
}

fn import(vault: &Vault, name: &str, source: &[&str]) -> Value {
    vault.cli_json(&[&["key", "import", "--name", name], source].concat())
}

fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn what_openssl_writes_comes_in_and_is_the_same_key() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let admin = server.admin();
    let openssl = Openssl { dir: tempfile::tempdir().unwrap() };
    openssl.run(&["genrsa", "-out", "key.pem", "2048"]);
    let n = modulus(&openssl, "key.pem");
    std::fs::write(openssl.file("password"), "a drill\n").unwrap();
    openssl.run(&["pkcs8", "-topk8", "-nocrypt", "-in", "key.pem", "-out", "pkcs8.pem"]);
    openssl.run(&["rsa", "-in", "key.pem", "-traditional", "-out", "pkcs1.pem"]);
    openssl.run(&[
        "pkcs8",
        "-topk8",
        "-in",
        "key.pem",
        "-out",
        "locked.pem",
        "-passout",
        "file:password",
    ]);
    openssl.run(&["req", "-x509", "-new", "-key", "key.pem", "-subj", "/CN=t", "-out", "cert.pem"]);
    let pfx =
        ["pkcs12", "-export", "-inkey", "key.pem", "-in", "cert.pem", "-passout", "file:password"];
    openssl.run(&[&pfx[..], &["-out", "new.pfx"]].concat());
    let old = ["-keypbe", "PBE-SHA1-3DES", "-certpbe", "PBE-SHA1-3DES", "-macalg", "sha1"];
    openssl.run(&[&pfx[..], &old, &["-out", "old.pfx"]].concat());
    let both = [
        std::fs::read(openssl.file("cert.pem")).unwrap(),
        std::fs::read(openssl.file("pkcs8.pem")).unwrap(),
    ];
    std::fs::write(openssl.file("both.pem"), both.concat()).unwrap();

    let password = openssl.file("password");
    let with_password = ["--password-file", arg(&password)];
    for (option, file, password) in [
        ("--pem-file", "pkcs8.pem", false),
        ("--pem-file", "pkcs1.pem", false),
        ("--pem-file", "both.pem", false),
        ("--pem-file", "locked.pem", true),
        ("--pfx-file", "new.pfx", true),
        ("--pfx-file", "old.pfx", true),
    ] {
        let path = openssl.file(file);
        let source = [option, arg(&path)];
        let source =
            if password { [&source[..], &with_password].concat() } else { source.to_vec() };
        let bundle = import(&vault, "kek", &source);
        assert_eq!(bundle["key"]["n"], n.as_str(), "{file}");
        assert_eq!(bundle["key"]["kty"], "RSA");
    }
    // What is wrapped here opens with the key outside.
    let body = json!({ "alg": "RSA-OAEP-256", "value": b64(&[7; 32]) });
    let wrapped = server.call(&admin, "POST", "/keys/kek/wrapkey", body).ok();
    let wrapped = URL_SAFE_NO_PAD.decode(wrapped["value"].as_str().unwrap()).unwrap();
    std::fs::write(openssl.file("wrapped"), wrapped).unwrap();
    let opened = openssl.run(&[
        "pkeyutl",
        "-decrypt",
        "-inkey",
        "key.pem",
        "-in",
        "wrapped",
        "-pkeyopt",
        "rsa_padding_mode:oaep",
        "-pkeyopt",
        "rsa_oaep_md:sha256",
    ]);
    assert_eq!(opened, [7; 32]);
    // And the public half as it goes out is the one that came in.
    let public = openssl.file("public.pem");
    vault.cli_json(&["key", "download", "--name", "kek", "--file", arg(&public)]);
    let theirs = openssl.run(&["rsa", "-in", "key.pem", "-pubout"]);
    assert_eq!(text(&std::fs::read(&public).unwrap()), text(&theirs));

    let hsm = import(
        &vault,
        "hsm",
        &["--pem-file", arg(&openssl.file("key.pem")), "--hsm", "--ops", "wrapKey,unwrapKey"],
    );
    assert_eq!(
        (&hsm["key"]["kty"], &hsm["key"]["key_ops"]),
        (&json!("RSA-HSM"), &json!(["wrapKey", "unwrapKey"]))
    );

    // What is not a usable key stays out, and says which file and why.
    openssl.run(&["genrsa", "-out", "short.pem", "1024"]);
    openssl.run(&["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "ec.pem"]);
    std::fs::write(openssl.file("other-password"), "nonsense").unwrap();
    let other = openssl.file("other-password");
    for (option, file, password, word) in [
        ("--pem-file", "short.pem", None, "2048"),
        ("--pem-file", "ec.pem", None, "RSA"),
        ("--pem-file", "cert.pem", None, "no private key"),
        ("--pem-file", "locked.pem", None, "--password-file"),
        ("--pem-file", "locked.pem", Some(&other), "password"),
        ("--pfx-file", "new.pfx", Some(&other), "password"),
        ("--pfx-file", "key.pem", None, "PKCS#12"),
        ("--byok-file", "key.pem", None, "transfer blob"),
    ] {
        let path = openssl.file(file);
        let mut args = vec!["key", "import", "--name", "bad", option, arg(&path)];
        args.extend(password.into_iter().flat_map(|file| ["--password-file", arg(file)]));
        let output = vault.cli(&args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{file}: {said}");
        assert!(said.contains(word), "{file}: {said}");
    }
    assert_eq!(vault.cli(&["key", "show", "--name", "bad"]).status.code(), Some(7));
    assert_eq!(vault.cli(&["key", "import", "--name", "bad"]).status.code(), Some(2));
}

/// As an HSM vendor's tool makes it, from the public specification.
fn transfer_blob(kid: &str, public: &Value, target: &[u8]) -> Value {
    let number = |name: &str| URL_SAFE_NO_PAD.decode(public[name].as_str().unwrap()).unwrap();
    let (n, e) = (number("n"), number("e"));
    let key: PublicEncryptingKey = PublicKeyComponents { n: &n, e: &e }.try_into().unwrap();
    let key = OaepPublicEncryptingKey::new(key).unwrap();
    let aes = [9; 32];
    let mut head = vec![0; key.ciphertext_size()];
    key.encrypt(&OAEP_SHA1_MGF1SHA1, &aes, &mut head, None).unwrap();
    let mut tail = vec![0; target.len().next_multiple_of(8) + 8];
    KwpAes256::new_from_slice(&aes).unwrap().wrap_key(target, &mut tail).unwrap();
    json!({
        "schema_version": "1.0.0",
        "header": { "kid": kid, "alg": "dir", "enc": "CKM_RSA_AES_KEY_WRAP" },
        "ciphertext": b64(&[head, tail].concat()),
        "generator": "a test",
    })
}

fn exchange_key(server: &Server, admin: &str) -> Value {
    let body = json!({ "kty": "RSA-HSM", "key_size": 3072, "key_ops": ["import"] });
    server.call(admin, "POST", "/keys/exchange/create", body).ok()["key"].clone()
}

#[test]
fn a_key_wrapped_to_an_exchange_key_comes_in_and_nothing_else_does() {
    let vault = Vault::new(&[]);
    let server = vault.serve();
    let admin = server.admin();
    let openssl = Openssl { dir: tempfile::tempdir().unwrap() };
    openssl.run(&["genrsa", "-out", "key.pem", "2048"]);
    openssl.run(&[
        "pkcs8", "-topk8", "-nocrypt", "-in", "key.pem", "-outform", "DER", "-out", "key.der",
    ]);
    let target = std::fs::read(openssl.file("key.der")).unwrap();
    let exchange = exchange_key(&server, &admin);
    let kid = exchange["kid"].as_str().unwrap();
    let good = transfer_blob(kid, &exchange, &target);
    let file = openssl.file("key.byok");
    std::fs::write(&file, good.to_string()).unwrap();
    let bundle = import(&vault, "kek", &["--byok-file", arg(&file)]);
    assert_eq!(bundle["key"]["kty"], "RSA-HSM");
    assert_eq!(bundle["key"]["n"], modulus(&openssl, "key.pem").as_str());

    // The exchange key is for that alone.
    let body = json!({ "alg": "RSA-OAEP", "value": b64(&[1; 32]) });
    let answer = server.call(&admin, "POST", "/keys/exchange/wrapkey", body);
    assert_eq!(answer.status, 403);
    for bad in [json!(["import", "wrapKey"]), json!(["import"])] {
        let kty = if bad == json!(["import"]) { "RSA" } else { "RSA-HSM" };
        let body = json!({ "kty": kty, "key_ops": bad });
        assert_eq!(server.call(&admin, "POST", "/keys/x/create", body).status, 400);
    }

    let patch = |name: &str, operations: Value| {
        let path = format!("/keys/{name}");
        server.call(&admin, "PATCH", &path, json!({ "key_ops": operations })).status
    };
    assert_eq!(patch("exchange", json!(["decrypt"])), 400);
    assert_eq!(patch("exchange", json!([])), 400);
    assert_eq!(patch("exchange", json!(["import"])), 200);
    assert_eq!(patch("kek", json!(["import"])), 400);
    assert_eq!(patch("kek", json!(["wrapKey"])), 200);

    let put = |blob: &Value| {
        let blob = b64(blob.to_string().as_bytes());
        let body = json!({ "key": { "kty": "RSA-HSM", "key_hsm": blob } });
        server.call(&admin, "PUT", "/keys/bad", body)
    };
    let ordinary = server.create_key(&admin, "ordinary")["key"].clone();
    let to_ordinary = transfer_blob(ordinary["kid"].as_str().unwrap(), &ordinary, &target);
    assert_eq!(put(&to_ordinary).status, 403);
    let mut flipped = good.clone();
    let text = good["ciphertext"].as_str().unwrap();
    let last = if text.ends_with('A') { "B" } else { "A" };
    flipped["ciphertext"] = json!(format!("{}{last}", &text[..text.len() - 1]));
    let mut other_version = good.clone();
    other_version["schema_version"] = json!("2.0.0");
    let mut short = good.clone();
    short["ciphertext"] = json!(b64(&[1; 100]));
    let not_a_key = transfer_blob(kid, &exchange, &[1; 64]);
    for (what, bad) in [
        ("flipped", flipped),
        ("other version", other_version),
        ("short", short),
        ("not a key", not_a_key),
        ("empty", json!({})),
    ] {
        assert_eq!(put(&bad).status, 400, "{what}");
    }
    assert_eq!(server.call(&admin, "GET", "/keys/bad", Value::Null).status, 404);
}
