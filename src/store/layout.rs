//! Where everything lies in a backing file. Pure arithmetic, no I/O.
//!
//! ```text
//! page 0, 1          header A, header B
//! then regions of    1 generation page + 480 groups
//!      groups of     1 tag page + 120 data blocks
//! ```
//!
//! Pages and blocks are 4096 bytes. A tag page and a generation page are eight sectors of 512
//! bytes: a tag sector has the entries of 15 blocks, a generation sector those of 60 groups.

use std::ops::Range;

/// Bytes of plaintext in a block, of ciphertext in a data page, and of every other page.
pub const BLOCK_LEN: usize = 4096;
pub(super) const BLOCK: u64 = BLOCK_LEN as u64;

pub(super) const SECTOR_LEN: usize = 512;
pub(super) const SECTORS_PER_PAGE: usize = BLOCK_LEN / SECTOR_LEN;

pub(super) const BLOCKS_PER_SECTOR: usize = 15;
pub(super) const BLOCKS_PER_GROUP: usize = SECTORS_PER_PAGE * BLOCKS_PER_SECTOR;
pub(super) const GROUPS_PER_SECTOR: usize = 60;
pub(super) const GROUPS_PER_REGION: usize = SECTORS_PER_PAGE * GROUPS_PER_SECTOR;

/// Header A and header B.
pub(super) const HEADERS_LEN: u64 = 2 * BLOCK;
/// A group on disk.
pub(super) const GROUP_LEN: u64 = (1 + BLOCKS_PER_GROUP as u64) * BLOCK;
/// A region on disk.
pub(super) const REGION_LEN: u64 = BLOCK + GROUPS_PER_REGION as u64 * GROUP_LEN;

/// Plaintext in a group.
pub(super) const GROUP_PLAIN: u64 = BLOCKS_PER_GROUP as u64 * BLOCK;
/// The largest file: every offset in it, on disk too, fits an `off_t`, every region a `u32`.
pub const MAX_SIZE: u64 = 1 << 59;

pub(super) const fn block_of(offset: u64) -> u64 {
    offset / BLOCK
}

pub(super) const fn group_of(offset: u64) -> u64 {
    offset / GROUP_PLAIN
}

pub(super) const fn region_of_group(group: u64) -> u64 {
    group / GROUPS_PER_REGION as u64
}

/// First plaintext byte of a group.
pub(super) const fn group_start(group: u64) -> u64 {
    group * GROUP_PLAIN
}

/// Index of a block within its group.
pub(super) const fn slot_of_block(block: u64) -> usize {
    (block % BLOCKS_PER_GROUP as u64) as usize
}

/// Index of a group within its region.
pub(super) const fn slot_of_group(group: u64) -> usize {
    (group % GROUPS_PER_REGION as u64) as usize
}

/// Blocks that `size` bytes take.
pub(super) const fn blocks_for(size: u64) -> u64 {
    size.div_ceil(BLOCK)
}

/// Position of a region's generation page.
pub(super) const fn generation_page_at(region: u64) -> u64 {
    HEADERS_LEN + region * REGION_LEN
}

/// Position of a group's tag page.
pub(super) const fn tag_page_at(group: u64) -> u64 {
    generation_page_at(region_of_group(group)) + BLOCK + slot_of_group(group) as u64 * GROUP_LEN
}

/// Position of a data block.
pub(super) const fn block_at(block: u64) -> u64 {
    let group = block / BLOCKS_PER_GROUP as u64;
    tag_page_at(group) + BLOCK + slot_of_block(block) as u64 * BLOCK
}

/// Length of a backing file that holds `size` bytes.
pub(super) const fn backing_len(size: u64) -> u64 {
    if size == 0 { HEADERS_LEN } else { block_at((size - 1) / BLOCK) + BLOCK }
}

/// The groups that a range of plaintext touches.
pub(super) const fn groups(offset: u64, len: u64) -> Range<u64> {
    if len == 0 {
        return group_of(offset)..group_of(offset);
    }
    group_of(offset)..group_of(offset.saturating_add(len) - 1) + 1
}

/// The part of the range `offset..end` that lies in `group`; empty where there is none.
pub(super) const fn part_in_group(offset: u64, end: u64, group: u64) -> Range<u64> {
    let (first, past) = (group_start(group), group_start(group + 1));
    let from = if offset > first { offset } else { first };
    let to = if end < past { end } else { past };
    from..if to > from { to } else { from }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_numbers_of_the_format() {
        assert_eq!(BLOCKS_PER_GROUP, 120);
        assert_eq!(GROUPS_PER_REGION, 480);
        assert_eq!(GROUP_LEN, 495_616);
        assert_eq!(REGION_LEN, 237_899_776);
        assert_eq!(generation_page_at(0), 8192);
        assert_eq!(tag_page_at(0), 12_288);
        assert_eq!(block_at(0), 16_384);
        assert_eq!(block_at(119), 16_384 + 119 * 4096);
        assert_eq!(block_at(120), 12_288 + GROUP_LEN + 4096);
        assert_eq!(generation_page_at(1), 8192 + REGION_LEN);
        assert_eq!(backing_len(0), 8192);
        assert_eq!(backing_len(1), 20_480);
        assert_eq!(backing_len(4096), 20_480);
        assert_eq!(backing_len(4097), 24_576);
    }

    proptest! {
        #[test]
        fn no_two_things_share_a_page(block in 0..blocks_for(MAX_SIZE), other in 0_u64..2_000_000) {
            let group = block / BLOCKS_PER_GROUP as u64;
            let region = region_of_group(group);
            prop_assert!(block_at(block) > tag_page_at(group));
            prop_assert!(tag_page_at(group) > generation_page_at(region));
            prop_assert!(block_at(block) + BLOCK <= generation_page_at(region + 1));
            prop_assert!(block_at(block) + BLOCK <= tag_page_at(group + 1));
            prop_assert_eq!(block_at(block) % BLOCK, 0);
            let next = block + 1 + other;
            prop_assert!(block_at(next) >= block_at(block) + (next - block) * BLOCK);
            prop_assert!(i64::try_from(block_at(block) + BLOCK).is_ok());
            prop_assert!(u32::try_from(region).is_ok());
        }

        #[test]
        fn parts_cover_a_range_once(offset in 0..MAX_SIZE, len in 0_u64..4 * GROUP_PLAIN) {
            let end = offset + len;
            let mut at = offset;
            for group in groups(offset, len) {
                let part = part_in_group(offset, end, group);
                prop_assert_eq!(part.start, at);
                prop_assert!(part.end > part.start);
                prop_assert_eq!(group_of(part.start), group);
                prop_assert_eq!(group_of(part.end - 1), group);
                at = part.end;
            }
            prop_assert_eq!(at, end);
        }
    }
}
