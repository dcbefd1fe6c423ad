//! A panic in one request: EIO for that request, and nothing else.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use crate::harness::{errno, mounted};

#[test]
fn a_panic_ends_one_request_and_leaves_no_lock() {
    let mut mount = mounted!();
    let path = mount.path("f");
    fs::write(&path, vec![1; 100_000]).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut read = vec![0; 8192];

    mount.panic_in("read");
    assert_eq!(errno(file.read_exact_at(&mut read, 40_960)), libc::EIO);
    file.read_exact_at(&mut read, 40_960).unwrap();
    assert!(read.iter().all(|&byte| byte == 1));

    mount.panic_in("name");
    assert_eq!(errno(fs::write(mount.path("g"), "x")), libc::EIO);
    fs::write(mount.path("g"), "x").unwrap();
    mount.panic_in("name");
    assert_eq!(errno(fs::rename(mount.path("g"), mount.path("h"))), libc::EIO);
    fs::rename(mount.path("g"), mount.path("h")).unwrap();
    assert_eq!(fs::read(mount.path("h")).unwrap(), b"x");

    // More panics than there are workers: each of them still serves.
    for _ in 0..40 {
        mount.panic_in("read");
        assert_eq!(errno(file.read_exact_at(&mut read, 0)), libc::EIO);
    }
    file.set_len(10).unwrap();
    file.sync_all().unwrap();
    assert_eq!(fs::read(&path).unwrap(), [1; 10]);

    // Nobody knows how far a write to the log has come: no more are taken until the next mount.
    mount.panic_in("write");
    assert_eq!(errno(file.write_all_at(&[2; 10], 0)), libc::EIO);
    assert_eq!(errno(file.write_all_at(&[3; 10], 0)), libc::EIO);
    assert_eq!(fs::read(&path).unwrap(), [1; 10]);
    drop(file);
    mount.remount("");
    assert_eq!(fs::read(&path).unwrap(), [1; 10]);
    fs::write(&path, [4; 10]).unwrap();
}
