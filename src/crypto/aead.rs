//! AES-256-GCM (SP 800-38D) with 96-bit nonces and 128-bit tags, by ring.
//!
//! The caller's duty: no nonce twice under one key ([`super::nonce`]).

use std::fmt;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, Tag, UnboundKey};

use super::secret::Secret;
use crate::error::{Context, Result};
use crate::sys::locked::Locked;

pub const NONCE_LEN: usize = 12;
pub const TAG_LEN: usize = 16;

/// The tag does not fit the key, nonce, associated data and ciphertext.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadTag;

/// One key, its schedule in locked memory.
pub struct BlockCipher(Locked<LessSafeKey>);

impl BlockCipher {
    pub fn new(key: &Secret<32>) -> Result<BlockCipher> {
        let make = || {
            let key = UnboundKey::new(&AES_256_GCM, key.expose());
            // The one failure is a key of the wrong length, and the type has 32 bytes.
            LessSafeKey::new(key.unwrap_or_else(|_| unreachable!("AES-256 takes 32 bytes")))
        };
        Locked::new_with(make).map(BlockCipher).context(|| "no memory for a key".into())
    }

    /// Encrypts `buf` in place and returns the tag.
    #[inline]
    pub fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], buf: &mut [u8]) -> [u8; TAG_LEN] {
        let nonce = Nonce::assume_unique_for_key(*nonce);
        match self.0.seal_in_place_separate_tag(nonce, Aad::from(aad), buf) {
            Ok(tag) => {
                let mut bytes = [0; TAG_LEN];
                bytes.copy_from_slice(tag.as_ref());
                bytes
            }
            Err(_) => unreachable!("GCM takes up to 64 GiB a message, a buffer here is far less"),
        }
    }

    /// Decrypts `buf` in place; after a [`BadTag`] its content is undefined, but holds no
    /// unauthenticated plaintext that the caller may use.
    #[inline]
    pub fn open(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        buf: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> std::result::Result<(), BadTag> {
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let tag = Tag::from(*tag);
        match self.0.open_in_place_separate_tag(nonce, Aad::from(aad), tag, buf, 0..) {
            Ok(_) => Ok(()),
            Err(_) => Err(BadTag),
        }
    }
}

impl fmt::Debug for BlockCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BlockCipher([secret])")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aes_gcm::aead::{AeadInOut, KeyInit};

    /// Against the independent implementation, over sizes around the block boundaries.
    #[test]
    fn agrees_with_the_aes_gcm_crate() {
        let key = Secret::<32>::random().unwrap();
        let ours = BlockCipher::new(&key).unwrap();
        let theirs = aes_gcm::Aes256Gcm::new(key.expose().into());
        for len in [0, 1, 15, 16, 17, 255, 256, 4095, 4096, 4097, 20000] {
            let nonce: [u8; 12] = super::super::random::bytes().unwrap();
            let mut a = vec![0x42; len];
            let mut b = a.clone();
            let tag = ours.seal(&nonce, b"aad", &mut a);
            let expected = theirs
                .encrypt_inout_detached(&nonce.into(), b"aad", b.as_mut_slice().into())
                .unwrap();
            assert_eq!((a.as_slice(), tag.as_slice()), (b.as_slice(), expected.as_slice()));
            ours.open(&nonce, b"aad", &mut a, &tag).unwrap();
            assert_eq!(a, vec![0x42; len]);
        }
    }

    #[test]
    fn every_bit_counts() {
        let cipher = BlockCipher::new(&Secret::random().unwrap()).unwrap();
        let nonce = [1; 12];
        let mut sealed = *b"sixteen bytes ok";
        let tag = cipher.seal(&nonce, b"aad", &mut sealed);
        for bit in 0..128 {
            let mut flipped = sealed;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(cipher.open(&nonce, b"aad", &mut flipped, &tag), Err(BadTag));
            let mut wrong = tag;
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(cipher.open(&nonce, b"aad", &mut sealed.clone(), &wrong), Err(BadTag));
        }
        assert_eq!(cipher.open(&[2; 12], b"aad", &mut sealed.clone(), &tag), Err(BadTag));
        assert_eq!(cipher.open(&nonce, b"aae", &mut sealed.clone(), &tag), Err(BadTag));
    }
}
