//! The volume key in memory, and everything derived from it.
//!
//! A `Keyring` is made from an unwrapped volume key and lives inside the [`super::gate::Gate`]
//! until the gate is wiped. It hands out derived keys only; the volume key itself never leaves it.
//!
//! While a volume is being rotated to a new volume key it holds both: everything that is made is
//! made with the current one, and what names the retiring one can still be read.

use std::fmt;

use crate::crypto::kdf;
use crate::crypto::secret::Secret;
use crate::error::Result;

/// Reserved for [`Keyring::fingerprint`]: its output is public.
const FINGERPRINT_LABEL: &str = "byokfs volume key fingerprint v1";

/// Holds the volume key in locked memory; zeroised on drop.
pub struct Keyring {
    /// The current one first.
    volume_keys: Vec<(u32, Secret<32>)>,
}

impl Keyring {
    /// `id` is the number of the volume key: what it wraps names it.
    pub fn new(id: u32, volume_key: Secret<32>) -> Keyring {
        Keyring { volume_keys: vec![(id, volume_key)] }
    }

    /// With the volume key from before, as long as something may still name it.
    #[must_use]
    pub fn with_retiring(mut self, id: u32, volume_key: Secret<32>) -> Keyring {
        self.volume_keys.push((id, volume_key));
        self
    }

    /// Another one with the same keys.
    pub fn try_clone(&self) -> Result<Keyring> {
        let keys = self.volume_keys.iter().map(|(id, key)| Ok((*id, key.try_clone()?)));
        Ok(Keyring { volume_keys: keys.collect::<Result<_>>()? })
    }

    /// Of the current volume key.
    pub fn id(&self) -> u32 {
        self.volume_keys[0].0
    }

    /// Of every volume key here, the current one first.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.volume_keys.iter().map(|(id, _)| *id)
    }

    /// A subkey of the current volume key for one purpose (`label`) and one object (`context`).
    pub fn derive(&self, label: &str, context: &[u8]) -> Result<Secret<32>> {
        debug_assert_ne!(label, FINGERPRINT_LABEL, "that label's output is public");
        kdf::derive(&self.volume_keys[0].1, &[], label, context)
    }

    /// The same of the volume key that is named; None where that is not here.
    pub fn derive_by(&self, id: u32, label: &str, context: &[u8]) -> Result<Option<Secret<32>>> {
        debug_assert_ne!(label, FINGERPRINT_LABEL, "that label's output is public");
        let named = self.volume_keys.iter().find(|(known, _)| *known == id);
        named.map(|(_, key)| kdf::derive(key, &[], label, context)).transpose()
    }

    /// A public value that names the current volume key: equal for equal keys, and of no use for
    /// anything else. `init` pins it in the host's configuration.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        fingerprint(&self.volume_keys[0].1)
    }
}

/// As [`Keyring::fingerprint`].
pub fn fingerprint(volume_key: &Secret<32>) -> Result<[u8; 32]> {
    Ok(*kdf::derive(volume_key, &[], FINGERPRINT_LABEL, &[])?.expose())
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keyring(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyring(byte: u8) -> Keyring {
        Keyring::new(1, secret(byte))
    }

    fn secret(byte: u8) -> Secret<32> {
        Secret::new_with(|key| key.fill(byte)).unwrap()
    }

    #[test]
    fn derived_keys_differ_by_key_label_and_context() {
        let ring = keyring(1);
        let base = ring.derive("dek", b"file 1").unwrap();
        assert!(base.ct_eq(&ring.derive("dek", b"file 1").unwrap()));
        assert!(!base.ct_eq(&ring.derive("dek", b"file 2").unwrap()));
        assert!(!base.ct_eq(&ring.derive("mac", b"file 1").unwrap()));
        assert!(!base.ct_eq(&keyring(2).derive("dek", b"file 1").unwrap()));
    }

    #[test]
    fn a_retiring_key_only_serves_what_names_it() {
        let ring = Keyring::new(2, secret(2)).with_retiring(1, secret(1));
        assert_eq!((ring.id(), ring.ids().collect::<Vec<_>>()), (2, vec![2, 1]));
        let of = |id| ring.derive_by(id, "dek", b"file").unwrap();
        assert!(of(1).unwrap().ct_eq(&keyring(1).derive("dek", b"file").unwrap()));
        assert!(of(2).unwrap().ct_eq(&ring.derive("dek", b"file").unwrap()));
        assert!(of(3).is_none());
        assert_eq!(ring.fingerprint().unwrap(), keyring(2).fingerprint().unwrap());
    }

    #[test]
    fn the_fingerprint_names_the_key_and_is_not_the_key() {
        assert_eq!(keyring(1).fingerprint().unwrap(), keyring(1).fingerprint().unwrap());
        assert_ne!(keyring(1).fingerprint().unwrap(), keyring(2).fingerprint().unwrap());
        assert_ne!(keyring(1).fingerprint().unwrap(), [1; 32]);
    }

    #[test]
    fn debug_shows_nothing() {
        assert_eq!(format!("{:?}", keyring(7)), "Keyring(redacted)");
    }
}
