//! The whole vault in one file, and back.
//!
//! The file is the database, sealed under the root key: without `root.key` it tells nothing, and a
//! changed one does not open. The root key itself is not in it; it is kept elsewhere. A
//! restored vault is the same vault (keys, ids, identities, authority), with a new header secret
//! for its administrator.
//!
//! Bytes: magic (8) | length of the vault's id (1) | id | sealed database.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::dir::{VaultDir, remove_if_there, write_atomic, write_new};
use super::identity::header_sha256;
use super::init::{finish_database, new_header_secret, refuse_occupied, unfinished_database};
use super::seal::Sealer;
use super::settings::Settings;
use super::store::Store;
use super::store::identities::{self, ADMIN};
use crate::error::{Context, Error, Kind, Result};

const MAGIC: &[u8; 8] = b"BYOKFSVB";
const PLACE: [&str; 1] = ["vault backup"];
/// Tens of thousands of keys.
const MAX_FILE: u64 = 1 << 30;

/// What `restore` made, for its caller to show.
#[derive(Debug, Clone)]
pub struct Restored {
    pub name: String,
    pub ca_certificate: PathBuf,
}

/// Writes the vault in `dir`, served or not, to the new file `to`.
pub fn backup(dir: &VaultDir, to: &Path) -> Result<()> {
    dir.require_vault()?;
    if to.exists() {
        return Err(Error::new(Kind::Busy, format!("{} is there already", to.display())));
    }
    let store = Store::open(&dir.database())?;
    let settings = Settings::load(&store)?;
    let sealer = Sealer::new(dir.read_root_key()?, &settings.vault_id);
    let sealed = sealer.seal(&PLACE, &store.copy()?)?;
    let id = settings.vault_id.as_bytes();
    let id_len =
        u8::try_from(id.len()).map_err(|_| Error::corrupt("the vault's id is too long"))?;
    write_new(to, &[&MAGIC[..], &[id_len], id, &sealed].concat(), 0o600)
}

/// Makes the vault in an empty directory.
pub fn restore(dir: &VaultDir, from: &Path, root_key: &Path) -> Result<Restored> {
    let root = VaultDir::read_root_key_at(root_key)?;
    let kept = root.try_clone()?;
    let database = open_backup(from, root)?;

    refuse_occupied(dir)?;
    dir.create()?;
    let _lock = dir.lock()?;
    refuse_occupied(dir)?;
    let unfinished = unfinished_database(dir)?;
    write_new(&unfinished, &database, 0o600)?;
    let store = Store::open(&unfinished)?;
    store.check()?;
    let settings = Settings::load(&store)?;

    // What lies here may be the only copy.
    if !dir.read_root_key().is_ok_and(|there| there.ct_eq(&kept)) {
        remove_if_there(&dir.root_key())?;
        write_new(&dir.root_key(), kept.expose(), 0o600)?;
    }
    let header = new_header_secret()?;
    remove_if_there(&dir.admin_header())?;
    write_new(&dir.admin_header(), header.expose().as_bytes(), 0o600)?;
    write_atomic(&dir.ca_certificate(), settings.ca_pem.as_bytes(), 0o644)?;
    store.write(|tx| {
        let admin = identities::find(tx, ADMIN)?
            .ok_or_else(|| Error::corrupt("the backup has no administrator"))?;
        Ok::<_, Error>(identities::set_header(
            tx,
            &admin.object_id,
            &header_sha256(header.expose()),
        )?)
    })?;
    drop(store);
    finish_database(dir, &unfinished)?;
    Ok(Restored { name: settings.name, ca_certificate: dir.ca_certificate() })
}

fn open_backup(from: &Path, root: crate::crypto::secret::Secret<32>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(from)
        .and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes))
        .context(|| format!("cannot read {}", from.display()))?;
    let (id, sealed) = split(&bytes)
        .ok_or_else(|| Error::corrupt(format!("{} is no backup of a vault", from.display())))?;
    Sealer::new(root, id).open_large(&PLACE, sealed).map_err(|_| {
        Error::corrupt(format!(
            "{} does not open: it was changed or cut off, or the root key is another vault's",
            from.display()
        ))
    })
}

/// The vault's id and what is sealed.
fn split(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (&len, rest) = bytes.strip_prefix(MAGIC)?.split_first()?;
    let (id, sealed) = rest.split_at_checked(len.into())?;
    Some((std::str::from_utf8(id).ok()?, sealed))
}
