//! Signatures over digests that the caller computed.

use aws_lc_rs::digest::{Algorithm as DigestAlgorithm, Digest, SHA256, SHA384, SHA512};
use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::signature::{
    KeyPair as _, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384,
    RSA_PKCS1_2048_8192_SHA512, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512,
    RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512, RSA_PSS_SHA256,
    RSA_PSS_SHA384, RSA_PSS_SHA512, RsaEncoding, RsaParameters,
};

use super::PrivateKey;
use crate::vault::refusal::Refusal;

#[derive(Clone, Copy)]
pub(crate) struct SignatureAlgorithm {
    digest: &'static DigestAlgorithm,
    sign: &'static dyn RsaEncoding,
    verify: &'static RsaParameters,
}

impl SignatureAlgorithm {
    pub(crate) fn from_name(name: &str) -> Option<SignatureAlgorithm> {
        let (digest, sign, verify): (_, &'static dyn RsaEncoding, _) = match name {
            "RS256" => (&SHA256, &RSA_PKCS1_SHA256, &RSA_PKCS1_2048_8192_SHA256),
            "RS384" => (&SHA384, &RSA_PKCS1_SHA384, &RSA_PKCS1_2048_8192_SHA384),
            "RS512" => (&SHA512, &RSA_PKCS1_SHA512, &RSA_PKCS1_2048_8192_SHA512),
            "PS256" => (&SHA256, &RSA_PSS_SHA256, &RSA_PSS_2048_8192_SHA256),
            "PS384" => (&SHA384, &RSA_PSS_SHA384, &RSA_PSS_2048_8192_SHA384),
            "PS512" => (&SHA512, &RSA_PSS_SHA512, &RSA_PSS_2048_8192_SHA512),
            _ => return None,
        };
        Some(SignatureAlgorithm { digest, sign, verify })
    }

    fn digest(self, bytes: &[u8]) -> Result<Digest, Refusal> {
        Digest::import_less_safe(bytes, self.digest).map_err(|_| {
            Refusal::bad_parameter("The digest's length is not that of the algorithm.")
        })
    }
}

impl std::fmt::Debug for SignatureAlgorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SignatureAlgorithm").field("digest", &self.digest).finish_non_exhaustive()
    }
}

impl PrivateKey {
    pub(crate) fn sign(
        &self,
        algorithm: SignatureAlgorithm,
        digest: &[u8],
    ) -> Result<Vec<u8>, Refusal> {
        let digest = algorithm.digest(digest)?;
        let mut signature = vec![0; self.pair.public_modulus_len()];
        self.pair.sign_digest(algorithm.sign, &digest, &mut signature).map_err(|_| {
            log::error!("an RSA key refused to sign");
            Refusal::internal()
        })?;
        Ok(signature)
    }

    pub(crate) fn verify(
        &self,
        algorithm: SignatureAlgorithm,
        digest: &[u8],
        signature: &[u8],
    ) -> Result<bool, Refusal> {
        let digest = algorithm.digest(digest)?;
        let unusable = || {
            log::error!("an RSA public key does not encode");
            Refusal::internal()
        };
        let der: PublicKeyX509Der<'_> = self.pair.public_key().as_der().map_err(|_| unusable())?;
        let public =
            ParsedPublicKey::new(algorithm.verify, der.as_ref()).map_err(|_| unusable())?;
        Ok(public.verify_digest_sig(&digest, signature).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::rsa::KeySize;

    #[test]
    fn signatures_verify_and_changed_ones_do_not() {
        let (key, _) = PrivateKey::generate(KeySize::Rsa2048).unwrap();
        for (name, len) in [
            ("RS256", 32),
            ("RS384", 48),
            ("RS512", 64),
            ("PS256", 32),
            ("PS384", 48),
            ("PS512", 64),
        ] {
            let algorithm = SignatureAlgorithm::from_name(name).unwrap();
            let mut signature = key.sign(algorithm, &vec![3; len]).unwrap();
            assert!(key.verify(algorithm, &vec![3; len], &signature).unwrap(), "{name}");
            assert!(!key.verify(algorithm, &vec![4; len], &signature).unwrap(), "{name}");
            signature[10] ^= 1;
            assert!(!key.verify(algorithm, &vec![3; len], &signature).unwrap(), "{name}");
            assert!(!key.verify(algorithm, &vec![3; len], b"").unwrap(), "{name}");
            assert_eq!(key.sign(algorithm, &vec![3; len - 1]).unwrap_err().status, 400);
        }
    }
}
