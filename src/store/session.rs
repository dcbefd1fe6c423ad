//! The session table: the random salt of every mount that ever sealed a block.
//!
//! Block keys are derived from a session's salt, so a volume without its table is lost: it is
//! kept twice, `sessions.a` and `sessions.b`, each rewritten and flushed before the other is
//! touched. Salts are not secret; the MAC keeps them from being exchanged. A new session is on
//! stable storage before its first block is sealed. No session is ever removed while the format
//! has no count of the blocks that name it.

use std::collections::BTreeMap;

use super::FORMAT_VERSION;
use super::keys::MacKeys;
use super::layout::BLOCK_LEN;
use super::page::{u32_at, u64_at};
use crate::backing::{Access, FileRef, NodeRef};
use crate::crypto::mac::MAC_LEN;
use crate::error::{Context, Error, Kind, Result};

pub(super) const FILES: [&[u8]; 2] = [b"sessions.a", b"sessions.b"];
const MAGIC: &[u8; 8] = b"BYOKSESS";
const DOMAIN: &[u8; 16] = b"byokfs sessions1";
const HEAD_LEN: usize = 64;
const ENTRY_LEN: usize = 40;
pub(super) const SALT_LEN: usize = 32;
/// Space is kept for so much more than there is: a volume on a full disk must be mounted to make room.
const AHEAD: u64 = 32 << 10;
/// What is read of a table at most: more than a million sessions.
const MAX_LEN: usize = 48 << 20;

pub(super) type Salt = [u8; SALT_LEN];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SessionTable {
    generation: u64,
    /// Also where the last ones were removed, a number is given out once.
    next: u32,
    sessions: BTreeMap<u32, SessionEntry>,
}

/// One session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SessionEntry {
    pub salt: Salt,
    /// Of the volume key that the MACs of its log records come from.
    pub volume_key_id: u32,
}

impl Default for SessionTable {
    fn default() -> SessionTable {
        SessionTable { generation: 0, next: 1, sessions: BTreeMap::new() }
    }
}

impl SessionTable {
    pub(super) fn get(&self, session: u32) -> Option<&SessionEntry> {
        self.sessions.get(&session)
    }

    /// Adds a session and returns its number. Numbers start at 1 and are never used again.
    pub(super) fn add(&mut self, entry: SessionEntry) -> Result<u32> {
        let session = self.next;
        self.next = session.checked_add(1).ok_or_else(|| {
            Error::new(Kind::Unsupported, "this volume has used up its 2^32 sessions")
        })?;
        self.sessions.insert(session, entry);
        self.generation += 1;
        Ok(session)
    }

    fn encode(&self, volume: &[u8; 16], keys: &MacKeys) -> Vec<u8> {
        let (volume_key_id, key) = keys.current();
        let mut bytes = vec![0; HEAD_LEN];
        bytes[16..24].copy_from_slice(MAGIC);
        bytes[24..28].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[28..32].copy_from_slice(&(self.sessions.len() as u32).to_le_bytes());
        bytes[32..40].copy_from_slice(&self.generation.to_le_bytes());
        bytes[40..44].copy_from_slice(&volume_key_id.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.next.to_le_bytes());
        for (session, entry) in &self.sessions {
            bytes.extend_from_slice(&session.to_le_bytes());
            bytes.extend_from_slice(&entry.volume_key_id.to_le_bytes());
            bytes.extend_from_slice(&entry.salt);
        }
        let mac = key.mac(&[DOMAIN, volume, &bytes[MAC_LEN..]]);
        bytes[..MAC_LEN].copy_from_slice(&mac);
        bytes
    }

    /// Without keys, what has the form of a table is believed.
    fn decode(bytes: &[u8], volume: &[u8; 16], keys: Option<&MacKeys>) -> Option<SessionTable> {
        if bytes.len() < HEAD_LEN || &bytes[16..24] != MAGIC {
            return None;
        }
        let count = u32_at(bytes, 28) as usize;
        let bytes = bytes.get(..count.checked_mul(ENTRY_LEN)?.checked_add(HEAD_LEN)?)?;
        let mut mac = [0; MAC_LEN];
        mac.copy_from_slice(&bytes[..MAC_LEN]);
        if let Some(keys) = keys {
            let key = keys.get(u32_at(bytes, 40))?;
            if !key.verify(&[DOMAIN, volume, &bytes[MAC_LEN..]], &mac) {
                return None;
            }
        }
        if u32_at(bytes, 24) != FORMAT_VERSION {
            return None;
        }
        let sessions = bytes[HEAD_LEN..]
            .chunks_exact(ENTRY_LEN)
            .map(|entry| {
                let mut salt = [0; SALT_LEN];
                salt.copy_from_slice(&entry[8..]);
                (u32_at(entry, 0), SessionEntry { salt, volume_key_id: u32_at(entry, 4) })
            })
            .collect();
        Some(SessionTable { generation: u64_at(bytes, 32), next: u32_at(bytes, 44), sessions })
    }

    /// What each of the two copies says; None where it is missing or damaged.
    pub(super) fn copies(
        root: &NodeRef,
        volume: &[u8; 16],
        keys: Option<&MacKeys>,
        shown: &str,
    ) -> Result<[Option<SessionTable>; 2]> {
        let mut found: [Option<SessionTable>; 2] = [None, None];
        for (name, found) in FILES.into_iter().zip(&mut found) {
            let bytes = match root.lookup(name).and_then(|node| node.open(Access::Read)) {
                Ok(file) => read_whole(&file),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => Err(error),
            };
            let bytes = bytes.context(|| cannot("read", name, shown))?;
            *found = SessionTable::decode(&bytes, volume, keys);
        }
        Ok(found)
    }

    /// Which of the two counts: that of the last update.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Reads both copies; the flags say which of them are damaged, or older than the other.
    pub(super) fn load(
        root: &NodeRef,
        volume: &[u8; 16],
        keys: &MacKeys,
        shown: &str,
    ) -> Result<(SessionTable, [bool; 2])> {
        let found = SessionTable::copies(root, volume, Some(keys), shown)?;
        let newest = found.iter().flatten().map(|table| table.generation).max();
        let behind = [0, 1].map(|copy: usize| {
            found[copy].as_ref().map(|table| table.generation) != newest || newest.is_none()
        });
        let table = found.into_iter().flatten().max_by_key(|table| table.generation);
        table.map(|table| (table, behind)).ok_or_else(|| {
            Error::corrupt(format!(
                "both copies of the session table, {shown}/sessions.a and sessions.b, are missing \
                 or damaged, and no block can be read without it; restore one from a backup"
            ))
        })
    }

    /// Writes both copies, one that is behind first, and flushes each before the next.
    pub(super) fn store(
        &self,
        root: &NodeRef,
        volume: &[u8; 16],
        keys: &MacKeys,
        behind: [bool; 2],
        shown: &str,
    ) -> Result<()> {
        let bytes = self.encode(volume, keys);
        let keep_ahead = |file: &FileRef| {
            // Without it the next ones may do.
            drop(file.allocate(0, bytes.len() as u64 + AHEAD, true));
        };
        let order = if behind[1] && !behind[0] { [FILES[1], FILES[0]] } else { FILES };
        for name in order {
            let write = || -> std::io::Result<()> {
                let node = match root.lookup(name) {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                        let file = root.create_unnamed()?;
                        file.write_at(&bytes, 0)?;
                        keep_ahead(&file);
                        file.sync_all()?;
                        root.link_file(&*file, name)?;
                        return root.sync();
                    }
                    found => found?,
                };
                let file = node.open(Access::ReadWrite)?;
                file.write_at(&bytes, 0)?;
                keep_ahead(&file);
                file.sync_all()
            };
            write().context(|| cannot("write", name, shown))?;
        }
        Ok(())
    }
}

fn cannot(verb: &str, name: &[u8], shown: &str) -> String {
    format!("cannot {verb} {shown}/{}", String::from_utf8_lossy(name))
}

fn read_whole(file: &FileRef) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        let at = bytes.len();
        if at >= MAX_LEN {
            return Ok(bytes); // and is then not authentic
        }
        bytes.resize(at + 16 * BLOCK_LEN, 0);
        let count = file.read_at(&mut bytes[at..], at as u64)?;
        if at + count < bytes.len() {
            bytes.truncate(at + count);
            return Ok(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Backing;
    use crate::backing::linux::LinuxBacking;
    use crate::crypto::mac::MacKey;
    use crate::crypto::secret::Secret;

    #[test]
    fn one_copy_is_enough_and_none_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let root = LinuxBacking::open(dir.path()).unwrap().root();
        let key = MacKey::new(&Secret::new_with(|key| key.fill(8)).unwrap()).unwrap();
        let key = MacKeys::of_one(5, key);
        let entry = |i| SessionEntry { salt: [i; SALT_LEN], volume_key_id: u32::from(i) % 7 };
        let load = || SessionTable::load(&root, &[1; 16], &key, "v");
        let mut table = SessionTable::default();
        for i in 1..=200 {
            assert_eq!(table.add(entry(i)).unwrap(), u32::from(i));
        }
        table.store(&root, &[1; 16], &key, [true, true], "v").unwrap();
        assert_eq!(load().unwrap(), (table.clone(), [false, false]));
        assert_eq!(table.get(200), Some(&entry(200)));
        assert!(SessionTable::load(&root, &[2; 16], &key, "v").is_err());

        let flip = |name: &str, at: usize| {
            let path = dir.path().join(name);
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[at] ^= 1;
            std::fs::write(path, bytes).unwrap();
        };
        flip("sessions.a", 5000);
        assert_eq!(load().unwrap(), (table.clone(), [true, false]));
        // A copy that lags behind does not count, and is written first.
        table.add(entry(9)).unwrap();
        table.store(&root, &[1; 16], &key, [true, false], "v").unwrap();
        std::fs::remove_file(dir.path().join("sessions.b")).unwrap();
        assert_eq!(load().unwrap(), (table.clone(), [false, true]));
        flip("sessions.a", 28);
        assert_eq!(load().unwrap_err().kind, Kind::Corrupt);
    }

    #[test]
    fn the_next_sessions_have_their_space_before_a_disk_is_full() {
        let dir = tempfile::tempdir().unwrap();
        let root = LinuxBacking::open(dir.path()).unwrap().root();
        let key = MacKey::new(&Secret::new_with(|key| key.fill(8)).unwrap()).unwrap();
        let key = MacKeys::of_one(5, key);
        let mut table = SessionTable::default();
        for _ in 0..2 {
            table.add(SessionEntry { salt: [1; SALT_LEN], volume_key_id: 5 }).unwrap();
            table.store(&root, &[1; 16], &key, [true, true], "v").unwrap();
            for name in FILES {
                let metadata = root.lookup(name).unwrap().metadata().unwrap();
                assert!(metadata.blocks * 512 >= AHEAD, "{metadata:?}");
                assert!(metadata.size < 200, "{metadata:?}");
            }
        }
    }
}
