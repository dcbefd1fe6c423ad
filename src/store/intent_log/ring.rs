//! Where the next record of a stream goes, and when its space is free again. No I/O.
//!
//! Records lie whole: what does not fit before the end goes to the start, and the pages left over
//! count as used with the record. Space is given back in order of seq, once a record is home
//! ([`Ring::trim`]) and nobody reads it any more ([`Ring::unpin`]).

use std::collections::{BTreeMap, VecDeque};

use super::PAGE;

/// A record's number, and its position in the stream's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spot {
    pub seq: u64,
    pub at: u64,
}

#[derive(Debug)]
struct Live {
    spot: Spot,
    /// With the pages left over before it.
    len: u64,
}

#[derive(Debug)]
pub(crate) struct Ring {
    start: u64,
    end: u64,
    next: Spot,
    used: u64,
    live: VecDeque<Live>,
    pins: BTreeMap<u64, usize>,
    /// Records before this are home.
    trimmed: u64,
}

impl Ring {
    pub(crate) fn new(start: u64, end: u64, next: Spot) -> Ring {
        let (live, pins) = (VecDeque::new(), BTreeMap::new());
        Ring { start, end, next, used: 0, live, pins, trimmed: next.seq }
    }

    /// A ring that holds `records` already, given with their lengths.
    pub(crate) fn resume(start: u64, end: u64, next: Spot, records: &[(Spot, u64)]) -> Ring {
        let mut ring = Ring::new(start, end, next);
        for (i, &(spot, len)) in records.iter().enumerate() {
            // Up to where the next one begins: what is left over at the end counts with it.
            let past = spot.at + len;
            let leftover = match records.get(i + 1) {
                Some((next, _)) if next.at != past => end - past,
                _ => 0,
            };
            ring.used += len + leftover;
            ring.live.push_back(Live { spot, len: len + leftover });
        }
        ring.trimmed = records.first().map_or(next.seq, |(spot, _)| spot.seq);
        ring
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.end - self.start
    }

    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    pub(crate) fn next_seq(&self) -> u64 {
        self.next.seq
    }

    fn with_leftover(&self, pages: u64) -> (u64, u64) {
        let len = pages * PAGE as u64;
        let to_end = self.end - self.next.at;
        if len > to_end { (self.start, len + to_end) } else { (self.next.at, len) }
    }

    /// Whether [`Ring::place`] would find room.
    pub(crate) fn has_room(&self, pages: u64) -> bool {
        self.used + self.with_leftover(pages).1 <= self.capacity()
    }

    /// None while there is no room.
    pub(crate) fn place(&mut self, pages: u64) -> Option<Spot> {
        if !self.has_room(pages) {
            return None;
        }
        let (at, len) = self.with_leftover(pages);
        let spot = Spot { seq: self.next.seq, at };
        self.next = Spot { seq: spot.seq + 1, at: at + pages * PAGE as u64 };
        self.used += len;
        self.live.push_back(Live { spot, len });
        Some(spot)
    }

    /// The first record that is not before `seq`: the tail, once all before `seq` is home.
    pub(crate) fn tail_for(&self, seq: u64) -> Spot {
        // A pinned record before it is home all the same.
        let seq = seq.max(self.trimmed);
        let live = self.live.iter().map(|live| live.spot);
        live.filter(|spot| spot.seq >= seq).min_by_key(|spot| spot.seq).unwrap_or(self.next)
    }

    /// Everything before `seq` is home and the anchor says so. True when space came free.
    pub(crate) fn trim(&mut self, seq: u64) -> bool {
        self.trimmed = self.trimmed.max(seq.min(self.next.seq));
        self.free()
    }

    /// Keeps a record's space until [`Ring::unpin`]; false if it may be gone already.
    pub(crate) fn pin(&mut self, seq: u64) -> bool {
        let there = self.live.front().is_some_and(|live| live.spot.seq <= seq);
        let there = there && seq < self.next.seq;
        if there {
            *self.pins.entry(seq).or_default() += 1;
        }
        there
    }

    /// True when space came free.
    pub(crate) fn unpin(&mut self, seq: u64) -> bool {
        if let Some(count) = self.pins.get_mut(&seq) {
            *count -= 1;
            if *count == 0 {
                self.pins.remove(&seq);
            }
        }
        self.free()
    }

    fn free(&mut self) -> bool {
        let pinned = self.pins.keys().next().copied().unwrap_or(u64::MAX);
        let limit = self.trimmed.min(pinned);
        let before = self.used;
        while let Some(live) = self.live.front()
            && live.spot.seq < limit
        {
            self.used -= live.len;
            self.live.pop_front();
        }
        self.used < before
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 8192;
    const PAGES: u64 = 20;

    fn ring() -> Ring {
        Ring::new(START, START + PAGES * PAGE as u64, Spot { seq: 5, at: START })
    }

    #[test]
    fn a_full_ring_waits_for_its_tail() {
        let mut ring = ring();
        assert_eq!(ring.place(12), Some(Spot { seq: 5, at: START }));
        assert_eq!(ring.place(12), None);
        assert_eq!(ring.place(8), Some(Spot { seq: 6, at: START + 12 * PAGE as u64 }));
        assert_eq!(ring.place(1), None);
        assert!(ring.pin(5));
        assert!(!ring.trim(6));
        assert_eq!(ring.place(1), None);
        assert!(ring.unpin(5));
        assert!(!ring.pin(5) && ring.pin(6) && !ring.pin(7));
        assert_eq!(ring.place(12), Some(Spot { seq: 7, at: START }));
        assert_eq!(ring.tail_for(7), Spot { seq: 7, at: START });
    }

    #[test]
    fn what_is_left_at_the_end_counts_until_the_record_goes() {
        let mut ring = ring();
        ring.place(15);
        ring.trim(6);
        assert_eq!(ring.used(), 0);
        assert_eq!(ring.place(10), Some(Spot { seq: 6, at: START }));
        assert_eq!(ring.used(), 15 * PAGE as u64);
        ring.trim(7);
        assert_eq!(ring.used(), 0);
    }

    proptest! {
        /// No record lies over another that is live, pinned or past the end.
        #[test]
        fn live_records_never_overlap(steps in proptest::collection::vec((0_u8..4, 1_u64..9), 1..300)) {
            let mut ring = ring();
            let mut live: VecDeque<(u64, u64, u64)> = VecDeque::new();
            let mut pins: Vec<u64> = Vec::new();
            let (mut trimmed, mut expected) = (5, 5);
            for (what, number) in steps {
                match what {
                    0 | 1 => if let Some(spot) = ring.place(number) {
                        let end = spot.at + number * PAGE as u64;
                        prop_assert_eq!(spot.seq, expected);
                        prop_assert!(spot.at >= START && end <= START + PAGES * PAGE as u64);
                        let kept = |seq: u64| seq >= trimmed || pins.iter().any(|&pin| pin <= seq);
                        for &(seq, from, to) in &live {
                            prop_assert!(!kept(seq) || end <= from || to <= spot.at);
                        }
                        live.push_back((spot.seq, spot.at, end));
                        expected += 1;
                    },
                    2 => {
                        trimmed = (trimmed + number).min(expected);
                        ring.trim(trimmed);
                    }
                    _ => {
                        let seq = trimmed.max(5) + number % 3;
                        if ring.pin(seq) {
                            pins.push(seq);
                        } else if let Some(seq) = pins.pop() {
                            ring.unpin(seq);
                        }
                    }
                }
            }
        }
    }
}
