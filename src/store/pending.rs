//! Overwrites in progress, so that killing the daemon between the write of a block and the write
//! of its tag loses neither the old nor the new content.
//!
//! Before a block that has content is written in place, its new tag entry goes to a slot of the
//! file `pending`; when the tag sector is written, the slot is erased. What a killed daemon left
//! in a slot is a second chance: where a block does not match its tag, it may match the entry of
//! a slot, and then that entry takes its place. A failed write leaves its slot in the same way.
//!
//! This orders nothing on stable storage: after a power cut it may or may not help. A slot fits
//! one page, so that a kill leaves it whole or as it was.

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex};

use super::layout::{BLOCK_LEN, BLOCKS_PER_GROUP};
use super::page::{Entry, u16_at, u64_at};
use crate::backing::{Access, FileRef, NodeRef};
use crate::crypto::mac::{MAC_LEN, MacKey};
use crate::error::{Context, Result};

pub(super) const FILE: &[u8] = b"pending";
const DOMAIN: &[u8; 16] = b"byokfs pending 0";
const SLOTS: usize = 64;
const HEAD_LEN: usize = 64;
const ENTRY_LEN: usize = 32;

/// The new entries of consecutive blocks of one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub file_id: [u8; 16],
    pub group: u64,
    /// Index in the group of the first block.
    pub first: usize,
    pub entries: Vec<Entry>,
}

impl Record {
    pub(super) fn encode(&self, volume: &[u8; 16], key: &MacKey) -> Vec<u8> {
        let mut bytes = vec![0; HEAD_LEN + self.entries.len() * ENTRY_LEN];
        bytes[16..32].copy_from_slice(&self.file_id);
        bytes[32..40].copy_from_slice(&self.group.to_le_bytes());
        bytes[40..42].copy_from_slice(&(self.first as u16).to_le_bytes());
        bytes[42..44].copy_from_slice(&(self.entries.len() as u16).to_le_bytes());
        for (entry, bytes) in self.entries.iter().zip(bytes[HEAD_LEN..].chunks_exact_mut(ENTRY_LEN))
        {
            bytes.copy_from_slice(&entry.encode());
        }
        let mac = key.mac(&[DOMAIN, volume, &bytes[MAC_LEN..]]);
        bytes[..MAC_LEN].copy_from_slice(&mac);
        bytes
    }

    /// None for a slot that is erased, torn or forged.
    fn decode(slot: &[u8], volume: &[u8; 16], key: &MacKey) -> Option<Record> {
        let (first, count) = (usize::from(u16_at(slot, 40)), usize::from(u16_at(slot, 42)));
        if count == 0 || first + count > BLOCKS_PER_GROUP {
            return None;
        }
        let bytes = slot.get(..HEAD_LEN + count * ENTRY_LEN)?;
        let mut mac = [0; MAC_LEN];
        mac.copy_from_slice(&bytes[..MAC_LEN]);
        if !key.verify(&[DOMAIN, volume, &bytes[MAC_LEN..]], &mac) {
            return None;
        }
        let entries: Option<Vec<Entry>> = bytes[HEAD_LEN..]
            .chunks_exact(ENTRY_LEN)
            .map(|bytes| {
                let mut entry = [0; ENTRY_LEN];
                entry.copy_from_slice(bytes);
                Entry::decode(&entry)
            })
            .collect();
        let mut file_id = [0; 16];
        file_id.copy_from_slice(&bytes[16..32]);
        Some(Record { file_id, group: u64_at(bytes, 32), first, entries: entries? })
    }
}

#[derive(Debug, Default)]
struct State {
    free: Vec<usize>,
    /// Slots of writes that never came to an end, oldest first.
    unsettled: Vec<(usize, Record)>,
}

#[derive(Debug)]
pub(super) struct Pending {
    file: FileRef,
    state: Mutex<State>,
    freed: Condvar,
    unsettled: AtomicUsize,
}

/// A slot in use. Unless [`Announced::finished`], it stays for [`Pending::unsettled`].
#[derive(Debug)]
pub(super) struct Announced<'a> {
    pending: &'a Pending,
    slot: usize,
    record: Option<Record>,
}

impl Pending {
    /// A new file for an empty volume, every slot erased.
    pub(super) fn format(root: &NodeRef) -> std::io::Result<()> {
        let file = root.create_unnamed()?;
        file.write_at(&vec![0; SLOTS * BLOCK_LEN], 0)?;
        file.sync_all()?;
        root.link_file(&*file, FILE)
    }

    pub(super) fn open(root: &NodeRef, read_only: bool, shown: &str) -> Result<Pending> {
        let access = if read_only { Access::Read } else { Access::ReadWrite };
        let file = match root.lookup(FILE).and_then(|node| node.open(access)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !read_only => {
                log::warn!("{shown}/pending is missing: what an interrupted write left is lost");
                Pending::format(root)
                    .and_then(|()| root.lookup(FILE))
                    .and_then(|node| node.open(access))
            }
            found => found,
        };
        let file = file.context(|| format!("cannot open {shown}/pending"))?;
        let state = Mutex::new(State { free: (0..SLOTS).collect(), unsettled: Vec::new() });
        Ok(Pending { file, state, freed: Condvar::new(), unsettled: AtomicUsize::new(0) })
    }

    /// Reads what an earlier daemon left. Once, before the first write.
    pub(super) fn load(&self, volume: &[u8; 16], key: &MacKey) -> std::io::Result<()> {
        let mut bytes = vec![0; SLOTS * BLOCK_LEN];
        self.file.read_at(&mut bytes, 0)?;
        let mut state = self.state.lock();
        let left = bytes.chunks_exact(BLOCK_LEN).map(|slot| Record::decode(slot, volume, key));
        state.unsettled =
            left.enumerate().filter_map(|(at, record)| record.map(|record| (at, record))).collect();
        let taken: Vec<usize> = state.unsettled.iter().map(|(at, _)| *at).collect();
        state.free = (0..SLOTS).filter(|at| !taken.contains(at)).collect();
        self.unsettled.store(state.unsettled.len(), Ordering::Release);
        if !state.unsettled.is_empty() {
            log::info!("{} interrupted writes will be settled", state.unsettled.len());
        }
        Ok(())
    }

    /// Writes `bytes`, the encoded `record`, to a slot.
    pub(super) fn announce(&self, record: Record, bytes: &[u8]) -> std::io::Result<Announced<'_>> {
        let slot = self.take_slot();
        // Dropped on an error, this keeps the record; then no block has been written, and a
        // record that matches no block does nothing.
        let announced = Announced { pending: self, slot, record: Some(record) };
        self.file.write_at(bytes, (slot * BLOCK_LEN) as u64)?;
        Ok(announced)
    }

    fn take_slot(&self) -> usize {
        let mut state = self.state.lock();
        loop {
            if let Some(slot) = state.free.pop() {
                return slot;
            }
            if state.unsettled.is_empty() {
                self.freed.wait(&mut state);
                continue;
            }
            let (slot, record) = state.unsettled.remove(0);
            self.unsettled.store(state.unsettled.len(), Ordering::Release);
            let file = super::keys::hex(&record.file_id);
            log::warn!("an interrupted write of file {file} was never settled; its slot is reused");
            return slot;
        }
    }

    /// What interrupted writes of the group may have left, newest first.
    pub(super) fn unsettled(&self, file_id: &[u8; 16], group: u64) -> Vec<Record> {
        if self.unsettled.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let state = self.state.lock();
        let records = state.unsettled.iter().rev().map(|(_, record)| record);
        records
            .filter(|record| record.file_id == *file_id && record.group == group)
            .cloned()
            .collect()
    }

    /// The group's interrupted writes are settled: their slots are free again.
    pub(super) fn settled(&self, file_id: &[u8; 16], group: u64) {
        let mut done = Vec::new();
        let mut state = self.state.lock();
        state.unsettled.retain(|(slot, record)| {
            let this = record.file_id == *file_id && record.group == group;
            if this {
                done.push(*slot);
            }
            !this
        });
        self.unsettled.store(state.unsettled.len(), Ordering::Release);
        drop(state);
        for slot in done {
            self.erase(slot);
        }
    }

    fn erase(&self, slot: usize) {
        // A record that stays does no harm: it matches no block but one it tells the truth of.
        if let Err(error) = self.file.write_at(&[0; HEAD_LEN], (slot * BLOCK_LEN) as u64) {
            log::warn!("cannot erase a pending write: {error}");
        }
        self.state.lock().free.push(slot);
        self.freed.notify_one();
    }
}

impl Announced<'_> {
    /// The blocks and their tags are written.
    pub(super) fn finished(mut self) {
        self.record = None;
    }
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        match self.record.take() {
            None => self.pending.erase(self.slot),
            Some(record) => {
                let mut state = self.pending.state.lock();
                state.unsettled.push((self.slot, record));
                self.pending.unsettled.store(state.unsettled.len(), Ordering::Release);
                self.pending.freed.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::Backing;
    use crate::backing::linux::LinuxBacking;
    use crate::crypto::secret::Secret;
    use crate::store::page::FLAG_SEALED;

    #[test]
    fn what_is_not_finished_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let root = LinuxBacking::open(dir.path()).unwrap().root();
        let key = MacKey::new(&Secret::new_with(|key| key.fill(8)).unwrap()).unwrap();
        Pending::format(&root).unwrap();
        let entry = Entry { tag: [1; 16], counter: 2, session: 3, dek_slot: 0, flags: FLAG_SEALED };
        let record = |group| Record {
            file_id: [7; 16],
            group,
            first: 3,
            entries: vec![entry; BLOCKS_PER_GROUP - 3],
        };
        let announce = |pending: &Pending, group, finish: bool| {
            let bytes = record(group).encode(&[1; 16], &key);
            let announced = pending.announce(record(group), &bytes).unwrap();
            if finish {
                announced.finished();
            }
        };
        let pending = Pending::open(&root, false, "v").unwrap();
        pending.load(&[1; 16], &key).unwrap();
        for round in 0..500 {
            announce(&pending, round, true);
        }
        announce(&pending, 8, false);
        announce(&pending, 9, false);
        assert_eq!(pending.unsettled(&[7; 16], 9), [record(9)]);

        let again = Pending::open(&root, true, "v").unwrap();
        again.load(&[1; 16], &key).unwrap();
        assert_eq!(again.unsettled(&[7; 16], 9), [record(9)]);
        assert!(again.unsettled(&[7; 16], 499).is_empty(), "finished");
        assert!(again.unsettled(&[8; 16], 9).is_empty(), "another file");
        again.load(&[2; 16], &key).unwrap();
        assert!(again.unsettled(&[7; 16], 9).is_empty(), "another volume");

        pending.settled(&[7; 16], 9);
        let again = Pending::open(&root, false, "v").unwrap();
        again.load(&[1; 16], &key).unwrap();
        assert!(again.unsettled(&[7; 16], 9).is_empty());
        assert_eq!(again.unsettled(&[7; 16], 8), [record(8)]);
        for round in 0..2 * SLOTS as u64 {
            announce(&again, 100 + round, false);
        }
        assert_eq!(again.unsettled(&[7; 16], 8), [], "the oldest give way");
    }
}
