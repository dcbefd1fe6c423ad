//! Crashes for real: power cuts below the file system that holds a volume, and `kill -9` of the
//! daemon, under load, with a ledger of all that was acknowledged. See `--help`.
//!
//! A power cut is one for all that runs: database server, byokfs, ext4 or XFS, loop device; the disk
//! ([`disk`]) keeps what was flushed and, by chance, some of what was not. Everything runs in
//! namespaces of its own, so that no end of this process leaves a mount or a process behind.

mod disk;
mod load;
mod machine;
mod options;
#[path = "../support/mod.rs"]
#[allow(dead_code)] // not every test binary needs all of it
mod support;

use std::fs;
use std::os::unix::process::CommandExt;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use byokfs::backing::memory::Random;

use crate::disk::medium::{Plan, checks};
use crate::load::names::Names;
use crate::load::records::Records;
use crate::load::server::Database;
use crate::load::sqlite::{self, Journal, Sqlite};
use crate::load::{Crash, Load};
use crate::machine::{Drive, FileSystem, Machine};
use crate::options::{Cell, Options, What, Workload};
use crate::support::sandbox::Sandbox;
use crate::support::server::{Flavor, fence_config};
use crate::support::{can_loop, has, until};

/// Set for the process that runs in the namespaces.
const INSIDE: &str = "BYOKFS_CRASH_INSIDE";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|verb| verb == sqlite::VERB) {
        return match sqlite::writer(&args[1..]) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("the SQLite writer ends: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let options = match Options::parse(&args) {
        Ok(Some(options)) => options,
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crash: {error}; see --help");
            return ExitCode::from(2);
        }
    };
    // Lists and filters are the test harness's, which this is not.
    if options.foreign {
        return summary(0, 0);
    }
    if !can_loop() {
        return summary(0, 0);
    }
    if std::env::var_os(INSIDE).is_none() {
        let error = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .arg(std::env::current_exe().unwrap())
            .args(&args)
            .env(INSIDE, "1")
            .exec();
        eprintln!("crash: cannot run unshare: {error}");
        return ExitCode::FAILURE;
    }
    run(&options)
}

fn run(options: &Options) -> ExitCode {
    let (mut passed, mut failed) = (0, 0);
    let mut one = |name: &str, run: &mut dyn FnMut() -> String| {
        let start = Instant::now();
        print!("{name} ... ");
        let _ = std::io::Write::flush(&mut std::io::stdout());
        let result = std::panic::catch_unwind(AssertUnwindSafe(run));
        let seconds = start.elapsed().as_secs_f32();
        match result {
            Ok(said) => {
                passed += 1;
                println!("ok, {said}{seconds:.0} s");
            }
            Err(_) => {
                failed += 1;
                println!("FAILED after {seconds:.0} s");
            }
        }
    };
    match options.what {
        What::SelfTest => self_test(&mut one),
        What::Power | What::Kill => {
            for cell in options.cells() {
                if let Workload::MySql = cell.workload
                    && options.mysql_prefix.is_none()
                {
                    println!("skipped: {cell}: no MySQL (--mysql-prefix)");
                    continue;
                }
                if matches!(cell.workload, Workload::MariaDb) && !has("mariadbd") {
                    println!("skipped: {cell}: needs mariadb-server");
                    continue;
                }
                if cell.file_system == FileSystem::Xfs && !has("mkfs.xfs") {
                    println!("skipped: {cell}: needs mkfs.xfs");
                    continue;
                }
                let name = format!("{cell}, seed {}", options.seed);
                match options.what {
                    What::Kill => one(&name, &mut || kill(options, &cell)),
                    _ => one(&name, &mut || power(options, &cell)),
                }
            }
        }
    }
    summary(passed, failed)
}

/// As the test harness has it, for whoever adds them up.
fn summary(passed: u32, failed: u32) -> ExitCode {
    let result = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {result}. {passed} passed; {failed} failed; 0 ignored");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Power cuts, each at a request of its own to the disk; some more while the volume recovers.
fn power(options: &Options, cell: &Cell) -> String {
    let mut random = Random::new(options.seed ^ cell.number());
    let megabytes = if cell.workload.is_server() { 3000 } else { 1000 };
    let mut machine = Machine::new(options, cell.file_system, megabytes);
    let mnt = machine.mnt();
    let mut load = load(options, cell, &machine.sandbox, false, random.next_u64());
    load.prepare(&mnt);
    machine.settle();
    let (mut unsynced, mut kept, mut sectors, mut again) = (0, 0, 0, 0);
    for number in 1..=options.cuts(cell.workload) {
        let plan = Plan::random(&mut random, cell.workload.requests());
        let shown = format!(
            "cut {number}: after {} requests, from {} unsynced, {:?}",
            plan.after, plan.unsynced, plan.fate
        );
        let told = Told::new(&shown);
        let disk = machine.drive.disk();
        let off = || disk.medium().cut().is_some();
        disk.medium().plan(plan);
        // What the file system acknowledges for a moment after its disk has failed counts where
        // byokfs would have to know better: not for names, which are the file system's.
        if options.plain || matches!(cell.workload, Workload::Names) {
            let gone = Arc::new(AtomicBool::new(false));
            load.ignore_after(Arc::clone(&gone));
            disk.medium().tell(gone);
        }
        load.start(&mnt, &off);
        until("the power to go", off);
        load.end();
        let mut cut = machine.drive.cut();
        machine.take_down();
        loop {
            if let Some(cut) = cut {
                unsynced += cut.unsynced;
                sectors += cut.sectors;
                kept += cut.sectors_kept;
            }
            let most = if random.chance(4) { 40 } else { 1000 };
            let plan = random.chance(3).then(|| Plan::random(&mut random, most));
            if machine.power_on(plan) {
                break;
            }
            again += 1;
            cut = machine.drive.cut();
            machine.take_down();
        }
        options.keep_if_panicking(machine.drive.image(), || {
            load.verify(&mnt, Crash::Power);
            no_integrity_failure(&machine.sandbox);
        });
        drop(told);
    }
    let cuts = options.cuts(cell.workload);
    format!(
        "{cuts} cuts and {again} during recovery: {kept} of {sectors} sectors in {unsynced} \
         unsynced writes kept; {} acknowledged, ",
        load.acknowledged()
    )
}

/// The daemon is killed, the rest of the machine is not.
fn kill(options: &Options, cell: &Cell) -> String {
    let mut random = Random::new(options.seed ^ cell.number());
    let sandbox = Sandbox::bare();
    let fence = match cell.workload.is_server() {
        true => fence_config(&sandbox, &sandbox.path("server")),
        false => String::new(),
    };
    let mut sandbox = sandbox.and_mounted(&fence);
    let mnt = sandbox.mnt();
    let mut load = load(options, cell, &sandbox, true, random.next_u64());
    load.prepare(&mnt);
    let kills = options.kills();
    let mut again = 0;
    for number in 1..=kills {
        let (commits, pause) = (random.below(400), random.below(30_000));
        let told = Told::new(&format!("kill {number}: after {commits} and {pause} us"));
        let from = load.acknowledged();
        load.start(&mnt, &|| false);
        until("acknowledgements", || load.acknowledged() >= from + commits);
        std::thread::sleep(Duration::from_micros(pause));
        sandbox.kill_daemon();
        load.end();
        until("the guard to unmount", || !sandbox.is_mounted());
        // Now and then once more while it mounts and recovers.
        while random.chance(3) {
            sandbox.mount_and_kill(Duration::from_micros(random.below(300_000)));
            again += 1;
        }
        sandbox.mount();
        load.verify(&mnt, Crash::Kill);
        no_integrity_failure(&sandbox);
        drop(told);
    }
    format!("{kills} kills and {again} while mounting; {} acknowledged, ", load.acknowledged())
}

/// Says, when the test fails, at which crash.
struct Told(String);

impl Told {
    fn new(what: &str) -> Told {
        Told(what.to_owned())
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- {} ----", self.0);
        }
    }
}

fn load(
    options: &Options,
    cell: &Cell,
    sandbox: &Sandbox,
    fenced: bool,
    seed: u64,
) -> Box<dyn Load> {
    let database = |flavor: Flavor| {
        Database::new(
            flavor,
            cell.doublewrite,
            options.plain,
            &sandbox.path("server"),
            fenced,
            seed,
        )
    };
    match cell.workload {
        Workload::Records if options.plain => Box::new(Records::new(seed).only_durability()),
        Workload::Records => Box::new(Records::new(seed)),
        Workload::Names => Box::new(Names::new(seed)),
        Workload::SqliteWal => Box::new(Sqlite::new(Journal::Wal)),
        Workload::SqliteRollback => Box::new(Sqlite::new(Journal::Rollback)),
        Workload::MariaDb => Box::new(database(Flavor::MariaDb)),
        Workload::MySql => Box::new(database(Flavor::MySql(options.mysql_prefix.clone().unwrap()))),
    }
}

fn no_integrity_failure(sandbox: &Sandbox) {
    let found = sandbox.audit("IntegrityFailure");
    assert!(found.is_empty(), "a crash alone has damaged the volume: {found:?}");
}

/// The disk's own tests, and controls: on plain ext4 nothing that was flushed is lost; a writer that
/// does not flush, and a disk that only says it did, are found out.
fn self_test(one: &mut dyn FnMut(&str, &mut dyn FnMut() -> String)) {
    let in_dir = |check: fn(&Path)| {
        move || {
            let dir = tempfile::tempdir().unwrap();
            check(dir.path());
            String::new()
        }
    };
    one(
        "disk: what was flushed stays, and the rest meets its fate",
        &mut in_dir(checks::what_was_flushed_stays_and_the_rest_meets_its_fate),
    );
    one("disk: a seed repeats", &mut in_dir(checks::a_seed_repeats));
    one(
        "disk: without power nothing is answered",
        &mut in_dir(checks::without_power_nothing_is_answered),
    );
    one("plain ext4: nothing that was flushed is lost", &mut || {
        control(Control::Sound).expect("an honest file system has lost data");
        String::new()
    });
    one("plain ext4: a writer that does not flush is found out", &mut || {
        control(Control::Careless).expect_err("the loss was not noticed");
        String::new()
    });
    one("plain ext4: a disk that lies is found out", &mut || {
        control(Control::LyingDisk).expect_err("the loss was not noticed");
        String::new()
    });
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Control {
    Sound,
    Careless,
    LyingDisk,
}

/// A few cuts below ext4 alone; what the ledger says of them.
fn control(how: Control) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let mnt = dir.path().join("mnt");
    let mut drive = Drive::new(dir.path(), &mnt, FileSystem::Ext4, 64);
    let mut load = Records::new(4711).only_durability();
    if how == Control::Careless {
        load = load.careless();
    }
    load.prepare(&mnt);
    let mut random = Random::new(4711);
    for _ in 0..4 {
        if how == Control::LyingDisk {
            drive.disk().medium().lie();
        }
        let (written, plan) = (load.acknowledged() + 100, Plan::random(&mut random, 200));
        load.start(&mnt, &|| false);
        until("acknowledgements", || load.acknowledged() >= written);
        match how {
            // Who never flushes makes the disk no requests to count.
            Control::Careless => drive.disk().medium().cut_now(plan),
            Control::Sound | Control::LyingDisk => drive.disk().medium().plan(plan),
        }
        until("the power to go", || drive.cut().is_some());
        load.end();
        drive.take_down();
        // A disk that lies can lose the file system as well. What is found is not this run's error.
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let checked = std::panic::catch_unwind(AssertUnwindSafe(|| {
            drive.power_on();
            load.verify(&mnt, Crash::Power);
        }));
        std::panic::set_hook(hook);
        if let Err(panic) = checked {
            let text = panic.downcast_ref::<String>().cloned();
            return Err(text.unwrap_or_else(|| "no text".to_owned()));
        }
        assert!(fs::metadata(&mnt).is_ok());
    }
    Ok(())
}
