//! Against real processes; a directory's own file system stands for the mount.

use super::*;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command};

fn device_of(path: &Path) -> Device {
    let dev = fs::metadata(path).unwrap().dev();
    Device { major: rustix::fs::major(dev), minor: rustix::fs::minor(dev) }
}

fn fence(pid_file: &Path, device: Device, timeout: Duration) -> Fence {
    let pid_file = Some(pid_file.to_owned());
    // The device that stands for the mount has other users too.
    let search = false;
    let config = config::Fence { enabled: true, pid_file, timeout, search, ..Default::default() };
    Fence::new(config, device)
}

fn shell(script: &str, dir: &str) -> Child {
    Command::new("bash").args(["-c", script]).current_dir(dir).spawn().unwrap()
}

#[test]
fn an_innocent_process_named_by_a_stale_pid_file_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let mut innocent = shell("sleep 60", "/");
    fs::write(&pid_file, innocent.id().to_string()).unwrap();
    let elsewhere = device_of(Path::new("/proc/self"));
    // The working directory of the process is not on /proc, and no file of it is.
    let fence = fence(&pid_file, elsewhere, Duration::from_secs(2));
    assert_eq!(fence.stop_server(), Outcome::NoServer);
    assert!(innocent.try_wait().unwrap().is_none());
    innocent.kill().unwrap();
    innocent.wait().unwrap();
}

/// What proc_pid_status(5) says of a process.
fn ignores_sigterm(status: &str) -> bool {
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    u64::from_str_radix(ignored.trim(), 16).unwrap() >> (libc::SIGTERM - 1) & 1 == 1
}

fn is_stopped(status: &str) -> bool {
    status.contains("State:\tT")
}

#[test]
fn sigterm_then_sigkill() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let device = device_of(Path::new("/proc/self"));
    let killed = Outcome::Stopped("SIGKILL");
    type Row = (&'static str, fn(&str) -> bool, u64, Outcome);
    let rows: [Row; 3] = [
        ("exec sleep 600", |_| true, 20, Outcome::Stopped("SIGTERM")),
        ("trap '' TERM; while :; do sleep 0.1; done", ignores_sigterm, 2, killed),
        ("kill -STOP $$", is_stopped, 2, killed),
    ];
    for (script, ready, seconds, outcome) in rows {
        let mut server = shell(script, "/proc");
        fs::write(&pid_file, server.id().to_string()).unwrap();
        let status = format!("/proc/{}/status", server.id());
        while !ready(&fs::read_to_string(&status).unwrap()) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let fence = fence(&pid_file, device, Duration::from_secs(seconds));
        assert_eq!(fence.stop_server(), outcome, "{script}");
        server.wait().unwrap();
    }
}

#[test]
fn a_restarted_server_is_stopped_too() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let device = device_of(Path::new("/proc/self"));
    let mut server = shell("exec sleep 60", "/proc");
    fs::write(&pid_file, server.id().to_string()).unwrap();
    let fence = fence(&pid_file, device, Duration::from_secs(2));
    fence.linger(Duration::from_secs(1), || false);
    assert!(server.try_wait().unwrap().is_some());
}

#[test]
fn without_a_fence_nothing_is_looked_for() {
    let device = device_of(Path::new("/proc/self"));
    assert_eq!(Fence::new(config::Fence::default(), device).stop_server(), Outcome::Off);
}

/// It writes its own pid file and starts the server again whenever that ends, as systemd would.
#[test]
fn a_server_that_its_supervisor_starts_again_and_again_is_stopped_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let (pid_file, starts) = (dir.path().join("pid"), dir.path().join("starts"));
    let device = device_of(Path::new("/proc/self"));
    let script = format!(
        "while :; do (cd /proc && exec sleep 60) & echo $! >'{}'; echo x >>'{}'; wait; done",
        pid_file.display(),
        starts.display()
    );
    let mut supervisor = shell(&script, "/");
    let started = || fs::read_to_string(&starts).unwrap_or_default().lines().count();
    let limit = Instant::now() + Duration::from_secs(30);
    let fence = fence(&pid_file, device, Duration::from_secs(2));
    fence.linger(Duration::from_secs(30), || started() > 3 || Instant::now() > limit);
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
    assert!(started() > 3, "{}", started());
    // The last one lives: it was started when the linger was over.
    let last = Process::named_by(&pid_file).unwrap();
    last.signal(Signal::KILL).unwrap();
}
