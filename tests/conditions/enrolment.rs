//! A volume is taken into a key's custody, or not: what `init` does, without the volume.

use std::sync::Arc;

use byokfs::Kind;
use byokfs::key::custody::{Enrolment, Refusal, enrol, revalidate};
use byokfs::key::gate::Reason;
use byokfs::key::provider::{Provider, Settings, for_key};
use byokfs::key::requirement;

use crate::rig::{LIMIT, Service};
use crate::vault::{ALL, HOST, Vault, Who, in_seconds};

fn provider(vault: &Vault) -> Arc<dyn Provider> {
    for_key(&vault.key, &vault.access()).unwrap()
}

fn requirements() -> requirement::Settings {
    requirement::Settings::default()
}

fn enrolled_with(vault: &Vault, settings: &requirement::Settings) -> Result<Enrolment, Refusal> {
    enrol(&*provider(vault), &vault.key, None, settings, LIMIT)
}

fn enrolled(vault: &Vault) -> Result<Enrolment, Refusal> {
    enrolled_with(vault, &requirements())
}

#[test]
fn a_new_key_meets_the_requirements() {
    let vault = Vault::start(Who::Host);
    let strict = requirement::Settings { strict: true, ..requirements() };
    let enrolment = enrolled_with(&vault, &strict).unwrap();
    assert_eq!(enrolment.report.failures().count(), 0);
    assert_eq!(enrolment.info.kid, vault.key);
    assert_eq!(enrolment.info.bits, Some(2048));
    assert_eq!(enrolment.info.region.as_deref(), Some("local"));
    assert!(enrolment.info.tenant.is_some() && enrolment.info.service_time.is_some());
    let envelope = enrolment.envelope([1; 16]);
    let provider = provider(&vault);
    let back = revalidate(&*provider, &envelope, &enrolment.fingerprint, &strict, LIMIT).unwrap();
    assert_eq!(back.keyring.fingerprint().unwrap(), enrolment.fingerprint);
}

#[test]
fn a_key_named_without_a_version_is_resolved() {
    let vault = Vault::start(Who::Application);
    let (bare, _) = vault.key.rsplit_once('/').unwrap();
    let enrolment = enrol(&*provider(&vault), bare, None, &requirements(), LIMIT).unwrap();
    let envelope = enrolment.envelope([1; 16]);
    assert_eq!(envelope.kid, vault.key);
    assert!(envelope.follow_versions);
}

#[test]
fn bad_keys_are_refused() {
    let vault = Vault::start(Who::Host);
    // Not even if requirements are waived.
    let tolerant = requirement::Settings { tolerant: true, ..requirements() };
    let refused = |reason| {
        for settings in [&requirements(), &tolerant] {
            let refusal = enrolled_with(&vault, settings).unwrap_err();
            assert_eq!((refusal.reason, refusal.error.kind), (reason, Kind::Denied), "{refusal}");
        }
    };
    vault.set("--enabled", "false");
    refused(Reason::KeyDisabled);
    vault.set("--enabled", "true");
    vault.set("--expires", &in_seconds(-5));
    refused(Reason::KeyExpired);
    vault.set("--expires", "none");
    for permission in ALL.split(',') {
        vault.revoke(permission);
        refused(Reason::PermissionRevoked);
        vault.grant(permission);
    }
    let missing = vault.key.replace("/kek/", "/none/");
    let missing = enrol(&*provider(&vault), &missing, None, &requirements(), LIMIT);
    assert_eq!(missing.unwrap_err().reason, Reason::KeyNotFound);
    enrolled(&vault).unwrap();
}

#[test]
fn another_volumes_envelope_is_refused() {
    let vault = Vault::start(Who::Host);
    let (mine, other) = (enrolled(&vault).unwrap(), enrolled(&vault).unwrap());
    let provider = provider(&vault);
    let open = |envelope| {
        revalidate(&*provider, &envelope, &mine.fingerprint, &requirements(), LIMIT).unwrap_err()
    };
    assert_eq!(open(other.envelope([1; 16])).reason, Reason::KeyMaterialMismatch);
    let mut broken = mine.envelope([1; 16]);
    broken.wrapped_volume_key[17] ^= 1;
    assert_eq!(open(broken).reason, Reason::WrongKeyOrCorruptEnvelope);
}

#[test]
fn an_untrusted_vault_gets_no_token() {
    let (vault, other) = (Vault::start(Who::Host), Vault::start(Who::Host));
    let settings = Settings { ca_file: Some(other.path().join("ca.pem")), ..vault.access() };
    let provider = for_key(&vault.key, &settings).unwrap();
    let refusal = enrol(&*provider, &vault.key, None, &requirements(), LIMIT).unwrap_err();
    assert_eq!((refusal.reason, refusal.error.kind), (Reason::TlsUntrusted, Kind::Unreachable));
    let tokens = || {
        let log = std::fs::read_to_string(vault.path().join("audit.jsonl")).unwrap();
        let of_host = format!("\"caller\":\"{HOST}\"");
        log.lines().filter(|line| line.contains("TokenIssue") && line.contains(&of_host)).count()
    };
    assert_eq!(tokens(), 0);
    enrolled(&vault).unwrap();
    assert!(tokens() > 0);
}
