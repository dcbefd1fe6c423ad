//! The mount table: which byokfs mounts there are, and which device number a mount has.
//!
//! Reading it touches no mount, so the daemon may do it at any time.

use std::ffi::{CString, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Kind, Result};
use crate::sys;
use crate::sys::fuse::Unmount;

pub const FS_TYPE: &str = "fuse.byokfs";
const TABLE: &str = "/proc/self/mountinfo";

/// Number of a file system, the same in every mount namespace and for every bind mount of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    pub major: u32,
    pub minor: u32,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Mount {
    pub device: Device,
    pub mount_point: PathBuf,
    pub fs_type: String,
    /// The backing directory of a byokfs mount.
    pub source: PathBuf,
}

/// All mounts of this namespace, in the order of the table: a later one lies over an earlier one.
pub fn all() -> Result<Vec<Mount>> {
    let table = std::fs::read(TABLE).context(|| format!("cannot read {TABLE}"))?;
    Ok(parse(&table))
}

/// The byokfs mount whose mount point or backing directory is `target`; the topmost one.
pub fn find(target: &Path) -> Result<Option<Mount>> {
    let mut mounts = all()?;
    mounts.retain(|mount| mount.fs_type == FS_TYPE);
    let at = mounts.iter().rposition(|mount| mount.mount_point == target);
    let at = at.or_else(|| mounts.iter().rposition(|mount| mount.source == target));
    Ok(at.map(|index| mounts.swap_remove(index)))
}

/// What is mounted on `path`, of any type.
pub fn at(path: &Path) -> Result<Option<Mount>> {
    Ok(all()?.into_iter().rfind(|mount| mount.mount_point == path))
}

impl Mount {
    /// Whether it is the byokfs mount of `back` that had this number. The number alone says nothing of
    /// a mount that may be gone: the kernel gives it to the next one, of whatever type.
    pub fn is(&self, device: Device, back: &Path) -> bool {
        // As the mount has been given it.
        let source = back.to_string_lossy();
        self.device == device && self.fs_type == FS_TYPE && self.source == Path::new(&*source)
    }
}

/// Whether the byokfs mount of `back` with this number is anywhere in this namespace.
pub fn is_mounted(device: Device, back: &Path) -> Result<bool> {
    Ok(all()?.iter().any(|mount| mount.is(device, back)))
}

/// Takes a mount away; `lazy` takes it out of the name space although it is busy.
pub fn unmount(mount_point: &Path, lazy: bool) -> Result<()> {
    let failed = || format!("cannot unmount {}", mount_point.display());
    let path = CString::new(mount_point.as_os_str().as_bytes())
        .map_err(|error| Error::usage(failed()).with_source(error))?;
    let how = if lazy { Unmount::Lazy } else { Unmount::IfUnused };
    match sys::fuse::unmount(&path, how) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            Err(Error::new(Kind::Busy, format!("{} is busy", mount_point.display())))
        }
        result => result.context(failed),
    }
}

fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /point opts [tags...] - type source superopts`, as in proc(5).
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let device = Device { major: major.parse().ok()?, minor: minor.parse().ok()? };
    let mount_point = unescape(fields.nth(1)?);
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next()?);
    Some(Mount { device, mount_point, fs_type, source })
}

/// The kernel writes blank, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, tail)) = rest.split_first() {
        if *byte == b'\\'
            && let Some(digits) = tail.get(..3)
            && let Some(code) = std::str::from_utf8(digits)
                .ok()
                .and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            out.push(code);
            rest = &tail[3..];
            continue;
        }
        out.push(*byte);
        rest = tail;
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_tags_and_escapes() {
        let line = b"412 28 0:57 / /srv/my\\040db rw,nosuid shared:7 master:1 - fuse.byokfs /a\\134b rw,user_id=0";
        let mount = parse_line(line).unwrap();
        assert_eq!(mount.device, Device { major: 0, minor: 57 });
        assert_eq!(mount.mount_point, Path::new("/srv/my db"));
        assert_eq!(mount.fs_type, FS_TYPE);
        assert_eq!(mount.source, Path::new("/a\\b"));
    }

    #[test]
    fn a_number_that_was_given_away_is_another_mount() {
        let mount = |line: &[u8]| parse_line(line).unwrap();
        let device = Device { major: 0, minor: 57 };
        let ours = mount(b"9 8 0:57 / /m rw - fuse.byokfs /back rw");
        assert!(ours.is(device, Path::new("/back")));
        assert!(!ours.is(device, Path::new("/other")));
        let odd = mount(b"9 8 0:57 / /m rw - fuse.byokfs /b\xef\xbf\xbd rw");
        assert!(odd.is(device, Path::new(std::ffi::OsStr::from_bytes(b"/b\xff"))));
        assert!(!ours.is(Device { minor: 58, ..device }, Path::new("/back")));
        assert!(!mount(b"9 8 0:57 / /m rw - overlay overlay rw").is(device, Path::new("/back")));
    }

    #[test]
    fn broken_lines_are_skipped() {
        assert!(parse(b"\n1 2 3\n1 2 x:y / / - a b\n1 2 0:1 / /p rw\n").is_empty());
    }

    #[test]
    fn this_machine_has_a_root_mount() {
        assert!(at(Path::new("/")).unwrap().is_some());
    }
}
