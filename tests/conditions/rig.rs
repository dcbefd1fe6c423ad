//! A watcher over a key service, with a gate and a handler that does what the daemon does.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use byokfs::Result;
use byokfs::key::custody::{Enrolment, enrol, revalidate};
use byokfs::key::envelope::Envelope;
use byokfs::key::gate::{Gate, Reason, State};
use byokfs::key::policy;
use byokfs::key::provider::{Provider, Settings, for_key};
use byokfs::key::requirement;
use byokfs::key::rewrap::{NewKey, rewrap};
use byokfs::key::watcher::{self, CutOffOrder, Handler, Notice, Watcher};
use parking_lot::Mutex;

/// For what must happen: a test fails by it only if it never does.
pub const LIMIT: Duration = Duration::from_secs(60);
/// At once, or after confirmation: nothing like [`STALENESS`].
pub const SOON: Duration = Duration::from_secs(30);
/// How long an unreachable service is borne where that is not what a test is about.
pub const STALENESS: Duration = Duration::from_secs(300);
/// The cut-off's own time, which is taken off that.
pub const LEAD: Duration = Duration::from_secs(1);

/// Some milliseconds where the real thing has seconds in what is awaited, and as patient in what
/// must not happen: a machine may stand still for a while.
pub fn quick() -> watcher::Settings {
    watcher::Settings {
        interval: Duration::from_millis(200),
        deadline: Duration::from_secs(30),
        policy: policy::Settings {
            confirm_after: Duration::from_millis(150),
            confirm_within: Duration::from_secs(60),
            max_staleness: STALENESS,
            cut_off_lead: LEAD,
            ..policy::Settings::default()
        },
        ..watcher::Settings::default()
    }
}

/// Nothing is probed but by [`Rig::probes`].
pub fn by_hand() -> watcher::Settings {
    watcher::Settings { interval: Duration::from_secs(3600), ..quick() }
}

/// `max_staleness` is over soon, and a probe that hangs has its end within it.
pub fn impatient() -> watcher::Settings {
    let quick = quick();
    let policy = policy::Settings { max_staleness: Duration::from_secs(10), ..quick.policy };
    watcher::Settings { deadline: Duration::from_secs(3), policy, ..quick }
}

/// What answers: a vault, or a fake of one.
pub trait Service {
    /// The key version that the volume is enrolled with.
    fn key(&self) -> String;
    fn access(&self) -> Settings;
}

pub struct Rig<S> {
    pub service: S,
    pub gate: Arc<Gate>,
    pub handler: Arc<Recorder>,
    pub watcher: Arc<Watcher>,
}

/// What the daemon does, and what it was told, with the time.
pub struct Recorder {
    gate: Arc<Gate>,
    provider: Mutex<Arc<dyn Provider>>,
    envelope: Mutex<Envelope>,
    enrolment: Enrolment,
    watcher: Mutex<std::sync::Weak<Watcher>>,
    pub orders: Mutex<Vec<CutOffOrder>>,
    pub notices: Mutex<Vec<Notice>>,
}

impl Recorder {
    pub fn pin(&self) -> &[u8; 32] {
        &self.enrolment.fingerprint
    }

    pub fn envelope(&self) -> Envelope {
        self.envelope.lock().clone()
    }

    /// `byokfs revalidate`.
    pub fn revalidate(&self) -> Result<()> {
        let settings = requirement::Settings::default();
        let provider = Arc::clone(&*self.provider.lock());
        let good = revalidate(&*provider, &self.envelope(), self.pin(), &settings, LIMIT)?;
        self.watcher.lock().upgrade().unwrap().admit(good)
    }
}

impl Handler for Recorder {
    fn cut_off(&self, order: &CutOffOrder) {
        self.orders.lock().push(order.clone());
        self.gate.shut(order.reason);
        self.gate.drain(LIMIT);
        self.gate.wipe();
    }

    fn heal(&self) -> Result<()> {
        self.revalidate()
    }

    fn notice(&self, notice: &Notice) {
        self.notices.lock().push(notice.clone());
    }

    fn newer_version(&self, _kid: &str) {}
}

impl<S: Service> Rig<S> {
    pub fn serving(service: S, settings: watcher::Settings) -> Rig<S> {
        let provider = for_key(&service.key(), &service.access()).unwrap();
        let requirements = requirement::Settings::default();
        let enrolment = enrol(&*provider, &service.key(), None, &requirements, LIMIT).unwrap();
        let gate = Gate::new();
        let handler = Arc::new(Recorder {
            gate: Arc::clone(&gate),
            provider: Mutex::new(Arc::clone(&provider)),
            envelope: Mutex::new(enrolment.envelope([1; 16])),
            enrolment,
            watcher: Mutex::default(),
            orders: Mutex::default(),
            notices: Mutex::default(),
        });
        let watcher = Watcher::start(
            settings,
            provider,
            handler.envelope(),
            Arc::clone(&gate),
            Arc::clone(&handler) as _,
        )
        .unwrap();
        *handler.watcher.lock() = Arc::downgrade(&watcher);
        handler.revalidate().unwrap();
        Rig { service, gate, handler, watcher }
    }

    pub fn state(&self) -> (State, Option<Reason>) {
        let status = self.gate.status();
        (status.state, status.reason)
    }

    /// How long that took.
    #[track_caller]
    pub fn wait_for(&self, what: &str, state: State, reason: Option<Reason>) -> Duration {
        let start = Instant::now();
        while self.state() != (state, reason) {
            let seen = self.watcher.status();
            assert!(start.elapsed() < LIMIT, "{what}: {state} {reason:?} never came: {seen:?}");
            std::thread::sleep(Duration::from_millis(3));
        }
        start.elapsed()
    }

    /// So many more probes, whatever they find.
    pub fn probes(&self, count: usize) {
        (0..count).for_each(|_| drop(self.watcher.probe_now(LIMIT)));
    }

    /// `byokfs rotate kek --to` a key of another service.
    pub fn move_to(&self, other: &impl Service) {
        let (url, to) = (other.key(), for_key(&other.key(), &other.access()).unwrap());
        let new = NewKey {
            provider: &*to,
            url: &url,
            algorithm: None,
            follow: None,
            forget_earlier: false,
        };
        let settings = requirement::Settings::default();
        let from = Arc::clone(&*self.handler.provider.lock());
        let (envelope, pin) = (self.handler.envelope(), self.handler.pin());
        let rewrapped = rewrap(&*from, &envelope, pin, &new, &settings, LIMIT).unwrap().unwrap();
        *self.handler.envelope.lock() = rewrapped.envelope.clone();
        *self.handler.provider.lock() = Arc::clone(&to);
        self.watcher.rotated(&rewrapped, to);
    }

    /// Why it was Degraded since [`Rig::forget`], one after the other.
    pub fn degradations(&self) -> Vec<Reason> {
        let notices = self.handler.notices.lock();
        let degraded = notices.iter().filter_map(|notice| match notice {
            Notice::Degraded { reason, .. } => Some(*reason),
            _ => None,
        });
        degraded.collect()
    }

    /// Until that has been told: the notices have a thread of their own.
    #[track_caller]
    pub fn wait_for_degraded(&self, what: &str) {
        self.wait_until(what, || !self.degradations().is_empty());
    }

    #[track_caller]
    pub fn wait_until(&self, what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < LIMIT, "{what}: never");
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    pub fn alerted_of(&self, reason: Reason) -> bool {
        let notices = self.handler.notices.lock();
        notices
            .iter()
            .any(|notice| matches!(notice, Notice::Alert { reason: told, .. } if *told == reason))
    }

    pub fn orders(&self) -> Vec<CutOffOrder> {
        self.handler.orders.lock().clone()
    }

    pub fn forget(&self) {
        self.handler.orders.lock().clear();
        self.handler.notices.lock().clear();
    }

    /// How old the last full success is.
    pub fn staleness(&self) -> Duration {
        let success = self.watcher.status().last_success.unwrap();
        SystemTime::now().duration_since(success).unwrap_or_default()
    }

    /// Lost for good until a person says otherwise: one cut-off, no way back by itself, and with a
    /// key that is lost not by hand either.
    #[track_caller]
    pub fn back_by_revalidation_only(&self, what: &str, reason: Reason, mend: &dyn Fn(&S)) {
        let epoch = self.gate.epoch();
        assert!(self.gate.lease().is_err(), "{what}");
        assert!(self.handler.revalidate().is_err(), "{what}: a lost key revalidates");
        mend(&self.service);
        self.probes(4);
        let last = self.watcher.status().last_probe.unwrap();
        assert_eq!(last.result, "Ok", "{what}: {last:?}");
        assert_eq!(self.state(), (State::Inaccessible, Some(reason)), "{what}: by itself");
        assert_eq!((self.gate.epoch(), self.orders().len()), (epoch, 1), "{what}");
        self.handler.revalidate().unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(self.state(), (State::Available, None), "{what}");
        self.probes(2);
        assert_eq!(self.state(), (State::Available, None), "{what}: not for long");
    }
}
