//! Keys of files, derived while a lease is held and kept, bounded, until the gate is wiped.
//!
//! ```text
//! volume key -> header, volume, session table and log anchor MAC keys   one each
//!            -> log key of one session                             KDF(volume key, label, salt)
//!            -> wraps of a file's DEKs and of its MAC key          KDF(volume key, label, file id)
//! DEK        -> block key of one session                           KDF(DEK, salt, file id)
//! ```
//!
//! Everything here belongs to one opening of the gate: a lease of another epoch finds it empty.
//! No lock is held across I/O.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use rustix::io::Errno;

use super::Session;
use super::header::Header;
use super::intent_log::SessionKey;
use super::session::{Salt, SessionEntry};
use crate::crypto::aead::BlockCipher;
use crate::crypto::mac::MacKey;
use crate::crypto::secret::Secret;
use crate::crypto::{kdf, wrap};
use crate::error::{Error, FsError, FsResult, Kind, Result};
use crate::key::gate::{Gate, Keyring, Lease};
use crate::sync::Mutex;

const LABEL_VOLUME: &str = "byokfs volume mac v1";
const LABEL_SESSIONS: &str = "byokfs session table mac v1";
const LABEL_HEADER: &str = "byokfs file header mac v1";
const LABEL_ANCHOR: &str = "byokfs log anchor mac v1";
const LABEL_LOG: &str = "byokfs log record mac v1";
const LABEL_DEK_WRAP: &str = "byokfs dek wrap v1";
const LABEL_MAC_WRAP: &str = "byokfs file mac wrap v1";
const LABEL_METADATA_WRAP: &str = "byokfs metadata key wrap v1";
const LABEL_BLOCK: &str = "byokfs block key v1";

/// Block keys kept; each takes 1 KiB of locked memory.
const MAX_CIPHERS: usize = 4096;
/// Files whose MAC key is kept.
const MAX_MACS: usize = 4096;

type FileId = [u8; 16];
pub(super) type Wrapped = [u8; wrap::WRAPPED_LEN];

/// MAC keys of one purpose, each by the volume key that it comes from: what is authenticated names
/// that. The current one first.
#[derive(Debug)]
pub(super) struct MacKeys(Vec<(u32, MacKey)>);

impl MacKeys {
    fn derive(keyring: &Keyring, label: &str) -> Result<MacKeys> {
        let mut keys = Vec::with_capacity(1);
        for id in keyring.ids() {
            if let Some(key) = keyring.derive_by(id, label, &[])? {
                keys.push((id, MacKey::new(&key)?));
            }
        }
        Ok(MacKeys(keys))
    }

    /// None where that volume key is not here.
    pub(super) fn get(&self, id: u32) -> Option<&MacKey> {
        self.0.iter().find(|(known, _)| *known == id).map(|(_, key)| key)
    }

    /// What new things are made with.
    pub(super) fn current(&self) -> (u32, &MacKey) {
        (self.0[0].0, &self.0[0].1)
    }

    #[cfg(test)]
    pub(super) fn of_one(id: u32, key: MacKey) -> MacKeys {
        MacKeys(vec![(id, key)])
    }
}

/// Where the volume key is, for who derives keys of it outside a session.
#[derive(Clone, Copy, Debug)]
pub(super) enum KeySource<'a> {
    Held(&'a Keyring),
    /// Under a lease each time.
    Gate(&'a Gate),
}

impl KeySource<'_> {
    pub(super) fn with<R>(&self, derive: impl FnOnce(&Keyring) -> Result<R>) -> Result<R> {
        match self {
            KeySource::Held(keyring) => derive(keyring),
            KeySource::Gate(gate) => {
                let lost = |_| Error::new(Kind::Inaccessible, "the key was lost meanwhile");
                let lease = gate.lease().map_err(lost)?;
                let derived = derive(lease.keyring())?;
                lease.still_open().map_err(lost)?;
                Ok(derived)
            }
        }
    }
}

pub(super) fn volume_macs(keyring: &Keyring) -> Result<MacKeys> {
    MacKeys::derive(keyring, LABEL_VOLUME)
}

pub(super) fn sessions_macs(keyring: &Keyring) -> Result<MacKeys> {
    MacKeys::derive(keyring, LABEL_SESSIONS)
}

pub(super) fn anchor_macs(keyring: &Keyring) -> Result<MacKeys> {
    MacKeys::derive(keyring, LABEL_ANCHOR)
}

/// Of the records of a session in the log with that id; None where its volume key is not here.
pub(super) fn log_mac(
    keyring: &Keyring,
    session: &SessionEntry,
    log_id: &[u8; 16],
) -> Result<Option<MacKey>> {
    let context = [&session.salt[..], log_id].concat();
    let key = keyring.derive_by(session.volume_key_id, LABEL_LOG, &context)?;
    key.map(|key| MacKey::new(&key)).transpose()
}

/// A new key for the volume's names and small values, wrapped, for the volume header.
pub(super) fn new_metadata_key(keyring: &Keyring, volume: &[u8; 16]) -> Result<Wrapped> {
    wrap_metadata_key(keyring, volume, &Secret::random()?)
}

/// With the current volume key.
pub(super) fn wrap_metadata_key(
    keyring: &Keyring,
    volume: &[u8; 16],
    key: &Secret<32>,
) -> Result<Wrapped> {
    Ok(wrap::wrap(&keyring.derive(LABEL_METADATA_WRAP, volume)?, key))
}

/// The same header with its keys wrapped by the current volume key.
pub(super) fn rewrap(keyring: &Keyring, header: &Header) -> FsResult<Header> {
    let file = &header.file_id;
    let again = |label: &str, wrapped: &Wrapped| -> FsResult<Wrapped> {
        let key = unwrap(keyring, header.volume_key_id, file, label, wrapped)?;
        let kek = keyring.derive(label, file).map_err(no_memory)?;
        Ok(wrap::wrap(&kek, &key))
    };
    let mut rewrapped = header.clone();
    rewrapped.volume_key_id = keyring.id();
    rewrapped.wrapped_mac_key = again(LABEL_MAC_WRAP, &header.wrapped_mac_key)?;
    for slot in &mut rewrapped.deks {
        slot.wrapped = again(LABEL_DEK_WRAP, &slot.wrapped)?;
    }
    Ok(rewrapped)
}

/// None where it was not wrapped with that volume key.
pub(super) fn metadata_key(
    keyring: &Keyring,
    volume_key_id: u32,
    volume: &[u8; 16],
    wrapped: &Wrapped,
) -> Result<Option<Secret<32>>> {
    match keyring.derive_by(volume_key_id, LABEL_METADATA_WRAP, volume)? {
        Some(kek) => wrap::unwrap(&kek, wrapped),
        None => Ok(None),
    }
}

/// A new key of a file, wrapped, for a header that names that volume key.
pub(super) fn new_dek(keyring: &Keyring, volume_key_id: u32, file: &FileId) -> FsResult<Wrapped> {
    new_wrapped(keyring, volume_key_id, LABEL_DEK_WRAP, file)
}

pub(super) fn new_mac_key(
    keyring: &Keyring,
    volume_key_id: u32,
    file: &FileId,
) -> FsResult<Wrapped> {
    new_wrapped(keyring, volume_key_id, LABEL_MAC_WRAP, file)
}

fn new_wrapped(
    keyring: &Keyring,
    volume_key_id: u32,
    label: &str,
    file: &FileId,
) -> FsResult<Wrapped> {
    let kek = keyring.derive_by(volume_key_id, label, file).map_err(no_memory)?;
    // A header that names another one does not get this far.
    let kek = kek.ok_or(Errno::IO)?;
    Ok(wrap::wrap(&kek, &Secret::random().map_err(no_memory)?))
}

/// The one failure of deriving a key is that no memory can be locked for it.
fn no_memory(error: Error) -> FsError {
    log::error!("{error}");
    Errno::NOMEM.into()
}

/// Keeps at most a fixed number of values; drops those unused the longest, roughly.
#[derive(Debug)]
struct Bounded<K, V> {
    limit: usize,
    map: HashMap<K, (Arc<V>, u64)>,
    clock: u64,
}

impl<K: Eq + Hash + Copy, V> Bounded<K, V> {
    fn new(limit: usize) -> Bounded<K, V> {
        Bounded { limit, map: HashMap::new(), clock: 0 }
    }

    fn get(&mut self, key: &K) -> Option<Arc<V>> {
        self.clock += 1;
        let (value, used) = self.map.get_mut(key)?;
        *used = self.clock;
        Some(value.clone())
    }

    fn insert(&mut self, key: K, value: Arc<V>) {
        if self.map.len() >= self.limit {
            // A quarter at once, so that the search is paid for by many insertions.
            let mut ages: Vec<u64> = self.map.values().map(|(_, used)| *used).collect();
            let (_, &mut oldest, _) = ages.select_nth_unstable(self.limit / 4);
            self.map.retain(|_, (_, used)| *used > oldest);
        }
        self.map.insert(key, (value, self.clock));
    }
}

#[derive(Debug)]
struct Derived {
    epoch: u64,
    headers: Option<Arc<MacKeys>>,
    anchors: Option<Arc<MacKeys>>,
    log: Option<SessionKey>,
    macs: Bounded<FileId, MacKey>,
    ciphers: Bounded<(FileId, u16, u32), BlockCipher>,
}

impl Derived {
    fn new(epoch: u64) -> Derived {
        Derived {
            epoch,
            headers: None,
            anchors: None,
            log: None,
            macs: Bounded::new(MAX_MACS),
            ciphers: Bounded::new(MAX_CIPHERS),
        }
    }
}

/// The keys derived since the gate opened.
#[derive(Debug)]
pub(super) struct Keys(Mutex<Derived>);

impl Keys {
    pub(super) fn new() -> Keys {
        Keys(Mutex::new(Derived::new(0)))
    }

    pub(super) fn wipe(&self) {
        *self.0.lock() = Derived::new(0);
    }

    fn cached<V>(
        &self,
        lease: &Lease<'_>,
        find: impl FnOnce(&mut Derived) -> Option<Arc<V>>,
    ) -> Option<Arc<V>> {
        let mut derived = self.0.lock();
        if derived.epoch != lease.epoch() {
            *derived = Derived::new(lease.epoch());
        }
        find(&mut derived)
    }

    /// Keeps what was derived, unless the gate was shut, and perhaps wiped, in the meantime.
    fn keep<V>(
        &self,
        lease: &Lease<'_>,
        value: V,
        store: impl FnOnce(&mut Derived, Arc<V>),
    ) -> Arc<V> {
        let value = Arc::new(value);
        let mut derived = self.0.lock();
        if derived.epoch == lease.epoch() && lease.still_open().is_ok() {
            store(&mut derived, value.clone());
        }
        value
    }

    pub(super) fn header_macs(&self, lease: &Lease<'_>) -> FsResult<Arc<MacKeys>> {
        if let Some(keys) = self.cached(lease, |derived| derived.headers.clone()) {
            return Ok(keys);
        }
        let keys = MacKeys::derive(lease.keyring(), LABEL_HEADER).map_err(no_memory)?;
        Ok(self.keep(lease, keys, |derived, keys| derived.headers = Some(keys)))
    }

    pub(super) fn anchor_macs(&self, lease: &Lease<'_>) -> FsResult<Arc<MacKeys>> {
        if let Some(keys) = self.cached(lease, |derived| derived.anchors.clone()) {
            return Ok(keys);
        }
        let keys = anchor_macs(lease.keyring()).map_err(no_memory)?;
        Ok(self.keep(lease, keys, |derived, keys| derived.anchors = Some(keys)))
    }

    /// The key of the records that this session appends.
    pub(super) fn log_key(
        &self,
        lease: &Lease<'_>,
        session: &Session,
        log_id: &[u8; 16],
    ) -> FsResult<SessionKey> {
        let number = session.counter.session();
        let same = |key: &SessionKey| key.session == number;
        let known = self.cached(lease, |derived| {
            derived.log.as_ref().filter(|key| same(key)).map(|key| key.key.clone())
        });
        if let Some(key) = known {
            return Ok(SessionKey { session: number, key });
        }
        let key = log_mac(lease.keyring(), &session.entry, log_id).map_err(no_memory)?;
        // A session is begun with the keyring that the gate is opened with.
        let key = key.ok_or(Errno::IO)?;
        let key = self.keep(lease, key, |derived, key| {
            derived.log = Some(SessionKey { session: number, key });
        });
        Ok(SessionKey { session: number, key })
    }

    /// The key of a file's tag and generation sectors.
    pub(super) fn file_mac(&self, lease: &Lease<'_>, header: &FileKeys) -> FsResult<Arc<MacKey>> {
        let file = header.file_id;
        if let Some(key) = self.cached(lease, |derived| derived.macs.get(&file)) {
            return Ok(key);
        }
        let key = header.unwrap(lease, LABEL_MAC_WRAP, &header.wrapped_mac_key)?;
        let key = MacKey::new(&key).map_err(no_memory)?;
        Ok(self.keep(lease, key, |derived, key| derived.macs.insert(file, key)))
    }

    /// Forgets the block keys of DEK slots that a file has no more.
    pub(super) fn forget_slots(&self, file: &FileId, slots: &[u16]) {
        let gone = |key: &(FileId, u16, u32)| key.0 == *file && slots.contains(&key.1);
        self.0.lock().ciphers.map.retain(|key, _| !gone(key));
    }

    /// What of a file's wrapped keys does not unwrap.
    pub(super) fn unusable(&self, lease: &Lease<'_>, header: &FileKeys) -> FsResult<Vec<String>> {
        let mut unusable = Vec::new();
        let mut check = |label, wrapped, what: String| match header.unwrap(lease, label, wrapped) {
            Ok(_) => Ok(()),
            Err(FsError::Integrity(_)) => {
                unusable.push(what);
                Ok(())
            }
            Err(error) => Err(error),
        };
        let what = "its MAC key does not unwrap".to_owned();
        check(LABEL_MAC_WRAP, &header.wrapped_mac_key, what)?;
        for (slot, wrapped) in &header.deks {
            let what = format!("the key of DEK slot {slot} does not unwrap");
            check(LABEL_DEK_WRAP, wrapped, what)?;
        }
        Ok(unusable)
    }

    /// The block key of a DEK slot and a session; `salt` is that session's.
    pub(super) fn cipher(
        &self,
        lease: &Lease<'_>,
        header: &FileKeys,
        dek_slot: u16,
        session: u32,
        salt: &Salt,
    ) -> FsResult<Arc<BlockCipher>> {
        let file = header.file_id;
        let index = (file, dek_slot, session);
        if let Some(key) = self.cached(lease, |derived| derived.ciphers.get(&index)) {
            return Ok(key);
        }
        let wrapped = header.deks.iter().find(|(id, _)| *id == dek_slot).ok_or_else(|| {
            let detail = format!("a block names DEK slot {dek_slot}, the header has none");
            FsError::integrity("header", hex(&file), None, detail)
        })?;
        let dek = header.unwrap(lease, LABEL_DEK_WRAP, &wrapped.1)?;
        let key = kdf::derive(&dek, salt, LABEL_BLOCK, &file).map_err(no_memory)?;
        let cipher = BlockCipher::new(&key).map_err(no_memory)?;
        Ok(self.keep(lease, cipher, |derived, key| derived.ciphers.insert(index, key)))
    }
}

/// The wrapped keys of one file, out of its header.
#[derive(Clone, Debug)]
pub(super) struct FileKeys {
    pub file_id: FileId,
    pub active_dek: u16,
    volume_key_id: u32,
    deks: Vec<(u16, Wrapped)>,
    wrapped_mac_key: Wrapped,
}

impl FileKeys {
    pub(super) fn of(header: &Header) -> FileKeys {
        FileKeys {
            file_id: header.file_id,
            active_dek: header.active_dek,
            volume_key_id: header.volume_key_id,
            deks: header.deks.iter().map(|slot| (slot.id, slot.wrapped)).collect(),
            wrapped_mac_key: header.wrapped_mac_key,
        }
    }

    fn unwrap(&self, lease: &Lease<'_>, label: &str, wrapped: &Wrapped) -> FsResult<Secret<32>> {
        unwrap(lease.keyring(), self.volume_key_id, &self.file_id, label, wrapped)
    }
}

fn unwrap(
    keyring: &Keyring,
    volume_key_id: u32,
    file: &FileId,
    label: &str,
    wrapped: &Wrapped,
) -> FsResult<Secret<32>> {
    let damaged = |detail| FsError::integrity("header", hex(file), None, detail);
    let kek = keyring.derive_by(volume_key_id, label, file).map_err(no_memory)?;
    let kek = kek.ok_or_else(|| damaged("it names a volume key that is not this volume's"))?;
    let key = wrap::unwrap(&kek, wrapped).map_err(no_memory)?;
    key.ok_or_else(|| damaged("a wrapped key does not unwrap"))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_last_stays() {
        let mut kept = Bounded::new(100);
        for i in 0..1000_u32 {
            kept.insert(i, Arc::new(i));
            assert!(kept.get(&i).is_some() && kept.map.len() <= 100);
            assert!(kept.get(&0).is_some(), "used all the time");
        }
        assert!(kept.get(&999).is_some() && kept.get(&500).is_none());
    }
}
