//! Extended attributes.
//!
//! `user.*`, `trusted.*` and `security.*` are stored as `trusted.byokfs.` and the sealed name in
//! base64url: that namespace works on every kind of inode, and only root sees it on the disk. The
//! value is sealed together with its name. POSIX ACLs go to the disk as they are.
//!
//! Who may see and set what is checked by the kernel; listing `trusted.*` is ours to restrict.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use rustix::io::Errno;

use super::acl;
use super::filesystem::Filesystem;
use super::inode::Inode;
use super::keys::Keys;
use super::types::Caller;
use super::value;
use crate::backing::XattrMode;
use crate::crypto::siv;
use crate::error::{FsError, FsResult};

const AD: &[u8] = b"xattr name";
const PREFIX: &[u8] = b"trusted.byokfs.";
/// Namespaces, each with the byte that stands for it in the sealed name.
const NAMESPACES: [(&[u8], u8); 3] = [(b"user.", b'u'), (b"trusted.", b't'), (b"security.", b's')];
/// The kernel's limit for the name on the disk.
const DISK_NAME_MAX: usize = 255;

/// `u` for `user.`, and so on, before the rest of the name; EOPNOTSUPP for other namespaces.
fn compact(name: &[u8]) -> FsResult<Vec<u8>> {
    for (namespace, letter) in NAMESPACES {
        if let Some(rest) = name.strip_prefix(namespace) {
            if rest.is_empty() {
                return Err(FsError::Os(Errno::INVAL));
            }
            return Ok([&[letter], rest].concat());
        }
    }
    Err(FsError::Os(Errno::OPNOTSUPP))
}

pub(super) fn expand(compact: &[u8]) -> Option<Vec<u8>> {
    let (letter, rest) = compact.split_first()?;
    let (namespace, _) = NAMESPACES.iter().find(|(_, known)| known == letter)?;
    Some([namespace, rest].concat())
}

/// Of an attribute's name on the disk, what is sealed of it; None for one that is not byokfs's.
pub(super) fn encoded(disk_name: &[u8]) -> Option<&[u8]> {
    disk_name.strip_prefix(PREFIX)
}

/// The compact name; None for what this volume has not sealed.
pub(super) fn open_compact(keys: &Keys, encoded: &[u8]) -> FsResult<Option<Vec<u8>>> {
    let sealed = BASE64.decode(encoded).unwrap_or_default();
    let compact = keys.with(|ciphers| ciphers.names.open(&[AD], &sealed))?;
    Ok(compact.filter(|compact| expand(compact).is_some()))
}

/// Whether a sealed name and a sealed value are long enough to be that.
pub(super) fn has_form(name: &[u8], value: &[u8]) -> bool {
    name.len() > siv::OVERHEAD && value.len() >= value::OVERHEAD
}

pub(super) fn value_ad(compact: &[u8]) -> Vec<u8> {
    [b"xattr value ", compact].concat()
}

impl Filesystem {
    pub fn getxattr(&self, node: u64, name: &[u8]) -> FsResult<Vec<u8>> {
        self.gate.check()?;
        let inode = self.inodes.get(node)?;
        if acl::is_acl(name) {
            let value = inode.node.get_xattr(name)?;
            self.gate.check()?;
            return Ok(value);
        }
        let compact = compact(name)?;
        let sealed = inode.node.get_xattr(&self.disk_name(&compact)?)?;
        let opened = value::open(&self.keys, &value_ad(&compact), &sealed)?;
        let value = self.audited(&inode, opened.ok_or_else(|| damaged("value")))?;
        self.gate.check()?;
        Ok(value)
    }

    pub fn setxattr(
        &self,
        node: u64,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
        drop_set_gid: bool,
    ) -> FsResult<()> {
        self.writable()?;
        let inode = self.inodes.get(node)?;
        if acl::is_acl(name) {
            inode.node.set_xattr(name, value, mode)?;
            let dropped = if drop_set_gid { self.drop_set_gid(&inode) } else { Ok(()) };
            // After both: an fsync that comes between would take the one for all.
            self.touched(&inode);
            return dropped;
        }
        let compact = compact(name)?;
        let disk_name = self.disk_name(&compact)?;
        let sealed = value::seal(&self.keys, &value_ad(&compact), value)?;
        inode.node.set_xattr(&disk_name, &sealed, mode)?;
        self.touched(&inode);
        Ok(())
    }

    pub fn removexattr(&self, node: u64, name: &[u8]) -> FsResult<()> {
        self.writable()?;
        let inode = self.inodes.get(node)?;
        if acl::is_acl(name) {
            inode.node.remove_xattr(name)?;
        } else {
            inode.node.remove_xattr(&self.disk_name(&compact(name)?)?)?;
        }
        self.touched(&inode);
        Ok(())
    }

    /// The names, each with a NUL after it.
    pub fn listxattr(&self, caller: Caller, node: u64) -> FsResult<Vec<u8>> {
        self.gate.check()?;
        let inode = self.inodes.get(node)?;
        let mut list = Vec::new();
        for disk_name in inode.node.list_xattrs()? {
            let name = if acl::is_acl(&disk_name) {
                disk_name
            } else if let Some(sealed) = encoded(&disk_name) {
                match open_compact(&self.keys, sealed)?.as_deref().and_then(expand) {
                    Some(name) if name.starts_with(b"trusted.") && !caller.is_root() => continue,
                    Some(name) => name,
                    // Hidden, like a file name that does not decrypt.
                    None => {
                        self.report(&inode, &damaged("name"));
                        continue;
                    }
                }
            } else {
                continue;
            };
            list.extend_from_slice(&name);
            list.push(0);
        }
        self.gate.check()?;
        Ok(list)
    }

    fn disk_name(&self, compact: &[u8]) -> FsResult<Vec<u8>> {
        let sealed = self.keys.with(|ciphers| ciphers.names.seal(&[AD], compact))?;
        let name = [PREFIX, BASE64.encode(sealed).as_bytes()].concat();
        if name.len() > DISK_NAME_MAX { Err(FsError::Os(Errno::RANGE)) } else { Ok(name) }
    }

    fn drop_set_gid(&self, inode: &Inode) -> FsResult<()> {
        let mode = inode.node.metadata()?.mode;
        if mode & 0o2000 != 0 {
            inode.node.set_mode(mode & !0o2000)?;
        }
        Ok(())
    }
}

fn damaged(what: &str) -> FsError {
    FsError::integrity("xattr", "", None, format!("its {what} does not decrypt"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_their_namespace() {
        for name in [&b"user.a"[..], b"trusted.overlay.x", b"security.capability"] {
            assert_eq!(expand(&compact(name).unwrap()).unwrap(), name);
        }
        assert!(matches!(compact(b"system.x"), Err(FsError::Os(Errno::OPNOTSUPP))));
        assert!(matches!(compact(b"user."), Err(FsError::Os(Errno::INVAL))));
    }
}
