//! One row after the other, against the embedded key vault: what is lost in earnest where it can
//! be, and by a drill where only Azure's own machinery could do it.

use std::time::Duration;

use byokfs::key::gate::{Reason, State};

use crate::rig::{LEAD, Rig, SOON, impatient, quick};
use crate::vault::{ALL, APP, HOST, Vault, Who, in_seconds};

/// How it is lost, and its way back.
enum Loss {
    Fault(&'static [&'static str]),
    Real(fn(&Vault), fn(&Vault)),
}

use Loss::{Fault, Real};

impl Loss {
    fn happen(&self, vault: &Vault) {
        match self {
            Fault(args) => vault.fault(args),
            Real(lose, _) => lose(vault),
        }
    }

    fn mend(&self, vault: &Vault) {
        match self {
            Fault(_) => vault.clear_faults(),
            Real(_, mend) => mend(vault),
        }
    }
}

type Row = (&'static str, Reason, Loss);

/// The service's final word: cut off by the first probe that hears it.
fn at_once(rig: &Rig<Vault>, (what, reason, loss): &Row) {
    rig.forget();
    loss.happen(&rig.service);
    let took = rig.wait_for(what, State::Inaccessible, Some(*reason));
    assert!(took < SOON, "{what}: {took:?}");
    assert!(rig.degradations().is_empty(), "{what}: it waited for a confirmation");
    println!("{what}: {reason}, at once, after {took:.1?}");
    rig.back_by_revalidation_only(what, *reason, &|vault| loss.mend(vault));
}

/// May be a slip: serves on until a second probe is refused too.
fn confirmed(rig: &Rig<Vault>, (what, reason, loss): &Row) {
    rig.forget();
    loss.happen(&rig.service);
    let took = rig.wait_for(what, State::Inaccessible, Some(*reason));
    assert!(took < SOON, "{what}: {took:?}");
    rig.wait_for_degraded(what);
    assert_eq!(rig.degradations(), [*reason], "{what}: not confirmed");
    let order = rig.orders()[0].clone();
    let detail = order.detail.unwrap_or_default();
    for secret in ["appid", "oid=", "eyJ", "Caller:"] {
        assert!(!detail.contains(secret), "{what}: {detail}");
    }
    println!("{what}: {reason}, confirmed, after {took:.1?}");
    rig.back_by_revalidation_only(what, *reason, &|vault| loss.mend(vault));
}

/// Says nothing about the key: serves on, however many probes fail, and Available again by itself.
fn serves_on(rig: &Rig<Vault>, (what, reason, loss): &Row) {
    rig.forget();
    loss.happen(&rig.service);
    rig.wait_for(what, State::Degraded, Some(*reason));
    rig.probes(5);
    assert_eq!(rig.state(), (State::Degraded, Some(*reason)), "{what}");
    assert!(rig.gate.lease().is_ok(), "{what}");
    rig.wait_for_degraded(what);
    assert_eq!(rig.degradations(), [*reason], "{what}: told more than once");
    let alerts = matches!(reason, Reason::ProxyDenied | Reason::TlsUntrusted);
    assert_eq!(rig.alerted_of(*reason), alerts, "{what}");
    loss.mend(&rig.service);
    rig.wait_for(what, State::Available, None);
    assert!(rig.orders().is_empty(), "{what}");
}

/// And when it lasts: shut within `max_staleness`, not before, and healed by itself.
fn stale_in_the_end(rig: &Rig<Vault>, (what, reason, loss): &Row) {
    let max = impatient().policy.max_staleness;
    rig.forget();
    let epoch = rig.gate.epoch();
    loss.happen(&rig.service);
    rig.wait_for(what, State::Degraded, Some(*reason));
    rig.wait_for(what, State::Inaccessible, Some(Reason::Unreachable));
    let stale = rig.staleness();
    assert!(stale > max - LEAD - Duration::from_millis(500), "{what}: too early, {stale:?}");
    assert!(stale < max + SOON, "{what}: too late, {stale:?}");
    println!("{what}: {reason}, then Unreachable, {stale:.1?} after the last success");
    // The gate's own time may have been faster than the order.
    rig.wait_until(what, || rig.orders().len() == 1);
    loss.mend(&rig.service);
    rig.wait_for(what, State::Available, None);
    assert_eq!(rig.gate.epoch(), epoch + 1, "{what}");
}

#[test]
fn what_is_final_cuts_off_at_once() {
    let rig = Rig::serving(Vault::start(Who::Application), quick());
    let rows: [Row; 8] = [
        (
            "disabled",
            Reason::KeyDisabled,
            Real(|v| v.set("--enabled", "false"), |v| v.set("--enabled", "true")),
        ),
        (
            "disabled, by the refusal alone",
            Reason::KeyDisabled,
            Fault(&["key-disabled", "--operation", "unwrapKey"]),
        ),
        (
            "expired",
            Reason::KeyExpired,
            Real(|v| v.set("--expires", &in_seconds(-5)), |v| v.set("--expires", "none")),
        ),
        (
            "not yet valid",
            Reason::KeyNotYetValid,
            Real(|v| v.set("--not-before", &in_seconds(3600)), |v| v.set("--not-before", "none")),
        ),
        (
            "deleted and recovered",
            Reason::KeyDeleted,
            Real(
                |v| drop(v.run(&["key", "delete", "--name", "kek"])),
                |v| drop(v.run(&["key", "recover", "--name", "kek"])),
            ),
        ),
        ("this version is not there", Reason::KeyNotFound, Fault(&["key-deleted"])),
        (
            "application disabled",
            Reason::IdentityGone,
            Real(
                |v| drop(v.run(&["identity", "disable", APP])),
                |v| drop(v.run(&["identity", "enable", APP])),
            ),
        ),
        ("application disabled, by a drill", Reason::IdentityGone, Fault(&["app-disabled"])),
    ];
    rows.iter().for_each(|row| at_once(&rig, row));
}

#[test]
fn a_purged_key_comes_back_from_its_backup_only() {
    let rig = Rig::serving(Vault::start_unprotected(Who::Host), quick());
    let vault = &rig.service;
    let backup = vault.file("kek.backup");
    let backup = backup.to_str().unwrap();
    vault.run(&["key", "backup", "--name", "kek", "--file", backup]);
    vault.run(&["key", "delete", "--name", "kek"]);
    rig.wait_for("deleted", State::Inaccessible, Some(Reason::KeyDeleted));
    // Still Inaccessible, and for another reason: there is no recovering it.
    vault.run(&["key", "purge", "--name", "kek"]);
    rig.wait_for("purged", State::Inaccessible, Some(Reason::KeyNotFound));
    // Another key of the same name is another key.
    vault.run(&["key", "create", "--name", "kek", "--size", "2048"]);
    rig.probes(4);
    assert!(rig.handler.revalidate().is_err());
    vault.run(&["key", "delete", "--name", "kek"]);
    vault.run(&["key", "purge", "--name", "kek"]);
    rig.back_by_revalidation_only("purged", Reason::KeyNotFound, &|vault| {
        vault.run(&["key", "restore", "--file", backup]);
    });
    assert_eq!(rig.gate.epoch(), 2);
}

#[test]
fn what_may_be_a_slip_is_confirmed() {
    let rig = Rig::serving(Vault::start(Who::Application), quick());
    let rows: [Row; 21] = [
        ("get", Reason::PermissionRevoked, Real(|v| v.revoke("get"), |v| v.grant("get"))),
        ("list", Reason::PermissionRevoked, Real(|v| v.revoke("list"), |v| v.grant("list"))),
        (
            "wrapKey",
            Reason::PermissionRevoked,
            Real(|v| v.revoke("wrapKey"), |v| v.grant("wrapKey")),
        ),
        (
            "unwrapKey",
            Reason::PermissionRevoked,
            Real(|v| v.revoke("unwrapKey"), |v| v.grant("unwrapKey")),
        ),
        ("all four", Reason::PermissionRevoked, Real(|v| v.revoke(ALL), |v| v.grant(ALL))),
        ("policy, the older form", Reason::PermissionRevoked, Fault(&["access-denied"])),
        ("RBAC, by a drill", Reason::PermissionRevoked, Fault(&["forbidden-by-rbac"])),
        (
            "a Managed HSM's RBAC, by a drill",
            Reason::PermissionRevoked,
            Fault(&["hsm-access-denied"]),
        ),
        (
            "firewall",
            Reason::NetworkDenied,
            Real(
                |v| drop(v.run(&["update", "--default-action", "deny"])),
                |v| drop(v.run(&["update", "--default-action", "allow"])),
            ),
        ),
        (
            "public access off",
            Reason::NetworkDenied,
            Real(
                |v| drop(v.run(&["update", "--public-network-access", "disabled"])),
                |v| drop(v.run(&["update", "--public-network-access", "enabled"])),
            ),
        ),
        ("firewall, by a drill", Reason::NetworkDenied, Fault(&["forbidden-by-firewall"])),
        ("connection, by a drill", Reason::NetworkDenied, Fault(&["forbidden-by-connection"])),
        ("wrong audience", Reason::TokenRefused, Fault(&["wrong-audience"])),
        ("token expired", Reason::TokenRefused, Fault(&["token-expired"])),
        ("another tenant, by a drill", Reason::TokenRefused, Fault(&["other-tenant"])),
        (
            "the vault moved to another tenant",
            Reason::TokenRefused,
            Real(
                |v| drop(v.run(&["update", "--tenant", "00000000-0000-0000-0000-000000000009"])),
                |v| drop(v.run(&["update", "--tenant", v.tenant()])),
            ),
        ),
        (
            "secret wrong",
            Reason::CredentialInvalid,
            // The one that is shown was taken back.
            Real(Vault::remove_secrets, |v| v.add_secret(&[])),
        ),
        (
            "secret expired",
            Reason::CredentialInvalid,
            Real(|v| v.add_secret(&["--expires", &in_seconds(-5)]), |v| v.add_secret(&[])),
        ),
        ("tenant gone", Reason::CredentialInvalid, Fault(&["tenant-not-found"])),
        (
            "the wrapped value is not of this key",
            Reason::WrongKeyOrCorruptEnvelope,
            Fault(&["bad-parameter"]),
        ),
        ("other key material", Reason::KeyMaterialMismatch, Fault(&["other-key"])),
    ];
    rows.iter().for_each(|row| confirmed(&rig, row));
}

#[test]
fn an_identity_that_is_deleted_is_noticed_and_made_again() {
    let rig = Rig::serving(Vault::start(Who::Host), quick());
    let row = (
        "managed identity deleted",
        Reason::IdentityGone,
        Real(
            |v| drop(v.run(&["identity", "delete", HOST])),
            |v| {
                v.create_host();
                v.grant(ALL);
            },
        ),
    );
    confirmed(&rig, &row);
    confirmed(&rig, &("not assigned", Reason::IdentityGone, Fault(&["identity-not-found"])));
    let rig = Rig::serving(Vault::start(Who::Application), quick());
    confirmed(&rig, &("application deleted", Reason::IdentityGone, Fault(&["app-not-found"])));
    rig.forget();
    rig.service.run(&["identity", "delete", APP]);
    rig.wait_for("application deleted", State::Inaccessible, Some(Reason::IdentityGone));
    assert_eq!(rig.degradations(), [Reason::IdentityGone]);
}

#[test]
fn a_role_that_is_removed_is_noticed_at_a_vault_and_at_a_managed_hsm() {
    const ROLE: &str = "Key Vault Crypto Service Encryption User";
    const HSM_ROLE: &str = "Managed HSM Crypto Service Encryption User";
    let start = |options: &[&str], key: &[&str], role: &'static str| {
        // The grant comes after the start.
        let vault = Vault::start_with(Who::Application, options, key);
        vault.role("assign", role);
        Rig::serving(vault, quick())
    };
    let row = |what, lose: fn(&Vault), mend: fn(&Vault)| {
        (what, Reason::PermissionRevoked, Real(lose, mend))
    };
    let rig = start(&["--rbac"], &["--size", "2048"], ROLE);
    confirmed(&rig, &row("RBAC", |v| v.role("remove", ROLE), |v| v.role("assign", ROLE)));
    // The other of the two does not count: the roles are still there.
    let by_policies = |on: &str| {
        rig.service.run(&["update", "--enable-rbac-authorization", on]);
    };
    by_policies("false");
    rig.probes(4);
    assert_eq!(rig.state().0, State::Inaccessible);
    for kind in [["--kty", "RSA-HSM", "--size", "2048"], ["--kty", "oct-HSM", "--size", "256"]] {
        let rig = start(&["--flavor", "mhsm"], &kind, HSM_ROLE);
        let row = row("HSM", |v| v.role("remove", HSM_ROLE), |v| v.role("assign", HSM_ROLE));
        confirmed(&rig, &row);
    }
}

/// What says nothing about the key.
fn transient() -> Vec<Row> {
    let unreachable = |what, args| (what, Reason::Unreachable, Fault(args));
    vec![
        unreachable("throttled", &["throttled"]),
        unreachable("500", &["status", "--status", "500"]),
        unreachable("503", &["status", "--status", "503"]),
        unreachable("504", &["status", "--status", "504"]),
        unreachable("being deleted", &["being-deleted"]),
        unreachable("being recovered", &["being-recovered"]),
        unreachable("503 to the list alone", &["status", "--operation", "list"]),
        unreachable("503 to wrapKey alone", &["status", "--operation", "wrapKey"]),
        unreachable("hangs up", &["close"]),
        unreachable("truncated", &["truncate", "--bytes", "40"]),
        unreachable("another body", &["wrong-body"]),
        unreachable("no connection", &["refuse-connections"]),
        unreachable("no answer in time", &["latency", "--milliseconds", "600000"]),
        unreachable("no answer at all", &["hang"]),
        unreachable("trickles", &["trickle", "--milliseconds", "1000"]),
        ("a proxy's 403", Reason::ProxyDenied, Fault(&["proxy-forbidden"])),
        ("not trusted", Reason::TlsUntrusted, Fault(&["untrusted-certificate"])),
    ]
}

/// Each thread has a vault of its own: the rows are mostly waiting.
fn in_parallel(rows: Vec<Row>, check: impl Fn(&Rig<Vault>, &Row) + Sync) {
    let each = rows.len().div_ceil(8);
    std::thread::scope(|scope| {
        for rows in rows.chunks(each) {
            let check = &check;
            scope.spawn(move || {
                let rig = Rig::serving(Vault::start(Who::Application), impatient());
                rows.iter().for_each(|row| check(&rig, row));
            });
        }
    });
}

#[test]
fn what_says_nothing_about_the_key_does_not_cut_off_until_it_has_lasted() {
    in_parallel(transient(), stale_in_the_end);
}

#[test]
fn what_says_nothing_about_the_key_is_served_through() {
    let rig = Rig::serving(Vault::start(Who::Application), quick());
    // Those that take a probe's whole deadline: in tests/conditions/watching.rs.
    let waits = ["no answer in time", "no answer at all", "trickles"];
    let rows = transient().into_iter().filter(|(what, ..)| !waits.contains(what));
    rows.for_each(|row| serves_on(&rig, &row));
    assert_eq!(rig.gate.epoch(), 1);
}

/// A token that was issued lasts: it is the vault that says whether it is still good.
#[test]
fn a_token_endpoint_that_is_away_matters_when_the_token_has_ended() {
    let away: [(&str, Reason, &[&str]); 5] = [
        ("503", Reason::Unreachable, &["status"]),
        ("throttled", Reason::Unreachable, &["throttled"]),
        ("hangs up", Reason::Unreachable, &["close"]),
        ("another body", Reason::Unreachable, &["wrong-body"]),
        ("a proxy's 403", Reason::ProxyDenied, &["proxy-forbidden"]),
    ];
    for (who, at) in [(Who::Application, "login"), (Who::Host, "identity")] {
        let rig = Rig::serving(Vault::start(who), quick());
        for (what, reason, fault) in away {
            let what = format!("{at}: {what}");
            rig.forget();
            rig.service.fault(&[fault, &["--at", at]].concat());
            rig.probes(4);
            assert_eq!(rig.state(), (State::Available, None), "{what}");
            rig.service.clear_faults();
            rig.service.fault(&["token-lifetime", "--seconds", "2"]);
            rig.probes(2);
            rig.service.fault(&[fault, &["--at", at]].concat());
            rig.wait_for(&what, State::Degraded, Some(reason));
            rig.probes(2);
            assert_eq!((rig.state(), rig.gate.epoch()), ((State::Degraded, Some(reason)), 1));
            rig.service.clear_faults();
            rig.wait_for(&what, State::Available, None);
            assert!(rig.orders().is_empty(), "{what}");
        }
        // What a machine's metadata service answers while it is busy or being updated.
        for status in ["404", "410", "429", "500"] {
            if who == Who::Host {
                rig.service.fault(&["token-lifetime", "--seconds", "2"]);
                rig.probes(2);
                rig.service.fault(&["status", "--at", at, "--status", status]);
                rig.wait_for(status, State::Degraded, Some(Reason::Unreachable));
                rig.service.clear_faults();
                rig.wait_for(status, State::Available, None);
            }
        }
        assert!(rig.orders().is_empty());
    }
}
