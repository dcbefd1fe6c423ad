//! One request in, one call of [`Filesystem`], one reply out.

use std::sync::Arc;

use super::reply::{CutOffErrno, Errno};
use super::wire::{self, Header, Listing, Reader, Writer, opcode};
use crate::backing::{FileKind, RenameMode, SetTime, XattrMode};
use crate::error::{FsError, FsResult};
use crate::vfs::{Filesystem, PendingFlush, Plus, SetAttr, WriteRequest};

const FOPEN_DIRECT_IO: u32 = 1 << 0;
const FOPEN_NOFLUSH: u32 = 1 << 5;
const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
/// Every open the same: one cached open of a file would put its plaintext into the page cache
/// and make all its writers take turns.
const OPEN_FLAGS: u32 = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES | FOPEN_NOFLUSH;

const OPEN_KILL_SUIDGID: u32 = 1 << 0;
const WRITE_CACHE: u32 = 1 << 0;
const WRITE_KILL_SUIDGID: u32 = 1 << 2;
const FSYNC_FDATASYNC: u32 = 1 << 0;
const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;

const FATTR_MODE: u32 = 1 << 0;
const FATTR_UID: u32 = 1 << 1;
const FATTR_GID: u32 = 1 << 2;
const FATTR_SIZE: u32 = 1 << 3;
const FATTR_ATIME: u32 = 1 << 4;
const FATTR_MTIME: u32 = 1 << 5;
const FATTR_ATIME_NOW: u32 = 1 << 7;
const FATTR_MTIME_NOW: u32 = 1 << 8;
const FATTR_KILL_SUIDGID: u32 = 1 << 11;

/// What becomes of a request.
#[derive(Debug)]
pub(super) enum Outcome {
    /// That many bytes of the reply buffer.
    Reply(usize),
    Error(Errno),
    /// A reply without a body, when that has happened; an error as [`Adapter::errno`] says.
    Later(PendingFlush),
    /// The kernel expects no reply.
    Silent,
}

enum Failure {
    Fs(FsError),
    Protocol(Errno),
}

impl From<FsError> for Failure {
    fn from(error: FsError) -> Failure {
        Failure::Fs(error)
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Failure {
        Failure::Protocol(errno)
    }
}

type Served = Result<usize, Failure>;

/// Knows nothing of where requests come from and where replies go.
#[derive(Debug)]
pub(super) struct Adapter {
    fs: Arc<Filesystem>,
    errno: CutOffErrno,
}

impl Adapter {
    pub(super) fn new(fs: Arc<Filesystem>, errno: CutOffErrno) -> Adapter {
        Adapter { fs, errno }
    }

    pub(super) fn errno(&self) -> CutOffErrno {
        self.errno
    }

    pub(super) fn filesystem(&self) -> &Arc<Filesystem> {
        &self.fs
    }

    /// Serves one request; the reply, without its header, is at the start of `out`.
    pub(super) fn serve(&self, header: &Header, args: Reader<'_>, out: &mut [u8]) -> Outcome {
        match header.opcode {
            opcode::FORGET | opcode::BATCH_FORGET | opcode::NOTIFY_REPLY => {
                if self.forget(header, args).is_err() {
                    log::error!("a FORGET that makes no sense");
                }
                return Outcome::Silent;
            }
            _ => {}
        }
        let served = match header.opcode {
            opcode::FSYNC => self.fsync(args),
            _ => self.dispatch(header, args, out).map(Outcome::Reply),
        };
        match served {
            Ok(outcome) => outcome,
            Err(Failure::Fs(error)) => Outcome::Error(self.errno.pick(&error)),
            Err(Failure::Protocol(errno)) => Outcome::Error(errno),
        }
    }

    fn dispatch(&self, header: &Header, args: Reader<'_>, out: &mut [u8]) -> Served {
        let fs = &*self.fs;
        let node = header.node;
        match header.opcode {
            opcode::LOOKUP => self.lookup(header, args, out),
            opcode::GETATTR => Ok(Writer::new(out).attr_out(&fs.getattr(node)?).len()),
            opcode::SETATTR => self.setattr(header, args, out),
            opcode::READLINK => Ok(Writer::new(out).bytes(&fs.readlink(node)?).len()),
            opcode::SYMLINK => self.symlink(header, args, out),
            opcode::MKNOD => self.mknod(header, args, out),
            opcode::MKDIR => self.mkdir(header, args, out),
            opcode::UNLINK => done(fs.unlink(node, args.name()?.0)),
            opcode::RMDIR => done(fs.rmdir(node, args.name()?.0)),
            opcode::RENAME | opcode::RENAME2 => self.rename(header, args),
            opcode::LINK => self.link(header, args, out),
            opcode::OPEN => self.open(header, args, out),
            opcode::CREATE | opcode::TMPFILE => self.create(header, args, out),
            opcode::READ => self.read(args, out),
            opcode::WRITE => self.write(args, out),
            opcode::STATFS => Ok(Writer::new(out).statfs_out(&fs.statfs()?).len()),
            opcode::RELEASE | opcode::RELEASEDIR => {
                let mut args = args;
                fs.release(args.u64()?);
                Ok(0)
            }
            opcode::FSYNCDIR => {
                let mut args = args;
                done(fs.fsyncdir(args.u64()?))
            }
            // Nothing is held back until a close.
            opcode::FLUSH | opcode::DESTROY => Ok(0),
            opcode::SETXATTR => self.setxattr(header, args),
            opcode::GETXATTR | opcode::LISTXATTR => self.read_xattr(header, args, out),
            opcode::REMOVEXATTR => done(fs.removexattr(node, args.name()?.0)),
            opcode::OPENDIR => Ok(Writer::new(out).open_out(fs.opendir(node)?, 0).len()),
            opcode::READDIR => self.readdir(args, Plus::No, out),
            opcode::READDIRPLUS => self.readdir(args, Plus::Yes, out),
            opcode::FALLOCATE => self.fallocate(header, args),
            opcode::LSEEK => self.lseek(args, out),
            opcode::COPY_FILE_RANGE | opcode::COPY_FILE_RANGE_64 => {
                self.copy_file_range(header, args, out)
            }
            _ => Err(Errno::NOSYS.into()),
        }
    }

    fn forget(&self, header: &Header, mut args: Reader<'_>) -> Result<(), Errno> {
        match header.opcode {
            opcode::FORGET => self.fs.forget(header.node, args.u64()?),
            opcode::BATCH_FORGET => {
                let count = args.u32()?;
                args.skip(4)?;
                let mut args = Reader::new(args.rest(), &[]);
                for _ in 0..count {
                    let node = args.u64()?;
                    self.fs.forget(node, args.u64()?);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn lookup(&self, header: &Header, args: Reader<'_>, out: &mut [u8]) -> Served {
        match self.fs.lookup(header.node, args.name()?.0) {
            Ok(entry) => Ok(Writer::new(out).entry_out(&entry).len()),
            // Said this way the kernel may remember it.
            Err(FsError::Os(rustix::io::Errno::NOENT)) => Ok(Writer::new(out).no_entry_out().len()),
            Err(error) => Err(error.into()),
        }
    }

    fn setattr(&self, header: &Header, mut args: Reader<'_>, out: &mut [u8]) -> Served {
        let valid = args.u32()?;
        args.skip(4 + 8)?;
        let size = args.u64()?;
        args.skip(8)?;
        let (atime, mtime, _ctime) = (args.u64()?, args.u64()?, args.u64()?);
        let (atime_nsec, mtime_nsec, _ctime_nsec) = (args.u32()?, args.u32()?, args.u32()?);
        let mode = args.u32()?;
        args.skip(4)?;
        let (uid, gid) = (args.u32()?, args.u32()?);
        let given = |bit: u32| valid & bit != 0;
        let time = |set: u32, now: u32, sec: u64, nsec: u32| match (given(set), given(now)) {
            (false, _) => SetTime::Keep,
            (true, true) => SetTime::Now,
            (true, false) => SetTime::At(wire::timestamp(sec, nsec)),
        };
        let change = SetAttr {
            mode: given(FATTR_MODE).then_some(mode & 0o7777),
            uid: given(FATTR_UID).then_some(uid),
            gid: given(FATTR_GID).then_some(gid),
            size: given(FATTR_SIZE).then_some(size),
            atime: time(FATTR_ATIME, FATTR_ATIME_NOW, atime, atime_nsec),
            mtime: time(FATTR_MTIME, FATTR_MTIME_NOW, mtime, mtime_nsec),
            drop_set_id: given(FATTR_KILL_SUIDGID),
        };
        let attr = self.fs.setattr(header.node, &change)?;
        Ok(Writer::new(out).attr_out(&attr).len())
    }

    fn symlink(&self, header: &Header, args: Reader<'_>, out: &mut [u8]) -> Served {
        let (name, args) = args.name()?;
        let (target, _) = args.name()?;
        let entry = self.fs.symlink(header.caller, header.node, name, target)?;
        Ok(Writer::new(out).entry_out(&entry).len())
    }

    fn mknod(&self, header: &Header, mut args: Reader<'_>, out: &mut [u8]) -> Served {
        let (mode, rdev, umask) = (args.u32()?, args.u32()?, args.u32()?);
        args.skip(4)?;
        let kind: FileKind = wire::kind_of(mode).ok_or(Errno::INVAL)?;
        let (name, rdev) = (args.name()?.0, wire::decode_rdev(rdev));
        let mode = mode & 0o7777;
        let entry = self.fs.mknod(header.caller, header.node, name, kind, mode, umask, rdev)?;
        Ok(Writer::new(out).entry_out(&entry).len())
    }

    fn mkdir(&self, header: &Header, mut args: Reader<'_>, out: &mut [u8]) -> Served {
        let (mode, umask) = (args.u32()?, args.u32()?);
        let name = args.name()?.0;
        let entry = self.fs.mkdir(header.caller, header.node, name, mode & 0o7777, umask)?;
        Ok(Writer::new(out).entry_out(&entry).len())
    }

    fn rename(&self, header: &Header, mut args: Reader<'_>) -> Served {
        let to = args.u64()?;
        let mut flags = 0;
        if header.opcode == opcode::RENAME2 {
            flags = args.u32()?;
            args.skip(4)?;
        }
        let mode = match flags {
            0 => RenameMode::Replace,
            libc::RENAME_NOREPLACE => RenameMode::NoReplace,
            libc::RENAME_EXCHANGE => RenameMode::Exchange,
            _ => return Err(Errno::INVAL.into()),
        };
        let (from_name, args) = args.name()?;
        let (to_name, _) = args.name()?;
        done(self.fs.rename(header.node, from_name, to, to_name, mode))
    }

    fn link(&self, header: &Header, mut args: Reader<'_>, out: &mut [u8]) -> Served {
        let node = args.u64()?;
        let entry = self.fs.link(node, header.node, args.name()?.0)?;
        Ok(Writer::new(out).entry_out(&entry).len())
    }

    fn open(&self, header: &Header, mut args: Reader<'_>, out: &mut [u8]) -> Served {
        let (flags, open_flags) = (args.u32()?, args.u32()?);
        let drop_set_id = open_flags & OPEN_KILL_SUIDGID != 0;
        let handle = self.fs.open(header.node, flags, drop_set_id)?;
        Ok(Writer::new(out).open_out(handle, OPEN_FLAGS).len())
    }

    fn create(&self, header: &Header, mut args: Reader<'_>, out: &mut [u8]) -> Served {
        let (_flags, mode, umask, _open_flags) =
            (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let (caller, mode) = (header.caller, mode & 0o7777);
        let created = if header.opcode == opcode::TMPFILE {
            self.fs.create_unnamed(caller, header.node, mode, umask)?
        } else {
            self.fs.create(caller, header.node, args.name()?.0, mode, umask)?
        };
        let mut writer = Writer::new(out);
        Ok(writer.entry_out(&created.entry).open_out(created.handle, OPEN_FLAGS).len())
    }

    fn read(&self, mut args: Reader<'_>, out: &mut [u8]) -> Served {
        let (handle, offset, size) = (args.u64()?, args.u64()?, args.u32()?);
        let size = out.len().min(size as usize);
        Ok(self.fs.read(handle, offset, &mut out[..size])?)
    }

    fn write(&self, mut args: Reader<'_>, out: &mut [u8]) -> Served {
        let (handle, offset) = (args.u64()?, args.u64()?);
        let (size, write_flags) = (args.u32()?, args.u32()?);
        args.skip(8)?;
        let flags = args.u32()?;
        args.skip(4)?;
        let request = WriteRequest {
            offset,
            data: args.rest().get(..size as usize).ok_or(Errno::INVAL)?,
            flags,
            from_cache: write_flags & WRITE_CACHE != 0,
            drop_set_id: write_flags & WRITE_KILL_SUIDGID != 0,
        };
        let written = self.fs.write(handle, &request)?;
        Ok(Writer::new(out).u32(written as u32).u32(0).len())
    }

    fn fsync(&self, mut args: Reader<'_>) -> Result<Outcome, Failure> {
        let (handle, flags) = (args.u64()?, args.u32()?);
        let rest = self.fs.begin_fsync(handle, flags & FSYNC_FDATASYNC != 0)?;
        Ok(rest.map_or(Outcome::Reply(0), Outcome::Later))
    }

    fn setxattr(&self, header: &Header, mut args: Reader<'_>) -> Served {
        let (size, flags, extra) = (args.u32()?, args.u32()?, args.u32()?);
        args.skip(4)?;
        let (name, args) = args.name()?;
        let value = args.rest().get(..size as usize).ok_or(Errno::INVAL)?;
        let mode = match flags.cast_signed() {
            0 => XattrMode::CreateOrReplace,
            libc::XATTR_CREATE => XattrMode::Create,
            libc::XATTR_REPLACE => XattrMode::Replace,
            _ => return Err(Errno::INVAL.into()),
        };
        let drop_set_gid = extra & SETXATTR_ACL_KILL_SGID != 0;
        done(self.fs.setxattr(header.node, name, value, mode, drop_set_gid))
    }

    fn read_xattr(&self, header: &Header, mut args: Reader<'_>, out: &mut [u8]) -> Served {
        let size = args.u32()? as usize;
        args.skip(4)?;
        let value = if header.opcode == opcode::GETXATTR {
            self.fs.getxattr(header.node, args.name()?.0)?
        } else {
            self.fs.listxattr(header.caller, header.node)?
        };
        let mut writer = Writer::new(out);
        if size == 0 {
            return Ok(writer.u32(value.len() as u32).u32(0).len());
        }
        if value.len() > size {
            return Err(Errno::RANGE.into());
        }
        Ok(writer.bytes(&value).len())
    }

    fn readdir(&self, mut args: Reader<'_>, plus: Plus, out: &mut [u8]) -> Served {
        let (handle, offset, size) = (args.u64()?, args.u64()?, args.u32()?);
        let size = out.len().min(size as usize);
        let mut listing = Listing::new(&mut out[..size], plus);
        self.fs.readdir(handle, offset, plus, &mut listing)?;
        Ok(listing.len())
    }

    fn fallocate(&self, header: &Header, mut args: Reader<'_>) -> Served {
        let (handle, offset, len) = (args.u64()?, args.u64()?, args.u64()?);
        done(self.fs.fallocate(header.caller, handle, offset, len, args.u32()?))
    }

    fn lseek(&self, mut args: Reader<'_>, out: &mut [u8]) -> Served {
        let (handle, offset, whence) = (args.u64()?, args.u64()?, args.u32()?);
        Ok(Writer::new(out).u64(self.fs.lseek(handle, offset, whence)?).len())
    }

    fn copy_file_range(&self, header: &Header, mut args: Reader<'_>, out: &mut [u8]) -> Served {
        let (from, from_offset) = (args.u64()?, args.u64()?);
        let (_to_node, to, to_offset, len) = (args.u64()?, args.u64()?, args.u64()?, args.u64()?);
        let (from, to) = ((from, from_offset), (to, to_offset));
        let copied = self.fs.copy_file_range(header.caller, from, to, len)?;
        let mut writer = Writer::new(out);
        if header.opcode == opcode::COPY_FILE_RANGE_64 {
            return Ok(writer.u64(copied).len());
        }
        Ok(writer.u32(copied as u32).u32(0).len())
    }
}

fn done(result: FsResult<()>) -> Served {
    Ok(result.map(|()| 0)?)
}
