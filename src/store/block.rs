//! Sealing and opening single blocks.
//!
//! A block is AES-256-GCM over 4096 bytes, in place. Its key is that of the file, the DEK slot and
//! the session; its nonce is session (32 bits) || counter (64 bits), which its tag entry keeps
//! beside the tag; the associated data bind it to its file and place.

use std::sync::Arc;

use super::Shared;
use super::keys::{FileKeys, hex};
use super::page::{Entry, FLAG_LOST, FLAG_SEALED};
use super::session::Salt;
use crate::crypto::aead::BlockCipher;
use crate::crypto::nonce::{self, Range};
use crate::error::{FsError, FsResult};
use crate::key::gate::Lease;

const AAD_LEN: usize = 32;

fn aad(file: &[u8; 16], dek_slot: u16, block: u64) -> [u8; AAD_LEN] {
    let mut aad = [0; AAD_LEN];
    aad[..4].copy_from_slice(b"BKB1");
    aad[4..6].copy_from_slice(&dek_slot.to_le_bytes());
    aad[8..24].copy_from_slice(file);
    aad[24..].copy_from_slice(&block.to_le_bytes());
    aad
}

/// Opens blocks of one file under one lease.
pub(super) struct Opener<'a> {
    shared: &'a Shared,
    keys: &'a FileKeys,
    lease: &'a Lease<'a>,
    /// Most often all blocks of a request have the same key.
    last: Option<((u16, u32), Arc<BlockCipher>)>,
}

impl<'a> Opener<'a> {
    pub(super) fn new(shared: &'a Shared, keys: &'a FileKeys, lease: &'a Lease<'a>) -> Opener<'a> {
        Opener { shared, keys, lease, last: None }
    }

    /// Decrypts in place. After an error `bytes` must not be used.
    pub(super) fn open(&mut self, block: u64, entry: &Entry, bytes: &mut [u8]) -> FsResult<()> {
        let damaged = |detail: &str| {
            FsError::integrity("block", hex(&self.keys.file_id), Some(block), detail)
        };
        if entry.flags == FLAG_LOST {
            return Err(damaged("its tag was in a damaged sector that has been rewritten since"));
        }
        if entry.flags != FLAG_SEALED {
            return Err(damaged("its tag entry has unknown flags"));
        }
        let index = (entry.dek_slot, entry.session);
        let cipher = match &self.last {
            Some((last, cipher)) if *last == index => cipher.clone(),
            _ => {
                let salt = self.shared.salt(entry.session);
                let salt = salt.ok_or_else(|| {
                    damaged(&format!("session {} is not in the session table", entry.session))
                })?;
                let cipher = self.cipher(entry, &salt)?;
                self.last = Some((index, cipher.clone()));
                cipher
            }
        };
        let nonce = nonce::nonce(entry.session, entry.counter);
        let aad = aad(&self.keys.file_id, entry.dek_slot, block);
        cipher
            .open(&nonce, &aad, bytes, &entry.tag)
            .map_err(|_| damaged("its content does not match its tag"))
    }

    fn cipher(&self, entry: &Entry, salt: &Salt) -> FsResult<Arc<BlockCipher>> {
        self.shared.keys.cipher(self.lease, self.keys, entry.dek_slot, entry.session, salt)
    }
}

/// Seals blocks of one file under one lease, with nonces that nobody else has.
pub(super) struct Sealer<'a> {
    keys: &'a FileKeys,
    cipher: Arc<BlockCipher>,
    nonces: Range,
    session: u32,
}

impl<'a> Sealer<'a> {
    /// For up to `count` blocks.
    pub(super) fn new(
        shared: &Shared,
        keys: &'a FileKeys,
        lease: &Lease<'_>,
        count: u64,
    ) -> FsResult<Sealer<'a>> {
        let session = shared.session()?;
        let number = session.counter.session();
        let cipher =
            shared.keys.cipher(lease, keys, keys.active_dek, number, &session.entry.salt)?;
        Ok(Sealer { keys, cipher, nonces: session.counter.take(count), session: number })
    }

    /// Encrypts in place and returns the block's tag entry; None past the promised count.
    pub(super) fn seal(&mut self, block: u64, bytes: &mut [u8]) -> Option<Entry> {
        let (counter, nonce) = self.nonces.next_nonce()?;
        let dek_slot = self.keys.active_dek;
        let aad = aad(&self.keys.file_id, dek_slot, block);
        let tag = self.cipher.seal(&nonce, &aad, bytes);
        Some(Entry { tag, counter, session: self.session, dek_slot, flags: FLAG_SEALED })
    }
}
