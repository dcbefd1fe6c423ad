//! What lasts: one SQLite database, one connection, every change one transaction.
//!
//! `synchronous=EXTRA` with a rollback journal: when [`Store::write`] returns, the change is on
//! stable storage, the journal's removal included; a process killed before that leaves it undone.
//! `secure_delete` overwrites what a purge removes.

pub(crate) mod credentials;
pub(crate) mod identities;
pub(crate) mod keys;
mod migrate;
pub(crate) mod roles;

use std::path::Path;

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Transaction, TransactionBehavior};

use crate::error::{Error, Kind, Result};
use crate::sync::Mutex;

/// Of `PRAGMA user_version`.
const SCHEMA_VERSION: i64 = 2;

const SCHEMA: &str = "
CREATE TABLE setting (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE sealed (
    name  TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE identity (
    object_id     TEXT PRIMARY KEY,
    name          TEXT NOT NULL COLLATE NOCASE,
    client_id     TEXT NOT NULL UNIQUE,
    header_sha256 BLOB UNIQUE,
    tenant        TEXT NOT NULL,
    permissions   TEXT NOT NULL,
    is_admin      INTEGER NOT NULL,
    enabled       INTEGER NOT NULL,
    deleted       INTEGER,
    created       INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX identity_name ON identity (name) WHERE deleted IS NULL;
CREATE TABLE credential (
    id        TEXT PRIMARY KEY,
    object_id TEXT NOT NULL REFERENCES identity (object_id) ON DELETE CASCADE,
    kind      TEXT NOT NULL,
    sha256    BLOB UNIQUE,
    issuer    TEXT,
    subject   TEXT,
    audience  TEXT,
    keys      TEXT,
    expires   INTEGER,
    created   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE assigned (
    host   TEXT NOT NULL REFERENCES identity (object_id) ON DELETE CASCADE,
    member TEXT NOT NULL REFERENCES identity (object_id) ON DELETE CASCADE,
    PRIMARY KEY (host, member)
) STRICT, WITHOUT ROWID;
CREATE TABLE role_assignment (
    id        TEXT PRIMARY KEY,
    object_id TEXT NOT NULL REFERENCES identity (object_id) ON DELETE CASCADE,
    role      TEXT NOT NULL,
    key       TEXT NOT NULL COLLATE NOCASE,
    created   INTEGER NOT NULL,
    UNIQUE (object_id, role, key)
) STRICT, WITHOUT ROWID;
CREATE TABLE key (
    id              INTEGER PRIMARY KEY,
    name            TEXT NOT NULL UNIQUE COLLATE NOCASE,
    deleted         INTEGER,
    scheduled_purge INTEGER,
    rotation_policy TEXT
) STRICT;
CREATE TABLE version (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    key_id     INTEGER NOT NULL REFERENCES key (id) ON DELETE CASCADE,
    version    TEXT NOT NULL,
    kty        TEXT NOT NULL,
    bits       INTEGER NOT NULL,
    modulus    BLOB NOT NULL,
    exponent   BLOB NOT NULL,
    private    BLOB NOT NULL,
    operations TEXT NOT NULL,
    tags       TEXT NOT NULL,
    enabled    INTEGER NOT NULL,
    nbf        INTEGER,
    exp        INTEGER,
    created    INTEGER NOT NULL,
    updated    INTEGER NOT NULL,
    UNIQUE (key_id, version)
) STRICT;
";

#[derive(Debug)]
pub(crate) struct Store {
    connection: Mutex<Connection>,
}

impl Store {
    /// Makes the tables in an empty file that is already there (and so has its mode).
    pub(crate) fn create(path: &Path) -> Result<Store> {
        let store = Store::connect(path)?;
        store.write(|tx| {
            tx.execute_batch(SCHEMA)?;
            tx.pragma_update(None, "user_version", SCHEMA_VERSION)?;
            Ok::<_, Error>(())
        })?;
        Ok(store)
    }

    pub(crate) fn open(path: &Path) -> Result<Store> {
        let store = Store::connect(path)?;
        let version = store.write(|tx| Ok::<_, Error>(migrate::run(tx)?))?;
        if version != SCHEMA_VERSION {
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "{} has schema version {version}; this program knows {SCHEMA_VERSION}",
                    path.display()
                ),
            ));
        }
        Ok(store)
    }

    fn connect(path: &Path) -> Result<Store> {
        let failed = |error| {
            let error = Error::from(error);
            Error::new(error.kind, format!("cannot open {}", path.display())).with_source(error)
        };
        let connection = Connection::open_with_flags(
            path,
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )
        .map_err(failed)?;
        connection
            .execute_batch(
                "PRAGMA journal_mode = DELETE;
                 PRAGMA synchronous = EXTRA;
                 PRAGMA foreign_keys = ON;
                 PRAGMA secure_delete = ON;",
            )
            .map_err(failed)?;
        connection.set_prepared_statement_cache_capacity(64);
        Ok(Store { connection: Mutex::new(connection) })
    }

    /// One consistent state as the bytes of a database, whether a server works on it or not. It is
    /// never in a file: there it would outlive what is purged.
    pub(crate) fn copy(&self) -> Result<Vec<u8>> {
        let mut connection = self.connection.lock();
        // Waits for a writer, which `serialize` does not.
        let begun = connection.execute_batch("BEGIN; SELECT value FROM setting LIMIT 1;");
        let copy = begun.and_then(|()| Ok(connection.serialize("main")?.to_vec()));
        if !connection.is_autocommit() {
            connection.execute_batch("ROLLBACK")?;
        }
        Ok(copy?)
    }

    /// `Corrupt` unless every page and index is sound.
    pub(crate) fn check(&self) -> Result<()> {
        let found: String = self.read(|tx| {
            Ok::<_, Error>(tx.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?)
        })?;
        if found == "ok" {
            return Ok(());
        }
        Err(Error::corrupt(format!("the vault's database is damaged: {found}")))
    }

    /// Runs `work` on one consistent state.
    pub(crate) fn read<T, E: From<rusqlite::Error>>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut connection = self.connection.lock();
        let transaction = connection.transaction()?;
        work(&transaction)
    }

    /// Runs `work` and commits what it did, unless it fails: then nothing happened.
    pub(crate) fn write<T, E: From<rusqlite::Error>>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut connection = self.connection.lock();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let value = work(&transaction)?;
        transaction.commit()?;
        Ok(value)
    }
}

pub(crate) fn setting(tx: &Transaction<'_>, name: &str) -> rusqlite::Result<Option<String>> {
    tx.prepare_cached("SELECT value FROM setting WHERE name = ?1")?
        .query_row([name], |row| row.get(0))
        .optional()
}

pub(crate) fn set_setting(tx: &Transaction<'_>, name: &str, value: &str) -> rusqlite::Result<()> {
    tx.prepare_cached("INSERT OR REPLACE INTO setting (name, value) VALUES (?1, ?2)")?
        .execute([name, value])?;
    Ok(())
}

pub(crate) fn sealed(tx: &Transaction<'_>, name: &str) -> rusqlite::Result<Option<Vec<u8>>> {
    tx.prepare_cached("SELECT value FROM sealed WHERE name = ?1")?
        .query_row([name], |row| row.get(0))
        .optional()
}

pub(crate) fn set_sealed(tx: &Transaction<'_>, name: &str, value: &[u8]) -> rusqlite::Result<()> {
    tx.prepare_cached("INSERT OR REPLACE INTO sealed (name, value) VALUES (?1, ?2)")?
        .execute((name, value))?;
    Ok(())
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Error {
        let kind = match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
                Kind::Busy
            }
            Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
                Kind::Corrupt
            }
            _ => Kind::Io,
        };
        Error::new(kind, "the vault's database").with_source(error)
    }
}

/// A stored text that this program cannot have written.
pub(crate) fn damaged(column: &'static str) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(
        0,
        rusqlite::types::Type::Text,
        format!("the column {column} holds an unknown value").into(),
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vault.db");
        std::fs::File::create(&path).unwrap();
        let store = Store::create(&path).unwrap();
        (dir, store)
    }

    #[test]
    fn a_failed_change_leaves_nothing_and_a_good_one_lasts() {
        let (dir, store) = store();
        let failed: Result<()> = store.write(|tx| {
            set_setting(tx, "a", "1")?;
            Err(Error::usage("no"))
        });
        assert!(failed.is_err());
        store.write(|tx| Ok::<_, Error>(set_setting(tx, "b", "2")?)).unwrap();
        drop(store);
        let store = Store::open(&dir.path().join("vault.db")).unwrap();
        let read = |name: &str| store.read(|tx| Ok::<_, Error>(setting(tx, name)?)).unwrap();
        assert_eq!((read("a"), read("b").as_deref()), (None, Some("2")));
    }

    #[test]
    fn a_panic_in_a_change_undoes_it_and_leaves_no_lock() {
        let (_dir, store) = store();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            store.write(|tx| {
                set_setting(tx, "a", "1")?;
                if true {
                    panic!("in a test");
                }
                Ok::<_, Error>(())
            })
        }));
        assert!(panicked.is_err());
        assert_eq!(store.read(|tx| Ok::<_, Error>(setting(tx, "a")?)).unwrap(), None);
    }

    #[test]
    fn other_schema_versions_and_other_files_are_refused() {
        let (dir, store) = store();
        let path = dir.path().join("vault.db");
        store.write(|tx| Ok::<_, Error>(tx.pragma_update(None, "user_version", 99)?)).unwrap();
        drop(store);
        assert_eq!(Store::open(&path).unwrap_err().kind, Kind::Unsupported);
        std::fs::write(&path, [b'x'; 4096]).unwrap();
        assert_eq!(Store::open(&path).unwrap_err().kind, Kind::Corrupt);
    }
}
