//! The types a secret lives in: locked memory, out of core dumps, overwritten on drop, redacted in
//! `Debug`, compared in constant time. They have no `Display`, `Serialize` or `Clone`.
//!
//! What they cannot promise: a copy that a caller makes of the exposed bytes.

use std::fmt;

use subtle::ConstantTimeEq;
use zeroize::Zeroize;

use super::random;
use crate::error::{Context, Result};
use crate::sys::locked::Locked;

/// `N` secret bytes.
pub struct Secret<const N: usize>(Locked<[u8; N]>);

impl<const N: usize> Secret<N> {
    pub fn random() -> Result<Secret<N>> {
        let mut secret = Secret::zero()?;
        random::fill(secret.0.get_mut())?;
        Ok(secret)
    }

    /// Takes the bytes over and overwrites them where they were; None if there are not `N`.
    pub fn from_slice_wiping(bytes: &mut [u8]) -> Result<Option<Secret<N>>> {
        let secret = if bytes.len() == N {
            let mut secret = Secret::zero()?;
            secret.0.get_mut().copy_from_slice(bytes);
            Some(secret)
        } else {
            None
        };
        bytes.zeroize();
        Ok(secret)
    }

    /// Lets `fill` write the bytes in place.
    pub fn new_with(fill: impl FnOnce(&mut [u8; N])) -> Result<Secret<N>> {
        let mut secret = Secret::zero()?;
        fill(secret.0.get_mut());
        Ok(secret)
    }

    pub fn expose(&self) -> &[u8; N] {
        &self.0
    }

    pub fn try_clone(&self) -> Result<Secret<N>> {
        Secret::new_with(|bytes| bytes.copy_from_slice(self.expose()))
    }

    pub fn ct_eq(&self, other: &Secret<N>) -> bool {
        self.expose().ct_eq(other.expose()).into()
    }

    fn zero() -> Result<Secret<N>> {
        Locked::new_with(|| [0; N]).map(Secret).context(|| "no memory for a key".into())
    }
}

impl<const N: usize> fmt::Debug for Secret<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{N} secret bytes]")
    }
}

/// The most a [`SecretBytes`] holds: enough for an access token or a private key.
const CAPACITY: usize = 16 * 1024 - 8;

/// Secret bytes of any length up to 16 KiB.
pub struct SecretBytes {
    bytes: Locked<[u8; CAPACITY]>,
    len: usize,
}

impl SecretBytes {
    /// Takes the bytes over and overwrites them where they were.
    pub fn from_vec_wiping(mut bytes: Vec<u8>) -> Result<SecretBytes> {
        let secret = SecretBytes::from_slice_wiping(&mut bytes);
        bytes.zeroize();
        secret
    }

    /// Takes the bytes over and overwrites them where they were.
    pub fn from_slice_wiping(bytes: &mut [u8]) -> Result<SecretBytes> {
        let secret = SecretBytes::new_with(bytes.len(), |place| place.copy_from_slice(bytes));
        bytes.zeroize();
        secret
    }

    /// Lets `fill` write `len` bytes in place.
    pub fn new_with(len: usize, fill: impl FnOnce(&mut [u8])) -> Result<SecretBytes> {
        if len > CAPACITY {
            return Err(crate::Error::usage(format!("a secret of {len} bytes is too long")));
        }
        let mut secret = SecretBytes {
            bytes: Locked::new_with(|| [0; CAPACITY])
                .context(|| "no memory for a secret".into())?,
            len,
        };
        fill(&mut secret.bytes.get_mut()[..len]);
        Ok(secret)
    }

    pub fn expose(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Compares in constant time; only the lengths are not secret.
    pub fn ct_eq(&self, other: &[u8]) -> bool {
        self.expose().ct_eq(other).into()
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret bytes]")
    }
}

/// A secret text: a token, a password.
pub struct SecretString(SecretBytes);

impl SecretString {
    /// Takes the text over and overwrites it where it was.
    pub fn from_string_wiping(text: String) -> Result<SecretString> {
        SecretBytes::from_vec_wiping(text.into_bytes()).map(SecretString)
    }

    pub fn expose(&self) -> &str {
        // Every constructor starts from a `String`.
        std::str::from_utf8(self.0.expose()).unwrap_or_default()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn ct_eq(&self, other: &str) -> bool {
        self.0.ct_eq(other.as_bytes())
    }
}

impl fmt::Debug for SecretString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret text]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_wiped_and_lengths_checked() {
        let mut bytes = [7_u8; 32];
        let secret = Secret::<32>::from_slice_wiping(&mut bytes).unwrap().unwrap();
        assert_eq!(secret.expose(), &[7; 32]);
        assert_eq!(bytes, [0; 32]);
        let mut short = [7_u8; 31];
        assert!(Secret::<32>::from_slice_wiping(&mut short).unwrap().is_none());
        assert_eq!(short, [0; 31]);
    }

    #[test]
    fn debug_tells_nothing() {
        let secret = Secret::<4>::new_with(|bytes| bytes.copy_from_slice(b"abcd")).unwrap();
        let text = SecretString::from_string_wiping("abcd".into()).unwrap();
        assert!(!format!("{secret:?} {text:?} {:?}", text.0).contains("abcd"));
        assert!(!format!("{secret:?}").contains("97"));
    }

    #[test]
    fn equality_and_clone() {
        let secret = Secret::<32>::random().unwrap();
        assert!(secret.ct_eq(&secret.try_clone().unwrap()));
        assert!(!secret.ct_eq(&Secret::random().unwrap()));
        let text = SecretString::from_string_wiping("token".into()).unwrap();
        assert!(text.ct_eq("token") && !text.ct_eq("tokem") && !text.ct_eq("toke"));
    }

    #[test]
    fn too_long_is_refused() {
        assert!(SecretBytes::from_vec_wiping(vec![1; 20000]).is_err());
    }
}
