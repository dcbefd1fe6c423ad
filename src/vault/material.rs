//! Key material: generation and use. Every private RSA operation is aws-lc-rs's, whose private
//! operations take constant time.

use std::fmt;

use aws_lc_rs::encoding::{AsDer as _, Pkcs8V1Der};
use aws_lc_rs::rsa::{
    KeyPair, KeyPairComponents, KeySize, OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepAlgorithm,
    OaepPrivateDecryptingKey, OaepPublicEncryptingKey, Pkcs1PrivateDecryptingKey,
    Pkcs1PublicEncryptingKey, PrivateDecryptingKey,
};
use aws_lc_rs::signature::KeyPair as _;

use crate::crypto::secret::SecretBytes;
use crate::error::{Error, Kind, Result};

use super::refusal::Refusal;
use super::wire::KeyType;

mod signing;
mod symmetric;
pub(crate) use signing::SignatureAlgorithm;
pub(crate) use symmetric::SymmetricKey;

/// How a value is encrypted or wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EncryptionAlgorithm {
    /// With SHA-1, as the real service means it.
    RsaOaep,
    RsaOaep256,
    Rsa15,
    A128Kw,
    A192Kw,
    A256Kw,
}

impl EncryptionAlgorithm {
    pub(crate) fn from_name(name: &str) -> Option<EncryptionAlgorithm> {
        match name {
            "RSA-OAEP" => Some(EncryptionAlgorithm::RsaOaep),
            "RSA-OAEP-256" => Some(EncryptionAlgorithm::RsaOaep256),
            "RSA1_5" => Some(EncryptionAlgorithm::Rsa15),
            "A128KW" => Some(EncryptionAlgorithm::A128Kw),
            "A192KW" => Some(EncryptionAlgorithm::A192Kw),
            "A256KW" => Some(EncryptionAlgorithm::A256Kw),
            _ => None,
        }
    }

    fn oaep(self) -> Option<&'static OaepAlgorithm> {
        match self {
            EncryptionAlgorithm::RsaOaep => Some(&OAEP_SHA1_MGF1SHA1),
            EncryptionAlgorithm::RsaOaep256 => Some(&OAEP_SHA256_MGF1SHA256),
            _ => None,
        }
    }

    /// The size of the symmetric key that it needs; None: it is of RSA.
    pub(crate) const fn symmetric_bits(self) -> Option<u32> {
        match self {
            EncryptionAlgorithm::A128Kw => Some(128),
            EncryptionAlgorithm::A192Kw => Some(192),
            EncryptionAlgorithm::A256Kw => Some(256),
            _ => None,
        }
    }
}

/// What a key version holds, ready to use.
#[derive(Debug)]
pub(crate) enum KeyMaterial {
    Rsa(Box<PrivateKey>),
    Symmetric(SymmetricKey),
}

impl KeyMaterial {
    /// The material, and its bytes to be sealed. Takes seconds for large RSA keys.
    pub(crate) fn generate(kty: KeyType, bits: u32) -> Result<(KeyMaterial, SecretBytes)> {
        if !kty.is_rsa() {
            let (key, bytes) = SymmetricKey::generate(bits)?;
            return Ok((KeyMaterial::Symmetric(key), bytes));
        }
        let size = key_size(bits.into())
            .ok_or_else(|| Error::corrupt(format!("an RSA key has no {bits} bits")))?;
        let (key, pkcs8) = PrivateKey::generate(size)?;
        Ok((KeyMaterial::Rsa(Box::new(key)), pkcs8))
    }

    /// From what was sealed.
    pub(crate) fn from_sealed(kty: KeyType, bytes: SecretBytes) -> Result<KeyMaterial> {
        if kty.is_rsa() {
            return Ok(KeyMaterial::Rsa(Box::new(PrivateKey::from_pkcs8(&bytes)?)));
        }
        SymmetricKey::from_bytes(bytes)
            .map(KeyMaterial::Symmetric)
            .ok_or_else(|| Error::corrupt("a stored symmetric key is unusable"))
    }

    pub(crate) fn bits(&self) -> u32 {
        match self {
            // At most 512 bytes.
            KeyMaterial::Rsa(key) => key.pair.public_modulus_len() as u32 * 8,
            KeyMaterial::Symmetric(key) => key.bits(),
        }
    }

    pub(crate) fn public_numbers(&self) -> Option<PublicNumbers> {
        match self {
            KeyMaterial::Rsa(key) => Some(key.public_numbers()),
            KeyMaterial::Symmetric(_) => None,
        }
    }

    pub(crate) fn encrypt(
        &self,
        algorithm: EncryptionAlgorithm,
        plaintext: &[u8],
    ) -> Result<Vec<u8>, Refusal> {
        match self {
            KeyMaterial::Rsa(key) => key.encrypt(algorithm, plaintext),
            KeyMaterial::Symmetric(key) => key.wrap(algorithm, plaintext),
        }
    }

    pub(crate) fn decrypt(
        &self,
        algorithm: EncryptionAlgorithm,
        ciphertext: &[u8],
    ) -> Result<SecretBytes, Refusal> {
        match self {
            KeyMaterial::Rsa(key) => key.decrypt(algorithm, ciphertext),
            KeyMaterial::Symmetric(key) => key.unwrap(algorithm, ciphertext),
        }
    }

    /// For what only an RSA key does.
    pub(crate) fn rsa(&self) -> Result<&PrivateKey, Refusal> {
        match self {
            KeyMaterial::Rsa(key) => Ok(key),
            KeyMaterial::Symmetric(_) => {
                Err(Refusal::bad_parameter("The operation is not one of this type of key."))
            }
        }
    }
}

impl fmt::Debug for SymmetricKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SymmetricKey").finish_non_exhaustive()
    }
}

pub(crate) fn key_size(bits: u64) -> Option<KeySize> {
    match bits {
        2048 => Some(KeySize::Rsa2048),
        3072 => Some(KeySize::Rsa3072),
        4096 => Some(KeySize::Rsa4096),
        _ => None,
    }
}

/// 65537, the only one taken.
const PUBLIC_EXPONENT: [u8; 3] = [1, 0, 1];

fn encode(pair: &KeyPair) -> Result<SecretBytes> {
    let der: Pkcs8V1Der<'_> =
        pair.as_der().map_err(|_| Error::new(Kind::Io, "cannot encode an RSA key"))?;
    SecretBytes::new_with(der.as_ref().len(), |place| place.copy_from_slice(der.as_ref()))
}

/// A private key, parsed once and ready to use.
pub(crate) struct PrivateKey {
    pair: KeyPair,
    decrypting: PrivateDecryptingKey,
}

/// The public half as a JSON Web Key has it: unsigned, big-endian, no leading zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PublicNumbers {
    pub(crate) modulus: Vec<u8>,
    pub(crate) exponent: Vec<u8>,
}

impl PrivateKey {
    /// Takes seconds for large keys.
    pub(crate) fn generate(size: KeySize) -> Result<(PrivateKey, SecretBytes)> {
        let pair = KeyPair::generate(size)
            .map_err(|_| Error::new(Kind::Io, "cannot generate an RSA key"))?;
        let pkcs8 = encode(&pair)?;
        Ok((PrivateKey::from_pkcs8(&pkcs8)?, pkcs8))
    }

    pub(crate) fn from_pkcs8(pkcs8: &SecretBytes) -> Result<PrivateKey> {
        let unusable = |_| Error::corrupt("a stored private key is unusable");
        Ok(PrivateKey {
            pair: KeyPair::from_pkcs8(pkcs8.expose()).map_err(unusable)?,
            decrypting: PrivateDecryptingKey::from_pkcs8(pkcs8.expose()).map_err(unusable)?,
        })
    }

    /// None unless the numbers are those of one RSA key of a size that this vault makes itself.
    pub(crate) fn from_components(
        components: &KeyPairComponents<Vec<u8>>,
    ) -> Result<Option<(PrivateKey, SecretBytes)>> {
        let bits = components.public_key.n.len() as u64 * 8;
        let top_bit = components.public_key.n.first().is_some_and(|byte| byte & 0x80 != 0);
        // Numbers longer than the modulus would cost time before they are refused.
        let longest = [
            &components.d,
            &components.p,
            &components.q,
            &components.dP,
            &components.dQ,
            &components.qInv,
        ]
        .map(Vec::len)
        .into_iter()
        .max();
        if longest > Some(components.public_key.n.len() + 1) {
            return Ok(None);
        }
        if key_size(bits).is_none() || !top_bit || components.public_key.e != PUBLIC_EXPONENT {
            return Ok(None);
        }
        let Ok(pair) = KeyPair::from_components(components) else {
            return Ok(None);
        };
        let pkcs8 = encode(&pair)?;
        Ok(Some((PrivateKey::from_pkcs8(&pkcs8)?, pkcs8)))
    }

    pub(crate) fn has_usual_exponent(&self) -> bool {
        self.public_numbers().exponent == PUBLIC_EXPONENT
    }

    pub(crate) fn public_numbers(&self) -> PublicNumbers {
        let public = self.pair.public_key();
        PublicNumbers {
            modulus: public.modulus().big_endian_without_leading_zero().to_vec(),
            exponent: public.exponent().big_endian_without_leading_zero().to_vec(),
        }
    }

    fn encrypt(
        &self,
        algorithm: EncryptionAlgorithm,
        plaintext: &[u8],
    ) -> Result<Vec<u8>, Refusal> {
        if algorithm.symmetric_bits().is_some() {
            return Err(Refusal::bad_parameter("Property 'alg' is not an algorithm for this key."));
        }
        let public = self.decrypting.public_key();
        let mut out = vec![0; public.key_size_bytes()];
        let written = match algorithm.oaep() {
            Some(oaep) => OaepPublicEncryptingKey::new(public).ok().and_then(|key| {
                (plaintext.len() <= key.max_plaintext_size(oaep))
                    .then(|| key.encrypt(oaep, plaintext, &mut out, None).map(|out| out.len()).ok())
                    .flatten()
            }),
            None => Pkcs1PublicEncryptingKey::new(public).ok().and_then(|key| {
                (plaintext.len() <= key.max_plaintext_size())
                    .then(|| key.encrypt(plaintext, &mut out).map(|out| out.len()).ok())
                    .flatten()
            }),
        };
        match written {
            Some(len) => {
                out.truncate(len);
                Ok(out)
            }
            None => Err(Refusal::bad_parameter(
                "Property 'value' is too long for this key and algorithm.",
            )),
        }
    }

    /// One answer for everything that can be wrong with the ciphertext.
    fn decrypt(
        &self,
        algorithm: EncryptionAlgorithm,
        ciphertext: &[u8],
    ) -> Result<SecretBytes, Refusal> {
        if algorithm.symmetric_bits().is_some() {
            return Err(Refusal::bad_parameter("Property 'alg' is not an algorithm for this key."));
        }
        let refused = || {
            Refusal::bad_parameter(
                "The parameter is incorrect: 'value' does not decrypt with this key and algorithm.",
            )
        };
        if ciphertext.len() != self.decrypting.key_size_bytes() {
            return Err(refused());
        }
        let mut len = None;
        let mut out = SecretBytes::new_with(self.decrypting.key_size_bytes(), |place| {
            len = match algorithm.oaep() {
                Some(oaep) => {
                    OaepPrivateDecryptingKey::new(self.decrypting.clone()).and_then(|key| {
                        key.decrypt(oaep, ciphertext, place, None).map(|out| out.len())
                    })
                }
                None => Pkcs1PrivateDecryptingKey::new(self.decrypting.clone())
                    .and_then(|key| key.decrypt(ciphertext, place).map(|out| out.len())),
            }
            .ok();
        })?;
        let len = len.ok_or_else(refused)?;
        if len != out.len() {
            out = SecretBytes::new_with(len, |place| place.copy_from_slice(&out.expose()[..len]))?;
        }
        Ok(out)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrivateKey").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> (PrivateKey, SecretBytes) {
        PrivateKey::generate(KeySize::Rsa2048).unwrap()
    }

    const ALGORITHMS: [EncryptionAlgorithm; 3] =
        [EncryptionAlgorithm::RsaOaep, EncryptionAlgorithm::RsaOaep256, EncryptionAlgorithm::Rsa15];

    #[test]
    fn what_is_wrapped_unwraps_after_a_restart_and_with_no_other_algorithm() {
        let (key, pkcs8) = key();
        let numbers = key.public_numbers();
        assert_eq!((numbers.modulus.len(), numbers.exponent.as_slice()), (256, &[1, 0, 1][..]));
        assert_ne!(numbers.modulus[0], 0);
        let again = PrivateKey::from_pkcs8(&pkcs8).unwrap();
        assert_eq!(again.public_numbers(), numbers);
        for algorithm in ALGORITHMS {
            let sealed = key.encrypt(algorithm, &[9; 32]).unwrap();
            assert_eq!(again.decrypt(algorithm, &sealed).unwrap().expose(), [9; 32]);
        }
        let sealed = key.encrypt(EncryptionAlgorithm::RsaOaep256, &[9; 32]).unwrap();
        let refusal = key.decrypt(EncryptionAlgorithm::RsaOaep, &sealed).unwrap_err();
        assert_eq!(refusal.code, "BadParameter");
    }

    #[test]
    fn lengths_are_checked() {
        let (key, _) = key();
        for (algorithm, max) in ALGORITHMS.into_iter().zip([214, 190, 245]) {
            key.encrypt(algorithm, &vec![1; max]).unwrap();
            assert_eq!(key.encrypt(algorithm, &vec![1; max + 1]).unwrap_err().status, 400);
            for len in [0, 1, 255, 257] {
                assert_eq!(key.decrypt(algorithm, &vec![1; len]).unwrap_err().status, 400);
            }
        }
    }
}
