//! What a key must be to protect a volume, checked one by one and told as a table.
//!
//! `init`, every mount and every revalidation make this check. Attributes are read; permissions
//! are tried for real, since nothing else shows them. A requirement that protects from accidents
//! but not from anyone (recovery, an expiry date that will come) warns; [`Settings::strict`]
//! makes it fail.

use std::fmt;

use serde::Serialize;

use super::clock::BootTime;
use super::policy::{OnExpired, Validity};
use super::provider::{
    Algorithm, Class, KeyInfo, ProviderError, ProviderResult, Session, VersionInfo,
};
use super::reason::Reason;
use super::wall_clock;
use crate::crypto::secret::{Secret, SecretBytes};

#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Warnings count as failures.
    pub strict: bool,
    /// Failures do not refuse the key, as long as it works.
    pub tolerant: bool,
    /// Where the key service must say it is.
    pub region: Option<String>,
    pub on_expired: OnExpired,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Verdict {
    Ok,
    Warn,
    Fail,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    pub requirement: &'static str,
    pub found: String,
    pub verdict: Verdict,
    /// Empty where there is nothing to fix.
    pub fix: &'static str,
    #[serde(skip)]
    pub reason: Option<Reason>,
}

/// The table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    pub kid: String,
    pub rows: Vec<Row>,
}

impl Report {
    pub fn failures(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.verdict == Verdict::Fail)
    }

    pub fn warnings(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| row.verdict == Verdict::Warn)
    }

    /// Why the key is refused, if it is: the gravest cause first.
    pub fn reason(&self) -> Option<Reason> {
        let reasons = self.failures().map(|row| row.reason);
        reasons.flatten().min_by_key(|reason| *reason == Reason::PermissionRevoked)
    }

    fn add(&mut self, requirement: &'static str, found: impl Into<String>, judged: Judged) {
        let Judged(verdict, fix, reason) = judged;
        self.rows.push(Row { requirement, found: found.into(), verdict, fix, reason });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |cell: fn(&Row) -> usize| self.rows.iter().map(cell).max().unwrap_or(0);
        let name = width(|row| row.requirement.len());
        let found = width(|row| row.found.chars().count()).min(48);
        for row in &self.rows {
            let verdict = match row.verdict {
                Verdict::Ok => "ok",
                Verdict::Warn => "WARN",
                Verdict::Fail => "FAIL",
            };
            let line = format!(
                "{:name$}  {:found$}  {verdict:4}  {}",
                row.requirement, row.found, row.fix
            );
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

struct Judged(Verdict, &'static str, Option<Reason>);

const OK: Judged = Judged(Verdict::Ok, "", None);

fn fail_unless(holds: bool, fix: &'static str, reason: Reason) -> Judged {
    if holds { OK } else { Judged(Verdict::Fail, fix, Some(reason)) }
}

/// Checks the key named by `kid` (with or without a version) and returns what the service says of
/// it. An error means that the check could not be made, or that there is no such key.
pub fn check(
    session: &mut dyn Session,
    kid: &str,
    algorithm: Algorithm,
    settings: &Settings,
) -> ProviderResult<(KeyInfo, Report)> {
    let info = session.get_key(kid)?;
    let mut report = Report { kid: info.kid.clone(), rows: Vec::new() };
    let warn = |fix| Judged(if settings.strict { Verdict::Fail } else { Verdict::Warn }, fix, None);
    attributes(&info, algorithm, &mut report);
    dates(&info, settings, &warn, &mut report);
    recovery(&info, &warn, &mut report);
    region(&info, settings, &mut report);
    permissions(session, &info, algorithm, &warn, &mut report)?;
    Ok((info, report))
}

fn attributes(info: &KeyInfo, algorithm: Algorithm, report: &mut Report) {
    let wrong_key = Reason::WrongKeyOrCorruptEnvelope;
    let (types, fix): (&[&str], _) = match algorithm {
        Algorithm::RsaOaep256 | Algorithm::RsaOaep => {
            (&["RSA", "RSA-HSM"], "create a key of type RSA or RSA-HSM")
        }
        Algorithm::A256Kw => (&["oct-HSM"], "create a key of type oct-HSM in a Managed HSM"),
    };
    let fits = types.contains(&info.key_type.as_str());
    report.add("key type", &*info.key_type, fail_unless(fits, fix, wrong_key));
    if algorithm != Algorithm::A256Kw {
        let fits = matches!(info.bits, Some(2048 | 3072 | 4096));
        let found = info.bits.map_or("unknown".into(), |bits| format!("{bits} bits"));
        let fix = "create a key of 2048, 3072 or 4096 bits";
        report.add("key size", found, fail_unless(fits, fix, wrong_key));
    }
    let allows = |operation| info.operations.iter().any(|name| name == operation);
    let fits = allows("wrapKey") && allows("unwrapKey");
    let fix = "allow the operations wrapKey and unwrapKey on the key";
    let judged = fail_unless(fits, fix, Reason::PermissionRevoked);
    report.add("key operations", info.operations.join(" "), judged);
    let found = if info.enabled { "enabled" } else { "disabled" };
    report.add("enabled", found, fail_unless(info.enabled, "enable the key", Reason::KeyDisabled));
}

fn dates(
    info: &KeyInfo,
    settings: &Settings,
    warn: &impl Fn(&'static str) -> Judged,
    report: &mut Report,
) {
    let judge = |out: bool, fix, reason| match (out, settings.on_expired) {
        (false, _) => OK,
        (true, OnExpired::Inaccessible) => Judged(Verdict::Fail, fix, Some(reason)),
        (true, OnExpired::Warn) => warn(fix),
    };
    let outside = validity(info).check(BootTime::now(), wall_clock()).err();
    let early = outside == Some(Reason::KeyNotYetValid);
    let fix = "set the activation date to the past, or remove it";
    let judged = judge(early, fix, Reason::KeyNotYetValid);
    report.add("activation", date_text(info.not_before), judged);
    let late = outside == Some(Reason::KeyExpired);
    let judged = match (info.expires, late) {
        (None, _) => OK,
        (Some(_), false) => warn("remove the expiry date, or extend it in good time"),
        (Some(_), true) => judge(true, "extend or remove the expiry date", Reason::KeyExpired),
    };
    report.add("expiry", date_text(info.expires), judged);
}

fn recovery(info: &KeyInfo, warn: &impl Fn(&'static str) -> Judged, report: &mut Report) {
    let level = info.recovery_level.as_deref().unwrap_or("unknown");
    // "Customized..." means fewer days than 90.
    let ninety = match info.recoverable_days {
        Some(days) => days == 90,
        None => level.starts_with("Recoverable"),
    };
    let days = info.recoverable_days;
    let found = days.map_or(level.to_owned(), |days| format!("{level}, {days} days"));
    let fix = "keep deleted keys for 90 days: a setting that a vault gets when it is created";
    report.add("soft delete for 90 days", found, if ninety { OK } else { warn(fix) });
    let safe = level != "unknown" && !level.contains("Purgeable");
    let found = if safe { "on" } else { "off" };
    let fix = "turn on the vault's purge protection";
    report.add("purge protection", found, if safe { OK } else { warn(fix) });
}

fn region(info: &KeyInfo, settings: &Settings, report: &mut Report) {
    let Some(wanted) = &settings.region else { return };
    let found = info.region.as_deref().unwrap_or("unknown");
    let judged = if found.eq_ignore_ascii_case(wanted) {
        OK
    } else {
        Judged(Verdict::Fail, "use a key in the configured region", None)
    };
    report.add("region", found, judged);
}

fn permissions(
    session: &mut dyn Session,
    info: &KeyInfo,
    algorithm: Algorithm,
    warn: &impl Fn(&'static str) -> Judged,
    report: &mut Report,
) -> ProviderResult<()> {
    const GRANT: &str = "grant the identity get, list, wrapKey and unwrapKey";
    report.add("permission get", "works", OK);
    if let Some(versions) = tried(session.list_versions(&info.kid), "permission list", report)? {
        let newest = newest_usable(&versions);
        let pinned = versions.iter().any(|version| same_version(&version.kid, &info.kid));
        let is_newest = newest.is_none_or(|newest| same_version(&newest.kid, &info.kid));
        let found = if is_newest { "newest" } else { "a newer one exists" };
        let fix = "rotate the volume to the newest version";
        report.add("key version", found, if is_newest || !pinned { OK } else { warn(fix) });
    }
    let outside = validity(info).check(BootTime::now(), wall_clock()).is_err();
    if !info.enabled || outside {
        // The service would refuse for that reason, which says nothing about the permission.
        for requirement in ["permission wrapKey", "permission unwrapKey"] {
            let judged = Judged(Verdict::Warn, "check again when the key is usable", None);
            report.add(requirement, "not tried", judged);
        }
        return Ok(());
    }
    let plain = trial_value().map_err(|error| ProviderError::unreachable(error.to_string()))?;
    let wrapped = tried(session.wrap(&info.kid, algorithm, &plain), "permission wrapKey", report)?;
    let unwrapped = match &wrapped {
        Some(wrapped) => session.unwrap(&info.kid, algorithm, wrapped),
        // Without the one the other is tried on nothing: a 400 shows that it is permitted.
        None => session.unwrap(&info.kid, algorithm, &[0; 256]),
    };
    let unwrapped = match (unwrapped, &wrapped) {
        (Err(error), None) if error.status == Some(400) => {
            report.add("permission unwrapKey", "works", OK);
            None
        }
        (result, _) => tried(result, "permission unwrapKey", report)?,
    };
    if wrapped.is_some() && unwrapped.is_some_and(|value| !value.ct_eq(plain.expose())) {
        let judged = Judged(Verdict::Fail, GRANT, Some(Reason::KeyMaterialMismatch));
        report.add("round trip", "another value comes back", judged);
    }
    Ok(())
}

/// A refusal becomes a row; what says nothing about the permission ends the check.
fn tried<T>(
    result: ProviderResult<T>,
    requirement: &'static str,
    report: &mut Report,
) -> ProviderResult<Option<T>> {
    const FIX: &str = "grant the identity get, list, wrapKey and unwrapKey on the key";
    match result {
        Ok(value) => {
            report.add(requirement, "works", OK);
            Ok(Some(value))
        }
        Err(error) if matches!(error.class, Class::Transient(_)) => Err(error),
        Err(error) => {
            let judged = Judged(Verdict::Fail, FIX, Some(error.reason()));
            report.add(requirement, error.to_string(), judged);
            Ok(None)
        }
    }
}

fn trial_value() -> crate::Result<SecretBytes> {
    let value = Secret::<32>::random()?;
    SecretBytes::new_with(32, |place| place.copy_from_slice(value.expose()))
}

/// The enabled version that was created last.
pub fn newest_usable(versions: &[VersionInfo]) -> Option<&VersionInfo> {
    versions.iter().filter(|version| version.enabled).max_by_key(|version| version.created)
}

fn same_version(one: &str, other: &str) -> bool {
    let last = |kid: &str| kid.trim_end_matches('/').rsplit('/').next().map(str::to_owned);
    last(one) == last(other)
}

pub(super) fn validity(info: &KeyInfo) -> Validity {
    let KeyInfo { not_before, expires, service_time, .. } = *info;
    Validity { not_before, expires, service_time }
}

fn date_text(unix: Option<i64>) -> String {
    use time::OffsetDateTime;
    use time::format_description::well_known::Rfc3339;
    let Some(unix) = unix else { return "not set".into() };
    let date = OffsetDateTime::from_unix_timestamp(unix).ok();
    date.and_then(|date| date.format(&Rfc3339).ok()).unwrap_or_else(|| unix.to_string())
}

#[cfg(test)]
mod tests {
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
            ("purge protection", |key| {
                key.info.recovery_level = Some("Recoverable+Purgeable".into())
            }),
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
        let settings =
            |region: &str| Settings { region: Some(region.into()), ..Settings::default() };
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
}
