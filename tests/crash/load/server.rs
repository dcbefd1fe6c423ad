//! MariaDB and MySQL: clients that commit rows and updates, with a ledger of what was acknowledged.
//!
//! The buffer pool is small and the server is told to write its pages early, so that pages, redo
//! log, undo log and binary log are all under way when the crash comes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use byokfs::backing::memory::Random;
use mysql::Conn;
use mysql::prelude::Queryable;

use super::{Crash, Load};
use crate::support::process::{Answer, alive};
use crate::support::server::{Flavor, Server};
use crate::support::{SOON, tree, within};

const CLIENTS: u64 = 4;
/// Rows of `t.old`, of about a page's sixth each: three times the buffer pool.
const OLD_ROWS: u64 = 9000;

/// Of one client. Ids and versions only ever grow.
#[derive(Default)]
struct Ledger {
    /// Rows of `t.new` with the number 1 to this one.
    inserted: u64,
    /// The version of each row of `t.old` that was changed, and after how many crashes that was.
    versions: BTreeMap<u64, (u64, u32)>,
    crashes: u32,
    version: u64,
    /// Not acknowledged.
    pending: Option<Change>,
}

#[derive(Clone, Copy)]
enum Change {
    Insert(u64),
    Update { id: u64, version: u64 },
}

pub struct Database {
    flavor: Flavor,
    options: Vec<&'static str>,
    dir: PathBuf,
    server: Option<Server>,
    ledgers: Vec<Arc<Mutex<Ledger>>>,
    acknowledged: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    gone: Arc<AtomicBool>,
    clients: Vec<JoinHandle<()>>,
    random: Random,
    /// The daemon's guard stops the server, and has an account for it.
    fenced: bool,
}

impl Database {
    /// `dir` is for the server's socket and logs, off the volume.
    /// `plain`: on a file system that is no volume.
    pub fn new(
        flavor: Flavor,
        doublewrite: bool,
        plain: bool,
        dir: &Path,
        fenced: bool,
        seed: u64,
    ) -> Database {
        let mut options = vec![
            "--innodb-doublewrite=ON",
            "--innodb-buffer-pool-size=8M",
            "--innodb-max-dirty-pages-pct=1",
            "--innodb-max-dirty-pages-pct-lwm=0",
            "--innodb-io-capacity=2000",
            "--innodb-flush-log-at-trx-commit=1",
            "--log-bin=binlog",
            "--server-id=1",
            "--sync-binlog=1",
        ];
        if !doublewrite {
            options[0] = "--innodb-doublewrite=OFF";
        }
        // With O_DIRECT, MySQL does not flush its doublewrite files: on a plain file system over a disk
        // with a volatile cache it then starts no more after some cuts.
        options.push(match plain {
            true => "--innodb-flush-method=fsync",
            false => "--innodb-flush-method=O_DIRECT",
        });
        if let Flavor::MySql(_) = flavor {
            options.push("--mysqlx=OFF");
        }
        Database {
            flavor,
            options,
            dir: dir.to_owned(),
            server: None,
            ledgers: (0..CLIENTS).map(|_| Arc::default()).collect(),
            acknowledged: Arc::default(),
            stop: Arc::default(),
            gone: Arc::default(),
            clients: Vec::new(),
            random: Random::new(seed),
            fenced,
        }
    }

    fn server(&self) -> &Server {
        self.server.as_ref().expect("the server was not prepared")
    }

    fn check(&self) {
        let server = self.server();
        server.check("t");
        let mut conn = server.connect().expect("the server takes no connection");
        for (client, ledger) in self.ledgers.iter().enumerate() {
            let ledger = &mut *ledger.lock().unwrap();
            check_inserted(&mut conn, client as u64, ledger);
            check_versions(&mut conn, client as u64, ledger);
            ledger.pending = None;
            ledger.crashes += 1;
        }
        let count: Option<u64> = conn.query_first("SELECT COUNT(*) FROM t.old").unwrap();
        assert_eq!(count, Some(OLD_ROWS));
    }

    /// Every tablespace, with the server stopped.
    fn checksums(&self) {
        let data = &self.server().data;
        let mut checked = 0;
        for file in tree::files(data) {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let temporary = file.components().any(|part| part.as_os_str() == "#innodb_temp");
            let tablespace = name.ends_with(".ibd")
                || name.ends_with(".ibu")
                || name.starts_with("ibdata")
                || name.starts_with("undo");
            if !tablespace || temporary {
                continue;
            }
            // MariaDB's doublewrite buffer lies in the pages 64 to 191 of its system tablespace:
            // copies of others, under numbers that are not theirs.
            let parts: &[&[&str]] = match self.flavor {
                Flavor::MariaDb if name == "ibdata1" => {
                    &[&["--end-page=63"], &["--start-page=192"]]
                }
                _ => &[&[]],
            };
            for part in parts {
                let mut command = Command::new(self.flavor.program("innochecksum"));
                let answer = Answer::of(command.args(*part).arg(&file));
                assert_eq!(answer.code, Some(0), "innochecksum: {answer}");
            }
            checked += 1;
        }
        assert!(checked >= 3, "only {checked} tablespaces in {}", data.display());
    }
}

impl Load for Database {
    fn prepare(&mut self, mnt: &Path) {
        let server = Server::create_flavor(self.flavor.clone(), mnt, &self.dir, &self.options);
        server.start();
        if self.fenced {
            server.create_fence_account();
        }
        server.sql(&[
            "CREATE DATABASE t",
            "CREATE TABLE t.new (client INT, n BIGINT, pad VARCHAR(3000) NOT NULL, \
             PRIMARY KEY (client, n)) ENGINE=InnoDB",
            "CREATE TABLE t.old (id BIGINT PRIMARY KEY, client INT, version BIGINT NOT NULL, \
             pad VARCHAR(3000) NOT NULL, KEY (version)) ENGINE=InnoDB",
        ]);
        let mut conn = server.connect().expect("the server takes no connection");
        for from in (0..OLD_ROWS).step_by(500) {
            let rows: Vec<String> = (from..from + 500)
                .map(|id| format!("({id}, {}, 0, REPEAT('v0 ', 850))", id % CLIENTS))
                .collect();
            conn.query_drop(format!("INSERT INTO t.old VALUES {}", rows.join(","))).unwrap();
        }
        drop(conn);
        server.stop();
        self.server = Some(server);
    }

    fn ignore_after(&mut self, gone: Arc<AtomicBool>) {
        self.gone = gone;
    }

    fn start(&mut self, _mnt: &Path, crashed: &dyn Fn() -> bool) {
        if !self.server().start_unless(crashed) {
            return;
        }
        self.stop.store(false, Ordering::Relaxed);
        for client in 0..CLIENTS {
            let Some(conn) = self.server().connect() else { break };
            let ledger = Arc::clone(&self.ledgers[client as usize]);
            let (stop, gone) = (Arc::clone(&self.stop), Arc::clone(&self.gone));
            let count = Arc::clone(&self.acknowledged);
            let random = Random::new(self.random.next_u64());
            self.clients.push(std::thread::spawn(move || {
                commit(client, conn, &ledger, random, [&stop, &gone], &count);
            }));
        }
    }

    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    fn end(&mut self) {
        if self.fenced {
            // By the guard; the test's own end of it is only for one that does not.
            let pid = self.server().pid();
            assert!(pid == 0 || within(SOON, || !alive(pid)), "the guard did not fence the server");
        }
        self.stop.store(true, Ordering::Relaxed);
        self.server().kill9();
        for client in self.clients.drain(..) {
            client.join().unwrap();
        }
    }

    fn verify(&mut self, _mnt: &Path, _crash: Crash) {
        self.server().start();
        self.check();
        self.server().stop();
        self.checksums();
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // The server ends by itself here, and with its log.
        self.server = None;
    }
}

/// Until an error, or one of `ends` is set.
fn commit(
    client: u64,
    mut conn: Conn,
    ledger: &Mutex<Ledger>,
    mut random: Random,
    ends: [&AtomicBool; 2],
    count: &AtomicU64,
) {
    let ended = || ends.iter().any(|end| end.load(Ordering::SeqCst));
    while !ended() {
        let change = {
            let mut ledger = ledger.lock().unwrap();
            let change = match random.chance(3) {
                true => Change::Insert(ledger.inserted + 1),
                false => {
                    ledger.version += 1;
                    let id = random.below(OLD_ROWS / CLIENTS) * CLIENTS + client;
                    Change::Update { id, version: ledger.version }
                }
            };
            ledger.pending = Some(change);
            change
        };
        let statement = match change {
            Change::Insert(n) => {
                format!("INSERT INTO t.new VALUES ({client}, {n}, REPEAT('n{n} ', {}))", repeat(n))
            }
            Change::Update { id, version } => format!(
                "UPDATE t.old SET version = {version}, pad = REPEAT('v{version} ', {}) \
                 WHERE id = {id}",
                repeat(version)
            ),
        };
        if conn.query_drop(statement).is_err() || ends[1].load(Ordering::SeqCst) {
            return;
        }
        let mut ledger = ledger.lock().unwrap();
        ledger.pending = None;
        match change {
            Change::Insert(n) => ledger.inserted = n,
            Change::Update { id, version } => {
                let since = ledger.crashes;
                ledger.versions.insert(id, (version, since));
            }
        }
        count.fetch_add(1, Ordering::Relaxed);
    }
}

fn repeat(number: u64) -> u64 {
    20 + number * 37 % 300
}

fn check_inserted(conn: &mut Conn, client: u64, ledger: &mut Ledger) {
    let rows: Vec<(u64, String)> =
        conn.query(format!("SELECT n, pad FROM t.new WHERE client = {client} ORDER BY n")).unwrap();
    for (at, (n, pad)) in rows.iter().enumerate() {
        assert_eq!(*n, at as u64 + 1, "client {client}: a row is missing, or one too many");
        assert_eq!(*pad, format!("n{n} ").repeat(repeat(*n) as usize), "client {client}: row {n}");
    }
    let found = rows.len() as u64;
    let most = ledger.inserted + u64::from(matches!(ledger.pending, Some(Change::Insert(_))));
    assert!(
        (ledger.inserted..=most).contains(&found),
        "client {client}: {found} rows, {} were acknowledged",
        ledger.inserted
    );
    ledger.inserted = found;
}

fn check_versions(conn: &mut Conn, client: u64, ledger: &mut Ledger) {
    let rows: Vec<(u64, u64, String)> =
        conn.query(format!("SELECT id, version, pad FROM t.old WHERE client = {client}")).unwrap();
    let mut wrong = Vec::new();
    for (id, version, pad) in rows {
        let (acknowledged, since) = ledger.versions.get(&id).copied().unwrap_or_default();
        let pending = match ledger.pending {
            Some(Change::Update { id: on, version }) if on == id => version,
            _ => acknowledged,
        };
        if version != acknowledged && version != pending {
            wrong.push(format!(
                "row {id} has version {version}, acknowledged was {acknowledged} after {since} crashes",
            ));
        }
        let times = if version == 0 { 850 } else { repeat(version) };
        assert_eq!(pad, format!("v{version} ").repeat(times as usize), "row {id}");
        if version != acknowledged {
            ledger.versions.insert(id, (version, ledger.crashes));
        }
    }
    assert!(
        wrong.is_empty(),
        "client {client}, {} versions, {} crashes so far: {}",
        ledger.version,
        ledger.crashes,
        wrong.join("; ")
    );
}
