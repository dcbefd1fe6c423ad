//! unlink and rmdir.

use rustix::io::Errno;

use super::create::present;
use super::filesystem::Filesystem;
use super::inode::Inode;
use super::symlink;
use crate::backing::{FileKind, NodeRef};
use crate::error::{FsError, FsResult};

/// The node that an operation may take the last name of.
pub(super) struct Victim {
    node: NodeRef,
    entry: Vec<u8>,
    /// The side file of its link target.
    target: Option<Vec<u8>>,
}

impl Victim {
    pub(super) fn node(&self) -> &NodeRef {
        &self.node
    }
}

impl Filesystem {
    /// The inode works on as long as someone has it open.
    pub fn unlink(&self, parent: u64, name: &[u8]) -> FsResult<()> {
        self.writable()?;
        let dir = self.directory(parent)?;
        let disk = self.seal_name(name)?;
        let victim = self.victim(&dir, &disk.entry)?.ok_or(FsError::Os(Errno::NOENT))?;
        self.unnamed_entry(&dir, &disk, || Ok(dir.node.unlink(&disk.entry)?))?;
        self.bury(&dir, victim)
    }

    pub fn rmdir(&self, parent: u64, name: &[u8]) -> FsResult<()> {
        self.writable()?;
        let dir = self.directory(parent)?;
        let disk = self.seal_name(name)?;
        let victim = self.victim(&dir, &disk.entry)?.ok_or(FsError::Os(Errno::NOENT))?;
        self.unnamed_entry(&dir, &disk, || Ok(dir.node.rmdir(&disk.entry).or_else(not_empty)?))
            .or_else(|error| {
                // Side files without an entry must not keep a directory alive.
                let full = matches!(error, FsError::Os(Errno::NOTEMPTY));
                if !full || !self.sweep_side_files(&victim.node)? {
                    return Err(error);
                }
                self.unnamed_entry(&dir, &disk, || Ok(dir.node.rmdir(&disk.entry)?))
            })?;
        self.bury(&dir, victim)
    }

    /// Who has the name now; before the operation, because afterwards it cannot be found.
    pub(super) fn victim(&self, dir: &Inode, entry: &[u8]) -> FsResult<Option<Victim>> {
        let Some(node) = present(&dir.node, entry)? else { return Ok(None) };
        let target = match node.metadata()? {
            metadata if metadata.kind == FileKind::Symlink => {
                symlink::side_file(&node, metadata.size)?
            }
            _ => None,
        };
        Ok(Some(Victim { node, entry: entry.to_vec(), target }))
    }

    /// After the operation on `dir`: forgets the identity of an inode that has no name any more.
    pub(super) fn bury(&self, dir: &Inode, victim: Victim) -> FsResult<()> {
        let metadata = victim.node.metadata()?;
        let gone = metadata.nlink == 0
            || (metadata.kind == FileKind::Directory
                && metadata.nlink <= 1
                && self.is_removed(&victim.node));
        self.store.touched(victim.node.id());
        if gone {
            self.inodes.unnamed(victim.node.id());
            if let Some(side) = victim.target {
                // Or a crash could leave the link, and not its target.
                match self.store.flush_names(std::iter::once(&dir.node)) {
                    Ok(()) => self.remove_target_file(&side),
                    Err(error) => log::warn!("a link's target file stays behind: {error}"),
                }
            }
        } else if let Some(inode) = self.inodes.known(victim.node.id()) {
            inode.forget_place(dir.id, &victim.entry);
        }
        Ok(())
    }

    /// Some file systems keep the link count of a removed directory at 1.
    fn is_removed(&self, node: &NodeRef) -> bool {
        node.read_dir().is_err()
    }
}

/// POSIX allows either for a directory that is not empty.
fn not_empty(error: std::io::Error) -> std::io::Result<()> {
    match error.raw_os_error() {
        Some(libc::EEXIST) => Err(Errno::NOTEMPTY.into()),
        _ => Err(error),
    }
}
