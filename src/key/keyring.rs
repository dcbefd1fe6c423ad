//! The volume key in memory, and everything derived from it.
//!
//! A `Keyring` is made from an unwrapped volume key and lives inside the [`super::gate::Gate`]
//! until the gate is wiped. It hands out derived keys only; the volume key itself never leaves it.

use std::fmt;

use crate::crypto::kdf;
use crate::crypto::secret::Secret;
use crate::error::Result;

/// Reserved for [`Keyring::fingerprint`]: its output is public.
const FINGERPRINT_LABEL: &str = "byokfs volume key fingerprint v1";

/// Holds the volume key in locked memory; zeroised on drop.
pub struct Keyring {
    volume_key: Secret<32>,
}

impl Keyring {
    pub fn new(volume_key: Secret<32>) -> Keyring {
        Keyring { volume_key }
    }

    /// A subkey for one purpose (`label`) and one object (`context`).
    pub fn derive(&self, label: &str, context: &[u8]) -> Result<Secret<32>> {
        debug_assert_ne!(label, FINGERPRINT_LABEL, "that label's output is public");
        kdf::derive(&self.volume_key, &[], label, context)
    }

    /// A public value that names this volume key: equal for equal keys, and of no use for
    /// anything else. `init` pins it in the host's configuration.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        Ok(*kdf::derive(&self.volume_key, &[], FINGERPRINT_LABEL, &[])?.expose())
    }
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
        Keyring::new(Secret::new_with(|key| key.fill(byte)).unwrap())
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
