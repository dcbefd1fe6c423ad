//! Where the next record of a stream goes, and when its space is free again. No I/O.
//!
//! Records lie whole: what does not fit before the end goes to the start, and the pages left over
//! count as used with the record. Who wants to place a record reserves its room first: what may be
//! left over at the end is kept free beside it, so that placing never fails. Space is given back in
//! order of seq, once a record is home ([`Ring::trim`]).

use std::collections::VecDeque;

use super::PAGE;
use super::record::MAX_PAGES;

/// A record's number, and its position in the stream's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spot {
    pub(in crate::store) seq: u64,
    pub(in crate::store) at: u64,
}

#[derive(Debug)]
struct Live {
    spot: Spot,
    /// Of the record.
    own: u64,
    /// With the pages left over before it.
    len: u64,
}

#[derive(Debug)]
pub(crate) struct Ring {
    start: u64,
    end: u64,
    next: Spot,
    used: u64,
    /// Pages that somebody will place.
    reserved: u64,
    live: VecDeque<Live>,
    /// Records before this are home.
    trimmed: u64,
}

impl Ring {
    pub(crate) fn new(start: u64, end: u64, next: Spot) -> Ring {
        Ring { start, end, next, used: 0, reserved: 0, live: VecDeque::new(), trimmed: next.seq }
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
            ring.live.push_back(Live { spot, own: len, len: len + leftover });
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

    /// False while there is no room for `pages` more, beside what others have reserved.
    pub(crate) fn reserve(&mut self, pages: u64) -> bool {
        let wanted = (self.reserved + pages + MAX_PAGES as u64) * PAGE as u64;
        let there = self.used + wanted <= self.capacity();
        if there {
            self.reserved += pages;
        }
        there
    }

    pub(crate) fn unreserve(&mut self, pages: u64) {
        self.reserved = self.reserved.saturating_sub(pages);
    }

    /// Takes `pages` of what was reserved.
    pub(crate) fn place(&mut self, pages: u64) -> Spot {
        self.unreserve(pages);
        let (at, len) = self.with_leftover(pages);
        let spot = Spot { seq: self.next.seq, at };
        let own = pages * PAGE as u64;
        self.next = Spot { seq: spot.seq + 1, at: at + own };
        self.used += len;
        self.live.push_back(Live { spot, own, len });
        spot
    }

    /// Where the records from `from` to before `to` are, those of them that are live: positions and
    /// lengths.
    pub(crate) fn ranges(&self, from: u64, to: u64) -> Vec<(u64, u64)> {
        let first = self.live.partition_point(|live| live.spot.seq < from);
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for live in self.live.range(first..).take_while(|live| live.spot.seq < to) {
            match ranges.last_mut() {
                Some((at, len)) if *at + *len == live.spot.at => *len += live.own,
                _ => ranges.push((live.spot.at, live.own)),
            }
        }
        ranges
    }

    /// The first record that is not before `seq`: the tail, once all before `seq` is home.
    pub(crate) fn tail_for(&self, seq: u64) -> Spot {
        let seq = seq.max(self.trimmed);
        let live = self.live.iter().map(|live| live.spot);
        live.filter(|spot| spot.seq >= seq).min_by_key(|spot| spot.seq).unwrap_or(self.next)
    }

    /// Everything before `seq` is home and the anchor says so. True when space came free.
    pub(crate) fn trim(&mut self, seq: u64) -> bool {
        self.trimmed = self.trimmed.max(seq.min(self.next.seq));
        let before = self.used;
        while let Some(live) = self.live.front()
            && live.spot.seq < self.trimmed
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
    const PAGES: u64 = 3 * MAX_PAGES as u64;

    fn ring() -> Ring {
        Ring::new(START, START + PAGES * PAGE as u64, Spot { seq: 5, at: START })
    }

    fn place(ring: &mut Ring, pages: u64) -> Option<Spot> {
        ring.reserve(pages).then(|| ring.place(pages))
    }

    #[test]
    fn a_full_ring_waits_for_its_tail() {
        let most = MAX_PAGES as u64;
        let mut ring = ring();
        assert_eq!(place(&mut ring, most), Some(Spot { seq: 5, at: START }));
        assert_eq!(place(&mut ring, most).map(|spot| spot.seq), Some(6));
        assert_eq!(place(&mut ring, 1), None);
        ring.trim(6);
        assert!(ring.reserve(most - 1) && !ring.reserve(2) && ring.reserve(1));
        ring.unreserve(most);
        assert_eq!(place(&mut ring, most).map(|spot| spot.seq), Some(7));
        let page = PAGE as u64;
        assert_eq!(ring.tail_for(6), Spot { seq: 6, at: START + most * page });
        assert_eq!(ring.ranges(6, 7), [(START + most * page, most * page)]);
        assert_eq!(ring.ranges(6, 9), [(START + most * page, 2 * most * page)]);
        assert_eq!(ring.ranges(8, 9), []);
        ring.trim(7);
        assert_eq!(place(&mut ring, 2), Some(Spot { seq: 8, at: START }));
        assert_eq!(ring.ranges(7, 9), [(START + 2 * most * page, most * page), (START, 2 * page)]);
    }

    #[test]
    fn what_is_left_at_the_end_counts_until_the_record_goes() {
        let most = MAX_PAGES as u64;
        let mut ring = ring();
        for seq in 5..8 {
            place(&mut ring, most - 1).unwrap();
            ring.trim(seq + 1);
        }
        assert_eq!(ring.used(), 0);
        assert_eq!(place(&mut ring, 10), Some(Spot { seq: 8, at: START }));
        assert_eq!(ring.used(), 13 * PAGE as u64);
        assert_eq!(ring.ranges(0, 9), [(START, 10 * PAGE as u64)]);
        ring.trim(9);
        assert_eq!(ring.used(), 0);
    }

    proptest! {
        /// No record lies over another that is live, or past the end.
        #[test]
        fn live_records_never_overlap(
            steps in proptest::collection::vec((0_u8..4, 1..=MAX_PAGES as u64), 1..300),
        ) {
            let mut ring = ring();
            let mut live: VecDeque<(u64, u64, u64)> = VecDeque::new();
            let mut reserved: Vec<u64> = Vec::new();
            let (mut trimmed, mut expected) = (5, 5);
            for (what, number) in steps {
                match what {
                    0 => if ring.reserve(number) {
                        reserved.push(number);
                    },
                    1 | 2 => if let Some(pages) = reserved.pop() {
                        let pages = pages.min(number);
                        let spot = ring.place(pages);
                        let end = spot.at + pages * PAGE as u64;
                        prop_assert_eq!(spot.seq, expected);
                        prop_assert!(spot.at >= START && end <= START + PAGES * PAGE as u64);
                        for &(seq, from, to) in &live {
                            prop_assert!(seq < trimmed || end <= from || to <= spot.at);
                        }
                        live.push_back((spot.seq, spot.at, end));
                        expected += 1;
                    },
                    _ => {
                        trimmed = (trimmed + number % 5).min(expected);
                        ring.trim(trimmed);
                        live.retain(|(seq, ..)| *seq >= trimmed);
                    }
                }
                prop_assert!(ring.used() <= ring.capacity());
            }
        }
    }
}
