//! Extended attributes.

use std::fs;
use std::path::Path;

use rustix::fs::{XattrFlags, getxattr, lgetxattr, listxattr, lsetxattr, removexattr, setxattr};

use crate::harness::{mounted, shell, shell_as};

fn list(path: &Path) -> Vec<String> {
    let mut buf = vec![0; 65_536];
    let len = listxattr(path, &mut buf).unwrap();
    let mut names: Vec<String> = buf[..len]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8(name.to_vec()).unwrap())
        .collect();
    names.sort();
    names
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn values_come_back_and_are_not_on_the_disk() {
    let mut mount = mounted!();
    let path = mount.path("f");
    fs::write(&path, "").unwrap();
    setxattr(&path, "user.canary", b"the canary's value", XattrFlags::empty()).unwrap();
    setxattr(&path, "user.empty", b"", XattrFlags::empty()).unwrap();
    setxattr(&path, "trusted.t", b"t", XattrFlags::empty()).unwrap();
    mount.remount("");
    let mut buf = [0; 100];
    let len = getxattr(&path, "user.canary", &mut buf).unwrap();
    assert_eq!(&buf[..len], b"the canary's value");
    assert_eq!(getxattr(&path, "user.empty", &mut buf).unwrap(), 0);
    assert_eq!(list(&path), ["trusted.t", "user.canary", "user.empty"]);
    let disk = shell(&mount.tree(), "getfattr -d -m - -e hex ./* 2>&1");
    assert!(disk.contains("trusted.byokfs.") && !disk.contains(&hex(b"canary")), "{disk}");
    removexattr(&path, "user.canary").unwrap();
    let gone = getxattr(&path, "user.canary", &mut buf).unwrap_err();
    assert_eq!(gone.raw_os_error(), libc::ENODATA);
}

#[test]
fn create_replace_and_sizes() {
    let mount = mounted!();
    let path = mount.path("f");
    fs::write(&path, "").unwrap();
    let set = |value: &[u8], flags| {
        setxattr(&path, "user.a", value, flags).map_err(|error| error.raw_os_error())
    };
    assert_eq!(set(b"1", XattrFlags::REPLACE), Err(libc::ENODATA));
    assert_eq!(set(b"1", XattrFlags::CREATE), Ok(()));
    assert_eq!(set(b"2", XattrFlags::CREATE), Err(libc::EEXIST));
    assert_eq!(set(b"1234567890", XattrFlags::REPLACE), Ok(()));
    let error = getxattr(&path, "user.a", &mut [0; 5]).unwrap_err();
    assert_eq!(error.raw_os_error(), libc::ERANGE);
    let other = setxattr(&path, "system.other", b"", XattrFlags::empty()).unwrap_err();
    assert_eq!(other.raw_os_error(), libc::EOPNOTSUPP);
}

#[test]
fn links_and_directories_have_attributes_too() {
    let mount = mounted!();
    std::os::unix::fs::symlink("nowhere", mount.path("l")).unwrap();
    fs::create_dir(mount.path("d")).unwrap();
    lsetxattr(mount.path("l"), "trusted.a", b"1", XattrFlags::empty()).unwrap();
    setxattr(mount.path("d"), "user.a", b"2", XattrFlags::empty()).unwrap();
    let mut buf = [0; 10];
    assert_eq!(lgetxattr(mount.path("l"), "trusted.a", &mut buf).unwrap(), 1);
    assert_eq!(getxattr(mount.path("d"), "user.a", &mut buf).unwrap(), 1);
    let user = lsetxattr(mount.path("l"), "user.a", b"1", XattrFlags::empty()).unwrap_err();
    assert_eq!(user.raw_os_error(), libc::EPERM);
}

#[test]
fn trusted_attributes_are_for_root() {
    let mount = mounted!();
    let root = mount.root();
    shell(
        &root,
        "chmod 777 .; touch f; chmod 666 f; setfattr -n trusted.t -v 1 f; \
                  setfattr -n user.u -v 1 f",
    );
    let output = shell_as(3001, 3001, &root, "getfattr -m - f");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("user.u") && !text.contains("trusted"), "{text}");
}
