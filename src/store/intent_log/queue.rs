//! What waits in a stream: records for their write, and home files for their flush.
//!
//! No I/O here, and no lock: [`super::commit`] has both.

use std::collections::VecDeque;
use std::sync::Arc;

use super::pending::Pending;
use super::ring::{Ring, Spot};
use super::rounds::{Progress, Role, Rounds};
use super::{PAGE, Usage};
use crate::backing::{FileRef, NodeId};

/// The most that one write takes along.
const BATCH: usize = 4 << 20;

/// A record on its way to the kernel; `bytes` is None until its MAC is made.
#[derive(Debug)]
struct Queued {
    spot: Spot,
    bytes: Option<[Vec<u8>; 2]>,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(in crate::store) ring: Ring,
    waiting: VecDeque<Queued>,
    pub(super) progress: Arc<Progress>,
    rounds: [Rounds; 3],
    homes: Vec<Owed>,
    pub(super) pending: Pending,
}

/// A home file.
#[derive(Clone, Debug)]
pub(in crate::store) struct Home {
    pub(in crate::store) file: FileRef,
    pub(in crate::store) node: NodeId,
    /// [`Log::home_failures`] before the blocks were written.
    ///
    /// [`Log::home_failures`]: super::Log::home_failures
    pub(in crate::store) failures: u64,
}

/// One with blocks that records only name: to be flushed before those records are.
#[derive(Debug)]
struct Owed {
    first: u64,
    last: u64,
    home: Home,
}

impl Queue {
    pub(super) fn new(ring: Ring) -> Queue {
        let progress = Arc::new(Progress::new(ring.next_seq()));
        Queue {
            ring,
            waiting: VecDeque::new(),
            progress,
            rounds: Default::default(),
            homes: Vec::new(),
            pending: Pending::default(),
        }
    }

    pub(super) fn usage(&self) -> Usage {
        Usage { used: self.ring.used(), capacity: self.ring.capacity() }
    }

    pub(super) fn rounds(&mut self, role: Role) -> &mut Rounds {
        &mut self.rounds[role as usize]
    }

    /// Whether somebody could begin a round now that does something.
    pub(super) fn is_free(&self, role: Role) -> bool {
        self.rounds[role as usize].is_free() && (role != Role::Write || self.is_ready())
    }

    pub(super) fn place(&mut self, pages: u64, home: Option<Home>) -> Spot {
        let spot = self.ring.place(pages);
        self.waiting.push_back(Queued { spot, bytes: None });
        if let Some(home) = home {
            match self.homes.iter_mut().find(|owed| Arc::ptr_eq(&owed.home.file, &home.file)) {
                Some(owed) => owed.last = spot.seq,
                None => self.homes.push(Owed { first: spot.seq, last: spot.seq, home }),
            }
        }
        spot
    }

    /// The home files that records before `seq` need on stable storage.
    pub(super) fn homes_before(&self, seq: u64) -> Vec<Home> {
        let needed = self.homes.iter().filter(|owed| owed.first < seq);
        needed.map(|owed| owed.home.clone()).collect()
    }

    /// Whether records name blocks in this home file, or with None in any, that no flush has covered.
    pub(super) fn owes_flush_of(&self, home: Option<NodeId>) -> bool {
        self.homes.iter().any(|owed| home.is_none_or(|node| node == owed.home.node))
    }

    pub(super) fn homes_are_durable(&mut self, seq: u64) {
        self.homes.retain_mut(|owed| {
            owed.first = owed.first.max(seq);
            owed.last >= seq
        });
    }

    /// The last record that is on stable storage.
    pub(super) fn durable_seq(&self) -> u64 {
        self.progress.mark(Role::Flush).saturating_sub(1)
    }

    /// The record's bytes; true where it is the first that waits.
    pub(super) fn fill(&mut self, seq: u64, bytes: [Vec<u8>; 2]) -> bool {
        let first = self.waiting.front().map(|queued| queued.spot.seq);
        let at = first.map_or(0, |first| (seq - first) as usize);
        if let Some(queued) = self.waiting.get_mut(at) {
            queued.bytes = Some(bytes);
        }
        at == 0
    }

    fn is_ready(&self) -> bool {
        self.waiting.front().is_some_and(|queued| queued.bytes.is_some())
    }

    /// Every ready record that lies behind the first without a gap: position, bytes, last seq.
    pub(super) fn take_batch(&mut self) -> (u64, Vec<[Vec<u8>; 2]>, u64) {
        let mut batch = Vec::new();
        let (mut from, mut end, mut last) = (0, None, 0);
        let mut len = 0;
        while let Some(queued) = self.waiting.front_mut() {
            if end.is_some_and(|end| end != queued.spot.at) || len >= BATCH {
                break;
            }
            let Some(bytes) = queued.bytes.take() else { break };
            if end.is_none() {
                from = queued.spot.at;
            }
            let record_len = bytes[0].len() + bytes[1].len();
            len += record_len;
            end = Some(queued.spot.at + record_len as u64);
            last = queued.spot.seq;
            batch.push(bytes);
            self.waiting.pop_front();
        }
        (from, batch, last)
    }
}

const _: () = assert!(BATCH >= super::record::MAX_PAGES * PAGE);
