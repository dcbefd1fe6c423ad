//! Clients that write rows and remember, off the mount, each id whose commit was acknowledged.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use mysql::prelude::Queryable;

use super::server::Server;
use super::until;

pub const TABLE: &str = "acked.rows_written";

pub struct AckedWriters {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    acked: Arc<Mutex<Vec<u64>>>,
    clients: Vec<JoinHandle<()>>,
}

/// Makes the table they write.
pub fn create_table(server: &Server) {
    server.sql(&[
        "CREATE DATABASE acked",
        &format!(
            "CREATE TABLE {TABLE} (id BIGINT PRIMARY KEY, word VARCHAR(200) NOT NULL) ENGINE=InnoDB"
        ),
    ]);
}

impl AckedWriters {
    /// Each client inserts row after row, one commit each, until an error or `finish`. `first`
    /// keeps the ids of two runs apart.
    pub fn start(server: &Server, clients: u64, first: u64) -> AckedWriters {
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicUsize::new(0));
        let acked = Arc::new(Mutex::new(Vec::new()));
        let clients = (0..clients)
            .map(|client| {
                let mut conn = server.connect().expect("the server takes no connection");
                let (stop, count, acked) = (stop.clone(), count.clone(), acked.clone());
                std::thread::spawn(move || {
                    for row in 0.. {
                        let id = first + client * 1_000_000 + row;
                        let insert =
                            format!("INSERT INTO {TABLE} VALUES ({id}, REPEAT('word {id} ', 10))");
                        if stop.load(Ordering::Relaxed) || conn.query_drop(insert).is_err() {
                            return;
                        }
                        acked.lock().unwrap().push(id);
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        AckedWriters { stop, count, acked, clients }
    }

    /// Waits until so many commits were acknowledged in all.
    #[track_caller]
    pub fn until(&self, commits: usize) {
        until("acknowledged commits", || self.count.load(Ordering::Relaxed) >= commits);
    }

    /// The acknowledged ids, once every client has ended.
    pub fn finish(self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.into_iter().for_each(|client| client.join().unwrap());
        let acked = self.acked.lock().unwrap();
        acked.clone()
    }
}

/// Every acknowledged row is there, with its content, and the table is sound.
#[track_caller]
pub fn assert_all_there(server: &Server, acked: &[u64]) {
    server.check("acked");
    let mut conn = server.connect().expect("the server takes no connection");
    let present: Vec<(u64, String)> = conn.query(format!("SELECT id, word FROM {TABLE}")).unwrap();
    for (id, word) in &present {
        assert_eq!(*word, format!("word {id} ").repeat(10));
    }
    let present: HashSet<u64> = present.into_iter().map(|(id, _)| id).collect();
    let missing: Vec<&u64> = acked.iter().filter(|id| !present.contains(id)).collect();
    assert!(
        missing.is_empty(),
        "{} of {} acknowledged rows are missing: {missing:?}",
        missing.len(),
        acked.len()
    );
}
