//! Names, link targets and extended attributes of a volume that nobody has mounted: whether a mount
//! would read them. Without a key, whether they have the right form.
//!
//! Says what is there; what that means is for others to judge. Errors are of the disk, and of a key
//! that was lost meanwhile.

use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use rustix::io::Errno;

use super::keys::Keys;
use super::name::{self, Listed};
use super::symlink::{self, Reference};
use super::{long_name, value, xattr};
use crate::backing::{DirStream, NodeRef};
use crate::error::{FsError, FsResult};
use crate::store::{FEATURE_PLAINTEXT_NAMES, Store};

/// Reads names as a mount of the volume does.
#[derive(Debug)]
pub struct Names {
    keys: Option<Arc<Keys>>,
    /// The volume's names are on the disk as they are.
    plain: bool,
    root: NodeRef,
}

/// What a directory entry of the disk is to a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryName {
    /// Listed; without a key, its name is not known.
    Listed(Option<Vec<u8>>),
    /// The side file of a long name that is there.
    SideFile,
    /// A side file that belongs to nothing.
    Orphan,
    /// Not listed, because of its side file.
    LongName(String),
    /// Not listed.
    Unreadable(&'static str),
}

/// A symbolic link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The file in `links/` that it refers to.
    pub target_file: Option<Vec<u8>>,
    /// Why it cannot be read.
    pub damage: Option<String>,
}

impl Names {
    /// Of a volume whose gate is open, if `keyed`: then everything is proved.
    pub fn new(store: &Arc<Store>, keyed: bool) -> Names {
        let keys = keyed.then(|| Keys::new(Arc::clone(store.gate()), Arc::clone(store)));
        let plain = store.info().features & FEATURE_PLAINTEXT_NAMES != 0;
        Names { keys, plain, root: store.backing().root() }
    }

    /// An entry of a directory below `tree/`.
    pub fn entry(&self, dir: &NodeRef, entry: &[u8]) -> FsResult<EntryName> {
        if self.plain {
            return Ok(EntryName::Listed(Some(entry.to_vec())));
        }
        let sealed = match name::classify(entry) {
            Listed::Name(sealed) => sealed,
            Listed::Long(side) => match long_name::read_side_file(dir, &side) {
                Ok(sealed) if name::side_matches(&side, &sealed) => sealed,
                Ok(_) => {
                    return Ok(EntryName::LongName("its side file is of another name".into()));
                }
                Err(FsError::Os(Errno::NOENT)) => {
                    return Ok(EntryName::LongName("its side file is missing".into()));
                }
                // Something else is in its place.
                Err(FsError::Os(errno @ (Errno::ISDIR | Errno::LOOP | Errno::NXIO))) => {
                    return Ok(EntryName::LongName(format!("its side file: {errno}")));
                }
                // It may be whole: nothing is to be concluded from that it cannot be read now.
                Err(error) => return Err(error),
            },
            Listed::Side => {
                let owner = name::owner_of_side(entry);
                let there = match owner.as_deref().map(|owner| dir.lookup(owner)) {
                    Some(Ok(_)) => true,
                    Some(Err(error)) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(error.into());
                    }
                    _ => false,
                };
                return Ok(if there { EntryName::SideFile } else { EntryName::Orphan });
            }
            Listed::Foreign => return Ok(EntryName::Unreadable("it was not written by byokfs")),
        };
        let Some(keys) = &self.keys else { return Ok(EntryName::Listed(None)) };
        let (opened, found) = keys.with(|ciphers| {
            let opened = name::open(ciphers, &sealed);
            // What a lookup of that name would look for.
            let found =
                opened.as_ref().is_some_and(|name| name::seal(ciphers, name).entry == entry);
            (opened, found)
        })?;
        Ok(match opened {
            None => EntryName::Unreadable("it does not decrypt with this volume's key"),
            Some(_) if !found => EntryName::Unreadable("no lookup of its name comes to it"),
            Some(name) => EntryName::Listed(Some(name)),
        })
    }

    /// A symbolic link below `tree/`.
    pub fn link(&self, node: &NodeRef) -> FsResult<Link> {
        let content = node.read_link()?;
        let reference = Reference::parse(&content);
        let sealed = match &reference {
            Some(reference) => symlink::read_target_file(&self.root, reference.side),
            None => BASE64.decode(&content).map_err(|_| symlink::damaged("not base64url")),
        };
        let damage = match sealed {
            Err(FsError::Integrity(failure)) => Some(failure.detail),
            Err(error) => return Err(error),
            Ok(sealed) => {
                let len = sealed.len().checked_sub(value::OVERHEAD).filter(|&len| len > 0);
                let said = reference.as_ref().map(|reference| reference.plain_size);
                match (len, &self.keys) {
                    (None, _) => Some("its target is too short".into()),
                    (Some(len), _) if said.is_some_and(|said| said != len as u64) => {
                        Some(format!("its target is {len} bytes, not as long as it says"))
                    }
                    (_, None) => None,
                    (_, Some(keys)) => value::open(keys, symlink::AD, &sealed)?
                        .is_none()
                        .then(|| "its target does not decrypt with this volume's key".into()),
                }
            }
        };
        Ok(Link { target_file: reference.map(|reference| reference.side.to_vec()), damage })
    }

    /// What is wrong with a node's extended attributes.
    pub fn xattrs(&self, node: &NodeRef) -> FsResult<Vec<String>> {
        let mut damage = Vec::new();
        let listed = match node.list_xattrs() {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::OPNOTSUPP) => Vec::new(),
            listed => listed?,
        };
        for disk_name in listed {
            let Some(encoded) = xattr::encoded(&disk_name) else { continue };
            let shown = String::from_utf8_lossy(&disk_name).into_owned();
            let Some(keys) = &self.keys else {
                let sealed = BASE64.decode(encoded).unwrap_or_default();
                let value = node.get_xattr(&disk_name)?;
                if !xattr::has_form(&sealed, &value) {
                    damage.push(format!("the attribute {shown} is too short"));
                }
                continue;
            };
            let Some(compact) = xattr::open_compact(keys, encoded)? else {
                damage.push(format!("the name of the attribute {shown} does not decrypt"));
                continue;
            };
            let sealed = node.get_xattr(&disk_name)?;
            if value::open(keys, &xattr::value_ad(&compact), &sealed)?.is_none() {
                let name = xattr::expand(&compact).unwrap_or_default();
                let name = String::from_utf8_lossy(&name).into_owned();
                damage.push(format!("the value of {name} does not decrypt"));
            }
        }
        Ok(damage)
    }

    /// The side file that the entry of a long name has.
    pub fn side_file(entry: &[u8]) -> Option<Vec<u8>> {
        match name::classify(entry) {
            Listed::Long(side) => Some(side),
            Listed::Name(_) | Listed::Side | Listed::Foreign => None,
        }
    }

    /// Whether an entry has the name of a side file.
    pub fn is_side_file(entry: &[u8]) -> bool {
        matches!(name::classify(entry), Listed::Side)
    }

    /// Whether a file of the volume's root has this name.
    pub fn is_root_name(name: &[u8]) -> bool {
        name == symlink::DIRECTORY
    }

    /// The directory of long link targets, and what is in it; None where there is none.
    pub fn target_files(&self) -> FsResult<Option<(NodeRef, Box<dyn DirStream>)>> {
        match self.root.lookup(symlink::DIRECTORY) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            found => {
                let dir = found?;
                let stream = dir.read_dir()?;
                Ok(Some((dir, stream)))
            }
        }
    }
}
