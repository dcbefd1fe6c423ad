//! Small sealed values: link targets and extended attributes. `nonce || V || C`, AES-SIV with
//! what the value is for, and the nonce, as associated data.

use rustix::io::Errno;

use super::keys::Keys;
use crate::crypto::{random, siv};
use crate::error::{FsError, FsResult};

const NONCE: usize = 16;
/// How much longer a sealed value is.
pub(super) const OVERHEAD: usize = NONCE + siv::OVERHEAD;

pub(super) fn seal(keys: &Keys, ad: &[u8], plain: &[u8]) -> FsResult<Vec<u8>> {
    let mut nonce = [0u8; NONCE];
    random::fill(&mut nonce).map_err(|error| {
        log::error!("{error}");
        FsError::Os(Errno::IO)
    })?;
    let sealed = keys.with(|ciphers| ciphers.values.seal(&[ad, &nonce], plain))?;
    Ok([&nonce[..], &sealed].concat())
}

/// None when the bytes are not what this volume sealed for that use.
pub(super) fn open(keys: &Keys, ad: &[u8], sealed: &[u8]) -> FsResult<Option<Vec<u8>>> {
    let Some((nonce, sealed)) = sealed.split_first_chunk::<NONCE>() else {
        // The gate comes first, whatever the bytes.
        return keys.with(|_| None);
    };
    keys.with(|ciphers| ciphers.values.open(&[ad, nonce], sealed))
}
