//! One row after the other.

use byokfs::key::gate::{Reason, State};
use byokfs::key::watcher::Notice;
use serde_json::json;

use crate::fake::{Fault, refusal, unix_now};
use crate::rig::{Rig, SOON, quick};

fn forbidden(inner: &str) -> String {
    refusal("Forbidden", inner, "Caller is not authorized.\r\nCaller: appid=1;oid=2\r\n")
}

/// What Entra ID answers; the number decides.
fn directory(status: u16, number: u32) -> Fault {
    let description = format!("AADSTS{number}: as the test wishes");
    let body = json!({
        "error": "invalid_client", "error_description": description, "error_codes": [number],
    });
    Fault::Directory(status, body.to_string())
}

/// The service's final word: cut off on the first probe that hears it.
#[test]
fn what_is_final_cuts_off_at_once() {
    let rows = [
        ("disabled", Reason::KeyDisabled, Fault::Attributes(json!({"enabled": false}))),
        (
            "disabled, by the refusal alone",
            Reason::KeyDisabled,
            Fault::Calls("/unwrapkey", 403, forbidden("KeyDisabled")),
        ),
        ("expired", Reason::KeyExpired, Fault::Attributes(json!({"exp": unix_now() - 10}))),
        (
            "not yet valid",
            Reason::KeyNotYetValid,
            Fault::Attributes(json!({"nbf": unix_now() + 3600})),
        ),
        ("deleted", Reason::KeyDeleted, Fault::Deleted { recoverable: true }),
        ("purged", Reason::KeyNotFound, Fault::Deleted { recoverable: false }),
        ("application disabled", Reason::IdentityGone, directory(401, 7_000_112)),
    ];
    let rig = Rig::serving(quick());
    for (what, reason, fault) in rows {
        rig.forget();
        let epoch = rig.gate.epoch();
        rig.fake.fault(fault);
        let took = rig.wait_for(what, State::Inaccessible, Some(reason));
        assert!(took < SOON, "{what}: {took:?}");
        assert!(rig.degradations().is_empty(), "{what}: it waited for a confirmation");
        back_by_revalidation_only(&rig, what, reason, epoch);
    }
}

/// May be a slip: the second refusal, or the time, confirms; a success in between clears it.
#[test]
fn what_may_be_a_slip_is_confirmed() {
    let rows = [
        ("policy", Reason::PermissionRevoked, Fault::Vault(403, forbidden("ForbiddenByPolicy"))),
        ("RBAC", Reason::PermissionRevoked, Fault::Vault(403, forbidden("ForbiddenByRbac"))),
        (
            "policy, the older form",
            Reason::PermissionRevoked,
            Fault::Vault(403, forbidden("AccessDenied")),
        ),
        (
            "local RBAC of a Managed HSM",
            Reason::PermissionRevoked,
            Fault::Vault(
                403,
                r#"{"error":{"code":"AccessDenied","message":"Not authorized"}}"#.into(),
            ),
        ),
        ("get", Reason::PermissionRevoked, call(crate::fake::VERSION)),
        ("list", Reason::PermissionRevoked, call("/versions")),
        ("wrapKey", Reason::PermissionRevoked, call("/wrapkey")),
        ("unwrapKey", Reason::PermissionRevoked, call("/unwrapkey")),
        ("firewall", Reason::NetworkDenied, Fault::Vault(403, forbidden("ForbiddenByFirewall"))),
        (
            "public access off",
            Reason::NetworkDenied,
            Fault::Vault(403, forbidden("ForbiddenByConnection")),
        ),
        (
            "wrong audience",
            Reason::TokenRefused,
            Fault::Vault(401, refusal("Unauthorized", "", "AKV10022: Invalid audience.")),
        ),
        ("application deleted", Reason::IdentityGone, directory(400, 700_016)),
        ("secret wrong", Reason::CredentialInvalid, directory(401, 7_000_215)),
        ("secret expired", Reason::CredentialInvalid, directory(401, 7_000_222)),
        ("tenant gone", Reason::CredentialInvalid, directory(400, 90_002)),
        (
            "the wrapped value is not of this key",
            Reason::WrongKeyOrCorruptEnvelope,
            Fault::Calls("/unwrapkey", 400, refusal("BadParameter", "", "bad")),
        ),
        ("other key material", Reason::KeyMaterialMismatch, Fault::OtherMaterial),
    ];
    let rig = Rig::serving(quick());
    for (what, reason, fault) in rows {
        rig.forget();
        let epoch = rig.gate.epoch();
        rig.fake.fault(fault);
        let took = rig.wait_for(what, State::Inaccessible, Some(reason));
        assert!(took < SOON, "{what}: {took:?}");
        assert_eq!(rig.degradations(), [reason], "{what}: not confirmed");
        let detail = rig.handler.orders.lock()[0].1.clone().unwrap_or_default();
        assert!(!detail.contains("appid") && !detail.contains("to-ken"), "{what}: {detail}");
        back_by_revalidation_only(&rig, what, reason, epoch);
    }
}

fn call(end: &'static str) -> Fault {
    Fault::Calls(end, 403, forbidden("ForbiddenByPolicy"))
}

/// Lost for good until a person says otherwise: one cut-off, and no way back by itself.
#[track_caller]
fn back_by_revalidation_only(rig: &Rig, what: &str, reason: Reason, epoch: u64) {
    assert!(rig.gate.lease().is_err(), "{what}");
    assert!(rig.handler.revalidate().is_err(), "{what}: a lost key revalidates");
    rig.mend();
    rig.probes(4);
    assert_eq!(rig.state(), (State::Inaccessible, Some(reason)), "{what}: it came back by itself");
    assert_eq!(rig.gate.epoch(), epoch, "{what}");
    assert_eq!(rig.handler.orders.lock().len(), 1, "{what}: cut off more than once");
    rig.handler.revalidate().unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(rig.state(), (State::Available, None), "{what}");
    rig.probes(2);
    assert_eq!(rig.state(), (State::Available, None), "{what}: not for long");
}

#[test]
fn a_slip_is_forgiven() {
    let mut settings = quick();
    settings.policy.confirm_after = std::time::Duration::from_secs(20);
    settings.interval = std::time::Duration::from_secs(20);
    let rig = Rig::serving(settings);
    for fault in [
        Fault::Vault(403, forbidden("ForbiddenByRbac")),
        Fault::Vault(403, forbidden("ForbiddenByFirewall")),
        directory(401, 7_000_222),
        Fault::OtherMaterial,
    ] {
        let what = format!("{fault:?}");
        rig.fake.fault(fault);
        rig.probes(1);
        assert_eq!(rig.state().0, State::Degraded, "{what}");
        assert!(rig.gate.lease().is_ok(), "{what}");
        rig.mend();
        rig.probes(1);
        assert_eq!(rig.state(), (State::Available, None), "{what}");
    }
    assert!(rig.handler.orders.lock().is_empty());
    assert_eq!(rig.gate.epoch(), 1);
}

/// Nothing was said about the key: it serves on, however many probes fail.
#[test]
fn what_says_nothing_about_the_key_does_not_cut_off() {
    let unavailable = refusal("ServiceUnavailable", "", "later");
    let rows = [
        ("throttled", Reason::Unreachable, Fault::Vault(429, refusal("Throttled", "", "slow"))),
        ("500", Reason::Unreachable, Fault::Vault(500, refusal("InternalServerError", "", "no"))),
        ("503", Reason::Unreachable, Fault::Vault(503, unavailable)),
        (
            "being deleted",
            Reason::Unreachable,
            Fault::Vault(409, refusal("Conflict", "ObjectIsBeingDeleted", "wait")),
        ),
        ("hangs up", Reason::Unreachable, Fault::HangUp),
        ("truncated", Reason::Unreachable, Fault::Truncated),
        ("no JSON", Reason::Unreachable, Fault::Vault(200, "<html>".into())),
        (
            "wrong JSON",
            Reason::Unreachable,
            Fault::Calls("/unwrapkey", 200, "{\"value\":7}".into()),
        ),
        ("a proxy's 403", Reason::ProxyDenied, Fault::Vault(403, "<html>blocked</html>".into())),
        ("a proxy's 404", Reason::ProxyDenied, Fault::Vault(404, String::new())),
        ("a redirect", Reason::ProxyDenied, Fault::Header(302, "Location: https://x/", "".into())),
        ("not trusted", Reason::TlsUntrusted, Fault::Untrusted),
    ];
    let rig = Rig::serving(quick());
    for (what, reason, fault) in rows {
        rig.forget();
        rig.fake.fault(fault);
        rig.wait_for(what, State::Degraded, Some(reason));
        rig.probes(8);
        assert_eq!(rig.state(), (State::Degraded, Some(reason)), "{what}");
        assert!(rig.gate.lease().is_ok(), "{what}");
        assert_eq!(rig.degradations(), [reason], "{what}: told more than once");
        let alerted =
            rig.handler.notices.lock().iter().any(
                |notice| matches!(notice, Notice::Alert { reason: told, .. } if *told == reason),
            );
        let alerts = matches!(reason, Reason::ProxyDenied | Reason::TlsUntrusted);
        assert_eq!(alerted, alerts, "{what}");
        rig.mend();
        rig.wait_for(what, State::Available, None);
    }
    // A token that was issued lasts; it is the vault that says whether it is still good.
    rig.fake.fault(Fault::Directory(503, "{}".into()));
    rig.probes(8);
    assert_eq!(rig.state(), (State::Available, None), "the directory is away");
    rig.mend();
    rig.forget();
    rig.vault_is_gone(true);
    rig.wait_for("the vault's name", State::Degraded, Some(Reason::VaultGone));
    rig.probes(4);
    assert!(rig.gate.lease().is_ok());
    rig.mend();
    rig.wait_for("the vault's name", State::Available, None);
    assert!(rig.handler.orders.lock().is_empty());
    assert_eq!(rig.gate.epoch(), 1);
}
