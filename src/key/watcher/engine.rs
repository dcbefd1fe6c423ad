//! The watcher's threads, and what they share.
//!
//! [`Shared::inner`] is only ever locked for moments: no thread holds it during I/O or while a
//! handler runs. (Opening the gate waits for leases of the last epoch, which end in moments.)

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{CutOffOrder, Handler, Notice, ProbeReport, Settings};
use crate::crypto::random;
use crate::error::{Context, Result};
use crate::key::clock::BootTime;
use crate::key::envelope::Envelope;
use crate::key::gate::Gate;
use crate::key::policy::{self, Decision, Outcome, Policy, Validity};
use crate::key::probe::{Seen, probe};
use crate::key::provider::{Class, Provider, ProviderError};
use crate::key::reason::Reason;
use crate::key::requirement::validity;
use crate::key::wall_clock;
use crate::sync::{Condvar, Mutex, MutexGuard};

pub(super) const TICK: Duration = Duration::from_secs(1);
/// How much longer than its deadline a probe may take to come back before it counts as lost.
const PROBE_GRACE: Duration = Duration::from_secs(2);
/// The longest that a service's Retry-After is followed.
const RETRY_AFTER_LIMIT: Duration = Duration::from_secs(120);
/// Each so-many-th probe tries every permission; so does one that comes this long after the last
/// which did and found all of them, and each one after one that did and did not.
const COMPLETE_EVERY: u64 = 4;
pub(super) const COMPLETE_WITHIN: Duration = Duration::from_secs(120);
/// For [`Gate::drain`] when the watcher itself has to shut the gate.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// Somebody else may be answering: told at once, though the volume serves on.
const ALARMING: [Reason; 2] = [Reason::TlsUntrusted, Reason::ProxyDenied];
/// Days before the expiry at which it is told.
const EXPIRY_WARNINGS: [u64; 3] = [1, 7, 30];

pub(super) struct Shared {
    pub(super) settings: Settings,
    pub(super) watched: Mutex<Arc<Watched>>,
    pub(super) gate: Arc<Gate>,
    pub(super) cut_offs: Mutex<Sender<CutOffOrder>>,
    pub(super) notices: Mutex<Sender<Event>>,
    pub(super) inner: Mutex<Inner>,
    /// Told of every change of `inner`.
    pub(super) changed: Condvar,
}

/// The key that is watched, by its envelope, and who is asked about it.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) provider: Arc<dyn Provider>,
    pub(super) envelope: Envelope,
}

pub(super) struct Inner {
    pub(super) policy: Policy,
    /// When the revalidation began that opened the gate last.
    pub(super) opened: BootTime,
    /// When the next probe is due; None before the volume was first opened.
    pub(super) due: Option<BootTime>,
    /// The probe under way.
    pub(super) flight: Option<Flight>,
    pub(super) probes_started: u64,
    pub(super) probes_ended: u64,
    /// From then on a probe is to try every permission.
    pub(super) complete_due: BootTime,
    /// The first probe that is of the current envelope's key.
    pub(super) envelope_from: u64,
    /// When a newer version of the key was told of.
    pub(super) told_newer: Option<BootTime>,
    /// The gate is to be shut by then, whatever the handler does.
    pub(super) backstop: Option<(BootTime, Reason)>,
    /// Cut-offs ordered and not yet done.
    pub(super) cutting: usize,
    pub(super) healing: bool,
    pub(super) degraded: Option<Reason>,
    pub(super) warned: Option<(i64, u64)>,
    /// What was alerted of, until a probe finds something else.
    alerted: Option<Reason>,
    pub(super) validity: Validity,
    pub(super) last_probe: Option<ProbeReport>,
    pub(super) last_success: Option<SystemTime>,
    pub(super) failures: u64,
    pub(super) stopping: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Flight {
    number: u64,
    started: BootTime,
    complete: bool,
    /// It did not come back in time and was counted as unreachable.
    given_up: bool,
    taken: bool,
}

pub(super) enum Event {
    Heal,
    NewerVersion(String),
    Notice(Notice),
}

impl Inner {
    pub(super) fn new(settings: policy::Settings) -> Inner {
        Inner {
            policy: Policy::new(settings, BootTime::now()),
            opened: BootTime::ZERO,
            due: None,
            flight: None,
            probes_started: 0,
            probes_ended: 0,
            complete_due: BootTime::ZERO,
            envelope_from: 0,
            told_newer: None,
            backstop: None,
            cutting: 0,
            healing: false,
            degraded: None,
            warned: None,
            alerted: None,
            validity: Validity::default(),
            last_probe: None,
            last_success: None,
            failures: 0,
            stopping: false,
        }
    }
}

impl Shared {
    pub(super) fn run_prober(&self) {
        loop {
            let flight = {
                let mut inner = self.inner.lock();
                loop {
                    if inner.stopping {
                        return;
                    }
                    if let Some(flight) = inner.flight.as_mut().filter(|flight| !flight.taken) {
                        flight.taken = true;
                        break *flight;
                    }
                    self.changed.wait(&mut inner);
                }
            };
            let watched = Arc::clone(&self.watched.lock());
            let deadline = flight.started + self.settings.deadline;
            let looked = catch_unwind(AssertUnwindSafe(|| {
                probe(&*watched.provider, &watched.envelope, flight.complete, deadline)
            }));
            crate::sys::stack::burn();
            let result =
                looked.unwrap_or_else(|_| Err(ProviderError::unreachable("the probe panicked")));
            let mut inner = self.inner.lock();
            if inner.stopping {
                // The gate is not this watcher's any more: shut by an unmount, it would be taken
                // for one that time has shut, and a cut-off be reported.
                return;
            }
            self.land(&mut inner, flight, result);
            self.changed.notify_all();
        }
    }

    pub(super) fn run_decider(&self) {
        let mut inner = self.inner.lock();
        while !inner.stopping {
            let (now, wall) = (BootTime::now(), wall_clock());
            self.keep_time(&mut inner, now, wall);
            self.start_probe_if_due(&mut inner, now);
            let wake = [
                inner.policy.next_wake(now, wall),
                inner.due.filter(|_| inner.flight.is_none()),
                inner.backstop.map(|(at, _)| at),
            ];
            let wait = wake.into_iter().flatten().map(|at| at.since(now)).min();
            // Never zero: a wake-up a little too early would spin.
            let wait = wait.unwrap_or(TICK).clamp(Duration::from_millis(1), TICK);
            self.changed.wait_for(&mut inner, wait);
        }
    }

    /// Everything that happens because time has passed.
    fn keep_time(&self, inner: &mut MutexGuard<'_, Inner>, now: BootTime, wall: i64) {
        if let Some(flight) = inner.flight
            && !flight.given_up
            && now > flight.started + self.settings.deadline + PROBE_GRACE
        {
            let given_up = Flight { given_up: true, ..flight };
            inner.flight = Some(given_up);
            let error = ProviderError::unreachable("the probe does not come back");
            self.judge(inner, flight, &Err(error));
        }
        if let Some(decision) = inner.policy.on_time(now, wall) {
            self.carry_out(inner, decision, None);
        }
        // The machine slept, or this thread did not run: the gate was faster.
        if inner.policy.is_serving() && now >= self.gate.valid_until() {
            inner.policy.shut(Reason::Unreachable, now);
            self.carry_out(inner, Decision::CutOff(Reason::Unreachable), None);
        }
        if let Some((at, reason)) = inner.backstop
            && now >= at
        {
            inner.backstop = None;
            self.shut_now(reason);
        }
    }

    fn start_probe_if_due(&self, inner: &mut MutexGuard<'_, Inner>, now: BootTime) {
        if inner.flight.is_some() || inner.due.is_none_or(|due| now < due) {
            return;
        }
        let number = inner.probes_started;
        let routine = inner.policy.is_serving() && !inner.policy.is_pending();
        let complete =
            !routine || number.is_multiple_of(COMPLETE_EVERY) || now >= inner.complete_due;
        inner.probes_started += 1;
        inner.due = Some(now + jittered(self.settings.interval));
        inner.flight =
            Some(Flight { number, started: now, complete, given_up: false, taken: false });
        self.changed.notify_all();
    }

    /// A probe came back.
    fn land(
        &self,
        inner: &mut MutexGuard<'_, Inner>,
        flight: Flight,
        result: Result<Seen, ProviderError>,
    ) {
        let given_up = inner.flight.is_some_and(|current| current.given_up);
        inner.flight = None;
        inner.probes_ended = flight.number + 1;
        // It asked before the revalidation that opened the gate did, and may have been answered
        // before it as well: what it says now is not known. Or it asked about a key that the
        // volume has left since. Ask again at once.
        let of_old_key = flight.number < inner.envelope_from;
        if of_old_key || result.is_err() && flight.started <= inner.opened {
            inner.due = Some(BootTime::ZERO);
            self.changed.notify_all();
            return;
        }
        // Late news are no good news; but a refusal is one, however late.
        let late_success = given_up && result.is_ok();
        if !late_success {
            self.judge(inner, flight, &result);
        }
    }

    fn judge(
        &self,
        inner: &mut MutexGuard<'_, Inner>,
        flight: Flight,
        result: &Result<Seen, ProviderError>,
    ) {
        let (now, wall) = (BootTime::now(), wall_clock());
        let (outcome, detail) = match result {
            Ok(Seen { info, newer }) => {
                self.tell_of_newer_version(inner, newer.as_deref(), now);
                let validity = validity(info);
                inner.validity = validity;
                inner.failures = 0;
                inner.last_success = Some(system_time_of(flight.started));
                (Outcome::Success { complete: flight.complete, validity }, None)
            }
            Err(error) => {
                inner.failures += 1;
                (Outcome::Failure(error.class), Some(error.to_string()))
            }
        };
        if flight.complete {
            inner.complete_due = match result {
                Ok(_) => flight.started + COMPLETE_WITHIN,
                Err(_) => BootTime::ZERO,
            };
        }
        inner.last_probe = Some(ProbeReport {
            at: system_time_of(flight.started),
            took: now.since(flight.started),
            complete: flight.complete,
            result: result.as_ref().map_or_else(|error| error.class.name(), |_| "Ok"),
            reason: result.as_ref().err().map(ProviderError::reason),
            detail: detail.clone(),
        });
        if let Err(error) = result {
            log::warn!("the key was probed without success: {error}");
            if let Some(wait) = error.retry_after {
                // Not `clamp`, which panics where the interval is the longer one.
                let wait = wait.min(RETRY_AFTER_LIMIT).max(self.settings.interval);
                inner.due = Some(now + jittered(wait));
            }
        }
        let alarming = match &outcome {
            Outcome::Failure(Class::Transient(reason)) => {
                Some(*reason).filter(|reason| ALARMING.contains(reason))
            }
            _ => None,
        };
        let before = std::mem::replace(&mut inner.alerted, alarming);
        if let Some(reason) = alarming.filter(|_| alarming != before) {
            self.tell(Event::Notice(Notice::Alert { reason, detail: detail.clone() }));
        }
        let decision = inner.policy.on_probe(flight.started, now, wall, &outcome);
        self.carry_out(inner, decision, detail);
        self.warn_of_expiry(inner);
    }

    /// The current envelope's key was found good by a rotation that began at `started`.
    pub(super) fn judge_rotated(
        &self,
        inner: &mut MutexGuard<'_, Inner>,
        started: BootTime,
        validity: Validity,
    ) {
        inner.validity = validity;
        if !inner.policy.is_serving() {
            return;
        }
        inner.failures = 0;
        inner.last_success = Some(system_time_of(started));
        inner.complete_due = started + COMPLETE_WITHIN;
        let outcome = Outcome::Success { complete: true, validity };
        let decision = inner.policy.on_probe(started, BootTime::now(), wall_clock(), &outcome);
        self.carry_out(inner, decision, None);
        self.warn_of_expiry(inner);
    }

    fn tell_of_newer_version(&self, inner: &mut Inner, newer: Option<&str>, now: BootTime) {
        let again = |told: BootTime| now.since(told) >= self.settings.follow_again;
        if let Some(kid) = newer
            && inner.told_newer.is_none_or(again)
        {
            inner.told_newer = Some(now);
            self.tell(Event::NewerVersion(kid.to_owned()));
        }
    }

    fn carry_out(
        &self,
        inner: &mut MutexGuard<'_, Inner>,
        decision: Decision,
        detail: Option<String>,
    ) {
        match decision {
            Decision::StayAvailable { valid_until } => {
                if !self.gate.extend(valid_until) {
                    inner.policy.shut(Reason::Unreachable, BootTime::now());
                    self.order_cut_off(inner, Reason::Unreachable, detail);
                } else if inner.degraded.take().is_some() {
                    self.tell(Event::Notice(Notice::Restored));
                }
            }
            Decision::Degrade(reason) => self.degrade(inner, reason, detail),
            Decision::Recheck(reason) => {
                let soon = BootTime::now() + inner.policy.settings().confirm_after;
                inner.due = Some(inner.due.map_or(soon, |due| due.min(soon)));
                if inner.policy.is_serving() {
                    self.degrade(inner, reason, detail);
                }
            }
            Decision::CutOff(reason) => self.order_cut_off(inner, reason, detail),
            Decision::Restate(reason) => {
                // A cut-off under way shuts the gate when the fence has had its time, and gives it
                // this reason at its end.
                if self.gate.is_shut() {
                    self.gate.shut(reason);
                } else if let Some((_, of_backstop)) = &mut inner.backstop {
                    *of_backstop = reason;
                }
                self.tell(Event::Notice(Notice::ReasonChanged { reason, detail }));
            }
            Decision::Heal => {
                if !inner.healing {
                    inner.healing = true;
                    self.tell(Event::Heal);
                }
            }
            Decision::StayInaccessible => {}
        }
    }

    fn degrade(&self, inner: &mut MutexGuard<'_, Inner>, reason: Reason, detail: Option<String>) {
        self.gate.degrade(reason);
        if inner.degraded != Some(reason) {
            inner.degraded = Some(reason);
            self.tell(Event::Notice(Notice::Degraded { reason, detail }));
        }
    }

    pub(super) fn order_cut_off(
        &self,
        inner: &mut MutexGuard<'_, Inner>,
        reason: Reason,
        detail: Option<String>,
    ) {
        inner.degraded = None;
        inner.backstop = Some((BootTime::now() + self.settings.shut_within, reason));
        let order = CutOffOrder { reason, detail, decided: SystemTime::now() };
        inner.cutting += 1;
        if self.cut_offs.lock().send(order).is_err() {
            inner.cutting -= 1;
            inner.backstop = None;
            self.shut_now(reason);
        }
        self.changed.notify_all();
        log::error!("cutting off: {}", reason.describe());
    }

    /// The handler has had its time.
    fn shut_now(&self, reason: Reason) {
        if self.gate.is_shut() {
            // It hangs behind that, or time has shut the gate: no key outlives it.
            self.gate.wipe();
            return;
        }
        self.gate.shut(reason);
        log::error!("the cut-off takes too long: the gate is shut");
        let gate = Arc::clone(&self.gate);
        let wiper = spawn("key-wiper", move || {
            gate.drain(DRAIN_LIMIT);
            gate.wipe();
        });
        if wiper.is_err() {
            self.gate.wipe();
        }
    }

    pub(super) fn warn_of_expiry(&self, inner: &mut MutexGuard<'_, Inner>) {
        const DAY: u64 = 24 * 60 * 60;
        let left = inner.validity.expires_in(BootTime::now(), wall_clock());
        let (Some(left), Some(unix)) = (left, inner.validity.expires) else { return };
        let Some(days) = EXPIRY_WARNINGS.into_iter().find(|days| left.as_secs() <= days * DAY)
        else {
            return;
        };
        let told = inner.warned.is_some_and(|(expiry, at)| expiry == unix && at <= days);
        if let Some(expires) = unix_time(unix).filter(|_| !told) {
            inner.warned = Some((unix, days));
            self.tell(Event::Notice(Notice::KeyExpiryWarning { expires, days }));
        }
    }

    /// A notice that nobody takes any more is one of a stopped watcher.
    fn tell(&self, event: Event) {
        if self.notices.lock().send(event).is_err() {
            log::debug!("a notice of the stopped watcher is dropped");
        }
    }
}

pub(super) fn run_cut_offs(
    orders: &Receiver<CutOffOrder>,
    handler: &dyn Handler,
    shared: &Weak<Shared>,
) {
    for order in orders {
        if catch_unwind(AssertUnwindSafe(|| handler.cut_off(&order))).is_err() {
            log::error!("the cut-off panicked; the gate shuts without it");
        }
        if let Some(shared) = shared.upgrade() {
            let mut inner = shared.inner.lock();
            inner.cutting -= 1;
            // It may have become another one while the server was fenced.
            if let Some(reason) = inner.policy.shut_by()
                && reason != order.reason
                && shared.gate.is_shut()
            {
                shared.gate.shut(reason);
            }
            drop(inner);
            shared.changed.notify_all();
        }
    }
}

pub(super) fn run_events(events: &Receiver<Event>, handler: &dyn Handler, shared: &Weak<Shared>) {
    for event in events {
        let heals = matches!(event, Event::Heal);
        let done = catch_unwind(AssertUnwindSafe(|| match event {
            Event::Notice(notice) => handler.notice(&notice),
            Event::NewerVersion(kid) => handler.newer_version(&kid),
            Event::Heal => {
                if let Err(error) = handler.heal() {
                    handler.notice(&Notice::HealFailed { detail: error.to_string() });
                }
            }
        }));
        if done.is_err() {
            log::error!("a notice of the key's watcher panicked");
        }
        if let Some(shared) = shared.upgrade().filter(|_| heals) {
            shared.inner.lock().healing = false;
        }
    }
}

pub(super) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name(name.into()).spawn(work);
    thread.map(drop).context(|| format!("cannot start the thread {name}"))
}

/// `time`, give or take a fifth: many hosts of one key do not probe in step.
pub(super) fn jittered(time: Duration) -> Duration {
    let random = random::bytes::<4>().map_or(u32::MAX / 2, u32::from_ne_bytes);
    time.mul_f64(0.8 + 0.4 * f64::from(random) / f64::from(u32::MAX))
}

pub(super) fn system_time_of(time: BootTime) -> SystemTime {
    let now = SystemTime::now();
    now.checked_sub(BootTime::now().since(time)).unwrap_or(now)
}

pub(super) fn unix_time(unix: i64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(unix).ok()?))
}
