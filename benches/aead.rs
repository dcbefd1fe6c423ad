//! AES-256-GCM of 4 KiB blocks, the store's unit: what `ring` does, what `aes-gcm` does, and what is
//! left of it behind `crypto::aead`. Run with `cargo bench --bench aead`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit};
use byokfs::crypto::aead::BlockCipher;
use byokfs::crypto::secret::Secret;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

const BLOCK: usize = 4096;
const AAD: [u8; 40] = [7; 40];
const ROUNDS: usize = 9;
const ROUND: Duration = Duration::from_millis(200);

/// Seals a block in place.
type Seal<'a> = Box<dyn FnMut(&mut [u8], [u8; 12]) + 'a>;

/// MiB/s of sealing one block over and over: the median of interleaved rounds.
fn main() {
    let key = [3; 32];
    let ring_key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).expect("32 bytes"));
    let aes_gcm = Aes256Gcm::new_from_slice(&key).expect("32 bytes");
    let secret = Secret::new_with(|bytes| bytes.copy_from_slice(&key)).expect("locked memory");
    let cipher = BlockCipher::new(&secret).expect("a cipher");

    let mut block = vec![1; BLOCK];
    let mut contenders: [(&str, Seal); 3] = [
        (
            "ring",
            Box::new(|block, nonce| {
                let nonce = Nonce::assume_unique_for_key(nonce);
                let tag = ring_key.seal_in_place_separate_tag(nonce, Aad::from(AAD), block);
                let _ = black_box(tag.expect("a block is short enough"));
            }),
        ),
        (
            "aes-gcm",
            Box::new(|block, nonce| {
                let tag = aes_gcm.encrypt_inout_detached(&nonce.into(), &AAD, block.into());
                let _ = black_box(tag.expect("a block is short enough"));
            }),
        ),
        (
            "crypto::aead",
            Box::new(|block, nonce| {
                let _ = black_box(cipher.seal(&nonce, &AAD, block));
            }),
        ),
    ];
    let mut speeds = vec![Vec::new(); contenders.len()];
    let mut counter = 0u64;
    for _ in 0..ROUNDS {
        for ((_, seal), speeds) in contenders.iter_mut().zip(&mut speeds) {
            let (start, mut blocks) = (Instant::now(), 0u64);
            while start.elapsed() < ROUND {
                for _ in 0..64 {
                    counter += 1;
                    let mut nonce = [0; 12];
                    nonce[4..].copy_from_slice(&counter.to_be_bytes());
                    seal(black_box(&mut block), nonce);
                    blocks += 1;
                }
            }
            let bytes = (blocks * BLOCK as u64) as f64;
            speeds.push(bytes / start.elapsed().as_secs_f64() / f64::from(1 << 20));
        }
    }
    for ((name, _), speeds) in contenders.iter().zip(&mut speeds) {
        speeds.sort_by(f64::total_cmp);
        println!("{name:>14} {:7.0} MiB/s", speeds[ROUNDS / 2]);
    }
}
