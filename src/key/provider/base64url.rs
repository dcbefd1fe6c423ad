//! Binary values in JSON: base64url without padding. Padding is tolerated in what others send.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::{ProviderError, ProviderResult};
use crate::crypto::secret::SecretBytes;

pub(super) fn encode(value: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(value)
}

pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok()
}

/// Decodes straight into locked memory; None where it is not base64.
pub(super) fn decode_secret(text: &str) -> ProviderResult<Option<SecretBytes>> {
    let text = text.trim_end_matches('=').as_bytes();
    // Four characters hold three bytes, the rest as many bytes as characters less one.
    let len = text.len() / 4 * 3 + (text.len() % 4).saturating_sub(1);
    let mut decoded = None;
    let secret = SecretBytes::new_with(len, |place| {
        decoded = URL_SAFE_NO_PAD.decode_slice(text, place).ok();
    });
    let secret = secret.map_err(|error| ProviderError::unreachable(error.to_string()))?;
    Ok(Some(secret).filter(|_| decoded == Some(len)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_decoded_in_place() {
        for len in [0, 1, 2, 3, 31, 32, 33] {
            let bytes: Vec<u8> = (0..len).collect();
            let text = encode(&bytes);
            assert_eq!(decode_secret(&text).unwrap().unwrap().expose(), bytes);
            assert_eq!(decode(&text).unwrap(), bytes);
        }
        for bad in ["a", "ab*d", "a+b/", "\u{e9}\u{e9}"] {
            assert!(decode_secret(bad).unwrap().is_none(), "{bad}");
            assert!(decode(bad).is_none(), "{bad}");
        }
    }
}
