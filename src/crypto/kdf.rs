//! HKDF with SHA-256 (RFC 5869), for one output block of 32 bytes.

use super::secret::Secret;
use crate::error::Result;
use crate::sys::stack;

/// `HKDF(IKM = key, salt, info = label || 0x00 || context)`, 32 bytes.
///
/// A label holds no zero byte, so no two pairs of label and context give one `info`.
pub fn derive(key: &Secret<32>, salt: &[u8], label: &str, context: &[u8]) -> Result<Secret<32>> {
    use ring::hmac::{Context, HMAC_SHA256, Key, sign};
    debug_assert!(!label.contains('\0'));
    stack::with_burnt_stack(|| {
        // RFC 5869, 2.2: PRK = HMAC(salt, IKM). An empty salt is HashLen zeros, as HMAC pads it.
        let prk = sign(&Key::new(HMAC_SHA256, salt), key.expose());
        // 2.3, first block only: T(1) = HMAC(PRK, info || 0x01).
        let mut expand = Context::with_key(&Key::new(HMAC_SHA256, prk.as_ref()));
        expand.update(label.as_bytes());
        expand.update(&[0]);
        expand.update(context);
        expand.update(&[1]);
        let block = expand.sign();
        Secret::new_with(|bytes| bytes.copy_from_slice(block.as_ref()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> Secret<32> {
        Secret::new_with(|bytes| bytes.fill(byte)).unwrap()
    }

    /// An independent HKDF from ring's own, over the same info.
    #[test]
    fn equals_rings_hkdf() {
        struct Len;
        impl ring::hkdf::KeyType for Len {
            fn len(&self) -> usize {
                32
            }
        }
        for salt in [&b""[..], b"salt", &[9; 100]] {
            let derived = derive(&key(3), salt, "label", b"context").unwrap();
            let mut expected = [0; 32];
            ring::hkdf::Salt::new(ring::hkdf::HKDF_SHA256, salt)
                .extract(&[3; 32])
                .expand(&[b"label", b"\0", b"context"], Len)
                .unwrap()
                .fill(&mut expected)
                .unwrap();
            assert_eq!(derived.expose(), &expected);
        }
    }

    #[test]
    fn every_input_counts() {
        let base = derive(&key(1), b"s", "l", b"c").unwrap();
        for other in [
            derive(&key(2), b"s", "l", b"c"),
            derive(&key(1), b"t", "l", b"c"),
            derive(&key(1), b"s", "m", b"c"),
            derive(&key(1), b"s", "l", b"d"),
            derive(&key(1), b"s", "lc", b""),
        ] {
            assert!(!base.ct_eq(&other.unwrap()));
        }
    }
}
