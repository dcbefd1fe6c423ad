//! What a probe's outcome means for the volume: a state machine without I/O and without a clock.
//!
//! Unreachable is not denied:
//! - **Revoked**: cut off at once.
//! - **Denied**: may be a slip. Probed again after `confirm_after`; a second denial, or no success
//!   within `confirm_within`, confirms it. Only a success clears it.
//! - **Transient**: serve on, Degraded, until the last full success is `max_staleness` old.
//!
//! `max_staleness` counts from the start of the last successful probe to the gate being shut, so
//! the cut-off begins `cut_off_lead` earlier: fencing the server takes its time too.
//!
//! Inaccessible(Unreachable) heals by itself, everything else only within `auto_heal_window`.

use std::time::Duration;

use super::clock::BootTime;
use super::provider::{Class, ServiceTime};
use super::reason::Reason;

#[derive(Clone, Debug)]
pub struct Settings {
    pub confirm_after: Duration,
    pub confirm_within: Duration,
    pub max_staleness: Duration,
    /// Time that the cut-off needs before it shuts the gate.
    pub cut_off_lead: Duration,
    pub on_expired: OnExpired,
    /// How long after a revocation a success opens the volume again by itself; zero: never.
    pub auto_heal_window: Duration,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            confirm_after: Duration::from_secs(5),
            confirm_within: Duration::from_secs(60),
            max_staleness: Duration::from_secs(9 * 60),
            cut_off_lead: Duration::from_secs(25),
            on_expired: OnExpired::Inaccessible,
            auto_heal_window: Duration::ZERO,
        }
    }
}

/// What a key outside its validity dates means. The service itself goes on unwrapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnExpired {
    #[default]
    Inaccessible,
    Warn,
}

/// The validity dates of the key, as far as the watcher knows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Validity {
    pub not_before: Option<i64>,
    pub expires: Option<i64>,
    pub service_time: Option<ServiceTime>,
}

impl Validity {
    /// The key's time: the later of the local clock and the service's, so that setting one of
    /// them back extends nothing.
    pub fn time(&self, now: BootTime, wall: i64) -> i64 {
        self.service_time.map_or(wall, |time| time.at(now).max(wall))
    }

    pub fn check(&self, now: BootTime, wall: i64) -> Result<(), Reason> {
        if self.expires.is_some_and(|expires| expires <= self.time(now, wall)) {
            return Err(Reason::KeyExpired);
        }
        // Here the earlier clock would be the strict one; but the service's counts, and the local
        // one only where the service did not tell.
        let time = self.service_time.map_or(wall, |time| time.at(now));
        if self.not_before.is_some_and(|not_before| not_before > time) {
            return Err(Reason::KeyNotYetValid);
        }
        Ok(())
    }

    /// Time until the expiry by whichever clock gets there first.
    pub fn expires_in(&self, now: BootTime, wall: i64) -> Option<Duration> {
        let left = self.expires?.saturating_sub(self.time(now, wall));
        Some(Duration::from_secs(u64::try_from(left).unwrap_or(0)))
    }
}

/// The result of one probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every call was answered as it should be. `complete` if every permission was tried.
    Success {
        complete: bool,
        validity: Validity,
    },
    Failure(Class),
}

/// What the watcher is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// All is well: the gate may stay open until then.
    StayAvailable {
        valid_until: BootTime,
    },
    /// Serve on, and say why the state is not quite Available.
    Degrade(Reason),
    /// Serve on, and probe again (with every permission) after `confirm_after`.
    Recheck(Reason),
    CutOff(Reason),
    /// Inaccessible, and the reason has become another.
    Restate(Reason),
    /// Inaccessible, and good again: revalidate and open.
    Heal,
    StayInaccessible,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pending {
    reason: Reason,
    first: BootTime,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Serving {
        /// Start of the last successful probe.
        last_success: BootTime,
        validity: Validity,
    },
    Inaccessible {
        reason: Reason,
        since: BootTime,
    },
}

/// The state machine. `wall` is the local clock in seconds since the epoch.
#[derive(Clone, Debug)]
pub struct Policy {
    settings: Settings,
    mode: Mode,
    pending: Option<Pending>,
    /// Last time the service refused: what was checked before it cannot open the volume.
    last_refusal: Option<BootTime>,
}

impl Policy {
    pub fn new(settings: Settings, now: BootTime) -> Policy {
        let mode = Mode::Inaccessible { reason: Reason::NotOpened, since: now };
        Policy { settings, mode, pending: None, last_refusal: None }
    }

    /// A revalidation that began at `started` succeeded. The instant until which the gate may be
    /// open, or None if the service refused meanwhile, it is too old already, or the key is outside
    /// its dates.
    pub fn opened(
        &mut self,
        started: BootTime,
        now: BootTime,
        wall: i64,
        validity: Validity,
    ) -> Option<BootTime> {
        let valid_until = started + self.settings.max_staleness;
        if self.last_refusal.is_some_and(|refusal| refusal >= started)
            || now >= self.stale_at(started)
            || self.settings.on_expired == OnExpired::Inaccessible
                && validity.check(now, wall).is_err()
        {
            return None;
        }
        self.mode = Mode::Serving { last_success: started, validity };
        self.pending = None;
        Some(valid_until)
    }

    /// The volume was cut off by something else than this policy.
    pub fn shut(&mut self, reason: Reason, now: BootTime) {
        self.cut(reason, now);
    }

    pub fn on_probe(
        &mut self,
        started: BootTime,
        now: BootTime,
        wall: i64,
        outcome: &Outcome,
    ) -> Decision {
        let outcome = self.by_dates(now, wall, outcome);
        if matches!(outcome, Outcome::Failure(Class::Revoked(_) | Class::Denied(_))) {
            self.last_refusal = Some(now);
        }
        match self.mode {
            Mode::Serving { .. } => self.while_serving(started, now, wall, &outcome),
            Mode::Inaccessible { reason, since } => {
                self.while_inaccessible(reason, since, now, &outcome)
            }
        }
    }

    /// To be called whenever [`Policy::next_wake`] has come, and may be at any time.
    pub fn on_time(&mut self, now: BootTime, wall: i64) -> Option<Decision> {
        let Mode::Serving { last_success, validity } = self.mode else { return None };
        if let (Err(reason), OnExpired::Inaccessible) =
            (validity.check(now, wall), self.settings.on_expired)
        {
            self.last_refusal = Some(now);
            return Some(self.cut(reason, now));
        }
        if let Some(pending) = self.pending
            && now >= pending.first + self.settings.confirm_within
        {
            return Some(self.cut(pending.reason, now));
        }
        (now >= self.stale_at(last_success)).then(|| self.cut(Reason::Unreachable, now))
    }

    /// When [`Policy::on_time`] has something to say at the latest, if no probe comes before.
    pub fn next_wake(&self, now: BootTime, wall: i64) -> Option<BootTime> {
        let Mode::Serving { last_success, validity } = self.mode else { return None };
        let confirm = self.pending.map(|pending| pending.first + self.settings.confirm_within);
        let expiry = match self.settings.on_expired {
            OnExpired::Inaccessible => validity.expires_in(now, wall).map(|left| now + left),
            OnExpired::Warn => None,
        };
        [Some(self.stale_at(last_success)), confirm, expiry].into_iter().flatten().min()
    }

    pub fn is_serving(&self) -> bool {
        matches!(self.mode, Mode::Serving { .. })
    }

    /// Why the volume is Inaccessible; None while it is served.
    pub fn shut_by(&self) -> Option<Reason> {
        match self.mode {
            Mode::Serving { .. } => None,
            Mode::Inaccessible { reason, .. } => Some(reason),
        }
    }

    /// Whether nobody has to ask for it to be opened again, once the key is good.
    pub fn heals(&self, now: BootTime) -> bool {
        let Mode::Inaccessible { reason, since } = self.mode else { return true };
        let window = self.settings.auto_heal_window;
        let waits_for_somebody =
            matches!(reason, Reason::NotOpened | Reason::NotConfirmed | Reason::Operator);
        let in_window = !waits_for_somebody && !window.is_zero() && now.since(since) <= window;
        reason.heals_by_itself() || in_window
    }

    /// A denial waits for its confirmation: the next probe must try every permission.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The dates decide over what the service is ready to do.
    fn by_dates(&self, now: BootTime, wall: i64, outcome: &Outcome) -> Outcome {
        match (outcome, self.settings.on_expired) {
            (Outcome::Success { validity, .. }, OnExpired::Inaccessible) => {
                match validity.check(now, wall) {
                    Ok(()) => *outcome,
                    Err(reason) => Outcome::Failure(Class::Revoked(reason)),
                }
            }
            _ => *outcome,
        }
    }

    fn while_serving(
        &mut self,
        started: BootTime,
        now: BootTime,
        wall: i64,
        outcome: &Outcome,
    ) -> Decision {
        match *outcome {
            Outcome::Success { complete, validity } => {
                let Mode::Serving { last_success, .. } = self.mode else {
                    return Decision::StayInaccessible;
                };
                if let Some(pending) = self.pending
                    && !complete
                {
                    // It may be the permission that was not tried.
                    return self.on_time(now, wall).unwrap_or(Decision::Recheck(pending.reason));
                }
                if now >= self.stale_at(last_success) {
                    // The cut-off was due before this success came in.
                    return self.cut(Reason::Unreachable, now);
                }
                self.pending = None;
                let last_success = last_success.max(started);
                self.mode = Mode::Serving { last_success, validity };
                Decision::StayAvailable { valid_until: last_success + self.settings.max_staleness }
            }
            Outcome::Failure(Class::Revoked(reason)) => self.cut(reason, now),
            Outcome::Failure(Class::Denied(reason)) => {
                if self.pending.is_some() {
                    return self.cut(reason, now);
                }
                self.pending = Some(Pending { reason, first: now });
                self.on_time(now, wall).unwrap_or(Decision::Recheck(reason))
            }
            Outcome::Failure(Class::Transient(reason)) => {
                let due = self.on_time(now, wall);
                due.unwrap_or(match self.pending {
                    Some(pending) => Decision::Recheck(pending.reason),
                    None => Decision::Degrade(reason),
                })
            }
        }
    }

    fn while_inaccessible(
        &mut self,
        reason: Reason,
        since: BootTime,
        now: BootTime,
        outcome: &Outcome,
    ) -> Decision {
        match *outcome {
            Outcome::Success { complete, .. } => {
                if complete {
                    self.pending = None;
                }
                if self.heals(now) { Decision::Heal } else { Decision::StayInaccessible }
            }
            Outcome::Failure(Class::Revoked(new)) => self.restate(reason, new, since),
            Outcome::Failure(Class::Denied(new)) if new == reason => Decision::StayInaccessible,
            Outcome::Failure(Class::Denied(new)) => {
                if self.pending.take().is_some() {
                    return self.restate(reason, new, since);
                }
                self.pending = Some(Pending { reason: new, first: now });
                Decision::Recheck(new)
            }
            Outcome::Failure(Class::Transient(_)) => Decision::StayInaccessible,
        }
    }

    /// A cut-off by hand keeps its reason: nothing the key service says may replace it.
    fn restate(&mut self, old: Reason, new: Reason, since: BootTime) -> Decision {
        self.pending = None;
        if old == new || matches!(old, Reason::Operator | Reason::NotOpened | Reason::NotConfirmed)
        {
            return Decision::StayInaccessible;
        }
        self.mode = Mode::Inaccessible { reason: new, since };
        Decision::Restate(new)
    }

    fn cut(&mut self, reason: Reason, now: BootTime) -> Decision {
        self.pending = None;
        self.mode = Mode::Inaccessible { reason, since: now };
        Decision::CutOff(reason)
    }

    fn stale_at(&self, last_success: BootTime) -> BootTime {
        let lead = self.settings.cut_off_lead.min(self.settings.max_staleness);
        last_success + (self.settings.max_staleness - lead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WALL: i64 = 1_800_000_000;

    fn at(seconds: u64) -> BootTime {
        BootTime::from_nanos(1_000_000_000 * (10_000 + seconds))
    }

    fn wall(seconds: u64) -> i64 {
        WALL + seconds as i64
    }

    fn settings() -> Settings {
        Settings { cut_off_lead: Duration::from_secs(20), ..Settings::default() }
    }

    fn serving() -> Policy {
        with(settings())
    }

    fn with(settings: Settings) -> Policy {
        let mut policy = Policy::new(settings, at(0));
        assert_eq!(policy.opened(at(0), at(0), WALL, Validity::default()), Some(at(540)));
        policy
    }

    fn probe(policy: &mut Policy, second: u64, outcome: Outcome) -> Decision {
        policy.on_probe(at(second), at(second), wall(second), &outcome)
    }

    fn good() -> Outcome {
        Outcome::Success { complete: true, validity: Validity::default() }
    }

    fn partial() -> Outcome {
        Outcome::Success { complete: false, validity: Validity::default() }
    }

    fn until(expires: u64) -> Outcome {
        let validity = Validity { expires: Some(wall(expires)), ..Validity::default() };
        Outcome::Success { complete: true, validity }
    }

    fn revoked(reason: Reason) -> Outcome {
        Outcome::Failure(Class::Revoked(reason))
    }

    fn denied(reason: Reason) -> Outcome {
        Outcome::Failure(Class::Denied(reason))
    }

    fn lost() -> Outcome {
        Outcome::Failure(Class::Transient(Reason::Unreachable))
    }

    fn stay(second: u64) -> Decision {
        Decision::StayAvailable { valid_until: at(second + 540) }
    }

    #[test]
    fn a_success_is_worth_nine_minutes_from_its_start() {
        let mut policy = serving();
        assert_eq!(probe(&mut policy, 30, partial()), stay(30));
        let slow = policy.on_probe(at(60), at(69), wall(69), &good());
        assert_eq!(slow, stay(60));
    }

    #[test]
    fn a_revocation_cuts_off_at_once() {
        for reason in [Reason::KeyDisabled, Reason::KeyDeleted, Reason::KeyExpired] {
            let mut policy = serving();
            assert_eq!(probe(&mut policy, 30, revoked(reason)), Decision::CutOff(reason));
            assert!(!policy.is_serving());
        }
    }

    #[test]
    fn a_denial_is_confirmed_by_a_second_one() {
        let mut policy = serving();
        let slip = denied(Reason::PermissionRevoked);
        assert_eq!(probe(&mut policy, 30, slip), Decision::Recheck(Reason::PermissionRevoked));
        assert!(policy.is_pending());
        let other = denied(Reason::NetworkDenied);
        assert_eq!(probe(&mut policy, 35, other), Decision::CutOff(Reason::NetworkDenied));
    }

    #[test]
    fn only_a_complete_success_clears_a_denial() {
        let mut policy = serving();
        let slip = denied(Reason::PermissionRevoked);
        probe(&mut policy, 30, slip);
        assert_eq!(probe(&mut policy, 35, partial()), Decision::Recheck(Reason::PermissionRevoked));
        assert_eq!(probe(&mut policy, 36, lost()), Decision::Recheck(Reason::PermissionRevoked));
        assert_eq!(probe(&mut policy, 40, good()), stay(40));
        assert!(!policy.is_pending());
        assert_eq!(probe(&mut policy, 70, slip), Decision::Recheck(Reason::PermissionRevoked));
    }

    #[test]
    fn a_denial_without_a_success_within_a_minute_is_confirmed() {
        let mut policy = serving();
        probe(&mut policy, 30, denied(Reason::IdentityGone));
        probe(&mut policy, 45, lost());
        assert_eq!(policy.next_wake(at(45), wall(45)), Some(at(90)));
        assert_eq!(policy.on_time(at(89), wall(89)), None);
        assert_eq!(policy.on_time(at(90), wall(90)), Some(Decision::CutOff(Reason::IdentityGone)));
        assert_eq!(policy.on_time(at(91), wall(91)), None, "decided once");
    }

    #[test]
    fn unreachable_degrades_and_cuts_off_in_time_for_the_fence() {
        let mut policy = serving();
        assert_eq!(probe(&mut policy, 30, good()), stay(30));
        for second in (60..549).step_by(30) {
            assert_eq!(probe(&mut policy, second, lost()), Decision::Degrade(Reason::Unreachable));
        }
        assert_eq!(policy.next_wake(at(540), wall(540)), Some(at(30 + 520)));
        assert_eq!(policy.on_time(at(549), wall(549)), None);
        assert_eq!(policy.on_time(at(550), wall(550)), Some(Decision::CutOff(Reason::Unreachable)));
    }

    #[test]
    fn a_success_that_comes_too_late_does_not_save_the_session() {
        let mut policy = serving();
        assert_eq!(probe(&mut policy, 521, good()), Decision::CutOff(Reason::Unreachable));
        assert_eq!(probe(&mut policy, 530, good()), Decision::Heal);
    }

    #[test]
    fn staleness_counts_also_while_a_denial_waits() {
        let mut policy = with(Settings { confirm_within: Duration::from_secs(600), ..settings() });
        probe(&mut policy, 500, denied(Reason::NetworkDenied));
        assert_eq!(probe(&mut policy, 520, lost()), Decision::CutOff(Reason::Unreachable));
    }

    #[test]
    fn expiry_needs_no_probe() {
        let mut policy = serving();
        assert_eq!(probe(&mut policy, 30, until(100)), stay(30));
        assert_eq!(policy.next_wake(at(30), wall(30)), Some(at(100)));
        assert_eq!(policy.on_time(at(99), wall(99)), None);
        assert_eq!(policy.on_time(at(100), wall(100)), Some(Decision::CutOff(Reason::KeyExpired)));
    }

    #[test]
    fn expiry_goes_by_the_later_clock() {
        let validity = |unix, heard| Validity {
            expires: Some(wall(100)),
            service_time: Some(ServiceTime { unix, heard }),
            ..Validity::default()
        };
        // The local clock was set back an hour: the service's goes on.
        let mut policy = serving();
        let outcome = Outcome::Success { complete: true, validity: validity(wall(30), at(30)) };
        assert_eq!(probe(&mut policy, 30, outcome), stay(30));
        assert_eq!(policy.on_time(at(99), wall(0) - 3600), None);
        let due = policy.on_time(at(100), wall(0) - 3600);
        assert_eq!(due, Some(Decision::CutOff(Reason::KeyExpired)));
        // The service's clock is behind: the local one counts.
        let mut policy = serving();
        let outcome =
            Outcome::Success { complete: true, validity: validity(wall(0) - 3600, at(30)) };
        assert_eq!(probe(&mut policy, 30, outcome), stay(30));
        let due = policy.on_time(at(100), wall(100));
        assert_eq!(due, Some(Decision::CutOff(Reason::KeyExpired)));
    }

    #[test]
    fn dates_overrule_a_service_that_still_unwraps() {
        let mut policy = serving();
        assert_eq!(probe(&mut policy, 30, until(30)), Decision::CutOff(Reason::KeyExpired));
        let mut policy = serving();
        let validity = Validity { not_before: Some(wall(31)), ..Validity::default() };
        let outcome = Outcome::Success { complete: true, validity };
        assert_eq!(probe(&mut policy, 30, outcome), Decision::CutOff(Reason::KeyNotYetValid));
        let mut policy = with(Settings { on_expired: OnExpired::Warn, ..settings() });
        assert_eq!(probe(&mut policy, 30, until(30)), stay(30));
        assert_eq!(policy.on_time(at(40), wall(40)), None);
        assert_eq!(policy.next_wake(at(40), wall(40)), Some(at(30 + 520)));
    }

    #[test]
    fn unreachable_heals_by_itself_and_nothing_else_does() {
        for reason in Reason::ALL {
            let mut policy = serving();
            policy.shut(reason, at(30));
            let expected = if reason == Reason::Unreachable {
                Decision::Heal
            } else {
                Decision::StayInaccessible
            };
            assert_eq!(probe(&mut policy, 60, good()), expected, "{reason}");
        }
    }

    #[test]
    fn a_window_lets_a_revocation_heal_for_a_while() {
        let window = Settings { auto_heal_window: Duration::from_secs(1800), ..settings() };
        let mut policy = with(window.clone());
        probe(&mut policy, 30, revoked(Reason::KeyDisabled));
        assert_eq!(
            probe(&mut policy, 60, revoked(Reason::KeyDisabled)),
            Decision::StayInaccessible
        );
        assert_eq!(probe(&mut policy, 1830, good()), Decision::Heal);
        assert_eq!(probe(&mut policy, 1831, good()), Decision::StayInaccessible);
        let mut policy = with(window);
        policy.shut(Reason::Operator, at(30));
        assert_eq!(probe(&mut policy, 60, good()), Decision::StayInaccessible);
    }

    #[test]
    fn unreachable_that_turns_out_revoked_no_longer_heals() {
        let mut policy = serving();
        policy.shut(Reason::Unreachable, at(30));
        assert_eq!(probe(&mut policy, 40, lost()), Decision::StayInaccessible);
        assert_eq!(
            probe(&mut policy, 50, revoked(Reason::KeyDeleted)),
            Decision::Restate(Reason::KeyDeleted)
        );
        assert_eq!(probe(&mut policy, 60, good()), Decision::StayInaccessible);

        let mut policy = serving();
        policy.shut(Reason::Unreachable, at(30));
        let slip = denied(Reason::NetworkDenied);
        assert_eq!(probe(&mut policy, 40, slip), Decision::Recheck(Reason::NetworkDenied));
        assert_eq!(probe(&mut policy, 45, slip), Decision::Restate(Reason::NetworkDenied));
        assert_eq!(probe(&mut policy, 50, slip), Decision::StayInaccessible);
        assert_eq!(probe(&mut policy, 60, good()), Decision::StayInaccessible);
    }

    #[test]
    fn a_slip_while_unreachable_still_heals() {
        let mut policy = serving();
        policy.shut(Reason::Unreachable, at(30));
        probe(&mut policy, 40, denied(Reason::NetworkDenied));
        assert_eq!(probe(&mut policy, 45, good()), Decision::Heal);
        assert!(!policy.is_pending());
    }

    #[test]
    fn an_old_revalidation_does_not_open() {
        let mut policy = serving();
        probe(&mut policy, 30, revoked(Reason::KeyDisabled));
        assert_eq!(policy.opened(at(29), at(31), wall(31), Validity::default()), None);
        assert_eq!(policy.opened(at(31), at(31 + 520), wall(551), Validity::default()), None);
        assert_eq!(
            policy.opened(at(31), at(32), wall(32), Validity::default()),
            Some(at(31 + 540))
        );
        assert!(policy.is_serving());
    }

    #[test]
    fn an_expired_key_does_not_open() {
        let mut policy = Policy::new(settings(), at(0));
        let until = |second| Validity { expires: Some(wall(second)), ..Validity::default() };
        assert_eq!(policy.opened(at(9), at(10), wall(10), until(10)), None);
        assert!(!policy.is_serving());
        assert_eq!(policy.opened(at(9), at(10), wall(10), until(11)), Some(at(549)));
        let mut warned = Policy::new(Settings { on_expired: OnExpired::Warn, ..settings() }, at(0));
        assert_eq!(warned.opened(at(9), at(10), wall(10), until(10)), Some(at(549)));
    }

    #[test]
    fn nothing_opens_a_volume_that_was_never_opened() {
        let mut policy = Policy::new(settings(), at(0));
        assert_eq!(probe(&mut policy, 1, good()), Decision::StayInaccessible);
        assert_eq!(policy.on_time(at(10_000), wall(10_000)), None);
        assert_eq!(policy.next_wake(at(0), wall(0)), None);
    }

    mod properties {
        use proptest::prelude::*;

        use super::*;

        fn outcome() -> impl Strategy<Value = Outcome> {
            prop_oneof![
                4 => Just(good()),
                2 => Just(partial()),
                4 => Just(lost()),
                2 => Just(denied(Reason::PermissionRevoked)),
                1 => Just(revoked(Reason::KeyDisabled)),
                1 => (0..4000_u64).prop_map(until),
            ]
        }

        proptest! {
            /// Whatever happens: never serving longer than max_staleness - lead after the start
            /// of the last success, never a minute after an uncleared denial, never after a
            /// revocation, and never again by itself once refused.
            #[test]
            fn never_serves_longer_than_it_may(
                steps in proptest::collection::vec((1..120_u64, outcome()), 1..60)
            ) {
                let mut policy = serving();
                let (mut now, mut last_success, mut denial) = (0, 0, None);
                for (wait, outcome) in steps {
                    // The watcher wakes when asked to.
                    while let Some(wake) = policy.next_wake(at(now), wall(now)) {
                        let wake = (wake.as_nanos() / 1_000_000_000).saturating_sub(10_000).max(now);
                        if wake > now + wait {
                            break;
                        }
                        let decision = policy.on_time(at(wake), wall(wake));
                        prop_assert!(matches!(decision, Some(Decision::CutOff(_))), "{decision:?}");
                    }
                    now += wait;
                    let was_serving = policy.is_serving();
                    let decision = probe(&mut policy, now, outcome);
                    if was_serving {
                        match outcome {
                            Outcome::Failure(Class::Revoked(_)) => prop_assert!(!policy.is_serving()),
                            Outcome::Failure(Class::Denied(_)) if denial.is_some() => {
                                prop_assert!(!policy.is_serving());
                            }
                            Outcome::Failure(Class::Denied(_)) => denial = Some(now),
                            _ => {}
                        }
                        if let Decision::StayAvailable { .. } = decision {
                            (last_success, denial) = (now, None);
                        }
                    }
                    if policy.is_serving() {
                        prop_assert!(was_serving);
                        prop_assert!(now < last_success + 520);
                        prop_assert!(denial.is_none_or(|first| now < first + 60));
                    }
                    let wants_heal = decision == Decision::Heal;
                    prop_assert!(!wants_heal || !was_serving);
                }
            }
        }
    }
}
