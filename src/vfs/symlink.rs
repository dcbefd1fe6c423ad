//! Symbolic links.
//!
//! On the disk a link's target is `nonce || V || C` (16 bytes, then AES-SIV with the nonce as
//! associated data) in base64url. Where that would be longer than every backing file system
//! takes, it is the content of a file in the volume's directory `links`, and the link's target is
//! `%T.`, the file's name and the length of the plaintext: hard links and renames of the link
//! need not move it.

use std::io::ErrorKind;
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use rustix::io::Errno;

use super::create::discard;
use super::filesystem::Filesystem;
use super::inode::Inode;
use super::types::{Caller, Entry, TARGET_MAX};
use super::value;
use crate::backing::{Access, FileKind, NodeRef};
use crate::crypto::random;
use crate::error::{FsError, FsResult};

pub(super) const AD: &[u8] = b"symlink";
const SIDE: &[u8] = b"%T.";
/// `%T.` + 22 letters + `.` + four digits.
const REFERENCE_LEN: usize = 30;
/// XFS takes 1023 bytes, the others more.
const INLINE_MAX: usize = 1023;
/// Directory of long targets, beside the tree.
pub(super) const DIRECTORY: &[u8] = b"links";

impl Filesystem {
    pub fn symlink(
        &self,
        caller: Caller,
        parent: u64,
        name: &[u8],
        target: &[u8],
    ) -> FsResult<Entry> {
        self.writable()?;
        if target.is_empty() {
            return Err(FsError::Os(Errno::NOENT));
        }
        if target.len() > TARGET_MAX {
            return Err(FsError::Os(Errno::NAMETOOLONG));
        }
        let dir = self.directory(parent)?;
        let disk = self.seal_name(name)?;
        let owner = self.ownership(caller, &dir, 0o777, 0)?;
        let sealed = value::seal(&self.keys, AD, target)?;
        let encoded = BASE64.encode(&sealed).into_bytes();
        let (content, side) = if encoded.len() <= INLINE_MAX {
            (encoded, None)
        } else {
            let side = self.write_target_file(&sealed)?;
            ([SIDE, &side, format!(".{:04}", target.len()).as_bytes()].concat(), Some(side))
        };
        let made = self.named(&dir, &disk, || {
            let node = dir.node.symlink(&disk.entry, &content)?;
            let given = owner.give_owner(&*node);
            if given.is_err() {
                discard(dir.node.unlink(&disk.entry));
            }
            given.map(|()| node)
        });
        if let (Err(_), Some(side)) = (&made, &side) {
            self.remove_target_file(side);
        }
        self.entry(&dir, &disk.entry, made?)
    }

    pub fn readlink(&self, node: u64) -> FsResult<Vec<u8>> {
        self.gate.check()?;
        let inode = self.inodes.get(node)?;
        if inode.kind != FileKind::Symlink {
            return Err(FsError::Os(Errno::INVAL));
        }
        let content = inode.node.read_link()?;
        let sealed = match Reference::parse(&content) {
            Some(reference) => read_target_file(&self.backing.root(), reference.side),
            None => BASE64.decode(&content).map_err(|_| damaged("not base64url")),
        };
        let opened = sealed.and_then(|sealed| {
            value::open(&self.keys, AD, &sealed)?
                .ok_or_else(|| damaged("does not decrypt with this volume's key"))
        });
        // Removed since, and its target's file with it: no damage.
        if matches!(opened, Err(FsError::Integrity(_))) && inode.node.metadata()?.nlink == 0 {
            self.gate.check()?;
            return Err(FsError::Os(Errno::NOENT));
        }
        let target = self.audited(&inode, opened)?;
        self.gate.check()?;
        Ok(target)
    }

    fn links_dir(&self) -> FsResult<NodeRef> {
        let root = self.backing.root();
        match root.lookup(DIRECTORY) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            found => return Ok(found?),
        }
        match root.mkdir(DIRECTORY, 0o700) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(root.lookup(DIRECTORY)?),
            made => {
                root.sync()?;
                Ok(made?)
            }
        }
    }

    /// On the device before the link that refers to it.
    fn write_target_file(&self, sealed: &[u8]) -> FsResult<Vec<u8>> {
        let dir = self.links_dir()?;
        let mut id = [0u8; 16];
        random::fill(&mut id).map_err(|error| {
            log::error!("{error}");
            FsError::Os(Errno::IO)
        })?;
        let side = BASE64.encode(id).into_bytes();
        let file = dir.create_unnamed()?;
        file.write_at(sealed, 0)?;
        file.sync_all()?;
        dir.link_file(&*file, &side)?;
        dir.sync()?;
        Ok(side)
    }

    /// After the last link is gone; what stays behind takes space and does no harm.
    pub(super) fn remove_target_file(&self, side: &[u8]) {
        let removed = self.backing.root().lookup(DIRECTORY).and_then(|dir| dir.unlink(side));
        match removed {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                log::warn!("a link's target file stays behind: {error}");
            }
            _ => {}
        }
    }
}

/// The sealed target, out of its file below the volume's root.
pub(super) fn read_target_file(root: &NodeRef, side: &[u8]) -> FsResult<Vec<u8>> {
    let read = || -> std::io::Result<Vec<u8>> {
        let file = root.lookup(DIRECTORY)?.lookup(side)?.open(Access::Peek)?;
        let mut sealed = vec![0; TARGET_MAX + value::OVERHEAD];
        let len = file.read_at(&mut sealed, 0)?;
        sealed.truncate(len);
        Ok(sealed)
    };
    read().map_err(|error| match error.kind() {
        ErrorKind::NotFound => damaged("the file with its target is missing"),
        _ => error.into(),
    })
}

pub(super) fn damaged(detail: &str) -> FsError {
    FsError::integrity("symlink", "", None, detail)
}

/// The content of a link whose target is in a file of its own.
pub(super) struct Reference<'a> {
    pub(super) side: &'a [u8],
    pub(super) plain_size: u64,
}

impl Reference<'_> {
    pub(super) fn parse(content: &[u8]) -> Option<Reference<'_>> {
        if content.len() != REFERENCE_LEN {
            return None;
        }
        let rest = content.strip_prefix(SIDE)?;
        let (side, size) = rest.split_at_checked(22)?;
        let plain_size = std::str::from_utf8(size.strip_prefix(b".")?).ok()?.parse().ok()?;
        Some(Reference { side, plain_size })
    }
}

/// The length of the target, from the length of what is on the disk: the link is not read, so
/// its access time stays.
pub(super) fn plain_size(inode: &Inode, disk_size: u64) -> FsResult<u64> {
    if disk_size == REFERENCE_LEN as u64
        && let Some(reference) = Reference::parse(&inode.node.read_link()?)
    {
        return Ok(reference.plain_size);
    }
    Ok((disk_size * 3 / 4).saturating_sub(value::OVERHEAD as u64))
}

/// The file with the target of `node`, a link of `disk_size` bytes on the disk.
pub(super) fn side_file(node: &NodeRef, disk_size: u64) -> FsResult<Option<Vec<u8>>> {
    if disk_size != REFERENCE_LEN as u64 {
        return Ok(None);
    }
    let content = Arc::clone(node).read_link()?;
    Ok(Reference::parse(&content).map(|reference| reference.side.to_vec()))
}
