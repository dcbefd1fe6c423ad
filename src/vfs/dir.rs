//! Open directories: opendir, readdir, fsyncdir.
//!
//! A listing streams: it holds the backing file system's own position, which is also the offset
//! that the caller sees (moved up by the two entries `.` and `..`), so a position stays valid
//! whatever is created or removed meanwhile, and no directory is ever held in memory.

use super::filesystem::Filesystem;
use super::handle::{Handle, OpenDir};
use super::inode::Inode;
use super::types::Entry;
use crate::backing::{DirEntry, DirStream, FileKind};
use crate::error::{FsError, FsResult};
use crate::sync::Mutex;

/// One entry of a listing.
#[derive(Debug)]
pub struct DirItem<'a> {
    pub ino: u64,
    pub kind: FileKind,
    pub name: &'a [u8],
    /// Where the listing goes on after this entry.
    pub next: u64,
    /// The node, looked up (and owed a forget), if it was asked for and could be.
    pub entry: Option<Entry>,
}

/// Takes the entries of a listing.
pub trait DirSink {
    /// Whether an entry with a name of this length can still be pushed.
    fn has_room(&self, name_len: usize) -> bool;
    fn push(&mut self, item: &DirItem<'_>);
}

/// Whether a listing looks its entries up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plus {
    No,
    Yes,
}

/// `.` is at offset 0 and `..` at offset 1.
const DOTS: u64 = 2;
/// Where the kernel's directory positions end, and where ext4 says its directories do.
const END: u64 = i64::MAX as u64;

fn to_offset(position: u64) -> u64 {
    if position >= END - DOTS { END } else { position + DOTS }
}

#[derive(Debug)]
pub(super) struct Cursor {
    stream: Box<dyn DirStream>,
    /// Offset of the entry that comes next; None where a failure has left the stream anywhere.
    offset: Option<u64>,
    /// Read from the stream, but there was no room for it.
    pending: Option<Pending>,
}

#[derive(Debug)]
struct Pending {
    entry: DirEntry,
    name: Vec<u8>,
    kind: FileKind,
}

impl Cursor {
    fn seek(&mut self, offset: u64) -> FsResult<()> {
        if self.offset == Some(offset) {
            return Ok(());
        }
        self.pending = None;
        self.offset = None;
        self.stream.seek(if offset == END { END } else { offset.saturating_sub(DOTS) })?;
        self.offset = Some(offset);
        Ok(())
    }
}

impl Filesystem {
    pub fn opendir(&self, node: u64) -> FsResult<u64> {
        self.gate.check()?;
        let inode = self.directory(node)?;
        let cursor = Cursor { stream: inode.node.read_dir()?, offset: Some(0), pending: None };
        let open = OpenDir { inode, cursor: Mutex::new(cursor) };
        self.gate.check()?;
        Ok(self.handles.insert(Handle::Dir(open)))
    }

    /// Pushes entries from `offset` on until `sink` is full; none at the end.
    pub fn readdir(
        &self,
        handle: u64,
        offset: u64,
        plus: Plus,
        sink: &mut dyn DirSink,
    ) -> FsResult<()> {
        self.gate.check()?;
        let open = self.handles.dir(handle)?;
        let mut cursor = open.cursor.lock();
        cursor.seek(offset)?;
        let mut looked_up = Vec::new();
        let mut pushed = false;
        let mut at = offset;
        let listed = loop {
            let step = self.push_next(&open.inode, &mut cursor, &mut at, plus, sink);
            // An entry may have been read that nobody has got.
            cursor.offset = step.is_ok().then_some(at);
            match step {
                Ok(Step::Pushed(node)) => {
                    pushed = true;
                    looked_up.extend(node);
                }
                Ok(Step::Full | Step::End) => break Ok(()),
                // What there is goes out; the error comes back with the next request.
                Err(FsError::Os(_)) if pushed => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        let listed = listed.and_then(|()| Ok(self.gate.check()?));
        if listed.is_err() {
            looked_up.into_iter().for_each(|node| self.forget(node, 1));
        }
        listed
    }

    /// The names in the directory are on stable storage afterwards.
    pub fn fsyncdir(&self, handle: u64) -> FsResult<()> {
        self.gate.check()?;
        // In order: what was written to files before comes first, and new files themselves.
        self.store.flush_log()?;
        self.store.flush_new_files()?;
        self.settle_names()?;
        self.store.flush_names(std::iter::once(&self.handles.dir(handle)?.inode.node))
    }

    fn push_next(
        &self,
        dir: &Inode,
        cursor: &mut Cursor,
        at: &mut u64,
        plus: Plus,
        sink: &mut dyn DirSink,
    ) -> FsResult<Step> {
        if *at < DOTS {
            let (name, ino): (&[u8], u64) = match *at {
                0 => (b".", dir.key.ino),
                _ => (b"..", self.parent_ino(dir)),
            };
            if !sink.has_room(name.len()) {
                return Ok(Step::Full);
            }
            let next = *at + 1;
            let kind = FileKind::Directory;
            sink.push(&DirItem { ino, kind, name, next, entry: None });
            *at = next;
            return Ok(Step::Pushed(None));
        }
        let Some(item) = self.next_visible(dir, cursor)? else { return Ok(Step::End) };
        if !sink.has_room(item.name.len()) {
            cursor.pending = Some(item);
            return Ok(Step::Full);
        }
        let entry = match plus {
            Plus::No => None,
            Plus::Yes => match self.look_up_listed(dir, &item.entry.name) {
                Ok(entry) => Some(entry),
                Err(FsError::CutOff(reason)) => return Err(reason.into()),
                // Removed since, or unreadable: the name alone is still true enough.
                Err(_) => None,
            },
        };
        let (ino, next) = (item.entry.ino, to_offset(item.entry.next));
        sink.push(&DirItem { ino, kind: item.kind, name: &item.name, next, entry });
        *at = next;
        Ok(Step::Pushed(entry.map(|entry| entry.node)))
    }

    fn look_up_listed(&self, dir: &Inode, entry: &[u8]) -> FsResult<Entry> {
        let node = dir.node.lookup(entry)?;
        self.entry(dir, entry, node)
    }

    fn next_visible(&self, dir: &Inode, cursor: &mut Cursor) -> FsResult<Option<Pending>> {
        if let Some(pending) = cursor.pending.take() {
            return Ok(Some(pending));
        }
        while let Some(entry) = cursor.stream.next_entry()? {
            let Some(name) = self.open_name(dir, &entry.name)? else { continue };
            let kind = match entry.kind {
                Some(kind) => kind,
                None => match dir.node.lookup(&entry.name).and_then(|node| node.metadata()) {
                    Ok(metadata) => metadata.kind,
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error.into()),
                },
            };
            return Ok(Some(Pending { entry, name, kind }));
        }
        Ok(None)
    }

    fn parent_ino(&self, dir: &Inode) -> u64 {
        let parent = dir.place().and_then(|place| self.inodes.get(place.parent).ok());
        parent.map_or(dir.key.ino, |parent| parent.key.ino)
    }
}

enum Step {
    /// With the node that was looked up.
    Pushed(Option<u64>),
    Full,
    End,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_keep_their_order_and_the_end_stays_the_end() {
        assert_eq!(to_offset(0), 2);
        assert_eq!(to_offset(5), 7);
        assert_eq!(to_offset(END), END);
        assert!(to_offset(END - 10) < END);
    }
}
