//! What an identity may prove itself with at the token endpoint: client secrets, certificates,
//! federated tokens of another issuer.

use rusqlite::{Row, Transaction};

use super::damaged;

#[derive(Clone, Debug)]
pub(crate) struct Credential {
    pub(crate) id: String,
    pub(crate) object_id: String,
    pub(crate) proof: Proof,
    /// None: it does not expire by itself.
    pub(crate) expires: Option<i64>,
    pub(crate) created: i64,
}

#[derive(Clone, Debug)]
pub(crate) enum Proof {
    /// SHA-256 of 32 random bytes in base64url.
    Secret { sha256: [u8; 32] },
    /// PEM; assertions are signed with its key.
    Certificate { pem: String },
    /// Assertions of `issuer` about `subject`; `keys` are a JWKS or PEM.
    Federated { issuer: String, subject: String, audience: String, keys: String },
}

impl Proof {
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Proof::Secret { .. } => "secret",
            Proof::Certificate { .. } => "certificate",
            Proof::Federated { .. } => "federated",
        }
    }
}

pub(crate) fn insert(tx: &Transaction<'_>, credential: &Credential) -> rusqlite::Result<()> {
    let (sha256, issuer, subject, audience, keys) = match &credential.proof {
        Proof::Secret { sha256 } => (Some(sha256), None, None, None, None),
        Proof::Certificate { pem } => (None, None, None, None, Some(pem)),
        Proof::Federated { issuer, subject, audience, keys } => {
            (None, Some(issuer), Some(subject), Some(audience), Some(keys))
        }
    };
    tx.prepare_cached(
        "INSERT INTO credential (id, object_id, kind, sha256, issuer, subject, audience, keys,
                                 expires, created)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )?
    .execute((
        &credential.id,
        &credential.object_id,
        credential.proof.kind(),
        sha256,
        issuer,
        subject,
        audience,
        keys,
        credential.expires,
        credential.created,
    ))?;
    Ok(())
}

pub(crate) fn of(tx: &Transaction<'_>, object_id: &str) -> rusqlite::Result<Vec<Credential>> {
    tx.prepare_cached(
        "SELECT id, object_id, kind, sha256, issuer, subject, audience, keys, expires, created
         FROM credential WHERE object_id = ?1 ORDER BY created, id",
    )?
    .query_map([object_id], record)?
    .collect()
}

/// Whether it was there.
pub(crate) fn delete(tx: &Transaction<'_>, object_id: &str, id: &str) -> rusqlite::Result<bool> {
    let removed = tx
        .prepare_cached("DELETE FROM credential WHERE object_id = ?1 AND id = ?2")?
        .execute([object_id, id])?;
    Ok(removed > 0)
}

fn record(row: &Row<'_>) -> rusqlite::Result<Credential> {
    let kind: String = row.get(2)?;
    let proof = match kind.as_str() {
        "secret" => Proof::Secret { sha256: row.get(3)? },
        "certificate" => Proof::Certificate { pem: row.get(7)? },
        "federated" => Proof::Federated {
            issuer: row.get(4)?,
            subject: row.get(5)?,
            audience: row.get(6)?,
            keys: row.get(7)?,
        },
        _ => return Err(damaged("kind")),
    };
    Ok(Credential {
        id: row.get(0)?,
        object_id: row.get(1)?,
        proof,
        expires: row.get(8)?,
        created: row.get(9)?,
    })
}

#[cfg(test)]
mod tests {
    use super::super::identities::{self, tests::identity};
    use super::super::tests::store;
    use super::*;
    use crate::error::Error;

    #[test]
    fn credentials_last_and_go_with_their_identity() {
        let (_dir, store) = store();
        let credential = |id: &str, proof| Credential {
            id: id.into(),
            object_id: "o-a".into(),
            proof,
            expires: Some(9),
            created: 1,
        };
        store
            .write(|tx| {
                identities::insert(tx, &identity("a", 1))?;
                insert(tx, &credential("1", Proof::Secret { sha256: [7; 32] }))?;
                insert(tx, &credential("2", Proof::Certificate { pem: "p".into() }))?;
                let federated = Proof::Federated {
                    issuer: "i".into(),
                    subject: "s".into(),
                    audience: "a".into(),
                    keys: "k".into(),
                };
                insert(tx, &credential("3", federated))?;
                let kinds: Vec<_> = of(tx, "o-a")?.iter().map(|one| one.proof.kind()).collect();
                assert_eq!(kinds, ["secret", "certificate", "federated"]);
                assert!(delete(tx, "o-a", "1")? && !delete(tx, "o-a", "1")?);
                identities::delete(tx, "o-a")?;
                assert!(of(tx, "o-a")?.is_empty());
                Ok::<_, Error>(())
            })
            .unwrap();
    }
}
