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
