//! A database server of the test's own, run as the user mysql without any of /etc/mysql's options:
//! Debian's MariaDB, or the MySQL that scripts/mysql-prefix unpacks.

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

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flavor {
    MariaDb,
    /// With the folder it was unpacked to.
    MySql(PathBuf),
}

impl Flavor {
    /// A program that both have under one name, innochecksum for example.
    pub fn program(&self, name: &str) -> PathBuf {
        match self {
            Flavor::MariaDb => PathBuf::from(name),
            Flavor::MySql(prefix) => prefix.join("bin").join(name),
        }
    }
}

pub struct Server {
    flavor: Flavor,
    pub data: PathBuf,
    /// Socket, pid file and log: off the mount.
    dir: PathBuf,
    options: Vec<String>,
    child: Mutex<Option<Child>>,
}

impl Server {
    /// Makes MariaDB's data directory in `parent`, which the server will use with `options`.
    pub fn create(parent: &Path, dir: &Path, options: &[&str]) -> Server {
        Server::create_flavor(Flavor::MariaDb, parent, dir, options)
    }

    pub fn create_flavor(flavor: Flavor, parent: &Path, dir: &Path, options: &[&str]) -> Server {
        let (uid, gid) = mysql_user();
        let data = parent.join("mysql");
        for made in [&data, dir] {
            fs::create_dir_all(made).unwrap();
            chown(made, Some(uid), Some(gid)).unwrap();
        }
        let datadir = format!("--datadir={}", path(&data));
        let mut install = match flavor {
            Flavor::MariaDb => as_mysql(Path::new("mariadb-install-db"), dir),
            Flavor::MySql(_) => as_mysql(&flavor.program("mysqld"), dir),
        };
        match flavor {
            Flavor::MariaDb => install.args([
                "--no-defaults",
                "--skip-test-db",
                "--skip-name-resolve",
                "--auth-root-authentication-method=normal",
            ]),
            Flavor::MySql(_) => install.arg("--initialize-insecure"),
        };
        Answer::of(install.arg(datadir)).ok();
        let mut server = Server::at(data, dir, options);
        server.flavor = flavor;
        server
    }

    /// MariaDB on a data directory that is there.
    pub fn at(data: PathBuf, dir: &Path, options: &[&str]) -> Server {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let flavor = Flavor::MariaDb;
        Server { flavor, data, dir: dir.to_owned(), options, child: Mutex::new(None) }
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
        let (program, more) = match &self.flavor {
            Flavor::MariaDb => (PathBuf::from("mariadbd"), &["--no-defaults"][..]),
            Flavor::MySql(_) => (self.flavor.program("mysqld"), &[][..]),
        };
        as_mysql(&program, &self.dir)
            .args(more)
            .args([
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
        assert!(self.start_unless(&|| false), "the server ended:\n{}", self.log_tail());
    }

    /// The same; it may end instead, once `crashed` holds: then it is false.
    #[track_caller]
    pub fn start_unless(&self, crashed: &dyn Fn() -> bool) -> bool {
        let mut child = self.spawn();
        let mut ended = false;
        until("the server to answer", || {
            ended = child.try_wait().unwrap().is_some();
            assert!(!ended || crashed(), "the server ended:\n{}", self.log_tail());
            ended || crashed() || self.connect().is_some()
        });
        *self.child.lock().unwrap() = Some(child);
        !ended && !crashed()
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
        let rights = match self.flavor {
            Flavor::MariaDb => "SHUTDOWN, CONNECTION ADMIN, PROCESS",
            Flavor::MySql(_) => "SHUTDOWN, CONNECTION_ADMIN, SYSTEM_VARIABLES_ADMIN, PROCESS",
        };
        self.sql(&[
            &format!("CREATE USER byokfs_fence@localhost IDENTIFIED BY '{FENCE_PASSWORD}'"),
            &format!("GRANT {rights} ON *.* TO byokfs_fence@localhost"),
        ]);
    }
}

impl Server {
    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- the server's log ----\n{}", self.log_tail());
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
fn as_mysql(program: &Path, dir: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=mysql", "--regid=mysql", "--clear-groups", "--"]).arg(program);
    command.env("HOME", "/nonexistent").env("TMPDIR", dir);
    command
}

fn mysql_user() -> (u32, u32) {
    let id = |flag| super::process::run("id", &[flag, "mysql"]).trim().parse().unwrap();
    (id("-u"), id("-g"))
}

/// A server on a mounted volume, with the fence set up. The server ends first.
pub struct Site {
    pub server: Server,
    pub sandbox: Sandbox,
}

impl Site {
    /// Running, with the fence's account and [`super::writer::TABLE`]. `config` is added to the
    /// configuration after the fence's section.
    pub fn running(options: &[&str], config: &str) -> Site {
        Site::running_after(options, config, |_| ())
    }

    /// The same, with something else done to the configuration before.
    pub fn running_after(options: &[&str], config: &str, change: impl FnOnce(&Sandbox)) -> Site {
        let sandbox = Sandbox::bare();
        let dir = sandbox.path("server");
        let fence = fence_config(&sandbox, &dir);
        let sandbox = sandbox.and_mounted_after(&format!("{fence}{config}"), change);
        let server = Server::create(&sandbox.mnt(), &dir, options);
        server.start();
        server.create_fence_account();
        super::writer::create_table(&server);
        Site { server, sandbox }
    }
}
