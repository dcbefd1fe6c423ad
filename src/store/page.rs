//! Tag pages and generation pages: eight sectors of 512 bytes, each with a MAC of its own.
//!
//! A sector is the unit that every disk writes whole, so a torn page is a mix of old and new
//! sectors, each of which proves itself. What a sector is bound to: the volume, the file, the
//! kind of page, the page's index and its own. Sectors are verified when first used; a damaged
//! one takes nothing but its own entries along.

use std::sync::atomic::{AtomicU8, Ordering};

use super::layout::{BLOCK_LEN, SECTOR_LEN, SECTORS_PER_PAGE};
use crate::crypto::aead::TAG_LEN;
use crate::crypto::mac::{MAC_LEN, MacKey};

const HEAD_LEN: usize = 32;
const ENTRY_LEN: usize = 32;
const GENERATION_LEN: usize = 8;

/// What a page is for, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum PageId {
    /// Tags of the group with this index.
    Tags(u64),
    /// Generations of the groups of the region with this index.
    Generations(u64),
}

impl PageId {
    fn domain(self) -> &'static [u8; 16] {
        match self {
            PageId::Tags(_) => b"byokfs tags 1\0\0\0",
            PageId::Generations(_) => b"byokfs groups 1\0",
        }
    }

    fn index(self) -> u64 {
        match self {
            PageId::Tags(index) | PageId::Generations(index) => index,
        }
    }

    /// The group of a tag page.
    pub(super) fn group(self) -> Option<u64> {
        match self {
            PageId::Tags(group) => Some(group),
            PageId::Generations(_) => None,
        }
    }

    fn locator(self, sector: usize) -> u64 {
        self.index() << 3 | sector as u64
    }

    pub(super) fn what(self) -> &'static str {
        match self {
            PageId::Tags(_) => "tag sector",
            PageId::Generations(_) => "generation sector",
        }
    }
}

/// How the MACs of one file's pages are made.
#[derive(Debug)]
pub(super) struct PageMac<'a> {
    pub key: &'a MacKey,
    pub volume: &'a [u8; 16],
    pub file: &'a [u8; 16],
}

impl PageMac<'_> {
    fn parts<'b>(&'b self, id: PageId, sector: &'b [u8]) -> [&'b [u8]; 4] {
        [id.domain(), self.volume, self.file, &sector[MAC_LEN..]]
    }
}

/// The tag entry of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub tag: [u8; TAG_LEN],
    pub counter: u64,
    pub session: u32,
    pub dek_slot: u16,
    pub flags: u16,
}

/// The block is there; all zeros is a hole.
pub(super) const FLAG_SEALED: u16 = 1;
/// The block's entry was in a sector that was damaged, and is gone for good: the block reads as an
/// error until it is written whole.
pub(super) const FLAG_LOST: u16 = 2;

impl Entry {
    pub(super) const LOST: Entry =
        Entry { tag: [0; TAG_LEN], counter: 0, session: 0, dek_slot: 0, flags: FLAG_LOST };

    pub(super) fn encode(&self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        bytes[..16].copy_from_slice(&self.tag);
        bytes[16..24].copy_from_slice(&self.counter.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.session.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.dek_slot.to_le_bytes());
        bytes[30..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }

    /// None for a hole.
    pub(super) fn decode(bytes: &[u8; ENTRY_LEN]) -> Option<Entry> {
        if bytes == &[0; ENTRY_LEN] {
            return None;
        }
        let mut tag = [0; TAG_LEN];
        tag.copy_from_slice(&bytes[..16]);
        Some(Entry {
            tag,
            counter: u64_at(bytes, 16),
            session: u32_at(bytes, 24),
            dek_slot: u16_at(bytes, 28),
            flags: u16_at(bytes, 30),
        })
    }
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Which generation a sector on disk may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accepts {
    /// Nothing says: a generation page, while a crash is recovered from.
    Any,
    /// A generation page: that of the header, or of one before. It was not written after that.
    AtMost(u64),
    /// The one that its group has. Another is an old sector put back, or that of another checkpoint.
    Exactly(u64),
    /// While a crash is recovered from: also what a checkpoint wrote that never came to its end.
    AtLeast(u64),
}

impl Accepts {
    pub(super) fn takes(self, generation: u64) -> bool {
        match self {
            Accepts::Any => true,
            Accepts::AtMost(newest) => generation <= newest,
            Accepts::Exactly(expected) => generation == expected,
            Accepts::AtLeast(expected) => generation >= expected,
        }
    }
}

/// A page in memory.
#[derive(Debug)]
pub(super) struct Page {
    id: PageId,
    bytes: Box<[u8; BLOCK_LEN]>,
    accepts: Accepts,
    /// One bit for each sector whose MAC is known to be right.
    verified: AtomicU8,
}

impl Clone for Page {
    fn clone(&self) -> Page {
        let verified = AtomicU8::new(self.verified.load(Ordering::Relaxed));
        Page { id: self.id, bytes: self.bytes.clone(), accepts: self.accepts, verified }
    }
}

impl Page {
    /// As read from disk: nothing is verified yet.
    pub(super) fn from_disk(id: PageId, bytes: Box<[u8; BLOCK_LEN]>, accepts: Accepts) -> Page {
        Page { id, bytes, accepts, verified: AtomicU8::new(0) }
    }

    /// A page of holes, to be sealed before it is written.
    pub(super) fn empty(id: PageId) -> Page {
        let mut page = Page {
            id,
            bytes: Box::new([0; BLOCK_LEN]),
            accepts: Accepts::Any,
            verified: AtomicU8::new(u8::MAX),
        };
        for sector in 0..SECTORS_PER_PAGE {
            page.reset_sector(sector);
        }
        page
    }

    pub(super) fn id(&self) -> PageId {
        self.id
    }

    pub(super) fn bytes(&self) -> &[u8; BLOCK_LEN] {
        &self.bytes
    }

    fn sector(&self, sector: usize) -> &[u8] {
        &self.bytes[sector * SECTOR_LEN..][..SECTOR_LEN]
    }

    /// Whether the sector's MAC is right, made once.
    pub(super) fn verify(&self, sector: usize, mac: &PageMac<'_>) -> bool {
        let bit = 1 << sector;
        if self.verified.load(Ordering::Relaxed) & bit != 0 {
            return true;
        }
        let bytes = self.sector(sector);
        let mut stored = [0; MAC_LEN];
        stored.copy_from_slice(&bytes[..MAC_LEN]);
        let right = u64_at(bytes, 24) == self.id.locator(sector)
            && self.accepts.takes(u64_at(bytes, 16))
            && mac.key.verify(&mac.parts(self.id, bytes), &stored);
        if right {
            self.verified.fetch_or(bit, Ordering::Relaxed);
        }
        right
    }

    /// Whether the sector says of itself that it belongs here. No proof: for who has no key.
    pub(super) fn is_in_place(&self, sector: usize) -> bool {
        u64_at(self.sector(sector), 24) == self.id.locator(sector)
    }

    /// The checkpoint that the sector says it was written by.
    pub(super) fn generation_of_sector(&self, sector: usize) -> u64 {
        u64_at(self.sector(sector), 16)
    }

    /// True when [`Page::verify`] has succeeded for every sector of the range.
    pub(super) fn is_verified(&self, first: usize, last: usize) -> bool {
        let wanted = (first..=last).fold(0, |bits, sector| bits | 1_u8 << sector);
        self.verified.load(Ordering::Relaxed) & wanted == wanted
    }

    /// Makes the sector one of holes, whatever it was.
    pub(super) fn reset_sector(&mut self, sector: usize) {
        let locator = self.id.locator(sector);
        let bytes = &mut self.bytes[sector * SECTOR_LEN..][..SECTOR_LEN];
        bytes.fill(0);
        bytes[24..32].copy_from_slice(&locator.to_le_bytes());
        self.verified.fetch_or(1 << sector, Ordering::Relaxed);
    }

    /// Gives every sector that is known to be right the generation, and a MAC over what it now
    /// holds. One that is not right stays as it is: it must not become right by being written.
    pub(super) fn seal_all(&mut self, generation: u64, mac: &PageMac<'_>) {
        for sector in 0..SECTORS_PER_PAGE {
            if self.is_verified(sector, sector) {
                self.seal(sector, generation, mac);
            }
        }
    }

    /// The highest generation of a sector that is known to be right.
    pub(super) fn newest(&self) -> u64 {
        let sectors = (0..SECTORS_PER_PAGE).filter(|&sector| self.is_verified(sector, sector));
        sectors.map(|sector| self.generation_of_sector(sector)).max().unwrap_or(0)
    }

    fn seal(&mut self, sector: usize, generation: u64, mac: &PageMac<'_>) {
        let id = self.id;
        let bytes = &mut self.bytes[sector * SECTOR_LEN..][..SECTOR_LEN];
        bytes[16..24].copy_from_slice(&generation.to_le_bytes());
        let made = mac.key.mac(&mac.parts(id, bytes));
        bytes[..MAC_LEN].copy_from_slice(&made);
    }

    fn entry_range(slot: usize, per_sector: usize, len: usize) -> std::ops::Range<usize> {
        let start = slot / per_sector * SECTOR_LEN + HEAD_LEN + slot % per_sector * len;
        start..start + len
    }

    fn tag_range(slot: usize) -> std::ops::Range<usize> {
        Self::entry_range(slot, super::layout::BLOCKS_PER_SECTOR, ENTRY_LEN)
    }

    /// Where in its page the generation of the `slot`th group is.
    pub(super) fn generation_range(slot: usize) -> std::ops::Range<usize> {
        Self::entry_range(slot, super::layout::GROUPS_PER_SECTOR, GENERATION_LEN)
    }

    /// The entry of the `slot`th block of a tag page; its sector must be verified.
    pub(super) fn entry(&self, slot: usize) -> Option<Entry> {
        let mut bytes = [0; ENTRY_LEN];
        bytes.copy_from_slice(&self.bytes[Self::tag_range(slot)]);
        Entry::decode(&bytes)
    }

    pub(super) fn set_entry(&mut self, slot: usize, entry: Option<Entry>) {
        let bytes = entry.map_or([0; ENTRY_LEN], |entry| entry.encode());
        self.bytes[Self::tag_range(slot)].copy_from_slice(&bytes);
    }

    /// The generation of the `slot`th group of a generation page; its sector must be verified.
    /// 0 is a group of holes.
    pub(super) fn generation(&self, slot: usize) -> u64 {
        u64_at(&self.bytes[Self::generation_range(slot)], 0)
    }

    pub(super) fn set_generation(&mut self, slot: usize, generation: u64) {
        self.bytes[Self::generation_range(slot)].copy_from_slice(&generation.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::secret::Secret;

    fn key(byte: u8) -> MacKey {
        MacKey::new(&Secret::new_with(|key| key.fill(byte)).unwrap()).unwrap()
    }

    fn sealed(mac: &PageMac<'_>) -> Page {
        let mut page = Page::empty(PageId::Tags(5));
        page.set_entry(
            17,
            Some(Entry { tag: [7; 16], counter: 9, session: 3, dek_slot: 1, flags: FLAG_SEALED }),
        );
        page.seal_all(3, mac);
        page
    }

    #[test]
    fn every_bit_of_a_sector_counts() {
        let key = key(1);
        let mac = PageMac { key: &key, volume: &[1; 16], file: &[2; 16] };
        let page = sealed(&mac);
        for bit in 0..SECTOR_LEN * 8 {
            let mut bytes = page.bytes.clone();
            bytes[SECTOR_LEN + bit / 8] ^= 1 << (bit % 8);
            let page = Page::from_disk(page.id, bytes, Accepts::Any);
            assert!(!page.verify(1, &mac), "bit {bit}");
            assert!(page.verify(0, &mac) && page.verify(2, &mac));
        }
    }

    #[test]
    fn a_sector_is_valid_in_one_place_only() {
        let key = key(1);
        let mac = PageMac { key: &key, volume: &[1; 16], file: &[2; 16] };
        let page = sealed(&mac);
        let reread = |id, mac: &PageMac<'_>| {
            Page::from_disk(id, page.bytes.clone(), Accepts::Any).verify(1, mac)
        };
        assert!(reread(PageId::Tags(5), &mac));
        assert!(!reread(PageId::Tags(6), &mac));
        assert!(!reread(PageId::Generations(5), &mac));
        assert!(!reread(page.id, &PageMac { file: &[3; 16], ..mac }));
        assert!(!reread(page.id, &PageMac { volume: &[3; 16], ..mac }));
        let mut swapped = page.bytes.clone();
        swapped.copy_within(SECTOR_LEN..2 * SECTOR_LEN, 0);
        assert!(!Page::from_disk(page.id, swapped, Accepts::Any).verify(0, &mac));
        let zeroed = Page::from_disk(page.id, Box::new([0; BLOCK_LEN]), Accepts::Any);
        assert!((0..SECTORS_PER_PAGE).all(|sector| !zeroed.verify(sector, &mac)));
    }

    #[test]
    fn an_old_sector_put_back_is_not_taken() {
        let key = key(1);
        let mac = PageMac { key: &key, volume: &[1; 16], file: &[2; 16] };
        let page = sealed(&mac);
        let takes = |accepts| Page::from_disk(page.id, page.bytes.clone(), accepts).verify(2, &mac);
        assert!(takes(Accepts::Exactly(3)) && !takes(Accepts::Exactly(4)));
        assert!(!takes(Accepts::Exactly(2)));
        assert!(takes(Accepts::AtLeast(2)) && !takes(Accepts::AtLeast(4)));
        assert!(takes(Accepts::AtMost(3)) && !takes(Accepts::AtMost(2)));
    }

    #[test]
    fn a_damaged_sector_is_not_sealed_again() {
        let key = key(1);
        let mac = PageMac { key: &key, volume: &[1; 16], file: &[2; 16] };
        let mut bytes = sealed(&mac).bytes;
        bytes[SECTOR_LEN + 40] ^= 1;
        let mut page = Page::from_disk(PageId::Tags(5), bytes, Accepts::Any);
        assert!(page.verify(0, &mac) && !page.verify(1, &mac));
        page.seal_all(9, &mac);
        let again = Page::from_disk(page.id, page.bytes, Accepts::Any);
        assert!(again.verify(0, &mac) && !again.verify(1, &mac));
        assert_eq!(again.newest(), 9);
    }

    #[test]
    fn entries_and_generations_keep_to_their_own_bytes() {
        let mut page = Page::empty(PageId::Tags(0));
        for slot in 0..super::super::layout::BLOCKS_PER_GROUP {
            let entry = Entry {
                tag: [slot as u8 + 1; 16],
                counter: slot as u64,
                session: 1,
                dek_slot: 0,
                flags: FLAG_SEALED,
            };
            page.set_entry(slot, Some(entry));
        }
        for slot in 0..super::super::layout::BLOCKS_PER_GROUP {
            let entry = page.entry(slot).unwrap();
            assert_eq!((entry.tag[0] as usize, entry.counter), (slot + 1, slot as u64));
        }
        page.set_entry(3, None);
        assert!(page.entry(3).is_none() && page.entry(2).is_some() && page.entry(4).is_some());
        let mut page = Page::empty(PageId::Generations(0));
        for slot in 0..super::super::layout::GROUPS_PER_REGION {
            page.set_generation(slot, slot as u64 + 1);
        }
        for slot in 0..super::super::layout::GROUPS_PER_REGION {
            assert_eq!(page.generation(slot), slot as u64 + 1);
        }
    }
}
