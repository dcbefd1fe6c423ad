//! Deleted keys: get, recover, purge.

use rusqlite::Transaction;

use super::{Call, Reply, Vault};
use crate::vault::audit::Event;
use crate::vault::refusal::Refusal;
use crate::vault::store::keys::{self, DeletedState, KeyRecord, VersionRecord};

fn deleted_key(
    tx: &Transaction<'_>,
    name: &str,
) -> Result<(KeyRecord, VersionRecord, DeletedState), Refusal> {
    let missing = || Refusal::deleted_key_not_found(name);
    let key = keys::find(tx, name)?.ok_or_else(missing)?;
    let deleted = key.deleted.ok_or_else(missing)?;
    let newest = keys::find_version(tx, &key, None)?.ok_or_else(missing)?;
    Ok((key, newest, deleted))
}

impl Vault {
    pub(super) fn get_deleted(&self, call: &Call<'_>, name: &str) -> Result<Reply, Refusal> {
        let (key, newest, deleted) = self.store.read(|tx| deleted_key(tx, name))?;
        Ok(Reply::ok(&self.wire(call).deleted_bundle(&key.name, &newest, deleted)))
    }

    pub(super) fn recover_deleted(
        &self,
        call: &Call<'_>,
        name: &str,
        event: &mut Event,
    ) -> Result<Reply, Refusal> {
        let (key, newest) = self.store.write(|tx| {
            let (key, newest, _) = deleted_key(tx, name)?;
            keys::set_deleted(tx, &key, None)?;
            Ok::<_, Refusal>((key, newest))
        })?;
        event.version = Some(newest.version.clone());
        Ok(Reply::ok(&self.wire(call).bundle(&key.name, &newest)))
    }

    pub(super) fn purge_deleted(&self, name: &str) -> Result<Reply, Refusal> {
        self.store.write(|tx| {
            let (key, _, _) = deleted_key(tx, name)?;
            if self.settings.recovery.purge_protection {
                return Err(Refusal::purge_protected(&self.settings.name, &self.settings.region));
            }
            keys::purge(tx, &key)?;
            Ok(())
        })?;
        self.forget_materials();
        Ok(Reply::no_content())
    }
}
