//! Identities in the database: who there is, and which of them a host may ask tokens for.
//!
//! An identity's header secret is not here, only its SHA-256: the secret is 32 random bytes, so
//! the hash tells nothing about it. A deleted identity stays as long as tokens that were issued
//! to it may live; its name is free again.

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
    /// None: no host of its own asks for its tokens (a user-assigned identity, an application).
    pub(crate) header_sha256: Option<[u8; 32]>,
    pub(crate) tenant: String,
    pub(crate) permissions: Permissions,
    pub(crate) is_admin: bool,
    /// A disabled one gets no tokens.
    pub(crate) enabled: bool,
    /// When it was deleted, if its tokens are still taken.
    pub(crate) deleted: Option<i64>,
    pub(crate) created: i64,
}

const COLUMNS: &str = "name, object_id, client_id, header_sha256, tenant, permissions, is_admin, \
     enabled, deleted, created";

pub(crate) fn insert(tx: &Transaction<'_>, identity: &Identity) -> rusqlite::Result<()> {
    tx.prepare_cached(&format!(
        "INSERT INTO identity ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)"
    ))?
    .execute((
        &identity.name,
        &identity.object_id,
        &identity.client_id,
        identity.header_sha256,
        &identity.tenant,
        identity.permissions.to_string(),
        identity.is_admin,
        identity.enabled,
        identity.deleted,
        identity.created,
    ))?;
    Ok(())
}

pub(crate) fn find(tx: &Transaction<'_>, name: &str) -> rusqlite::Result<Option<Identity>> {
    tx.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM identity WHERE name = ?1 AND deleted IS NULL"
    ))?
    .query_row([name], record)
    .optional()
}

/// Of those that are not deleted.
pub(crate) fn find_by_client_id(
    tx: &Transaction<'_>,
    client_id: &str,
) -> rusqlite::Result<Option<Identity>> {
    tx.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM identity WHERE client_id = ?1 AND deleted IS NULL"
    ))?
    .query_row([client_id.to_ascii_lowercase()], record)
    .optional()
}

/// Whose header secret has this hash; compares with every identity's, in constant time.
pub(crate) fn find_by_header(
    tx: &Transaction<'_>,
    header_sha256: &[u8; 32],
) -> rusqlite::Result<Option<Identity>> {
    let mut found = None;
    for identity in list(tx)? {
        if identity.header_sha256.is_some_and(|own| bool::from(own.ct_eq(header_sha256))) {
            found = Some(identity);
        }
    }
    Ok(found)
}

/// Those that are not deleted.
pub(crate) fn list(tx: &Transaction<'_>) -> rusqlite::Result<Vec<Identity>> {
    tx.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM identity WHERE deleted IS NULL ORDER BY name"
    ))?
    .query_map([], record)?
    .collect()
}

/// Those whose tokens may still be about, too.
pub(crate) fn list_all(tx: &Transaction<'_>) -> rusqlite::Result<Vec<Identity>> {
    tx.prepare_cached(&format!("SELECT {COLUMNS} FROM identity"))?.query_map([], record)?.collect()
}

/// Removes it with its credentials and assignments: its tokens end.
pub(crate) fn delete(tx: &Transaction<'_>, object_id: &str) -> rusqlite::Result<()> {
    tx.prepare_cached("DELETE FROM identity WHERE object_id = ?1")?.execute([object_id])?;
    Ok(())
}

/// Takes away every way to get a new token; those that were issued go on.
pub(crate) fn delete_keeping_tokens(
    tx: &Transaction<'_>,
    object_id: &str,
    now: i64,
) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "UPDATE identity SET deleted = ?2, header_sha256 = NULL WHERE object_id = ?1",
    )?
    .execute((object_id, now))?;
    tx.prepare_cached("DELETE FROM credential WHERE object_id = ?1")?.execute([object_id])?;
    tx.prepare_cached("DELETE FROM assigned WHERE host = ?1 OR member = ?1")?
        .execute([object_id])?;
    Ok(())
}

/// Removes those that were deleted before `then`, when no token of theirs can be good any more;
/// how many.
pub(crate) fn forget_deleted(tx: &Transaction<'_>, then: i64) -> rusqlite::Result<usize> {
    tx.prepare_cached("DELETE FROM identity WHERE deleted < ?1")?.execute([then])
}

pub(crate) fn set_permissions(
    tx: &Transaction<'_>,
    object_id: &str,
    permissions: &Permissions,
) -> rusqlite::Result<()> {
    tx.prepare_cached("UPDATE identity SET permissions = ?2 WHERE object_id = ?1")?
        .execute((object_id, permissions.to_string()))?;
    Ok(())
}

pub(crate) fn set_enabled(
    tx: &Transaction<'_>,
    object_id: &str,
    enabled: bool,
) -> rusqlite::Result<()> {
    tx.prepare_cached("UPDATE identity SET enabled = ?2 WHERE object_id = ?1")?
        .execute((object_id, enabled))?;
    Ok(())
}

pub(crate) fn set_header(
    tx: &Transaction<'_>,
    object_id: &str,
    header_sha256: &[u8; 32],
) -> rusqlite::Result<()> {
    tx.prepare_cached("UPDATE identity SET header_sha256 = ?2 WHERE object_id = ?1")?
        .execute((object_id, header_sha256))?;
    Ok(())
}

/// The administrator follows the vault to another tenant; everyone else stays.
pub(crate) fn move_admin(tx: &Transaction<'_>, tenant: &str) -> rusqlite::Result<()> {
    tx.prepare_cached("UPDATE identity SET tenant = ?1 WHERE is_admin")?.execute([tenant])?;
    Ok(())
}

/// Lets the host with identity `host` ask for tokens of `member`.
pub(crate) fn assign(tx: &Transaction<'_>, host: &str, member: &str) -> rusqlite::Result<()> {
    tx.prepare_cached("INSERT OR IGNORE INTO assigned (host, member) VALUES (?1, ?2)")?
        .execute([host, member])?;
    Ok(())
}

/// Whether it was assigned.
pub(crate) fn unassign(tx: &Transaction<'_>, host: &str, member: &str) -> rusqlite::Result<bool> {
    let removed = tx
        .prepare_cached("DELETE FROM assigned WHERE host = ?1 AND member = ?2")?
        .execute([host, member])?;
    Ok(removed > 0)
}

/// The user-assigned identities of a host.
pub(crate) fn assigned_to(tx: &Transaction<'_>, host: &str) -> rusqlite::Result<Vec<Identity>> {
    tx.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM identity JOIN assigned ON assigned.member = identity.object_id
         WHERE assigned.host = ?1 AND deleted IS NULL ORDER BY name"
    ))?
    .query_map([host], record)?
    .collect()
}

fn record(row: &Row<'_>) -> rusqlite::Result<Identity> {
    let permissions: String = row.get(5)?;
    Ok(Identity {
        name: row.get(0)?,
        object_id: row.get(1)?,
        client_id: row.get(2)?,
        header_sha256: row.get(3)?,
        tenant: row.get(4)?,
        permissions: permissions.parse().map_err(|_| damaged("permissions"))?,
        is_admin: row.get(6)?,
        enabled: row.get(7)?,
        deleted: row.get(8)?,
        created: row.get(9)?,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::tests::store;
    use super::*;
    use crate::error::Error;

    pub(crate) fn identity(name: &str, header: u8) -> Identity {
        Identity {
            name: name.into(),
            object_id: format!("o-{name}"),
            client_id: format!("c-{name}"),
            header_sha256: Some([header; 32]),
            tenant: "t".into(),
            permissions: "get".parse().unwrap(),
            is_admin: false,
            enabled: true,
            deleted: None,
            created: 1,
        }
    }

    #[test]
    fn identities_are_found_by_header_and_gone_when_deleted() {
        let (_dir, store) = store();
        store
            .write(|tx| {
                insert(tx, &identity("a", 1))?;
                insert(tx, &identity("b", 2))?;
                let same = Identity { object_id: "o-other".into(), ..identity("A", 3) };
                assert!(insert(tx, &same).is_err(), "names differ in more than case");
                set_permissions(tx, "o-a", &"get,wrapKey".parse().unwrap())?;
                Ok::<_, Error>(())
            })
            .unwrap();
        let by_header =
            |byte| store.read(|tx| Ok::<_, Error>(find_by_header(tx, &[byte; 32])?)).unwrap();
        assert_eq!(by_header(1).unwrap().permissions.to_string(), "get,wrapKey");
        assert_eq!(by_header(2).unwrap().name, "b");
        assert!(by_header(9).is_none());
        store.write(|tx| Ok::<_, Error>(delete(tx, "o-a")?)).unwrap();
        assert!(by_header(1).is_none());
    }

    #[test]
    fn one_deleted_with_its_tokens_kept_leaves_its_name_and_gets_no_more() {
        let (_dir, store) = store();
        store
            .write(|tx| {
                insert(tx, &identity("host", 1))?;
                insert(tx, &identity("a", 2))?;
                assign(tx, "o-host", "o-a")?;
                assert_eq!(assigned_to(tx, "o-host")?.len(), 1);
                delete_keeping_tokens(tx, "o-a", 5)?;
                assert!(find(tx, "a")?.is_none() && assigned_to(tx, "o-host")?.is_empty());
                assert!(find_by_header(tx, &[2; 32])?.is_none());
                let second = Identity {
                    object_id: "o-second".into(),
                    client_id: "c-second".into(),
                    ..identity("a", 2)
                };
                insert(tx, &second)?;
                assert_eq!(find(tx, "a")?.map(|found| found.object_id), Some("o-second".into()));
                assert_eq!(list_all(tx)?.len(), 3);
                assert_eq!(forget_deleted(tx, 5)?, 0);
                assert_eq!(forget_deleted(tx, 6)?, 1);
                assert_eq!(list_all(tx)?.len(), 2);
                Ok::<_, Error>(())
            })
            .unwrap();
    }
}
