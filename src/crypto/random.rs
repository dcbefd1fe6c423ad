//! Random bytes from the kernel, and nowhere else.

use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Context, Result};

/// Fills `buf` from `getrandom(2)`, which waits until the kernel's generator is seeded.
pub fn fill(buf: &mut [u8]) -> Result<()> {
    let mut filled = 0;
    while filled < buf.len() {
        match getrandom(&mut buf[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context(|| "getrandom failed".into()),
        }
    }
    Ok(())
}

/// `N` public random bytes: ids and salts. For secrets use [`super::secret::Secret::random`].
pub fn bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    fill(&mut bytes)?;
    Ok(bytes)
}
