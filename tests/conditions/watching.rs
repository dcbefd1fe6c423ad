//! How it is watched: the time it takes at most, one probe at a time, no flapping, and the ways
//! back that need no person.

use std::time::{Duration, Instant};

use byokfs::key::gate::{Reason, State};
use byokfs::key::policy;
use byokfs::key::watcher::{self, Notice};
use serde_json::json;

use crate::fake::{Fault, refusal, unix_now};
use crate::rig::{LIMIT, Rig, quick};

fn impatient() -> watcher::Settings {
    let quick = quick();
    let policy = policy::Settings { max_staleness: Duration::from_secs(5), ..quick.policy };
    watcher::Settings { policy, ..quick }
}

#[test]
fn silence_cuts_off_after_its_time_and_heals_by_itself() {
    for fault in [Fault::Silence, Fault::Untrusted, Fault::Vault(503, "{}".into())] {
        let what = format!("{fault:?}");
        let rig = Rig::serving(impatient());
        rig.fake.fault(fault);
        let start = Instant::now();
        rig.wait_for(&what, State::Inaccessible, Some(Reason::Unreachable));
        // Not as a denial is, and not after what it may take.
        assert!(start.elapsed() > Duration::from_secs(2), "{what}: {:?}", start.elapsed());
        assert_eq!(rig.handler.orders.lock().len(), 1, "{what}");
        rig.mend();
        rig.wait_for(&what, State::Available, None);
        assert_eq!(rig.gate.epoch(), 2, "{what}");
    }
}

#[test]
fn a_vault_whose_name_is_gone_is_unreachable_in_the_end() {
    let rig = Rig::serving(impatient());
    rig.vault_is_gone(true);
    rig.wait_for("gone", State::Inaccessible, Some(Reason::Unreachable));
    rig.mend();
    rig.wait_for("back", State::Available, None);
}

#[test]
fn a_probe_keeps_its_deadline_though_bytes_trickle_in() {
    let rig = Rig::serving(quick());
    for fault in [Fault::Trickle, Fault::Silence] {
        let what = format!("{fault:?}");
        rig.fake.fault(fault);
        let start = Instant::now();
        let probe = rig.watcher.probe_now(LIMIT).last_probe.unwrap();
        // The deadline is 2 s; one probe may have been under way.
        assert!(start.elapsed() < Duration::from_secs(10), "{what}: {:?}", start.elapsed());
        assert!(probe.took < Duration::from_secs(5), "{what}: {:?}", probe.took);
        assert_eq!(
            (probe.result, probe.reason),
            ("Transient", Some(Reason::Unreachable)),
            "{what}"
        );
        rig.mend();
        rig.wait_for(&what, State::Available, None);
    }
}

#[test]
fn one_probe_is_under_way_at_a_time() {
    let rig = Rig::serving(watcher::Settings { interval: Duration::from_millis(20), ..quick() });
    rig.fake.fault(Fault::Slow(Duration::from_millis(150)));
    for _ in 0..4 {
        std::thread::scope(|scope| {
            (0..4).for_each(|_| drop(scope.spawn(|| rig.watcher.probe_now(LIMIT))));
        });
    }
    assert_eq!(rig.fake.most_at_once(), 1);
    assert_eq!(rig.state(), (State::Available, None));
}

/// Every other probe fails: it serves on. After a revocation every other probe succeeds: it stays
/// shut, and is not cut off again.
#[test]
fn a_flapping_service_does_not_make_the_volume_flap() {
    let rig = Rig::serving(watcher::Settings { interval: Duration::from_secs(3600), ..quick() });
    for _ in 0..12 {
        rig.fake.fault(Fault::Vault(500, refusal("InternalServerError", "", "no")));
        rig.probes(1);
        rig.mend();
        rig.probes(1);
    }
    assert_eq!((rig.state(), rig.gate.epoch()), ((State::Available, None), 1));
    rig.fake.fault(Fault::Attributes(json!({"enabled": false})));
    rig.probes(1);
    rig.wait_for("disabled", State::Inaccessible, Some(Reason::KeyDisabled));
    for _ in 0..6 {
        rig.mend();
        rig.probes(1);
        rig.fake.fault(Fault::Vault(503, "{}".into()));
        rig.probes(1);
    }
    assert_eq!(rig.state(), (State::Inaccessible, Some(Reason::KeyDisabled)));
    assert_eq!((rig.gate.epoch(), rig.handler.orders.lock().len()), (1, 1));
}

#[test]
fn throttling_is_obeyed() {
    let rig = Rig::serving(quick());
    let body = refusal("Throttled", "", "slow down");
    rig.fake.fault(Fault::Header(429, "Retry-After: 3600", body));
    rig.wait_for("throttled", State::Degraded, Some(Reason::Unreachable));
    let requests = rig.fake.requests();
    std::thread::sleep(Duration::from_secs(1));
    assert!(rig.fake.requests() <= requests + 1, "it goes on asking");
    // But for two minutes at most: the volume has not that much time.
    let next = rig.watcher.status().next_probe_in.unwrap();
    assert!(next > Duration::from_secs(60) && next < Duration::from_secs(150), "{next:?}");
}

#[test]
fn expiry_is_met_by_timer_and_warned_of() {
    let rig = Rig::serving(watcher::Settings { interval: Duration::from_secs(3600), ..quick() });
    const DAY: i64 = 24 * 60 * 60;
    let warnings = |days| {
        rig.fake.fault(Fault::Attributes(json!({"exp": unix_now() + days * DAY - 60})));
        rig.probes(2);
        let told = |notice: &Notice| match notice {
            Notice::KeyExpiryWarning { days, .. } => Some(*days),
            _ => None,
        };
        // Notices have a thread of their own.
        std::thread::sleep(Duration::from_millis(200));
        let told: Vec<u64> = rig.handler.notices.lock().iter().filter_map(told).collect();
        rig.forget();
        told
    };
    assert!(warnings(40).is_empty());
    assert_eq!([warnings(29), warnings(20), warnings(7), warnings(1)], [[30], [30], [7], [1]]);
    rig.fake.fault(Fault::Attributes(json!({"exp": unix_now() + 3})));
    rig.probes(1);
    assert_eq!(rig.state().0, State::Available);
    let requests = rig.fake.requests();
    rig.wait_for("expiry", State::Inaccessible, Some(Reason::KeyExpired));
    assert_eq!(rig.fake.requests(), requests, "it asked");
    // Extended, and revalidated.
    rig.fake.fault(Fault::Attributes(json!({"exp": unix_now() + 90 * DAY})));
    rig.handler.revalidate().unwrap();
    assert_eq!(rig.state(), (State::Available, None));
}

#[test]
fn a_window_lets_a_revocation_heal_by_itself() {
    let quick = quick();
    let policy = policy::Settings { auto_heal_window: Duration::from_secs(600), ..quick.policy };
    let rig = Rig::serving(watcher::Settings { policy, ..quick });
    rig.fake.fault(Fault::Attributes(json!({"enabled": false})));
    rig.wait_for("disabled", State::Inaccessible, Some(Reason::KeyDisabled));
    rig.mend();
    rig.wait_for("healed", State::Available, None);
    assert_eq!(rig.gate.epoch(), 2);
    // But not what an operator has cut off.
    rig.watcher.cut_off(Reason::Operator);
    rig.wait_for("by hand", State::Inaccessible, Some(Reason::Operator));
    rig.probes(4);
    assert_eq!(rig.state(), (State::Inaccessible, Some(Reason::Operator)));
}

#[test]
fn a_denial_is_confirmed_by_time_where_nothing_more_is_heard() {
    let mut settings = quick();
    settings.policy.confirm_within = Duration::from_secs(3);
    settings.policy.confirm_after = Duration::from_secs(1);
    let rig = Rig::serving(settings);
    let denial = refusal("Forbidden", "ForbiddenByRbac", "no");
    rig.fake.fault(Fault::Vault(403, denial));
    rig.wait_for("denied", State::Degraded, Some(Reason::PermissionRevoked));
    rig.fake.fault(Fault::HangUp);
    rig.wait_for("confirmed", State::Inaccessible, Some(Reason::PermissionRevoked));
}

/// From then on the other vault's word counts, and this one's no more.
#[test]
fn a_volume_moves_to_another_vault_while_it_serves() {
    let rig = Rig::serving(quick());
    rig.move_to_other();
    rig.fake.fault(Fault::Deleted { recoverable: false });
    rig.probes(1);
    let asked = rig.fake.vault_requests();
    rig.probes(8);
    assert_eq!((rig.state(), rig.gate.epoch()), ((State::Available, None), 1));
    assert_eq!(rig.fake.vault_requests(), asked, "the vault that was left is still asked");
    assert_eq!(rig.watcher.status().kid, rig.other.key());
    rig.other.fault(Fault::Attributes(json!({"enabled": false})));
    rig.wait_for("disabled", State::Inaccessible, Some(Reason::KeyDisabled));
}
