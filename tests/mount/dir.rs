//! Directories: large ones, and what a listing promises while they change.

use std::collections::HashSet;
use std::fs::{self, File};

use crate::harness::{errno, mounted, names, shell};

#[test]
fn a_hundred_thousand_entries_are_listed_once_each() {
    let mount = mounted!();
    let count = 100_000;
    let pipe = rustix::fs::FileType::Fifo;
    for index in 0..count {
        let path = mount.path(&format!("file-{index}"));
        // Files cost a header each; what counts here is the directory.
        if index % 10 == 0 {
            File::create(path).unwrap();
        } else {
            rustix::fs::mknodat(rustix::fs::CWD, path, pipe, rustix::fs::Mode::RUSR, 0).unwrap();
        }
    }
    let listed: Vec<String> = names(&mount.root());
    assert_eq!(listed.len(), count);
    assert_eq!(listed.iter().collect::<HashSet<_>>().len(), count);
    let counted = shell(&mount.root(), "ls -f | wc -l; ls -l | wc -l");
    assert_eq!(counted, format!("{}\n{}\n", count + 2, count + 1));
    shell(&mount.root(), "find . -name 'file-*' -delete; ls -A | wc -l");
}

#[test]
fn a_listing_goes_on_while_its_entries_are_removed() {
    let mount = mounted!();
    for index in 0..5000 {
        File::create(mount.path(&format!("f{index}"))).unwrap();
    }
    let mut seen = HashSet::new();
    for entry in fs::read_dir(mount.root()).unwrap() {
        let entry = entry.unwrap();
        assert!(seen.insert(entry.file_name()), "{:?} twice", entry.file_name());
        fs::remove_file(entry.path()).unwrap();
    }
    assert_eq!(seen.len(), 5000);
    assert!(names(&mount.root()).is_empty());
}

#[test]
fn a_position_can_be_gone_back_to() {
    let mount = mounted!();
    for index in 0..300 {
        File::create(mount.path(&format!("f{index}"))).unwrap();
    }
    let script = "import os,ctypes; c=ctypes.CDLL(None); c.opendir.restype=ctypes.c_void_p\n\
        c.readdir.restype=ctypes.c_void_p; c.telldir.restype=ctypes.c_long\n\
        p=ctypes.c_void_p\n\
        d=p(c.opendir(b'.')); n=lambda: (lambda e: ctypes.string_at(e+19) if e else None)(c.readdir(d))\n\
        first=[n() for _ in range(100)]; at=c.telldir(d); rest=[]\n\
        while (e:=n()): rest.append(e)\n\
        c.seekdir(d,ctypes.c_long(at)); again=[]\n\
        while (e:=n()): again.append(e)\n\
        assert rest==again and len(rest)==202, (len(rest),len(again))\n\
        c.rewinddir(d); assert [n() for _ in range(100)]==first\n";
    fs::write("/tmp/byokfs-seekdir.py", script).unwrap();
    shell(&mount.root(), "python3 /tmp/byokfs-seekdir.py");
}

#[test]
fn only_an_empty_directory_is_removed() {
    let mount = mounted!();
    fs::create_dir_all(mount.path("a/b")).unwrap();
    assert_eq!(errno(fs::remove_dir(mount.path("a"))), libc::ENOTEMPTY);
    assert_eq!(errno(fs::remove_file(mount.path("a"))), libc::EISDIR);
    fs::remove_dir(mount.path("a/b")).unwrap();
    fs::remove_dir(mount.path("a")).unwrap();
    assert_eq!(errno(fs::remove_dir(mount.path("a"))), libc::ENOENT);
}

#[test]
fn links_and_parents_are_counted_and_named() {
    let mount = mounted!();
    let script = "mkdir a a/b a/c; stat -c %h a; ls -di a a/b/.. | awk '{print $1}' | uniq | wc -l";
    assert_eq!(shell(&mount.root(), script), "4\n1\n");
}

#[test]
fn fsync_of_a_directory_is_real() {
    let mount = mounted!();
    File::open(mount.root()).unwrap().sync_all().unwrap();
}

#[test]
fn the_file_system_s_numbers_are_the_disk_s() {
    let mount = mounted!();
    let ours = rustix::fs::statvfs(mount.root()).unwrap();
    let disk = rustix::fs::statvfs(mount.tree()).unwrap();
    assert_eq!((ours.f_blocks, ours.f_files), (disk.f_blocks, disk.f_files));
    assert_eq!(ours.f_frsize, disk.f_frsize);
    assert_eq!(ours.f_namemax, 255);
    assert!(ours.f_bavail > 0);
}

#[test]
fn what_byokfs_did_not_write_is_not_listed() {
    let mount = mounted!();
    fs::write(mount.path("mine"), "x").unwrap();
    fs::write(mount.tree().join("stranger"), "x").unwrap();
    assert_eq!(names(&mount.root()), ["mine"]);
}
