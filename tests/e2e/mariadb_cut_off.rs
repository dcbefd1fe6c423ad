//! MariaDB on a mount that is cut off while it runs: the server is stopped, nothing is served, and
//! with the key back every acknowledged row is there.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mysql::prelude::Queryable;
use rustix::process::Signal;

use crate::support::process::{alive, run, signal};
use crate::support::sandbox::path;
use crate::support::server::Site;
use crate::support::writer::{self, AckedWriters, TABLE};
use crate::support::{can_run_mariadb, until};

fn revoked_under_load(flush_method: &str) {
    if !can_run_mariadb() {
        return;
    }
    let site = Site::running(&[flush_method], "");
    let mut acked = Vec::new();
    for round in 0..2 {
        let writers = AckedWriters::start(&site.server, 4, round * 100_000_000);
        writers.until(200);
        site.sandbox.enable_key(false);
        site.server.until_dead();
        site.sandbox.until_inaccessible();
        acked.extend(writers.finish());
        assert!(std::fs::read_dir(site.sandbox.mnt()).is_err());
        assert!(std::fs::read(site.server.data.join("ibdata1")).is_err());
        let status = site.sandbox.status();
        for field in ["reason", "since"] {
            assert!(
                status[field].as_str().is_some_and(|text| !text.is_empty()),
                "{field}: {status}"
            );
        }

        site.sandbox.recover();
        site.server.start();
        writer::assert_all_there(&site.server, &acked);
    }
    let log = site.server.log();
    assert!(log.contains("Shutdown complete"), "the fence did not shut down in order:\n{log}");
    assert!(!log.contains("signal 11") && !log.contains("signal 6"), "{log}");
    for stage in ["Started", "Succeeded"] {
        let events = site.sandbox.audit("MakeInaccessible");
        assert!(events.iter().any(|event| event["status"] == stage), "{stage}: {events:?}");
    }
}

#[test]
fn revoked_under_load_with_o_direct() {
    revoked_under_load("--innodb-flush-method=O_DIRECT");
}

#[test]
fn revoked_under_load_with_fsync() {
    revoked_under_load("--innodb-flush-method=fsync");
}

#[test]
fn an_idle_warm_server_is_stopped_too() {
    if !can_run_mariadb() {
        return;
    }
    let site = Site::running(&[], "");
    site.server
        .sql(&[&format!("INSERT INTO {TABLE} SELECT seq, 'cached' FROM acked.seq_1_to_1000")]);
    let mut warm = site.server.connect().unwrap();
    let rows = format!("SELECT COUNT(*) FROM {TABLE} WHERE word = 'cached'");
    assert_eq!(warm.query_first(&rows).unwrap(), Some(1000));
    // From here on nobody does anything: only the watcher sees that the key is gone.
    site.sandbox.enable_key(false);
    site.server.until_dead();
    assert!(warm.query_first::<u64, _>(&rows).is_err());
    site.sandbox.until_inaccessible();
    site.sandbox.recover();
    site.server.start();
    assert_eq!(site.server.connect().unwrap().query_first(&rows).unwrap(), Some(1000));
}

/// A supervisor starts the server again each time it ends, as systemd would.
#[test]
fn a_supervised_server_serves_nothing_while_inaccessible() {
    if !can_run_mariadb() {
        return;
    }
    let site = Site::running(&[], "");
    site.server
        .sql(&[&format!("INSERT INTO {TABLE} SELECT seq, 'cached' FROM acked.seq_1_to_1000")]);
    site.server.stop();
    let end = AtomicBool::new(false);
    let rows = format!("SELECT COUNT(*) FROM {TABLE}");
    let count = || site.server.connect()?.query_first::<u64, _>(&rows).ok()?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                let mut child = site.server.spawn();
                while child.try_wait().unwrap().is_none() {
                    if end.load(Ordering::Relaxed) {
                        signal(child.id() as i32, Signal::TERM);
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
                std::thread::sleep(Duration::from_millis(300));
            }
        });
        // Also when an assertion fails, or the supervisor would go on for ever.
        let _stop = StopAtEnd(&end);
        until("the supervised server to serve", || count() == Some(1000));
        site.sandbox.revoke();
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(6) {
            assert_eq!(count(), None, "rows are served while the volume is Inaccessible");
            std::thread::sleep(Duration::from_millis(100));
        }
        site.sandbox.recover();
        until("the supervisor to bring the server back", || count() == Some(1000));
    });
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Log and audit trail go to pipes that nobody reads, and that are full: as a disk that hangs.
#[test]
fn a_log_that_hangs_holds_nothing_up() {
    if !can_run_mariadb() {
        return;
    }
    let mut pipes = Vec::new();
    let site = Site::running_after(&[], "", |sandbox| {
        let config = sandbox.path("config/byokfs.toml");
        let mut text = std::fs::read_to_string(&config).unwrap();
        for name in ["log/audit.jsonl", "log/byokfs.log"] {
            let (file, pipe) = (sandbox.path(name), sandbox.path(&format!("{name}.pipe")));
            run("mkfifo", &[path(&pipe)]);
            let held = File::options().read(true).write(true).open(&pipe).unwrap();
            rustix::io::ioctl_fionbio(&held, true).unwrap();
            while (&held).write(&[b'x'; 4096]).is_ok() {}
            pipes.push(held);
            text = text.replace(path(&file), path(&pipe));
        }
        std::fs::write(&config, text).unwrap();
    });
    let writers = AckedWriters::start(&site.server, 2, 0);
    writers.until(150);
    site.sandbox.enable_key(false);
    site.server.until_dead();
    site.sandbox.until_inaccessible();
    assert!(std::fs::read_dir(site.sandbox.mnt()).is_err());
    let acked = writers.finish();
    site.sandbox.recover();
    site.server.start();
    writer::assert_all_there(&site.server, &acked);
    // What has waited is there once somebody reads.
    let mut trail = String::new();
    until("the trail", || {
        let mut buf = [0; 65536];
        if let Ok(count) = (&pipes[0]).read(&mut buf) {
            trail.push_str(&String::from_utf8_lossy(&buf[..count]));
        }
        ["MakeInaccessible", "MakeAccessible"].iter().all(|event| trail.contains(event))
    });
    site.server.stop();
    site.sandbox.umount();
}

/// Nobody watches the key when the daemon is gone: its guard fences the server and takes the mount away.
#[test]
fn kill_9_of_the_daemon_fences_the_server_and_unmounts() {
    if !can_run_mariadb() {
        return;
    }
    let mut site = Site::running(&[], "");
    let writers = AckedWriters::start(&site.server, 2, 0);
    writers.until(150);
    let (daemon, guard) = (site.sandbox.daemon(), site.sandbox.guard().expect("a guard"));
    signal(daemon, Signal::KILL);
    site.server.until_dead();
    until("the mount to go", || !site.sandbox.is_mounted());
    until("the guard to end", || !alive(guard));
    let acked = writers.finish();
    let gone = site.sandbox.byokfs(&["status", path(&site.sandbox.mnt())]);
    gone.fails(10);

    site.sandbox.mount();
    site.server.start();
    writer::assert_all_there(&site.server, &acked);
}

/// A pid file may be stale and name a process that has nothing to do with the mount.
#[test]
fn an_innocent_process_in_the_pid_file_is_left_alone() {
    if !can_run_mariadb() {
        return;
    }
    let site = Site::running(&[], "");
    site.server.stop();
    let mut innocent = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    std::fs::write(site.server.pid_file(), format!("{}\n", innocent.id())).unwrap();
    site.sandbox.revoke();
    let alive = innocent.try_wait().unwrap().is_none();
    innocent.kill().unwrap();
    innocent.wait().unwrap();
    assert!(alive, "a process without a file on the mount was ended");
}
