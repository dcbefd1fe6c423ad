//! What the tests share. Nothing here asserts about byokfs, except that a step which a test needs
//! to get anywhere has worked.

pub mod kernel;
pub mod mapping;
pub mod ports;
pub mod process;
pub mod sandbox;
pub mod scan;
pub mod server;
pub mod tree;
pub mod writer;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// For what takes a moment on an idle machine: a test fails by it only if it never happens.
pub const SOON: Duration = Duration::from_secs(90);

/// Waits until `condition` holds; fails the test, naming `what`, if it never does.
#[track_caller]
pub fn until(what: &str, condition: impl FnMut() -> bool) {
    assert!(within(SOON, condition), "waited {SOON:?} for: {what}");
}

/// True as soon as `condition` holds, false after `limit`.
pub fn within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if condition() {
            return true;
        }
        if start.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// True where a real mount can be made. Says so on standard error, past the capture, where not.
pub fn can_mount() -> bool {
    if !rustix::process::geteuid().is_root() {
        return skip("needs root");
    }
    if !Path::new("/dev/fuse").exists() {
        return skip("needs /dev/fuse");
    }
    true
}

pub fn can_run_mariadb() -> bool {
    can_mount() && (has("mariadbd") || skip("needs mariadb-server"))
}

/// True where an ext4 image can be mounted.
pub fn can_loop() -> bool {
    if !can_mount() {
        return false;
    }
    let found = Command::new("losetup").arg("--find").stderr(Stdio::null()).output();
    let free = found.is_ok_and(|output| output.status.success());
    (free && has("mkfs.ext4")) || skip("needs a loop device and mkfs.ext4")
}

pub fn has(program: &str) -> bool {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/bin"]
        .iter()
        .any(|dir| Path::new(dir).join(program).exists())
}

pub fn skip(why: &str) -> bool {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    // `eprintln!` would be captured, and a passing test's output is not shown.
    let _ = writeln!(std::io::stderr(), "skipped: {test} {why}");
    false
}
