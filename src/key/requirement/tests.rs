use super::super::provider::Provider;
use super::super::testing::{FakeKey, FakeService};
use super::*;

fn run(key: FakeKey, settings: &Settings) -> Report {
    let service = FakeService::new(key);
    let mut session = service.session(BootTime::now()).unwrap();
    check(&mut *session, FakeService::KID, Algorithm::RsaOaep256, settings).unwrap().1
}

fn verdict(report: &Report, requirement: &str) -> Verdict {
    let mut rows = report.rows.iter().filter(|row| row.requirement == requirement);
    rows.next().unwrap_or_else(|| panic!("no row {requirement}")).verdict
}

#[test]
fn a_good_key_passes_everything() {
    let report = run(FakeKey::good(), &Settings { strict: true, ..Settings::default() });
    assert_eq!(report.failures().count() + report.warnings().count(), 0, "{report}");
    assert_eq!(report.reason(), None);
    assert_eq!(report.rows.len(), 13);
}

#[test]
fn each_requirement_fails_by_itself() {
    type Spoil = fn(&mut FakeKey);
    let now = wall_clock();
    assert!(now > 0);
    let cases: [(&str, Reason, Spoil); 9] = [
        ("key type", Reason::WrongKeyOrCorruptEnvelope, |key| key.info.key_type = "EC".into()),
        ("key size", Reason::WrongKeyOrCorruptEnvelope, |key| key.info.bits = Some(1024)),
        ("key operations", Reason::PermissionRevoked, |key| {
            key.info.operations.retain(|name| name != "unwrapKey");
        }),
        ("enabled", Reason::KeyDisabled, |key| key.info.enabled = false),
        ("activation", Reason::KeyNotYetValid, |key| {
            key.info.not_before = Some(wall_clock() + 1000);
        }),
        ("expiry", Reason::KeyExpired, |key| key.info.expires = Some(wall_clock() - 1)),
        ("permission list", Reason::PermissionRevoked, |key| key.deny("list")),
        ("permission wrapKey", Reason::PermissionRevoked, |key| key.deny("wrapKey")),
        ("permission unwrapKey", Reason::PermissionRevoked, |key| key.deny("unwrapKey")),
    ];
    for (requirement, reason, spoil) in cases {
        let mut key = FakeKey::good();
        spoil(&mut key);
        let report = run(key, &Settings::default());
        let failed: Vec<_> = report.failures().map(|row| row.requirement).collect();
        assert_eq!(failed, [requirement], "{report}");
        assert_eq!(report.reason(), Some(reason));
        assert!(report.failures().all(|row| !row.fix.is_empty()));
    }
}

#[test]
fn accidents_waiting_to_happen_warn_or_fail_if_strict() {
    type Spoil = fn(&mut FakeKey);
    let cases: [(&str, Spoil); 4] = [
        ("expiry", |key| key.info.expires = Some(wall_clock() + 86400)),
        ("soft delete for 90 days", |key| key.info.recoverable_days = Some(7)),
        ("purge protection", |key| key.info.recovery_level = Some("Recoverable+Purgeable".into())),
        ("key version", |key| key.newer_version = true),
    ];
    for (requirement, spoil) in cases {
        let mut key = FakeKey::good();
        spoil(&mut key);
        let report = run(key.clone(), &Settings::default());
        assert_eq!(verdict(&report, requirement), Verdict::Warn, "{report}");
        assert_eq!(report.failures().count(), 0);
        let report = run(key, &Settings { strict: true, ..Settings::default() });
        assert_eq!(verdict(&report, requirement), Verdict::Fail, "{report}");
    }
}

#[test]
fn an_expired_key_only_warns_where_it_is_told_to() {
    let mut key = FakeKey::good();
    key.info.expires = Some(wall_clock() - 1);
    let settings = Settings { on_expired: OnExpired::Warn, ..Settings::default() };
    assert_eq!(verdict(&run(key, &settings), "expiry"), Verdict::Warn);
}

#[test]
fn region_is_compared_where_configured() {
    let mut key = FakeKey::good();
    key.info.region = Some("westeurope".into());
    let settings = |region: &str| Settings { region: Some(region.into()), ..Settings::default() };
    assert_eq!(verdict(&run(key.clone(), &settings("WestEurope")), "region"), Verdict::Ok);
    assert_eq!(verdict(&run(key, &settings("northeurope")), "region"), Verdict::Fail);
}

#[test]
fn the_table_is_readable() {
    let mut key = FakeKey::good();
    key.info.enabled = false;
    let text = run(key, &Settings::default()).to_string();
    assert!(text.contains("FAIL  enable the key\n"), "{text}");
    assert!(text.lines().all(|line| !line.ends_with(' ')));
}

fn survey_of(key: FakeKey, kid: &str) -> (Option<KeyInfo>, Report) {
    let service = FakeService::new(key);
    let mut session = service.session(BootTime::now()).unwrap();
    survey(&mut *session, kid, None, &Settings::default()).unwrap()
}

#[test]
fn a_key_that_cannot_be_read_still_has_its_other_permissions_tried() {
    let mut key = FakeKey::good();
    key.deny("get");
    key.deny("wrapKey");
    let (info, report) = survey_of(key, FakeService::KID);
    assert_eq!(info, None);
    let verdicts: Vec<_> = report.rows.iter().map(|row| (row.requirement, row.verdict)).collect();
    assert_eq!(
        verdicts,
        [
            ("permission get", Verdict::Fail),
            ("permission list", Verdict::Ok),
            ("permission wrapKey", Verdict::Fail),
            ("permission unwrapKey", Verdict::Ok),
        ]
    );
    let mut gone = FakeKey::good();
    gone.fail_all(Class::Revoked(Reason::KeyDeleted));
    let (_, report) = survey_of(gone, FakeService::KID);
    assert_eq!(report.rows.len(), 1);
    assert_eq!(report.reason(), Some(Reason::KeyDeleted));
    assert_eq!(survey_of(FakeKey::good(), FakeService::KID).1.verdict(), Verdict::Ok);
}

#[test]
fn silence_ends_the_check() {
    let mut key = FakeKey::good();
    key.fail_all(Class::Transient(Reason::Unreachable));
    let service = FakeService::new(key);
    let mut session = service.session(BootTime::now()).unwrap();
    let error = survey(&mut *session, FakeService::KID, None, &Settings::default()).unwrap_err();
    assert_eq!(error.reason(), Reason::Unreachable);
}

#[test]
fn tenants_are_those_of_service_token_and_configuration() {
    let judged = |service: &str, identity: Option<&str>, configured: Option<&str>| {
        let mut key = FakeKey::good();
        key.info.tenant = Some(service.into());
        key.info.identity_tenant = identity.map(str::to_owned);
        let tenant = configured.map(str::to_owned);
        verdict(&run(key, &Settings { tenant, ..Settings::default() }), "tenant")
    };
    assert_eq!(judged("t-1", None, None), Verdict::Ok);
    assert_eq!(judged("t-1", Some("T-1"), Some("t-1")), Verdict::Ok);
    assert_eq!(judged("t-1", Some("t-1"), Some("contoso.onmicrosoft.com")), Verdict::Ok);
    assert_eq!(judged("t-1", Some("t-2"), None), Verdict::Fail);
    assert_eq!(judged("t-1", None, Some("t-2")), Verdict::Fail);
}

#[test]
fn keys_that_can_leave_or_vanish_warn() {
    let mut key = FakeKey::good();
    key.info.exportable = Some(true);
    assert_eq!(verdict(&run(key.clone(), &Settings::default()), "not exportable"), Verdict::Warn);
    key.info.exportable = Some(false);
    key.info.destroyable = Some(true);
    let report = run(key.clone(), &Settings::default());
    assert_eq!(verdict(&report, "not exportable"), Verdict::Ok);
    assert_eq!(verdict(&report, "purge protection"), Verdict::Warn);
    assert!(report.rows.iter().all(|row| row.requirement != "soft delete for 90 days"));
    key.info.destroyable = Some(false);
    assert_eq!(verdict(&run(key, &Settings::default()), "purge protection"), Verdict::Ok);
}
