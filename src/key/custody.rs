//! Taking a volume into the custody of a key, and getting its volume key back.
//!
//! [`enrol`] makes a volume key and its envelope, once. [`revalidate`] is the only way from an
//! envelope to a [`Keyring`]: at each mount and after each cut-off, with the full requirement
//! check. What it returns was unwrapped by the service just now; nothing is cached anywhere.

use std::fmt;
use std::time::Duration;

use ring::digest::{SHA256, digest};

use super::clock::BootTime;
use super::envelope::{Canary, Envelope, RetiringKey, now_text};
use super::keyring::{Keyring, fingerprint};
use super::policy::Validity;
use super::provider::{
    Algorithm, Class, KeyInfo, Provider, ProviderError, ProviderResult, Session,
};
use super::reason::Reason;
use super::requirement::{self, Report, Settings, validity};
use crate::crypto::secret::{Secret, SecretBytes};
use crate::error::{Error, Kind};
use crate::sys::stack;

/// The number of a volume's first volume key.
const FIRST_VOLUME_KEY: u32 = 1;

/// Why a key was not accepted: for status the reason, for a person the error and the table.
#[derive(Debug)]
pub struct Refusal {
    pub reason: Reason,
    pub report: Option<Report>,
    pub error: Error,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Refusal {}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Error {
        refusal.error
    }
}

impl From<ProviderError> for Refusal {
    fn from(error: ProviderError) -> Refusal {
        Refusal { reason: error.reason(), report: None, error: error.into() }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal { reason: Reason::Unreachable, report: None, error }
    }
}

/// The volume keys that this host knows of a volume, by their fingerprints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pinned {
    pub current: [u8; 32],
    /// Of the one that is to replace it, while that is under way.
    pub next: Option<[u8; 32]>,
}

impl Pinned {
    pub fn has(&self, fingerprint: &[u8; 32]) -> bool {
        self.current == *fingerprint || self.next.as_ref() == Some(fingerprint)
    }
}

impl From<&[u8; 32]> for Pinned {
    fn from(current: &[u8; 32]) -> Pinned {
        Pinned { current: *current, next: None }
    }
}

/// A new volume key in a customer's custody.
#[derive(Debug)]
pub struct Enrolment {
    pub keyring: Keyring,
    /// To be pinned in the host's configuration.
    pub fingerprint: [u8; 32],
    pub info: KeyInfo,
    pub report: Report,
    envelope: Envelope,
}

impl Enrolment {
    /// The envelope to be saved in the new volume.
    pub fn envelope(&self, volume: [u8; 16]) -> Envelope {
        Envelope { volume, ..self.envelope.clone() }
    }
}

/// A key that was just found good.
#[derive(Debug)]
pub struct Revalidated {
    pub keyring: Keyring,
    /// When the check began: what it saw may have changed since.
    pub started: BootTime,
    pub info: KeyInfo,
    pub report: Report,
}

impl Revalidated {
    pub(super) fn validity(&self) -> Validity {
        validity(&self.info)
    }
}

/// Makes a volume key under the KEK named by `key_url`; without a version in it the current one
/// is taken, and newer ones are to be followed. Without an `algorithm` it is the key's own best.
/// `limit` is for all of it.
pub fn enrol(
    provider: &dyn Provider,
    key_url: &str,
    algorithm: impl Into<Option<Algorithm>>,
    settings: &Settings,
    limit: Duration,
) -> Result<Enrolment, Refusal> {
    let mut session = provider.session(BootTime::now() + limit)?;
    let session = &mut *session;
    let algorithm = match algorithm.into() {
        Some(algorithm) => algorithm,
        None => {
            let info = session.get_key(key_url)?;
            session.algorithm(&info, None)?
        }
    };
    let (info, report) = checked(session, key_url, algorithm, settings)?;
    let kid = &info.kid;

    let volume_key = Secret::<32>::random()?;
    let wrapped_volume_key = wrap_and_compare(session, kid, algorithm, &volume_key)?;
    let canary = new_canary(session, kid, algorithm)?;
    let keyring = Keyring::new(FIRST_VOLUME_KEY, volume_key);
    let fingerprint = keyring.fingerprint()?;
    let envelope = Envelope {
        volume: [0; 16],
        provider: provider.name().into(),
        kid: kid.clone(),
        algorithm,
        follow_versions: !provider.names_version(key_url),
        volume_key_id: FIRST_VOLUME_KEY,
        wrapped_volume_key,
        fingerprint,
        retiring: None,
        canary,
        created: now_text(),
        earlier: Vec::new(),
    };
    Ok(Enrolment { keyring, fingerprint, info, report, envelope })
}

/// The full check of the envelope's key, and the volume key if it is the one that was pinned.
pub fn revalidate(
    provider: &dyn Provider,
    envelope: &Envelope,
    pinned: impl Into<Pinned>,
    settings: &Settings,
    limit: Duration,
) -> Result<Revalidated, Refusal> {
    let pinned = pinned.into();
    let started = BootTime::now();
    // The whole conversation: the key also passes through the frames of HTTP and TLS.
    stack::with_burnt_stack(|| {
        let mut session = provider.session(started + limit)?;
        let session = &mut *session;
        let Envelope { kid, algorithm, .. } = envelope;
        let (info, report) = checked(session, kid, *algorithm, settings)?;
        unwrap_canary(session, envelope)?;
        let keyring = keyring_of(session, envelope, &pinned)?;
        Ok(Revalidated { keyring, started, info, report })
    })
}

/// A new volume key for a volume that keeps its KEK.
#[derive(Debug)]
pub struct Renewal {
    /// With the old volume key retiring in it.
    pub envelope: Envelope,
    /// The fingerprint of that old one, as unwrapped, not as the envelope says.
    pub retired: [u8; 32],
}

/// Makes a new volume key. What is in the envelope has been unwrapped once before this returns.
pub fn renew(
    provider: &dyn Provider,
    envelope: &Envelope,
    pinned: impl Into<Pinned>,
    settings: &Settings,
    limit: Duration,
) -> Result<Renewal, Refusal> {
    let pinned = pinned.into();
    stack::with_burnt_stack(|| {
        let mut session = provider.session(BootTime::now() + limit)?;
        let session = &mut *session;
        let Envelope { kid, algorithm, .. } = envelope;
        checked(session, kid, *algorithm, settings)?;
        unwrap_canary(session, envelope)?;
        let retired =
            fingerprint(&pinned_key(session, envelope, &envelope.wrapped_volume_key, &pinned)?)?;
        let volume_key = Secret::<32>::random()?;
        let id = envelope.volume_key_id.checked_add(1).ok_or_else(foreign_envelope)?;
        let retiring = RetiringKey {
            id: envelope.volume_key_id,
            wrapped: envelope.wrapped_volume_key.clone(),
        };
        let envelope = Envelope {
            volume_key_id: id,
            wrapped_volume_key: wrap_and_compare(session, kid, *algorithm, &volume_key)?,
            fingerprint: fingerprint(&volume_key)?,
            retiring: Some(retiring),
            canary: new_canary(session, kid, *algorithm)?,
            ..envelope.clone()
        };
        Ok(Renewal { envelope, retired })
    })
}

/// Both volume keys, where there are two.
fn keyring_of(
    session: &mut dyn Session,
    envelope: &Envelope,
    pinned: &Pinned,
) -> Result<Keyring, Refusal> {
    let key = pinned_key(session, envelope, &envelope.wrapped_volume_key, pinned)?;
    let keyring = Keyring::new(envelope.volume_key_id, key);
    match &envelope.retiring {
        None => Ok(keyring),
        Some(old) => {
            let key = pinned_key(session, envelope, &old.wrapped, pinned)?;
            Ok(keyring.with_retiring(old.id, key))
        }
    }
}

fn pinned_key(
    session: &mut dyn Session,
    envelope: &Envelope,
    wrapped: &[u8],
    pinned: &Pinned,
) -> Result<Secret<32>, Refusal> {
    let unwrapped = session.unwrap(&envelope.kid, envelope.algorithm, wrapped)?;
    let key = to_key(&unwrapped).ok_or_else(foreign_envelope)?;
    if pinned.has(&fingerprint(&key)?) { Ok(key) } else { Err(foreign_envelope()) }
}

/// Has the canary unwrapped and compares it: what each probe does.
pub(super) fn unwrap_canary(session: &mut dyn Session, envelope: &Envelope) -> ProviderResult<()> {
    let Envelope { kid, algorithm, canary, .. } = envelope;
    let value = session.unwrap(kid, *algorithm, &canary.wrapped)?;
    if sha256(value.expose()) == canary.sha256 {
        return Ok(());
    }
    Err(ProviderError::new(
        Class::Denied(Reason::KeyMaterialMismatch),
        "the key unwraps to another value than when the envelope was made",
    ))
}

/// That the permission to wrap is still there.
pub(super) fn try_wrap(session: &mut dyn Session, envelope: &Envelope) -> ProviderResult<()> {
    let value = Secret::<32>::random().and_then(|value| copy(&value));
    let value = value.map_err(|error| ProviderError::unreachable(error.to_string()))?;
    session.wrap(&envelope.kid, envelope.algorithm, &value).map(drop)
}

/// Every requirement on a key, for a person to read; with an envelope, also that it still unwraps
/// what that holds. Only the canary is unwrapped, not the volume key.
pub fn survey(
    provider: &dyn Provider,
    kid: &str,
    envelope: Option<&Envelope>,
    settings: &Settings,
    limit: Duration,
) -> ProviderResult<Report> {
    let mut session = provider.session(BootTime::now() + limit)?;
    let session = &mut *session;
    let algorithm = envelope.map(|envelope| envelope.algorithm);
    let (info, mut report) = requirement::survey(session, kid, algorithm, settings)?;
    if let (Some(envelope), Some(_)) = (envelope, info) {
        report.tried(unwrap_canary(session, envelope), "the volume's envelope")?;
    }
    Ok(report)
}

pub(super) fn new_canary(
    session: &mut dyn Session,
    kid: &str,
    algorithm: Algorithm,
) -> Result<Canary, Refusal> {
    let canary = Secret::<32>::random()?;
    Ok(Canary {
        wrapped: wrap_and_compare(session, kid, algorithm, &canary)?,
        sha256: sha256(canary.expose()),
    })
}

pub(super) fn checked(
    session: &mut dyn Session,
    kid: &str,
    algorithm: Algorithm,
    settings: &Settings,
) -> Result<(KeyInfo, Report), Refusal> {
    let (info, report) = requirement::check(session, kid, algorithm, settings)?;
    let failures: Vec<_> = report
        .failures()
        .filter(|row| !settings.tolerant || !row.can_be_waived())
        .map(|row| format!("{}: {} ({})", row.requirement, row.found, row.fix))
        .collect();
    if failures.is_empty() {
        return Ok((info, report));
    }
    let message = format!("{} does not meet the requirements: {}", info.kid, failures.join("; "));
    let reason = report.reason().unwrap_or(Reason::WrongKeyOrCorruptEnvelope);
    Err(Refusal { reason, report: Some(report), error: Error::new(Kind::Denied, message) })
}

/// A wrap that cannot be unwrapped again would lose the volume; so that is tried first.
pub(super) fn wrap_and_compare(
    session: &mut dyn Session,
    kid: &str,
    algorithm: Algorithm,
    key: &Secret<32>,
) -> Result<Vec<u8>, Refusal> {
    let wrapped = session.wrap(kid, algorithm, &copy(key)?)?;
    if to_key(&session.unwrap(kid, algorithm, &wrapped)?).is_some_and(|back| back.ct_eq(key)) {
        return Ok(wrapped);
    }
    Err(ProviderError::new(
        Class::Denied(Reason::KeyMaterialMismatch),
        format!("{kid} does not unwrap what it has wrapped"),
    )
    .into())
}

pub(super) fn foreign_envelope() -> Refusal {
    let message = "the envelope is not the one that was made for this volume: its key is not the \
                   one pinned in volumes.d; restore envelope.json, or the pin, from a backup";
    Refusal { reason: Reason::KeyMaterialMismatch, report: None, error: Error::corrupt(message) }
}

fn copy(key: &Secret<32>) -> crate::Result<SecretBytes> {
    stack::with_burnt_stack(|| {
        SecretBytes::new_with(32, |place| place.copy_from_slice(key.expose()))
    })
}

pub(super) fn to_key(bytes: &SecretBytes) -> Option<Secret<32>> {
    stack::with_burnt_stack(|| {
        let bytes: &[u8; 32] = bytes.expose().try_into().ok()?;
        Secret::new_with(|key| key.copy_from_slice(bytes)).ok()
    })
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    stack::with_burnt_stack(|| {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
        hash
    })
}

#[cfg(test)]
mod tests {
    use super::super::policy::OnExpired;
    use super::super::testing::{FakeKey, FakeService};
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);
    const OAEP: Algorithm = Algorithm::RsaOaep256;

    fn enrolled(service: &FakeService) -> Enrolment {
        enrol(service, FakeService::KID, OAEP, &Settings::default(), LIMIT).unwrap()
    }

    fn again(
        service: &FakeService,
        envelope: &Envelope,
        pin: &[u8; 32],
    ) -> Result<Revalidated, Refusal> {
        revalidate(service, envelope, pin, &Settings::default(), LIMIT)
    }

    #[test]
    fn what_is_enrolled_revalidates() {
        let service = FakeService::new(FakeKey::good());
        let enrolment = enrolled(&service);
        let envelope = enrolment.envelope([9; 16]);
        assert_eq!(envelope.volume, [9; 16]);
        assert_eq!(envelope.kid, FakeService::KID);
        assert!(!envelope.follow_versions);
        let envelope = Envelope::from_json(&envelope.to_json().unwrap()).unwrap();
        let back = again(&service, &envelope, &enrolment.fingerprint).unwrap();
        assert_eq!(back.keyring.fingerprint().unwrap(), enrolment.fingerprint);
        assert!(back.started <= BootTime::now());
    }

    #[test]
    fn two_enrolments_share_nothing() {
        let service = FakeService::new(FakeKey::good());
        let (one, two) = (enrolled(&service), enrolled(&service));
        assert_ne!(one.fingerprint, two.fingerprint);
        assert_ne!(one.envelope.canary.sha256, two.envelope.canary.sha256);
    }

    #[test]
    fn a_key_without_a_version_is_followed() {
        let service = FakeService::new(FakeKey::good());
        let (bare, _) = FakeService::KID.rsplit_once('/').unwrap();
        let settings = Settings::default();
        let enrolment = enrol(&service, bare, OAEP, &settings, LIMIT).unwrap();
        assert!(enrolment.envelope.follow_versions);
        assert_eq!(enrolment.envelope.kid, FakeService::KID);
    }

    #[test]
    fn a_planted_envelope_is_refused() {
        let service = FakeService::new(FakeKey::good());
        let mine = enrolled(&service);
        // Anyone can wrap with the public key.
        let planted = enrolled(&service).envelope([9; 16]);
        let refusal = again(&service, &planted, &mine.fingerprint).unwrap_err();
        assert_eq!(refusal.reason, Reason::KeyMaterialMismatch);
        assert_eq!(refusal.error.kind, Kind::Corrupt);
        let claims = Envelope { fingerprint: mine.fingerprint, ..planted };
        assert!(again(&service, &claims, &mine.fingerprint).is_err());
    }

    #[test]
    fn an_envelope_that_does_not_unwrap_is_refused() {
        let service = FakeService::new(FakeKey::good());
        let enrolment = enrolled(&service);
        let mut envelope = enrolment.envelope([9; 16]);
        envelope.wrapped_volume_key = vec![0; 100];
        let refusal = again(&service, &envelope, &enrolment.fingerprint).unwrap_err();
        assert_eq!(refusal.reason, Reason::WrongKeyOrCorruptEnvelope);
        let mut envelope = enrolment.envelope([9; 16]);
        envelope.canary.sha256[0] ^= 1;
        let refusal = again(&service, &envelope, &enrolment.fingerprint).unwrap_err();
        assert_eq!(refusal.reason, Reason::KeyMaterialMismatch);
    }

    #[test]
    fn a_lost_key_is_refused_with_its_reason_and_the_table() {
        let service = FakeService::new(FakeKey::good());
        let enrolment = enrolled(&service);
        let envelope = enrolment.envelope([9; 16]);
        service.change(|key| key.info.enabled = false);
        let refusal = again(&service, &envelope, &enrolment.fingerprint).unwrap_err();
        assert_eq!(refusal.reason, Reason::KeyDisabled);
        assert_eq!(refusal.error.kind, Kind::Denied);
        assert!(refusal.report.unwrap().failures().count() >= 1);
        service.change(|key| key.info.enabled = true);
        service.change(|key| key.fail_all(Class::Transient(Reason::Unreachable)));
        let refusal = again(&service, &envelope, &enrolment.fingerprint).unwrap_err();
        assert_eq!(refusal.error.kind, Kind::Unreachable);
    }

    #[test]
    fn requirements_can_be_waived_but_not_that_it_works() {
        let mut key = FakeKey::good();
        key.info.bits = Some(1024);
        let service = FakeService::new(key);
        let strict = Settings::default();
        assert!(enrol(&service, FakeService::KID, OAEP, &strict, LIMIT).is_err());
        let tolerant = Settings { tolerant: true, ..Settings::default() };
        assert!(enrol(&service, FakeService::KID, OAEP, &tolerant, LIMIT).is_ok());
        for permission in ["list", "wrapKey", "unwrapKey"] {
            service.change(|key| key.deny(permission));
            let refusal = enrol(&service, FakeService::KID, OAEP, &tolerant, LIMIT).unwrap_err();
            assert_eq!(refusal.reason, Reason::PermissionRevoked, "{permission}");
            service.change(|key| key.denied.clear());
        }
    }

    /// The service itself still unwraps with it.
    #[test]
    fn no_volume_opens_with_an_expired_key() {
        let mut key = FakeKey::good();
        key.info.bits = Some(1024);
        let service = FakeService::new(key);
        let tolerant = Settings { tolerant: true, ..Settings::default() };
        let enrolment = enrol(&service, FakeService::KID, OAEP, &tolerant, LIMIT).unwrap();
        let (envelope, pin) = (enrolment.envelope([9; 16]), &enrolment.fingerprint);
        let open = |settings: &Settings| revalidate(&service, &envelope, pin, settings, LIMIT);
        service.change(|key| key.info.expires = Some(1));
        assert_eq!(open(&tolerant).unwrap_err().reason, Reason::KeyExpired);
        let warned = Settings { on_expired: OnExpired::Warn, ..tolerant.clone() };
        assert!(open(&warned).is_ok());
        service.change(|key| {
            key.info.expires = None;
            key.info.not_before = Some(i64::MAX);
        });
        assert_eq!(open(&tolerant).unwrap_err().reason, Reason::KeyNotYetValid);
        service.change(|key| key.info.not_before = None);
        assert!(open(&tolerant).is_ok());
    }
}
