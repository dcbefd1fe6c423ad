//! Reading a stream after a crash: which records are there, and whether one that was durable is
//! missing.
//!
//! The scan follows the seqs from the anchor's tail and stops at the first record that does not
//! prove itself: torn, or of an earlier lap. That is the end of what a crash left, unless a later
//! record is valid and says that the missing one was durable before it: then the log was damaged
//! or tampered with, and nothing must be replayed over it.

use std::collections::HashSet;
use std::sync::Arc;
use std::{fmt, io};

use super::anchor::{ANCHORS_LEN, Anchor};
use super::record::{Claim, HEAD_LEN, MAX_PAGES, Record};
use super::ring::Spot;
use super::{PAGE, STREAMS};
use crate::backing::FileRef;
use crate::crypto::mac::MacKey;
use crate::store::keys::MacKeys;

/// The log key of a session, None for one that is not known.
pub(in crate::store) type SessionKeys<'a> = dyn Fn(u32) -> Option<Arc<MacKey>> + 'a;

/// How a log proves that it is this volume's.
#[derive(Clone, Copy)]
pub(in crate::store) enum Proof<'a> {
    /// By the keys of the anchors, and those of the records.
    Keys(&'a MacKeys, &'a SessionKeys<'a>),
    /// Not at all: what has the right form is believed. For who looks without a key.
    Form,
}

impl<'a> Proof<'a> {
    pub(super) fn anchor_keys(&self) -> Option<&'a MacKeys> {
        match self {
            Proof::Keys(keys, _) => Some(keys),
            Proof::Form => None,
        }
    }
}

impl fmt::Debug for Proof<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.anchor_keys().is_some() { "Keys" } else { "Form" })
    }
}

/// What one stream holds.
#[derive(Debug)]
pub(crate) struct Scan {
    pub(in crate::store) records: Vec<Record>,
    /// The seq that is not there any more.
    pub(in crate::store) next_seq: u64,
    pub(in crate::store) end_at: u64,
    /// A record that was durable is not there.
    pub(in crate::store) damaged: bool,
    /// Records are of a session whose key is not to be had: whether they count is not known.
    pub(in crate::store) unknown: Option<u32>,
}

struct Reader<'a> {
    file: &'a FileRef,
    anchor: &'a Anchor,
    proof: Proof<'a>,
    buffer: Vec<u8>,
    /// The session of a record that would be wanted, without a key.
    unknown: Option<u32>,
}

impl Reader<'_> {
    /// The record at `at`, if one proves itself there and `wanted` likes its claim.
    fn record(
        &mut self,
        at: u64,
        wanted: impl FnOnce(&Claim) -> bool,
    ) -> io::Result<Option<Record>> {
        if at + PAGE as u64 > self.anchor.ring_end() {
            return Ok(None);
        }
        let mut head = [0; HEAD_LEN];
        self.fill(at, &mut head)?;
        let Some(claim) = Claim::read(&head) else { return Ok(None) };
        let fits = at + (claim.pages * PAGE) as u64 <= self.anchor.ring_end();
        let here = claim.place.at == at && claim.place.stream == self.anchor.stream;
        if !fits || !here || !wanted(&claim) {
            return Ok(None);
        }
        let key = match self.proof {
            Proof::Keys(_, sessions) => {
                let Some(key) = sessions(claim.place.session) else {
                    // The head is in one sector: it is as it was written. And before anything is,
                    // its session is on stable storage.
                    self.unknown.get_or_insert(claim.place.session);
                    return Ok(None);
                };
                Some(key)
            }
            Proof::Form => None,
        };
        let mut buffer = std::mem::take(&mut self.buffer);
        let read = self.fill(at, &mut buffer[..claim.pages * PAGE]);
        let record = claim.prove(&buffer, key.as_deref());
        self.buffer = buffer;
        read?;
        Ok(record)
    }

    /// What the file does not have reads as zeros, and proves nothing.
    fn fill(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let count = self.file.read_at(buf, at)?;
        buf[count..].fill(0);
        Ok(())
    }

    /// Whether a valid record after `missing` says that `missing` was durable. One of a later life
    /// says so too, of all that was before: then the anchor is older than it may be.
    fn was_durable(&mut self, missing: u64) -> io::Result<bool> {
        let most = self.anchor.ring_len / PAGE as u64;
        let proof = |claim: &Claim| claim.place.seq > missing && claim.place.durable_seq >= missing;
        for page in 0..most {
            if self.record(ANCHORS_LEN + page * PAGE as u64, proof)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Scan {
    pub(crate) fn run(
        file: &FileRef,
        anchor: &Anchor,
        tail: Spot,
        proof: Proof<'_>,
    ) -> io::Result<Scan> {
        let mut reader =
            Reader { file, anchor, proof, buffer: vec![0; MAX_PAGES * PAGE], unknown: None };
        let mut records = Vec::new();
        let Spot { seq: mut next_seq, mut at } = tail;
        loop {
            let mut found = reader.record(at, |claim| claim.place.seq == next_seq)?;
            if found.is_none() {
                found = reader.record(ANCHORS_LEN, |claim| claim.place.seq == next_seq)?;
            }
            let Some(record) = found else { break };
            at = record.place.at + record.pages() * PAGE as u64;
            next_seq += 1;
            records.push(record);
        }
        let damaged = reader.was_durable(next_seq)?;
        Ok(Scan { records, next_seq, end_at: at, damaged, unknown: reader.unknown })
    }
}

/// The records of both streams in the order in which they were made, and those that do not count. A
/// record that follows one of the same file which the crash took from the other stream goes, and so
/// do all after it: nothing of it was acknowledged as durable.
pub(crate) fn merge(scans: [Scan; STREAMS]) -> (Vec<Record>, Vec<Record>) {
    let ends = [scans[0].next_seq, scans[1].next_seq];
    let mut all: Vec<Record> = scans.into_iter().flat_map(|scan| scan.records).collect();
    all.sort_by_key(|record| record.place.order);
    let mut cut_short: HashSet<[u8; 16]> = HashSet::new();
    all.into_iter().partition(|record| {
        let other_end = ends[1 - usize::from(record.place.stream)];
        let follows = record.draft.other == 0 || record.draft.other < other_end;
        if !follows {
            cut_short.insert(record.draft.file_id);
        }
        !cut_short.contains(&record.draft.file_id)
    })
}
