//! The watcher: probes the key, asks the policy what the outcome means, and has it done.
//!
//! Four threads, so that nothing that may block can hold up a decision:
//! - the *prober* talks to the key service, one probe at a time;
//! - the *decider* owns the policy and the timers (expiry, confirmation, staleness) and never
//!   does any I/O;
//! - the *cut-off* thread runs [`Handler::cut_off`], which fences the server first. If the gate is
//!   not shut by [`Settings::shut_within`] the decider shuts it itself, and has it drained and
//!   wiped by a thread of its own;
//! - the *notice* thread runs [`Handler::heal`] and [`Handler::notice`].
//!
//! If all of them died the gate would shut by itself at its `valid_until`. A probe that does not
//! come back counts as unreachable. Waiting is bounded by [`TICK`], so that a suspended machine or
//! a clock that was set is noticed within a second.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::clock::BootTime;
use super::custody::Revalidated;
use super::envelope::Envelope;
use super::gate::{Gate, GateStatus};
use super::policy::{self, Decision, Outcome, Policy, Validity};
use super::probe::probe;
use super::provider::{Class, KeyInfo, Provider, ProviderError};
use super::reason::Reason;
use super::requirement::validity;
use super::wall_clock;
use crate::crypto::random;
use crate::error::{Context, Error, Kind, Result};

const TICK: Duration = Duration::from_secs(1);
/// How much longer than its deadline a probe may take to come back before it counts as lost.
const PROBE_GRACE: Duration = Duration::from_secs(2);
/// The longest that a service's Retry-After is followed.
const RETRY_AFTER_LIMIT: Duration = Duration::from_secs(120);
/// Each so-many-th probe tries every permission.
const COMPLETE_EVERY: u64 = 4;
/// For [`Gate::drain`] when the watcher itself has to shut the gate.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
/// Days before the expiry at which it is told.
const EXPIRY_WARNINGS: [u64; 3] = [1, 7, 30];

#[derive(Clone, Debug)]
pub struct Settings {
    /// From the start of one probe to the start of the next, give or take a fifth.
    pub interval: Duration,
    /// For all calls of a probe together.
    pub deadline: Duration,
    /// How long a cut-off may take to shut the gate: the time the fence has, and a little.
    pub shut_within: Duration,
    pub policy: policy::Settings,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            interval: Duration::from_secs(30),
            deadline: Duration::from_secs(10),
            shut_within: Duration::from_secs(25),
            policy: policy::Settings::default(),
        }
    }
}

/// What the daemon does when the watcher has decided. No method is ever called by two threads at
/// once, but [`Handler::cut_off`] may run beside the others.
pub trait Handler: Send + Sync {
    /// Fence the server, bring in mapped pages, `gate.shut(order.reason)`, `gate.drain`,
    /// `gate.wipe`, purge, and tell. Returns when all of it is done.
    fn cut_off(&self, order: &CutOffOrder);
    /// The key is good again and may open the volume by itself: revalidate, start a session and
    /// [`Watcher::admit`]. After an error it is asked again with the next good probe.
    fn heal(&self) -> Result<()>;
    /// Something for the audit log, metrics or alerts.
    fn notice(&self, notice: &Notice);
}

#[derive(Clone, Debug)]
pub struct CutOffOrder {
    pub reason: Reason,
    /// What the key service said, where it said something.
    pub detail: Option<String>,
    pub decided: SystemTime,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Serving on, but not quite Available.
    Degraded {
        reason: Reason,
        detail: Option<String>,
    },
    /// Available again.
    Restored,
    /// Still Inaccessible, for another reason.
    ReasonChanged {
        reason: Reason,
        detail: Option<String>,
    },
    /// The key service's certificate is not trusted, or a proxy answers in its place.
    Alert {
        reason: Reason,
        detail: Option<String>,
    },
    /// At 30, 7 and 1 days before.
    KeyExpiryWarning {
        expires: SystemTime,
        days: u64,
    },
    HealFailed {
        detail: String,
    },
}

/// For `byokfs status`.
#[derive(Clone, Debug)]
pub struct Status {
    pub gate: GateStatus,
    pub kid: String,
    pub last_probe: Option<ProbeReport>,
    /// Start of the last probe that succeeded.
    pub last_success: Option<SystemTime>,
    pub next_probe_in: Option<Duration>,
    pub expires: Option<SystemTime>,
    /// Probes that failed since the last success.
    pub failures: u64,
}

#[derive(Clone, Debug)]
pub struct ProbeReport {
    pub at: SystemTime,
    pub took: Duration,
    /// Whether every permission was tried.
    pub complete: bool,
    /// "Ok", or the failure's class.
    pub result: &'static str,
    pub reason: Option<Reason>,
    pub detail: Option<String>,
}

/// The running watcher; dropping it stops it, and the gate shuts when its permission runs out.
pub struct Watcher {
    shared: Arc<Shared>,
}

struct Shared {
    settings: Settings,
    provider: Arc<dyn Provider>,
    envelope: Mutex<Arc<Envelope>>,
    gate: Arc<Gate>,
    cut_offs: Mutex<Sender<CutOffOrder>>,
    notices: Mutex<Sender<Event>>,
    inner: Mutex<Inner>,
    /// Told of every change of `inner`.
    changed: Condvar,
}

struct Inner {
    policy: Policy,
    /// When the next probe is due; None before the volume was first opened.
    due: Option<BootTime>,
    /// The probe under way.
    flight: Option<Flight>,
    probes_started: u64,
    probes_ended: u64,
    /// The gate is to be shut by then, whatever the handler does.
    backstop: Option<(BootTime, Reason)>,
    /// Cut-offs ordered and not yet done.
    cutting: usize,
    healing: bool,
    degraded: Option<Reason>,
    warned: Option<(i64, u64)>,
    validity: Validity,
    last_probe: Option<ProbeReport>,
    last_success: Option<SystemTime>,
    failures: u64,
    stopping: bool,
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    number: u64,
    started: BootTime,
    complete: bool,
    /// It did not come back in time and was counted as unreachable.
    given_up: bool,
    taken: bool,
}

enum Event {
    Heal,
    Notice(Notice),
}

impl Watcher {
    /// Starts the threads. Nothing is probed, and the gate stays shut, until [`Watcher::admit`].
    pub fn start(
        settings: Settings,
        provider: Arc<dyn Provider>,
        envelope: Envelope,
        gate: Arc<Gate>,
        handler: Arc<dyn Handler>,
    ) -> Result<Arc<Watcher>> {
        let (cut_offs, orders) = channel();
        let (notices, events) = channel();
        let inner = Inner {
            policy: Policy::new(settings.policy.clone(), BootTime::now()),
            due: None,
            flight: None,
            probes_started: 0,
            probes_ended: 0,
            backstop: None,
            cutting: 0,
            healing: false,
            degraded: None,
            warned: None,
            validity: Validity::default(),
            last_probe: None,
            last_success: None,
            failures: 0,
            stopping: false,
        };
        let shared = Arc::new(Shared {
            settings,
            provider,
            envelope: Mutex::new(Arc::new(envelope)),
            gate,
            cut_offs: Mutex::new(cut_offs),
            notices: Mutex::new(notices),
            inner: Mutex::new(inner),
            changed: Condvar::new(),
        });
        let watcher = Arc::new(Watcher { shared: Arc::clone(&shared) });
        let (weak, for_cut_offs) = (Arc::downgrade(&shared), Arc::clone(&handler));
        spawn("key-cutoff", move || run_cut_offs(&orders, &*for_cut_offs, &weak))?;
        let weak = Arc::downgrade(&shared);
        spawn("key-notice", move || run_events(&events, &*handler, &weak))?;
        let prober = Arc::clone(&shared);
        spawn("key-prober", move || prober.run_prober())?;
        spawn("key-decider", move || shared.run_decider())?;
        Ok(watcher)
    }

    /// Opens the gate with a key that was just revalidated, and watches it from now on. Refused
    /// when the key service denied the key after the revalidation began, and (`Busy`) while a
    /// cut-off is under way.
    pub fn admit(&self, revalidated: Revalidated) -> Result<()> {
        let validity = revalidated.validity();
        let Revalidated { keyring, started, .. } = revalidated;
        let shared = &*self.shared;
        let mut inner = shared.inner.lock();
        let now = BootTime::now();
        let refused = |why: &str| Error::new(Kind::Inaccessible, why);
        // Its shutting of the gate would hit the new epoch.
        if inner.cutting > 0 {
            let why = "the cut-off is still under way; try again in a moment";
            return Err(Error::new(Kind::Busy, why));
        }
        let valid_until = inner.policy.opened(started, now, validity).ok_or_else(|| {
            refused("the key was denied again while it was being checked; try once more")
        })?;
        if !shared.gate.open(keyring, valid_until) {
            inner.policy.shut(Reason::Unreachable, now);
            return Err(refused("an operation from before the cut-off does not end"));
        }
        inner.backstop = None;
        inner.degraded = None;
        inner.failures = 0;
        inner.validity = validity;
        inner.last_success = Some(system_time_of(started));
        inner.due = Some(started + jittered(shared.settings.interval));
        shared.warn_of_expiry(&mut inner);
        shared.changed.notify_all();
        Ok(())
    }

    /// Cuts off by hand.
    pub fn cut_off(&self, reason: Reason) {
        let mut inner = self.shared.inner.lock();
        if inner.policy.is_serving() {
            inner.policy.shut(reason, BootTime::now());
            self.shared.order_cut_off(&mut inner, reason, None);
        }
    }

    /// Has the key probed now, and waits for the outcome; the status then, or as it is at `limit`.
    pub fn probe_now(&self, limit: Duration) -> Status {
        let until = BootTime::now() + limit;
        let shared = &*self.shared;
        let mut inner = shared.inner.lock();
        // One that is under way may have asked before whatever the caller wants to see.
        let wanted = inner.probes_started + 1;
        inner.due = Some(BootTime::ZERO);
        shared.changed.notify_all();
        while inner.probes_ended < wanted && !inner.stopping {
            let left = until.remaining();
            if left.is_zero() {
                break;
            }
            shared.changed.wait_for(&mut inner, left.min(TICK));
        }
        drop(inner);
        self.status()
    }

    /// The envelope was rewritten: probes go to its key from now on.
    pub fn replace_envelope(&self, envelope: Envelope) {
        *self.shared.envelope.lock() = Arc::new(envelope);
    }

    pub fn status(&self) -> Status {
        let kid = self.shared.envelope.lock().kid.clone();
        let inner = self.shared.inner.lock();
        Status {
            gate: self.shared.gate.status(),
            kid,
            last_probe: inner.last_probe.clone(),
            last_success: inner.last_success,
            next_probe_in: inner.due.map(BootTime::remaining),
            expires: inner.validity.expires.and_then(unix_time),
            failures: inner.failures,
        }
    }

    /// Ends the threads; a probe or handler under way is not waited for. The gate is left as it
    /// is, and shuts when its permission runs out.
    pub fn stop(&self) {
        self.shared.inner.lock().stopping = true;
        self.shared.changed.notify_all();
        // Their receivers end with the last sender.
        *self.shared.cut_offs.lock() = channel().0;
        *self.shared.notices.lock() = channel().0;
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watcher").field("gate", &self.shared.gate).finish_non_exhaustive()
    }
}

impl Shared {
    fn run_prober(&self) {
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
            let envelope = Arc::clone(&self.envelope.lock());
            let deadline = flight.started + self.settings.deadline;
            let looked = catch_unwind(AssertUnwindSafe(|| {
                probe(&*self.provider, &envelope, flight.complete, deadline)
            }));
            crate::sys::stack::burn();
            let result =
                looked.unwrap_or_else(|_| Err(ProviderError::unreachable("the probe panicked")));
            let mut inner = self.inner.lock();
            self.land(&mut inner, flight, result);
            self.changed.notify_all();
        }
    }

    fn run_decider(&self) {
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
        let complete = !routine || number.is_multiple_of(COMPLETE_EVERY);
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
        result: Result<KeyInfo, ProviderError>,
    ) {
        let given_up = inner.flight.is_some_and(|current| current.given_up);
        inner.flight = None;
        inner.probes_ended = flight.number + 1;
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
        result: &Result<KeyInfo, ProviderError>,
    ) {
        let (now, wall) = (BootTime::now(), wall_clock());
        let (outcome, detail) = match result {
            Ok(info) => {
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
                let wait = wait.clamp(self.settings.interval, RETRY_AFTER_LIMIT);
                inner.due = Some(now + jittered(wait));
            }
            if let Class::Transient(reason @ (Reason::TlsUntrusted | Reason::ProxyDenied)) =
                error.class
            {
                self.tell(Event::Notice(Notice::Alert { reason, detail: detail.clone() }));
            }
        }
        let decision = inner.policy.on_probe(flight.started, now, wall, &outcome);
        self.carry_out(inner, decision, detail);
        self.warn_of_expiry(inner);
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
                self.gate.shut(reason);
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

    fn order_cut_off(
        &self,
        inner: &mut MutexGuard<'_, Inner>,
        reason: Reason,
        detail: Option<String>,
    ) {
        log::error!("cutting off: {}", reason.describe());
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
    }

    /// The handler has had its time.
    fn shut_now(&self, reason: Reason) {
        if self.gate.check().is_err() && self.gate.valid_until() == BootTime::ZERO {
            return;
        }
        log::error!("the cut-off takes too long: shutting the gate");
        self.gate.shut(reason);
        let gate = Arc::clone(&self.gate);
        let wiper = spawn("key-wiper", move || {
            gate.drain(DRAIN_LIMIT);
            gate.wipe();
        });
        if wiper.is_err() {
            self.gate.wipe();
        }
    }

    fn warn_of_expiry(&self, inner: &mut MutexGuard<'_, Inner>) {
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

fn run_cut_offs(orders: &Receiver<CutOffOrder>, handler: &dyn Handler, shared: &Weak<Shared>) {
    for order in orders {
        if catch_unwind(AssertUnwindSafe(|| handler.cut_off(&order))).is_err() {
            log::error!("the cut-off panicked; the gate shuts without it");
        }
        if let Some(shared) = shared.upgrade() {
            shared.inner.lock().cutting -= 1;
            shared.changed.notify_all();
        }
    }
}

fn run_events(events: &Receiver<Event>, handler: &dyn Handler, shared: &Weak<Shared>) {
    for event in events {
        let heals = matches!(event, Event::Heal);
        let done = catch_unwind(AssertUnwindSafe(|| match event {
            Event::Notice(notice) => handler.notice(&notice),
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

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name(name.into()).spawn(work);
    thread.map(drop).context(|| format!("cannot start the thread {name}"))
}

/// `time`, give or take a fifth: many hosts of one key do not probe in step.
fn jittered(time: Duration) -> Duration {
    let random = random::bytes::<4>().map_or(u32::MAX / 2, u32::from_ne_bytes);
    time.mul_f64(0.8 + 0.4 * f64::from(random) / f64::from(u32::MAX))
}

fn system_time_of(time: BootTime) -> SystemTime {
    let now = SystemTime::now();
    now.checked_sub(BootTime::now().since(time)).unwrap_or(now)
}

fn unix_time(unix: i64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(unix).ok()?))
}

#[cfg(test)]
#[path = "watcher_tests.rs"]
mod tests;
