//! The fence against a real MariaDB server, stage by stage. The file system of a temporary
//! directory stands for the mount. Needs root, and mariadbd.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use byokfs::config;
use byokfs::daemon::fence::{Fence, Outcome};
use byokfs::daemon::mountinfo::Device;

const TIMEOUT: Duration = Duration::from_secs(8);

struct Server {
    dir: tempfile::TempDir,
}

impl Server {
    fn install() -> Server {
        let dir = tempfile::tempdir().unwrap();
        run(Command::new("chown").arg("mysql:mysql").arg(dir.path()));
        let server = Server { dir };
        run(Command::new("setpriv")
            .args(["--reuid=mysql", "--regid=mysql", "--clear-groups", "mariadb-install-db"])
            .args(["--no-defaults", "--skip-test-db", "--auth-root-authentication-method=normal"])
            .arg(format!("--datadir={}", server.path("data").display()))
            // Its own: names of temporary tables are made of the process's number.
            .env("TMPDIR", server.dir.path())
            .stdout(Stdio::null()));
        server
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&self) -> Child {
        let mut child = Command::new("setpriv")
            .args(["--reuid=mysql", "--regid=mysql", "--clear-groups", "mariadbd"])
            .args(["--no-defaults", "--skip-networking", "--innodb-buffer-pool-size=32M"])
            .arg(format!("--datadir={}", self.path("data").display()))
            .arg(format!("--socket={}", self.path("sock").display()))
            .arg(format!("--pid-file={}", self.path("pid").display()))
            .env("TMPDIR", self.dir.path())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while !self.sql("SELECT 1").status().unwrap().success() {
            assert!(start.elapsed() < Duration::from_secs(60), "mariadbd does not start");
            assert!(child.try_wait().unwrap().is_none(), "mariadbd has ended");
            std::thread::sleep(Duration::from_millis(100));
        }
        child
    }

    fn sql(&self, statement: &str) -> Command {
        let mut client = Command::new("mariadb");
        client
            .args(["--no-defaults", "-uroot", "-e", statement])
            .arg(format!("--socket={}", self.path("sock").display()))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        client
    }

    fn fence(&self, password: &str) -> Fence {
        let option_file = self.path("fence.cnf");
        fs::write(&option_file, format!("[client]\nuser=fence\npassword={password}\n")).unwrap();
        let dev = fs::metadata(self.dir.path()).unwrap().dev();
        let device = Device { major: rustix::fs::major(dev), minor: rustix::fs::minor(dev) };
        let config = config::Fence {
            enabled: true,
            socket: Some(self.path("sock")),
            pid_file: Some(self.path("pid")),
            option_file: Some(option_file),
            // The device has other users too.
            search: false,
            timeout: TIMEOUT,
        };
        Fence::new(config, device)
    }
}

fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

fn stop(fence: &Fence) -> (Outcome, Duration) {
    let start = Instant::now();
    let outcome = fence.stop_server();
    (outcome, start.elapsed())
}

#[test]
fn every_stage_on_a_real_server() {
    if !rustix::process::geteuid().is_root() || !Path::new("/usr/sbin/mariadbd").exists() {
        eprintln!("skipped: needs root and mariadbd");
        return;
    }
    let server = Server::install();

    // Clean shutdown, although a session is busy and others may not do it.
    let mut child = server.start();
    run(&mut server.sql(
        "CREATE USER fence@localhost IDENTIFIED BY 'right'; \
         GRANT SHUTDOWN, CONNECTION ADMIN, PROCESS ON *.* TO fence@localhost",
    ));
    let mut session = server.sql("SELECT SLEEP(600)").spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let (outcome, took) = stop(&server.fence("right"));
    assert_eq!(outcome, Outcome::Stopped("SHUTDOWN"), "{took:?}");
    assert!(!session.wait().unwrap().success());
    assert!(child.wait().unwrap().success());

    // A dead account: SIGTERM, which is a clean shutdown too.
    let mut child = server.start();
    let (outcome, took) = stop(&server.fence("wrong"));
    assert_eq!(outcome, Outcome::Stopped("SIGTERM"), "{took:?}");
    assert!(child.wait().unwrap().success());

    // A server that hangs: within the timeout all the same.
    let mut child = server.start();
    let pid = child.id().to_string();
    run(Command::new("kill").args(["-STOP", &pid]));
    let (outcome, took) = stop(&server.fence("right"));
    assert_eq!(outcome, Outcome::Stopped("SIGKILL"));
    assert!(took < TIMEOUT, "{took:?}");
    assert!(!child.wait().unwrap().success());

    // A supervisor starts it again: it is stopped again.
    let mut child = server.start();
    server.fence("right").linger(Duration::from_secs(4), || false);
    assert!(child.try_wait().unwrap().is_some());

    let (outcome, _) = stop(&server.fence("right"));
    assert_eq!(outcome, Outcome::NoServer);
}

/// A file system of its own stands for the mount, so that nobody else uses it.
struct Mount {
    dir: tempfile::TempDir,
}

impl Mount {
    fn new() -> Mount {
        let dir = tempfile::tempdir().unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "byokfs-test"]).arg(dir.path()));
        Mount { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn fence(&self, socket: Option<PathBuf>, pid_file: Option<PathBuf>) -> Fence {
        let dev = fs::metadata(self.path()).unwrap().dev();
        let device = Device { major: rustix::fs::major(dev), minor: rustix::fs::minor(dev) };
        let config = config::Fence {
            enabled: true,
            socket,
            pid_file,
            timeout: TIMEOUT,
            ..config::Fence::default()
        };
        Fence::new(config, device)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).status();
    }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(60), "never came: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ended with the test, however that ends.
struct Reaped(Child);

impl Reaped {
    fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

/// The socket is another server's, which is not on the mount: it is neither asked nor signalled,
/// and the one on the mount is stopped.
#[test]
fn another_servers_socket_is_left_alone() {
    if !is_root() || !Path::new("/usr/sbin/mariadbd").exists() {
        return;
    }
    let other = Server::install();
    let mut other_child = Reaped(other.start());
    run(&mut other.sql("CREATE USER root_too@localhost; GRANT ALL ON *.* TO root_too@localhost"));
    let mount = Mount::new();
    let pid_file = other.path("ours.pid");
    let mut ours =
        Reaped(Command::new("sleep").arg("600").current_dir(mount.path()).spawn().unwrap());
    fs::write(&pid_file, ours.0.id().to_string()).unwrap();
    let option_file = other.path("fence.cnf");
    fs::write(&option_file, "[client]\nuser=root_too\n").unwrap();
    let fence = mount.fence(Some(other.path("sock")), Some(pid_file));
    assert_eq!(stop(&fence).0, Outcome::Stopped("SIGTERM"));
    assert!(!ours.is_running());
    assert!(other_child.is_running() && other.sql("SELECT 1").status().unwrap().success());
}

/// Socket and pid file are stale or wrong: a process with a server's name that uses the mount is it.
#[test]
fn a_server_that_nothing_leads_to_is_found_on_the_mount() {
    if !is_root() {
        return;
    }
    let (mount, dir) = (Mount::new(), tempfile::tempdir().unwrap());
    let program = dir.path().join("mariadbd");
    fs::copy("/bin/sleep", &program).unwrap();
    let start =
        |cwd: &Path| Reaped(Command::new(&program).arg("600").current_dir(cwd).spawn().unwrap());
    let (mut ours, mut elsewhere) = (start(mount.path()), start(dir.path()));
    // A shell on the mount is no server.
    let mut shell =
        Reaped(Command::new("sleep").arg("600").current_dir(mount.path()).spawn().unwrap());
    let pid_file = dir.path().join("stale.pid");
    fs::write(&pid_file, "999999999\n").unwrap();
    let fence = mount.fence(Some(dir.path().join("none.sock")), Some(pid_file));
    until("its name", || {
        let comm = format!("/proc/{}/comm", ours.0.id());
        fs::read_to_string(comm).is_ok_and(|name| name.trim() == "mariadbd")
    });
    assert_eq!(stop(&fence).0, Outcome::Stopped("SIGTERM"));
    assert!(!ours.is_running() && elsewhere.is_running() && shell.is_running());
    assert_eq!(stop(&fence).0, Outcome::NoServer);
}

/// The pid file says 1, or some number, in the container's own count.
#[test]
fn a_pid_file_of_a_containers_pid_namespace_leads_to_its_server() {
    if !is_root() {
        return;
    }
    let (mount, dir) = (Mount::new(), tempfile::tempdir().unwrap());
    let pid_file = dir.path().join("pid");
    // A shell is its init, as in many images; the server has another number.
    let script = format!(
        "cd / ; (cd '{}' && exec sleep 600) & echo $! >'{}'; wait",
        mount.path().display(),
        pid_file.display()
    );
    let container = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "bash", "-c", &script])
        .current_dir("/")
        .spawn();
    let mut container = Reaped(container.unwrap());
    until("the pid file", || fs::read_to_string(&pid_file).is_ok_and(|text| text.ends_with('\n')));
    let number: i32 = fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    assert!(number < 100, "not a number of its own: {number}");
    let fence = mount.fence(None, Some(pid_file));
    until("the server on the mount", || {
        byokfs::daemon::users::of(fence.device()).iter().any(|user| user.name == "sleep")
    });
    assert_eq!(stop(&fence).0, Outcome::Stopped("SIGTERM"));
    // Its init saw the end, and ended by itself.
    assert!(container.0.wait().unwrap().success());
}

/// An account that may connect and do nothing, one that is locked, and a server that takes no
/// connection any more: a clean stop all the same.
#[test]
fn a_dead_fence_account_does_not_stop_the_fence() {
    if !is_root() || !Path::new("/usr/sbin/mariadbd").exists() {
        return;
    }
    let server = Server::install();
    let kill: [(&str, &str); 3] = [
        ("no right", "CREATE OR REPLACE USER fence@localhost IDENTIFIED BY 'right'"),
        (
            "locked",
            "CREATE OR REPLACE USER fence@localhost IDENTIFIED BY 'right' ACCOUNT LOCK; \
             GRANT SHUTDOWN, CONNECTION ADMIN, PROCESS ON *.* TO fence@localhost",
        ),
        ("gone", "DROP USER fence@localhost"),
    ];
    for (what, sql) in kill {
        let mut child = server.start();
        run(&mut server.sql(sql));
        let (outcome, took) = stop(&server.fence("right"));
        assert_eq!(outcome, Outcome::Stopped("SIGTERM"), "{what}: {took:?}");
        assert!(took < TIMEOUT, "{what}: {took:?}");
        assert!(child.wait().unwrap().success(), "{what}");
    }
}
