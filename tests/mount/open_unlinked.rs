//! Files that are open and have no name any more: every operation works on them.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::time::{Duration, SystemTime};

use rustix::fs::{FallocateFlags, fallocate};

use crate::harness::mounted;

fn works_without_a_name(file: &File) {
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.write_all_at(&[7; 10_000], 0).unwrap();
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    file.set_permissions(Permissions::from_mode(0o600)).unwrap();
    assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o600);
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    file.set_modified(time).unwrap();
    assert_eq!(file.metadata().unwrap().modified().unwrap(), time);
    fallocate(file, FallocateFlags::empty(), 0, 20_000).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 20_000);
    file.set_len(5_000).unwrap();
    rustix::fs::fchown(file, Some(rustix::fs::Uid::from_raw(3)), None).unwrap();
    assert_eq!(file.metadata().unwrap().uid(), 3);
    rustix::fs::fsetxattr(file, "user.a", b"b", rustix::fs::XattrFlags::empty()).unwrap();
    let again = OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .unwrap();
    again.write_all_at(b"again", 0).unwrap();
    drop(again);
    let mut start = [0; 6];
    file.read_exact_at(&mut start, 0).unwrap();
    assert_eq!(&start, b"again\x07");
}

fn open(path: &std::path::Path) -> File {
    OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap()
}

#[test]
fn after_unlink() {
    let mount = mounted!();
    let file = open(&mount.path("f"));
    fs::remove_file(mount.path("f")).unwrap();
    works_without_a_name(&file);
}

#[test]
fn after_being_renamed_over() {
    let mount = mounted!();
    let file = open(&mount.path("f"));
    fs::write(mount.path("g"), "other").unwrap();
    fs::rename(mount.path("g"), mount.path("f")).unwrap();
    works_without_a_name(&file);
    assert_eq!(fs::read(mount.path("f")).unwrap(), b"other");
}

#[test]
fn a_removed_directory_can_be_asked_and_takes_nothing() {
    let mount = mounted!();
    fs::create_dir(mount.path("d")).unwrap();
    let dir = File::open(mount.path("d")).unwrap();
    fs::remove_dir(mount.path("d")).unwrap();
    dir.metadata().unwrap();
    dir.sync_all().unwrap();
    let made = rustix::fs::mkdirat(&dir, "e", rustix::fs::Mode::RWXU);
    assert_eq!(made.unwrap_err().raw_os_error(), libc::ENOENT);
}
