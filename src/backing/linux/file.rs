//! A file opened for I/O.

use std::any::Any;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{self, FallocateFlags, SeekFrom};
use rustix::io::{Errno, pread, pwrite, pwritev, retry_on_intr};

use super::node::{self, AccessTimes, LinuxNode};
use crate::backing::{File, Metadata, NodeRef};
use crate::sys;

#[derive(Debug)]
pub(super) struct LinuxFile {
    fd: OwnedFd,
    times: AccessTimes,
}

impl LinuxFile {
    pub(super) fn new(fd: OwnedFd, times: AccessTimes) -> LinuxFile {
        LinuxFile { fd, times }
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        Ok(retry_on_intr(|| fs::fallocate(&self.fd, flags, offset, len))?)
    }

    fn seek(&self, to: SeekFrom) -> io::Result<Option<u64>> {
        match retry_on_intr(|| fs::seek(&self.fd, to)) {
            Ok(position) => Ok(Some(position)),
            Err(Errno::NXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// The descriptor is ours and open, so EBADF says that it is not open for writing.
fn read_only(error: Errno) -> Errno {
    if error == Errno::BADF { Errno::ROFS } else { error }
}

impl File for LinuxFile {
    fn metadata(&self) -> io::Result<Metadata> {
        node::metadata(&self.fd)
    }

    fn node(&self) -> io::Result<NodeRef> {
        Ok(Arc::new(LinuxNode::of_open_file(&self.fd, self.times)?))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            let at = position(offset, done)?;
            match retry_on_intr(|| pread(&self.fd, &mut buf[done..], at))? {
                0 => break,
                count => done += count,
            }
        }
        Ok(done)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            let at = position(offset, done)?;
            match retry_on_intr(|| pwrite(&self.fd, &data[done..], at)).map_err(read_only)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => done += count,
            }
        }
        Ok(())
    }

    fn write_parts_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> =
            parts.iter().filter(|part| !part.is_empty()).map(|part| IoSlice::new(part)).collect();
        let mut rest = &mut slices[..];
        let mut done = 0;
        while !rest.is_empty() {
            let batch = rest.len().min(libc::UIO_MAXIOV as usize);
            let at = position(offset, done)?;
            match retry_on_intr(|| pwritev(&self.fd, &rest[..batch], at)).map_err(read_only)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => {
                    done += count;
                    IoSlice::advance_slices(&mut rest, count);
                }
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Ok(retry_on_intr(|| fs::ftruncate(&self.fd, len))?)
    }

    fn allocate(&self, offset: u64, len: u64, keep_size: bool) -> io::Result<()> {
        let flags = if keep_size { FallocateFlags::KEEP_SIZE } else { FallocateFlags::empty() };
        self.fallocate(flags, offset, len)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    fn seek_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.seek(SeekFrom::Data(offset))
    }

    fn seek_hole(&self, offset: u64) -> io::Result<Option<u64>> {
        self.seek(SeekFrom::Hole(offset))
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| fs::fdatasync(&self.fd))?)
    }

    fn sync_all(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| fs::fsync(&self.fd))?)
    }

    fn write_out(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(()); // to sync_file_range(2), 0 is the whole file
        }
        sys::writeout::write_out(self.fd.as_fd(), offset, len)
    }

    fn start_write_out(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        sys::writeout::start(self.fd.as_fd(), offset, len)
    }

    fn overwrite_in_place(&self) {
        let set = fs::ioctl_getflags(&self.fd)
            .and_then(|flags| fs::ioctl_setflags(&self.fd, flags | fs::IFlags::NOCOW));
        if let Err(error) = set {
            log::debug!("no change of how a file is overwritten: {error}");
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn position(offset: u64, done: usize) -> io::Result<u64> {
    offset.checked_add(done as u64).ok_or_else(|| io::Error::from(Errno::FBIG))
}
