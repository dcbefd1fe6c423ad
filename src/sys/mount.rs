//! Taking a mount away.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `umount2(2)`; `lazy` detaches a busy mount. Never follows a symbolic link.
pub fn unmount(mount_point: &Path, lazy: bool) -> io::Result<()> {
    let path = CString::new(mount_point.as_os_str().as_bytes())?;
    let flags = libc::UMOUNT_NOFOLLOW | if lazy { libc::MNT_DETACH } else { 0 };
    // SAFETY: the path is a valid C string that outlives the call.
    let rc = unsafe { libc::umount2(path.as_ptr(), flags) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
