//! Keys and their versions in the database.
//!
//! A key is a name with one or more versions; the newest is the current one. Deleting a key
//! hides all of its versions and keeps them until the purge date.

use std::collections::BTreeMap;

use rusqlite::{OptionalExtension as _, Row, Transaction};

use super::damaged;
use crate::vault::material::PublicNumbers;
use crate::vault::wire::{KeyOperation, KeyType};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) enabled: bool,
    pub(crate) nbf: Option<i64>,
    pub(crate) exp: Option<i64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeletedState {
    pub(crate) date: i64,
    pub(crate) scheduled_purge: i64,
}

#[derive(Clone, Debug)]
pub(crate) struct KeyRecord {
    pub(crate) id: i64,
    /// As it was written when the key was created.
    pub(crate) name: String,
    pub(crate) deleted: Option<DeletedState>,
}

#[derive(Clone, Debug)]
pub(crate) struct VersionRecord {
    /// Row id: grows with every version made.
    pub(crate) id: i64,
    pub(crate) version: String,
    pub(crate) kty: KeyType,
    pub(crate) bits: u32,
    /// None: a symmetric key.
    pub(crate) public: Option<PublicNumbers>,
    pub(crate) operations: Vec<KeyOperation>,
    pub(crate) tags: BTreeMap<String, String>,
    pub(crate) attributes: Attributes,
    pub(crate) created: i64,
    pub(crate) updated: i64,
}

const VERSION_COLUMNS: &str = "version.id, version.version, version.kty, version.modulus, \
     version.exponent, version.operations, version.tags, version.enabled, version.nbf, \
     version.exp, version.created, version.updated, version.bits";

pub(crate) fn find(tx: &Transaction<'_>, name: &str) -> rusqlite::Result<Option<KeyRecord>> {
    tx.prepare_cached("SELECT id, name, deleted, scheduled_purge FROM key WHERE name = ?1")?
        .query_row([name], |row| key_record(row, 0))
        .optional()
}

/// The version asked for, or the newest.
pub(crate) fn find_version(
    tx: &Transaction<'_>,
    key: &KeyRecord,
    version: Option<&str>,
) -> rusqlite::Result<Option<VersionRecord>> {
    tx.prepare_cached(&format!(
        "SELECT {VERSION_COLUMNS} FROM version
         WHERE key_id = ?1 AND (?2 IS NULL OR version = ?2) ORDER BY id DESC LIMIT 1"
    ))?
    .query_row((key.id, version), |row| version_record(row, 0))
    .optional()
}

/// All versions, oldest first, after the row `after`.
pub(crate) fn versions(
    tx: &Transaction<'_>,
    key: &KeyRecord,
    after: i64,
    limit: usize,
) -> rusqlite::Result<Vec<VersionRecord>> {
    tx.prepare_cached(&format!(
        "SELECT {VERSION_COLUMNS} FROM version
         WHERE key_id = ?1 AND id > ?2 ORDER BY id LIMIT ?3"
    ))?
    .query_map((key.id, after, limit as i64), |row| version_record(row, 0))?
    .collect()
}

/// Keys by name, each with its newest version, after the name `after`.
pub(crate) fn list(
    tx: &Transaction<'_>,
    deleted: bool,
    after: &str,
    limit: usize,
) -> rusqlite::Result<Vec<(KeyRecord, VersionRecord)>> {
    tx.prepare_cached(&format!(
        "SELECT key.id, key.name, key.deleted, key.scheduled_purge, {VERSION_COLUMNS}
         FROM key JOIN version ON version.key_id = key.id
         WHERE (key.deleted IS NOT NULL) = ?1 AND key.name > ?2
           AND version.id = (SELECT max(id) FROM version WHERE key_id = key.id)
         ORDER BY key.name LIMIT ?3"
    ))?
    .query_map((deleted, after, limit as i64), |row| {
        Ok((key_record(row, 0)?, version_record(row, 4)?))
    })?
    .collect()
}

/// The sealed private key of a version.
pub(crate) fn private(tx: &Transaction<'_>, version_id: i64) -> rusqlite::Result<Vec<u8>> {
    tx.prepare_cached("SELECT private FROM version WHERE id = ?1")?
        .query_row([version_id], |row| row.get(0))
}

pub(crate) fn insert(tx: &Transaction<'_>, name: &str) -> rusqlite::Result<KeyRecord> {
    tx.prepare_cached("INSERT INTO key (name) VALUES (?1)")?.execute([name])?;
    Ok(KeyRecord { id: tx.last_insert_rowid(), name: name.to_owned(), deleted: None })
}

/// Adds `version` (whose row id is set) as the newest.
pub(crate) fn insert_version(
    tx: &Transaction<'_>,
    key: &KeyRecord,
    version: &mut VersionRecord,
    private: &[u8],
) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "INSERT INTO version (key_id, version, kty, modulus, exponent, private, operations, tags,
                              enabled, nbf, exp, created, updated, bits)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
    )?
    .execute((
        key.id,
        &version.version,
        version.kty.name(),
        version.public.as_ref().map_or(&[][..], |public| &public.modulus),
        version.public.as_ref().map_or(&[][..], |public| &public.exponent),
        private,
        operations_text(&version.operations),
        tags_text(&version.tags)?,
        version.attributes.enabled,
        version.attributes.nbf,
        version.attributes.exp,
        version.created,
        version.updated,
        version.bits,
    ))?;
    version.id = tx.last_insert_rowid();
    Ok(())
}

/// Writes what may change of a version.
pub(crate) fn update_version(
    tx: &Transaction<'_>,
    version: &VersionRecord,
) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "UPDATE version SET operations = ?2, tags = ?3, enabled = ?4, nbf = ?5, exp = ?6,
                            updated = ?7
         WHERE id = ?1",
    )?
    .execute((
        version.id,
        operations_text(&version.operations),
        tags_text(&version.tags)?,
        version.attributes.enabled,
        version.attributes.nbf,
        version.attributes.exp,
        version.updated,
    ))?;
    Ok(())
}

pub(crate) fn set_deleted(
    tx: &Transaction<'_>,
    key: &KeyRecord,
    deleted: Option<DeletedState>,
) -> rusqlite::Result<()> {
    tx.prepare_cached("UPDATE key SET deleted = ?2, scheduled_purge = ?3 WHERE id = ?1")?.execute(
        (
            key.id,
            deleted.map(|deleted| deleted.date),
            deleted.map(|deleted| deleted.scheduled_purge),
        ),
    )?;
    Ok(())
}

pub(crate) fn rotation_policy(
    tx: &Transaction<'_>,
    key: &KeyRecord,
) -> rusqlite::Result<Option<String>> {
    tx.prepare_cached("SELECT rotation_policy FROM key WHERE id = ?1")?
        .query_row([key.id], |row| row.get(0))
}

pub(crate) fn set_rotation_policy(
    tx: &Transaction<'_>,
    key: &KeyRecord,
    policy: &str,
) -> rusqlite::Result<()> {
    tx.prepare_cached("UPDATE key SET rotation_policy = ?2 WHERE id = ?1")?
        .execute((key.id, policy))?;
    Ok(())
}

/// Keys that have a policy and are not deleted, each with its policy.
pub(crate) fn with_rotation_policy(
    tx: &Transaction<'_>,
) -> rusqlite::Result<Vec<(KeyRecord, String)>> {
    tx.prepare_cached(
        "SELECT id, name, deleted, scheduled_purge, rotation_policy FROM key
         WHERE rotation_policy IS NOT NULL AND deleted IS NULL",
    )?
    .query_map([], |row| Ok((key_record(row, 0)?, row.get(4)?)))?
    .collect()
}

/// Removes the key and all of its versions for good.
pub(crate) fn purge(tx: &Transaction<'_>, key: &KeyRecord) -> rusqlite::Result<()> {
    tx.prepare_cached("DELETE FROM key WHERE id = ?1")?.execute([key.id])?;
    Ok(())
}

/// Removes deleted keys whose time is over; their names.
pub(crate) fn purge_due(tx: &Transaction<'_>, now: i64) -> rusqlite::Result<Vec<String>> {
    tx.prepare_cached("DELETE FROM key WHERE scheduled_purge <= ?1 RETURNING name")?
        .query_map([now], |row| row.get(0))?
        .collect()
}

/// Is there a deleted key whose time is over? Cheap enough to ask often.
pub(crate) fn has_purge_due(tx: &Transaction<'_>, now: i64) -> rusqlite::Result<bool> {
    tx.prepare_cached("SELECT EXISTS (SELECT 1 FROM key WHERE scheduled_purge <= ?1)")?
        .query_row([now], |row| row.get(0))
}

fn key_record(row: &Row<'_>, at: usize) -> rusqlite::Result<KeyRecord> {
    let date: Option<i64> = row.get(at + 2)?;
    let scheduled: Option<i64> = row.get(at + 3)?;
    Ok(KeyRecord {
        id: row.get(at)?,
        name: row.get(at + 1)?,
        deleted: date
            .zip(scheduled)
            .map(|(date, scheduled_purge)| DeletedState { date, scheduled_purge }),
    })
}

fn version_record(row: &Row<'_>, at: usize) -> rusqlite::Result<VersionRecord> {
    let kty: String = row.get(at + 2)?;
    let operations: String = row.get(at + 5)?;
    let tags: String = row.get(at + 6)?;
    let kty = KeyType::from_name(&kty).ok_or_else(|| damaged("kty"))?;
    let numbers = PublicNumbers { modulus: row.get(at + 3)?, exponent: row.get(at + 4)? };
    Ok(VersionRecord {
        id: row.get(at)?,
        version: row.get(at + 1)?,
        kty,
        bits: row.get(at + 12)?,
        public: kty.is_rsa().then_some(numbers),
        operations: parse_operations(&operations)?,
        tags: serde_json::from_str(&tags).map_err(|_| damaged("tags"))?,
        attributes: Attributes {
            enabled: row.get(at + 7)?,
            nbf: row.get(at + 8)?,
            exp: row.get(at + 9)?,
        },
        created: row.get(at + 10)?,
        updated: row.get(at + 11)?,
    })
}

fn operations_text(operations: &[KeyOperation]) -> String {
    operations.iter().map(|operation| operation.name()).collect::<Vec<_>>().join(",")
}

fn parse_operations(text: &str) -> rusqlite::Result<Vec<KeyOperation>> {
    text.split(',')
        .filter(|name| !name.is_empty())
        .map(|name| KeyOperation::from_name(name).ok_or_else(|| damaged("operations")))
        .collect()
}

fn tags_text(tags: &BTreeMap<String, String>) -> rusqlite::Result<String> {
    serde_json::to_string(tags)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
}
