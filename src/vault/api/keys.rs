//! Keys and versions: create, get, list, update, rotate, delete.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use aws_lc_rs::rsa::{KeyPairComponents, PublicKeyComponents};
use rusqlite::Transaction;

use super::byok;
use super::paging::Page;
use super::{Call, Reply, Vault};
use crate::crypto::secret::SecretBytes;
use crate::vault::audit::Event;
use crate::vault::codec;
use crate::vault::material::{KeyMaterial, PrivateKey, key_size};
use crate::vault::refusal::Refusal;
use crate::vault::settings::Flavor;
use crate::vault::store::keys::{self, Attributes, DeletedState, KeyRecord, VersionRecord};
use crate::vault::wire::{
    AttributesPatch, CreateRequest, ImportRequest, KeyOperation, KeyType, UpdateRequest,
    check_tags, key_operations,
};

/// As the real service.
const DEFAULT_KEY_SIZE: u64 = 2048;
const DEFAULT_SYMMETRIC_SIZE: u64 = 256;
const PUBLIC_EXPONENT: u64 = 65537;
const SECONDS_PER_DAY: i64 = 86400;
/// Requests at a time that make a key or wait to.
const MAX_GENERATIONS: usize = 16;

/// A version to be made, all but its material.
#[derive(Clone)]
pub(super) struct Blueprint {
    pub(super) kty: KeyType,
    pub(super) operations: Vec<KeyOperation>,
    pub(super) attributes: Attributes,
    pub(super) tags: BTreeMap<String, String>,
}

pub(super) struct NewVersion {
    pub(super) key: KeyRecord,
    pub(super) version: VersionRecord,
}

/// The key, which must be there and not deleted.
pub(super) fn live_key(tx: &Transaction<'_>, name: &str) -> Result<KeyRecord, Refusal> {
    keys::find(tx, name)?
        .filter(|key| key.deleted.is_none())
        .ok_or_else(|| Refusal::key_not_found(name))
}

/// A version of it, or the newest.
pub(super) fn live_version(
    tx: &Transaction<'_>,
    name: &str,
    version: Option<&str>,
) -> Result<(KeyRecord, VersionRecord), Refusal> {
    let key = live_key(tx, name)?;
    let record = keys::find_version(tx, &key, version)?.ok_or_else(|| {
        Refusal::key_not_found(&match version {
            Some(version) => format!("{name}/{version}"),
            None => name.to_owned(),
        })
    })?;
    Ok((key, record))
}

/// The key that gets a new version, None for a new key; a deleted one keeps its name.
fn new_or_live(tx: &Transaction<'_>, name: &str) -> Result<Option<KeyRecord>, Refusal> {
    match keys::find(tx, name)? {
        Some(key) if key.deleted.is_some() => Err(Refusal::deleted_but_recoverable(name)),
        found => Ok(found),
    }
}

impl Vault {
    pub(super) fn create_key(
        &self,
        call: &Call<'_>,
        name: &str,
        event: &mut Event,
    ) -> Result<Reply, Refusal> {
        let (bits, blueprint) = blueprint(call.body()?, self.settings.flavor)?;
        let material = || self.generate(blueprint.kty, bits);
        let made = self
            .add_version(name, call.now, blueprint.clone(), material, |tx| new_or_live(tx, name))?;
        Ok(self.show_new(call, &made, event))
    }

    pub(super) fn import_key(
        &self,
        call: &Call<'_>,
        name: &str,
        event: &mut Event,
    ) -> Result<Reply, Refusal> {
        let (source, blueprint) = imported(call.body()?, self.settings.flavor)?;
        let unusable = || {
            Refusal::bad_parameter(
                "The key is not a valid RSA key of 2048, 3072 or 4096 bits with the exponent \
                 65537.",
            )
        };
        let material = || {
            let found = match &source {
                Source::Components(components) => PrivateKey::from_components(components)?,
                Source::Transfer(blob) => {
                    let pkcs8 = self.open_transfer(call, blob)?;
                    byok::private_key(&pkcs8)?
                }
            };
            let (key, pkcs8) = found.ok_or_else(unusable)?;
            Ok((KeyMaterial::Rsa(Box::new(key)), pkcs8))
        };
        let made =
            self.add_version(name, call.now, blueprint, material, |tx| new_or_live(tx, name))?;
        Ok(self.show_new(call, &made, event))
    }

    /// `find` says, before the work and again when it is to be committed, which key gets the
    /// version: None for a new one.
    pub(super) fn add_version(
        &self,
        name: &str,
        now: i64,
        blueprint: Blueprint,
        material: impl FnOnce() -> Result<(KeyMaterial, SecretBytes), Refusal>,
        find: impl Fn(&Transaction<'_>) -> Result<Option<KeyRecord>, Refusal>,
    ) -> Result<NewVersion, Refusal> {
        self.store.read(|tx| find(tx))?;
        let version = codec::new_version()?;
        let (private, bytes) = material()?;
        let sealed = self.sealer.seal_private(name, &version, bytes.expose())?;
        drop(bytes);
        let mut record = VersionRecord {
            id: 0,
            version,
            kty: blueprint.kty,
            bits: private.bits(),
            public: private.public_numbers(),
            operations: blueprint.operations,
            tags: blueprint.tags,
            attributes: blueprint.attributes,
            created: now,
            updated: now,
        };
        let key = self.store.write(|tx| {
            let key = match find(tx)? {
                Some(key) => key,
                None => keys::insert(tx, name)?,
            };
            keys::insert_version(tx, &key, &mut record, &sealed)?;
            Ok::<_, Refusal>(key)
        })?;
        self.remember_material(record.id, Arc::new(private));
        Ok(NewVersion { key, version: record })
    }

    pub(super) fn show_new(&self, call: &Call<'_>, made: &NewVersion, event: &mut Event) -> Reply {
        event.version = Some(made.version.version.clone());
        Reply::ok(&self.wire(call).bundle(&made.key.name, &made.version))
    }

    /// One key at a time. Only a few requests may wait: they hold threads that others need.
    pub(super) fn generate(
        &self,
        kty: KeyType,
        bits: u32,
    ) -> Result<(KeyMaterial, SecretBytes), Refusal> {
        struct Place<'a>(&'a AtomicUsize);
        impl Drop for Place<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let before = self.generations.fetch_add(1, Ordering::Relaxed);
        let _place = Place(&self.generations);
        if before >= MAX_GENERATIONS {
            return Err(Refusal::throttled());
        }
        let _turn = self.generating.lock();
        Ok(KeyMaterial::generate(kty, bits)?)
    }

    pub(super) fn get_key(
        &self,
        call: &Call<'_>,
        name: &str,
        version: Option<&str>,
        event: &mut Event,
    ) -> Result<Reply, Refusal> {
        let (key, record) = self.store.read(|tx| live_version(tx, name, version))?;
        event.version = Some(record.version.clone());
        Ok(Reply::ok(&self.wire(call).bundle(&key.name, &record)))
    }

    pub(super) fn update_key(
        &self,
        call: &Call<'_>,
        name: &str,
        version: Option<&str>,
        event: &mut Event,
    ) -> Result<Reply, Refusal> {
        let update: UpdateRequest = call.body()?;
        refuse_release_policy(update.release_policy.is_some())?;
        let operations = update.key_ops.as_deref().map(key_operations).transpose()?;
        if let Some(tags) = &update.tags {
            check_tags(tags)?;
        }
        let (key, record) = self.store.write(|tx| {
            let (key, mut record) = live_version(tx, name, version)?;
            update.attributes.apply(&mut record.attributes)?;
            if let Some(operations) = operations {
                refuse_other_exchange(&record.operations, &operations)?;
                record.operations = operations;
            }
            if let Some(tags) = update.tags {
                record.tags = tags;
            }
            record.updated = call.now;
            keys::update_version(tx, &record)?;
            Ok::<_, Refusal>((key, record))
        })?;
        event.version = Some(record.version.clone());
        Ok(Reply::ok(&self.wire(call).bundle(&key.name, &record)))
    }

    pub(super) fn delete_key(&self, call: &Call<'_>, name: &str) -> Result<Reply, Refusal> {
        let days = i64::from(self.settings.recovery.days);
        let deleted =
            DeletedState { date: call.now, scheduled_purge: call.now + days * SECONDS_PER_DAY };
        let (key, newest) = self.store.write(|tx| {
            let (key, newest) = live_version(tx, name, None)?;
            keys::set_deleted(tx, &key, Some(deleted))?;
            Ok::<_, Refusal>((key, newest))
        })?;
        self.forget_materials();
        Ok(Reply::ok(&self.wire(call).deleted_bundle(&key.name, &newest, deleted)))
    }

    pub(super) fn list_keys(&self, call: &Call<'_>, deleted: bool) -> Result<Reply, Refusal> {
        let page = Page::of(&call.query)?;
        let rows = self
            .store
            .read(|tx| Ok::<_, Refusal>(keys::list(tx, deleted, &page.after, page.size + 1)?))?;
        let wire = self.wire(call);
        let items = rows
            .into_iter()
            .map(|(key, newest)| {
                let item = match key.deleted {
                    Some(state) => wire.deleted_item(&key.name, &newest, state),
                    None => wire.item(&key.name, &newest, false),
                };
                (item, key.name)
            })
            .collect();
        Ok(page.reply(call, items))
    }

    pub(super) fn list_versions(&self, call: &Call<'_>, name: &str) -> Result<Reply, Refusal> {
        let page = Page::of(&call.query)?;
        let after = if page.after.is_empty() {
            0
        } else {
            page.after.parse().map_err(|_| Refusal::bad_parameter("$skiptoken is invalid."))?
        };
        let wire = self.wire(call);
        let items = self.store.read(|tx| {
            // As the real service: the list of a key that is not there is empty.
            let Some(key) = keys::find(tx, name)?.filter(|key| key.deleted.is_none()) else {
                return Ok(Vec::new());
            };
            let rows = keys::versions(tx, &key, after, page.size + 1)?;
            let item = |row: VersionRecord| (wire.item(&key.name, &row, true), row.id.to_string());
            Ok::<_, Refusal>(rows.into_iter().map(item).collect())
        })?;
        Ok(page.reply(call, items))
    }
}

fn blueprint(request: CreateRequest, flavor: Flavor) -> Result<(u32, Blueprint), Refusal> {
    refuse_release_policy(request.release_policy.is_some())?;
    let kty = key_type(request.kty.as_deref(), flavor)?;
    let bits = if kty.is_rsa() {
        let bits = request.key_size.unwrap_or(DEFAULT_KEY_SIZE);
        key_size(bits).and(u32::try_from(bits).ok()).ok_or_else(|| {
            Refusal::bad_parameter("Property 'key_size' must be 2048, 3072 or 4096.")
        })?
    } else {
        match request.key_size.unwrap_or(DEFAULT_SYMMETRIC_SIZE) {
            bits @ (128 | 192 | 256) => bits as u32,
            _ => {
                return Err(Refusal::bad_parameter("Property 'key_size' must be 128, 192 or 256."));
            }
        }
    };
    if request.public_exponent.is_some_and(|exponent| exponent != PUBLIC_EXPONENT) {
        return Err(Refusal::bad_parameter("Property 'public_exponent' must be 65537."));
    }
    let CreateRequest { key_ops, attributes, tags, .. } = request;
    Ok((bits, complete(kty, key_ops.as_deref(), &attributes, tags)?))
}

/// Where imported material comes from.
enum Source {
    Components(KeyPairComponents<Vec<u8>>),
    /// A key transfer blob: JSON, wrapped to a key of this vault.
    Transfer(Vec<u8>),
}

fn imported(request: ImportRequest, flavor: Flavor) -> Result<(Source, Blueprint), Refusal> {
    refuse_release_policy(request.release_policy.is_some())?;
    let jwk = request.key;
    // Into a Managed HSM every key comes as an HSM key.
    let as_hsm = flavor == Flavor::Mhsm || request.hsm == Some(true);
    let kty = match key_type(jwk.kty.as_deref(), Flavor::Vault)? {
        KeyType::Rsa if as_hsm => KeyType::RsaHsm,
        kty => kty,
    };
    let blueprint = complete(kty, jwk.key_ops.as_deref(), &request.attributes, request.tags)?;
    if let Some(blob) = &jwk.key_hsm {
        if kty != KeyType::RsaHsm {
            return Err(Refusal::bad_parameter("A key transfer blob holds an RSA-HSM key."));
        }
        let blob = codec::from_any_base64(blob).ok_or_else(|| {
            Refusal::bad_parameter("Property 'key_hsm' of the key is not base64.")
        })?;
        return Ok((Source::Transfer(blob), blueprint));
    }
    let number = |name: &str, text: Option<&str>| {
        text.and_then(codec::from_base64url).filter(|bytes| !bytes.is_empty()).ok_or_else(|| {
            Refusal::bad_parameter(format!("Property '{name}' of the key is missing or invalid."))
        })
    };
    // Some clients write a sign byte before the modulus.
    let unsigned = |bytes: Vec<u8>| match bytes.iter().position(|byte| *byte != 0) {
        Some(0) | None => bytes,
        Some(first) => bytes[first..].to_vec(),
    };
    let components = KeyPairComponents {
        public_key: PublicKeyComponents {
            n: unsigned(number("n", jwk.n.as_deref())?),
            e: unsigned(number("e", jwk.e.as_deref())?),
        },
        d: number("d", jwk.d.as_deref())?,
        p: number("p", jwk.p.as_deref())?,
        q: number("q", jwk.q.as_deref())?,
        dP: number("dp", jwk.dp.as_deref())?,
        dQ: number("dq", jwk.dq.as_deref())?,
        qInv: number("qi", jwk.qi.as_deref())?,
    };
    Ok((Source::Components(components), blueprint))
}

/// What may be made: a Managed HSM has no software keys.
fn key_type(name: Option<&str>, flavor: Flavor) -> Result<KeyType, Refusal> {
    let kty = name.and_then(KeyType::from_name);
    match (kty, flavor) {
        (Some(kty @ (KeyType::Rsa | KeyType::RsaHsm)), Flavor::Vault)
        | (Some(kty @ (KeyType::RsaHsm | KeyType::OctHsm)), Flavor::Mhsm) => Ok(kty),
        (_, Flavor::Vault) => {
            Err(Refusal::bad_parameter("Property 'kty' must be RSA or RSA-HSM in this vault."))
        }
        (_, Flavor::Mhsm) => Err(Refusal::bad_parameter(
            "Property 'kty' must be RSA-HSM or oct-HSM in this Managed HSM.",
        )),
    }
}

fn complete(
    kty: KeyType,
    key_ops: Option<&[String]>,
    patch: &AttributesPatch,
    tags: Option<BTreeMap<String, String>>,
) -> Result<Blueprint, Refusal> {
    let operations = match key_ops {
        Some(names) => key_operations(names)?,
        None if kty.is_rsa() => KeyOperation::USES.to_vec(),
        None => vec![KeyOperation::WrapKey, KeyOperation::UnwrapKey],
    };
    // A key exchange key does nothing else, and is never software.
    if operations.contains(&KeyOperation::Import)
        && (operations.len() > 1 || kty != KeyType::RsaHsm)
    {
        return Err(Refusal::bad_parameter(
            "The key operation 'import' is that of an RSA-HSM key and goes with no other.",
        ));
    }
    let mut attributes = Attributes { enabled: true, nbf: None, exp: None };
    patch.apply(&mut attributes)?;
    let tags = tags.unwrap_or_default();
    check_tags(&tags)?;
    Ok(Blueprint { kty, operations, attributes, tags })
}

/// The operations of a key exchange key are fixed, as at the real service: what was wrapped to it
/// must never be opened for a caller.
fn refuse_other_exchange(before: &[KeyOperation], after: &[KeyOperation]) -> Result<(), Refusal> {
    let is_exchange = |operations: &[KeyOperation]| operations.contains(&KeyOperation::Import);
    if is_exchange(before) != is_exchange(after) || (is_exchange(after) && after.len() > 1) {
        return Err(Refusal::bad_parameter(
            "The key operation 'import' is neither given to a key nor taken from it.",
        ));
    }
    Ok(())
}

fn refuse_release_policy(given: bool) -> Result<(), Refusal> {
    if given {
        return Err(Refusal::bad_parameter("Key release is not supported by this vault."));
    }
    Ok(())
}
