//! Creating files, directories and nodes.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use crate::harness::{errno, mounted, names, shell};

#[test]
fn a_file_comes_back_as_it_was_written() {
    let mut mount = mounted!();
    let path = mount.path("table.ibd");
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    fs::write(&path, &data).unwrap();
    assert_eq!(fs::read(&path).unwrap(), data);
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), data.len() as u64);
    assert_eq!(metadata.mode() & 0o7777, 0o644);
    assert_eq!(names(&mount.root()), ["table.ibd"]);
    let encrypted = names(&mount.tree());
    assert_eq!(encrypted.len(), 1);
    assert!(!encrypted[0].contains("table"));
    let ino = metadata.ino();
    mount.remount("");
    assert_eq!(fs::read(&path).unwrap(), data);
    assert_eq!(fs::metadata(&path).unwrap().ino(), ino);
}

#[test]
fn an_existing_file_is_not_created_again() {
    let mount = mounted!();
    let path = mount.path("f");
    fs::write(&path, "1").unwrap();
    let again = OpenOptions::new().write(true).create_new(true).open(&path);
    assert_eq!(errno(again), libc::EEXIST);
    assert_eq!(errno(fs::create_dir(&path)), libc::EEXIST);
    assert_eq!(fs::read(&path).unwrap(), b"1");
}

#[test]
fn the_mode_is_the_one_asked_for_less_the_umask() {
    let mount = mounted!();
    let script = "umask 027; touch a; mkdir d; mkfifo p; umask 0; touch b; stat -c '%n %a' a b d p";
    assert_eq!(shell(&mount.root(), script), "a 640\nb 666\nd 750\np 640\n");
    let path = mount.path("none");
    OpenOptions::new().write(true).create_new(true).mode(0o000).open(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0);
}

#[test]
fn special_files_keep_their_kind_and_number() {
    let mount = mounted!();
    let script = "mkfifo p; mknod c c 1 3; mknod b b 259 300000; python3 -c \
                  'import socket; socket.socket(socket.AF_UNIX).bind(\"s\")'; stat -c '%t %T' c b";
    assert_eq!(shell(&mount.root(), script), "1 3\n103 493e0\n");
    assert!(fs::metadata(mount.path("p")).unwrap().file_type().is_fifo());
    assert!(fs::metadata(mount.path("s")).unwrap().file_type().is_socket());
    assert!(fs::metadata(mount.path("b")).unwrap().file_type().is_block_device());
}

#[test]
fn a_set_group_id_directory_passes_its_group_on() {
    let mount = mounted!();
    let script = "mkdir d; chgrp 1234 d; chmod 2775 d; touch d/f; mkdir d/e; ln -s x d/l; \
                  stat -c '%n %g %a' d/f d/e; stat -c %g d/l";
    assert_eq!(shell(&mount.root(), script), "d/f 1234 644\nd/e 1234 2755\n1234\n");
}

#[test]
fn a_file_without_a_name_can_be_given_one() {
    let mount = mounted!();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(mount.root())
        .unwrap();
    rustix::io::pwrite(&file, b"later", 0).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    assert_eq!(fs::read_dir(mount.root()).unwrap().count(), 0);
    let from = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let at = rustix::fs::CWD;
    let follow = rustix::fs::AtFlags::SYMLINK_FOLLOW;
    rustix::fs::linkat(at, from, at, mount.path("named"), follow).unwrap();
    assert_eq!(fs::read(mount.path("named")).unwrap(), b"later");
    assert_eq!(fs::metadata(mount.path("named")).unwrap().ino(), file.metadata().unwrap().ino());
}
