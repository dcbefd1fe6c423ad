//! Rotating data encryption keys: many files at once, in use or not.
//!
//! Each step is one checkpoint for all of the files, so that a thousand small ones cost no more
//! than three. A DEK is destroyed only when neither home nor log hold anything that it sealed, and
//! the header without it is on stable storage when this says that it is gone.
//!
//! What this does not do: it finds no files, keeps no list and chooses no speed; `maintenance` does.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use super::file::File;
use super::layout::GROUP_PLAIN;
use super::{Store, seconds_since_epoch};
use crate::error::{FsError, FsResult};
use crate::sync::Mutex;

/// Asked before each group of blocks with the bytes of plaintext that it holds: it may
/// take its time, and may end the rotation, which then can be gone on with later.
pub type Pace<'a> = dyn FnMut(u64) -> ControlFlow<()> + 'a;

/// What became of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rotated {
    /// Blocks that were sealed again.
    pub blocks: u64,
    /// Blocks that cannot be read, and sectors of tags: while there are any, the keys that they may
    /// need stay.
    pub damaged: u64,
    /// Keys that are gone for good.
    pub destroyed: u64,
}

type FileId = [u8; 16];

/// How many DEKs of each file the header has forgotten, and nobody has been told of: the disk may
/// still have them. Outlives the open file, which goes when the checkpointer has brought it home.
#[derive(Debug, Default)]
pub(super) struct Retired(Mutex<HashMap<FileId, u64>>);

impl Retired {
    pub(super) fn add(&self, file: &FileId, deks: u64) {
        if deks > 0 {
            *self.0.lock().entry(*file).or_default() += deks;
        }
    }

    pub(super) fn has(&self, file: &FileId) -> bool {
        self.0.lock().contains_key(file)
    }

    fn take(&self, file: &FileId) -> u64 {
        self.0.lock().remove(file).unwrap_or(0)
    }
}

/// A checkpoint leaves room in the log for the next; what is in its way goes with one more.
const CHECKPOINTS: usize = 3;

impl Store {
    /// Whether a rotation of everything that was sealed with keys made by `before` (seconds since
    /// the epoch) has something to do for the file.
    pub fn needs_rotation(&self, file: &File, before: u64) -> bool {
        file.is_between_deks() || file.dek_is_older(before)
    }

    /// Seals everything in the files with keys made after `before`, and destroys the others. None
    /// where `pace` has ended it.
    pub fn rotate_deks(
        &self,
        files: &[Arc<File>],
        before: u64,
        pace: &mut Pace<'_>,
    ) -> FsResult<Option<Vec<Rotated>>> {
        let mut done = vec![Rotated::default(); files.len()];
        let ended = self.rotate_in_steps(files, before, &mut done, pace);
        if let Ok(ControlFlow::Continue(())) = ended {
            return Ok(Some(done));
        }
        // Nobody hears of them now: the next try owes that too.
        for (file, done) in files.iter().zip(&done) {
            self.shared.retired.add(&file.file_id(), done.destroyed);
        }
        ended.map(|_| None)
    }

    fn rotate_in_steps(
        &self,
        files: &[Arc<File>],
        before: u64,
        done: &mut [Rotated],
        pace: &mut Pace<'_>,
    ) -> FsResult<ControlFlow<()>> {
        // One whose slots are all taken by rotations that came to no end is finished first.
        let full: Vec<usize> = (0..files.len())
            .filter(|&i| files[i].dek_is_older(before) && !files[i].has_free_slot())
            .collect();
        if !full.is_empty() && self.finish(files, &full, done, pace)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        let made = seconds_since_epoch().max(before.saturating_add(1));
        for file in files.iter().filter(|file| file.dek_is_older(before) && file.has_free_slot()) {
            file.add_dek(made)?;
        }
        // Also where an earlier try came as far as that, and its checkpoint failed.
        if files.iter().any(|file| file.has_newer_dek()) {
            self.checkpoint()?;
            files.iter().for_each(|file| file.use_newest_dek());
        }
        let all: Vec<usize> = (0..files.len()).collect();
        self.finish(files, &all, done, pace)
    }

    /// Brings the chosen files to the one DEK that each seals with now.
    fn finish(
        &self,
        files: &[Arc<File>],
        chosen: &[usize],
        done: &mut [Rotated],
        pace: &mut Pace<'_>,
    ) -> FsResult<ControlFlow<()>> {
        for &i in chosen {
            done[i].damaged = 0;
            let mut group = 0;
            // What is appended meanwhile is sealed with the right key.
            while group < files[i].groups() {
                let held = files[i].size().saturating_sub(group * GROUP_PLAIN).min(GROUP_PLAIN);
                if pace(held).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                let resealed = files[i].reseal(group)?;
                done[i].blocks += resealed.blocks;
                done[i].damaged += resealed.damaged;
                group += 1;
            }
        }
        let whole = chosen.iter().filter(|&&i| done[i].damaged == 0 && files[i].is_between_deks());
        let whole: Vec<usize> = whole.copied().collect();
        if whole.is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        self.clear_log_of(files, &whole)?;
        for &i in &whole {
            files[i].retire_deks()?;
        }
        // Where it fails, the files are not done: the disk has the keys, and the next try owes this.
        self.checkpoint()?;
        for &i in &whole {
            done[i].destroyed += self.shared.retired.take(&files[i].file_id());
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Home has everything of the files, and the log no record of theirs from before now.
    fn clear_log_of(&self, files: &[Arc<File>], chosen: &[usize]) -> FsResult<()> {
        let log = self.shared.log()?;
        let last = chosen.iter().map(|&i| files[i].last_records());
        let last = last.fold([0; 2], |max: [u64; 2], of| [max[0].max(of[0]), max[1].max(of[1])]);
        for _ in 0..CHECKPOINTS {
            self.checkpoint()?;
            let tails = log.tails();
            if tails[0] > last[0] && tails[1] > last[1] {
                return Ok(());
            }
        }
        log::warn!("the log still holds records from before a rotation; its old keys stay");
        Err(FsError::Os(rustix::io::Errno::AGAIN))
    }
}
