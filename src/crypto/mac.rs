//! HMAC-SHA-256 (RFC 2104) cut to 128 bits (SP 800-107, 5.3.3). Never GMAC: a repeated input must
//! not cost the key.

use std::fmt;

use ring::hmac::{Context as Hmac, HMAC_SHA256, Key};
use subtle::ConstantTimeEq;

use super::secret::Secret;
use crate::error::{Context, Result};
use crate::sys::locked::Locked;

pub const MAC_LEN: usize = 16;

/// One MAC key, its inner and outer state in locked memory.
pub struct MacKey(Locked<Key>);

impl MacKey {
    pub fn new(key: &Secret<32>) -> Result<MacKey> {
        Locked::new_with(|| Key::new(HMAC_SHA256, key.expose()))
            .map(MacKey)
            .context(|| "no memory for a key".into())
    }

    /// Over the concatenation of `parts`: give parts of variable length a length of their own.
    pub fn mac(&self, parts: &[&[u8]]) -> [u8; MAC_LEN] {
        let mut hmac = Hmac::with_key(&self.0);
        for part in parts {
            hmac.update(part);
        }
        let mut mac = [0; MAC_LEN];
        mac.copy_from_slice(&hmac.sign().as_ref()[..MAC_LEN]);
        mac
    }

    /// In constant time.
    pub fn verify(&self, parts: &[&[u8]], mac: &[u8; MAC_LEN]) -> bool {
        self.mac(parts).ct_eq(mac).into()
    }
}

impl fmt::Debug for MacKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MacKey([secret])")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_truncated_hmac() {
        let key = Secret::new_with(|bytes| bytes.fill(0x0b)).unwrap();
        let mac = MacKey::new(&key).unwrap();
        let whole = ring::hmac::sign(&Key::new(HMAC_SHA256, key.expose()), b"Hi There");
        assert_eq!(mac.mac(&[b"Hi ", b"There"]), whole.as_ref()[..16]);
        assert!(mac.verify(&[b"Hi There"], &mac.mac(&[b"Hi There"])));
        assert!(!mac.verify(&[b"Hi there"], &mac.mac(&[b"Hi There"])));
    }
}
