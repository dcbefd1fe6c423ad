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
pub struct BlockCipher(Locked<LessSafeKey>, #[cfg(test)] seals::KeyId);

impl BlockCipher {
    pub fn new(key: &Secret<32>) -> Result<BlockCipher> {
        let make = || {
            let key = UnboundKey::new(&AES_256_GCM, key.expose());
            // The one failure is a key of the wrong length, and the type has 32 bytes.
            LessSafeKey::new(key.unwrap_or_else(|_| unreachable!("AES-256 takes 32 bytes")))
        };
        let schedule = Locked::new_with(make).context(|| "no memory for a key".into())?;
        Ok(BlockCipher(
            schedule,
            #[cfg(test)]
            seals::id_of(key.expose()),
        ))
    }

    /// Encrypts `buf` in place and returns the tag.
    #[inline]
    pub fn seal(&self, nonce: &[u8; NONCE_LEN], aad: &[u8], buf: &mut [u8]) -> [u8; TAG_LEN] {
        #[cfg(test)]
        seals::note(&self.1, nonce, aad, buf);
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

/// What the tests of this crate have sealed: no nonce ever seals two things under one key, whoever
/// made the key and however often the volume was copied. A test in which one does fails at once.
#[cfg(test)]
pub(crate) mod seals {
    use std::cell::Cell;
    use std::collections::HashMap;
    use std::sync::LazyLock;

    use crate::sync::Mutex;
    use ring::digest::{Context, SHA256};

    use super::NONCE_LEN;

    pub(crate) type KeyId = [u8; 16];
    type Digest = [u8; 16];

    type Seals = HashMap<(KeyId, [u8; NONCE_LEN]), Digest>;

    static SEALED: LazyLock<Mutex<Seals>> = LazyLock::new(Mutex::default);

    thread_local! {
        /// How many were found, while somebody looks for them.
        static FOUND: Cell<Option<usize>> = const { Cell::new(None) };
        static COUNT: Cell<usize> = const { Cell::new(0) };
    }

    pub(super) fn id_of(key: &[u8]) -> KeyId {
        digest(&[key])
    }

    fn digest(parts: &[&[u8]]) -> Digest {
        let mut context = Context::new(&SHA256);
        for part in parts {
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part);
        }
        let mut digest = [0; 16];
        digest.copy_from_slice(&context.finish().as_ref()[..16]);
        digest
    }

    pub(super) fn note(key: &KeyId, nonce: &[u8; NONCE_LEN], aad: &[u8], plain: &[u8]) {
        COUNT.set(COUNT.get() + 1);
        let sealed = digest(&[aad, plain]);
        let known = *SEALED.lock().entry((*key, *nonce)).or_insert(sealed);
        if known != sealed {
            let found = FOUND.get().map(|found| found + 1);
            assert!(found.is_some(), "nonce {nonce:02x?} seals two things under one key");
            FOUND.set(found);
        }
    }

    /// How much this thread has sealed.
    pub(crate) fn count() -> usize {
        COUNT.get()
    }

    /// Runs what is to use nonces of this thread again, and says how many of them it does.
    pub(crate) fn reused(work: impl FnOnce()) -> usize {
        FOUND.set(Some(0));
        work();
        FOUND.take().unwrap_or(0)
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

    #[test]
    fn a_nonce_for_two_things_is_noticed() {
        let cipher = BlockCipher::new(&Secret::random().unwrap()).unwrap();
        let other = BlockCipher::new(&Secret::random().unwrap()).unwrap();
        let seal = |cipher: &BlockCipher, aad: &[u8], text: &[u8]| {
            cipher.seal(&[1; 12], aad, &mut text.to_vec());
        };
        seal(&cipher, b"aad", b"one");
        assert_eq!(seals::reused(|| seal(&cipher, b"aad", b"one")), 0, "the same again");
        assert_eq!(seals::reused(|| seal(&other, b"aad", b"two")), 0, "another key");
        assert_eq!(seals::reused(|| seal(&cipher, b"aad", b"two")), 1);
        assert_eq!(seals::reused(|| seal(&cipher, b"aa", b"done")), 1);
    }
}
