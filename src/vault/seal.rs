//! Private keys at rest: AES-256-GCM under a key derived from the root key.
//!
//! Each sealed value has a 32-byte salt of its own and so a key of its own, used for this one
//! value: the nonce can be constant. The associated data binds it to the vault and to what it
//! is (a key's name and version, say), so that sealed values cannot be swapped for each other.
//!
//! Bytes: format (1) | salt (32) | ciphertext | tag (16).

use std::fmt;

use crate::crypto::aead::{BlockCipher, NONCE_LEN, TAG_LEN};
use crate::crypto::secret::{Secret, SecretBytes};
use crate::crypto::{kdf, random};
use crate::error::{Error, Result};

use super::codec::length_prefixed;

const FORMAT: u8 = 1;
const SALT_LEN: usize = 32;
const LABEL: &str = "byokfs vault at rest";

pub(crate) struct Sealer {
    root: Secret<32>,
    vault_id: String,
}

impl Sealer {
    pub(crate) fn new(root: Secret<32>, vault_id: &str) -> Sealer {
        Sealer { root, vault_id: vault_id.to_owned() }
    }

    /// Seals `plaintext` as the thing that `place` names.
    pub(crate) fn seal(&self, place: &[&str], plaintext: &[u8]) -> Result<Vec<u8>> {
        let salt: [u8; SALT_LEN] = random::bytes()?;
        let mut sealed = Vec::with_capacity(1 + SALT_LEN + plaintext.len() + TAG_LEN);
        sealed.push(FORMAT);
        sealed.extend_from_slice(&salt);
        sealed.extend_from_slice(plaintext);
        let tag = self.cipher(&salt)?.seal(
            &[0; NONCE_LEN],
            &self.associated_data(place),
            &mut sealed[1 + SALT_LEN..],
        );
        sealed.extend_from_slice(&tag);
        Ok(sealed)
    }

    /// `Corrupt` if the bytes were changed, are another place's, or the root key is another.
    pub(crate) fn open(&self, place: &[&str], sealed: &[u8]) -> Result<SecretBytes> {
        let damaged = || {
            Error::corrupt(format!(
                "the sealed {} does not open with this root key",
                place.join(" ")
            ))
        };
        let (salt, ciphertext, tag) = split(sealed).ok_or_else(damaged)?;
        let cipher = self.cipher(salt)?;
        let mut opened = Err(crate::crypto::aead::BadTag);
        let secret = SecretBytes::new_with(ciphertext.len(), |place_in_memory| {
            place_in_memory.copy_from_slice(ciphertext);
            opened =
                cipher.open(&[0; NONCE_LEN], &self.associated_data(place), place_in_memory, tag);
        })?;
        opened.map_err(|_| damaged())?;
        Ok(secret)
    }

    /// Seals a key version's private key. Names of keys do not differ in case alone.
    pub(crate) fn seal_private(&self, name: &str, version: &str, pkcs8: &[u8]) -> Result<Vec<u8>> {
        self.seal(&["key", &name.to_ascii_lowercase(), version], pkcs8)
    }

    pub(crate) fn open_private(
        &self,
        name: &str,
        version: &str,
        sealed: &[u8],
    ) -> Result<SecretBytes> {
        self.open(&["key", &name.to_ascii_lowercase(), version], sealed)
    }

    /// As [`Sealer::open`] for what may be larger than a secret and is none: sealed values that
    /// hold nothing but sealed values.
    pub(crate) fn open_large(&self, place: &[&str], sealed: &[u8]) -> Result<Vec<u8>> {
        let damaged = || Error::corrupt(format!("the sealed {} does not open", place.join(" ")));
        let (salt, ciphertext, tag) = split(sealed).ok_or_else(damaged)?;
        let mut bytes = ciphertext.to_vec();
        self.cipher(salt)?
            .open(&[0; NONCE_LEN], &self.associated_data(place), &mut bytes, tag)
            .map_err(|_| damaged())?;
        Ok(bytes)
    }

    fn cipher(&self, salt: &[u8]) -> Result<BlockCipher> {
        BlockCipher::new(&kdf::derive(&self.root, salt, LABEL, self.vault_id.as_bytes())?)
    }

    fn associated_data(&self, place: &[&str]) -> Vec<u8> {
        let mut parts = vec![self.vault_id.as_bytes()];
        parts.extend(place.iter().map(|part| part.as_bytes()));
        length_prefixed(&parts)
    }
}

/// Salt, ciphertext, tag.
fn split(sealed: &[u8]) -> Option<(&[u8], &[u8], &[u8; TAG_LEN])> {
    let (&format, rest) = sealed.split_first()?;
    let (salt, rest) = rest.split_at_checked(SALT_LEN)?;
    let (ciphertext, tag) = rest.split_last_chunk::<TAG_LEN>()?;
    (format == FORMAT).then_some((salt, ciphertext, tag))
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").field("vault_id", &self.vault_id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn sealer(root: u8, id: &str) -> Sealer {
        Sealer::new(Secret::new_with(|bytes| bytes.fill(root)).unwrap(), id)
    }

    #[test]
    fn a_sealed_value_opens_in_its_place_only() {
        let sealed = sealer(1, "v").seal(&["key", "kek", "abc"], b"private").unwrap();
        let open = |sealer: Sealer, place: &[&str]| sealer.open(place, &sealed);
        assert_eq!(open(sealer(1, "v"), &["key", "kek", "abc"]).unwrap().expose(), b"private");
        for (sealer, place) in [
            (sealer(1, "v"), ["key", "kek", "abd"]),
            (sealer(1, "v"), ["key", "keka", "bc"]),
            (sealer(2, "v"), ["key", "kek", "abc"]),
            (sealer(1, "w"), ["key", "kek", "abc"]),
        ] {
            assert_eq!(open(sealer, &place).unwrap_err().kind, Kind::Corrupt);
        }
    }

    #[test]
    fn any_flipped_bit_and_any_truncation_is_noticed() {
        let sealer = sealer(1, "v");
        let sealed = sealer.seal(&["x"], b"p").unwrap();
        for bit in 0..sealed.len() * 8 {
            let mut damaged = sealed.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(sealer.open(&["x"], &damaged).is_err(), "bit {bit}");
        }
        for len in 0..sealed.len() {
            assert!(sealer.open(&["x"], &sealed[..len]).is_err(), "length {len}");
        }
    }

    #[test]
    fn the_plaintext_is_not_in_it_and_no_two_are_alike() {
        let sealer = sealer(1, "v");
        let plaintext = [0x5a; 64];
        let (one, two) =
            (sealer.seal(&["x"], &plaintext).unwrap(), sealer.seal(&["x"], &plaintext).unwrap());
        assert_ne!(one, two);
        assert!(!one.windows(8).any(|window| window == [0x5a; 8]));
    }
}
