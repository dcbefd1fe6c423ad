use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::*;

const KID: &str = "pkcs11:token=t;object=kek;id=%01";

/// A provider whose library's process is a shell script.
fn scripted(dir: &Path, script: &str) -> Pkcs11 {
    let write = |name: &str, content: &str, mode: u32| {
        let path = dir.join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    };
    let settings = Settings {
        module: Some(write("module.so", "", 0o644)),
        pin_file: Some(write("pin", "1234\n", 0o600)),
        program: Some(program(dir, script)),
    };
    Pkcs11::new(KID, &settings).unwrap()
}

/// Written by another process: while this one has a program open to write, a child that another
/// test starts has it too, and then nobody can run it.
fn program(dir: &Path, script: &str) -> PathBuf {
    let path = dir.join("program");
    let written = std::process::Command::new("sh")
        .args(["-c", "printf '#!/bin/sh\n%s\n' \"$1\" > \"$0\" && chmod 755 \"$0\""])
        .arg(&path)
        .arg(script)
        .status();
    assert!(written.unwrap().success());
    path
}

fn get(provider: &Pkcs11, limit: Duration) -> ProviderResult<KeyInfo> {
    provider.session(BootTime::now() + limit)?.get_key(KID)
}

/// Answers each request with a line of `answers`, and each blank line with one.
fn answering(answers: &[&str]) -> String {
    let each: String = answers
        .iter()
        .map(|answer| format!("read -r request; echo '{answer}'; read -r blank; echo\n"))
        .collect();
    format!("{each}\nexit 0")
}

#[test]
fn a_module_and_a_private_pin_are_needed() {
    let dir = tempfile::tempdir().unwrap();
    let none = Pkcs11::new(KID, &Settings::default()).unwrap_err();
    assert!(none.to_string().contains("pkcs11_module"), "{none}");
    let missing = Settings { module: Some(dir.path().join("none.so")), ..Settings::default() };
    let missing = Pkcs11::new(KID, &missing).unwrap_err();
    assert!(missing.to_string().contains("none.so"), "{missing}");
    let provider = scripted(dir.path(), "exit 0");
    std::fs::set_permissions(dir.path().join("pin"), PermissionsExt::from_mode(0o644)).unwrap();
    let settings = Settings {
        module: Some(provider.module),
        pin_file: Some(dir.path().join("pin")),
        program: None,
    };
    assert!(Pkcs11::new(KID, &settings).unwrap_err().to_string().contains("0600"));
}

#[test]
fn a_library_that_hangs_is_killed_at_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let script = format!("echo $$ > {}\nexec sleep 600", pid_file.display());
    let provider = scripted(dir.path(), &script);
    let start = Instant::now();
    let error = get(&provider, Duration::from_millis(700)).unwrap_err();
    assert_eq!(error.class, Class::Transient(Reason::Unreachable));
    assert!(error.message().contains("in time"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    let pid = std::fs::read_to_string(pid_file).unwrap();
    assert!(!Path::new("/proc").join(pid.trim()).exists(), "it lives on");
}

#[test]
fn a_library_that_crashes_takes_its_process_only() {
    let dir = tempfile::tempdir().unwrap();
    let provider = scripted(dir.path(), "read -r request\nkill -SEGV $$");
    let error = get(&provider, Duration::from_secs(20)).unwrap_err();
    assert_eq!(error.class, Class::Transient(Reason::Unreachable));
    assert!(error.message().contains("ended its process"), "{error}");
}

#[test]
fn what_is_no_answer_says_nothing_about_the_key() {
    let dir = tempfile::tempdir().unwrap();
    for line in ["nonsense", "{\"Opened\":7}", "\"Versions\""] {
        let provider = scripted(dir.path(), &answering(&[line]));
        let error = get(&provider, Duration::from_secs(20)).unwrap_err();
        assert_eq!(error.class, Class::Transient(Reason::Unreachable), "{line}");
    }
    let endless = scripted(dir.path(), "read -r request\nexec cat /dev/zero");
    let error = get(&endless, Duration::from_secs(20)).unwrap_err();
    assert_eq!(error.class, Class::Transient(Reason::Unreachable));
}

#[test]
fn a_refused_pin_is_not_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let tries = dir.path().join("tries");
    let refusal = r#"{"Failed":{"class":"Denied","reason":"CredentialInvalid","code":"CKR_PIN_INCORRECT","message":"no"}}"#;
    let script = format!("echo x >> {}\n{}", tries.display(), answering(&[refusal]));
    let provider = scripted(dir.path(), &script);
    let count = || std::fs::read_to_string(&tries).unwrap().lines().count();
    for _ in 0..3 {
        let error = get(&provider, Duration::from_secs(20)).unwrap_err();
        assert_eq!(error.class, Class::Denied(Reason::CredentialInvalid));
        assert_eq!(count(), 1);
    }
    std::fs::write(dir.path().join("pin"), "4321").unwrap();
    get(&provider, Duration::from_secs(20)).unwrap_err();
    assert_eq!(count(), 2);
}

#[test]
fn an_answer_for_another_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let other = r#"{"Key":{"kid":"pkcs11:token=t;object=kek;id=%02","key_type":"RSA","bits":2048,"operations":[],"not_before":null,"expires":null,"exportable":false,"destroyable":false}}"#;
    let provider = scripted(dir.path(), &answering(&["\"Opened\"", other]));
    let error = get(&provider, Duration::from_secs(20)).unwrap_err();
    assert_eq!(error.class, Class::Denied(Reason::WrongKeyOrCorruptEnvelope));
    let mut session = provider.session(BootTime::now() + Duration::from_secs(20)).unwrap();
    let elsewhere = session.get_key("pkcs11:token=other;object=kek").unwrap_err();
    assert_eq!(elsewhere.class, Class::Denied(Reason::WrongKeyOrCorruptEnvelope));
}

#[test]
fn a_key_is_no_newer_version_of_itself() {
    let dir = tempfile::tempdir().unwrap();
    let key = r#"{"Key":{"kid":"pkcs11:token=t;object=kek;id=%01","key_type":"RSA","bits":2048,"operations":[],"not_before":7,"expires":null,"exportable":false,"destroyable":false}}"#;
    let versions = r#"{"Versions":[{"kid":"pkcs11:token=t;object=kek;id=%01","not_before":7,"expires":null}]}"#;
    let provider = scripted(dir.path(), &answering(&["\"Opened\"", key, versions]));
    let mut session = provider.session(BootTime::now() + Duration::from_secs(20)).unwrap();
    let info = session.get_key(KID).unwrap();
    let versions = session.list_versions(KID).unwrap();
    assert_eq!(versions[0].kid, info.kid);
    assert_eq!(versions[0].created, info.created);
}

#[test]
fn names_with_an_id_are_versions() {
    let dir = tempfile::tempdir().unwrap();
    let provider = scripted(dir.path(), "exit 0");
    assert!(provider.names_version("pkcs11:id=%01;object=kek;token=t"));
    assert!(!provider.names_version("pkcs11:token=t;object=kek"));
    assert!(!format!("{provider:?}").contains("1234"));
}
