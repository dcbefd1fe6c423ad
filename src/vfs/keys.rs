//! The ciphers of names and small values, made from the volume's metadata key once per opening of
//! the gate.

use std::fmt;
use std::sync::Arc;

use parking_lot::RwLock;
use rustix::io::Errno;

use crate::crypto::kdf;
use crate::crypto::secret::Secret;
use crate::crypto::siv::Siv;
use crate::error::{FsError, FsResult, Result};
use crate::key::gate::{Gate, Wipe};
use crate::store::Store;

/// Everything in `vfs` that needs a key.
pub(super) struct Ciphers {
    /// File names and the names of extended attributes: equal names seal to equal bytes.
    pub(super) names: Siv,
    /// Link targets and attribute values, each with a nonce of its own.
    pub(super) values: Siv,
}

impl Ciphers {
    fn new(metadata_key: &Secret<32>) -> Result<Ciphers> {
        let siv = |purpose: &str| -> Result<Siv> {
            let s2v = kdf::derive(metadata_key, &[], purpose, b"s2v")?;
            let ctr = kdf::derive(metadata_key, &[], purpose, b"ctr")?;
            Siv::new(&s2v, &ctr)
        };
        Ok(Ciphers { names: siv("byokfs names v1")?, values: siv("byokfs values v1")? })
    }
}

/// Gives the ciphers out for the length of a lease.
pub(super) struct Keys {
    gate: Arc<Gate>,
    store: Arc<Store>,
    /// With the epoch they belong to.
    ciphers: RwLock<Option<(u64, Ciphers)>>,
}

impl Keys {
    pub(super) fn new(gate: Arc<Gate>, store: Arc<Store>) -> Arc<Keys> {
        let keys = Arc::new(Keys { gate, store, ciphers: RwLock::new(None) });
        let holder: Arc<dyn Wipe> = Arc::clone(&keys) as Arc<dyn Wipe>;
        keys.gate.register(Arc::downgrade(&holder));
        keys
    }

    /// Runs `work`, which must be cipher work only, under a lease; its result counts only if
    /// the gate has stayed open.
    pub(super) fn with<R>(&self, work: impl FnOnce(&Ciphers) -> R) -> FsResult<R> {
        let lease = self.gate.lease()?;
        let ciphers = self.ciphers.read();
        let result = match &*ciphers {
            Some((epoch, ciphers)) if *epoch == lease.epoch() => work(ciphers),
            _ => {
                drop(ciphers);
                let key = self.store.metadata_key(lease.keyring());
                let made = key.and_then(|key| Ciphers::new(&key)).map_err(|error| {
                    log::error!("cannot derive the name keys: {error}");
                    FsError::Os(Errno::IO)
                })?;
                let mut slot = self.ciphers.write();
                let (_, ciphers) = slot.insert((lease.epoch(), made));
                work(ciphers)
            }
        };
        lease.still_open()?;
        Ok(result)
    }
}

impl Wipe for Keys {
    fn wipe(&self) {
        *self.ciphers.write() = None;
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys([secret])")
    }
}
