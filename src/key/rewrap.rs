//! Rotating the KEK: the same volume key under another key, or another version of it.
//!
//! One small envelope is rewritten, however large the volume. The old key must still open it: the
//! volume key comes from its service, not from this process's memory, so that whoever has lost
//! the key cannot take a volume over to a key of his own. The new key passes the full check
//! first, and what it wrapped is unwrapped once before anything is written.
//!
//! Nothing is stored here: [`Rewrapped::envelope`] is the caller's to save.

use std::time::Duration;

use super::clock::BootTime;
use super::custody::{
    Pinned, Refusal, checked, foreign_envelope, new_canary, to_key, unwrap_canary, wrap_and_compare,
};
use super::envelope::{Envelope, now_text};
use super::keyring::fingerprint;
use super::policy::{OnExpired, Validity};
use super::provider::{Algorithm, Class, KeyInfo, Provider, ProviderError};
use super::reason::Reason;
use super::requirement::{Report, Settings, validity};
use super::wall_clock;
use crate::error::{Error, Kind};
use crate::sys::stack;

/// What the volume key is to be wrapped with from now on.
#[derive(Clone, Copy, Debug)]
pub struct NewKey<'a> {
    pub provider: &'a dyn Provider,
    /// Without a version: the current one, and newer ones are to be followed.
    pub url: &'a str,
    /// None: as before, where the new key's type allows it, else the type's own.
    pub algorithm: Option<Algorithm>,
    /// Whether newer versions are to be followed; None: as the URL says.
    pub follow: Option<bool>,
    /// Forget the keys before this one: nothing that was made with them belongs to this volume.
    pub forget_earlier: bool,
}

/// The volume key under its new key.
#[derive(Debug)]
pub struct Rewrapped {
    pub envelope: Envelope,
    pub info: KeyInfo,
    pub report: Report,
    /// When the check of the new key began: what it saw may have changed since.
    pub started: BootTime,
}

impl Rewrapped {
    pub(super) fn validity(&self) -> Validity {
        validity(&self.info)
    }
}

/// Has the volume key unwrapped by `old` and wrapped with the new key. None when the envelope is
/// already what it would become. `limit` is for the conversation with each service.
pub fn rewrap(
    old: &dyn Provider,
    envelope: &Envelope,
    pinned: impl Into<Pinned>,
    new: &NewKey<'_>,
    settings: &Settings,
    limit: Duration,
) -> Result<Option<Rewrapped>, Refusal> {
    let pinned = pinned.into();
    if envelope.retiring.is_some() {
        let message = "the volume is between two volume keys: finish `byokfs rotate volume` first";
        return Err(Error::new(Kind::Busy, message).into());
    }
    // Both conversations whole: the key also passes through the frames of HTTP and TLS.
    stack::with_burnt_stack(|| {
        let started = BootTime::now();
        let mut session = new.provider.session(started + limit)?;
        let session = &mut *session;
        let algorithm = match new.algorithm {
            Some(algorithm) => algorithm,
            None => {
                let info = session.get_key(new.url)?;
                session.algorithm(&info, Some(envelope.algorithm))?
            }
        };
        let (info, report) = checked(session, new.url, algorithm, settings)?;
        usable(&info, settings.on_expired)?;
        let follow_versions = new.follow.unwrap_or_else(|| !new.provider.names_version(new.url));
        let same = info.kid == envelope.kid && algorithm == envelope.algorithm;
        if same && follow_versions == envelope.follow_versions && !new.forget_earlier {
            return Ok(None);
        }

        let volume_key = {
            let mut session = old.session(BootTime::now() + limit)?;
            let session = &mut *session;
            let Envelope { kid, algorithm, .. } = envelope;
            usable(&session.get_key(kid)?, settings.on_expired)?;
            unwrap_canary(session, envelope)?;
            let unwrapped = session.unwrap(kid, *algorithm, &envelope.wrapped_volume_key)?;
            let volume_key = to_key(&unwrapped).ok_or_else(foreign_envelope)?;
            if !pinned.has(&fingerprint(&volume_key)?) {
                return Err(foreign_envelope());
            }
            volume_key
        };

        let now = now_text();
        let earlier = match (new.forget_earlier, same) {
            (true, _) => Vec::new(),
            (false, true) => envelope.earlier.clone(),
            (false, false) => envelope.earlier_for_successor(&now)?,
        };
        let envelope = Envelope {
            provider: new.provider.name().into(),
            algorithm,
            follow_versions,
            wrapped_volume_key: wrap_and_compare(session, &info.kid, algorithm, &volume_key)?,
            canary: new_canary(session, &info.kid, algorithm)?,
            kid: info.kid.clone(),
            created: now,
            earlier,
            ..envelope.clone()
        };
        Ok(Some(Rewrapped { envelope, info, report, started }))
    })
}

/// A key that would be cut off opens nothing here either, though its service still unwraps with
/// it when its dates have passed.
fn usable(info: &KeyInfo, on_expired: OnExpired) -> Result<(), Refusal> {
    let lost = match validity(info).check(BootTime::now(), wall_clock()) {
        _ if !info.enabled => Some(Reason::KeyDisabled),
        Err(reason) if on_expired == OnExpired::Inaccessible => Some(reason),
        _ => None,
    };
    let Some(reason) = lost else { return Ok(()) };
    let message = format!("{}: {}", info.kid, reason.describe());
    Err(ProviderError::new(Class::Revoked(reason), message).into())
}

#[cfg(test)]
mod tests {
    use super::super::custody::{enrol, revalidate};
    use super::super::testing::{FakeKey, FakeService};
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn enrolled(service: &FakeService) -> (Envelope, [u8; 32]) {
        let (bare, _) = FakeService::KID.rsplit_once('/').unwrap();
        let algorithm = Algorithm::RsaOaep256;
        let enrolment = enrol(service, bare, algorithm, &Settings::default(), LIMIT).unwrap();
        (enrolment.envelope([9; 16]), enrolment.fingerprint)
    }

    fn other() -> FakeService {
        let mut key = FakeKey::good();
        key.info.kid = "https://other.example/keys/own/07".into();
        key.material = 0x33;
        FakeService::new(key)
    }

    fn to<'a>(service: &'a FakeService, url: &'a str) -> NewKey<'a> {
        NewKey { provider: service, url, algorithm: None, follow: None, forget_earlier: false }
    }

    fn opens(service: &FakeService, envelope: &Envelope, pin: &[u8; 32]) -> Result<(), Refusal> {
        revalidate(service, envelope, pin, &Settings::default(), LIMIT).map(drop)
    }

    #[test]
    fn another_key_opens_the_same_volume_and_the_old_one_only_old_copies() {
        let (old, new) = (FakeService::new(FakeKey::good()), other());
        let (envelope, pin) = enrolled(&old);
        let url = "https://other.example/keys/own/07";
        let settings = Settings::default();
        let moved = rewrap(&old, &envelope, &pin, &to(&new, url), &settings, LIMIT).unwrap();
        let moved = moved.unwrap().envelope;
        assert_eq!((moved.kid.as_str(), moved.follow_versions), (url, false));
        assert_eq!((moved.volume, moved.volume_key_id), (envelope.volume, envelope.volume_key_id));
        assert_ne!(moved.canary, envelope.canary);
        assert_eq!(moved.earlier.len(), 1);
        assert_eq!(moved.earlier[0].kid, FakeService::KID);
        opens(&new, &moved, &pin).unwrap();
        opens(&old, &envelope, &pin).unwrap();
        assert!(opens(&old, &moved, &pin).is_err());
    }

    #[test]
    fn what_is_already_so_stays() {
        let service = FakeService::new(FakeKey::good());
        let (envelope, pin) = enrolled(&service);
        let (bare, _) = FakeService::KID.rsplit_once('/').unwrap();
        let settings = Settings::default();
        let rotate = |url| rewrap(&service, &envelope, &pin, &to(&service, url), &settings, LIMIT);
        assert!(rotate(bare).unwrap().is_none());
        // Named with its version, it is not followed any more.
        let pinned = rotate(FakeService::KID).unwrap().unwrap().envelope;
        assert!(!pinned.follow_versions && pinned.earlier.is_empty());
        opens(&service, &pinned, &pin).unwrap();
    }

    #[test]
    fn a_lost_key_cannot_be_left_for_another() {
        type Lose = fn(&mut FakeKey);
        let cases: [(Reason, Lose); 5] = [
            (Reason::KeyDisabled, |key| key.info.enabled = false),
            (Reason::KeyExpired, |key| key.info.expires = Some(1)),
            (Reason::PermissionRevoked, |key| key.deny("unwrapKey")),
            (Reason::KeyMaterialMismatch, |key| key.material ^= 1),
            (Reason::Unreachable, |key| key.fail_all(Class::Transient(Reason::Unreachable))),
        ];
        for (reason, lose) in cases {
            let (old, new) = (FakeService::new(FakeKey::good()), other());
            let (envelope, pin) = enrolled(&old);
            old.change(lose);
            let url = "https://other.example/keys/own/07";
            let settings = Settings::default();
            let refusal = rewrap(&old, &envelope, &pin, &to(&new, url), &settings, LIMIT);
            assert_eq!(refusal.unwrap_err().reason, reason);
        }
    }

    #[test]
    fn a_new_key_that_could_not_be_opened_again_is_refused() {
        let old = FakeService::new(FakeKey::good());
        let (envelope, pin) = enrolled(&old);
        for spoil in [
            (|key| key.deny("unwrapKey")) as fn(&mut FakeKey),
            |key| key.info.bits = Some(1024),
            |key| key.info.expires = Some(1),
            |key| key.info.enabled = false,
        ] {
            let new = other();
            new.change(spoil);
            let url = "https://other.example/keys/own/07";
            for tolerant in [false, true] {
                let settings = Settings { tolerant, ..Settings::default() };
                let refused = rewrap(&old, &envelope, &pin, &to(&new, url), &settings, LIMIT);
                let small = new.key().info.bits == Some(1024);
                assert_eq!(refused.is_err(), !(small && tolerant));
            }
        }
    }

    #[test]
    fn a_planted_envelope_is_not_rewrapped() {
        let service = FakeService::new(FakeKey::good());
        let ((_, pin), (planted, _)) = (enrolled(&service), enrolled(&service));
        let new = other();
        let url = "https://other.example/keys/own/07";
        let settings = Settings::default();
        let refusal = rewrap(&service, &planted, &pin, &to(&new, url), &settings, LIMIT);
        assert_eq!(refusal.unwrap_err().reason, Reason::KeyMaterialMismatch);
    }

    #[test]
    fn a_copy_with_a_key_of_its_own_remembers_no_other() {
        let (old, new) = (FakeService::new(FakeKey::good()), other());
        let (envelope, pin) = enrolled(&old);
        let own = NewKey { forget_earlier: true, ..to(&new, "https://other.example/keys/own") };
        let settings = Settings::default();
        let moved = rewrap(&old, &envelope, &pin, &own, &settings, LIMIT).unwrap().unwrap();
        assert!(moved.envelope.earlier.is_empty() && moved.envelope.follow_versions);
        assert!(moved.report.failures().next().is_none());
    }
}
