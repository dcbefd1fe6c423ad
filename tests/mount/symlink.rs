//! Symbolic links.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use crate::harness::{errno, mounted, names, shell};

#[test]
fn targets_of_every_length_come_back() {
    let mut mount = mounted!();
    let lens = [1, 11, 100, 734, 735, 736, 1000, 2000, 4095];
    for len in lens {
        symlink("t".repeat(len), mount.path(&len.to_string())).unwrap();
    }
    mount.remount("");
    for len in lens {
        let path = mount.path(&len.to_string());
        assert_eq!(fs::symlink_metadata(&path).unwrap().len(), len as u64);
        assert_eq!(fs::read_link(&path).unwrap().as_os_str().len(), len);
    }
    assert!(!shell(&mount.tree(), "find . -type l -printf '%l\\n'").contains("tttt"));
    assert_eq!(names(&mount.tree().join("../links")).len(), 4);
    for len in lens {
        fs::remove_file(mount.path(&len.to_string())).unwrap();
    }
    assert!(names(&mount.tree().join("../links")).is_empty());
    assert_eq!(errno(symlink("t".repeat(4096), mount.path("l"))), libc::ENAMETOOLONG);
}

#[test]
fn links_lead_where_they_say() {
    let mount = mounted!();
    let script = "mkdir d; echo x > d/f; ln -s d/f l; cat l; ln -s ../d d/up; cat d/up/f; \
                  ln -s nowhere n; cat n 2>/dev/null || echo none; ln l m; readlink m";
    assert_eq!(shell(&mount.root(), script), "x\nx\nnone\nd/f\n");
}

#[test]
fn looking_at_a_link_does_not_move_its_access_time() {
    let mount = mounted!();
    for len in [10, 3000] {
        let path = mount.path(&format!("l{len}"));
        symlink("t".repeat(len), &path).unwrap();
        shell(&mount.root(), &format!("touch -h -a -d '2030-01-01 00:00:00.5' l{len}"));
        let before = fs::symlink_metadata(&path).unwrap();
        shell(&mount.root(), "ls -l > /dev/null; stat * > /dev/null");
        fs::read_link(&path).unwrap();
        let after = fs::symlink_metadata(&path).unwrap();
        assert_eq!((before.atime(), before.atime_nsec()), (after.atime(), after.atime_nsec()));
    }
}

#[test]
fn a_link_has_an_owner_and_times_but_no_mode() {
    let mount = mounted!();
    symlink("x", mount.path("l")).unwrap();
    let script =
        "chown -h 7:8 l; touch -h -d '2001-02-03 04:05:06.789' l; stat -c '%a %u %g %.3Y' l";
    assert_eq!(shell(&mount.root(), script), "777 7 8 981173106.789\n");
}
