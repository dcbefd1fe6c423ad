use std::sync::Weak;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::super::custody::{Enrolment, enrol, revalidate};
use super::super::gate::State;
use super::super::provider::{Algorithm, Class};
use super::super::rewrap::{NewKey, rewrap};
use super::super::testing::{FakeKey, FakeService};
use super::super::{requirement, wall_clock};
use super::*;

/// For what must happen: a test fails by it only if it never does.
const LIMIT: Duration = Duration::from_secs(60);

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Far faster than the real thing in what is awaited, and as patient in what must not happen: a
/// machine may stand still for a while.
fn quick() -> Settings {
    Settings {
        interval: millis(30),
        deadline: Duration::from_secs(30),
        shut_within: Duration::from_secs(8),
        follow_again: millis(200),
        policy: policy::Settings {
            confirm_after: millis(20),
            confirm_within: Duration::from_secs(60),
            max_staleness: Duration::from_secs(300),
            cut_off_lead: millis(1000),
            ..policy::Settings::default()
        },
    }
}

/// An unreachable service is borne for a moment only.
fn impatient() -> Settings {
    let policy = policy::Settings { max_staleness: millis(3000), ..quick().policy };
    Settings { deadline: millis(500), policy, ..quick() }
}

/// Nobody probes but the test, and one denial alone is not confirmed meanwhile.
fn by_hand() -> Settings {
    let policy = policy::Settings {
        confirm_after: Duration::from_secs(600),
        confirm_within: Duration::from_secs(1200),
        ..quick().policy
    };
    Settings { interval: Duration::from_secs(3600), policy, ..quick() }
}

/// What the daemon does, without a server or a mount.
struct Recorder {
    gate: Arc<Gate>,
    service: FakeService,
    enrolment: Enrolment,
    watcher: Mutex<Weak<Watcher>>,
    orders: Mutex<Vec<(Reason, Option<String>)>>,
    notices: Mutex<Vec<Notice>>,
    newer: Mutex<Vec<String>>,
    /// The cut-off hangs, as behind a fence that does not end.
    hangs: AtomicBool,
    panics: AtomicBool,
}

impl Recorder {
    fn admit(&self) -> Result<()> {
        let envelope = self.enrolment.envelope([0; 16]);
        let pin = &self.enrolment.fingerprint;
        let settings = requirement::Settings::default();
        let good = revalidate(&self.service, &envelope, pin, &settings, LIMIT)?;
        match self.watcher.lock().upgrade() {
            Some(watcher) => watcher.admit(good),
            None => Ok(()),
        }
    }
}

impl Handler for Recorder {
    fn cut_off(&self, order: &CutOffOrder) {
        self.orders.lock().push((order.reason, order.detail.clone()));
        assert!(!self.panics.load(Ordering::SeqCst), "as the test wishes");
        while self.hangs.load(Ordering::SeqCst) {
            thread::sleep(millis(5));
        }
        self.gate.shut(order.reason);
        self.gate.drain(LIMIT);
        self.gate.wipe();
    }

    fn heal(&self) -> Result<()> {
        self.admit()
    }

    fn notice(&self, notice: &Notice) {
        self.notices.lock().push(notice.clone());
    }

    fn newer_version(&self, kid: &str) {
        self.newer.lock().push(kid.to_owned());
    }
}

struct Rig {
    service: FakeService,
    gate: Arc<Gate>,
    recorder: Arc<Recorder>,
    watcher: Arc<Watcher>,
}

fn started(settings: Settings) -> Rig {
    let service = FakeService::new(FakeKey::good());
    let requirements = requirement::Settings::default();
    let algorithm = Algorithm::RsaOaep256;
    let enrolment = enrol(&service, FakeService::KID, algorithm, &requirements, LIMIT).unwrap();
    let envelope = enrolment.envelope([0; 16]);
    let gate = Gate::new();
    let recorder = Arc::new(Recorder {
        gate: Arc::clone(&gate),
        service: service.clone(),
        enrolment,
        watcher: Mutex::new(Weak::new()),
        orders: Mutex::default(),
        notices: Mutex::default(),
        newer: Mutex::default(),
        hangs: AtomicBool::new(false),
        panics: AtomicBool::new(false),
    });
    let handler = Arc::clone(&recorder) as Arc<dyn Handler>;
    let provider = Arc::new(service.clone());
    let watcher = Watcher::start(settings, provider, envelope, Arc::clone(&gate), handler).unwrap();
    *recorder.watcher.lock() = Arc::downgrade(&watcher);
    Rig { service, gate, recorder, watcher }
}

fn serving() -> Rig {
    serving_with(quick())
}

fn serving_with(settings: Settings) -> Rig {
    let rig = started(settings);
    rig.recorder.admit().unwrap();
    rig
}

impl Rig {
    fn state(&self) -> (State, Option<Reason>) {
        let status = self.gate.status();
        (status.state, status.reason)
    }

    fn wait_for(&self, state: State, reason: Option<Reason>) {
        until(&format!("{state} {reason:?}"), || self.state() == (state, reason));
    }

    /// That it was Degraded, however shortly.
    fn wait_for_degraded(&self, wanted: Reason) {
        until(&format!("Degraded {wanted}"), || {
            let notices = self.recorder.notices.lock();
            notices.iter().any(
                |notice| matches!(notice, Notice::Degraded { reason, .. } if *reason == wanted),
            )
        });
    }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let limit = BootTime::now() + LIMIT;
    while !condition() {
        assert!(!limit.remaining().is_zero(), "never came: {what}");
        thread::sleep(millis(2));
    }
}

#[test]
fn nothing_is_probed_before_the_volume_is_opened() {
    let rig = started(quick());
    let before = rig.service.calls();
    thread::sleep(millis(100));
    assert_eq!(rig.service.calls(), before);
    assert_eq!(rig.state(), (State::Inaccessible, Some(Reason::NotOpened)));
}

#[test]
fn probes_keep_the_gate_open() {
    let rig = serving();
    let first = rig.gate.valid_until();
    until("extensions", || rig.gate.valid_until() > first + millis(2000));
    assert_eq!(rig.state(), (State::Available, None));
    let status = rig.watcher.status();
    assert_eq!(status.kid, FakeService::KID);
    assert_eq!(status.failures, 0);
    assert_eq!(status.last_probe.unwrap().result, "Ok");
    assert!(status.last_success.is_some() && status.next_probe_in.is_some());
    assert!(rig.recorder.orders.lock().is_empty());
}

#[test]
fn a_disabled_key_cuts_off_at_the_next_probe_and_stays_so() {
    let rig = serving();
    rig.service.change(|key| key.info.enabled = false);
    rig.wait_for(State::Inaccessible, Some(Reason::KeyDisabled));
    assert!(rig.gate.lease().is_err());
    rig.service.change(|key| key.info.enabled = true);
    thread::sleep(millis(150));
    assert_eq!(rig.state(), (State::Inaccessible, Some(Reason::KeyDisabled)));
    assert_eq!(rig.recorder.orders.lock().len(), 1);
    until("an opening", || rig.recorder.admit().is_ok());
    assert_eq!(rig.state(), (State::Available, None));
    assert_eq!(rig.gate.epoch(), 2);
    let first = rig.gate.valid_until();
    until("watching again", || rig.gate.valid_until() > first);
}

#[test]
fn a_permission_that_only_complete_probes_miss_is_confirmed() {
    let rig = serving();
    rig.service.change(|key| key.deny("wrapKey"));
    rig.wait_for(State::Inaccessible, Some(Reason::PermissionRevoked));
    rig.wait_for_degraded(Reason::PermissionRevoked);
    let detail = rig.recorder.orders.lock()[0].1.clone().unwrap();
    assert!(detail.contains("wrapKey"), "{detail}");
}

/// Or whoever lets only some calls through could hide for good that a permission is gone.
#[test]
fn a_permission_that_cannot_be_tried_is_not_taken_for_granted() {
    for permission in ["list", "wrapKey"] {
        let rig = serving();
        let lost = Class::Transient(Reason::Unreachable);
        rig.service.change(|key| key.failing = Some((permission, lost)));
        rig.wait_for(State::Degraded, Some(Reason::Unreachable));
        let valid_until = rig.gate.valid_until();
        for _ in 0..5 {
            rig.watcher.probe_now(LIMIT);
        }
        assert_eq!(rig.state(), (State::Degraded, Some(Reason::Unreachable)), "{permission}");
        assert_eq!(rig.gate.valid_until(), valid_until, "{permission}");
        rig.service.change(|key| key.failing = None);
        rig.wait_for(State::Available, None);
    }
}

#[test]
fn a_slip_is_forgiven() {
    let rig = serving_with(by_hand());
    rig.service.change(|key| key.deny("unwrapKey"));
    rig.watcher.probe_now(LIMIT);
    assert_eq!(rig.state(), (State::Degraded, Some(Reason::PermissionRevoked)));
    assert!(rig.gate.lease().is_ok());
    let next = rig.watcher.status().next_probe_in.unwrap();
    assert!(next > Duration::from_secs(300) && next <= Duration::from_secs(600), "{next:?}");
    rig.service.change(|key| key.denied.clear());
    rig.watcher.probe_now(LIMIT);
    assert_eq!(rig.state(), (State::Available, None));
    assert!(rig.recorder.orders.lock().is_empty());
    until("notices", || rig.recorder.notices.lock().last() == Some(&Notice::Restored));
}

#[test]
fn unreachable_degrades_then_cuts_off_then_heals() {
    let lost = Class::Transient(Reason::TlsUntrusted);
    let rig = serving();
    rig.service.change(|key| key.fail_all(lost));
    rig.wait_for(State::Degraded, Some(Reason::TlsUntrusted));
    assert!(rig.gate.lease().is_ok());

    let rig = serving_with(impatient());
    rig.service.change(|key| key.fail_all(lost));
    rig.wait_for(State::Inaccessible, Some(Reason::Unreachable));
    rig.wait_for_degraded(Reason::TlsUntrusted);
    let alerted =
        |notice: &Notice| matches!(notice, Notice::Alert { reason: Reason::TlsUntrusted, .. });
    until("an alert", || rig.recorder.notices.lock().iter().any(alerted));
    rig.service.change(|key| key.failure = None);
    rig.wait_for(State::Available, None);
    assert!(rig.gate.epoch() >= 2);
}

#[test]
fn expiry_cuts_off_without_a_probe() {
    let rig = started(Settings { interval: Duration::from_secs(3600), ..quick() });
    rig.service.change(|key| key.info.expires = Some(wall_clock() + 6));
    rig.recorder.admit().unwrap();
    let calls = rig.service.calls();
    rig.wait_for(State::Inaccessible, Some(Reason::KeyExpired));
    assert_eq!(rig.service.calls(), calls);
    until("a warning", || {
        let warned = |notice: &Notice| matches!(notice, Notice::KeyExpiryWarning { days: 1, .. });
        rig.recorder.notices.lock().iter().any(warned)
    });
}

#[test]
fn a_fence_that_hangs_does_not_hold_the_gate_open() {
    let rig = serving();
    rig.recorder.hangs.store(true, Ordering::SeqCst);
    rig.service.change(|key| key.info.enabled = false);
    until("the order", || !rig.recorder.orders.lock().is_empty());
    assert!(rig.gate.lease().is_ok(), "the fence has its time");
    rig.wait_for(State::Inaccessible, Some(Reason::KeyDisabled));
    rig.service.change(|key| key.info.enabled = true);
    assert_eq!(rig.recorder.admit().unwrap_err().kind, Kind::Busy, "it would shut the new epoch");
    rig.recorder.hangs.store(false, Ordering::SeqCst);
    until("its end", || rig.recorder.admit().is_ok());
    thread::sleep(millis(100));
    assert_eq!(rig.state(), (State::Available, None));
}

#[test]
fn a_cut_off_that_panics_still_shuts_the_gate() {
    let rig = serving();
    rig.recorder.panics.store(true, Ordering::SeqCst);
    rig.service.change(|key| key.info.enabled = false);
    rig.wait_for(State::Inaccessible, Some(Reason::KeyDisabled));
    rig.service.change(|key| key.info.enabled = true);
    rig.recorder.panics.store(false, Ordering::SeqCst);
    until("another opening", || rig.recorder.admit().is_ok());
    rig.service.change(|key| key.info.enabled = false);
    until("another order", || rig.recorder.orders.lock().len() == 2);
}

#[test]
fn a_probe_that_hangs_counts_as_unreachable() {
    let rig = serving_with(impatient());
    rig.service.change(|key| key.delay = Duration::from_secs(4));
    // The grace for a hanging probe is longer than this policy's patience: the gate is faster.
    rig.wait_for(State::Inaccessible, Some(Reason::Unreachable));
}

#[test]
fn stopping_leaves_the_gate_to_its_time() {
    let policy = policy::Settings { max_staleness: Duration::from_secs(9), ..quick().policy };
    let rig = serving_with(Settings { policy, ..quick() });
    rig.watcher.stop();
    thread::sleep(millis(300));
    let calls = rig.service.calls();
    assert_eq!(rig.state().0, State::Available);
    rig.wait_for(State::Inaccessible, Some(Reason::Unreachable));
    assert_eq!(rig.service.calls(), calls);
}

#[test]
fn a_probe_that_comes_back_after_the_end_means_nothing() {
    let rig = serving_with(Settings { interval: Duration::from_secs(3600), ..quick() });
    rig.watcher.probe_now(LIMIT);
    let seen = |rig: &Rig| rig.watcher.status().last_probe.map(|probe| probe.at);
    let before = seen(&rig);
    rig.service.change(|key| key.delay = millis(300));
    let calls = rig.service.calls();
    thread::scope(|scope| {
        scope.spawn(|| rig.watcher.probe_now(LIMIT));
        until("a probe under way", || rig.service.calls() > calls);
        rig.watcher.stop();
        rig.gate.shut(Reason::Operator);
    });
    until("the end of its threads", || Arc::strong_count(&rig.watcher.shared) == 1);
    assert_eq!(seen(&rig), before);
    assert_eq!(rig.state(), (State::Inaccessible, Some(Reason::Operator)));
}

#[test]
fn probe_now_tells_what_is_so_now() {
    let rig = started(Settings { interval: Duration::from_secs(3600), ..quick() });
    rig.recorder.admit().unwrap();
    let status = rig.watcher.probe_now(LIMIT);
    assert_eq!(status.last_probe.unwrap().result, "Ok");
    rig.service.change(|key| key.info.enabled = false);
    let status = rig.watcher.probe_now(LIMIT);
    assert_eq!(status.last_probe.unwrap().reason, Some(Reason::KeyDisabled));
    rig.wait_for(State::Inaccessible, Some(Reason::KeyDisabled));
}

#[test]
fn an_operator_can_cut_off_and_only_he_ends_it() {
    let rig = serving();
    rig.watcher.cut_off(Reason::Operator);
    rig.wait_for(State::Inaccessible, Some(Reason::Operator));
    thread::sleep(millis(150));
    assert_eq!(rig.state(), (State::Inaccessible, Some(Reason::Operator)));
}

#[test]
fn a_denial_during_a_revalidation_wins() {
    let rig = serving();
    let envelope = rig.recorder.enrolment.envelope([0; 16]);
    let pin = rig.recorder.enrolment.fingerprint;
    let settings = requirement::Settings::default();
    let good = revalidate(&rig.service, &envelope, &pin, &settings, LIMIT).unwrap();
    rig.service.change(|key| key.info.enabled = false);
    rig.wait_for(State::Inaccessible, Some(Reason::KeyDisabled));
    assert_eq!(rig.watcher.admit(good).unwrap_err().kind, Kind::Inaccessible);
    assert!(rig.gate.lease().is_err());
}

/// While the volume was to heal from an outage, the key was disabled and enabled again.
#[test]
fn what_waits_for_a_person_does_not_heal_by_an_earlier_order() {
    let rig = serving_with(by_hand());
    let good = || {
        let envelope = rig.recorder.enrolment.envelope([0; 16]);
        let pin = rig.recorder.enrolment.fingerprint;
        let settings = requirement::Settings::default();
        revalidate(&rig.service, &envelope, &pin, &settings, LIMIT).unwrap()
    };
    rig.service.change(|key| key.info.enabled = false);
    rig.watcher.probe_now(LIMIT);
    rig.wait_for(State::Inaccessible, Some(Reason::KeyDisabled));
    rig.service.change(|key| key.info.enabled = true);
    assert_eq!(rig.watcher.admit_by_itself(good()).unwrap_err().kind, Kind::Inaccessible);
    assert!(rig.gate.lease().is_err());
    rig.watcher.admit(good()).unwrap();
    assert!(rig.gate.lease().is_ok());
}

#[test]
fn throttling_is_honoured() {
    let rig = serving();
    rig.service.change(|key| {
        key.fail_all(Class::Transient(Reason::Unreachable));
        key.retry_after = Some(Duration::from_secs(60));
    });
    rig.wait_for(State::Degraded, Some(Reason::Unreachable));
    let wait = rig.watcher.status().next_probe_in.unwrap();
    assert!(wait > Duration::from_secs(40), "{wait:?}");
}

/// Retry-After is followed for two minutes at most, and probes may be further apart than that.
#[test]
fn throttling_of_rare_probes_is_no_end_of_them() {
    let rig = started(Settings { interval: Duration::from_secs(180), ..quick() });
    rig.recorder.admit().unwrap();
    rig.service.change(|key| {
        key.fail_all(Class::Transient(Reason::Unreachable));
        key.retry_after = Some(Duration::from_secs(1));
    });
    assert_eq!(rig.watcher.probe_now(LIMIT).failures, 1);
    rig.wait_for(State::Degraded, Some(Reason::Unreachable));
    rig.service.change(|key| key.failure = None);
    let status = rig.watcher.probe_now(LIMIT);
    assert_eq!(status.last_probe.unwrap().result, "Ok");
    rig.wait_for(State::Available, None);
}

/// The permission is taken away, and while the server is fenced the key is disabled.
#[test]
fn a_reason_that_changes_during_a_cut_off_is_the_one_that_stays() {
    let rig = serving();
    rig.recorder.hangs.store(true, Ordering::SeqCst);
    rig.service.change(|key| key.deny("get"));
    until("the cut-off", || !rig.recorder.orders.lock().is_empty());
    rig.service.change(|key| {
        key.denied.clear();
        key.info.enabled = false;
    });
    let changed = |notice: &Notice| {
        matches!(notice, Notice::ReasonChanged { reason: Reason::KeyDisabled, .. })
    };
    until("the other reason", || rig.recorder.notices.lock().iter().any(changed));
    assert!(rig.gate.lease().is_ok(), "the server's shutdown writes");
    rig.recorder.hangs.store(false, Ordering::SeqCst);
    until("the end of the cut-off", || rig.watcher.shared.inner.lock().cutting == 0);
    assert_eq!(rig.state(), (State::Inaccessible, Some(Reason::KeyDisabled)));
}

/// The envelope of the same volume key, as another key of the same service would wrap it.
fn rewrapped(rig: &Rig) -> Rewrapped {
    let envelope = rig.recorder.enrolment.envelope([0; 16]);
    let pin = &rig.recorder.enrolment.fingerprint;
    let (service, settings) = (&rig.service, requirement::Settings::default());
    let (bare, _) = FakeService::KID.rsplit_once('/').unwrap();
    let new = NewKey {
        provider: service,
        url: bare,
        algorithm: None,
        follow: None,
        forget_earlier: false,
    };
    rewrap(service, &envelope, pin, &new, &settings, LIMIT).unwrap().unwrap()
}

#[test]
fn what_becomes_of_the_old_key_after_a_rotation_does_not_matter() {
    let rig = started(Settings { interval: Duration::from_secs(3600), ..quick() });
    rig.recorder.admit().unwrap();
    let rewrapped = rewrapped(&rig);
    // A probe of the old key is under way, and will find it disabled.
    rig.service.change(|key| {
        key.delay = Duration::from_secs(5);
        key.info.enabled = false;
    });
    let calls = rig.service.calls();
    rig.watcher.shared.inner.lock().due = Some(BootTime::ZERO);
    rig.watcher.shared.changed.notify_all();
    until("a probe", || rig.service.calls() > calls);
    rig.watcher.rotated(&rewrapped, Arc::new(rig.service.clone()));
    rig.service.change(|key| {
        key.delay = Duration::ZERO;
        key.info.enabled = true;
        key.info.expires = Some(wall_clock() + 1000);
    });
    until("a probe of the new key", || rig.watcher.status().expires.is_some());
    assert!(rig.recorder.orders.lock().is_empty());
    assert_eq!(rig.state(), (State::Available, None));
    assert!(rig.watcher.shared.watched.lock().envelope.follow_versions);
}

#[test]
fn a_rotation_clears_a_denial_of_the_old_key() {
    let rig = serving_with(by_hand());
    let rewrapped = rewrapped(&rig);
    rig.service.change(|key| key.deny("get"));
    rig.watcher.probe_now(LIMIT);
    assert_eq!(rig.state(), (State::Degraded, Some(Reason::PermissionRevoked)));
    rig.service.change(|key| key.denied.clear());
    rig.watcher.rotated(&rewrapped, Arc::new(rig.service.clone()));
    assert_eq!(rig.state(), (State::Available, None));
}

#[test]
fn a_rotation_of_a_volume_that_is_cut_off_does_not_open_it() {
    let rig = started(Settings {
        policy: policy::Settings { auto_heal_window: Duration::from_secs(60), ..quick().policy },
        ..quick()
    });
    rig.recorder.admit().unwrap();
    let rewrapped = rewrapped(&rig);
    rig.watcher.cut_off(Reason::Operator);
    rig.wait_for(State::Inaccessible, Some(Reason::Operator));
    rig.watcher.rotated(&rewrapped, Arc::new(rig.service.clone()));
    thread::sleep(millis(150));
    assert_eq!(rig.state(), (State::Inaccessible, Some(Reason::Operator)));
}

#[test]
fn a_newer_version_is_told_of_again_until_it_is_followed() {
    let rig = started(quick());
    rig.service.change(|key| key.newer_version = true);
    rig.recorder.admit().unwrap();
    thread::sleep(millis(300));
    assert!(rig.recorder.newer.lock().is_empty(), "the envelope names a version");
    rig.watcher.rotated(&rewrapped(&rig), Arc::new(rig.service.clone()));
    until("it to be told twice", || rig.recorder.newer.lock().len() >= 2);
    assert_eq!(rig.recorder.newer.lock()[0], "https://kv.example/keys/kek/02");
    assert_eq!(rig.state(), (State::Available, None));
}

#[test]
fn jitter_stays_within_a_fifth() {
    for _ in 0..200 {
        let time = jittered(Duration::from_secs(30));
        assert!(time >= Duration::from_secs(24) && time <= Duration::from_secs(36));
    }
}
