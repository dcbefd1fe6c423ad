//! A MariaDB server of the test's own, run as the user mysql without any of /etc/mysql's options.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use mysql::prelude::Queryable;
use mysql::{Conn, OptsBuilder};
use rustix::process::Signal;

use super::process::{Answer, alive, signal};
use super::sandbox::{Sandbox, path};
use super::until;

const FENCE_PASSWORD: &str = "only-for-the-fence-4711";

pub struct MariaDb {
    pub data: PathBuf,
    /// Socket, pid file and log: off the mount.
    dir: PathBuf,
    options: Vec<String>,
    child: Mutex<Option<Child>>,
}

impl MariaDb {
    /// Makes a data directory in `parent`, which the server will use with `options`.
    pub fn create(parent: &Path, dir: &Path, options: &[&str]) -> MariaDb {
        let (uid, gid) = mysql_user();
        let data = parent.join("mysql");
        for made in [&data, dir] {
            fs::create_dir_all(made).unwrap();
            chown(made, Some(uid), Some(gid)).unwrap();
        }
        Answer::of(as_mysql("mariadb-install-db", dir).args([
            "--no-defaults",
            "--skip-test-db",
            "--skip-name-resolve",
            "--auth-root-authentication-method=normal",
            &format!("--datadir={}", path(&data)),
        ]))
        .ok();
        MariaDb::at(data, dir, options)
    }

    /// On a data directory that is there.
    pub fn at(data: PathBuf, dir: &Path, options: &[&str]) -> MariaDb {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        MariaDb { data, dir: dir.to_owned(), options, child: Mutex::new(None) }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("mysqld.sock")
    }

    pub fn pid_file(&self) -> PathBuf {
        self.dir.join("mysqld.pid")
    }

    /// Starts it without waiting; the caller waits for the process.
    pub fn spawn(&self) -> Child {
        let log = self.dir.join("server.log");
        as_mysql("mariadbd", &self.dir)
            .args([
                "--no-defaults",
                "--skip-networking",
                "--skip-name-resolve",
                "--innodb-buffer-pool-size=32M",
                &format!("--datadir={}", path(&self.data)),
                &format!("--socket={}", path(&self.socket())),
                &format!("--pid-file={}", path(&self.pid_file())),
                &format!("--log-error={}", path(&log)),
            ])
            .args(&self.options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Starts it and waits until it answers.
    #[track_caller]
    pub fn start(&self) {
        let mut child = self.spawn();
        until("the server to answer", || {
            assert!(child.try_wait().unwrap().is_none(), "the server ended:\n{}", self.log());
            self.connect().is_some()
        });
        *self.child.lock().unwrap() = Some(child);
    }

    /// A connection as root; none while the server does not take any.
    pub fn connect(&self) -> Option<Conn> {
        let options = OptsBuilder::new().socket(Some(path(&self.socket()))).user(Some("root"));
        Conn::new(options).ok()
    }

    #[track_caller]
    pub fn sql(&self, statements: &[&str]) {
        let mut conn = self.connect().expect("the server takes no connection");
        for statement in statements {
            conn.query_drop(statement).unwrap_or_else(|error| panic!("{statement}: {error}"));
        }
    }

    /// SHUTDOWN in order.
    pub fn stop(&self) {
        self.end(Signal::TERM);
    }

    pub fn kill9(&self) {
        self.end(Signal::KILL);
    }

    fn end(&self, how: Signal) {
        if let Some(mut child) = self.child.lock().unwrap().take() {
            signal(child.id() as i32, how);
            child.wait().unwrap();
        }
    }

    pub fn pid(&self) -> i32 {
        self.child.lock().unwrap().as_ref().map_or(0, |child| child.id() as i32)
    }

    /// Waits for an end that others bring about.
    #[track_caller]
    pub fn until_dead(&self) {
        let pid = self.pid();
        until("the server to end", || !alive(pid));
        if let Some(mut child) = self.child.lock().unwrap().take() {
            child.wait().unwrap();
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("server.log")).unwrap_or_default()
    }

    /// CHECK TABLE on every table of `database`: all OK.
    #[track_caller]
    pub fn check(&self, database: &str) {
        let mut conn = self.connect().expect("the server takes no connection");
        let tables: Vec<String> = conn
            .query(format!(
                "SELECT table_name FROM information_schema.tables WHERE table_schema = '{database}'"
            ))
            .unwrap();
        assert!(!tables.is_empty());
        for table in tables {
            let found: Vec<(String, String, String, String)> =
                conn.query(format!("CHECK TABLE {database}.{table} EXTENDED")).unwrap();
            assert_eq!(found.last().unwrap().3, "OK", "{found:?}");
        }
    }

    /// Makes the account of the fence.
    pub fn create_fence_account(&self) {
        self.sql(&[
            &format!("CREATE USER byokfs_fence@localhost IDENTIFIED BY '{FENCE_PASSWORD}'"),
            "GRANT SHUTDOWN, CONNECTION ADMIN, PROCESS ON *.* TO byokfs_fence@localhost",
        ]);
    }
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(25).collect();
            eprintln!("---- MariaDB's log ----");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
        self.kill9();
    }
}

/// The `[fence]` section for a server whose socket lies in `dir`.
pub fn fence_config(sandbox: &Sandbox, dir: &Path) -> String {
    let option_file = sandbox.path("config/fence.cnf");
    fs::write(&option_file, format!("[client]\nuser=byokfs_fence\npassword={FENCE_PASSWORD}\n"))
        .unwrap();
    fs::set_permissions(&option_file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    format!(
        "[fence]\nenabled = true\nsocket = \"{}\"\npid_file = \"{}\"\noption_file = \"{}\"\n",
        path(&dir.join("mysqld.sock")),
        path(&dir.join("mysqld.pid")),
        path(&option_file),
    )
}

/// With temporary files in `dir`: a starting server removes those of all others beside its own.
fn as_mysql(program: &str, dir: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=mysql", "--regid=mysql", "--clear-groups", "--", program]);
    command.env("HOME", "/nonexistent").env("TMPDIR", dir);
    command
}

fn mysql_user() -> (u32, u32) {
    let id = |flag| super::process::run("id", &[flag, "mysql"]).trim().parse().unwrap();
    (id("-u"), id("-g"))
}

/// A server on a mounted volume, with the fence set up. The server ends first.
pub struct Site {
    pub server: MariaDb,
    pub sandbox: Sandbox,
}

impl Site {
    /// Running, with the fence's account and [`super::writer::TABLE`]. `config` is added to the
    /// configuration after the fence's section.
    pub fn running(options: &[&str], config: &str) -> Site {
        let sandbox = Sandbox::bare();
        let dir = sandbox.path("server");
        let fence = fence_config(&sandbox, &dir);
        let sandbox = sandbox.and_mounted(&format!("{fence}{config}"));
        let server = MariaDb::create(&sandbox.mnt(), &dir, options);
        server.start();
        server.create_fence_account();
        super::writer::create_table(&server);
        Site { server, sandbox }
    }
}
