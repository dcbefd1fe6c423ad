//! Ranges of blocks that became holes since the disk was last told. No I/O.
//!
//! Invariant: the parts are apart, and what was said of a block last holds. There are no more of
//! them than records in the log and pages that were changed since, so that nothing bounds them here.

use std::collections::BTreeMap;
use std::ops::Range;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub first: u64,
    pub past: u64,
    /// Their space is kept.
    pub keep: bool,
}

/// By the first block.
#[derive(Clone, Debug, Default)]
pub(super) struct Removed(BTreeMap<u64, Part>);

impl Removed {
    /// Whatever was said of these blocks before.
    pub(super) fn add(&mut self, first: u64, past: u64, keep: bool) {
        if first >= past {
            return;
        }
        self.cut(first, past);
        let mut part = Part { first, past, keep };
        if let Some(before) = self.0.range(..first).next_back().map(|(_, before)| *before)
            && before.past == first
            && before.keep == keep
        {
            self.0.remove(&before.first);
            part.first = before.first;
        }
        if let Some(after) = self.0.get(&past).copied().filter(|after| after.keep == keep) {
            self.0.remove(&past);
            part.past = after.past;
        }
        self.0.insert(part.first, part);
    }

    /// As far as nothing is said of these blocks yet.
    pub(super) fn add_older(&mut self, first: u64, past: u64, keep: bool) {
        let mut from = first;
        for newer in self.overlaps(&(first..past)) {
            self.add(from, newer.first, keep);
            from = newer.past;
        }
        self.add(from, past, keep);
    }

    /// What of these blocks became holes keeps its space. Returns of how many that is news.
    pub(super) fn keep(&mut self, blocks: &Range<u64>) -> u64 {
        let mut news = 0;
        for part in self.overlaps(blocks).into_iter().filter(|part| !part.keep) {
            self.add(part.first, part.past, true);
            news += part.past - part.first;
        }
        news
    }

    pub(super) fn touches(&self, blocks: &Range<u64>) -> bool {
        self.over(blocks).next().is_some()
    }

    pub(super) fn keeps_any_of(&self, blocks: &Range<u64>) -> bool {
        self.over(blocks).any(|part| part.keep)
    }

    /// How many of the blocks lose their space.
    pub(super) fn given_back(&self, blocks: &Range<u64>) -> u64 {
        let parts = self.overlaps(blocks).into_iter().filter(|part| !part.keep);
        parts.map(|part| part.past - part.first).sum()
    }

    pub(super) fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        self.0.values().copied()
    }

    /// The parts that have blocks of these, from the last to the first.
    fn over(&self, blocks: &Range<u64>) -> impl Iterator<Item = Part> + '_ {
        let (start, end) = (blocks.start, blocks.end.max(blocks.start));
        let below = self.0.range(..end).rev().map(|(_, part)| *part);
        below.take_while(move |part| start < end && start < part.past)
    }

    /// What of the parts lies in these blocks, in order.
    fn overlaps(&self, blocks: &Range<u64>) -> Vec<Part> {
        let clip = |part: Part| Part {
            first: part.first.max(blocks.start),
            past: part.past.min(blocks.end),
            ..part
        };
        let mut parts: Vec<Part> = self.over(blocks).map(clip).collect();
        parts.reverse();
        parts
    }

    fn cut(&mut self, first: u64, past: u64) {
        let parts: Vec<Part> = self.over(&(first..past)).collect();
        for part in parts {
            self.0.remove(&part.first);
            if part.first < first {
                self.0.insert(part.first, Part { past: first, ..part });
            }
            if past < part.past {
                self.0.insert(past, Part { first: past, ..part });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against one answer per block.
    #[test]
    fn what_was_said_last_holds() {
        const BLOCKS: u64 = 40;
        let mut random = 7u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) % below
        };
        let (mut removed, mut model) = (Removed::default(), [None; BLOCKS as usize]);
        for step in 0..20_000 {
            if step % 50 == 0 {
                (removed, model) = (Removed::default(), [None; BLOCKS as usize]);
            }
            let first = next(BLOCKS);
            let past = first + next(BLOCKS - first + 1);
            let (blocks, keep) = (first..past, next(2) == 0);
            let of = &mut model[first as usize..past as usize];
            let lost = of.iter().filter(|said| **said == Some(false)).count() as u64;
            assert_eq!(removed.given_back(&blocks), lost);
            assert_eq!(removed.touches(&blocks), of.iter().any(Option::is_some));
            assert_eq!(removed.keeps_any_of(&blocks), of.contains(&Some(true)));
            match next(3) {
                0 => {
                    removed.add(first, past, keep);
                    of.fill(Some(keep));
                }
                1 => {
                    removed.add_older(first, past, keep);
                    of.iter_mut().for_each(|said| *said = said.or(Some(keep)));
                }
                _ => {
                    assert_eq!(removed.keep(&blocks), lost);
                    of.iter_mut().for_each(|said| *said = said.map(|_| true));
                }
            }
            let parts: Vec<Part> = removed.parts().collect();
            let mut shown = [None; BLOCKS as usize];
            for part in &parts {
                assert!(part.first < part.past);
                shown[part.first as usize..part.past as usize].fill(Some(part.keep));
            }
            assert_eq!(shown, model);
            for two in parts.windows(2) {
                let joined = two[0].past == two[1].first && two[0].keep == two[1].keep;
                assert!(two[0].past <= two[1].first && !joined, "{two:?}");
            }
        }
    }
}
