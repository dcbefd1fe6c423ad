//! Symmetric keys of a Managed HSM (`oct-HSM`): AES key wrap (RFC 3394), and nothing else.

use aes_kw::cipher::KeyInit as _;
use aes_kw::{KwAes128, KwAes192, KwAes256};

use super::EncryptionAlgorithm;
use crate::crypto::secret::SecretBytes;
use crate::error::{Error, Kind, Result};
use crate::vault::refusal::Refusal;

/// What key wrap adds.
const OVERHEAD: usize = 8;
/// Shortest and longest value that is wrapped.
const LENGTHS: std::ops::RangeInclusive<usize> = 16..=1024;

pub(crate) struct SymmetricKey(SecretBytes);

impl SymmetricKey {
    /// None: not a size of AES.
    pub(crate) fn from_bytes(bytes: SecretBytes) -> Option<SymmetricKey> {
        matches!(bytes.len(), 16 | 24 | 32).then_some(SymmetricKey(bytes))
    }

    /// The key, and its bytes to be sealed.
    pub(crate) fn generate(bits: u32) -> Result<(SymmetricKey, SecretBytes)> {
        let unusable = || Error::usage(format!("a symmetric key has no {bits} bits"));
        let len = usize::try_from(bits / 8).map_err(|_| unusable())?;
        let mut filled = Ok(());
        let bytes =
            SecretBytes::new_with(len, |place| filled = crate::crypto::random::fill(place))?;
        filled?;
        let copy = SecretBytes::new_with(len, |place| place.copy_from_slice(bytes.expose()))?;
        Ok((SymmetricKey::from_bytes(bytes).ok_or_else(unusable)?, copy))
    }

    pub(crate) fn bits(&self) -> u32 {
        // 16 to 32 bytes.
        self.0.len() as u32 * 8
    }

    /// The name of the algorithm says the size of the key.
    fn require(&self, algorithm: EncryptionAlgorithm) -> Result<(), Refusal> {
        if algorithm.symmetric_bits() == Some(self.bits()) {
            Ok(())
        } else {
            Err(Refusal::bad_parameter("Property 'alg' is not an algorithm for this key."))
        }
    }

    pub(super) fn wrap(
        &self,
        algorithm: EncryptionAlgorithm,
        plaintext: &[u8],
    ) -> Result<Vec<u8>, Refusal> {
        self.require(algorithm)?;
        if !LENGTHS.contains(&plaintext.len()) || !plaintext.len().is_multiple_of(8) {
            return Err(Refusal::bad_parameter(
                "Property 'value' must have 16 to 1024 bytes, a multiple of 8.",
            ));
        }
        let mut out = vec![0; plaintext.len() + OVERHEAD];
        let wrapped = match self.0.len() {
            16 => KwAes128::new_from_slice(self.0.expose())
                .map(|key| key.wrap_key(plaintext, &mut out).is_ok()),
            24 => KwAes192::new_from_slice(self.0.expose())
                .map(|key| key.wrap_key(plaintext, &mut out).is_ok()),
            _ => KwAes256::new_from_slice(self.0.expose())
                .map(|key| key.wrap_key(plaintext, &mut out).is_ok()),
        };
        if !wrapped.unwrap_or(false) {
            return Err(Error::new(Kind::Io, "AES key wrap failed").into());
        }
        Ok(out)
    }

    pub(super) fn unwrap(
        &self,
        algorithm: EncryptionAlgorithm,
        wrapped: &[u8],
    ) -> Result<SecretBytes, Refusal> {
        self.require(algorithm)?;
        let refused = || {
            Refusal::bad_parameter(
                "The parameter is incorrect: 'value' does not unwrap with this key and algorithm.",
            )
        };
        let len = wrapped.len().checked_sub(OVERHEAD).filter(|len| LENGTHS.contains(len));
        let len = len.filter(|len| len.is_multiple_of(8)).ok_or_else(refused)?;
        let mut good = false;
        let out = SecretBytes::new_with(len, |place| {
            good = match self.0.len() {
                16 => KwAes128::new_from_slice(self.0.expose())
                    .is_ok_and(|key| key.unwrap_key(wrapped, place).is_ok()),
                24 => KwAes192::new_from_slice(self.0.expose())
                    .is_ok_and(|key| key.unwrap_key(wrapped, place).is_ok()),
                _ => KwAes256::new_from_slice(self.0.expose())
                    .is_ok_and(|key| key.unwrap_key(wrapped, place).is_ok()),
            };
        })?;
        if good { Ok(out) } else { Err(refused()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_size_wraps_under_its_own_name_and_notices_changes() {
        for (bits, name) in [(128, "A128KW"), (192, "A192KW"), (256, "A256KW")] {
            let algorithm = EncryptionAlgorithm::from_name(name).unwrap();
            let (key, bytes) = SymmetricKey::generate(bits).unwrap();
            let again = SymmetricKey::from_bytes(bytes).unwrap();
            let mut wrapped = key.wrap(algorithm, &[7; 32]).unwrap();
            assert_eq!(again.unwrap(algorithm, &wrapped).unwrap().expose(), [7; 32]);
            for other in ["A128KW", "A192KW", "A256KW", "RSA-OAEP-256"] {
                if other != name {
                    let other = EncryptionAlgorithm::from_name(other).unwrap();
                    assert_eq!(key.wrap(other, &[7; 32]).unwrap_err().status, 400);
                }
            }
            wrapped[3] ^= 1;
            assert_eq!(key.unwrap(algorithm, &wrapped).unwrap_err().code, "BadParameter");
            for len in [0, 8, 15, 17, 1032] {
                assert_eq!(key.wrap(algorithm, &vec![1; len]).unwrap_err().status, 400, "{len}");
                assert_eq!(key.unwrap(algorithm, &vec![1; len]).unwrap_err().status, 400, "{len}");
            }
        }
        assert!(SymmetricKey::generate(512).is_err());
    }

    /// RFC 3394, 4.6.
    #[test]
    fn the_published_example_comes_out() {
        let key: Vec<u8> = (0..32).collect();
        let data: Vec<u8> = (0..=0xffu8).filter(|byte| byte >> 4 == byte & 15).take(16).collect();
        let data: Vec<u8> = data.into_iter().chain(0..16).collect();
        let key = SymmetricKey::from_bytes(SecretBytes::from_vec_wiping(key).unwrap()).unwrap();
        let wrapped = key.wrap(EncryptionAlgorithm::A256Kw, &data).unwrap();
        assert_eq!(
            crate::vault::codec::to_hex(&wrapped),
            "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21"
        );
    }
}
