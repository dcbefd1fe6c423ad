//! How it is watched: the time it takes at most, one probe at a time, no flapping, and the ways
//! back that need no person.

use std::time::{Duration, SystemTime};

use byokfs::key::gate::{Reason, State};
use byokfs::key::policy;
use byokfs::key::watcher::{self, Notice};
use rustix::process::{Pid, Signal, kill_process};

use crate::rig::{LIMIT, Rig, SOON, by_hand, impatient, quick};
use crate::vault::{Vault, Who, in_seconds};
use crate::wire::{Mood, Wired};

fn serving(settings: watcher::Settings) -> Rig<Vault> {
    Rig::serving(Vault::start(Who::Application), settings)
}

fn signal(vault: &Vault, signal: Signal) {
    kill_process(Pid::from_raw(vault.pid()).unwrap(), signal).unwrap();
}

#[test]
fn a_vault_that_is_killed_or_frozen_degrades_cuts_off_and_heals() {
    let mut rig = serving(impatient());
    for (epoch, what) in (2..).zip(["killed", "frozen"]) {
        if what == "killed" {
            rig.service.stop();
        } else {
            signal(&rig.service, Signal::STOP);
        }
        rig.wait_for(what, State::Degraded, Some(Reason::Unreachable));
        assert!(rig.gate.lease().is_ok());
        rig.wait_for(what, State::Inaccessible, Some(Reason::Unreachable));
        assert!(rig.gate.lease().is_err());
        if what == "killed" {
            rig.service.serve();
        } else {
            signal(&rig.service, Signal::CONT);
        }
        rig.wait_for(what, State::Available, None);
        assert_eq!(rig.gate.epoch(), epoch, "{what}");
    }
}

#[test]
fn a_probe_keeps_its_deadline_whatever_trickles_in() {
    let settings = watcher::Settings { deadline: Duration::from_secs(2), ..by_hand() };
    let rig = Rig::serving(Wired::to(Vault::start(Who::Host)), settings);
    let vault = &rig.service.vault;
    let by_wire = |mood| move |rig: &Rig<Wired>| rig.service.mood(mood);
    type Case = (&'static str, Box<dyn Fn(&Rig<Wired>)>);
    let cases: [Case; 6] = [
        ("silence", Box::new(by_wire(Mood::Silent))),
        // The handshake alone would take minutes.
        ("trickle", Box::new(by_wire(Mood::Trickling(Duration::from_millis(100))))),
        ("slow", Box::new(by_wire(Mood::Slow(Duration::from_millis(1500))))),
        ("hang", Box::new(|rig| rig.service.vault.fault(&["hang"]))),
        (
            "a body byte by byte",
            Box::new(|rig| {
                rig.service.vault.fault(&["trickle", "--milliseconds", "300"]);
            }),
        ),
        (
            "a token endpoint that hangs",
            Box::new(|rig| {
                rig.service.vault.fault(&["token-lifetime", "--seconds", "1"]);
                rig.probes(1);
                std::thread::sleep(Duration::from_millis(1100));
                rig.service.vault.fault(&["hang", "--at", "identity"]);
            }),
        ),
    ];
    for (what, spoil) in cases {
        spoil(&rig);
        let probe = rig.watcher.probe_now(LIMIT).last_probe.unwrap();
        // The deadline is 2 s; without one none of these would end in a minute.
        assert!(probe.took < SOON, "{what}: {:?}", probe.took);
        assert_eq!(
            (probe.result, probe.reason),
            ("Transient", Some(Reason::Unreachable)),
            "{what}"
        );
        rig.service.mood(Mood::Fast);
        vault.clear_faults();
        rig.probes(1);
        rig.wait_for(what, State::Available, None);
    }
    assert!(rig.orders().is_empty());
}

#[test]
fn one_probe_is_under_way_at_a_time_and_each_has_its_own_connection() {
    let settings = watcher::Settings { interval: Duration::from_millis(20), ..quick() };
    let rig = Rig::serving(Wired::to(Vault::start(Who::Host)), settings);
    rig.service.mood(Mood::Slow(Duration::from_millis(30)));
    let before = rig.service.connections();
    for _ in 0..4 {
        std::thread::scope(|scope| {
            (0..4).for_each(|_| drop(scope.spawn(|| rig.watcher.probe_now(LIMIT))));
        });
    }
    assert_eq!(rig.service.most_at_once(), 1);
    // None is kept: whoever is cut off from the vault is so at the next probe.
    assert!(rig.service.connections() >= before + 4);
    assert_eq!(rig.state(), (State::Available, None));
}

#[test]
fn one_slow_probe_and_one_slip_cut_nothing_off() {
    let mut settings = by_hand();
    settings.policy.confirm_after = Duration::from_secs(3600);
    settings.policy.confirm_within = Duration::from_secs(7200);
    settings.deadline = Duration::from_secs(2);
    let rig = serving(settings);
    for fault in [
        &["forbidden-by-rbac"][..],
        &["forbidden-by-firewall"],
        &["secret-expired"],
        &["other-key"],
        &["wrong-audience"],
        &["hang"],
        &["close"],
    ] {
        rig.service.fault(fault);
        rig.probes(1);
        assert_eq!(rig.state().0, State::Degraded, "{fault:?}");
        assert!(rig.gate.lease().is_ok(), "{fault:?}");
        rig.service.clear_faults();
        rig.probes(1);
        assert_eq!(rig.state(), (State::Available, None), "{fault:?}");
    }
    assert!(rig.orders().is_empty());
    assert_eq!(rig.gate.epoch(), 1);
}

/// Every other probe fails: it serves on. After a revocation every other probe succeeds: it stays
/// shut, and is not cut off again.
#[test]
fn a_flapping_service_does_not_make_the_volume_flap() {
    let rig = serving(by_hand());
    for _ in 0..6 {
        rig.service.fault(&["status", "--status", "500"]);
        rig.probes(1);
        rig.service.clear_faults();
        rig.probes(1);
    }
    assert_eq!((rig.state(), rig.gate.epoch()), ((State::Available, None), 1));
    rig.service.set("--enabled", "false");
    rig.probes(1);
    rig.wait_for("disabled", State::Inaccessible, Some(Reason::KeyDisabled));
    rig.service.set("--enabled", "true");
    for _ in 0..3 {
        rig.probes(1);
        rig.service.fault(&["status"]);
        rig.probes(1);
        rig.service.clear_faults();
    }
    assert_eq!(rig.state(), (State::Inaccessible, Some(Reason::KeyDisabled)));
    assert_eq!((rig.gate.epoch(), rig.orders().len()), (1, 1));
}

#[test]
fn throttling_is_obeyed() {
    let rig = serving(quick());
    rig.service.fault(&["throttled", "--retry-after", "3600"]);
    rig.wait_for("throttled", State::Degraded, Some(Reason::Unreachable));
    let calls = rig.service.calls();
    std::thread::sleep(Duration::from_secs(2));
    assert!(rig.service.calls() <= calls + 1, "it goes on asking");
    // But for two minutes at most: the volume has not that much time.
    let next = rig.watcher.status().next_probe_in.unwrap();
    assert!(next > Duration::from_secs(60) && next < Duration::from_secs(150), "{next:?}");
}

#[test]
fn expiry_while_serving_is_met_by_timer_without_a_probe() {
    let rig = serving(by_hand());
    // Far enough for the probe to find it valid still.
    rig.service.set("--expires", &in_seconds(12));
    let expires = rig.watcher.probe_now(LIMIT).expires.unwrap();
    assert_eq!(rig.state().0, State::Available);
    let calls = rig.service.calls();
    rig.wait_for("expiry", State::Inaccessible, Some(Reason::KeyExpired));
    let order = rig.orders()[0].clone();
    assert!(order.decided >= expires, "before its time");
    let late = order.decided.duration_since(expires).unwrap();
    assert!(late < SOON, "{late:?}");
    assert_eq!(rig.service.calls(), calls, "it asked");
    rig.back_by_revalidation_only("expiry", Reason::KeyExpired, &|vault| {
        vault.set("--expires", &in_seconds(90 * 24 * 3600));
    });
}

#[test]
fn a_start_that_lies_ahead_and_the_clock_of_the_service_count() {
    let rig = serving(by_hand());
    // By the vault's clock the key has expired, by ours in an hour only.
    rig.service.set("--expires", &in_seconds(3600));
    rig.service.fault(&["clock-shift", "--seconds", "7200"]);
    rig.probes(1);
    rig.wait_for("its clock", State::Inaccessible, Some(Reason::KeyExpired));
    rig.back_by_revalidation_only("its clock", Reason::KeyExpired, &Vault::clear_faults);
    rig.forget();
    // By ours it has, by the vault's it has two hours left.
    rig.service.fault(&["clock-shift", "--seconds", "-7200"]);
    rig.service.set("--expires", &in_seconds(-10));
    rig.probes(1);
    rig.wait_for("our clock", State::Inaccessible, Some(Reason::KeyExpired));
    rig.back_by_revalidation_only("our clock", Reason::KeyExpired, &|vault| {
        vault.clear_faults();
        vault.set("--expires", "none");
    });
}

#[test]
fn expiry_is_warned_of_at_thirty_seven_and_one_days() {
    let rig = serving(by_hand());
    let warned = |notice: &Notice| match notice {
        Notice::KeyExpiryWarning { days, expires } => {
            assert!(*expires > SystemTime::now());
            Some(*days)
        }
        _ => None,
    };
    let told = || -> Vec<u64> { rig.handler.notices.lock().iter().filter_map(warned).collect() };
    let after_probes = |days: i64| {
        rig.forget();
        rig.service.set("--expires", &in_seconds(days * 24 * 3600 - 60));
        rig.probes(2);
        told()
    };
    assert!(after_probes(40).is_empty());
    for (days, warning) in [(29, 30), (20, 30), (7, 7), (1, 1)] {
        after_probes(days);
        // Notices have a thread of their own.
        rig.wait_until("a warning", || !told().is_empty());
        rig.probes(1);
        assert_eq!(told(), [warning], "{days}");
    }
    assert_eq!(rig.state(), (State::Available, None));
}

#[test]
fn a_window_lets_a_revocation_heal_by_itself() {
    let quick = quick();
    let policy = policy::Settings { auto_heal_window: Duration::from_secs(600), ..quick.policy };
    let rig = serving(watcher::Settings { policy, ..quick });
    rig.service.set("--enabled", "false");
    rig.wait_for("disabled", State::Inaccessible, Some(Reason::KeyDisabled));
    rig.service.set("--enabled", "true");
    rig.wait_for("healed", State::Available, None);
    assert_eq!(rig.gate.epoch(), 2);
    // But not what an operator has cut off.
    rig.watcher.cut_off(Reason::Operator);
    rig.wait_for("by hand", State::Inaccessible, Some(Reason::Operator));
    rig.probes(4);
    assert_eq!(rig.state(), (State::Inaccessible, Some(Reason::Operator)));
}

#[test]
fn a_window_that_is_over_heals_nothing() {
    let quick = by_hand();
    let policy = policy::Settings { auto_heal_window: Duration::from_millis(1), ..quick.policy };
    let rig = serving(watcher::Settings { policy, ..quick });
    rig.service.set("--enabled", "false");
    rig.probes(1);
    rig.wait_for("disabled", State::Inaccessible, Some(Reason::KeyDisabled));
    rig.back_by_revalidation_only("disabled", Reason::KeyDisabled, &|vault| {
        vault.set("--enabled", "true");
    });
}

#[test]
fn a_denial_is_confirmed_by_time_where_nothing_more_is_heard() {
    let mut settings = quick();
    settings.policy.confirm_within = Duration::from_secs(5);
    settings.policy.confirm_after = Duration::from_secs(3);
    let rig = serving(settings);
    rig.service.fault(&["forbidden-by-rbac"]);
    rig.wait_for("denied", State::Degraded, Some(Reason::PermissionRevoked));
    rig.service.fault(&["close"]);
    rig.wait_for("confirmed", State::Inaccessible, Some(Reason::PermissionRevoked));
}

/// What an officer has changed holds when it has got about, and not before.
#[test]
fn a_change_that_has_not_got_about_yet_cuts_nothing_off() {
    let rig = serving(by_hand());
    rig.service.fault(&["propagation-delay", "--seconds", "100000"]);
    rig.service.revoke("unwrapKey");
    rig.probes(4);
    assert_eq!(rig.state(), (State::Available, None));
    rig.service.clear_faults();
    rig.probes(1);
    rig.wait_for("got about", State::Inaccessible, Some(Reason::PermissionRevoked));
}

/// From then on the other vault's word counts, and this one's no more.
#[test]
fn a_volume_moves_to_another_vault_while_it_serves() {
    let rig = serving(quick());
    let other = Vault::start(Who::Host);
    rig.move_to(&other);
    rig.service.run(&["key", "delete", "--name", "kek"]);
    rig.probes(1);
    let asked = rig.service.calls();
    rig.probes(8);
    assert_eq!((rig.state(), rig.gate.epoch()), ((State::Available, None), 1));
    assert_eq!(rig.service.calls(), asked, "the vault that was left is still asked");
    assert_eq!(rig.watcher.status().kid, other.key);
    other.set("--enabled", "false");
    rig.wait_for("disabled", State::Inaccessible, Some(Reason::KeyDisabled));
}
