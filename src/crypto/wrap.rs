//! AES-256 key wrap (RFC 3394, SP 800-38F KW) of 256-bit keys.

use aes_kw::KwAes256;
use aes_kw::cipher::KeyInit;
use zeroize::Zeroize;

use super::secret::Secret;
use crate::error::Result;
use crate::sys::stack;

/// A wrapped 256-bit key is 8 bytes longer than the key.
pub const WRAPPED_LEN: usize = 40;

pub fn wrap(kek: &Secret<32>, key: &Secret<32>) -> [u8; WRAPPED_LEN] {
    stack::with_burnt_stack(|| {
        let mut wrapped = [0; WRAPPED_LEN];
        let done = KwAes256::new(kek.expose().into()).wrap_key(key.expose(), &mut wrapped);
        // The one failure is a length, and both are fixed.
        done.unwrap_or_else(|_| unreachable!("KW takes 32 bytes into 40"));
        wrapped
    })
}

/// None when `wrapped` was not made with this `kek`, or was changed since.
pub fn unwrap(kek: &Secret<32>, wrapped: &[u8; WRAPPED_LEN]) -> Result<Option<Secret<32>>> {
    stack::with_burnt_stack(|| {
        let mut key = [0; 32];
        let opened = KwAes256::new(kek.expose().into()).unwrap_key(wrapped, &mut key).is_ok();
        let secret = if opened { Secret::from_slice_wiping(&mut key) } else { Ok(None) };
        key.zeroize();
        secret
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3394, 4.6: wrap 256 bits of key data with a 256-bit KEK.
    #[test]
    fn rfc_3394_vector() {
        let kek = Secret::new_with(|k| (0_u8..).zip(k).for_each(|(i, b)| *b = i)).unwrap();
        let key = Secret::new_with(|k| {
            for (i, byte) in (0_u8..).zip(k.iter_mut()) {
                *byte = if i < 16 { i * 0x11 } else { i - 16 };
            }
        })
        .unwrap();
        let wrapped = wrap(&kek, &key);
        let hex: String = wrapped.iter().map(|byte| format!("{byte:02X}")).collect();
        assert_eq!(
            hex,
            "28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21"
        );
        assert!(unwrap(&kek, &wrapped).unwrap().unwrap().ct_eq(&key));
    }

    #[test]
    fn a_changed_wrap_does_not_open() {
        let (kek, key) = (Secret::random().unwrap(), Secret::random().unwrap());
        let wrapped = wrap(&kek, &key);
        for bit in 0..WRAPPED_LEN * 8 {
            let mut flipped = wrapped;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(unwrap(&kek, &flipped).unwrap().is_none());
        }
        assert!(unwrap(&Secret::random().unwrap(), &wrapped).unwrap().is_none());
    }
}
