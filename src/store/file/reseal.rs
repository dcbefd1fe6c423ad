//! Giving a file another data encryption key, while it is in use.
//!
//! In this order, which [`super::super::rotation`] keeps:
//! 1. [`File::add_dek`] puts a new DEK into the header, and a checkpoint brings that home. A block
//!    that is sealed with it can be opened by whoever finds the block.
//! 2. [`File::use_newest_dek`]: from here on everything is sealed with it.
//! 3. [`File::reseal`], group by group: what was sealed with another DEK is sealed again, as a
//!    logged overwrite that changes nothing else.
//! 4. [`File::retire_deks`], when home and log hold nothing that was sealed with the others: the
//!    header forgets them, and the next checkpoint destroys their wrapped form.
//!
//! A crash anywhere leaves a file with more than one DEK, each of which opens what it sealed; the
//! next rotation goes on from there.

use super::File;
use super::change::{Change, room_for};
use crate::error::{FsError, FsResult};
use crate::store::header::{DEK_SLOTS, DekSlot};
use crate::store::intent_log::{Kind, Stream};
use crate::store::keys::{self, FileKeys};
use crate::store::layout::{
    BLOCK_LEN, BLOCKS_PER_GROUP, BLOCKS_PER_SECTOR, SECTORS_PER_PAGE, blocks_for, group_of,
};
use crate::store::page::FLAG_SEALED;
use crate::store::seconds_since_epoch;

/// What [`File::reseal`] did in one group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::store) struct Resealed {
    pub blocks: u64,
    /// Blocks, or whole sectors of tags, that cannot be read, so that the old DEK stays.
    pub damaged: u64,
}

impl File {
    /// The DEK for new blocks is one that was made by then, or bears a time that has not come yet.
    pub(in crate::store) fn dek_is_older(&self, than: u64) -> bool {
        let state = self.state.lock();
        let header = &state.header;
        // Made by a clock that was fast, perhaps long ago: no later rotation would ever get to it.
        let future = seconds_since_epoch().max(than).saturating_add(1);
        let old = |made: u64| made <= than || made > future;
        header.deks.iter().any(|slot| slot.id == header.active_dek && old(slot.made))
    }

    /// More than one DEK is in use, or nobody was told that it is gone.
    pub(in crate::store) fn is_between_deks(&self) -> bool {
        self.state.lock().header.deks.len() > 1 || self.shared.retired.has(&self.file_id)
    }

    pub(in crate::store) fn has_free_slot(&self) -> bool {
        self.state.lock().header.deks.len() < DEK_SLOTS
    }

    /// Of the current state of the file, how many groups there are to look at.
    pub(in crate::store) fn groups(&self) -> u64 {
        match self.size() {
            0 => 0,
            size => group_of(size - 1) + 1,
        }
    }

    /// A new DEK in a free slot of the header, made at `made`; nothing uses it before
    /// [`File::use_newest_dek`]. The next checkpoint brings it home.
    pub(in crate::store) fn add_dek(&self, made: u64) -> FsResult<()> {
        let volume_key_id = self.state.lock().header.volume_key_id;
        let wrapped = {
            let lease = self.shared.gate.lease()?;
            let wrapped = keys::new_dek(lease.keyring(), volume_key_id, &self.file_id)?;
            lease.still_open()?;
            wrapped
        };
        self.change_header(|header| {
            let used = |id: u16| header.deks.iter().any(|slot| slot.id == id);
            let mut id = header.active_dek.wrapping_add(1);
            while used(id) {
                id = id.wrapping_add(1);
            }
            header.deks.push(DekSlot { id, wrapped, made });
            header.active_dek = id;
        })
    }

    /// The header names a newer DEK than the one in use.
    pub(in crate::store) fn has_newer_dek(&self) -> bool {
        let in_use = self.keys().active_dek;
        self.state.lock().header.active_dek != in_use
    }

    /// Seals with the DEK that the header names, which is on stable storage. What was being written
    /// until then is in force when this returns, and in [`File::groups`].
    pub(in crate::store) fn use_newest_dek(&self) {
        let _guard = self.locks.exclusive(0..=u64::MAX);
        let state = self.state.lock();
        *self.keys.write() = FileKeys::of(&state.header).into();
    }

    /// Forgets every DEK but the one in use. Home and log hold nothing that was sealed with them.
    pub(in crate::store) fn retire_deks(&self) -> FsResult<()> {
        let mut gone = Vec::new();
        self.change_header(|header| {
            let active = header.active_dek;
            gone = header.deks.iter().map(|slot| slot.id).filter(|&id| id != active).collect();
            header.deks.retain(|slot| slot.id == active);
        })?;
        self.shared.retired.add(&self.file_id, gone.len() as u64);
        self.use_newest_dek();
        self.shared.keys.forget_slots(&self.file_id, &gone);
        Ok(())
    }

    fn change_header(
        &self,
        change: impl FnOnce(&mut crate::store::header::Header),
    ) -> FsResult<()> {
        self.check_writable()?;
        let room = self.shared.reserve(Stream::Hot, room_for(0))?;
        let _guard = self.locks.shared(0..=0);
        // A record without blocks: it has the file brought home, and keeps its times. No checkpoint
        // begins before the header is changed too.
        let mut unseen = Change::new(self, Kind::Reseal);
        unseen.keep_times()?;
        unseen.commit(room)?;
        change(&mut self.state.lock().header);
        Ok(())
    }

    /// Seals again what in a group was not sealed with the DEK in use.
    pub(in crate::store) fn reseal(&self, group: u64) -> FsResult<Resealed> {
        self.check_writable()?;
        let room = self.shared.reserve(Stream::Bulk, room_for(BLOCKS_PER_GROUP as u64))?;
        let _guard = self.locks.exclusive(group..=group);
        let mut done = Resealed::default();
        let Some(page) = self.tag_page(group)? else { return Ok(done) };
        self.verify_what_is_right(&page)?;
        let active = self.keys().active_dek;
        let first = group * BLOCKS_PER_GROUP as u64;
        let end = blocks_for(self.size());
        let mut change = Change::new(self, Kind::Reseal);
        change.expect(BLOCKS_PER_GROUP * BLOCK_LEN);
        for sector in 0..SECTORS_PER_PAGE {
            if !page.is_verified(sector, sector) {
                done.damaged += 1;
                continue;
            }
            for slot in sector * BLOCKS_PER_SECTOR..(sector + 1) * BLOCKS_PER_SECTOR {
                let block = first + slot as u64;
                let Some(entry) = page.entry(slot).filter(|_| block < end) else { continue };
                if entry.flags != FLAG_SEALED || entry.dek_slot == active {
                    continue;
                }
                match change.block(block, true, |_| {}) {
                    Ok(()) => done.blocks += 1,
                    Err(FsError::Integrity(_)) => done.damaged += 1,
                    Err(error) => return Err(error),
                }
            }
        }
        if done.blocks > 0 {
            change.keep_times()?;
            change.commit(room)?;
        }
        Ok(done)
    }

    /// The last record of the file in each stream.
    pub(in crate::store) fn last_records(&self) -> [u64; crate::store::intent_log::STREAMS] {
        self.state.lock().last
    }
}
