//! Which errno a caller gets. Nowhere else is one picked.

use crate::error::{CutOff, FsError};

/// What the kernel is answered, as a positive number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Errno(i32);

impl Errno {
    pub(super) const INVAL: Errno = Errno(libc::EINVAL);
    pub(super) const IO: Errno = Errno(libc::EIO);
    pub(super) const RANGE: Errno = Errno(libc::ERANGE);
    /// For a whole operation that is not served, never for one call of it: the kernel does not
    /// ask again, and takes an fsync that was answered so for done.
    pub(super) const NOSYS: Errno = Errno(libc::ENOSYS);

    /// The kernel takes nothing beyond as a reply: it has errnos of its own there (ERESTARTSYS), of
    /// which some file systems let one out. Whoever waits for the reply would wait for ever.
    const MOST: i32 = 511;

    fn from_disk(errno: i32) -> Errno {
        match errno {
            // It must not switch an operation off for good.
            libc::ENOSYS => Errno(libc::EOPNOTSUPP),
            1..=Errno::MOST => Errno(errno),
            _ => Errno::IO,
        }
    }

    pub(super) fn raw(self) -> i32 {
        self.0
    }
}

/// What an operation answers while the volume is Inaccessible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CutOffErrno {
    /// EIO: the database servers read the others as codes of their own.
    #[default]
    Eio,
    /// EKEYREVOKED, EKEYEXPIRED or ENOKEY.
    Key,
}

impl CutOffErrno {
    pub(super) fn pick(self, error: &FsError) -> Errno {
        match (error, self) {
            (FsError::Os(errno), _) => Errno::from_disk(errno.raw_os_error()),
            (FsError::Integrity(_), _) => Errno::IO,
            (FsError::CutOff(_), CutOffErrno::Eio) => Errno::IO,
            (FsError::CutOff(CutOff::Revoked), CutOffErrno::Key) => Errno(libc::EKEYREVOKED),
            (FsError::CutOff(CutOff::Expired), CutOffErrno::Key) => Errno(libc::EKEYEXPIRED),
            (FsError::CutOff(CutOff::Unreachable), CutOffErrno::Key) => Errno(libc::ENOKEY),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_off_is_eio_unless_the_key_s_errno_is_asked_for() {
        let error = FsError::CutOff(CutOff::Revoked);
        assert_eq!(CutOffErrno::Eio.pick(&error).raw(), libc::EIO);
        assert_eq!(CutOffErrno::Key.pick(&error).raw(), 128);
        assert_eq!(CutOffErrno::Key.pick(&FsError::CutOff(CutOff::Expired)).raw(), 127);
        assert_eq!(CutOffErrno::Key.pick(&FsError::CutOff(CutOff::Unreachable)).raw(), 126);
    }

    #[test]
    fn no_operation_is_switched_off_by_the_disk() {
        let error = FsError::Os(rustix::io::Errno::NOSYS);
        assert_eq!(CutOffErrno::Eio.pick(&error).raw(), libc::EOPNOTSUPP);
    }

    #[test]
    fn damage_is_eio() {
        let error = FsError::integrity("block", "", Some(1), "");
        assert_eq!(CutOffErrno::Key.pick(&error), Errno::IO);
    }

    #[test]
    fn an_errno_that_the_kernel_takes_no_reply_with_is_eio() {
        let reply = |errno| {
            let error = FsError::Os(rustix::io::Errno::from_raw_os_error(errno));
            CutOffErrno::Eio.pick(&error).raw()
        };
        assert_eq!(reply(511), 511);
        for errno in [512, 524, 4095] {
            assert_eq!(reply(errno), libc::EIO);
        }
    }
}
