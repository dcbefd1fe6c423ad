//! AES-SIV with 256-bit keys (RFC 5297): deterministic authenticated encryption, for names and
//! other small values that must seal to the same bytes each time.
//!
//! Written here, over the `aes` crate's block cipher, because the published crates set up the
//! cipher anew for each message and leave its key schedule on the stack.

use std::fmt;

use aes::Aes256;
use aes::cipher::{Block, BlockCipherEncrypt, KeyInit};
use subtle::ConstantTimeEq;

use super::secret::Secret;
use crate::error::{Context, Result};
use crate::sys::locked::Locked;

/// The synthetic IV goes before the ciphertext, which is as long as the plaintext.
pub const OVERHEAD: usize = 16;

type Bytes = [u8; 16];

/// The two AES keys of RFC 5297 (K1 for S2V, K2 for CTR), their schedules in locked memory.
pub struct Siv(Locked<Schedules>);

struct Schedules {
    s2v: Aes256,
    ctr: Aes256,
}

impl Siv {
    pub fn new(s2v: &Secret<32>, ctr: &Secret<32>) -> Result<Siv> {
        let make = || Schedules {
            s2v: Aes256::new(s2v.expose().into()),
            ctr: Aes256::new(ctr.expose().into()),
        };
        Locked::new_with(make).map(Siv).context(|| "no memory for a key".into())
    }

    /// `V || C`. `ad` is the vector of associated data, at most 126 components.
    pub fn seal(&self, ad: &[&[u8]], plaintext: &[u8]) -> Vec<u8> {
        let iv = self.s2v(ad, plaintext);
        let mut sealed = Vec::with_capacity(OVERHEAD + plaintext.len());
        sealed.extend_from_slice(&iv);
        sealed.extend_from_slice(plaintext);
        self.ctr(&iv, &mut sealed[OVERHEAD..]);
        sealed
    }

    /// None when the bytes were not sealed with these keys and this associated data.
    pub fn open(&self, ad: &[&[u8]], sealed: &[u8]) -> Option<Vec<u8>> {
        let (iv, ciphertext) = sealed.split_first_chunk::<OVERHEAD>()?;
        let mut plaintext = ciphertext.to_vec();
        self.ctr(iv, &mut plaintext);
        bool::from(self.s2v(ad, &plaintext).ct_eq(iv)).then_some(plaintext)
    }

    /// RFC 5297, 2.4.
    fn s2v(&self, ad: &[&[u8]], plaintext: &[u8]) -> Bytes {
        let mut d = self.cmac(&[&[0; 16]]);
        for component in ad {
            d = xor(double(d), &self.cmac(&[component]));
        }
        match plaintext.split_last_chunk::<16>() {
            // xorend: the last 16 bytes take D.
            Some((head, tail)) => self.cmac(&[head, &xor(*tail, &d)]),
            None => self.cmac(&[&xor(pad(plaintext), &double(d))]),
        }
    }

    /// AES-CMAC (RFC 4493) of the concatenation of `parts`.
    fn cmac(&self, parts: &[&[u8]]) -> Bytes {
        let mut state = [0; 16];
        // The block not yet absorbed: the last one is treated differently.
        let (mut pending, mut filled) = ([0; 16], 0);
        for part in parts {
            for &byte in *part {
                if filled == 16 {
                    state = self.encrypt_s2v(xor(state, &pending));
                    filled = 0;
                }
                pending[filled] = byte;
                filled += 1;
            }
        }
        let k1 = double(self.encrypt_s2v([0; 16]));
        let last = match filled {
            16 => xor(pending, &k1),
            _ => xor(pad(&pending[..filled]), &double(k1)),
        };
        self.encrypt_s2v(xor(state, &last))
    }

    /// RFC 5297, 2.5: the counter starts at V with bits 31 and 63 (from the right) cleared.
    fn ctr(&self, iv: &Bytes, data: &mut [u8]) {
        let mut start = *iv;
        start[8] &= 0x7f;
        start[12] &= 0x7f;
        let mut counter = u128::from_be_bytes(start);
        for chunk in data.chunks_mut(16) {
            let mut stream = Block::<Aes256>::from(counter.to_be_bytes());
            self.0.ctr.encrypt_block(&mut stream);
            chunk.iter_mut().zip(stream).for_each(|(byte, key)| *byte ^= key);
            counter = counter.wrapping_add(1);
        }
    }

    fn encrypt_s2v(&self, block: Bytes) -> Bytes {
        let mut block = Block::<Aes256>::from(block);
        self.0.s2v.encrypt_block(&mut block);
        block.into()
    }
}

impl fmt::Debug for Siv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Siv([secret])")
    }
}

fn xor(a: Bytes, b: &Bytes) -> Bytes {
    (u128::from_ne_bytes(a) ^ u128::from_ne_bytes(*b)).to_ne_bytes()
}

/// Multiplication by x in GF(2^128), RFC 5297, 2.3; without a branch on the secret.
fn double(block: Bytes) -> Bytes {
    let value = u128::from_be_bytes(block);
    ((value << 1) ^ ((value >> 127) * 0x87)).to_be_bytes()
}

/// `data || 0x80 || 0...`, for less than 16 bytes.
fn pad(data: &[u8]) -> Bytes {
    let mut padded = [0; 16];
    padded[..data.len()].copy_from_slice(data);
    padded[data.len()] = 0x80;
    padded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Siv, aes_siv::siv::Aes256Siv) {
        let (a, b) = (Secret::<32>::random().unwrap(), Secret::<32>::random().unwrap());
        let mut both = [0; 64];
        both[..32].copy_from_slice(a.expose());
        both[32..].copy_from_slice(b.expose());
        (Siv::new(&a, &b).unwrap(), aes_siv::siv::Aes256Siv::new(&both.into()))
    }

    #[test]
    fn agrees_with_the_aes_siv_crate() {
        for len in (0..70).chain([255, 4095]) {
            let (ours, mut theirs) = pair();
            let text: Vec<u8> = (0..=255).cycle().take(len).collect();
            for ad in [vec![], vec![&b"one"[..]], vec![&b"one"[..], b"", b"exactly 16 bytes"]] {
                let sealed = ours.seal(&ad, &text);
                assert_eq!(sealed, theirs.encrypt(&ad, &text).unwrap());
                assert_eq!(ours.open(&ad, &sealed).unwrap(), text);
            }
        }
    }

    #[test]
    fn every_bit_counts() {
        let (siv, _) = pair();
        let sealed = siv.seal(&[b"ad"], b"a table name.ibd");
        assert!(siv.open(&[b"ae"], &sealed).is_none());
        assert!(siv.open(&[], &sealed).is_none());
        assert!(siv.open(&[b"ad"], &sealed[..15]).is_none());
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(siv.open(&[b"ad"], &flipped).is_none());
        }
    }
}
