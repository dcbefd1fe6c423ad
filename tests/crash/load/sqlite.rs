//! SQLite, each writer a process of its own: numbered transactions, one after the other.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread::JoinHandle;

use rusqlite::Connection;

use super::{Crash, Load};
use crate::support::sandbox::path;

/// Each transaction sets one of them to its number, so that old pages are written over.
const COUNTERS: i64 = 200;

/// How a writer process is started: see [`writer`].
pub const VERB: &str = "__sqlite";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Journal {
    Wal,
    Rollback,
}

impl Journal {
    fn name(self) -> &'static str {
        match self {
            Journal::Wal => "wal",
            Journal::Rollback => "delete",
        }
    }

    /// With a rollback journal a commit is the removal of a name, which only EXTRA makes durable.
    fn synchronous(self) -> &'static str {
        match self {
            Journal::Wal => "FULL",
            Journal::Rollback => "EXTRA",
        }
    }
}

pub struct Sqlite {
    journal: Journal,
    child: Option<(Child, JoinHandle<String>)>,
    /// The error by which the last writer ended.
    ended: String,
    /// The number of the last transaction that was acknowledged.
    last: Arc<AtomicI64>,
}

impl Sqlite {
    pub fn new(journal: Journal) -> Sqlite {
        Sqlite { journal, child: None, ended: String::new(), last: Arc::default() }
    }

    fn file(&self, mnt: &Path) -> PathBuf {
        mnt.join(format!("{}.db", self.journal.name()))
    }
}

impl Load for Sqlite {
    fn prepare(&mut self, mnt: &Path) {
        let db = open(&self.file(mnt), self.journal).unwrap();
        db.execute_batch(
            "CREATE TABLE line (tx INTEGER, row INTEGER, body TEXT, PRIMARY KEY (tx, row));
             CREATE INDEX by_body ON line (body);
             CREATE TABLE counter (id INTEGER PRIMARY KEY, tx INTEGER NOT NULL, pad TEXT);",
        )
        .unwrap();
        db.execute(
            "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?1)
             INSERT INTO counter SELECT i, 0, hex(zeroblob(300)) FROM n",
            [COUNTERS],
        )
        .unwrap();
        db.close().unwrap();
        std::fs::File::open(mnt).unwrap().sync_all().unwrap();
    }

    fn start(&mut self, mnt: &Path, _crashed: &dyn Fn() -> bool) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([VERB, path(&self.file(mnt)), self.journal.name()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut errors = child.stderr.take().unwrap();
        let last = Arc::clone(&self.last);
        let ledger = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                last.store(line.parse().expect("a writer says numbers only"), Ordering::Relaxed);
            }
            let mut error = String::new();
            let _ = errors.read_to_string(&mut error);
            error
        });
        self.child = Some((child, ledger));
    }

    fn acknowledged(&self) -> u64 {
        self.last.load(Ordering::Relaxed).unsigned_abs()
    }

    fn end(&mut self) {
        if let Some((mut child, ledger)) = self.child.take() {
            // It may have ended by the error.
            let _ = child.kill();
            child.wait().unwrap();
            self.ended = ledger.join().unwrap();
        }
    }

    fn verify(&mut self, mnt: &Path, _crash: Crash) {
        let acknowledged = self.last.load(Ordering::Relaxed);
        let db = open(&self.file(mnt), self.journal).expect("the database cannot be opened");
        let sound: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
        assert_eq!(sound, "ok", "the integrity check fails");
        let last = last(&db).unwrap();
        assert!(last >= acknowledged, "{acknowledged} was acknowledged, {last} is the last there");
        assert!(
            last <= acknowledged + 1,
            "{last} was not issued, only {acknowledged} and the next"
        );
        let mut statement = db.prepare("SELECT tx, row, body FROM line ORDER BY tx, row").unwrap();
        let mut rows = statement.query([]).unwrap();
        for tx in 1..=last {
            for number in 0..lines(tx) {
                let row = rows.next().unwrap().unwrap_or_else(|| panic!("{tx}: rows are missing"));
                let found: (i64, i64, String) =
                    (row.get(0).unwrap(), row.get(1).unwrap(), row.get(2).unwrap());
                assert_eq!(found, (tx, number, body(tx, number)));
            }
        }
        assert!(rows.next().unwrap().is_none(), "rows of no transaction");
        let mut statement = db.prepare("SELECT id, tx FROM counter ORDER BY id").unwrap();
        let mut rows = statement.query([]).unwrap();
        for id in 0..COUNTERS {
            let row = rows.next().unwrap().expect("counters are missing");
            let expected = if last < id { 0 } else { last - (last - id) % COUNTERS };
            assert_eq!((row.get(0), row.get(1)), (Ok(id), Ok(expected)), "the counter {id}");
        }
        self.last.store(last, Ordering::Relaxed);
    }
}

impl Drop for Sqlite {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            eprint!("---- the writer ----\n{}", self.ended);
        }
    }
}

fn open(file: &Path, journal: Journal) -> rusqlite::Result<Connection> {
    let db = Connection::open(file)?;
    let mode = journal.name();
    let set: String = db.query_row(&format!("PRAGMA journal_mode={mode}"), [], |row| row.get(0))?;
    assert_eq!(set, mode, "SQLite takes another journal mode here");
    db.execute_batch(&format!("PRAGMA synchronous={}", journal.synchronous()))?;
    Ok(db)
}

fn last(db: &Connection) -> rusqlite::Result<i64> {
    db.query_row("SELECT coalesce(max(tx), 0) FROM line", [], |row| row.get(0))
}

fn lines(tx: i64) -> i64 {
    1 + tx % 7
}

fn body(tx: i64, row: i64) -> String {
    format!("{tx} {row} ").repeat(10 + (tx % 60) as usize)
}

/// The process that writes: each number it prints is that of a transaction that SQLite has
/// committed. Ends by the first error, which is for the log.
pub fn writer(args: &[String]) -> Result<(), String> {
    let [file, mode] = args else { return Err("two arguments".to_owned()) };
    let journal = if mode == "wal" { Journal::Wal } else { Journal::Rollback };
    let run = || -> rusqlite::Result<()> {
        let mut db = open(Path::new(file), journal)?;
        let mut out = std::io::stdout().lock();
        for tx in last(&db)? + 1.. {
            let transaction = db.transaction()?;
            for row in 0..lines(tx) {
                transaction
                    .execute("INSERT INTO line VALUES (?1, ?2, ?3)", (tx, row, body(tx, row)))?;
            }
            transaction.execute("UPDATE counter SET tx = ?1 WHERE id = ?2", (tx, tx % COUNTERS))?;
            transaction.commit()?;
            if writeln!(out, "{tx}").and_then(|()| out.flush()).is_err() {
                return Ok(());
            }
        }
        Ok(())
    };
    run().map_err(|error| error.to_string())
}
