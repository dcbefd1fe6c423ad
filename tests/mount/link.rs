//! Hard links: one inode, whatever its names.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::harness::{errno, mounted};

#[test]
fn names_of_one_file_share_content_attributes_and_number() {
    let mount = mounted!();
    let (a, b) = (mount.path("a"), mount.path("d/b"));
    fs::create_dir(mount.path("d")).unwrap();
    fs::write(&a, "one").unwrap();
    fs::hard_link(&a, &b).unwrap();
    let (first, second) = (fs::metadata(&a).unwrap(), fs::metadata(&b).unwrap());
    assert_eq!(first.ino(), second.ino());
    assert_eq!((first.nlink(), second.nlink()), (2, 2));
    fs::write(&b, "through the other").unwrap();
    assert_eq!(fs::read(&a).unwrap(), b"through the other");
    fs::remove_file(&a).unwrap();
    assert_eq!(fs::metadata(&b).unwrap().nlink(), 1);
    assert_eq!(fs::read(&b).unwrap(), b"through the other");
}

#[test]
fn a_directory_has_no_second_name() {
    let mount = mounted!();
    fs::create_dir(mount.path("d")).unwrap();
    assert_eq!(errno(fs::hard_link(mount.path("d"), mount.path("e"))), libc::EPERM);
    fs::write(mount.path("f"), "").unwrap();
    assert_eq!(errno(fs::hard_link(mount.path("f"), mount.path("d"))), libc::EEXIST);
}

#[test]
fn a_number_that_the_disk_uses_again_is_another_file() {
    let mount = mounted!();
    let mut kept = Vec::new();
    for round in 0..200 {
        let path = mount.path("f");
        fs::write(&path, format!("round {round}")).unwrap();
        let file = fs::File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        if round % 10 == 0 {
            kept.push((round, file));
        }
    }
    for (round, file) in &kept {
        let text = std::io::read_to_string(file).unwrap();
        assert_eq!(text, format!("round {round}"));
    }
}
