//! Rotation: by request, and by the key's policy.

use rusqlite::Transaction;
use serde_json::json;

use super::keys::{Blueprint, NewVersion, live_key, live_version};
use super::{Call, Reply, Vault};
use crate::error::Result;
use crate::vault::audit::{Event, Outcome};
use crate::vault::codec;
use crate::vault::refusal::Refusal;
use crate::vault::rotation::RotationPolicy;
use crate::vault::store::keys::{self, Attributes, KeyRecord};

impl Vault {
    pub(super) fn rotate_key(
        &self,
        call: &Call<'_>,
        name: &str,
        event: &mut Event,
    ) -> Result<Reply, Refusal> {
        let made = self.next_version(name, call.now)?;
        Ok(self.show_new(call, &made, event))
    }

    /// A new version like the newest one; its expiry is the policy's.
    fn next_version(&self, name: &str, now: i64) -> Result<NewVersion, Refusal> {
        let (newest, policy) = self.store.read(|tx| {
            let (key, newest) = live_version(tx, name, None)?;
            Ok::<_, Refusal>((newest, stored_policy(tx, &key)?))
        })?;
        let (kty, bits) = (newest.kty, newest.bits);
        let exp = policy.and_then(|policy| policy.expiry(now));
        let blueprint = Blueprint {
            kty,
            operations: newest.operations,
            attributes: Attributes { enabled: true, nbf: None, exp },
            tags: newest.tags,
        };
        let material = || self.generate(kty, bits);
        self.add_version(name, now, blueprint, material, |tx| live_key(tx, name).map(Some))
    }

    pub(super) fn get_rotation_policy(
        &self,
        call: &Call<'_>,
        name: &str,
    ) -> Result<Reply, Refusal> {
        let (key, policy) = self.store.read(|tx| {
            let key = live_key(tx, name)?;
            let policy = stored_policy(tx, &key)?;
            Ok::<_, Refusal>((key, policy))
        })?;
        let policy = policy.unwrap_or_else(RotationPolicy::default_policy);
        self.policy_reply(call, &key, &policy)
    }

    pub(super) fn set_rotation_policy(
        &self,
        call: &Call<'_>,
        name: &str,
    ) -> Result<Reply, Refusal> {
        let mut policy: RotationPolicy = call.body()?;
        policy.check()?;
        let (key, policy) = self.store.write(|tx| {
            let key = live_key(tx, name)?;
            let before = stored_policy(tx, &key)?;
            policy.attributes.created =
                before.and_then(|before| before.attributes.created).or(Some(call.now));
            policy.attributes.updated = Some(call.now);
            let text = serde_json::to_string(&policy).map_err(unwritable)?;
            keys::set_rotation_policy(tx, &key, &text)?;
            Ok::<_, Refusal>((key, policy))
        })?;
        self.policy_reply(call, &key, &policy)
    }

    fn policy_reply(
        &self,
        call: &Call<'_>,
        key: &KeyRecord,
        policy: &RotationPolicy,
    ) -> Result<Reply, Refusal> {
        let mut value = serde_json::to_value(policy).map_err(unwritable)?;
        value["id"] = json!(format!("{}/rotationpolicy", self.wire(call).key_url(&key.name)));
        Ok(Reply::ok(&value))
    }

    /// Rotates the keys whose policy says so; one that cannot be rotated is tried again later.
    pub(crate) fn rotate_due(&self) -> Result<()> {
        let now = (self.clock)();
        let due: Vec<String> = self.store.read(|tx| {
            let mut due = Vec::new();
            for (key, text) in keys::with_rotation_policy(tx)? {
                let Some(newest) = keys::find_version(tx, &key, None)? else { continue };
                let is_due = parse(&key, &text).is_some_and(|policy| {
                    policy.is_due(newest.created, newest.attributes.exp, now)
                });
                // What its owner has disabled is not replaced behind his back.
                if is_due && newest.attributes.enabled {
                    due.push(key.name);
                }
            }
            Ok::<_, crate::Error>(due)
        })?;
        for name in due {
            let made = self.next_version(&name, now);
            let (status, reason, version) = match &made {
                Ok(made) => (200, None, Some(made.version.version.clone())),
                Err(refusal) => (refusal.status, Some(refusal.reason()), None),
            };
            let event = Event {
                operation: "KeyRotateByPolicy",
                key: Some(name),
                version,
                ..Event::default()
            };
            let request_id = codec::new_uuid()?;
            let outcome = Outcome { status, reason, request_id: &request_id, ..Outcome::default() };
            self.audit.record(&event, &outcome, now);
        }
        Ok(())
    }
}

fn stored_policy(tx: &Transaction<'_>, key: &KeyRecord) -> Result<Option<RotationPolicy>, Refusal> {
    match keys::rotation_policy(tx, key)? {
        None => Ok(None),
        Some(text) => parse(key, &text).map(Some).ok_or_else(Refusal::internal),
    }
}

fn parse(key: &KeyRecord, text: &str) -> Option<RotationPolicy> {
    serde_json::from_str(text)
        .map_err(|_| log::error!("the rotation policy of {} is damaged", key.name))
        .ok()
}

fn unwritable(error: serde_json::Error) -> Refusal {
    log::error!("cannot write a rotation policy: {error}");
    Refusal::internal()
}
