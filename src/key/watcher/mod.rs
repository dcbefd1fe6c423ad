//! The watcher: probes the key, asks the policy what the outcome means, and has it done.
//!
//! Four threads, so that nothing that may block can hold up a decision:
//! - the *prober* talks to the key service, one probe at a time;
//! - the *decider* owns the policy and the timers (expiry, confirmation, staleness) and never
//!   does any I/O;
//! - the *cut-off* thread runs [`Handler::cut_off`], which fences the server first. If the gate is
//!   not shut by [`Settings::shut_within`] the decider shuts it itself, and has it drained and
//!   wiped by a thread of its own;
//! - the *notice* thread runs [`Handler::heal`], [`Handler::notice`] and
//!   [`Handler::newer_version`].
//!
//! If all of them died the gate would shut by itself at its `valid_until`. A probe that does not
//! come back counts as unreachable. Waiting is bounded to a second, so that a suspended machine or
//! a clock that was set is noticed soon.

mod engine;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, SystemTime};

use super::clock::BootTime;
use super::custody::Revalidated;
use super::envelope::Envelope;
use super::gate::{Gate, GateStatus};
use super::policy;
use super::provider::Provider;
use super::reason::Reason;
use super::rewrap::Rewrapped;
use super::wall_clock;
use crate::error::{Error, Kind, Result};
use crate::sync::{Condvar, Mutex, MutexGuard};
use engine::{
    COMPLETE_WITHIN, Inner, Shared, TICK, Watched, jittered, run_cut_offs, run_events, spawn,
    system_time_of, unix_time,
};

/// How long [`Watcher::admit`] waits for the end of a cut-off.
const CUT_OFF_WAIT: Duration = Duration::from_secs(2);

#[derive(Clone, Debug)]
pub struct Settings {
    /// From the start of one probe to the start of the next, give or take a fifth.
    pub interval: Duration,
    /// For all calls of a probe together.
    pub deadline: Duration,
    /// How long a cut-off may take to shut the gate: the time the fence has, and a little.
    pub shut_within: Duration,
    /// How long after a newer version of a followed key was told of it is told of again.
    pub follow_again: Duration,
    pub policy: policy::Settings,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            interval: Duration::from_secs(30),
            deadline: Duration::from_secs(10),
            shut_within: Duration::from_secs(25),
            follow_again: Duration::from_secs(10 * 60),
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
    /// The envelope follows its key's versions, and this is the newest one that can be used. Must
    /// not wait for a key service: notices wait behind it.
    fn newer_version(&self, kid: &str);
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
        let inner = Inner::new(settings.policy.clone());
        let shared = Arc::new(Shared {
            settings,
            watched: Mutex::new(Arc::new(Watched { provider, envelope })),
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
    /// cut-off is under way that does not end.
    pub fn admit(&self, revalidated: Revalidated) -> Result<()> {
        self.open(revalidated, false)
    }

    /// The same where nobody has asked for it. Refused too when the reason has become one that waits
    /// for somebody to ask.
    pub fn admit_by_itself(&self, revalidated: Revalidated) -> Result<()> {
        self.open(revalidated, true)
    }

    fn open(&self, revalidated: Revalidated, by_itself: bool) -> Result<()> {
        let validity = revalidated.validity();
        let Revalidated { keyring, started, .. } = revalidated;
        let shared = &*self.shared;
        let mut inner = shared.inner.lock();
        // A cut-off under way would shut the new epoch. One that has done its work ends at once.
        let limit = BootTime::now() + CUT_OFF_WAIT;
        while inner.cutting > 0 {
            if limit.remaining().is_zero() {
                let why = "the cut-off is still under way; try again in a moment";
                return Err(Error::new(Kind::Busy, why));
            }
            shared.changed.wait_for(&mut inner, TICK.min(limit.remaining()));
        }
        let now = BootTime::now();
        let refused = |why: &str| Error::new(Kind::Inaccessible, why);
        if by_itself && !inner.policy.heals(now) {
            return Err(refused(
                "the key was lost meanwhile: `byokfs revalidate` opens the volume",
            ));
        }
        let valid_until =
            inner.policy.opened(started, now, wall_clock(), validity).ok_or_else(|| {
                refused("the key was denied again while it was being checked; try once more")
            })?;
        if !shared.gate.open(keyring, valid_until) {
            inner.policy.shut(Reason::Unreachable, now);
            return Err(refused("an operation from before the cut-off does not end"));
        }
        inner.opened = started;
        inner.backstop = None;
        inner.degraded = None;
        inner.failures = 0;
        inner.validity = validity;
        inner.last_success = Some(system_time_of(started));
        inner.complete_due = started + COMPLETE_WITHIN;
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

    /// Probes go to this envelope's key, by `provider`, from now on. What one that is under way
    /// finds is asked again: it may be of another key or identity.
    pub fn watch(&self, envelope: Envelope, provider: Arc<dyn Provider>) {
        let mut inner = self.shared.inner.lock();
        self.replace(&mut inner, Watched { provider, envelope });
    }

    /// The same, unless it is the envelope that is watched already.
    pub fn replace_envelope(&self, envelope: Envelope, provider: Arc<dyn Provider>) {
        let mut inner = self.shared.inner.lock();
        if self.shared.watched.lock().envelope != envelope {
            self.replace(&mut inner, Watched { provider, envelope });
        }
    }

    /// The envelope was rewrapped and saved: its key, which was just checked in full, is the one
    /// that counts from now on. What becomes of the old one does not matter any more.
    pub fn rotated(&self, rewrapped: &Rewrapped, provider: Arc<dyn Provider>) {
        let mut inner = self.shared.inner.lock();
        self.replace(&mut inner, Watched { provider, envelope: rewrapped.envelope.clone() });
        self.shared.judge_rotated(&mut inner, rewrapped.started, rewrapped.validity());
    }

    /// The envelope was saved again, with the same key: nothing changes for what is under way.
    pub fn envelope_saved(&self, envelope: Envelope) {
        let mut watched = self.shared.watched.lock();
        if watched.envelope.kid == envelope.kid {
            let provider = Arc::clone(&watched.provider);
            *watched = Arc::new(Watched { provider, envelope });
        }
    }

    fn replace(&self, inner: &mut MutexGuard<'_, engine::Inner>, new: Watched) {
        *self.shared.watched.lock() = Arc::new(new);
        // A probe under way may be of the old key.
        inner.envelope_from = inner.probes_started;
        inner.told_newer = None;
        if inner.due.is_some() {
            inner.due = Some(BootTime::ZERO);
        }
        self.shared.changed.notify_all();
    }

    pub fn status(&self) -> Status {
        let kid = self.shared.watched.lock().envelope.kid.clone();
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
