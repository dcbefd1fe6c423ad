//! Rotation policies of keys: when a new version is made, and when a version expires.

use serde::{Deserialize, Serialize};
use time::{Date, Month, OffsetDateTime};

use super::refusal::Refusal;

/// The real service's limits, in days.
const MIN_TRIGGER_DAYS: u32 = 7;
const MIN_EXPIRY_DAYS: u32 = 28;
const DAYS_PER_MONTH: u32 = 30;
const SECONDS_PER_DAY: i64 = 86400;

/// As it comes, goes out and is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RotationPolicy {
    #[serde(rename = "lifetimeActions", default)]
    pub(crate) actions: Vec<LifetimeAction>,
    #[serde(default)]
    pub(crate) attributes: PolicyAttributes,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LifetimeAction {
    trigger: Trigger,
    action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Trigger {
    #[serde(skip_serializing_if = "Option::is_none")]
    time_after_create: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_before_expiry: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Action {
    #[serde(rename = "type")]
    kind: ActionKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum ActionKind {
    #[serde(alias = "rotate")]
    Rotate,
    #[serde(alias = "notify")]
    Notify,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PolicyAttributes {
    #[serde(skip_serializing_if = "Option::is_none")]
    expiry_time: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) created: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) updated: Option<i64>,
}

impl RotationPolicy {
    /// What a key without a policy of its own has.
    pub(crate) fn default_policy() -> RotationPolicy {
        RotationPolicy {
            actions: vec![LifetimeAction {
                trigger: Trigger {
                    time_after_create: None,
                    time_before_expiry: Some("P30D".to_owned()),
                },
                action: Action { kind: ActionKind::Notify },
            }],
            attributes: PolicyAttributes::default(),
        }
    }

    pub(crate) fn check(&self) -> Result<(), Refusal> {
        let expiry = self.attributes.expiry_time.as_deref().map(duration).transpose()?;
        if expiry.is_some_and(|expiry| expiry.days() < MIN_EXPIRY_DAYS) {
            return Err(bad(format!("'expiryTime' must be at least {MIN_EXPIRY_DAYS} days.")));
        }
        if self.actions.len() > 2 {
            return Err(bad("At most one action of each type is allowed."));
        }
        if let [first, second] = self.actions.as_slice()
            && first.action == second.action
        {
            return Err(bad("At most one action of each type is allowed."));
        }
        for LifetimeAction { trigger, action } in &self.actions {
            let time = match (&trigger.time_after_create, &trigger.time_before_expiry) {
                (Some(after), None) if action.kind == ActionKind::Rotate => duration(after)?,
                (Some(_), None) => {
                    return Err(bad("A notification is triggered by 'timeBeforeExpiry'."));
                }
                (None, Some(before)) => {
                    if action.kind == ActionKind::Rotate && expiry.is_none() {
                        return Err(bad("A rotation before expiry needs 'expiryTime'."));
                    }
                    duration(before)?
                }
                _ => return Err(bad("A trigger has one time.")),
            };
            if time.days() < MIN_TRIGGER_DAYS {
                return Err(bad(format!("A trigger's time is at least {MIN_TRIGGER_DAYS} days.")));
            }
            // Else a version made before a short month would be due at once, and so the next one.
            if expiry.is_some_and(|expiry| time.days() >= expiry.fewest_days()) {
                return Err(bad("A trigger's time must be shorter than 'expiryTime'."));
            }
        }
        Ok(())
    }

    /// When a version made now expires.
    pub(crate) fn expiry(&self, now: i64) -> Option<i64> {
        let expiry = duration(self.attributes.expiry_time.as_deref()?).ok()?;
        expiry.after(now)
    }

    /// Is it time for a version after the newest one?
    pub(crate) fn is_due(&self, created: i64, expires: Option<i64>, now: i64) -> bool {
        self.actions.iter().filter(|action| action.action.kind == ActionKind::Rotate).any(
            |LifetimeAction { trigger, .. }| {
                let after_create = trigger
                    .time_after_create
                    .as_deref()
                    .and_then(|text| duration(text).ok()?.after(created));
                let before_expiry = trigger.time_before_expiry.as_deref().and_then(|text| {
                    let days = i64::from(duration(text).ok()?.days());
                    Some(expires? - days * SECONDS_PER_DAY)
                });
                after_create.or(before_expiry).is_some_and(|due| due <= now)
            },
        )
    }
}

/// An ISO 8601 duration of years, months, weeks and days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Duration {
    months: u32,
    days: u32,
}

impl Duration {
    /// About as many days.
    fn days(self) -> u32 {
        self.months.saturating_mul(DAYS_PER_MONTH).saturating_add(self.days)
    }

    /// No more than there are, whatever day it begins at: February is two days short of a month of
    /// 30, and a longer time makes up for that.
    fn fewest_days(self) -> u32 {
        self.days() - if self.months > 0 { 2 } else { 0 }
    }

    /// By the calendar; a day that the month lacks becomes its last.
    fn after(self, start: i64) -> Option<i64> {
        let start = OffsetDateTime::from_unix_timestamp(start).ok()?;
        let months = u32::try_from(start.year()).ok()?.checked_mul(12)?
            + u32::from(u8::from(start.month()) - 1)
            + self.months;
        let year = i32::try_from(months / 12).ok()?;
        let month = Month::try_from(u8::try_from(months % 12 + 1).ok()?).ok()?;
        let day = start.day().min(month.length(year));
        let date = Date::from_calendar_date(year, month, day).ok()?;
        let end = start.replace_date(date).checked_add(time::Duration::days(self.days.into()))?;
        Some(end.unix_timestamp())
    }
}

fn duration(text: &str) -> Result<Duration, Refusal> {
    parse(text).ok_or_else(|| bad("A time is an ISO 8601 duration in days, months or years."))
}

fn parse(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('P')?;
    let mut duration = Duration { months: 0, days: 0 };
    let mut units = "YMWD";
    while !rest.is_empty() {
        let digits = rest.find(|next: char| !next.is_ascii_digit())?;
        let count: u32 = rest[..digits].parse().ok().filter(|count| *count <= 10_000)?;
        let unit = rest[digits..].chars().next()?;
        // Each unit once, in this order.
        units = &units[units.find(unit)? + 1..];
        match unit {
            'Y' => duration.months += count * 12,
            'M' => duration.months += count,
            'W' => duration.days += count * 7,
            _ => duration.days += count,
        }
        rest = &rest[digits + 1..];
    }
    (duration.days() > 0).then_some(duration)
}

fn bad(message: impl Into<String>) -> Refusal {
    Refusal::bad_parameter(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = SECONDS_PER_DAY;
    /// 2027-01-31T00:00:00Z
    const START: i64 = 1_801_353_600;

    fn policy(json: &str) -> RotationPolicy {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn durations_are_those_of_iso_8601() {
        let of = |months, days| Some(Duration { months, days });
        assert_eq!(parse("P30D"), of(0, 30));
        assert_eq!(parse("P1Y2M3W4D"), of(14, 25));
        for bad in ["", "P", "30D", "P30", "PD", "P1D1M", "PT1H", "P-1D", "P0D", "P1é", "P99999D"]
        {
            assert_eq!(parse(bad), None, "{bad}");
        }
        assert_eq!(parse("P1M").unwrap().after(START), Some(START + 28 * DAY));
        assert_eq!(parse("P1Y").unwrap().after(START), Some(START + 365 * DAY));
        assert_eq!(parse("P10000Y").unwrap().after(START), None);
    }

    #[test]
    fn a_rotation_is_due_after_creation_or_before_expiry() {
        let after = policy(
            r#"{"lifetimeActions":[{"trigger":{"timeAfterCreate":"P90D"},"action":{"type":"Rotate"}}],
                "attributes":{"expiryTime":"P1Y"}}"#,
        );
        after.check().unwrap();
        assert!(!after.is_due(START, None, START + 90 * DAY - 1));
        assert!(after.is_due(START, None, START + 90 * DAY));
        assert_eq!(after.expiry(START), Some(START + 365 * DAY));
        let before = policy(
            r#"{"lifetimeActions":[{"trigger":{"timeBeforeExpiry":"P30D"},"action":{"type":"Rotate"}}],
                "attributes":{"expiryTime":"P90D"}}"#,
        );
        before.check().unwrap();
        assert!(!before.is_due(START, None, i64::MAX));
        assert!(!before.is_due(START, Some(START + 90 * DAY), START + 60 * DAY - 1));
        assert!(before.is_due(START, Some(START + 90 * DAY), START + 60 * DAY));
        assert!(!RotationPolicy::default_policy().is_due(START, Some(START), i64::MAX));
    }

    #[test]
    fn no_new_version_is_due_at_once() {
        for (before, expiry) in
            [("P29D", "P1M"), ("P28D", "P1M"), ("P27D", "P1M"), ("P59D", "P2M"), ("P1M", "P2M")]
        {
            let policy = policy(&format!(
                r#"{{"lifetimeActions":[{{"trigger":{{"timeBeforeExpiry":"{before}"}},
                    "action":{{"type":"Rotate"}}}}],"attributes":{{"expiryTime":"{expiry}"}}}}"#
            ));
            if policy.check().is_err() {
                continue;
            }
            for made in (0..4 * 366).map(|day| START + day * DAY) {
                let due = policy.is_due(made, policy.expiry(made), made);
                assert!(!due, "{before} before {expiry}: made at {made}");
            }
        }
    }

    #[test]
    fn policies_that_contradict_themselves_are_refused() {
        for bad in [
            r#"{"lifetimeActions":[{"trigger":{},"action":{"type":"Rotate"}}]}"#,
            r#"{"lifetimeActions":[{"trigger":{"timeAfterCreate":"P1D"},"action":{"type":"Rotate"}}]}"#,
            r#"{"lifetimeActions":[{"trigger":{"timeAfterCreate":"soon"},"action":{"type":"Rotate"}}]}"#,
            r#"{"lifetimeActions":[{"trigger":{"timeBeforeExpiry":"P30D"},"action":{"type":"Rotate"}}]}"#,
            r#"{"lifetimeActions":[{"trigger":{"timeAfterCreate":"P90D"},"action":{"type":"Notify"}}]}"#,
            r#"{"lifetimeActions":[{"trigger":{"timeAfterCreate":"P90D"},"action":{"type":"Rotate"}}],
                "attributes":{"expiryTime":"P60D"}}"#,
            r#"{"attributes":{"expiryTime":"P27D"}}"#,
        ] {
            assert_eq!(policy(bad).check().unwrap_err().status, 400, "{bad}");
        }
        RotationPolicy::default_policy().check().unwrap();
    }
}
