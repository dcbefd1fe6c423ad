//! Open files: open, read, write, fsync, release.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use super::filesystem::Filesystem;
use super::handle::{Handle, OpenFile};
use super::inode::Inode;
use super::types::WriteRequest;
use crate::backing::{Access, FileKind};
use crate::error::{FsError, FsResult};
use crate::store::{Durability, PendingFlush};

/// `O_*` as the kernel sends them.
const ACCESS_MODE: u32 = libc::O_ACCMODE as u32;
const TRUNCATE: u32 = libc::O_TRUNC as u32;
const DIRECT: u32 = libc::O_DIRECT as u32;
/// `O_SYNC` holds this bit too.
const DSYNC: u32 = libc::O_DSYNC as u32;

impl Filesystem {
    /// Works on any file that is known, whether or not it has a name. `flags` are those of
    /// open(2), with O_TRUNC; `drop_set_id` is for a truncation by someone unprivileged.
    pub fn open(&self, node: u64, flags: u32, drop_set_id: bool) -> FsResult<u64> {
        self.gate.check()?;
        let truncate = flags & TRUNCATE != 0;
        let for_writing = truncate || flags & ACCESS_MODE != libc::O_RDONLY as u32;
        if for_writing {
            self.writable()?;
        }
        let inode = self.inodes.get(node)?;
        let open = self.open_content(&inode, for_writing)?;
        if truncate {
            self.truncate(&open, 0, true)?;
            open.emptied.store(true, Ordering::Relaxed);
            if drop_set_id {
                self.drop_set_id(&inode)?;
            }
        }
        self.gate.check()?;
        Ok(self.handles.insert(Handle::File(open)))
    }

    /// Bytes read; fewer than asked for only at the end of the file.
    pub fn read(&self, handle: u64, offset: u64, buf: &mut [u8]) -> FsResult<usize> {
        self.gate.check()?;
        let open = self.handles.file(handle)?;
        let read = self.audited(&open.inode, open.file.read_at(buf, offset))?;
        if let Err(cut_off) = self.gate.check() {
            buf.fill(0);
            return Err(cut_off.into());
        }
        Ok(read)
    }

    /// All of it or an error, at the request's offset, with O_APPEND too: the kernel has put that
    /// at the end under the inode's lock, and holds it until the last request of the write is
    /// answered. Those of asynchronous I/O come side by side, and each must go to its own place.
    pub fn write(&self, handle: u64, request: &WriteRequest<'_>) -> FsResult<usize> {
        self.writable()?;
        let open = self.handles.file(handle)?;
        if request.drop_set_id {
            self.drop_set_id(&open.inode)?;
        }
        let durability = durability(request);
        let write = || open.file.write_at(request.data, request.offset, durability);
        let done = match durability {
            Durability::Flushed => self.in_order(&open, write),
            Durability::Handed | Durability::OnDevice => write(),
        };
        self.audited(&open.inode, done)?;
        Ok(request.data.len())
    }

    /// What was written through any handle, and the file's attributes unless `data_only`, are on
    /// stable storage afterwards.
    pub fn fsync(&self, handle: u64, data_only: bool) -> FsResult<()> {
        self.begin_fsync(handle, data_only)?.map_or(Ok(()), PendingFlush::wait)
    }

    /// All of [`Filesystem::fsync`] but a flush that it may share with others.
    pub fn begin_fsync(&self, handle: u64, data_only: bool) -> FsResult<Option<PendingFlush>> {
        self.gate.check()?;
        let open = self.handles.file(handle)?;
        // Whoever finds that nothing has changed must not be ahead of who is at it.
        let _one = (!data_only).then(|| open.inode.lock_attributes());
        let attributes = !data_only && open.inode.take_attributes();
        let begun = self.begin_sync(&open, attributes);
        let begun = self.audited(&open.inode, begun);
        if begun.is_err() && attributes {
            open.inode.note_attributes();
        }
        begun
    }

    fn begin_sync(&self, open: &OpenFile, attributes: bool) -> FsResult<Option<PendingFlush>> {
        let owed = open.file.owes_name();
        // Before the names: where those are in a journal, they are flushed with it.
        open.file.sync_inode(attributes)?;
        self.settle_names()?;
        let rest = open.file.begin_sync()?;
        let Some(owed) = owed else { return Ok(rest) };
        rest.map_or(Ok(()), PendingFlush::wait)?;
        open.file.name_is_durable(owed);
        Ok(None)
    }

    /// Before what `flush` makes durable counts as that, names do, that of a new file among them.
    fn in_order<T>(&self, open: &OpenFile, flush: impl FnOnce() -> FsResult<T>) -> FsResult<T> {
        let owed = open.file.owes_name();
        self.settle_names()?;
        let done = flush()?;
        if let Some(owed) = owed {
            open.file.name_is_durable(owed);
        }
        Ok(done)
    }

    /// Closes a file or directory handle. Never fails, also while cut off.
    pub fn release(&self, handle: u64) {
        if let Ok(open) = self.handles.file(handle)
            && open.emptied.load(Ordering::Relaxed)
            && let Err(error) = open.file.sync(false)
        {
            // Who replaces a file's content that way without fsync hopes for the new content or
            // the old; nothing was promised.
            log::warn!("a rewritten file could not be flushed: {error}");
        }
        let inode = self.handles.file(handle).ok().map(|open| Arc::clone(&open.inode));
        self.handles.remove(handle);
        // The kernel may have forgotten it first.
        if let Some(inode) = inode
            && self.inodes.get(inode.id).is_err()
        {
            self.store.forsaken(inode.key);
        }
    }

    /// A disk that turned read-only under the mount still serves who only reads.
    pub(super) fn open_content(&self, inode: &Arc<Inode>, for_writing: bool) -> FsResult<OpenFile> {
        match inode.kind {
            FileKind::Regular => {}
            FileKind::Directory => return Err(FsError::Os(Errno::ISDIR)),
            _ => return Err(FsError::Os(Errno::INVAL)),
        }
        let mut content = inode.content.lock();
        let file = match &content.file {
            Some(file) => Arc::clone(file),
            None => {
                let access = if self.read_only() { Access::Read } else { Access::ReadWrite };
                let opened = match inode.node.open(access) {
                    Err(error)
                        if error.kind() == io::ErrorKind::ReadOnlyFilesystem && !for_writing =>
                    {
                        inode.node.open(Access::Read)
                    }
                    opened => opened,
                };
                let opened =
                    opened.map_err(FsError::from).and_then(|file| self.store.open_file(file));
                match opened {
                    Ok(file) => file,
                    Err(error) => {
                        drop(content);
                        return self.audited(inode, Err(error));
                    }
                }
            }
        };
        content.file = Some(Arc::clone(&file));
        content.opens += 1;
        Ok(OpenFile { inode: Arc::clone(inode), file, emptied: AtomicBool::new(false) })
    }
}

fn durability(request: &WriteRequest<'_>) -> Durability {
    if request.from_cache {
        return Durability::Handed;
    }
    if request.flags & DSYNC != 0 {
        Durability::Flushed
    } else if request.flags & DIRECT != 0 {
        Durability::OnDevice
    } else {
        Durability::Handed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(flags: i32, from_cache: bool) -> Durability {
        let flags = flags.cast_unsigned();
        durability(&WriteRequest { offset: 0, data: &[], flags, from_cache, drop_set_id: false })
    }

    #[test]
    fn each_write_says_how_durable_it_is() {
        assert_eq!(of(0, false), Durability::Handed);
        assert_eq!(of(libc::O_DIRECT, false), Durability::OnDevice);
        assert_eq!(of(libc::O_DSYNC, false), Durability::Flushed);
        assert_eq!(of(libc::O_SYNC | libc::O_DIRECT, false), Durability::Flushed);
    }

    #[test]
    fn nobody_waits_for_a_page_of_a_mapping() {
        assert_eq!(of(libc::O_APPEND | libc::O_DSYNC, true), Durability::Handed);
    }
}
