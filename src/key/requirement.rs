//! What a key must be to protect a volume, checked one by one and told as a table.
//!
//! `init`, every mount and every revalidation make this check. Attributes are read; permissions
//! are tried for real, since nothing else shows them. A requirement that protects from accidents
//! but not from anyone (recovery, an expiry date that will come) warns; [`Settings::strict`]
//! makes it fail.

use std::fmt;

use serde::{Serialize, Serializer};

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
    /// Failures do not refuse the key, as long as it works: see [`Row::can_be_waived`].
    pub tolerant: bool,
    /// Where the key service must say it is.
    pub region: Option<String>,
    /// The directory that the key service must trust.
    pub tenant: Option<String>,
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
    #[serde(serialize_with = "by_name")]
    pub reason: Option<Reason>,
}

impl Row {
    /// Whether a volume may be opened without it, if its maker said so. Never without what the
    /// watcher would cut it off for.
    pub fn can_be_waived(&self) -> bool {
        match self.reason {
            None | Some(Reason::WrongKeyOrCorruptEnvelope | Reason::TokenRefused) => true,
            Some(_) => false,
        }
    }
}

fn by_name<S: Serializer>(reason: &Option<Reason>, to: S) -> Result<S::Ok, S::Error> {
    reason.map(Reason::name).serialize(to)
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

    /// The worst of all rows.
    pub fn verdict(&self) -> Verdict {
        match (self.failures().next(), self.warnings().next()) {
            (Some(_), _) => Verdict::Fail,
            (None, Some(_)) => Verdict::Warn,
            (None, None) => Verdict::Ok,
        }
    }

    /// Why the key is refused, if it is: the gravest cause first.
    pub fn reason(&self) -> Option<Reason> {
        let gravity =
            |row: &&Row| (row.can_be_waived(), row.reason == Some(Reason::PermissionRevoked));
        self.failures().filter(|row| row.reason.is_some()).min_by_key(gravity)?.reason
    }

    /// A refusal becomes a row; what says nothing about the permission ends the check.
    pub(super) fn tried<T>(
        &mut self,
        result: ProviderResult<T>,
        requirement: &'static str,
    ) -> ProviderResult<Option<T>> {
        const GRANT: &str = "grant the identity get, list, wrapKey and unwrapKey on the key";
        match result {
            Ok(value) => {
                self.add(requirement, "works", OK);
                Ok(Some(value))
            }
            Err(error) if matches!(error.class, Class::Transient(_)) => Err(error),
            Err(error) => {
                let fix = match error.reason() {
                    Reason::PermissionRevoked => GRANT,
                    other => other.describe(),
                };
                let judged = Judged(Verdict::Fail, fix, Some(error.reason()));
                self.add(requirement, error.to_string(), judged);
                Ok(None)
            }
        }
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
/// it. An error means that the check could not be made, or that the key cannot be read.
pub fn check(
    session: &mut dyn Session,
    kid: &str,
    algorithm: Algorithm,
    settings: &Settings,
) -> ProviderResult<(KeyInfo, Report)> {
    let info = session.get_key(kid)?;
    let report = judge(session, &info, algorithm, settings)?;
    Ok((info, report))
}

/// As [`check`], for a person to read: what forbids to read the key is a row too, and `algorithm`
/// may be left to the key. The key's information is None where it cannot be read.
pub fn survey(
    session: &mut dyn Session,
    kid: &str,
    algorithm: Option<Algorithm>,
    settings: &Settings,
) -> ProviderResult<(Option<KeyInfo>, Report)> {
    let refused = match session.get_key(kid) {
        Ok(info) => {
            let algorithm = match algorithm {
                Some(algorithm) => algorithm,
                None => session.algorithm(&info, None)?,
            };
            let report = judge(session, &info, algorithm, settings)?;
            return Ok((Some(info), report));
        }
        Err(error) if matches!(error.class, Class::Transient(_)) => return Err(error),
        Err(error) => error,
    };
    let mut report = Report { kid: kid.to_owned(), rows: Vec::new() };
    let exists = !matches!(refused.reason(), Reason::KeyDeleted | Reason::KeyNotFound);
    let requirement = if exists { "permission get" } else { "key exists" };
    report.tried::<()>(Err(refused), requirement)?;
    if exists {
        report.tried(session.list_versions(kid), "permission list")?;
        try_keys(session, kid, algorithm.unwrap_or(Algorithm::RsaOaep256), &mut report)?;
    }
    Ok((None, report))
}

fn judge(
    session: &mut dyn Session,
    info: &KeyInfo,
    algorithm: Algorithm,
    settings: &Settings,
) -> ProviderResult<Report> {
    let mut report = Report { kid: info.kid.clone(), rows: Vec::new() };
    let warn = |fix| Judged(if settings.strict { Verdict::Fail } else { Verdict::Warn }, fix, None);
    attributes(info, algorithm, &warn, &mut report);
    dates(info, settings, &warn, &mut report);
    recovery(info, &warn, &mut report);
    tenant(info, settings, &mut report);
    region(info, settings, &mut report);
    permissions(session, info, algorithm, &warn, &mut report)?;
    Ok(report)
}

fn attributes(
    info: &KeyInfo,
    algorithm: Algorithm,
    warn: &impl Fn(&'static str) -> Judged,
    report: &mut Report,
) {
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
    if let Some(exportable) = info.exportable {
        let found = if exportable { "exportable" } else { "stays in its service" };
        let fix = "use a key that cannot leave its service";
        report.add("not exportable", found, if exportable { warn(fix) } else { OK });
    }
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
    if let Some(destroyable) = info.destroyable {
        let found = if destroyable { "can be destroyed" } else { "cannot be destroyed" };
        let fix = "set CKA_DESTROYABLE to false on the key: a token recovers nothing";
        report.add("purge protection", found, if destroyable { warn(fix) } else { OK });
        return;
    }
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

/// The directory that the service trusts, the one configured and that of the identity's token: all
/// the same. A name ("contoso.onmicrosoft.com") cannot be compared with an id.
fn tenant(info: &KeyInfo, settings: &Settings, report: &mut Report) {
    let Some(found) = info.tenant.as_deref() else { return };
    let configured = settings.tenant.as_deref().filter(|id| !id.contains('.'));
    let wanted = [configured, info.identity_tenant.as_deref()];
    let same = wanted.into_iter().flatten().all(|id| id.eq_ignore_ascii_case(found));
    let fix = "use a key vault and an identity of one tenant, and that tenant_id";
    report.add("tenant", found, fail_unless(same, fix, Reason::TokenRefused));
}

fn region(info: &KeyInfo, settings: &Settings, report: &mut Report) {
    let found = info.region.as_deref();
    let judged = match &settings.region {
        Some(wanted) if !found.is_some_and(|found| found.eq_ignore_ascii_case(wanted)) => {
            Judged(Verdict::Fail, "use a key in the configured region", None)
        }
        None if found.is_none() => return,
        _ => OK,
    };
    report.add("region", found.unwrap_or("unknown"), judged);
}

fn permissions(
    session: &mut dyn Session,
    info: &KeyInfo,
    algorithm: Algorithm,
    warn: &impl Fn(&'static str) -> Judged,
    report: &mut Report,
) -> ProviderResult<()> {
    report.add("permission get", "works", OK);
    if let Some(versions) = report.tried(session.list_versions(&info.kid), "permission list")? {
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
    try_keys(session, &info.kid, algorithm, report)
}

/// Wraps and unwraps for real.
fn try_keys(
    session: &mut dyn Session,
    kid: &str,
    algorithm: Algorithm,
    report: &mut Report,
) -> ProviderResult<()> {
    let plain = trial_value().map_err(|error| ProviderError::unreachable(error.to_string()))?;
    let wrapped = report.tried(session.wrap(kid, algorithm, &plain), "permission wrapKey")?;
    let unwrapped = match &wrapped {
        Some(wrapped) => session.unwrap(kid, algorithm, wrapped),
        // Without the one the other is tried on nothing: a 400 shows that it is permitted.
        None => session.unwrap(kid, algorithm, &[0; 256]),
    };
    let unwrapped = match (unwrapped, &wrapped) {
        (Err(error), None) if error.status == Some(400) => {
            report.add("permission unwrapKey", "works", OK);
            None
        }
        (result, _) => report.tried(result, "permission unwrapKey")?,
    };
    if wrapped.is_some() && unwrapped.is_some_and(|value| !value.ct_eq(plain.expose())) {
        let fix = "use another key: this one does not unwrap what it wraps";
        let judged = Judged(Verdict::Fail, fix, Some(Reason::KeyMaterialMismatch));
        report.add("round trip", "another value comes back", judged);
    }
    Ok(())
}

fn trial_value() -> crate::Result<SecretBytes> {
    let value = Secret::<32>::random()?;
    SecretBytes::new_with(32, |place| place.copy_from_slice(value.expose()))
}

/// Of the versions that are enabled and within their dates, the one that was created last.
pub fn newest_usable(versions: &[VersionInfo]) -> Option<&VersionInfo> {
    let now = wall_clock();
    let usable = |version: &&VersionInfo| {
        version.enabled
            && version.expires.is_none_or(|expires| expires > now)
            && version.not_before.is_none_or(|not_before| not_before <= now)
    };
    versions.iter().filter(usable).max_by_key(|version| version.created)
}

pub(super) fn same_version(one: &str, other: &str) -> bool {
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
mod tests;
