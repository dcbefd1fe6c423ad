//! Rotating a volume's KEK, whether it is mounted or not: the new envelope, the pin, the trail.
//!
//! In this order, so that a crash at any point leaves a volume that mounts: the pin takes both key
//! versions; the envelope is replaced, atomically; the pin takes the new one only.
//!
//! Whoever calls this keeps others from changing the envelope meanwhile.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::pins::{self, Pin, Standing};
use super::{hex, settings, volume};
use crate::backing::NodeRef;
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::key::envelope::{Envelope, PREVIOUS_FILE};
use crate::key::provider::{self, Algorithm, Provider};
use crate::key::rewrap::{NewKey, Rewrapped, rewrap};
use crate::observe::audit::{Event, Name, Status, emit};
use crate::store::VolumeInfo;

/// For the conversation with each of the two key services.
const LIMIT: Duration = Duration::from_secs(60);

/// The volume and what this host knows of it.
#[derive(Clone, Copy, Debug)]
pub struct Site<'a> {
    /// Where the envelope is.
    pub dir: &'a NodeRef,
    pub back: &'a Path,
    pub info: &'a VolumeInfo,
    pub config: &'a Config,
    pub config_dir: &'a Path,
}

/// What is wanted.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// None: the current version of the same key.
    pub to: Option<String>,
    pub algorithm: Option<Algorithm>,
    /// The volume is a copy that gets a key of its own: keys before it are not kept.
    pub rekey: bool,
    /// Not asked for: a newer version of a followed key.
    pub followed: bool,
}

/// A finished rotation.
#[derive(Debug)]
pub struct Rotated {
    pub rewrapped: Rewrapped,
    pub provider: Arc<dyn Provider>,
}

/// None when there is nothing to rotate to.
pub fn rotate(site: &Site<'_>, order: &Order) -> Result<Option<Rotated>> {
    let envelope = Envelope::load(site.dir)?;
    volume::expect_own_envelope(&envelope, site.info)?;
    let pin = pins::read(site.config_dir, &site.info.uuid)?;
    match pin.standing(site.back, &envelope.kid) {
        Standing::Confirmed => {}
        // Giving a copy a key of its own confirms it; but not an envelope of old put back here.
        Standing::Elsewhere if order.rekey => {}
        standing => return Err(unconfirmed(&standing, &envelope)),
    }
    let event = |status| {
        let event = Event::new(Name::KekRotated).status(status);
        event.with("from", envelope.kid.as_str()).with("followed", order.followed)
    };
    let wanted = match &order.to {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None => provider::without_version(&envelope.kid)?,
    };
    emit(event(Status::Started).with("wanted", wanted.as_str()));
    match replace(site, order, &envelope, &pin, &wanted) {
        Ok(rotated) => {
            let event = event(Status::Succeeded);
            emit(match &rotated {
                Some(rotated) => event
                    .with("to", rotated.rewrapped.envelope.kid.as_str())
                    .with("rekeyed", order.rekey),
                None => event.with("to", envelope.kid.as_str()).with("changed", false),
            });
            Ok(rotated)
        }
        Err(error) => {
            emit(event(Status::Failed).with("error", error.to_string()));
            Err(error)
        }
    }
}

fn replace(
    site: &Site<'_>,
    order: &Order,
    envelope: &Envelope,
    pin: &Pin,
    wanted: &str,
) -> Result<Option<Rotated>> {
    let of = |kid: &str| settings::provider(site.config, kid);
    let (old, new) = (of(&envelope.kid)?, of(wanted)?);
    let new_key = NewKey {
        provider: &*new,
        url: wanted,
        algorithm: order.algorithm,
        follow: if order.to.is_none() || order.followed {
            Some(envelope.follow_versions)
        } else {
            None
        },
        forget_earlier: order.rekey,
    };
    let settings = settings::requirements(site.config, wanted, !pin.requirements);
    let rewrapped = rewrap(&*old, envelope, pin.pinned(), &new_key, &settings, LIMIT);
    let rewrapped = match rewrapped {
        Ok(Some(rewrapped)) => rewrapped,
        Ok(None) => return Ok(None),
        Err(refusal) => return Err(volume::name_the_service(refusal.error, wanted)),
    };
    let kid = &rewrapped.envelope.kid;
    let confirm =
        |kid: &str, next| pins::confirm(site.config_dir, &site.info.uuid, site.back, kid, next);
    confirm(&envelope.kid, Some(kid))?;
    rewrapped.envelope.save(site.dir)?;
    // Either is confirmed until then, so a failure here is none of the rotation.
    if let Err(error) = confirm(kid, None) {
        log::warn!("{error}");
    }
    if order.rekey {
        Envelope::remove_previous(site.dir).map_err(|error| {
            Error::new(
                error.kind,
                format!(
                    "the volume has its new key {kid}, but {PREVIOUS_FILE} is still there, which \
                     the old one opens: {error}"
                ),
            )
        })?;
    }
    Ok(Some(Rotated { rewrapped, provider: new }))
}

/// For the verb's answer.
pub fn outcome(
    info: &VolumeInfo,
    before: &str,
    rotated: Option<&Rotated>,
    dir: &NodeRef,
) -> Result<Value> {
    let envelope = Envelope::load(dir)?;
    Ok(json!({
        "volume": hex::uuid(&info.uuid),
        "from": before,
        "to": envelope.kid,
        "changed": rotated.is_some(),
        "algorithm": envelope.algorithm.name(),
        "follows_new_versions": envelope.follow_versions,
        "warnings": rotated.map(warnings).unwrap_or_default(),
    }))
}

/// What the new key's check warned of, a line each.
fn warnings(rotated: &Rotated) -> Vec<String> {
    let rows = rotated.rewrapped.report.warnings();
    rows.map(|row| format!("{}: {}; {}", row.requirement, row.found, row.fix)).collect()
}

pub fn algorithm(name: &str) -> Result<Algorithm> {
    Algorithm::from_name(name).ok_or_else(|| {
        let known: Vec<_> = Algorithm::ALL.iter().map(|algorithm| algorithm.name()).collect();
        Error::usage(format!("no such algorithm: {name}; there are {}", known.join(", ")))
    })
}

/// Why a volume that is not where this host knows it, or not with the key, stays shut.
pub fn unconfirmed(standing: &Standing, envelope: &Envelope) -> Error {
    let kid = &envelope.kid;
    let message = match standing {
        Standing::OtherKey(known) => format!(
            "the envelope names the key version {kid}, but this volume was last opened here with \
             {known}: if an older copy was restored, confirm it with `byokfs revalidate MNT \
             --accept-key {kid}`; if not, somebody has replaced the envelope"
        ),
        Standing::Elsewhere | Standing::Confirmed => format!(
            "this volume was never opened here, with key version {kid}: it is a copy, or was \
             moved; confirm it with `byokfs revalidate MNT`"
        ),
    };
    Error::new(Kind::Denied, message)
}

/// Refuses an envelope that is not the one that this host knows at its place.
pub fn expect_confirmed(site: &Site<'_>, envelope: &Envelope) -> Result<()> {
    let pin = pins::read(site.config_dir, &site.info.uuid)?;
    match pin.standing(site.back, &envelope.kid) {
        Standing::Confirmed => Ok(()),
        standing => Err(unconfirmed(&standing, envelope)),
    }
}

/// One key version that this volume, or a copy of it, needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeededKey {
    pub kid: String,
    pub role: Role,
    pub from: Option<String>,
    pub until: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The volume is opened with it.
    Current,
    /// `envelope.prev.json` is, should `envelope.json` be lost.
    Previous,
    /// Copies of the volume are that were made while it was the current one.
    Copies,
}

impl Role {
    pub const fn name(self) -> &'static str {
        match self {
            Role::Current => "current",
            Role::Previous => "previous",
            Role::Copies => "copies",
        }
    }
}

impl NeededKey {
    pub fn json(&self) -> Value {
        json!({
            "kid": self.kid, "role": self.role.name(), "from": self.from, "until": self.until,
        })
    }
}

/// Every key version that is still needed, the current one first, then from new to old.
pub fn needed(dir: &NodeRef, info: &VolumeInfo) -> Result<Vec<NeededKey>> {
    let envelope = Envelope::load(dir)?;
    volume::expect_own_envelope(&envelope, info)?;
    // What another volume is opened with this one does not need.
    let previous = Envelope::load_previous(dir)?.filter(|previous| previous.volume == info.uuid);
    let mut keys = vec![NeededKey {
        kid: envelope.kid.clone(),
        role: Role::Current,
        from: Some(envelope.created.clone()),
        until: None,
    }];
    let is_previous = |kid: &str| previous.as_ref().is_some_and(|previous| previous.kid == kid);
    for earlier in envelope.earlier.iter().rev() {
        let known = keys.iter().any(|key| key.kid == earlier.kid && key.role == Role::Previous);
        let role = if is_previous(&earlier.kid) && !known { Role::Previous } else { Role::Copies };
        keys.push(NeededKey {
            kid: earlier.kid.clone(),
            role,
            from: Some(earlier.from.clone()),
            until: Some(earlier.until.clone()),
        });
    }
    // One that was forgotten, or of an update that a crash cut short.
    if let Some(previous) = previous
        && !keys.iter().any(|key| key.kid == previous.kid)
    {
        keys.push(NeededKey {
            kid: previous.kid,
            role: Role::Previous,
            from: Some(previous.created),
            until: None,
        });
    }
    Ok(keys)
}

/// Takes a key version off the list; `no_copies` is the operator's word that no copy of the volume
/// needs it. What the volume itself needs is never forgotten.
pub fn forget(site: &Site<'_>, kid: &str, no_copies: bool) -> Result<()> {
    let keys = needed(site.dir, site.info)?;
    let mut envelope = Envelope::load(site.dir)?;
    // Of an envelope of old that was put back here it would be the key in use that is forgotten.
    expect_confirmed(site, &envelope)?;
    let refused =
        |why: String| Err(Error::new(Kind::Busy, format!("{kid} is still needed: {why}")));
    let of_kid: Vec<&NeededKey> = keys.iter().filter(|key| key.kid == kid).collect();
    let has = |role| of_kid.iter().any(|key| key.role == role);
    if of_kid.is_empty() {
        let volume = hex::uuid(&site.info.uuid);
        let message =
            format!("{kid} is not a key version of volume {volume}: see `byokfs info --keys`");
        return Err(Error::usage(message));
    }
    if has(Role::Current) {
        return refused(
            "the volume is opened with it; `byokfs rotate kek` gives it another".into(),
        );
    }
    if has(Role::Previous) {
        return refused(format!(
            "{PREVIOUS_FILE} is; after the next `byokfs rotate kek` it is not"
        ));
    }
    if !no_copies {
        let times: Vec<String> = of_kid
            .iter()
            .map(|key| {
                let text = |time: &Option<String>| time.clone().unwrap_or_else(|| "?".into());
                format!("{} to {}", text(&key.from), text(&key.until))
            })
            .collect();
        return refused(format!(
            "copies of the volume that were made {} are opened with it; if there are none any \
             more, say so with --no-copies",
            times.join(" and ")
        ));
    }
    envelope.earlier.retain(|earlier| earlier.kid != kid);
    envelope.save_in_place(site.dir)?;
    emit(Event::new(Name::KeyForgotten).with("kek", kid));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Backing;
    use crate::backing::linux::LinuxBacking;
    use crate::key::envelope::{Canary, EarlierKey};

    fn envelope(kid: &str, earlier: &[&str]) -> Envelope {
        let earlier = earlier.iter().map(|kid| EarlierKey {
            kid: (*kid).to_owned(),
            from: "2026-01-01T00:00:00Z".into(),
            until: "2026-02-01T00:00:00Z".into(),
        });
        Envelope {
            volume: [1; 16],
            provider: "azure".into(),
            kid: kid.into(),
            algorithm: Algorithm::RsaOaep256,
            follow_versions: false,
            volume_key_id: 1,
            wrapped_volume_key: vec![1],
            fingerprint: [1; 32],
            retiring: None,
            canary: Canary { wrapped: vec![1], sha256: [1; 32] },
            created: "2026-03-01T00:00:00Z".into(),
            earlier: earlier.collect(),
        }
    }

    const INFO: VolumeInfo =
        VolumeInfo { uuid: [1; 16], format: 0, features: 0, created: 0, damaged_copy: false };

    fn pin(config_dir: &Path, back: &Path, kid: &str) {
        let pin = Pin {
            fingerprint: [1; 32],
            fingerprint_next: None,
            requirements: true,
            places: Some(Vec::new()),
            escrow: None,
        };
        pins::create(config_dir, &INFO.uuid, &pin).unwrap();
        pins::confirm(config_dir, &INFO.uuid, back, kid, None).unwrap();
    }

    #[test]
    fn only_what_copies_alone_need_can_be_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let backing = LinuxBacking::open(dir.path()).unwrap();
        let root = backing.root();
        envelope("k/2", &["k/1"]).save(&root).unwrap();
        envelope("k/3", &["k/0", "k/1", "k/2"]).save(&root).unwrap();
        let roles = || -> Vec<_> {
            needed(&root, &INFO).unwrap().into_iter().map(|key| (key.kid, key.role)).collect()
        };
        let of = |kid: &str, role| (kid.to_owned(), role);
        let (current, previous) = (of("k/3", Role::Current), of("k/2", Role::Previous));
        let copies = [of("k/1", Role::Copies), of("k/0", Role::Copies)];
        assert_eq!(roles(), [&[current.clone(), previous.clone()][..], &copies].concat());

        let config = Config::default();
        let (dir, back) = (&root, dir.path());
        pin(back, back, "k/3");
        let site = Site { dir, back, info: &INFO, config: &config, config_dir: back };
        for kid in ["k/3", "k/2"] {
            assert_eq!(forget(&site, kid, true).unwrap_err().kind, Kind::Busy, "{kid}");
        }
        assert_eq!(forget(&site, "k/1", false).unwrap_err().kind, Kind::Busy);
        assert_eq!(forget(&site, "k/9", true).unwrap_err().kind, Kind::Usage);
        forget(&site, "k/1", true).unwrap();
        assert_eq!(roles(), [current, previous, of("k/0", Role::Copies)]);
    }

    #[test]
    fn nothing_is_forgotten_of_an_envelope_that_is_not_the_known_one() {
        let dir = tempfile::tempdir().unwrap();
        let root = LinuxBacking::open(dir.path()).unwrap().root();
        let config = Config::default();
        let back = dir.path();
        let site = Site { dir: &root, back, info: &INFO, config: &config, config_dir: back };
        let refused = |kind, why: &str| {
            let before = Envelope::load(&root).unwrap();
            let error = forget(&site, "k/1", true).unwrap_err();
            assert_eq!(error.kind, kind, "{error}");
            assert!(error.to_string().contains(why), "{error}");
            assert_eq!(Envelope::load(&root).unwrap(), before);
        };
        envelope("k/2", &["k/1"]).save(&root).unwrap();
        refused(Kind::Denied, "no pin");
        pin(back, back, "k/3");
        refused(Kind::Denied, "replaced the envelope");
        pins::confirm(back, &INFO.uuid, back, "k/2", None).unwrap();
        Envelope { volume: [2; 16], ..envelope("k/2", &["k/1"]) }.save(&root).unwrap();
        refused(Kind::Corrupt, "the envelope belongs to volume");
        assert_eq!(needed(&root, &INFO).unwrap_err().kind, Kind::Corrupt);
        // Nor is the predecessor of another volume's one that this one needs.
        envelope("k/4", &[]).save(&root).unwrap();
        assert_eq!(needed(&root, &INFO).unwrap().len(), 1);
        envelope("k/2", &["k/1"]).save(&root).unwrap();
        forget(&site, "k/1", true).unwrap();
    }
}
