//! MariaDB on a mount whose key stays: crashes of the server and of the daemon, and copies.

use std::fs;
use std::process::Command;

use crate::support::can_run_mariadb;
use crate::support::process::{Answer, run};
use crate::support::sandbox::path;
use crate::support::server::{Server, Site};
use crate::support::writer::{self, AckedWriters};

/// The two ways in which the servers make pages durable.
const O_DIRECT: &str = "--innodb-flush-method=O_DIRECT";
const FSYNC: &str = "--innodb-flush-method=fsync";

fn survives_kill_9_of_the_server(flush_method: &str) {
    if !can_run_mariadb() {
        return;
    }
    let site = Site::running(&[flush_method], "");
    site.server.sql(&[
        "CREATE DATABASE shop",
        "CREATE TABLE shop.a (id INT PRIMARY KEY, v TEXT, FULLTEXT (v)) ENGINE=InnoDB",
        "INSERT INTO shop.a SELECT seq, REPEAT('x', 500) FROM shop.seq_1_to_4000",
        "CREATE TABLE shop.b (id INT PRIMARY KEY, v TEXT) ENGINE=Aria",
        "INSERT INTO shop.b SELECT id, v FROM shop.a WHERE id < 500",
        "CREATE TABLE shop.c ENGINE=InnoDB PAGE_COMPRESSED=1 AS SELECT id, v FROM shop.a",
        "ALTER TABLE shop.a ADD COLUMN w INT DEFAULT 7, ALGORITHM=COPY",
        "RENAME TABLE shop.c TO shop.renamed",
    ]);
    let mut acked = Vec::new();
    for round in 0..2 {
        let writers = AckedWriters::start(&site.server, 2, round * 100_000_000);
        writers.until(150);
        site.server.kill9();
        acked.extend(writers.finish());
        site.server.start();
        site.server.check("shop");
        writer::assert_all_there(&site.server, &acked);
    }
    site.server.stop();
    site.sandbox.umount();
}

#[test]
fn survives_kill_9_of_the_server_with_o_direct() {
    survives_kill_9_of_the_server(O_DIRECT);
}

#[test]
fn survives_kill_9_of_the_server_with_fsync() {
    survives_kill_9_of_the_server(FSYNC);
}

#[test]
fn nothing_acknowledged_is_lost_over_a_remount() {
    if !can_run_mariadb() {
        return;
    }
    let mut site = Site::running(&[O_DIRECT], "");
    let writers = AckedWriters::start(&site.server, 2, 0);
    writers.until(150);
    let acked = {
        site.server.stop();
        writers.finish()
    };
    site.sandbox.umount();
    assert_eq!(fs::read_dir(site.sandbox.mnt()).unwrap().count(), 0);
    site.sandbox.mount();
    site.server.start();
    writer::assert_all_there(&site.server, &acked);
}

#[test]
fn a_tar_through_the_mount_restores() {
    if !can_run_mariadb() {
        return;
    }
    let site = Site::running(&[O_DIRECT], "");
    let writers = AckedWriters::start(&site.server, 2, 0);
    writers.until(100);
    site.server.stop();
    let acked = writers.finish();
    let (mnt, archive) = (site.sandbox.mnt(), site.sandbox.path("backup.tar"));
    let restored = mnt.join("restored");
    fs::create_dir(&restored).unwrap();
    run("tar", &["-C", path(&mnt), "-cf", path(&archive), "mysql"]);
    run("tar", &["-C", path(&restored), "-xpf", path(&archive)]);
    run("diff", &["-r", path(&site.server.data), path(&restored.join("mysql"))]);
    // What tar compares: modes, owners, times and contents of the first tree with the archive.
    run("tar", &["-C", path(&mnt), "--compare", "-f", path(&archive)]);

    let copy = Server::at(restored.join("mysql"), &site.sandbox.path("server"), &[O_DIRECT]);
    copy.start();
    writer::assert_all_there(&copy, &acked);
    copy.stop();
    drop(copy);

    if crate::support::has("rsync") {
        let plain = site.sandbox.path("rsynced");
        run("rsync", &["-aHAX", &format!("{}/", path(&site.server.data)), path(&plain)]);
        let again = ["-aHAXn", "--checksum", "--itemize-changes"];
        let source = format!("{}/", path(&site.server.data));
        let left = Answer::of(Command::new("rsync").args(again).arg(&source).arg(&plain)).ok();
        assert_eq!(left, "", "rsync finds differences after its own copy");
    }
}
