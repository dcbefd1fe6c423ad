//! Renames, also those that must not replace and those that swap.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, RenameFlags, renameat_with};

use crate::harness::{errno, mounted, names};

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> std::io::Result<()> {
    Ok(renameat_with(CWD, from, CWD, to, flags)?)
}

#[test]
fn a_rename_replaces_and_open_files_stay_what_they_were() {
    let mount = mounted!();
    let (a, b) = (mount.path("#ib_redo1_tmp"), mount.path("#ib_redo1"));
    fs::write(&a, "new").unwrap();
    fs::write(&b, "old").unwrap();
    let (old, ino) = (File::open(&b).unwrap(), fs::metadata(&a).unwrap().ino());
    fs::rename(&a, &b).unwrap();
    assert_eq!(fs::read(&b).unwrap(), b"new");
    assert_eq!(fs::metadata(&b).unwrap().ino(), ino);
    assert_eq!(std::io::read_to_string(&old).unwrap(), "old");
    assert_eq!(old.metadata().unwrap().nlink(), 0);
    assert_eq!(names(&mount.root()), ["#ib_redo1"]);
}

#[test]
fn noreplace_and_exchange() {
    let mount = mounted!();
    let (a, b, c) = (mount.path("a"), mount.path("b"), mount.path("c"));
    fs::write(&a, "a").unwrap();
    fs::write(&b, "b").unwrap();
    assert_eq!(errno(rename(&a, &b, RenameFlags::NOREPLACE)), libc::EEXIST);
    rename(&a, &c, RenameFlags::NOREPLACE).unwrap();
    rename(&b, &c, RenameFlags::EXCHANGE).unwrap();
    assert_eq!((fs::read(&b).unwrap(), fs::read(&c).unwrap()), (b"a".to_vec(), b"b".to_vec()));
    assert_eq!(errno(rename(&a, &c, RenameFlags::EXCHANGE)), libc::ENOENT);
    assert_eq!(errno(rename(&b, &c, RenameFlags::WHITEOUT)), libc::EINVAL);
}

#[test]
fn directories_move_with_what_is_in_them() {
    let mount = mounted!();
    fs::create_dir_all(mount.path("a/b")).unwrap();
    fs::create_dir_all(mount.path("empty")).unwrap();
    fs::write(mount.path("a/b/f"), "x").unwrap();
    fs::rename(mount.path("a/b"), mount.path("empty")).unwrap();
    assert_eq!(fs::read(mount.path("empty/f")).unwrap(), b"x");
    assert_eq!(errno(fs::rename(mount.path("a"), mount.path("empty"))), libc::ENOTEMPTY);
    assert_eq!(errno(fs::rename(mount.path("empty"), mount.path("empty/f/g"))), libc::ENOTDIR);
    assert_eq!(errno(fs::rename(mount.path("empty"), mount.path("empty/g"))), libc::EINVAL);
    assert_eq!(errno(fs::rename(mount.path("empty/f"), mount.path("a"))), libc::EISDIR);
}

/// The disk gives the number of a file that was never flushed to what is made after its end.
#[test]
fn what_has_the_number_of_a_new_file_that_is_gone_is_replaced_too() {
    let mount = mounted!();
    let (dir, link, fifo) = (mount.path("dir"), mount.path("link"), mount.path("fifo"));
    let number_of_a_file = || {
        let file = mount.path("file");
        fs::write(&file, "x").unwrap();
        let ino = fs::metadata(&file).unwrap().ino();
        fs::remove_file(&file).unwrap();
        ino
    };
    let mut reused = 0;
    for _ in 0..20 {
        let ino = number_of_a_file();
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("in"), "").unwrap();
        fs::create_dir(mount.path("other")).unwrap();
        assert_eq!(errno(fs::rename(mount.path("other"), &dir)), libc::ENOTEMPTY);
        reused += u32::from(fs::metadata(&dir).unwrap().ino() == ino);
        fs::remove_dir(mount.path("other")).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        number_of_a_file();
        std::os::unix::fs::symlink("target", &link).unwrap();
        number_of_a_file();
        rustix::fs::mkfifoat(CWD, &fifo, Mode::RUSR).unwrap();
        rename(&link, &fifo, RenameFlags::EXCHANGE).unwrap();
        fs::rename(&link, &fifo).unwrap();
        fs::remove_file(&fifo).unwrap();
    }
    if reused == 0 {
        eprintln!("the disk below gave no number again");
    }
}

#[test]
fn a_rename_onto_another_name_of_the_same_file_changes_nothing() {
    let mount = mounted!();
    fs::write(mount.path("a"), "x").unwrap();
    fs::hard_link(mount.path("a"), mount.path("b")).unwrap();
    fs::rename(mount.path("a"), mount.path("b")).unwrap();
    assert_eq!(names(&mount.root()), ["a", "b"]);
}
