//! Databases of earlier versions, brought up to this one's schema in one transaction.

use rusqlite::Transaction;

/// Version 1 knew access policies and one tenant only.
const FROM_1_TO_2: &str = "
ALTER TABLE identity RENAME TO identity_1;
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
INSERT INTO identity
    SELECT object_id, name, client_id, header_sha256,
           (SELECT value FROM setting WHERE name = 'tenant'),
           permissions, is_admin, 1, NULL, created
    FROM identity_1;
DROP TABLE identity_1;
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
ALTER TABLE version ADD COLUMN bits INTEGER NOT NULL DEFAULT 0;
UPDATE version SET bits = length(modulus) * 8;
PRAGMA user_version = 2;
";

/// The schema version afterwards; of a database that this program does not know, its own.
pub(super) fn run(tx: &Transaction<'_>) -> rusqlite::Result<i64> {
    let version =
        |tx: &Transaction<'_>| tx.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0));
    if version(tx)? == 1 {
        tx.execute_batch(FROM_1_TO_2)?;
    }
    version(tx)
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::super::{Store, identities, keys};
    use crate::error::Error;

    const VERSION_1: &str = "
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE sealed (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE identity (
    name          TEXT PRIMARY KEY COLLATE NOCASE,
    object_id     TEXT NOT NULL UNIQUE,
    client_id     TEXT NOT NULL UNIQUE,
    header_sha256 BLOB NOT NULL UNIQUE,
    permissions   TEXT NOT NULL,
    is_admin      INTEGER NOT NULL,
    created       INTEGER NOT NULL
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
INSERT INTO setting VALUES ('tenant', 't1');
INSERT INTO identity VALUES ('admin', 'o1', 'c1', zeroblob(32), 'get,list', 1, 5);
INSERT INTO key VALUES (1, 'kek', NULL, NULL, NULL);
INSERT INTO version VALUES
    (1, 1, 'v', 'RSA', zeroblob(384), x'010001', x'00', 'wrapKey', '{}', 1, NULL, NULL, 1, 1);
PRAGMA user_version = 1;
";

    #[test]
    fn a_database_of_version_1_keeps_its_identities_and_keys() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vault.db");
        Connection::open(&path).unwrap().execute_batch(VERSION_1).unwrap();
        for _ in 0..2 {
            let store = Store::open(&path).unwrap();
            let (identity, bits) = store
                .read(|tx| {
                    let key = keys::find(tx, "kek")?.unwrap();
                    let version = keys::find_version(tx, &key, None)?.unwrap();
                    Ok::<_, Error>((identities::find(tx, "admin")?.unwrap(), version.bits))
                })
                .unwrap();
            assert_eq!((identity.tenant.as_str(), identity.is_admin, bits), ("t1", true, 3072));
            assert!(identity.enabled && identity.header_sha256 == Some([0; 32]));
        }
    }
}
