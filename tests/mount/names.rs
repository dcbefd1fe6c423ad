//! Names up to 255 bytes, of any bytes.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;

use crate::harness::{errno, mounted, names, shell};

fn long(len: usize) -> String {
    let mut name = "table@0023with@0023a@0023long@0023name".repeat(7);
    name.truncate(len);
    assert_eq!(name.len(), len);
    name
}

#[test]
fn every_length_up_to_255_works_and_256_does_not() {
    let mut mount = mounted!();
    let mut expected = Vec::new();
    for len in [1, 2, 174, 175, 176, 177, 200, 254, 255] {
        fs::write(mount.path(&long(len)), len.to_string()).unwrap();
        expected.push(long(len));
    }
    expected.sort();
    assert_eq!(errno(fs::write(mount.path(&"n".repeat(256)), "")), libc::ENAMETOOLONG);
    assert_eq!(names(&mount.root()), expected);
    mount.remount("");
    assert_eq!(names(&mount.root()), expected);
    for name in &expected {
        assert_eq!(fs::read(mount.path(name)).unwrap(), name.len().to_string().as_bytes());
        fs::remove_file(mount.path(name)).unwrap();
    }
    assert!(names(&mount.root()).is_empty());
    assert_eq!(names(&mount.tree()), Vec::<String>::new(), "no side file stays behind");
}

#[test]
fn long_names_can_be_anything_a_short_one_can() {
    let mount = mounted!();
    let (a, b, c) = (long(255), long(254), long(253));
    fs::create_dir(mount.path(&a)).unwrap();
    fs::write(mount.path(&a).join(&a), "inside").unwrap();
    fs::rename(mount.path(&a), mount.path(&b)).unwrap();
    fs::hard_link(mount.path(&b).join(&a), mount.path(&c)).unwrap();
    assert_eq!(fs::read(mount.path(&c)).unwrap(), b"inside");
    fs::rename(mount.path(&c), mount.path("short")).unwrap();
    std::os::unix::fs::symlink("short", mount.path(&c)).unwrap();
    assert_eq!(fs::read(mount.path(&c)).unwrap(), b"inside");
    fs::rename(mount.path("short"), mount.path(&c)).unwrap();
    assert_eq!(names(&mount.root()), [c.clone(), b.clone()]);
    fs::remove_file(mount.path(&b).join(&a)).unwrap();
    fs::remove_dir(mount.path(&b)).unwrap();
    fs::remove_file(mount.path(&c)).unwrap();
    assert_eq!(names(&mount.tree()), Vec::<String>::new());
}

#[test]
fn a_long_name_that_exists_is_not_damaged_by_a_failed_create() {
    let mount = mounted!();
    let name = long(255);
    fs::create_dir(mount.path(&name)).unwrap();
    assert_eq!(errno(fs::create_dir(mount.path(&name))), libc::EEXIST);
    assert_eq!(errno(fs::remove_file(mount.path(&name))), libc::EISDIR);
    assert_eq!(names(&mount.root()), [name]);
}

#[test]
fn a_side_file_left_by_a_crash_is_hidden_and_in_nobody_s_way() {
    let mount = mounted!();
    fs::create_dir(mount.path("d")).unwrap();
    fs::write(mount.path("d").join(long(255)), "").unwrap();
    let tree = mount.tree();
    // The entry goes, as if its creation had never got so far.
    shell(&tree, "rm ./*/%L.*; ls ./*/%N.*");
    assert!(names(&mount.path("d")).is_empty());
    fs::remove_dir(mount.path("d")).unwrap();
}

#[test]
fn names_are_bytes() {
    let mount = mounted!();
    for bytes in [&b"\xff\xfe"[..], b"a\nb", b"%L.x", b"%N.x", b" ", b"...", b"\x01"] {
        let path = mount.root().join(OsStr::from_bytes(bytes));
        fs::write(&path, bytes).unwrap();
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
    assert_eq!(fs::read_dir(mount.root()).unwrap().count(), 7);
}

#[test]
fn case_matters() {
    let mount = mounted!();
    fs::write(mount.path("Test.lower-test"), "").unwrap();
    assert!(!mount.path("test.lower-test").exists());
}
