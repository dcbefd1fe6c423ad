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
use crate::error::Result;
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

/// At a mount that may write: a rotation that a crash ended before its last step ends here.
pub fn settle(
    config_dir: &Path,
    uuid: &[u8; 16],
    pin: &Pin,
    (envelope, dir): (&Envelope, &NodeRef),
    keyring: &Keyring,
) -> Result<()> {
    if envelope.retiring.is_some() {
        log::warn!(
            "the volume is between two volume keys: unmount it and finish `byokfs rotate volume`"
        );
        return Ok(());
    }
    let fingerprint = keyring.fingerprint()?;
    if pin.fingerprint_next == Some(fingerprint) {
        finish(config_dir, uuid, dir, fingerprint, envelope.volume_key_id.saturating_sub(1))?;
    }
    Ok(())
}

/// What is left to do once the envelope names no other volume key than that with `fingerprint`.
fn finish(
    config_dir: &Path,
    uuid: &[u8; 16],
    dir: &NodeRef,
    fingerprint: [u8; 32],
    old: u32,
) -> Result<()> {
    Envelope::remove_previous(dir)?;
    pins::end_volume_key(config_dir, uuid, fingerprint, old)
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
            let old = envelope.volume_key_id.saturating_sub(1);
            finish(config_dir, uuid, &dir, renewal.retired, old)?;
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

    Envelope { retiring: None, ..envelope.clone() }.save_in_place(&dir)?;
    finish(config_dir, uuid, &dir, fingerprint, from)?;
    Ok(Outcome { from, to: envelope.volume_key_id, adopted, resumed })
}
