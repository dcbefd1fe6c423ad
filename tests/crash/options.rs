//! The command line.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::machine::FileSystem;
use crate::support::kernel;

pub const HELP: &str = "\
usage: cargo test --test crash -- [power|kill] [OPTION]...

power  cuts the power of the disk below a volume, under load
kill   kills the daemon with SIGKILL, under load
Without a verb: the harness's own tests.

--load LIST          of records,names,sqlite-wal,sqlite-rollback,mariadb,mysql (default: all)
--fs LIST            of ext4,xfs, below the volume of `power` (default: ext4)
--doublewrite LIST   of on,off, for the servers of `power` (default: both)
--cuts N, --kills N  per load (default: a few)
--long               100 kills, 40 cuts, and both file systems; also by BYOKFS_CRASH_LONG=1
--seed N             repeats the choices of a run that printed N: when the power goes and what is
                     kept. What the servers do in between is theirs
--plain              `power` without byokfs: what the file system itself promises must hold, or
                     the harness is wrong. (With doublewrite off it promises nothing)
--mysql-prefix DIR   where scripts/mysql-prefix has put MySQL
--image-dir DIR      for the disk's image (default: TMPDIR)
--keep FILE          gets a copy of the disk's image as it was found, if a check fails
BYOKFS_BINARY names another byokfs, a release build for example.
";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    SelfTest,
    Power,
    Kill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    Records,
    Names,
    SqliteWal,
    SqliteRollback,
    MariaDb,
    MySql,
}

const WORKLOADS: [(&str, Workload); 6] = [
    ("records", Workload::Records),
    ("names", Workload::Names),
    ("sqlite-wal", Workload::SqliteWal),
    ("sqlite-rollback", Workload::SqliteRollback),
    ("mariadb", Workload::MariaDb),
    ("mysql", Workload::MySql),
];

impl Workload {
    fn name(self) -> &'static str {
        WORKLOADS.iter().find(|(_, workload)| *workload == self).map_or("", |(name, _)| name)
    }

    pub fn is_server(self) -> bool {
        matches!(self, Workload::MariaDb | Workload::MySql)
    }

    /// To the disk, within which the power goes: some of them while a server starts.
    pub fn requests(self) -> u64 {
        if self.is_server() { 6000 } else { 2500 }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Cell {
    pub what: What,
    pub workload: Workload,
    pub file_system: FileSystem,
    pub doublewrite: bool,
}

impl Cell {
    /// So that cells of one seed differ.
    pub fn number(&self) -> u64 {
        let workload = WORKLOADS.iter().position(|(_, workload)| *workload == self.workload);
        let number = workload.unwrap_or_default() as u64;
        number << 8
            | u64::from(self.file_system == FileSystem::Xfs) << 4
            | u64::from(self.doublewrite)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.workload.name();
        match self.what {
            What::Kill => write!(f, "kill: {name}"),
            _ => write!(f, "power: {name} on {}", self.file_system.name()),
        }?;
        match self.workload.is_server() {
            true if self.doublewrite => write!(f, ", doublewrite on"),
            true => write!(f, ", doublewrite off"),
            false => Ok(()),
        }
    }
}

#[derive(Debug)]
pub struct Options {
    pub what: What,
    /// Called as a test harness would be: with filters, or for a list.
    pub foreign: bool,
    loads: Vec<Workload>,
    file_systems: Vec<FileSystem>,
    doublewrite: Vec<bool>,
    cuts: Option<u32>,
    kills: Option<u32>,
    long: bool,
    pub seed: u64,
    pub mysql_prefix: Option<PathBuf>,
    pub image_dir: Option<PathBuf>,
    pub plain: bool,
    keep: Option<PathBuf>,
}

impl Options {
    /// None if all that was asked for was help.
    pub fn parse(args: &[String]) -> Result<Option<Options>, String> {
        let now =
            SystemTime::now().duration_since(UNIX_EPOCH).map_err(|error| error.to_string())?;
        let mut options = Options {
            what: What::SelfTest,
            foreign: false,
            loads: WORKLOADS.iter().map(|(_, workload)| *workload).collect(),
            file_systems: Vec::new(),
            doublewrite: vec![true, false],
            cuts: None,
            kills: None,
            long: std::env::var_os("BYOKFS_CRASH_LONG").is_some_and(|value| value == "1"),
            seed: now.as_nanos() as u64 % 1_000_000,
            mysql_prefix: std::env::var_os("BYOKFS_MYSQL_PREFIX").map(PathBuf::from),
            image_dir: None,
            plain: false,
            keep: None,
        };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "power" => options.what = What::Power,
                "kill" => options.what = What::Kill,
                "--load" => options.loads = list(value()?, &WORKLOADS)?,
                "--fs" => {
                    let known = [("ext4", FileSystem::Ext4), ("xfs", FileSystem::Xfs)];
                    options.file_systems = list(value()?, &known)?;
                }
                "--doublewrite" => {
                    options.doublewrite = list(value()?, &[("on", true), ("off", false)])?;
                }
                "--cuts" => options.cuts = Some(number(value()?)?),
                "--kills" => options.kills = Some(number(value()?)?),
                "--seed" => options.seed = number(value()?)?,
                "--plain" => options.plain = true,
                "--long" => options.long = true,
                "--mysql-prefix" => options.mysql_prefix = Some(value()?.into()),
                "--image-dir" => options.image_dir = Some(value()?.into()),
                "--keep" => options.keep = Some(value()?.into()),
                "-h" | "--help" => {
                    print!("{HELP}");
                    return Ok(None);
                }
                "--list" => {
                    options.foreign = true;
                    return Ok(Some(options));
                }
                // Of `cargo test -- ...` for every test binary.
                "--nocapture" | "--show-output" | "--include-ignored" | "-q" | "--quiet" => {}
                "--test-threads" => drop(value()?),
                other if other.starts_with("--test-threads=") => {}
                other if other.starts_with('-') => return Err(format!("unknown option {other}")),
                _ => {
                    options.foreign = true;
                    return Ok(Some(options));
                }
            }
        }
        if options.file_systems.is_empty() {
            options.file_systems = match options.long {
                true => vec![FileSystem::Ext4, FileSystem::Xfs],
                false => vec![FileSystem::Ext4],
            };
        }
        Ok(Some(options))
    }

    pub fn cells(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for &workload in &self.loads {
            // Its index is a file that its processes share by mapping it.
            if workload == Workload::SqliteWal && !kernel::maps_shared() {
                continue;
            }
            let what = self.what;
            if what == What::Kill {
                let file_system = FileSystem::Ext4;
                // Whether the pages are written twice makes no difference to a killed daemon that
                // a power cut would not make.
                cells.push(Cell { what, workload, file_system, doublewrite: true });
                continue;
            }
            for &file_system in &self.file_systems {
                let doublewrite =
                    if workload.is_server() { &self.doublewrite[..] } else { &[true] };
                for &doublewrite in doublewrite {
                    cells.push(Cell { what, workload, file_system, doublewrite });
                }
            }
        }
        cells
    }

    pub fn cuts(&self, workload: Workload) -> u32 {
        self.cuts.unwrap_or(match (self.long, workload.is_server()) {
            (true, _) => 40,
            (false, true) => 3,
            (false, false) => 6,
        })
    }

    pub fn kills(&self) -> u32 {
        self.kills.unwrap_or(if self.long { 100 } else { 3 })
    }

    /// Runs the check; what it finds wrong can be looked at afterwards, as the cut left it plus
    /// what has been written since.
    pub fn keep_if_panicking(&self, image: &Path, check: impl FnOnce()) {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check));
        if let Err(panic) = result {
            if let Some(keep) = &self.keep {
                match std::fs::copy(image, keep) {
                    Ok(_) => eprintln!("the disk's image is in {}", keep.display()),
                    Err(error) => eprintln!("cannot keep the image: {error}"),
                }
            }
            std::panic::resume_unwind(panic);
        }
    }
}

fn list<T: Copy>(value: &str, known: &[(&str, T)]) -> Result<Vec<T>, String> {
    let find = |name: &str| {
        let found = known.iter().find(|(known, _)| *known == name);
        found.map(|(_, value)| *value).ok_or_else(|| format!("unknown: {name}"))
    };
    value.split(',').map(find).collect()
}

fn number<T: std::str::FromStr>(value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{value} is no number"))
}
