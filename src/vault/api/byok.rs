//! Keys that come in wrapped (BYOK): a key transfer blob, as the real service's specification has it.
//!
//! The blob is JSON: the id of a key exchange key of this vault (`key_ops` = `import`), the mechanism
//! `CKM_RSA_AES_KEY_WRAP`, and a ciphertext: an AES-256 key under RSA-OAEP with SHA-1, then
//! the PKCS#8 key under that AES key (RFC 5649).

use aws_lc_rs::rsa::{KeyPair, KeySize};
use serde::Deserialize;

use super::crypto::allow;
use super::keys::live_version;
use super::{Call, Vault};
use crate::crypto::secret::SecretBytes;
use crate::error::Result;
use crate::vault::codec;
use crate::vault::material::{EncryptionAlgorithm, PrivateKey};
use crate::vault::refusal::Refusal;
use crate::vault::wire::{KeyOperation, is_key_name, is_version};

const SCHEMA_VERSION: &str = "1.0.0";
const MECHANISM: &str = "CKM_RSA_AES_KEY_WRAP";

#[derive(Deserialize)]
struct TransferBlob {
    schema_version: String,
    header: TransferHeader,
    ciphertext: String,
}

#[derive(Deserialize)]
struct TransferHeader {
    kid: String,
    alg: String,
    enc: String,
}

impl Vault {
    /// The PKCS#8 key inside.
    pub(super) fn open_transfer(
        &self,
        call: &Call<'_>,
        blob: &[u8],
    ) -> Result<SecretBytes, Refusal> {
        let wrong =
            || Refusal::bad_parameter("The key transfer blob is malformed or of another version.");
        let blob: TransferBlob = serde_json::from_slice(blob).map_err(|_| wrong())?;
        let header = &blob.header;
        if blob.schema_version != SCHEMA_VERSION || header.alg != "dir" || header.enc != MECHANISM {
            return Err(wrong());
        }
        let (name, version) = exchange_key(&header.kid).ok_or_else(wrong)?;
        let (key, record) = self.store.read(|tx| live_version(tx, name, version))?;
        allow(&record, KeyOperation::Import, call.now)?;
        let exchange = self.material(&key, &record)?;
        let ciphertext = codec::from_any_base64(&blob.ciphertext).ok_or_else(wrong)?;
        let modulus = usize::try_from(record.bits / 8).map_err(|_| wrong())?;
        let (head, tail) = ciphertext.split_at_checked(modulus).ok_or_else(wrong)?;
        let kek = exchange.decrypt(EncryptionAlgorithm::RsaOaep, head)?;
        unwrap_padded(&kek, tail)?.ok_or_else(|| {
            Refusal::bad_parameter("The key transfer blob does not open with its key exchange key.")
        })
    }
}

/// Name and version of `https://HOST/keys/NAME[/VERSION]`; whose host it is is not asked, as the
/// name of the vault may have been another when the blob was made.
fn exchange_key(kid: &str) -> Option<(&str, Option<&str>)> {
    let (_, path) = kid.strip_prefix("https://")?.split_once("/keys/")?;
    let (name, version) = match path.trim_end_matches('/').split_once('/') {
        Some((name, version)) => (name, Some(version)),
        None => (path.trim_end_matches('/'), None),
    };
    (is_key_name(name) && version.is_none_or(is_version)).then_some((name, version))
}

/// RFC 5649; None if it does not open.
fn unwrap_padded(kek: &SecretBytes, wrapped: &[u8]) -> Result<Option<SecretBytes>> {
    use aes_kw::KwpAes256;
    use aes_kw::cipher::KeyInit as _;
    let Ok(kek) = KwpAes256::new_from_slice(kek.expose()) else { return Ok(None) };
    let Some(room) = wrapped.len().checked_sub(8) else { return Ok(None) };
    let mut len = None;
    let padded = SecretBytes::new_with(room, |place| {
        len = kek.unwrap_key(wrapped, place).map(<[u8]>::len).ok();
    })?;
    let Some(len) = len.filter(|len| *len <= padded.len()) else { return Ok(None) };
    SecretBytes::new_with(len, |place| place.copy_from_slice(&padded.expose()[..len])).map(Some)
}

/// None unless it is an RSA key of a size that this vault makes itself.
pub(super) fn private_key(pkcs8: &SecretBytes) -> Result<Option<(PrivateKey, SecretBytes)>> {
    let Ok(pair) = KeyPair::from_pkcs8(pkcs8.expose()) else { return Ok(None) };
    let known = [KeySize::Rsa2048, KeySize::Rsa3072, KeySize::Rsa4096]
        .iter()
        .any(|size| size.len() == pair.public_modulus_len());
    if !known {
        return Ok(None);
    }
    let copy = SecretBytes::new_with(pkcs8.len(), |place| place.copy_from_slice(pkcs8.expose()))?;
    let key = PrivateKey::from_pkcs8(&copy)?;
    Ok(key.has_usual_exponent().then_some((key, copy)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_exchange_keys_are_read() {
        let version = "0123456789abcdef0123456789abcdef";
        assert_eq!(exchange_key("https://v/keys/kek"), Some(("kek", None)));
        let kid = format!("https://v:8443/keys/kek/{version}");
        assert_eq!(exchange_key(&kid), Some(("kek", Some(version))));
        for bad in [
            "",
            "https://v/secrets/kek",
            "http://v/keys/kek",
            "https://v/keys/k_k",
            "https://v/keys/kek/x",
        ] {
            assert_eq!(exchange_key(bad), None, "{bad}");
        }
    }
}
