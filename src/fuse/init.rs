//! FUSE_INIT: what byokfs and the kernel agree on, the first thing on every session.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno as OsErrno;
use rustix::param::page_size;

use super::wire::{Header, IN_HEADER_LEN, MAJOR, MINOR, OUT_HEADER_LEN, Reader, Writer, opcode};
use super::worker::MAX_WRITE;
use crate::error::{Context, Error, Kind, Result};

/// INIT flags.
const ASYNC_READ: u64 = 1 << 0;
const ATOMIC_O_TRUNC: u64 = 1 << 3;
const EXPORT_SUPPORT: u64 = 1 << 4;
const BIG_WRITES: u64 = 1 << 5;
const DONT_MASK: u64 = 1 << 6;
const DO_READDIRPLUS: u64 = 1 << 13;
const READDIRPLUS_AUTO: u64 = 1 << 14;
const ASYNC_DIO: u64 = 1 << 15;
const PARALLEL_DIROPS: u64 = 1 << 18;
const POSIX_ACL: u64 = 1 << 20;
const MAX_PAGES: u64 = 1 << 22;
const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
const SETXATTR_EXT: u64 = 1 << 29;
const INIT_EXT: u64 = 1 << 30;
const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
const OVER_IO_URING: u64 = 1 << 41;

/// What byokfs cannot do without. Left out on purpose: WRITEBACK_CACHE (acknowledged data would
/// be lost at a cut-off), PASSTHROUGH (past the encryption), AUTO_INVAL_DATA and the caching of
/// link targets (plaintext in the page cache), POSIX_LOCKS and FLOCK_LOCKS (the kernel's own
/// are right for one mount).
const REQUIRED: u64 = ASYNC_READ
    | ATOMIC_O_TRUNC
    | BIG_WRITES
    | DONT_MASK
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | POSIX_ACL
    | MAX_PAGES
    | HANDLE_KILLPRIV_V2
    | SETXATTR_EXT
    | INIT_EXT;
const WANTED: u64 =
    REQUIRED | EXPORT_SUPPORT | DO_READDIRPLUS | READDIRPLUS_AUTO | DIRECT_IO_ALLOW_MMAP;

/// Asynchronous requests that the kernel lets run at a time; its own default of 12 would limit
/// every native AIO.
const MAX_BACKGROUND: u16 = 4096;

/// What the kernel has begun a session with.
#[derive(Debug)]
pub(super) struct Offer {
    unique: u64,
    init: Init,
}

impl Offer {
    /// Waits for it.
    pub(super) fn read(device: &OwnedFd) -> Result<Offer> {
        let protocol = |message: &str| Error::new(Kind::Unsupported, message);
        let mut request = vec![0; MAX_WRITE + 4096];
        let len = loop {
            match rustix::io::read(device, &mut request[..]) {
                Ok(len) => break len,
                Err(OsErrno::INTR | OsErrno::AGAIN | OsErrno::NOENT) => {}
                Err(error) => {
                    return Err(Error::io("the kernel closed the new mount", error.into()));
                }
            }
        };
        let header = Header::parse(&request[..len])
            .filter(|header| header.opcode == opcode::INIT)
            .ok_or_else(|| protocol("the kernel did not begin with FUSE_INIT"))?;
        let init = Init::parse(Reader::new(&request[IN_HEADER_LEN..len], &[]))
            .ok_or_else(|| protocol("FUSE_INIT is too short: this kernel is too old"))?;
        Ok(Offer { unique: header.unique, init })
    }

    /// Requests may come by io_uring.
    pub(super) fn has_ring(&self) -> bool {
        self.init.flags & OVER_IO_URING != 0
    }

    /// Agrees to it, or refuses a kernel that lacks something. With `ring` the kernel then serves
    /// nobody until every queue has an entry.
    pub(super) fn answer(&self, device: &OwnedFd, ring: bool) -> Result<()> {
        let mut reply = [0; OUT_HEADER_LEN + 64];
        let (out, body) = reply.split_at_mut(OUT_HEADER_LEN);
        let error = match self.init.check() {
            Ok(()) => {
                self.init.answer(ring, body);
                0
            }
            Err(_) => -libc::EPROTO,
        };
        let reply_len = if error == 0 { OUT_HEADER_LEN + 64 } else { OUT_HEADER_LEN };
        Writer::new(out).u32(reply_len as u32).u32(error.cast_unsigned()).u64(self.unique);
        rustix::io::write(device, &reply[..reply_len])
            .map_err(io::Error::from)
            .context(|| "cannot answer FUSE_INIT".into())?;
        self.init.check()?;
        if self.init.flags & DIRECT_IO_ALLOW_MMAP == 0 {
            log::warn!("this kernel maps no file of the mount shared: that takes Linux 6.6");
        }
        Ok(())
    }
}

/// `struct fuse_init_in`.
#[derive(Clone, Copy, Debug)]
struct Init {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u64,
}

impl Init {
    fn parse(mut args: Reader<'_>) -> Option<Init> {
        let (major, minor) = (args.u32().ok()?, args.u32().ok()?);
        let (max_readahead, low) = (args.u32().ok()?, args.u32().ok()?);
        let high = if u64::from(low) & INIT_EXT == 0 { 0 } else { args.u32().ok()? };
        Some(Init { major, minor, max_readahead, flags: u64::from(high) << 32 | u64::from(low) })
    }

    fn check(&self) -> Result<()> {
        if self.major != MAJOR {
            let message = format!("the kernel speaks FUSE {}, not {MAJOR}", self.major);
            return Err(Error::new(Kind::Unsupported, message));
        }
        let missing = REQUIRED & !self.flags;
        if missing != 0 {
            let message = format!(
                "this kernel's FUSE {}.{} lacks what byokfs needs (flags {missing:#x}); use Linux \
                 6.1 or newer",
                self.major, self.minor
            );
            return Err(Error::new(Kind::Unsupported, message));
        }
        Ok(())
    }

    /// `struct fuse_init_out`.
    fn answer(&self, ring: bool, body: &mut [u8]) {
        let flags = self.flags & if ring { WANTED | OVER_IO_URING } else { WANTED };
        let mut writer = Writer::new(body);
        writer.u32(MAJOR).u32(MINOR.min(self.minor)).u32(self.max_readahead).u32(flags as u32);
        writer.u16(MAX_BACKGROUND).u16(MAX_BACKGROUND / 4 * 3).u32(MAX_WRITE as u32);
        // Times in nanoseconds, pages of the largest request, no alignment of mappings.
        writer.u32(1).u16((MAX_WRITE / page_size()) as u16).u16(0).u32((flags >> 32) as u32);
        writer.zeros(28);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(flags: u64) -> Init {
        Init { major: 7, minor: 45, max_readahead: 131_072, flags }
    }

    #[test]
    fn only_what_is_wanted_is_agreed_on() {
        let mut body = [0xff; 64];
        init(u64::MAX).answer(false, &mut body);
        let word =
            |body: &[u8], at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().unwrap());
        let flags = |body: &[u8]| u64::from(word(body, 12)) | u64::from(word(body, 32)) << 32;
        assert_eq!(flags(&body), WANTED);
        let writeback_cache = 1 << 16;
        let passthrough = 1 << 37;
        assert_eq!(flags(&body) & (writeback_cache | passthrough), 0);
        assert_eq!(word(&body, 20), 1 << 20);
        assert_eq!(&body[36..], &[0; 28]);
        init(u64::MAX).answer(true, &mut body);
        assert_eq!(flags(&body), WANTED | OVER_IO_URING);
        init(REQUIRED).answer(true, &mut body);
        assert_eq!(flags(&body), REQUIRED);
    }

    #[test]
    fn an_old_kernel_is_refused_with_the_reason() {
        assert!(init(REQUIRED).check().is_ok());
        let error = init(REQUIRED & !INIT_EXT).check().unwrap_err();
        assert_eq!(error.kind, Kind::Unsupported);
        assert!(error.to_string().contains("6.1"));
    }
}
