//! Where the live records begin: two pages at the start of a stream's file, written in turn.
//!
//! ```text
//!  0  16  MAC, by a key of the volume key that is named    16  8  "BYOKLOGA"    24  4  1, the format
//! 28   4  stream                         32  8  generation    40 16  log id
//! 56   8  length of the ring
//! 64  16  tail of the hot stream: seq, position    80  16  tail of the bulk stream
//! 96   4  1 where the volume was closed after this, 0 while it may be written to
//! 100  4  id of the volume key
//! ```
//!
//! The record is 512 bytes, the rest of it and of its page zero. The higher generation counts. The
//! tails are those in the hot stream's file, where one write moves both: if one moved alone, a
//! crash could leave a record whose successor in the other stream is gone, and replay would put an
//! old block over a new one. In the bulk stream's file they stay as they were made.

use std::io;

use super::record::{get_u32, get_u64, put_u32, put_u64};
use super::ring::Spot;
use super::{PAGE, STREAMS};
use crate::backing::FileRef;
use crate::crypto::mac::MAC_LEN;
use crate::store::keys::MacKeys;

const MAGIC: &[u8; 8] = b"BYOKLOGA";
const DOMAIN: &[u8; 16] = b"byokfs log anch\0";
const FORMAT: u32 = 1;
pub(crate) const RECORD_LEN: usize = 512;
/// Before the ring.
pub(crate) const ANCHORS_LEN: u64 = 2 * PAGE as u64;
/// More than a file can have: what is believed without a key must not overflow.
const LONGEST_RING: u64 = 1 << 62;

/// The content of one of the two pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) struct Anchor {
    pub(in crate::store) log_id: [u8; 16],
    pub(in crate::store) stream: u8,
    pub(in crate::store) generation: u64,
    pub(in crate::store) ring_len: u64,
    pub(crate) tails: [Spot; STREAMS],
    /// Everything was brought home and nobody has written since.
    pub(in crate::store) clean: bool,
}

impl Anchor {
    pub(crate) fn ring_end(&self) -> u64 {
        ANCHORS_LEN + self.ring_len
    }

    /// The record with its MAC, by the current volume key.
    pub(in crate::store) fn seal(&self, keys: &MacKeys) -> [u8; RECORD_LEN] {
        let (volume_key_id, key) = keys.current();
        let mut bytes = [0; RECORD_LEN];
        bytes[16..24].copy_from_slice(MAGIC);
        put_u32(&mut bytes, 24, FORMAT);
        put_u32(&mut bytes, 28, u32::from(self.stream));
        put_u64(&mut bytes, 32, self.generation);
        bytes[40..56].copy_from_slice(&self.log_id);
        put_u64(&mut bytes, 56, self.ring_len);
        for (at, tail) in [64, 80].into_iter().zip(&self.tails) {
            put_u64(&mut bytes, at, tail.seq);
            put_u64(&mut bytes, at + 8, tail.at);
        }
        put_u32(&mut bytes, 96, u32::from(self.clean));
        put_u32(&mut bytes, 100, volume_key_id);
        let mac = key.mac(&[DOMAIN, &bytes[MAC_LEN..]]);
        bytes[..MAC_LEN].copy_from_slice(&mac);
        bytes
    }

    /// Without keys, what has the form of an anchor is believed.
    fn decode(bytes: &[u8], stream: u8, keys: Option<&MacKeys>) -> Option<Anchor> {
        let mut mac = [0; MAC_LEN];
        mac.copy_from_slice(&bytes[..MAC_LEN]);
        let authentic = match keys {
            Some(keys) => {
                let key = keys.get(get_u32(bytes, 100))?;
                key.verify(&[DOMAIN, &bytes[MAC_LEN..RECORD_LEN]], &mac)
            }
            None => &bytes[16..24] == MAGIC,
        };
        if !authentic || get_u32(bytes, 24) != FORMAT || get_u32(bytes, 28) != u32::from(stream) {
            return None;
        }
        let ring_len = get_u64(bytes, 56);
        if ring_len > LONGEST_RING {
            return None;
        }
        let mut log_id = [0; 16];
        log_id.copy_from_slice(&bytes[40..56]);
        Some(Anchor {
            log_id,
            stream,
            generation: get_u64(bytes, 32),
            ring_len,
            tails: [64, 80].map(|at| Spot { seq: get_u64(bytes, at), at: get_u64(bytes, at + 8) }),
            clean: get_u32(bytes, 96) == 1,
        })
    }

    /// What each of the two pages says; None for a damaged one.
    pub(in crate::store) fn copies(
        file: &FileRef,
        stream: u8,
        keys: Option<&MacKeys>,
    ) -> io::Result<[Option<Anchor>; 2]> {
        let mut pages = vec![0; ANCHORS_LEN as usize];
        file.read_at(&mut pages, 0)?;
        let (a, b) = pages.split_at(PAGE);
        Ok([a, b].map(|page| Anchor::decode(page, stream, keys)))
    }

    /// The newer of the two that prove themselves, and whether one does not.
    pub(in crate::store) fn read(
        file: &FileRef,
        stream: u8,
        keys: Option<&MacKeys>,
    ) -> io::Result<Option<(Anchor, bool)>> {
        let copies = Anchor::copies(file, stream, keys)?;
        let damaged = copies.iter().any(Option::is_none);
        let newest = copies.into_iter().flatten().max_by_key(|anchor| anchor.generation);
        Ok(newest.map(|anchor| (anchor, damaged)))
    }

    /// Writes what [`Anchor::seal`] made. Durable when this returns; the copy before it stays.
    pub(crate) fn write(&self, file: &FileRef, sealed: &[u8; RECORD_LEN]) -> io::Result<()> {
        file.write_at(sealed, self.generation % 2 * PAGE as u64)?;
        file.sync_data()
    }

    /// Both copies, for a new file; the caller syncs.
    pub(in crate::store) fn write_first(&self, file: &FileRef, keys: &MacKeys) -> io::Result<()> {
        let bytes = self.seal(keys);
        file.write_at(&bytes, 0)?;
        file.write_at(&bytes, PAGE as u64)
    }
}
