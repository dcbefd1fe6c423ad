//! A backing directory that is full, read-only, or gone.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use crate::support::process::{Answer, run};
use crate::support::sandbox::{Sandbox, mounted, path};
use crate::support::{can_loop, can_mount, tree, until};

/// A sandbox whose backing directory is an ext4 file system of its own.
struct OnImage {
    sandbox: Sandbox,
}

impl OnImage {
    fn new(megabytes: u64) -> OnImage {
        let sandbox = Sandbox::bare();
        let image = sandbox.path("image");
        File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
        run("mkfs.ext4", &["-q", "-m", "0", "-F", path(&image)]);
        fs::create_dir(sandbox.path("disk")).unwrap();
        let image = OnImage { sandbox };
        image.attach("rw");
        fs::create_dir(image.back()).unwrap();
        image
    }

    fn back(&self) -> PathBuf {
        self.sandbox.path("disk").join("back")
    }

    fn attach(&self, mode: &str) {
        let (image, disk) = (self.sandbox.path("image"), self.sandbox.path("disk"));
        run("mount", &["-o", &format!("loop,{mode}"), path(&image), path(&disk)]);
    }

    fn detach(&self) {
        let disk = self.sandbox.path("disk");
        // Whoever looks through /proc at this moment keeps it busy for that long.
        let free = || Answer::of(Command::new("umount").arg(&disk)).code == Some(0);
        until("the disk to be free", free);
    }

    fn init_and_mount(&self) {
        self.sandbox.byokfs(&["init", path(&self.back()), "--kek", &self.sandbox.kek()]).ok();
        self.mount();
    }

    fn mount(&self) {
        self.sandbox.byokfs(&["mount", path(&self.back()), path(&self.sandbox.mnt())]).ok();
    }
}

impl Drop for OnImage {
    fn drop(&mut self) {
        if self.sandbox.is_mounted() {
            let _ = self.sandbox.byokfs(&["umount", path(&self.sandbox.mnt())]);
        }
        if self.sandbox.is_mounted() {
            run("umount", &["--lazy", path(&self.sandbox.mnt())]);
        }
        if mounted(&self.sandbox.path("disk")) {
            run("umount", &["--lazy", path(&self.sandbox.path("disk"))]);
        }
    }
}

#[test]
fn a_full_disk_is_enospc_and_harms_no_file() {
    if !can_loop() {
        return;
    }
    let image = OnImage::new(48);
    image.init_and_mount();
    let mnt = image.sandbox.mnt();
    let content: Vec<u8> = (0..3_000_000u32).map(|at| (at >> 4) as u8).collect();
    fs::write(mnt.join("before"), &content).unwrap();
    File::open(mnt.join("before")).unwrap().sync_all().unwrap();

    let growing = File::create(mnt.join("growing")).unwrap();
    let piece = vec![0x5a; 100_000];
    let mut written = 0u64;
    let error = loop {
        match growing.write_at(&piece, written) {
            Ok(count) => written += count as u64,
            Err(error) => break error,
        }
        assert!(written < 64 << 20, "more than the disk holds");
    };
    assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
    // What was acknowledged is there; so is every other file, also an overwrite in place.
    let check = |len: u64| {
        let found = fs::read(mnt.join("growing")).unwrap();
        assert_eq!(found.len() as u64, len);
        assert!(found.iter().all(|byte| *byte == 0x5a));
        assert!(fs::read(mnt.join("before")).unwrap() == content);
    };
    check(written);
    File::options()
        .write(true)
        .open(mnt.join("before"))
        .unwrap()
        .write_all_at(&content[..50_000], 0)
        .unwrap();
    // A later failure grows nothing either.
    assert!(growing.write_at(&piece, written + 1_000_000).is_err());
    check(written);
    drop(growing);
    image.sandbox.umount();
    image.mount();
    check(written);
    fs::remove_file(mnt.join("growing")).unwrap();
    // The kernel tells of the last use of a file when it comes round to it.
    until("the space of the removed file", || fs::write(mnt.join("after"), &content).is_ok());
    assert!(fs::read(mnt.join("after")).unwrap() == content);
}

#[test]
fn a_read_only_disk_is_refused_or_served_read_only() {
    if !can_loop() {
        return;
    }
    let image = OnImage::new(48);
    image.init_and_mount();
    fs::write(image.sandbox.mnt().join("file"), "content").unwrap();
    image.sandbox.umount();
    image.detach();
    image.attach("ro");
    let (back, mnt) = (image.back(), image.sandbox.mnt());
    let before = tree::fingerprint(&back);
    let message = image.sandbox.byokfs(&["mount", path(&back), path(&mnt)]).fails(1);
    assert!(message.contains("read-only") || message.contains("Read-only"), "{message}");
    assert!(!image.sandbox.is_mounted());
    image.sandbox.byokfs(&["mount", path(&back), path(&mnt), "-o", "ro"]).ok();
    assert_eq!(fs::read_to_string(mnt.join("file")).unwrap(), "content");
    assert_eq!(
        fs::write(mnt.join("file"), "x").unwrap_err().kind(),
        io::ErrorKind::ReadOnlyFilesystem
    );
    image.sandbox.umount();
    assert_eq!(tree::fingerprint(&back), before);
}

#[test]
fn a_disk_that_turns_read_only_answers_an_error_and_keeps_what_there_is() {
    if !can_loop() {
        return;
    }
    let image = OnImage::new(48);
    image.init_and_mount();
    let mnt = image.sandbox.mnt();
    fs::write(mnt.join("file"), "content").unwrap();
    image.sandbox.byokfs(&["sync", path(&mnt)]).ok();
    let disk = image.sandbox.path("disk");
    // As ext4 does by itself after an error of its own; the daemon holds files open for writing,
    // so an ordinary remount is refused.
    run("mount", &["-o", "remount,abort", path(&disk)]);
    assert!(fs::write(mnt.join("new"), "x").is_err());
    match fs::read_to_string(mnt.join("file")) {
        Ok(text) => assert_eq!(text, "content"),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem),
    }
    // The last flush fails, and says so; the mount goes all the same.
    let _ = image.sandbox.byokfs(&["umount", path(&mnt)]);
    assert!(!image.sandbox.is_mounted());
    image.detach();
    image.attach("rw");
    image.mount();
    assert_eq!(fs::read_to_string(mnt.join("file")).unwrap(), "content");
    assert!(!mnt.join("new").exists());
}

#[test]
fn a_backing_directory_that_is_gone() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::bare();
    sandbox.init().ok();
    let (back, mnt) = (sandbox.back(), sandbox.mnt());
    fs::rename(&back, sandbox.path("elsewhere")).unwrap();
    for verb in [&["mount", path(&back), path(&mnt)][..], &["info", path(&back)]] {
        let message = sandbox.byokfs(verb).fails(1);
        assert!(message.contains(path(&back)), "{message}");
    }
    assert!(!sandbox.is_mounted());
}
