//! The header of a file: its id, size, keys and which generation pages exist.
//!
//! Page 0 and page 1 of the backing file hold the same 512-byte record, the rest of both is
//! zero. Both are written by one call at every change, so that either alone serves; 512 bytes
//! are what every disk writes whole. The record with the higher generation counts.

use std::ops::Range;

use super::FORMAT_VERSION;
use super::keys::MacKeys;
use super::layout::{BLOCK_LEN, HEADERS_LEN};
use super::page::{u16_at, u32_at, u64_at};
use crate::crypto::mac::MAC_LEN;
use crate::crypto::wrap::WRAPPED_LEN;

pub(super) const RECORD_LEN: usize = 512;
const MAGIC: &[u8; 8] = b"BYOKFILE";
const DOMAIN: &[u8; 16] = b"byokfs header 1\0";
pub(super) const DEK_SLOTS: usize = 4;
const MAX_RUNS: usize = 8;
const FIRST_GENERATION: u64 = 1;

const RUNS_AT: usize = 80;
const MAC_KEY_AT: usize = 144;
const SLOTS_AT: usize = 192;
const SLOT_LEN: usize = 64;
const RESERVED_AT: usize = SLOTS_AT + DEK_SLOTS * SLOT_LEN;

/// A data encryption key, wrapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DekSlot {
    pub id: u16,
    pub wrapped: [u8; WRAPPED_LEN],
    /// When, in seconds since the epoch.
    pub made: u64,
}

/// Regions `start..start + len` have generation pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    start: u32,
    len: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub file_id: [u8; 16],
    pub generation: u64,
    pub volume_key_id: u32,
    /// Bytes of plaintext.
    pub size: u64,
    /// What new blocks are sealed with.
    pub active_dek: u16,
    pub deks: Vec<DekSlot>,
    pub wrapped_mac_key: [u8; WRAPPED_LEN],
    runs: Vec<Run>,
}

/// What [`Header::decode`] found.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Decoded {
    pub header: Header,
    /// One of the two copies is damaged.
    pub damaged_copy: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeaderError {
    /// Neither copy proves itself.
    Damaged,
    /// Authentic, but of a format this version does not know.
    Unsupported,
}

impl Header {
    pub(super) fn new(
        file_id: [u8; 16],
        volume_key_id: u32,
        dek: DekSlot,
        wrapped_mac_key: [u8; WRAPPED_LEN],
    ) -> Header {
        Header {
            file_id,
            generation: FIRST_GENERATION,
            volume_key_id,
            size: 0,
            active_dek: dek.id,
            deks: vec![dek],
            wrapped_mac_key,
            runs: Vec::new(),
        }
    }

    /// It was written as the file was made, and not since.
    pub(super) fn is_first(&self) -> bool {
        self.generation == FIRST_GENERATION
    }

    /// Whether the region has a generation page; without one, all of it is holes.
    pub(super) fn has_region(&self, region: u64) -> bool {
        self.runs.iter().any(|run| {
            (u64::from(run.start)..u64::from(run.start) + u64::from(run.len)).contains(&region)
        })
    }

    /// The first region from `region` on that has a generation page.
    pub(super) fn next_region(&self, region: u64) -> Option<u64> {
        self.runs().find(|run| region < run.end).map(|run| run.start.max(region))
    }

    /// Notes that `region` has a generation page, and returns the regions that must get one
    /// first: itself, and those of the smallest gap when it would be one run too many.
    pub(super) fn add_region(&mut self, region: u32) -> Vec<u32> {
        let gap = self.insert_region(region);
        std::iter::once(region).chain(gap).collect()
    }

    /// What [`Header::add_region`] would return beside the region itself.
    pub(super) fn gap_for(&self, region: u32) -> Range<u32> {
        if self.has_region(region.into()) { 0..0 } else { self.clone().insert_region(region) }
    }

    fn insert_region(&mut self, region: u32) -> Range<u32> {
        let at = self.runs.partition_point(|run| run.start <= region);
        self.runs.insert(at, Run { start: region, len: 1 });
        self.merge();
        if self.runs.len() > MAX_RUNS {
            let gap = |pair: &[Run]| pair[1].start - (pair[0].start + pair[0].len);
            let smallest =
                (0..self.runs.len() - 1).min_by_key(|&i| gap(&self.runs[i..i + 2])).unwrap_or(0);
            let run = self.runs[smallest];
            let next = self.runs[smallest + 1].start;
            self.runs[smallest].len = next - run.start;
            self.merge();
            return run.start + run.len..next;
        }
        0..0
    }

    fn merge(&mut self) {
        self.runs.dedup_by(|next, run| {
            let touching = run.start + run.len >= next.start;
            if touching {
                run.len = run.len.max(next.start + next.len - run.start);
            }
            touching
        });
    }

    /// Forgets the generation pages of every region from `region` on; true if there was one.
    pub(super) fn drop_regions_from(&mut self, region: u64) -> bool {
        let past = self.runs.last().map_or(0, |run| u64::from(run.start) + u64::from(run.len));
        self.runs.retain_mut(|run| {
            let keep = region.saturating_sub(u64::from(run.start)).min(u64::from(run.len));
            run.len = keep as u32;
            run.len > 0
        });
        past > region
    }

    /// Both pages, as one piece of the file.
    /// None where the volume key that the header names is not there.
    pub(super) fn encode(&self, volume: &[u8; 16], keys: &MacKeys) -> Option<Vec<u8>> {
        let key = keys.get(self.volume_key_id)?;
        let mut record = [0; RECORD_LEN];
        record[16..24].copy_from_slice(MAGIC);
        record[24..28].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        record[28..32].copy_from_slice(&self.volume_key_id.to_le_bytes());
        record[32..48].copy_from_slice(&self.file_id);
        record[48..56].copy_from_slice(&self.generation.to_le_bytes());
        record[56..64].copy_from_slice(&self.size.to_le_bytes());
        record[72..76].copy_from_slice(&(BLOCK_LEN as u32).to_le_bytes());
        record[76..78].copy_from_slice(&self.active_dek.to_le_bytes());
        record[78..80].copy_from_slice(&(self.runs.len() as u16).to_le_bytes());
        for (run, bytes) in self.runs.iter().zip(record[RUNS_AT..].chunks_exact_mut(8)) {
            bytes[..4].copy_from_slice(&run.start.to_le_bytes());
            bytes[4..].copy_from_slice(&run.len.to_le_bytes());
        }
        record[MAC_KEY_AT..][..WRAPPED_LEN].copy_from_slice(&self.wrapped_mac_key);
        for (slot, bytes) in self.deks.iter().zip(record[SLOTS_AT..].chunks_exact_mut(SLOT_LEN)) {
            bytes[..2].copy_from_slice(&slot.id.to_le_bytes());
            bytes[2..4].copy_from_slice(&1_u16.to_le_bytes());
            bytes[8..8 + WRAPPED_LEN].copy_from_slice(&slot.wrapped);
            bytes[48..56].copy_from_slice(&slot.made.to_le_bytes());
        }
        let mac = key.mac(&[DOMAIN, volume, &record[MAC_LEN..]]);
        record[..MAC_LEN].copy_from_slice(&mac);

        let mut pages = vec![0; HEADERS_LEN as usize];
        pages[..RECORD_LEN].copy_from_slice(&record);
        pages[BLOCK_LEN..][..RECORD_LEN].copy_from_slice(&record);
        Some(pages)
    }

    /// `pages` is the start of the backing file; what is missing of it is damaged.
    pub(super) fn decode(
        pages: &[u8; HEADERS_LEN as usize],
        volume: &[u8; 16],
        keys: &MacKeys,
    ) -> Result<Decoded, HeaderError> {
        let (a, b) = pages.split_at(BLOCK_LEN);
        let copies = [authentic(a, volume, Some(keys)), authentic(b, volume, Some(keys))];
        let damaged_copy = copies.iter().any(Option::is_none);
        let record = copies
            .into_iter()
            .flatten()
            .max_by_key(|record| u64_at(record, 48))
            .ok_or(HeaderError::Damaged)?;
        let header = parse(record).ok_or(HeaderError::Unsupported)?;
        Ok(Decoded { header, damaged_copy })
    }

    /// What each of the two copies says by itself. Without keys it is believed if it has the form
    /// of a header.
    pub(super) fn copies(
        pages: &[u8; HEADERS_LEN as usize],
        volume: &[u8; 16],
        keys: Option<&MacKeys>,
    ) -> [Result<Header, HeaderError>; 2] {
        let (a, b) = pages.split_at(BLOCK_LEN);
        [a, b].map(|page| {
            let record = authentic(page, volume, keys).ok_or(HeaderError::Damaged)?;
            parse(record).ok_or(HeaderError::Unsupported)
        })
    }

    /// The regions that have generation pages, as the header lists them.
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs.iter().map(|run| u64::from(run.start)..u64::from(run.start) + u64::from(run.len))
    }
}

/// The record of a page that proves itself; without keys, one that has its form.
fn authentic<'a>(page: &'a [u8], volume: &[u8; 16], keys: Option<&MacKeys>) -> Option<&'a [u8]> {
    let (record, rest) = page.split_at(RECORD_LEN);
    let mut mac = [0; MAC_LEN];
    mac.copy_from_slice(&record[..MAC_LEN]);
    let proven = match keys {
        Some(keys) => {
            let key = keys.get(u32_at(record, 28))?;
            key.verify(&[DOMAIN, volume, &record[MAC_LEN..]], &mac)
        }
        None => &record[16..24] == MAGIC,
    };
    (proven && rest.iter().all(|&byte| byte == 0)).then_some(record)
}

/// None where the record, though authentic, says what this version cannot.
fn parse(record: &[u8]) -> Option<Header> {
    let known = &record[16..24] == MAGIC
        && u32_at(record, 24) == FORMAT_VERSION
        && u32_at(record, 72) as usize == BLOCK_LEN
        && u64_at(record, 64) == 0
        && record[RESERVED_AT..].iter().all(|&byte| byte == 0);
    let run_count = usize::from(u16_at(record, 78));
    if !known || run_count > MAX_RUNS {
        return None;
    }
    let runs = record[RUNS_AT..]
        .chunks_exact(8)
        .take(run_count)
        .map(|bytes| Run { start: u32_at(bytes, 0), len: u32_at(bytes, 4) })
        .collect();
    let mut deks = Vec::with_capacity(1);
    for bytes in record[SLOTS_AT..RESERVED_AT].chunks_exact(SLOT_LEN) {
        match u16_at(bytes, 2) {
            0 => {}
            1 => deks.push(DekSlot {
                id: u16_at(bytes, 0),
                wrapped: wrapped_at(bytes, 8),
                made: u64_at(bytes, 48),
            }),
            _ => return None,
        }
    }
    let mut file_id = [0; 16];
    file_id.copy_from_slice(&record[32..48]);
    Some(Header {
        file_id,
        generation: u64_at(record, 48),
        volume_key_id: u32_at(record, 28),
        size: u64_at(record, 56),
        active_dek: u16_at(record, 76),
        deks,
        wrapped_mac_key: wrapped_at(record, MAC_KEY_AT),
        runs,
    })
}

fn wrapped_at(bytes: &[u8], at: usize) -> [u8; WRAPPED_LEN] {
    let mut wrapped = [0; WRAPPED_LEN];
    wrapped.copy_from_slice(&bytes[at..at + WRAPPED_LEN]);
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::mac::MacKey;
    use crate::crypto::secret::Secret;
    use proptest::prelude::*;

    fn key() -> MacKeys {
        let key = MacKey::new(&Secret::new_with(|key| key.fill(4)).unwrap()).unwrap();
        MacKeys::of_one(1, key)
    }

    fn sample() -> Header {
        let dek = DekSlot { id: 0, wrapped: [5; WRAPPED_LEN], made: 1_700_000_000 };
        let mut header = Header::new([9; 16], 1, dek, [6; WRAPPED_LEN]);
        header.size = 123_456_789;
        header.generation = 77;
        header.add_region(0);
        header.add_region(5);
        header
    }

    fn pages(header: &Header) -> [u8; HEADERS_LEN as usize] {
        let mut pages = [0; HEADERS_LEN as usize];
        let encoded = header.encode(&[1; 16], &key()).unwrap();
        pages[..encoded.len()].copy_from_slice(&encoded);
        pages
    }

    #[test]
    fn round_trip() {
        let header = sample();
        let decoded = Header::decode(&pages(&header), &[1; 16], &key()).unwrap();
        assert_eq!(decoded, Decoded { header, damaged_copy: false });
    }

    #[test]
    fn either_copy_serves_and_no_bit_goes_unnoticed() {
        let header = sample();
        let key = key();
        for bit in (0..RECORD_LEN * 8).chain([BLOCK_LEN * 8 - 1]) {
            for copy in [0, BLOCK_LEN] {
                let mut pages = pages(&header);
                pages[copy + bit / 8] ^= 1 << (bit % 8);
                let decoded = Header::decode(&pages, &[1; 16], &key).unwrap();
                assert_eq!(decoded.header, header);
                assert!(decoded.damaged_copy);
                pages[(BLOCK_LEN - copy) + 40] ^= 1;
                let both = Header::decode(&pages, &[1; 16], &key);
                assert_eq!(both, Err(HeaderError::Damaged));
            }
        }
        assert_eq!(
            Header::decode(&pages(&header), &[2; 16], &key),
            Err(HeaderError::Damaged),
            "of another volume"
        );
    }

    #[test]
    fn the_newer_copy_counts() {
        let old = sample();
        let mut new = old.clone();
        new.generation += 1;
        new.size = 5;
        let mut mixed = pages(&old);
        mixed[BLOCK_LEN..].copy_from_slice(&pages(&new)[BLOCK_LEN..]);
        assert_eq!(Header::decode(&mixed, &[1; 16], &key()).unwrap().header, new);
    }

    proptest! {
        #[test]
        fn regions_are_never_forgotten(
            regions in proptest::collection::vec(0_u32..400, 1..60),
            cut in 0_u64..400,
        ) {
            let mut header = sample();
            header.drop_regions_from(0);
            let mut with_page = std::collections::BTreeSet::new();
            for region in regions {
                if !header.has_region(region.into()) {
                    for added in header.add_region(region) {
                        prop_assert!(with_page.insert(added), "{} twice", added);
                    }
                }
                prop_assert!(header.runs.len() <= MAX_RUNS);
                for region in 0..400 {
                    prop_assert_eq!(header.has_region(region.into()), with_page.contains(&region));
                }
            }
            header.drop_regions_from(cut);
            with_page.retain(|&region| u64::from(region) < cut);
            for region in 0..400 {
                prop_assert_eq!(header.has_region(region.into()), with_page.contains(&region));
            }
            let again = Header::decode(&pages(&header), &[1; 16], &key()).unwrap().header;
            prop_assert_eq!(again, header);
        }
    }
}
