//! Names on the disk.
//!
//! A name is sealed with AES-SIV under the volume's name key and written in base64url: the same
//! name gives the same bytes in every directory, so a lookup needs no state and a rename is a
//! rename. 175 bytes of plaintext fit in a name of 255. A longer one is `%L.` and the 16-byte
//! synthetic IV, which determines the name; the whole sealed name is the content of the side
//! file `%N.` and the same 16 bytes in the same directory (`long_name` keeps them). `%` is no
//! letter of base64url, so the three kinds cannot be mistaken for each other.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use rustix::io::Errno;

use super::keys::Ciphers;
use super::types::NAME_MAX;
use crate::crypto::siv;
use crate::error::{FsError, FsResult};

const AD: &[u8] = b"name";
const LONG: &[u8] = b"%L.";
const SIDE: &[u8] = b"%N.";
/// The longest sealed name whose base64 fits in a name of the backing file system.
const INLINE_MAX: usize = 255 / 4 * 3 + 2;

/// A sealed name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DiskName {
    pub(super) entry: Vec<u8>,
    pub(super) long: Option<LongName>,
}

/// What a long name has beside its directory entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LongName {
    /// Name of the side file.
    pub(super) side: Vec<u8>,
    /// Content of the side file.
    pub(super) sealed: Vec<u8>,
}

/// What a directory entry of the disk is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Listed {
    /// A name, sealed.
    Name(Vec<u8>),
    /// A long name: read this side file.
    Long(Vec<u8>),
    /// A side file, not to be listed.
    Side,
    /// Nothing that byokfs writes.
    Foreign,
}

/// Refuses what can be no name of a file.
pub(super) fn check(name: &[u8]) -> FsResult<()> {
    if name.len() > NAME_MAX {
        return Err(FsError::Os(Errno::NAMETOOLONG));
    }
    if name.is_empty()
        || name == b"."
        || name == b".."
        || name.iter().any(|b| matches!(b, 0 | b'/'))
    {
        return Err(FsError::Os(Errno::INVAL));
    }
    Ok(())
}

pub(super) fn seal(ciphers: &Ciphers, name: &[u8]) -> DiskName {
    let sealed = ciphers.names.seal(&[AD], name);
    if sealed.len() <= INLINE_MAX {
        return DiskName { entry: BASE64.encode(&sealed).into_bytes(), long: None };
    }
    let tag = BASE64.encode(&sealed[..siv::OVERHEAD]);
    DiskName {
        entry: [LONG, tag.as_bytes()].concat(),
        long: Some(LongName { side: [SIDE, tag.as_bytes()].concat(), sealed }),
    }
}

/// None when `sealed` is not a name of this volume.
pub(super) fn open(ciphers: &Ciphers, sealed: &[u8]) -> Option<Vec<u8>> {
    let name = ciphers.names.open(&[AD], sealed)?;
    check(&name).is_ok().then_some(name)
}

pub(super) fn classify(entry: &[u8]) -> Listed {
    if let Some(tag) = entry.strip_prefix(LONG) {
        return Listed::Long([SIDE, tag].concat());
    }
    if entry.starts_with(SIDE) {
        return Listed::Side;
    }
    match BASE64.decode(entry) {
        Ok(sealed) if sealed.len() > siv::OVERHEAD => Listed::Name(sealed),
        _ => Listed::Foreign,
    }
}

/// The entry that a side file belongs to.
pub(super) fn owner_of_side(side: &[u8]) -> Option<Vec<u8>> {
    side.strip_prefix(SIDE).map(|tag| [LONG, tag].concat())
}

/// Whether the side file's content belongs to its name: one entry must not pass for another.
pub(super) fn side_matches(side: &[u8], sealed: &[u8]) -> bool {
    let Some(tag) = side.strip_prefix(SIDE) else { return false };
    sealed.len() > siv::OVERHEAD && BASE64.encode(&sealed[..siv::OVERHEAD]).as_bytes() == tag
}
