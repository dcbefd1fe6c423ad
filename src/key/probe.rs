//! One look at the key: its attributes, and whether it still unwraps.
//!
//! The canary is unwrapped, not the volume key: that is on the wire at a mount or revalidation
//! only. The attributes are read because Key Vault goes on unwrapping with an expired key, and
//! answers for a disabled one.

use super::clock::BootTime;
use super::custody::{try_wrap, unwrap_canary};
use super::envelope::Envelope;
use super::provider::{Class, KeyInfo, Provider, ProviderError, ProviderResult};
use super::reason::Reason;
use super::requirement::{newest_usable, validity};
use super::wall_clock;

/// What a probe saw.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) info: KeyInfo,
    /// The version that the envelope should be wrapped with by now, if it follows versions.
    pub(super) newer: Option<String>,
}

/// Probes the envelope's key version. With `complete` every permission that a volume needs is
/// used, else only what serving needs.
pub(super) fn probe(
    provider: &dyn Provider,
    envelope: &Envelope,
    complete: bool,
    deadline: BootTime,
) -> ProviderResult<Seen> {
    let mut session = provider.session(deadline)?;
    let session = &mut *session;
    let info = session.get_key(&envelope.kid)?;
    if !info.enabled {
        return Err(ProviderError::new(Class::Revoked(Reason::KeyDisabled), "the key is disabled"));
    }
    unwrap_canary(session, envelope)?;
    let mut newer = None;
    if complete {
        let versions = session.list_versions(&envelope.kid)?;
        newer = newest_usable(&versions)
            .filter(|newest| envelope.follow_versions && newest.created > info.created)
            .map(|newest| newest.kid.clone());
        // Outside its dates a key does not wrap; what that means is for the policy to say.
        if validity(&info).check(BootTime::now(), wall_clock()).is_ok() {
            try_wrap(session, envelope)?;
        }
    }
    Ok(Seen { info, newer })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::custody::enrol;
    use super::super::provider::Algorithm;
    use super::super::requirement::Settings;
    use super::super::testing::{FakeKey, FakeService};
    use super::*;

    fn enrolled() -> (FakeService, Envelope) {
        let service = FakeService::new(FakeKey::good());
        let (settings, limit) = (Settings::default(), Duration::from_secs(1));
        let algorithm = Algorithm::RsaOaep256;
        let enrolment = enrol(&service, FakeService::KID, algorithm, &settings, limit).unwrap();
        (service, enrolment.envelope([0; 16]))
    }

    fn look(service: &FakeService, envelope: &Envelope, complete: bool) -> Result<(), Class> {
        let found = probe(service, envelope, complete, BootTime::now());
        found.map(drop).map_err(|error| error.class)
    }

    #[test]
    fn a_good_key_is_found_good() {
        let (service, envelope) = enrolled();
        let before = service.calls();
        assert_eq!(look(&service, &envelope, false), Ok(()));
        assert_eq!(service.calls(), before + 2);
        assert_eq!(look(&service, &envelope, true), Ok(()));
        assert_eq!(service.calls(), before + 6);
    }

    #[test]
    fn each_permission_is_missed_by_a_complete_probe() {
        for (permission, by_quick) in
            [("get", true), ("unwrapKey", true), ("list", false), ("wrapKey", false)]
        {
            let (service, envelope) = enrolled();
            service.change(|key| key.deny(permission));
            let denied = Err(Class::Denied(Reason::PermissionRevoked));
            assert_eq!(look(&service, &envelope, true), denied, "{permission}");
            assert_eq!(look(&service, &envelope, false).is_err(), by_quick, "{permission}");
        }
    }

    #[test]
    fn a_disabled_key_is_told_by_its_attributes() {
        let (service, envelope) = enrolled();
        service.change(|key| key.info.enabled = false);
        let revoked = Err(Class::Revoked(Reason::KeyDisabled));
        assert_eq!(look(&service, &envelope, false), revoked);
    }

    #[test]
    fn an_expired_key_is_not_asked_to_wrap() {
        let (service, envelope) = enrolled();
        service.change(|key| {
            key.info.expires = Some(1);
            key.deny("wrapKey");
        });
        assert_eq!(look(&service, &envelope, true), Ok(()));
    }

    #[test]
    fn a_newer_version_is_told_to_those_who_follow() {
        let (service, envelope) = enrolled();
        let following = Envelope { follow_versions: true, ..envelope.clone() };
        let newer = |envelope: &Envelope, complete| {
            probe(&service, envelope, complete, BootTime::now()).unwrap().newer
        };
        assert_eq!(newer(&following, true), None);
        service.change(|key| key.newer_version = true);
        assert_eq!(newer(&following, true).as_deref(), Some("https://kv.example/keys/kek/02"));
        assert_eq!(newer(&following, false), None);
        assert_eq!(newer(&envelope, true), None);
    }

    #[test]
    fn other_key_material_is_told() {
        let (service, envelope) = enrolled();
        service.change(|key| key.material ^= 1);
        let mismatch = Err(Class::Denied(Reason::KeyMaterialMismatch));
        assert_eq!(look(&service, &envelope, false), mismatch);
    }
}
