//! `name_to_handle_at` and `open_by_handle_at`.

use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{errno, mounted};

const ROOM: usize = 128;

/// `struct file_handle`, with room for any file system's.
#[repr(C)]
struct FileHandle {
    bytes: u32,
    kind: i32,
    handle: [u8; ROOM],
}

#[test]
fn a_known_file_opens_by_its_handle_until_it_is_gone() {
    let mount = mounted!();
    let path = mount.path("f");
    fs::write(&path, "content").unwrap();
    let mut handle = FileHandle { bytes: ROOM as u32, kind: 0, handle: [0; ROOM] };
    let mut mount_id = 0;
    let name = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the name ends with NUL, and the handle has the room that it says.
    let done = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            name.as_ptr(),
            &raw mut handle,
            &raw mut mount_id,
            0,
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    let root = fs::File::open(mount.path("")).unwrap();
    let mut open = || {
        // SAFETY: the handle is one that the kernel filled in.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                root.as_raw_fd(),
                &raw mut handle,
                libc::O_RDONLY,
            )
        };
        match fd {
            // SAFETY: the kernel has just returned it, and nobody else has it.
            0.. => Ok(unsafe { fs::File::from_raw_fd(fd as i32) }),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    let mut text = String::new();
    open().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "content");
    fs::rename(&path, mount.path("g")).unwrap();
    text.clear();
    open().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "content");
    fs::remove_file(mount.path("g")).unwrap();
    // The kernel may still be closing what was open, and knows the file until it has.
    let limit = Instant::now() + Duration::from_secs(10);
    loop {
        match open() {
            Ok(file) => assert!(Instant::now() < limit, "{file:?} can still be opened"),
            gone => break assert_eq!(errno(gone), libc::ESTALE),
        }
        thread::sleep(Duration::from_millis(10));
    }
}
