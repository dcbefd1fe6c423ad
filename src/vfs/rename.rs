//! rename, with RENAME_NOREPLACE and RENAME_EXCHANGE.

use rustix::io::Errno;

use super::create::present;
use super::filesystem::Filesystem;
use super::inode::Inode;
use super::name::DiskName;
use crate::backing::{NodeRef, RenameMode};
use crate::error::{FsError, FsResult};

impl Filesystem {
    pub fn rename(
        &self,
        from: u64,
        from_name: &[u8],
        to: u64,
        to_name: &[u8],
        mode: RenameMode,
    ) -> FsResult<()> {
        self.writable()?;
        let (from, to) = (self.directory(from)?, self.directory(to)?);
        let source = self.seal_name(from_name)?;
        let target = self.seal_name(to_name)?;
        let moved = present(&from.node, &source.entry)?.ok_or(FsError::Os(Errno::NOENT))?;
        let replaced = self.victim(&to, &target.entry)?;
        if let Some(replaced) = &replaced {
            // Whoever replaces a file that way expects the new content under the name, or the old.
            self.store.flush_file(&moved)?;
            if mode == RenameMode::Exchange {
                self.store.flush_file(replaced.node())?;
            }
        }
        self.move_entry(&from, &source, &to, &target, mode).or_else(|error| {
            let full = matches!(error, FsError::Os(Errno::NOTEMPTY | Errno::EXIST));
            let old = present(&to.node, &target.entry)?;
            match old {
                // An empty directory, but for side files without an entry.
                Some(old) if full && mode == RenameMode::Replace => {
                    if !self.is_directory(&old)? || !self.sweep_side_files(&old)? {
                        return Err(error);
                    }
                    self.move_entry(&from, &source, &to, &target, mode)
                }
                _ => Err(error),
            }
        })?;
        self.store.touched(moved.id());
        if let Some(inode) = self.inodes.known(moved.id()) {
            inode.set_place(to.id, &target.entry);
        }
        match (mode, replaced) {
            (RenameMode::Exchange, Some(other)) => {
                let other = other.node().id();
                self.store.touched(other);
                if let Some(inode) = self.inodes.known(other) {
                    inode.set_place(from.id, &source.entry);
                }
                Ok(())
            }
            (_, Some(victim)) => self.bury(&to, victim),
            (_, None) => Ok(()),
        }
    }

    /// With the side file of the new name before it, and without the one of the old name after.
    fn move_entry(
        &self,
        from: &Inode,
        source: &DiskName,
        to: &Inode,
        target: &DiskName,
        mode: RenameMode,
    ) -> FsResult<()> {
        let rename = || -> FsResult<()> {
            from.node.rename(&source.entry, &*to.node, &target.entry, mode)?;
            self.name_changed(from);
            self.name_changed(to);
            Ok(())
        };
        if source.long.is_none() && target.long.is_none() {
            return rename();
        }
        let _guard = self.long_names.lock();
        self.write_side_file(&to.node, target)?;
        let renamed = rename();
        // Each goes only if its entry is not there, whatever came of the rename.
        self.remove_side_file(&to.node, target);
        self.remove_side_file(&from.node, source);
        renamed
    }

    fn is_directory(&self, node: &NodeRef) -> FsResult<bool> {
        Ok(node.metadata()?.kind == crate::backing::FileKind::Directory)
    }
}
