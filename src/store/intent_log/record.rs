//! One record of the log, byte by byte.
//!
//! ```text
//!    0  16  MAC over the rest of the head: up to the last entry
//!   16   8  "BYOKLOG1"
//!   24   1  kind        25  1  stream      26  2  zero
//!   28   4  session whose key made the MAC
//!   32   8  seq: consecutive in its stream
//!   40   8  position in the stream's file
//!   48   8  durable seq: every record up to it was on stable storage before this one was made
//!   56   8  order: rises over both streams
//!   64   8  the other stream's last record of the same file, 0 for none
//!   72  16  file id
//!   88   8  size of the file afterwards, all ones where it stays
//!   96  16  range (start, end) that becomes a hole before the entries apply, in blocks
//!  112   4  entries     116  4  body blocks   120  4  zero
//!  124   4  nanoseconds of the time of modification
//!  128   8  its seconds since the epoch, signed
//!  136   8  XXH3-64 of the body
//!  144  40  for each entry: block index, 32 bytes of its tag sector
//!           then zeros up to a multiple of 4096, and the body
//! ```
//!
//! Little-endian. The body is ciphertext as it goes home, of the first entries' blocks; those of
//! the other entries were written home directly. A record is valid in one place: its MAC covers
//! stream, seq and position under a key of its own session and log, so that neither an earlier lap
//! nor another log can pass for it.
//!
//! The body needs no MAC: its blocks are authenticated by the tags in the entries. The hash, which
//! the MAC covers, tells a torn body, and does so without any file's key.

use std::fmt;

use twox_hash::XxHash3_64;

use super::{PAGE, Stream};
use crate::backing::Timestamp;
use crate::crypto::mac::{MAC_LEN, MacKey};

pub(crate) const HEAD_LEN: usize = 144;
pub(crate) const ENTRY_LEN: usize = 32;
const LISTED_LEN: usize = 8 + ENTRY_LEN;
const BODY_HASH_AT: usize = 136;
const MAGIC: &[u8; 8] = b"BYOKLOG1";
const DOMAIN: &[u8; 16] = b"byokfs log rec\0\0";
/// [`Draft::size`] of a record that leaves the size alone.
pub(in crate::store) const SAME_SIZE: u64 = u64::MAX;
/// A request of 1 MiB that starts within a block touches one more, and one that starts past the
/// end of the file changes the last block before it.
pub(crate) const MAX_BLOCKS: usize = (1 << 20) / PAGE + 2;
/// The most pages of a record.
pub(crate) const MAX_PAGES: usize =
    (HEAD_LEN + MAX_BLOCKS * LISTED_LEN).div_ceil(PAGE) + MAX_BLOCKS;

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(in crate::store) enum Kind {
    /// Blocks, with their ciphertext or, past the body, of such as were written home.
    Write = 1,
    /// A new size; blocks past it are holes.
    Truncate = 2,
    /// A range of holes, its space given back.
    Punch = 3,
    /// A range of holes, its space kept.
    Zero = 4,
    /// Nothing but the time of modification.
    Times = 5,
    /// The same content under another key; for the rest a write.
    Reseal = 6,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        let all = [Kind::Write, Kind::Truncate, Kind::Punch, Kind::Zero, Kind::Times, Kind::Reseal];
        all.into_iter().find(|&kind| kind as u8 == byte)
    }
}

/// The entry of one block, as its tag sector will hold it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Entry {
    pub(in crate::store) block: u64,
    pub(in crate::store) bytes: [u8; ENTRY_LEN],
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry({})", self.block)
    }
}

/// What a caller logs; the rest of a record is the log's own business.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct Draft {
    pub(in crate::store) kind: Kind,
    pub(in crate::store) file_id: [u8; 16],
    pub(in crate::store) size: u64,
    /// Blocks that become holes first; `start == end` for none.
    pub(in crate::store) holes: (u64, u64),
    pub(in crate::store) entries: Vec<Entry>,
    /// Ciphertext of the first entries' blocks. Those of the rest are home.
    pub(in crate::store) body: Vec<u8>,
    /// Of modification.
    pub(in crate::store) mtime: Timestamp,
    /// The other stream's last record of this file that may not be home yet.
    pub(in crate::store) other: u64,
}

/// Where and when a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) struct Place {
    pub(in crate::store) stream: u8,
    pub(in crate::store) session: u32,
    pub(in crate::store) seq: u64,
    pub(in crate::store) at: u64,
    pub(in crate::store) durable_seq: u64,
    pub(in crate::store) order: u64,
}

/// A record read back, without its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct Record {
    pub(in crate::store) place: Place,
    /// `body` is empty; [`Record::body_at`] and [`Record::body_len`] say where it is.
    pub(in crate::store) draft: Draft,
    body_blocks: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Invalid {
    /// More entries, note or body than a record holds, or a body that does not fit its entries.
    Shape,
}

impl Draft {
    pub(in crate::store) fn new(kind: Kind, file_id: [u8; 16], size: u64) -> Draft {
        Draft {
            kind,
            file_id,
            size,
            holes: (0, 0),
            entries: Vec::new(),
            body: Vec::new(),
            mtime: Timestamp::default(),
            other: 0,
        }
    }

    /// Pages before the body.
    fn head_pages(&self) -> usize {
        (HEAD_LEN + self.entries.len() * LISTED_LEN).div_ceil(PAGE)
    }

    /// Pages of the record on disk.
    pub(in crate::store) fn pages(&self) -> u64 {
        (self.head_pages() + self.body.len() / PAGE) as u64
    }

    pub(crate) fn check(&self) -> Result<(), Invalid> {
        let body_fits =
            self.body.len().is_multiple_of(PAGE) && self.body.len() / PAGE <= self.entries.len();
        let fits = self.entries.len() <= MAX_BLOCKS;
        if body_fits && fits && self.holes.0 <= self.holes.1 { Ok(()) } else { Err(Invalid::Shape) }
    }

    /// The record's pages before the body, with the MAC over both.
    pub(crate) fn encode_head(&self, place: &Place, key: &MacKey) -> Vec<u8> {
        let mut head = vec![0; self.head_pages() * PAGE];
        head[16..24].copy_from_slice(MAGIC);
        head[24] = self.kind as u8;
        head[25] = place.stream;
        put_u32(&mut head, 28, place.session);
        put_u64(&mut head, 32, place.seq);
        put_u64(&mut head, 40, place.at);
        put_u64(&mut head, 48, place.durable_seq);
        put_u64(&mut head, 56, place.order);
        put_u64(&mut head, 64, self.other);
        head[72..88].copy_from_slice(&self.file_id);
        put_u64(&mut head, 88, self.size);
        put_u64(&mut head, 96, self.holes.0);
        put_u64(&mut head, 104, self.holes.1);
        put_u32(&mut head, 112, self.entries.len() as u32);
        put_u32(&mut head, 116, (self.body.len() / PAGE) as u32);
        put_u32(&mut head, 124, self.mtime.nsec);
        put_u64(&mut head, 128, self.mtime.sec.cast_unsigned());
        let mut at = HEAD_LEN;
        for entry in &self.entries {
            put_u64(&mut head, at, entry.block);
            head[at + 8..at + LISTED_LEN].copy_from_slice(&entry.bytes);
            at += LISTED_LEN;
        }
        put_u64(&mut head, BODY_HASH_AT, XxHash3_64::oneshot(&self.body));
        let mac = key.mac(&[DOMAIN, &head[MAC_LEN..at]]);
        head[..MAC_LEN].copy_from_slice(&mac);
        head
    }
}

/// What the first 128 bytes claim, before anything is proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(in crate::store) place: Place,
    pub(in crate::store) pages: usize,
    head_pages: usize,
}

impl Claim {
    /// None where no record begins.
    pub(crate) fn read(head: &[u8]) -> Option<Claim> {
        if head.len() < HEAD_LEN || &head[16..24] != MAGIC {
            return None;
        }
        let entries = get_u32(head, 112) as usize;
        let body = get_u32(head, 116) as usize;
        if entries > MAX_BLOCKS || body > entries {
            return None;
        }
        let head_pages = (HEAD_LEN + entries * LISTED_LEN).div_ceil(PAGE);
        let place = Place {
            stream: head[25],
            session: get_u32(head, 28),
            seq: get_u64(head, 32),
            at: get_u64(head, 40),
            durable_seq: get_u64(head, 48),
            order: get_u64(head, 56),
        };
        // There is a next one of each, also where nothing proves that it is a record at all.
        if place.seq == u64::MAX || place.order == u64::MAX {
            return None;
        }
        Some(Claim { place, pages: head_pages + body, head_pages })
    }

    /// The record, if `bytes`, all of its pages, prove it. Without a key the claim is believed.
    pub(crate) fn prove(&self, bytes: &[u8], key: Option<&MacKey>) -> Option<Record> {
        let bytes = bytes.get(..self.pages * PAGE)?;
        let mut mac = [0; MAC_LEN];
        mac.copy_from_slice(&bytes[..MAC_LEN]);
        let count = get_u32(bytes, 112) as usize;
        let (head, body) = bytes.split_at(self.head_pages * PAGE);
        let (head, rest) = head.split_at((HEAD_LEN + count * LISTED_LEN).min(head.len()));
        let right = Claim::read(bytes) == Some(*self)
            && key.is_none_or(|key| key.verify(&[DOMAIN, &head[MAC_LEN..]], &mac))
            && rest.iter().all(|&byte| byte == 0)
            && get_u64(bytes, BODY_HASH_AT) == XxHash3_64::oneshot(body);
        if !right {
            return None;
        }
        let listed = bytes[HEAD_LEN..].chunks_exact(LISTED_LEN).take(count);
        let entries = listed.map(|listed| {
            let mut entry = [0; ENTRY_LEN];
            entry.copy_from_slice(&listed[8..]);
            Entry { block: get_u64(listed, 0), bytes: entry }
        });
        let mut file_id = [0; 16];
        file_id.copy_from_slice(&bytes[72..88]);
        let draft = Draft {
            kind: Kind::from_byte(bytes[24])?,
            file_id,
            size: get_u64(bytes, 88),
            holes: (get_u64(bytes, 96), get_u64(bytes, 104)),
            entries: entries.collect(),
            body: Vec::new(),
            mtime: Timestamp { sec: get_u64(bytes, 128).cast_signed(), nsec: get_u32(bytes, 124) },
            other: get_u64(bytes, 64),
        };
        Some(Record { place: self.place, draft, body_blocks: self.pages - self.head_pages })
    }
}

impl Record {
    /// Position of the body in the stream's file.
    pub(in crate::store) fn body_at(&self) -> u64 {
        self.place.at + (self.draft.head_pages() * PAGE) as u64
    }

    pub(in crate::store) fn body_len(&self) -> usize {
        self.body_blocks * PAGE
    }

    pub(in crate::store) fn stream(&self) -> Stream {
        if self.place.stream == 0 { Stream::Hot } else { Stream::Bulk }
    }

    /// The entries of blocks that were written home, not to the log.
    pub(in crate::store) fn direct(&self) -> &[Entry] {
        &self.draft.entries[self.body_blocks.min(self.draft.entries.len())..]
    }

    pub(in crate::store) fn pages(&self) -> u64 {
        (self.draft.head_pages() + self.body_blocks) as u64
    }
}

pub(crate) fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

pub(crate) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::crypto::secret::Secret;

    fn key(byte: u8) -> MacKey {
        MacKey::new(&Secret::new_with(|key| key.fill(byte)).unwrap()).unwrap()
    }

    fn place() -> Place {
        Place { stream: 1, session: 3, seq: 77, at: 8192, durable_seq: 70, order: 99 }
    }

    fn entry(block: u64) -> Entry {
        Entry { block, bytes: [block as u8; ENTRY_LEN] }
    }

    fn prove(bytes: &[u8], key: &MacKey) -> Option<Record> {
        Claim::read(bytes)?.prove(bytes, Some(key))
    }

    fn encode(draft: &Draft) -> Vec<u8> {
        let mut bytes = draft.encode_head(&place(), &key(1));
        bytes.extend_from_slice(&draft.body);
        bytes
    }

    proptest! {
        #[test]
        fn comes_back_as_it_was(
            kind in 1_u8..=6, size: u64, start in 0..u64::MAX / 2, len in 0_u64..1000,
            blocks in 0_u64..300, body in 0_u64..300, sec: i64, nsec: u32,
        ) {
            let blocks = blocks.min(MAX_BLOCKS as u64);
            let mut draft = Draft::new(Kind::from_byte(kind).unwrap(), [9; 16], size);
            draft.holes = (start, start + len);
            draft.entries = (start..start + blocks).map(entry).collect();
            draft.mtime = Timestamp { sec, nsec };
            draft.other = size ^ 5;
            draft.body = vec![kind; body.min(blocks) as usize * PAGE];
            prop_assert_eq!(draft.check(), Ok(()));
            let bytes = encode(&draft);
            prop_assert_eq!(bytes.len() as u64, draft.pages() * PAGE as u64);
            prop_assert!(bytes.len() <= MAX_PAGES * PAGE);
            let record = prove(&bytes, &key(1)).unwrap();
            prop_assert_eq!(record.place, place());
            prop_assert_eq!(record.pages(), draft.pages());
            let from = (record.body_at() - place().at) as usize;
            prop_assert_eq!(&bytes[from..from + record.body_len()], &draft.body[..]);
            draft.body.clear();
            prop_assert_eq!(record.draft, draft);
        }
    }

    #[test]
    fn every_bit_counts() {
        let mut draft = Draft::new(Kind::Write, [9; 16], 4096);
        draft.entries = vec![entry(0)];
        draft.body = vec![7; PAGE];
        let bytes = encode(&draft);
        assert!(prove(&bytes, &key(1)).is_some());
        assert!(prove(&bytes, &key(2)).is_none());
        for bit in (0..PAGE * 8).chain((PAGE * 8..bytes.len() * 8).step_by(37)) {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(prove(&bytes, &key(1)).is_none(), "bit {bit}");
        }
        assert!(prove(&bytes[..PAGE], &key(1)).is_none());
        assert!(prove(&[], &key(1)).is_none());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut draft = Draft::new(Kind::Write, [9; 16], 0);
        draft.body = vec![0; PAGE];
        assert_eq!(draft.check(), Err(Invalid::Shape));
        draft.body.clear();
        draft.entries = vec![entry(1); MAX_BLOCKS + 1];
        assert_eq!(draft.check(), Err(Invalid::Shape));
    }
}
