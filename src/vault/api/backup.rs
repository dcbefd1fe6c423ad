//! Backup and restore of a key with all of its versions, as one sealed value.
//!
//! The value opens in this vault only (or one with its root key and id), as a backup of the real
//! service opens only within its own subscription and geography.

use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;

use super::keys::live_key;
use super::{Call, MAX_BODY, Reply, Vault};
use crate::vault::audit::Event;
use crate::vault::codec;
use crate::vault::material::PublicNumbers;
use crate::vault::refusal::Refusal;
use crate::vault::store::keys::{self, Attributes, VersionRecord};
use crate::vault::wire::{KeyType, ValueRequest, is_key_name, is_version, key_operations};

const PLACE: [&str; 1] = ["key backup"];
/// Versions in one backup, as many as fit a request unless their tags are long.
const MAX_VERSIONS: usize = 500;
/// What a request to restore has beside the value.
const AROUND_VALUE: usize = 1024;

#[derive(Serialize, Deserialize)]
struct Backup {
    name: String,
    versions: Vec<BackupVersion>,
}

/// The private key stays sealed as it is in the database.
#[derive(Serialize, Deserialize)]
struct BackupVersion {
    version: String,
    kty: String,
    /// Absent in backups of RSA keys by earlier versions, whose modulus tells.
    bits: Option<u32>,
    /// Empty for a symmetric key, as is `e`.
    n: String,
    e: String,
    private: String,
    key_ops: Vec<String>,
    tags: BTreeMap<String, String>,
    enabled: bool,
    nbf: Option<i64>,
    exp: Option<i64>,
    created: i64,
    updated: i64,
}

impl Vault {
    pub(super) fn backup_key(&self, name: &str) -> Result<Reply, Refusal> {
        let backup = self.store.read(|tx| {
            let key = live_key(tx, name)?;
            let mut versions = Vec::new();
            let records = keys::versions(tx, &key, 0, MAX_VERSIONS + 1)?;
            if records.len() > MAX_VERSIONS {
                return Err(Refusal::bad_parameter(format!(
                    "A key with more than {MAX_VERSIONS} versions cannot be backed up."
                )));
            }
            for version in records {
                let private = keys::private(tx, version.id)?;
                versions.push(to_backup(version, &private));
            }
            Ok::<_, Refusal>(Backup { name: key.name, versions })
        })?;
        let text = serde_json::to_vec(&backup).map_err(|error| {
            log::error!("cannot write a backup: {error}");
            Refusal::internal()
        })?;
        let value = codec::to_base64url(&self.sealer.seal(&PLACE, &text)?);
        // A backup that no request can bring back is none.
        if value.len() > MAX_BODY - AROUND_VALUE {
            return Err(Refusal::bad_parameter(
                "A key with so many versions and tags cannot be backed up.",
            ));
        }
        Ok(Reply::ok(&json!({ "value": value })))
    }

    pub(super) fn restore_key(&self, call: &Call<'_>, event: &mut Event) -> Result<Reply, Refusal> {
        let request: ValueRequest = call.body()?;
        let unusable =
            || Refusal::bad_parameter("The value is not a key backup of this key vault.");
        let sealed = codec::from_base64url(&request.value).ok_or_else(unusable)?;
        let text = self.sealer.open_large(&PLACE, &sealed).map_err(|_| unusable())?;
        let backup: Backup = serde_json::from_slice(&text).map_err(|_| unusable())?;
        if !is_key_name(&backup.name) || backup.versions.is_empty() {
            return Err(unusable());
        }
        event.key = Some(backup.name.clone());
        let name = backup.name.as_str();
        let mut versions = Vec::new();
        for version in backup.versions {
            versions.push(from_backup(version).ok_or_else(unusable)?);
        }
        for (record, private) in &versions {
            self.sealer.open_private(name, &record.version, private).map_err(|_| unusable())?;
        }
        self.store.write(|tx| {
            match keys::find(tx, name)? {
                Some(key) if key.deleted.is_some() => {
                    return Err(Refusal::deleted_but_recoverable(name));
                }
                Some(_) => return Err(Refusal::already_exists("Key", name)),
                None => {}
            }
            let key = keys::insert(tx, name)?;
            for (record, private) in &mut versions {
                keys::insert_version(tx, &key, record, private)?;
            }
            Ok(())
        })?;
        let (newest, _) = versions.last().ok_or_else(unusable)?;
        event.version = Some(newest.version.clone());
        Ok(Reply::ok(&self.wire(call).bundle(name, newest)))
    }
}

fn to_backup(version: VersionRecord, private: &[u8]) -> BackupVersion {
    BackupVersion {
        version: version.version,
        kty: version.kty.name().to_owned(),
        bits: Some(version.bits),
        n: version.public.as_ref().map_or(String::new(), |one| codec::to_base64url(&one.modulus)),
        e: version.public.as_ref().map_or(String::new(), |one| codec::to_base64url(&one.exponent)),
        private: codec::to_base64url(private),
        key_ops: version.operations.iter().map(|operation| operation.name().to_owned()).collect(),
        tags: version.tags,
        enabled: version.attributes.enabled,
        nbf: version.attributes.nbf,
        exp: version.attributes.exp,
        created: version.created,
        updated: version.updated,
    }
}

fn from_backup(backup: BackupVersion) -> Option<(VersionRecord, Vec<u8>)> {
    if !is_version(&backup.version) {
        return None;
    }
    let kty = KeyType::from_name(&backup.kty)?;
    let public = PublicNumbers {
        modulus: codec::from_base64url(&backup.n)?,
        exponent: codec::from_base64url(&backup.e)?,
    };
    let bits = match backup.bits {
        Some(bits) => bits,
        None => u32::try_from(public.modulus.len() * 8).ok()?,
    };
    let record = VersionRecord {
        id: 0,
        version: backup.version,
        kty,
        bits,
        public: kty.is_rsa().then_some(public),
        operations: key_operations(&backup.key_ops).ok()?,
        tags: backup.tags,
        attributes: Attributes { enabled: backup.enabled, nbf: backup.nbf, exp: backup.exp },
        created: backup.created,
        updated: backup.updated,
    };
    Some((record, codec::from_base64url(&backup.private)?))
}
