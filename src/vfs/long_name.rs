//! The side files of names that do not fit in a name of the disk.
//!
//! A side file is on the device before its entry appears and goes when that has gone from there: a crash leaves at
//! most a side file without an entry, which is hidden, and in nobody's way (`remove` sweeps it
//! when its directory is to go).

use std::io::ErrorKind;

use rustix::io::Errno;

use super::filesystem::Filesystem;
use super::inode::Inode;
use super::name::{self, DiskName, Listed};
use crate::backing::{Access, NodeRef};
use crate::error::{FsError, FsResult};

/// More than any sealed name.
const SIDE_MAX: usize = 512;

impl Filesystem {
    /// Runs `make`, which brings the entry of `disk` into `dir`, with the side file before it.
    pub(super) fn named<T>(
        &self,
        dir: &Inode,
        disk: &DiskName,
        make: impl FnOnce() -> FsResult<T>,
    ) -> FsResult<T> {
        let _guard = match disk.long {
            None => None,
            Some(_) => {
                let guard = self.long_names.lock();
                self.write_side_file(&dir.node, disk)?;
                Some(guard)
            }
        };
        let made = make();
        self.name_changed(dir);
        if made.is_err() {
            self.remove_side_file(&dir.node, disk);
        }
        made
    }

    /// Runs `take`, which takes the entry of `disk` out of `dir`, with the side file after it.
    pub(super) fn unnamed_entry<T>(
        &self,
        dir: &Inode,
        disk: &DiskName,
        take: impl FnOnce() -> FsResult<T>,
    ) -> FsResult<T> {
        let _guard = disk.long.as_ref().map(|_| self.long_names.lock());
        let taken = take()?;
        self.name_changed(dir);
        self.remove_side_file(&dir.node, disk);
        Ok(taken)
    }

    /// Call with `long_names` held.
    pub(super) fn write_side_file(&self, dir: &NodeRef, disk: &DiskName) -> FsResult<()> {
        let Some(long) = &disk.long else { return Ok(()) };
        match read_side_file(dir, &long.side) {
            Ok(sealed) if sealed == long.sealed => return Ok(()),
            // Damaged, or from a volume key before this one.
            Ok(_) => dir.unlink(&long.side)?,
            Err(FsError::Os(Errno::NOENT)) => {}
            Err(error) => return Err(error),
        }
        let file = dir.create_unnamed()?;
        file.write_at(&long.sealed, 0)?;
        file.sync_all()?;
        dir.link_file(&*file, &long.side)?;
        self.store.flush_names(std::iter::once(dir))
    }

    /// Unless the entry is there. Call with `long_names` held.
    pub(super) fn remove_side_file(&self, dir: &NodeRef, disk: &DiskName) {
        let Some(long) = &disk.long else { return };
        match dir.lookup(&disk.entry) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            _ => return,
        }
        // Or a crash could leave the entry, and not its name.
        if self.store.flush_names(std::iter::once(dir)).is_err() {
            log::warn!("a long name's side file stays behind: names cannot be flushed");
            return;
        }
        match dir.unlink(&long.side) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                log::warn!("a long name's side file stays behind: {error}");
            }
            _ => {}
        }
    }

    /// Removes the side files of a directory that holds nothing else; false if it does.
    pub(super) fn sweep_side_files(&self, dir: &NodeRef) -> FsResult<bool> {
        if self.plain_names {
            return Ok(false);
        }
        let _guard = self.long_names.lock();
        let mut sides = Vec::new();
        let mut stream = dir.read_dir()?;
        while let Some(entry) = stream.next_entry()? {
            match name::classify(&entry.name) {
                Listed::Side => sides.push(entry.name),
                Listed::Name(_) | Listed::Long(_) | Listed::Foreign => return Ok(false),
            }
        }
        for side in &sides {
            dir.unlink(side)?;
        }
        Ok(!sides.is_empty())
    }
}

/// The whole sealed name, out of its side file.
pub(super) fn read_side_file(dir: &NodeRef, side: &[u8]) -> FsResult<Vec<u8>> {
    let file = dir.lookup(side)?.open(Access::Peek)?;
    let mut sealed = vec![0; SIDE_MAX];
    let len = file.read_at(&mut sealed, 0)?;
    sealed.truncate(len);
    Ok(sealed)
}
