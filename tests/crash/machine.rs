//! What a power cut takes down, and what comes up again: a disk that loses what was not flushed, a
//! loop device with direct I/O, ext4 or XFS, and on it a byokfs volume, or nothing more.
//!
//! Each time on it is new from the loop device up, so that nothing of the machine before reaches
//! the disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::disk::Disk;
use crate::disk::medium::{Cut, Plan};
use crate::options::Options;
use crate::support::process::{Answer, run};
use crate::support::sandbox::{Sandbox, mounted, path};
use crate::support::until;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    Ext4,
    Xfs,
}

impl FileSystem {
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
        }
    }

    /// What the disk below writes in one piece. XFS logs parts of its blocks of metadata and writes them
    /// in place: of one that is torn it says that its checksum is wrong, and does not mount.
    fn sector(self) -> u64 {
        match self {
            FileSystem::Ext4 => 512,
            FileSystem::Xfs => 4096,
        }
    }
}

pub struct Drive {
    image: PathBuf,
    file_system: FileSystem,
    /// Where the disk's one file shows, and where the file system on it does.
    media: PathBuf,
    mnt: PathBuf,
    disk: Option<Disk>,
    loop_device: String,
}

impl Drive {
    /// Formatted and mounted at `mnt`. `dir` has room for the image.
    pub fn new(dir: &Path, mnt: &Path, file_system: FileSystem, megabytes: u64) -> Drive {
        let (image, media) = (dir.join("image"), dir.join("media"));
        fs::File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
        for made in [&media, mnt] {
            fs::create_dir_all(made).unwrap();
        }
        let mnt = mnt.to_owned();
        let mut drive =
            Drive { image, file_system, media, mnt, disk: None, loop_device: String::new() };
        drive.plug_in();
        match file_system {
            FileSystem::Ext4 => run("mkfs.ext4", &["-q", "-m", "0", &drive.loop_device]),
            FileSystem::Xfs => run("mkfs.xfs", &["-q", &drive.loop_device]),
        };
        drive.mount();
        drive
    }

    pub fn image(&self) -> &Path {
        &self.image
    }

    pub fn disk(&self) -> &Disk {
        self.disk.as_ref().expect("the power is off")
    }

    /// Comes up again with what the disk held.
    pub fn power_on(&mut self) {
        self.plug_in();
        self.mount();
    }

    fn plug_in(&mut self) {
        let disk = Disk::attach(&self.image, &self.media, self.file_system.sector())
            .expect("cannot mount the test's disk");
        let file = disk.file();
        self.disk = Some(disk);
        let made = run("losetup", &["--find", "--show", "--direct-io=on", path(&file)]);
        self.loop_device = made.trim().to_owned();
        let direct = run("losetup", &["--noheadings", "--output", "DIO", &self.loop_device]);
        assert_eq!(direct.trim(), "1", "the loop device does no direct I/O");
    }

    fn mount(&self) {
        let options = match self.file_system {
            FileSystem::Ext4 => "rw",
            // One of the same identity may not be gone altogether yet.
            FileSystem::Xfs => "rw,nouuid",
        };
        run("mount", &["-o", options, &self.loop_device, path(&self.mnt)]);
        // From now on it goes when the file system does, whatever becomes of this process.
        run("losetup", &["--detach", &self.loop_device]);
    }

    pub fn cut(&self) -> Option<Cut> {
        self.disk().medium().cut()
    }

    /// Takes the dead machine away. Nothing may use the file system any more.
    #[track_caller]
    pub fn take_down(&mut self) {
        until("the file system on the dead disk to be unmounted", || {
            !mounted(&self.mnt) || Answer::of(Command::new("umount").arg(&self.mnt)).code == Some(0)
        });
        let backing = format!("/sys/block/{}/loop", self.loop_device.trim_start_matches("/dev/"));
        until("the loop device to go", || !Path::new(&backing).exists());
        self.disk = None;
    }
}

impl Drive {
    /// At the end, whatever state it is in.
    fn detach(&mut self) {
        if mounted(&self.mnt) {
            let _ = Answer::of(Command::new("umount").arg("--lazy").arg(&self.mnt));
        } else if self.disk.is_some() {
            // Only if it was never mounted is the loop device still bound.
            let _ = Answer::of(Command::new("losetup").args(["--detach", &self.loop_device]));
        }
        self.disk = None;
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        self.detach();
    }
}

/// A machine with a byokfs volume on such a drive. The key vault and the configuration are not on
/// the drive: they are another machine's, and what a host keeps elsewhere.
pub struct Machine {
    pub sandbox: Sandbox,
    pub drive: Drive,
    /// No volume: the load is on the file system itself.
    plain: bool,
}

impl Machine {
    pub fn new(options: &Options, file_system: FileSystem, megabytes: u64) -> Machine {
        let mut sandbox = Sandbox::bare();
        let dir = options.image_dir.clone().unwrap_or_else(|| sandbox.path(""));
        let drive = Drive::new(&dir, &sandbox.path("drive"), file_system, megabytes);
        if options.plain {
            return Machine { sandbox, drive, plain: true };
        }
        let back = sandbox.path("drive").join("back");
        fs::create_dir(&back).unwrap();
        sandbox.set_back(back);
        let sandbox = sandbox.and_mounted("");
        Machine { sandbox, drive, plain: false }
    }

    pub fn mnt(&self) -> PathBuf {
        if self.plain { self.drive.mnt.clone() } else { self.sandbox.mnt() }
    }

    /// What was done so far has been there for long.
    pub fn settle(&self) {
        if !self.plain {
            self.sandbox.byokfs(&["sync", path(&self.sandbox.mnt())]).ok();
        }
        run("sync", &["--file-system", path(&self.drive.mnt)]);
    }

    /// After a cut: the processes die, the machine is gone.
    #[track_caller]
    pub fn take_down(&mut self) {
        assert!(self.sandbox.kill_everything(), "a killed daemon does not end");
        if self.sandbox.is_mounted() {
            run("umount", &["--lazy", path(&self.sandbox.mnt())]);
        }
        self.drive.take_down();
    }

    /// With the recovery of the file system and of the volume. The power may fail again on the
    /// way: then it is false.
    #[track_caller]
    pub fn power_on(&mut self, plan: Option<Plan>) -> bool {
        self.drive.power_on();
        if self.plain {
            return true;
        }
        let may_fail = plan.is_some();
        if let Some(plan) = plan {
            self.drive.disk().medium().plan(plan);
        }
        let answer = self.sandbox.try_mount();
        let mut medium = self.drive.disk().medium();
        if may_fail && medium.cut().is_some() {
            return false;
        }
        medium.forget_plan();
        drop(medium);
        answer.ok();
        true
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.sandbox.kill_everything();
        if self.sandbox.is_mounted() {
            let _ = Answer::of(Command::new("umount").arg("--lazy").arg(self.sandbox.mnt()));
        }
        self.drive.detach();
    }
}
