//! Giving a volume another volume key: `byokfs rotate volume`.
//!
//! Whoever has had the volume key in his hands opens every file of the volume with it, those of
//! later too, however often KEK and DEKs are rotated. In this order, so that a crash at any point
//! leaves a volume that mounts and a rotation that can be gone on with:
//!
//! 1. the pin accepts the new volume key besides the old one;
//! 2. the envelope has the new one, and the old one as retiring;
//! 3. the store names nothing but the new one;
//! 4. the envelope forgets the old one, and so does its predecessor, which is removed;
//! 5. the pin accepts the new one only.

use std::path::Path;
use std::time::Duration;

use super::offline::Offline;
use super::pins::{self, Pin};
use super::volume::name_the_service;
use crate::backing::NodeRef;
use crate::error::{Kind, Result};
use crate::key::custody;
use crate::key::envelope::Envelope;
use crate::key::gate::Keyring;
use crate::observe::audit::{Event, Name, Status, emit};
use crate::store::Adopted;

use super::settings;

/// For the conversation with the key service.
const LIMIT: Duration = Duration::from_secs(60);

/// What a rotation did.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    pub from: u32,
    pub to: u32,
    pub adopted: Adopted,
    /// It was begun by an earlier one.
    pub resumed: bool,
}

/// `told` hears of each file whose header was rewritten.
pub fn rotate(volume: &Offline, told: &mut dyn FnMut(u64)) -> Result<Outcome> {
    let event = |status| Event::new(Name::VolumeKeyRotated).status(status);
    emit(event(Status::Started));
    match carry_out(volume, told) {
        Ok(outcome) => {
            emit(
                event(Status::Succeeded)
                    .with("from", outcome.from)
                    .with("to", outcome.to)
                    .with("files", outcome.adopted.files)
                    .with("unreadable_files", outcome.adopted.unreadable),
            );
            Ok(outcome)
        }
        Err(error) => {
            emit(event(Status::Failed).with("error", error.to_string()));
            Err(error)
        }
    }
}

/// At a mount: a rotation that a crash ended before its last step ends here, unless something of it
/// is left on a disk that is mounted read-only.
pub fn settle(
    config_dir: &Path,
    uuid: &[u8; 16],
    pin: &Pin,
    (envelope, dir): (&Envelope, &NodeRef),
    keyring: &Keyring,
    read_only: bool,
) -> Result<()> {
    if envelope.retiring.is_some() {
        log::warn!(
            "the volume is between two volume keys: unmount it and finish `byokfs rotate volume`"
        );
        return Ok(());
    }
    let fingerprint = keyring.fingerprint()?;
    if pin.fingerprint_next != Some(fingerprint) {
        return Ok(());
    }
    if read_only && predecessor_has_older_key(dir, envelope)? {
        log::warn!(
            "the old volume key still opens this volume until it is mounted to be written to"
        );
        return Ok(());
    }
    finish(config_dir, uuid, (envelope, dir), fingerprint)
}

/// What is left to do once the envelope names no other volume key than that with `fingerprint`.
fn finish(
    config_dir: &Path,
    uuid: &[u8; 16],
    (envelope, dir): (&Envelope, &NodeRef),
    fingerprint: [u8; 32],
) -> Result<()> {
    if predecessor_has_older_key(dir, envelope)? {
        Envelope::remove_previous(dir)?;
    }
    let old = envelope.volume_key_id.saturating_sub(1);
    pins::end_volume_key(config_dir, uuid, fingerprint, old)
}

/// Not so after a later rotation of the KEK; nor is it if the predecessor is all that is left.
fn predecessor_has_older_key(dir: &NodeRef, envelope: &Envelope) -> Result<bool> {
    match Envelope::load_previous(dir) {
        Ok(None) => Ok(false),
        Ok(Some(previous)) => Ok(previous.volume_key_id < envelope.volume_key_id),
        Err(error) if error.kind == Kind::Io => Err(error),
        // Who can tell what a part of it is good for.
        Err(_) => Ok(true),
    }
}

fn carry_out(volume: &Offline, told: &mut dyn FnMut(u64)) -> Result<Outcome> {
    let (mut envelope, provider) = volume.envelope()?;
    let dir = volume.dir();
    let (config_dir, uuid) = (volume.config_dir(), &volume.info.uuid);
    let resumed = envelope.retiring.is_some();
    if !resumed {
        let tolerant = !volume.pin.requirements;
        let settings = settings::requirements(&volume.config, &envelope.kid, tolerant);
        let renewal = custody::renew(&*provider, &envelope, volume.pin.pinned(), &settings, LIMIT)
            .map_err(|refusal| name_the_service(refusal.error, &envelope.kid))?;
        // The pin has room for two: one that a crash has left there must not take the place of the
        // key that is in use.
        if volume.pin.fingerprint_next == Some(renewal.retired) {
            finish(config_dir, uuid, (&envelope, &dir), renewal.retired)?;
        }
        envelope = renewal.envelope;
        pins::begin_volume_key(config_dir, uuid, envelope.fingerprint)?;
        envelope.save(&dir)?;
    }
    let from = envelope.retiring.as_ref().map_or(0, |old| old.id);
    let key = volume.key()?;
    let fingerprint = key.fingerprint()?;
    volume.recover()?;
    let adopted = volume.store.adopt_volume_key(told)?;
    volume.close()?;
    drop(key);

    envelope.retiring = None;
    envelope.save_in_place(&dir)?;
    finish(config_dir, uuid, (&envelope, &dir), fingerprint)?;
    Ok(Outcome { from, to: envelope.volume_key_id, adopted, resumed })
}
