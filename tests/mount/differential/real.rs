//! The operations on a real directory.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Error, Result};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, RenameFlags, Timespec, Timestamps, XattrFlags, fallocate,
    lgetxattr, lremovexattr, lsetxattr, renameat_with, utimensat,
};

use super::{Answer, Op, Rename, SLOTS, Space};

/// Inode, mtime, ctime.
type Times = (u64, (i64, i64), (i64, i64));

pub(super) struct Real {
    root: PathBuf,
    slots: [Option<File>; SLOTS],
    /// As last looked at, since anything was set.
    times: BTreeMap<String, Times>,
    /// What the last look saw move: the path, and which of the two.
    moved: Option<(String, bool, bool)>,
}

pub(super) fn describe(metadata: &fs::Metadata) -> String {
    let kind = metadata.file_type();
    let mode = metadata.mode() & 0o7777;
    if kind.is_dir() {
        // Link counts and sizes of directories are each file system's own affair.
        format!("directory {mode:o}")
    } else if kind.is_symlink() {
        format!("link, {} bytes, {} names", metadata.len(), metadata.nlink())
    } else {
        format!("file {mode:o}, {} bytes, {} names", metadata.len(), metadata.nlink())
    }
}

impl Real {
    pub(super) fn new(root: PathBuf) -> Real {
        Real { root, slots: Default::default(), times: BTreeMap::new(), moved: None }
    }

    pub(super) fn close_all(&mut self) {
        self.slots = Default::default();
    }

    pub(super) fn apply(&mut self, op: &Op) -> Answer {
        self.moved = None;
        self.try_apply(op).map_err(|error| error.raw_os_error().unwrap())
    }

    /// The path whose time moved here at the last look, and not there.
    pub(super) fn unmatched_move(&self, there: &Real) -> Option<String> {
        let (path, mtime, ctime) = self.moved.as_ref()?;
        let (_, there_mtime, there_ctime) = there.moved.as_ref()?;
        ((*mtime && !there_mtime) || (*ctime && !there_ctime)).then(|| path.clone())
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn slot(&self, slot: usize) -> Result<&File> {
        self.slots[slot].as_ref().ok_or_else(|| Error::from_raw_os_error(libc::EBADF))
    }

    fn try_apply(&mut self, op: &Op) -> Result<String> {
        let done = Ok("done".to_owned());
        match op {
            Op::Open { slot, path, create, exclusive, truncate } => {
                let mut flags = libc::O_NOFOLLOW;
                if *create {
                    flags |= libc::O_CREAT;
                }
                // Exclusive alone means nothing.
                if *create && *exclusive {
                    flags |= libc::O_EXCL;
                }
                if *truncate {
                    flags |= libc::O_TRUNC;
                }
                let mut options = OpenOptions::new();
                options.read(true).write(true).mode(0o644).custom_flags(flags);
                let file = options.open(self.path(path))?;
                self.slots[*slot] = Some(file);
                done
            }
            Op::Close { slot } => {
                self.slots[*slot] = None;
                done
            }
            Op::Write { slot, offset, len, byte } => {
                self.slot(*slot)?.write_all_at(&vec![*byte; *len], *offset)?;
                done
            }
            Op::Append { slot, len, byte } => {
                let file = self.slot(*slot)?;
                let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
                let mut again = OpenOptions::new().append(true).open(path)?;
                std::io::Write::write_all(&mut again, &vec![*byte; *len])?;
                done
            }
            Op::Read { slot, offset, len } => {
                let mut data = vec![0; *len];
                let mut filled = 0;
                while filled < *len {
                    match self.slot(*slot)?.read_at(&mut data[filled..], offset + filled as u64)? {
                        0 => break,
                        count => filled += count,
                    }
                }
                Ok(super::model::summary(&data[..filled]))
            }
            Op::SetLen { slot, len } => self.slot(*slot)?.set_len(*len).and(done),
            Op::Space { slot, how, offset, len } => {
                let flags = match how {
                    Space::Allocate => FallocateFlags::empty(),
                    Space::AllocateKeep => FallocateFlags::KEEP_SIZE,
                    Space::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    Space::Zero => FallocateFlags::ZERO_RANGE,
                };
                // Which of them move times is each file system's own affair.
                self.times.clear();
                fallocate(self.slot(*slot)?, flags, *offset, *len)?;
                done
            }
            Op::StatOpen { slot } => Ok(describe(&self.slot(*slot)?.metadata()?)),
            Op::Sync { slot } => self.slot(*slot)?.sync_all().and(done),
            Op::Mkdir { path } => fs::create_dir(self.path(path)).and(done),
            Op::Rmdir { path } => fs::remove_dir(self.path(path)).and(done),
            Op::Unlink { path } => fs::remove_file(self.path(path)).and(done),
            Op::Rename { from, to, how } => {
                let flags = match how {
                    Rename::Replace => RenameFlags::empty(),
                    Rename::NoReplace => RenameFlags::NOREPLACE,
                    Rename::Exchange => RenameFlags::EXCHANGE,
                };
                renameat_with(CWD, self.path(from), CWD, self.path(to), flags)?;
                done
            }
            Op::Link { from, to } => {
                rustix::fs::linkat(CWD, self.path(from), CWD, self.path(to), AtFlags::empty())?;
                done
            }
            Op::Symlink { target, path } => {
                std::os::unix::fs::symlink(target, self.path(path)).and(done)
            }
            Op::ReadLink { path } => Ok(fs::read_link(self.path(path))?.display().to_string()),
            Op::Chmod { path, mode } => {
                fs::set_permissions(self.path(path), Permissions::from_mode(*mode)).and(done)
            }
            Op::SetTimes { path, seconds } => {
                let time = Timespec { tv_sec: *seconds, tv_nsec: 123_456_789 };
                let times = Timestamps { last_access: time, last_modification: time };
                utimensat(CWD, self.path(path), &times, AtFlags::SYMLINK_NOFOLLOW)?;
                let metadata = fs::symlink_metadata(self.path(path))?;
                self.times.clear();
                Ok(format!("{} {}", metadata.mtime(), metadata.mtime_nsec()))
            }
            Op::SetXattr { path, name, value } => {
                lsetxattr(self.path(path), name.as_str(), value, XattrFlags::empty())?;
                done
            }
            Op::GetXattr { path, name } => {
                let mut value = vec![0; 1000];
                let len = lgetxattr(self.path(path), name.as_str(), &mut value[..])?;
                Ok(super::model::summary(&value[..len]))
            }
            Op::RemoveXattr { path, name } => {
                lremovexattr(self.path(path), name.as_str())?;
                done
            }
            Op::Stat { path } => {
                let metadata = fs::symlink_metadata(self.path(path))?;
                self.look(path, &metadata);
                Ok(describe(&metadata))
            }
            Op::List { path } => Ok(format!("{:?}", list(&self.path(path))?)),
        }
    }

    fn look(&mut self, path: &str, metadata: &fs::Metadata) {
        let mtime = (metadata.mtime(), metadata.mtime_nsec());
        let ctime = (metadata.ctime(), metadata.ctime_nsec());
        let now = (metadata.ino(), mtime, ctime);
        if let Some((ino, old_mtime, old_ctime)) = self.times.insert(path.to_owned(), now)
            && ino == metadata.ino()
        {
            self.moved = Some((path.to_owned(), mtime != old_mtime, ctime != old_ctime));
        }
    }
}

fn list(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.push(entry?.file_name().into_string().unwrap());
    }
    names.sort();
    Ok(names)
}

/// Everything below a directory: paths, attributes, contents.
pub(super) fn tree(root: &Path) -> Vec<String> {
    fn below(root: &Path, path: &str, out: &mut Vec<String>) {
        for name in list(&root.join(path)).unwrap() {
            let path = if path.is_empty() { name } else { format!("{path}/{name}") };
            let full = root.join(&path);
            let metadata = fs::symlink_metadata(&full).unwrap();
            let content = if metadata.is_file() {
                super::model::summary(&fs::read(&full).unwrap())
            } else if metadata.is_symlink() {
                fs::read_link(&full).unwrap().display().to_string()
            } else {
                String::new()
            };
            out.push(format!("{path}: {} {content}", describe(&metadata)));
            if metadata.is_dir() {
                below(root, &path, out);
            }
        }
    }
    let mut out = Vec::new();
    below(root, "", &mut out);
    out
}
