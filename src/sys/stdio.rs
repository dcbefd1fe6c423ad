//! Standard streams put elsewhere.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// From now on standard output is `file`.
pub fn replace_stdout(file: impl AsFd) -> io::Result<()> {
    replace(file, libc::STDOUT_FILENO)
}

/// From now on standard input is `file`.
pub fn replace_stdin(file: impl AsFd) -> io::Result<()> {
    replace(file, libc::STDIN_FILENO)
}

fn replace(file: impl AsFd, stream: libc::c_int) -> io::Result<()> {
    // SAFETY: the streams 0 to 2 belong to no owner that would close them; dup2 replaces one
    // atomically and the new one stays open for good.
    let rc = unsafe { libc::dup2(file.as_fd().as_raw_fd(), stream) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
