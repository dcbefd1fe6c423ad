//! Identities and their permissions in the database.
//!
//! An identity's header secret is not here, only its SHA-256: the secret is 32 random bytes, so
//! the hash tells nothing about it.

use rusqlite::{OptionalExtension as _, Row, Transaction};
use subtle::ConstantTimeEq as _;

use super::damaged;
use crate::vault::permission::Permissions;

/// The administrator's; it is made by `init` and cannot be deleted.
pub(crate) const ADMIN: &str = "admin";

#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) object_id: String,
    pub(crate) client_id: String,
    pub(crate) header_sha256: [u8; 32],
    pub(crate) permissions: Permissions,
    pub(crate) is_admin: bool,
    pub(crate) created: i64,
}

const COLUMNS: &str = "name, object_id, client_id, header_sha256, permissions, is_admin, created";

pub(crate) fn insert(tx: &Transaction<'_>, identity: &Identity) -> rusqlite::Result<()> {
    tx.prepare_cached(&format!(
        "INSERT INTO identity ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)"
    ))?
    .execute((
        &identity.name,
        &identity.object_id,
        &identity.client_id,
        identity.header_sha256,
        identity.permissions.to_string(),
        identity.is_admin,
        identity.created,
    ))?;
    Ok(())
}

pub(crate) fn find(tx: &Transaction<'_>, name: &str) -> rusqlite::Result<Option<Identity>> {
    tx.prepare_cached(&format!("SELECT {COLUMNS} FROM identity WHERE name = ?1"))?
        .query_row([name], record)
        .optional()
}

pub(crate) fn find_by_object_id(
    tx: &Transaction<'_>,
    object_id: &str,
) -> rusqlite::Result<Option<Identity>> {
    tx.prepare_cached(&format!("SELECT {COLUMNS} FROM identity WHERE object_id = ?1"))?
        .query_row([object_id], record)
        .optional()
}

/// Whose header secret has this hash; compares with every identity's, in constant time.
pub(crate) fn find_by_header(
    tx: &Transaction<'_>,
    header_sha256: &[u8; 32],
) -> rusqlite::Result<Option<Identity>> {
    let mut found = None;
    for identity in list(tx)? {
        if bool::from(identity.header_sha256.ct_eq(header_sha256)) {
            found = Some(identity);
        }
    }
    Ok(found)
}

pub(crate) fn list(tx: &Transaction<'_>) -> rusqlite::Result<Vec<Identity>> {
    tx.prepare_cached(&format!("SELECT {COLUMNS} FROM identity ORDER BY name"))?
        .query_map([], record)?
        .collect()
}

pub(crate) fn delete(tx: &Transaction<'_>, name: &str) -> rusqlite::Result<()> {
    tx.prepare_cached("DELETE FROM identity WHERE name = ?1")?.execute([name])?;
    Ok(())
}

pub(crate) fn set_permissions(
    tx: &Transaction<'_>,
    name: &str,
    permissions: &Permissions,
) -> rusqlite::Result<()> {
    tx.prepare_cached("UPDATE identity SET permissions = ?2 WHERE name = ?1")?
        .execute((name, permissions.to_string()))?;
    Ok(())
}

fn record(row: &Row<'_>) -> rusqlite::Result<Identity> {
    let permissions: String = row.get(4)?;
    Ok(Identity {
        name: row.get(0)?,
        object_id: row.get(1)?,
        client_id: row.get(2)?,
        header_sha256: row.get(3)?,
        permissions: permissions.parse().map_err(|_| damaged("permissions"))?,
        is_admin: row.get(5)?,
        created: row.get(6)?,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::store;
    use super::*;
    use crate::error::Error;

    #[test]
    fn identities_are_found_by_header_and_gone_when_deleted() {
        let (_dir, store) = store();
        let identity = |name: &str, header: u8| Identity {
            name: name.into(),
            object_id: format!("o-{name}"),
            client_id: format!("c-{name}"),
            header_sha256: [header; 32],
            permissions: "get".parse().unwrap(),
            is_admin: false,
            created: 1,
        };
        store
            .write(|tx| {
                insert(tx, &identity("a", 1))?;
                insert(tx, &identity("b", 2))?;
                assert!(insert(tx, &identity("A", 3)).is_err(), "names differ in more than case");
                set_permissions(tx, "a", &"get,wrapKey".parse().unwrap())?;
                Ok::<_, Error>(())
            })
            .unwrap();
        let by_header =
            |byte| store.read(|tx| Ok::<_, Error>(find_by_header(tx, &[byte; 32])?)).unwrap();
        assert_eq!(by_header(1).unwrap().permissions.to_string(), "get,wrapKey");
        assert_eq!(by_header(2).unwrap().name, "b");
        assert!(by_header(9).is_none());
        store.write(|tx| Ok::<_, Error>(delete(tx, "a")?)).unwrap();
        assert!(by_header(1).is_none());
    }
}
