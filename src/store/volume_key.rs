//! Bringing a volume to its current volume key: every wrap and every MAC that names another one.
//!
//! Nobody uses the volume meanwhile. Both keys are there, and everything names the one it was made
//! with, so that a crash anywhere leaves a volume that opens and that this can be done to again.
//! In this order:
//!
//! 1. the log, by bringing home what it holds: its records are of sessions of the old key;
//! 2. the headers of files, in any order; flushed, all of them, before
//! 3. the anchors of the log, the session table and the volume header, each copy of them flushed
//!    before the other is touched.
//!
//! Then nothing that can be read names the old key, which is looked at once more before this says
//! so. A header of which neither copy can be read names nothing.

use super::header::Header;
use super::keys::{self, KeySource};
use super::layout::HEADERS_LEN;
use super::session::SessionTable;
use super::{Store, file, volume};
use crate::backing::{Access, FileKind, FileRef};
use crate::error::{Context, Error, FsError, FsResult, Kind, Result};

/// Is shown a file's path on the disk, the file, and its header if that can be read.
type Show<'a> = dyn FnMut(&str, &FileRef, Option<Header>) -> Result<()> + 'a;

/// What [`Store::adopt_volume_key`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Files whose header was rewritten.
    pub files: u64,
    /// Files whose header cannot be read; they are as they were.
    pub unreadable: u64,
}

impl Store {
    /// Makes everything name the current one of the volume keys that the gate was opened with.
    /// `told` hears of each file.
    pub fn adopt_volume_key(&self, told: &mut dyn FnMut(u64)) -> Result<Adopted> {
        let source = KeySource::Gate(&self.shared.gate);
        let id = source.with(|keyring| Ok(keyring.id()))?;
        let shown = self.backing.display_path();
        let cannot = || format!("cannot change the volume key of {shown}");
        self.checkpoint().map_err(|error| failed(&cannot(), &error))?;
        let adopted = self.adopt_headers(id, told)?;
        self.backing.sync_fs().context(cannot)?;

        let macs = source.with(keys::anchor_macs)?;
        let log = self.shared.log().map_err(|error| failed(&cannot(), &error))?;
        log.reseal_anchors(&macs)
            .context(|| format!("cannot write the log's anchors in {shown}"))?;
        let macs = source.with(keys::sessions_macs)?;
        let (table, damaged) = SessionTable::load(&self.root, &self.header.uuid, &macs, &shown)?;
        table.store(&self.root, &self.header.uuid, &macs, damaged, &shown)?;
        let mut header = self.header.clone();
        header.generation += 1;
        header.wrapped_metadata_key = source.with(|keyring| {
            keys::wrap_metadata_key(keyring, &self.header.uuid, &self.metadata_key(keyring)?)
        })?;
        header.volume_key_id = id;
        let pages = header.encode(source.with(keys::volume_macs)?.current().1);
        volume::rewrite(&self.root, &pages, &shown)?;

        let left = self.count_other(id)?;
        if left > 0 {
            let message = format!("{left} files in {shown} still name the old volume key");
            return Err(Error::new(Kind::Busy, message));
        }
        Ok(adopted)
    }

    fn adopt_headers(&self, id: u32, told: &mut dyn FnMut(u64)) -> Result<Adopted> {
        let mut adopted = Adopted::default();
        self.each_file(&mut |path, file, header| {
            let Some(header) = header else {
                adopted.unreadable += 1;
                return Ok(());
            };
            if header.volume_key_id == id {
                return Ok(());
            }
            let mut rewrapped = self
                .rewrapped(&header)
                .map_err(|error| failed(&format!("cannot rewrap the keys of {path}"), &error))?;
            rewrapped.generation += 1;
            file::write_header(&self.shared, file, &rewrapped)
                .map_err(|error| failed(&format!("cannot write the header of {path}"), &error))?;
            adopted.files += 1;
            told(adopted.files);
            Ok(())
        })?;
        Ok(adopted)
    }

    fn rewrapped(&self, header: &Header) -> FsResult<Header> {
        let lease = self.shared.gate.lease()?;
        let rewrapped = keys::rewrap(lease.keyring(), header)?;
        lease.still_open()?;
        Ok(rewrapped)
    }

    fn count_other(&self, id: u32) -> Result<u64> {
        let mut left = 0;
        self.each_file(&mut |_, _, header| {
            left += u64::from(header.is_some_and(|header| header.volume_key_id != id));
            Ok(())
        })?;
        Ok(left)
    }

    /// Every file of the tree, with its path on the disk; the header is None where it cannot be
    /// read.
    fn each_file(&self, show: &mut Show<'_>) -> Result<()> {
        let shown = self.backing.display_path();
        let mut directories = vec![(self.tree.clone(), format!("{shown}/tree"))];
        while let Some((directory, path)) = directories.pop() {
            let cannot = || format!("cannot look for files in {path}");
            let mut entries = directory.read_dir().context(cannot)?;
            while let Some(entry) = entries.next_entry().context(cannot)? {
                let node = directory.lookup(&entry.name).context(cannot)?;
                let here = format!("{path}/{}", String::from_utf8_lossy(&entry.name));
                match node.metadata().context(cannot)?.kind {
                    FileKind::Directory => directories.push((node, here)),
                    FileKind::Regular => {
                        let file = node.open(Access::ReadWrite).context(cannot)?;
                        let header = match self.shared.read_header(&file) {
                            Ok(header) => Some(header),
                            Err(FsError::Integrity(_)) if is_side_file(&file, &here)? => continue,
                            Err(FsError::Integrity(failure)) => {
                                log::warn!("{here}: {failure:?}; it stays as it is");
                                None
                            }
                            Err(error) => {
                                return Err(failed(&format!("cannot read {here}"), &error));
                            }
                        };
                        show(&here, &file, header)?;
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// Files of the tree that are shorter than a header hold long names.
fn is_side_file(file: &FileRef, path: &str) -> Result<bool> {
    let metadata = file.metadata().context(|| format!("cannot examine {path}"))?;
    Ok(metadata.size > 0 && metadata.size < HEADERS_LEN)
}

fn failed(what: &str, error: &FsError) -> Error {
    let message = format!("{what}: {error}");
    match error {
        FsError::CutOff(_) => Error::new(Kind::Inaccessible, message),
        FsError::Integrity(_) => Error::corrupt(message),
        FsError::Os(errno) => Error::io(message, (*errno).into()),
    }
}
