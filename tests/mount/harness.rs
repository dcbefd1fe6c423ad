//! A volume mounted for one test.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use byokfs::backing::Backing;
use byokfs::backing::fault::{Call, FaultBacking, ORDERED_PANIC};
use byokfs::backing::linux::LinuxBacking;
use byokfs::crypto::secret::Secret;
use byokfs::fuse::{self, CutOffErrno, MountOptions, Transport};
use byokfs::key::clock::BootTime;
use byokfs::key::gate::{Gate, Keyring};
use byokfs::key::reason::Reason;
use byokfs::store::{FormatOptions, Store};
use byokfs::vfs::audit::LogOnly;
use byokfs::vfs::types::ROOT;
use byokfs::vfs::{Filesystem, FilesystemOptions};

const DIR: &str = "BYOKFS_TEST_DIR";
const OPTIONS: &str = "BYOKFS_TEST_OPTIONS";
/// The transport that the daemon would take: so one variable sets that of all tests.
const TRANSPORT: &str = "BYOKFS_MOUNT_TRANSPORT";

/// A mounted volume; unmounted and removed when dropped.
pub(crate) struct Mount {
    server: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    dir: tempfile::TempDir,
}

/// Mounts, or says why it cannot and returns from the test.
macro_rules! mounted {
    () => {
        mounted!("")
    };
    ($options:expr) => {
        match crate::harness::Mount::new($options) {
            Ok(mount) => mount,
            Err(reason) => {
                eprintln!("skipped: {reason}");
                return;
            }
        }
    };
}
pub(crate) use mounted;

impl Mount {
    /// `options`: words of `ro`, `key` (the cut-off errno of its name).
    pub(crate) fn new(options: &str) -> Result<Mount, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("mounting needs root".into());
        }
        if !Path::new("/dev/fuse").exists() {
            return Err("there is no /dev/fuse".into());
        }
        let dir = tempfile::Builder::new().prefix("byokfs-mount-").tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(dir.path().join("back")).unwrap();
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let (server, commands, answers) = serve_from(dir.path(), options);
        let mut mount = Mount { server, commands, answers, dir };
        mount.expect("ready");
        Ok(mount)
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// The encrypted tree.
    pub(crate) fn tree(&self) -> PathBuf {
        self.dir.path().join("back/tree")
    }

    /// Cuts the volume off as the daemon does.
    pub(crate) fn cut_off(&mut self) {
        self.command("cut-off");
    }

    /// The next call of this kind to the disk panics: "read", "write" or "name".
    pub(crate) fn panic_in(&mut self, call: &str) {
        self.command(&format!("panic-in-{call}"));
    }

    /// Brings it back.
    pub(crate) fn revalidate(&mut self) {
        self.command("revalidate");
    }

    /// Has the server look up, and forget, files `f0` to `f499` of the directory `d`.
    pub(crate) fn look_up(&mut self, times: usize) {
        self.command(&format!("look-up {times}"));
    }

    /// Bytes of the server's memory.
    pub(crate) fn resident(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.server.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    }

    /// Ends the server and mounts the volume anew.
    pub(crate) fn remount(&mut self, options: &str) {
        self.stop();
        let (server, commands, answers) = serve_from(self.dir.path(), options);
        (self.server, self.commands, self.answers) = (server, commands, answers);
        self.expect("ready");
    }

    fn command(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
        self.expect("done");
    }

    fn expect(&mut self, expected: &str) {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "the server ended");
            // The test harness of the server's process writes lines of its own.
            if line.trim_end().ends_with(expected) {
                return;
            }
            assert!(!line.contains("panicked"), "{line}");
        }
    }

    fn stop(&mut self) {
        if writeln!(self.commands, "unmount").is_ok() {
            // A busy mount is the test's mistake, and shows as an error of the server.
            let _ = self.server.wait();
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.stop();
    }
}

fn serve_from(dir: &Path, options: &str) -> (Child, ChildStdin, BufReader<ChildStdout>) {
    let mut server = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--nocapture", "harness::serve"])
        .env(DIR, dir)
        .env(OPTIONS, options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let commands = server.stdin.take().unwrap();
    let answers = BufReader::new(server.stdout.take().unwrap());
    (server, commands, answers)
}

fn keyring() -> Keyring {
    Keyring::new(1, Secret::new_with(|key| key.fill(7)).unwrap())
}

fn soon() -> BootTime {
    BootTime::now() + Duration::from_secs(3600)
}

/// A panic that a test asked for says nothing; any other says all.
fn quiet_about_ordered_panics() {
    let loud = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload().downcast_ref::<String>();
        let ordered = text.is_some_and(|text| text.starts_with(ORDERED_PANIC));
        if !ordered {
            loud(info);
        }
    }));
}

/// Not a test: the process that serves one.
#[test]
#[ignore = "run by the tests that mount"]
fn serve() {
    let Some(dir) = std::env::var_os(DIR).map(PathBuf::from) else { return };
    let options = std::env::var(OPTIONS).unwrap();
    let read_only = options.contains("ro");
    quiet_about_ordered_panics();
    rustix::process::umask(rustix::fs::Mode::empty());
    let backing: Arc<dyn Backing> = LinuxBacking::open(&dir.join("back")).unwrap();
    if !dir.join("back/tree").exists() {
        let options = FormatOptions { log_size: Some(32 << 20), ..FormatOptions::default() };
        Store::format(&*backing, &keyring(), options).unwrap();
    }
    let (backing, faults) = FaultBacking::new(backing);
    let backing: Arc<dyn Backing> = backing;
    let gate = Gate::new();
    let store = Store::open(Arc::clone(&backing), Arc::clone(&gate), read_only).unwrap();
    store.start_session(&keyring()).unwrap();
    assert!(gate.open(keyring(), soon()));
    store.recover().unwrap();
    store.start_background(|reason| println!("{reason}")).unwrap();
    let fs = Filesystem::new(
        Arc::clone(&store),
        backing,
        Arc::clone(&gate),
        Arc::new(LogOnly),
        FilesystemOptions { read_only },
    );
    let mut mount_options =
        MountOptions::new(dir.join("back").display().to_string(), dir.join("mnt"));
    mount_options.read_only = read_only;
    if options.contains("key") {
        mount_options.errno = CutOffErrno::Key;
    }
    mount_options.transport = match std::env::var(TRANSPORT).as_deref() {
        Ok("uring") => Transport::Uring,
        Ok("dev") => Transport::Dev,
        Ok("auto") | Err(_) => Transport::Auto,
        Ok(other) => panic!("no such transport: {other}"),
    };
    let mounted = fuse::mount(Arc::clone(&fs), &mount_options).unwrap();
    let wanted = mount_options.transport;
    assert!(wanted == Transport::Auto || wanted == mounted.transport());
    let purge = mounted.purge();
    println!("\nready");
    let limit = Duration::from_secs(10);
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "cut-off" => {
                assert!(purge.write_back(limit));
                gate.shut(Reason::KeyDisabled);
                assert!(gate.drain(limit));
                gate.wipe();
                assert!(purge.drop_all(limit));
            }
            "revalidate" => {
                store.start_session(&keyring()).unwrap();
                assert!(gate.open(keyring(), soon()));
            }
            "sync" => {
                store.checkpoint().unwrap();
                store.sync_all().unwrap();
            }
            "panic-in-read" => faults.arm_panic(Call::Read),
            "panic-in-write" => faults.arm_panic(Call::Write),
            "panic-in-name" => faults.arm_panic(Call::Name),
            "unmount" => break,
            other if other.starts_with("look-up ") => {
                look_up(&fs, other["look-up ".len()..].parse().unwrap());
            }
            other => panic!("no such command: {other}"),
        }
        println!("\ndone");
    }
    // The test's process may still be closing its files.
    for _ in 0..100 {
        if mounted.unmount(false).is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = mounted.unmount(true);
    mounted.wait_timeout(limit);
    if gate.check().is_ok()
        && let Err(error) = store.checkpoint()
    {
        println!("not brought home: {error}");
    }
}

fn look_up(fs: &Filesystem, times: usize) {
    let dir = fs.lookup(ROOT, b"d").unwrap().node;
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for index in 0..times / 4 {
                    let name = format!("f{}", (index + thread * 125) % 500);
                    let entry = fs.lookup(dir, name.as_bytes()).unwrap();
                    fs.forget(entry.node, 1);
                }
            });
        }
    });
    fs.forget(dir, 1);
}

/// Runs a shell script as someone, in `dir`.
pub(crate) fn shell_as(uid: u32, gid: u32, dir: &Path, script: &str) -> Output {
    let (uid, gid) = (format!("--reuid={uid}"), format!("--regid={gid}"));
    Command::new("setpriv")
        .args([&uid, &gid, "--clear-groups", "/bin/sh", "-ec", script])
        .current_dir(dir)
        .output()
        .unwrap()
}

/// Runs a shell script as root, and returns what it printed; fails if it does.
pub(crate) fn shell(dir: &Path, script: &str) -> String {
    let output = Command::new("/bin/sh").args(["-ec", script]).current_dir(dir).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// The errno of a failed call.
pub(crate) fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.expect_err("it should have failed").raw_os_error().expect("an errno")
}

/// What is in a directory, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| name(e).into_string().unwrap()).collect();
    names.sort();
    names
}
