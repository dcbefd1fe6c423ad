//! Role assignments in the database.

use rusqlite::{Row, Transaction};

use super::damaged;
use crate::vault::role::{Role, RoleAssignment};

pub(crate) fn insert(tx: &Transaction<'_>, assignment: &RoleAssignment) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "INSERT INTO role_assignment (id, object_id, role, key, created)
         VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute((
        &assignment.id,
        &assignment.object_id,
        assignment.role.id(),
        assignment.key.as_deref().unwrap_or_default(),
        assignment.created,
    ))?;
    Ok(())
}

pub(crate) fn list(tx: &Transaction<'_>) -> rusqlite::Result<Vec<RoleAssignment>> {
    tx.prepare_cached(
        "SELECT id, object_id, role, key, created FROM role_assignment ORDER BY created, id",
    )?
    .query_map([], record)?
    .collect()
}

/// Whether it was there.
pub(crate) fn delete(tx: &Transaction<'_>, id: &str) -> rusqlite::Result<bool> {
    Ok(tx.prepare_cached("DELETE FROM role_assignment WHERE id = ?1")?.execute([id])? > 0)
}

fn record(row: &Row<'_>) -> rusqlite::Result<RoleAssignment> {
    let role: String = row.get(2)?;
    let key: String = row.get(3)?;
    Ok(RoleAssignment {
        id: row.get(0)?,
        object_id: row.get(1)?,
        role: Role::from_name(&role).ok_or_else(|| damaged("role"))?,
        key: Some(key).filter(|key| !key.is_empty()),
        created: row.get(4)?,
    })
}
