//! Checking a volume that nobody has mounted, and repairing what can be repaired without losing
//! anything.
//!
//! One thread walks the tree and reads names, links and attributes; the others look at files, large
//! ones in pieces, so that all cores have work whatever there is. What is found is told at once and
//! not kept.
//!
//! Without a repair not one byte of the backing directory changes. A repair goes in this order, each
//! step on stable storage before the next: the copies of the volume's own files; the log, brought
//! home as by a mount; then, file by file, copies of headers, and what nobody can reach, which is
//! moved to `lost/`. It can be cut short anywhere and done again.

mod finding;
mod place;
mod pool;
mod quarantine;
mod root;
#[cfg(test)]
pub(crate) mod tests;
mod walk;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use finding::{Code, Finding, Remedy, Severity};
use place::Place;
use pool::Pool;
use quarantine::Quarantine;

use crate::backing::{Backing, NodeRef};
use crate::error::{Error, FsError, Kind, Result};
use crate::key::gate::Gate;
use crate::store::verify::{self, Flaw, Volume};
use crate::store::{Store, VolumeInfo, VolumeLock};
use crate::vfs::verify::Names;

/// What may be changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing at all.
    #[default]
    No,
    /// Copies are restored and the log is brought home; nothing is moved.
    Safe,
    All,
}

impl Repair {
    fn does(self, remedy: Remedy) -> bool {
        match remedy {
            Remedy::None => false,
            Remedy::Copy | Remedy::BringHome => self != Repair::No,
            Remedy::Quarantine => self == Repair::All,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub repair: Repair,
    /// That look at files, beside the one that walks.
    pub threads: usize,
    /// Whether somebody wants to know how much there is before it begins.
    pub progress: bool,
}

impl Default for Options {
    fn default() -> Options {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        Options { repair: Repair::No, threads, progress: false }
    }
}

/// Is told what is found, by several threads.
pub trait Report: Sync {
    fn finding(&self, finding: &Finding) -> Result<()>;
    /// A repair that could not be done, and why.
    fn trouble(&self, message: &str);
    /// How many bytes there are to be looked at, about.
    fn total(&self, _bytes: u64) {}
    /// So many more have been.
    fn progress(&self, _bytes: u64) {}
}

/// What was looked at and found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    pub errors: u64,
    pub warnings: u64,
    pub notes: u64,
    /// Of all of these, those that were repaired.
    pub repaired: u64,
    /// Errors and warnings that are left.
    pub left: u64,
    pub files: u64,
    pub directories: u64,
    pub links: u64,
    /// Sealed blocks.
    pub blocks: u64,
    /// Bytes of the disk that were read.
    pub bytes: u64,
    /// The volume was closed before the check, or has been since.
    pub closed: bool,
}

#[derive(Debug, Default)]
struct Counts {
    by_severity: [AtomicU64; 3],
    repaired: AtomicU64,
    left: AtomicU64,
    files: AtomicU64,
    directories: AtomicU64,
    links: AtomicU64,
    blocks: AtomicU64,
    bytes: AtomicU64,
}

/// A volume that is kept from everybody else.
#[derive(Debug)]
pub struct Check {
    backing: Arc<dyn Backing>,
    info: VolumeInfo,
    options: Options,
    lock: Option<VolumeLock>,
}

impl Check {
    /// Takes the volume's lock. Needs no key.
    pub fn new(backing: Arc<dyn Backing>, options: Options) -> Result<Check> {
        let info = Store::inspect(&*backing)?;
        let lock = match options.repair {
            Repair::No => verify::lock(&*backing)?,
            Repair::Safe | Repair::All => Some(Store::lock(&*backing)?),
        };
        Ok(Check { backing, info, options, lock })
    }

    pub fn info(&self) -> &VolumeInfo {
        &self.info
    }

    /// With a gate, which must be open, everything is proved. A repair needs one.
    pub fn run(&self, gate: Option<Arc<Gate>>, report: &dyn Report) -> Result<Summary> {
        let Options { repair, .. } = self.options;
        let counts = Counts::default();
        let found = Findings { check: self, report, counts: &counts };
        if self.lock.is_none() {
            found.tell(self.at_root(Code::Unlocked, "lock", "there is no lock file"), None)?;
        }
        let volume = match (&gate, repair) {
            (_, Repair::No) => self.open(&gate, &found)?,
            (Some(gate), _) => self.open_and_repair(gate, &found)?,
            (None, _) => return Err(Error::usage("a repair needs the key")),
        };
        root::check(self, &volume, &found)?;
        let job = Job {
            volume: &volume,
            names: Names::new(volume.store(), volume.is_keyed()),
            quarantine: Quarantine::new(self.backing.root()),
            // What the log holds must be home before a file is written to.
            repair: if volume.is_closed() { repair } else { Repair::No },
            found: &found,
        };
        let pool = Pool::default();
        std::thread::scope(|scope| {
            for _ in 0..self.options.threads.max(1) {
                scope.spawn(|| pool.work(&job));
            }
            let walked = walk::run(&job, &pool, self.options.progress);
            pool.close(walked.err());
        });
        pool.outcome()?;
        Ok(counts.summary(volume.is_closed()))
    }

    fn open(&self, gate: &Option<Arc<Gate>>, found: &Findings<'_>) -> Result<Volume> {
        let mut flaws = Vec::new();
        let opened = Volume::open(self.backing.clone(), gate.clone(), &mut |flaw| flaws.push(flaw));
        for flaw in flaws {
            found.of_volume(flaw, None)?;
        }
        opened
    }

    /// The first two steps of a repair.
    fn open_and_repair(&self, gate: &Arc<Gate>, found: &Findings<'_>) -> Result<Volume> {
        let open = |flaws: &mut Vec<Flaw>| {
            let gate = Some(gate.clone());
            Volume::open(self.backing.clone(), gate, &mut |flaw| flaws.push(flaw))
        };
        let (mut before, mut after) = (Vec::new(), Vec::new());
        open(&mut before)?;
        let mut failure = None;
        let needs =
            |remedy: Remedy| before.iter().any(|flaw| Code::Store(flaw.what).remedy() == remedy);
        if needs(Remedy::Copy) {
            failure = verify::restore::volume_copies(&*self.backing, gate).err();
        }
        if needs(Remedy::BringHome) && failure.is_none() {
            failure = verify::restore::bring_home(&self.backing, gate).err();
        }
        let volume = open(&mut after)?;
        for flaw in before {
            let same = |other: &&Flaw| {
                (other.what, &other.place, other.at) == (flaw.what, &flaw.place, flaw.at)
            };
            if after.iter().find(same).is_none() {
                found.of_volume(flaw, Some(true))?;
            }
        }
        for flaw in after {
            let asked = self.options.repair.does(Code::Store(flaw.what).remedy());
            found.of_volume(flaw, asked.then_some(false))?;
        }
        // What it could not do is in what is left; why, only here.
        if let Some(error) = failure {
            if matches!(error.kind, Kind::Inaccessible) {
                return Err(error);
            }
            found.report.trouble(&format!("the repair could not be completed: {error}"));
        }
        if !volume.is_closed() {
            found.report.trouble("no file is repaired while the log could not be brought home");
        }
        Ok(volume)
    }

    /// A finding about a file of the backing directory itself.
    fn at_root(&self, code: Code, name: &str, detail: impl Into<String>) -> Finding {
        let path = format!("{}/{name}", self.backing.display_path());
        Finding::new(code, path, detail.into())
    }
}

/// Where findings go.
struct Findings<'a> {
    check: &'a Check,
    report: &'a dyn Report,
    counts: &'a Counts,
}

impl Findings<'_> {
    fn tell(&self, finding: Finding, repaired: Option<bool>) -> Result<()> {
        let finding = Finding { repaired, ..finding };
        let counts = self.counts;
        counts.by_severity[finding.severity as usize].fetch_add(1, Ordering::Relaxed);
        if repaired == Some(true) {
            counts.repaired.fetch_add(1, Ordering::Relaxed);
        } else if finding.severity > Severity::Note {
            counts.left.fetch_add(1, Ordering::Relaxed);
        }
        self.report.finding(&finding)
    }

    fn of_volume(&self, flaw: Flaw, repaired: Option<bool>) -> Result<()> {
        let path = flaw.place.unwrap_or_else(|| self.check.backing.display_path());
        let finding = Finding::new(Code::Store(flaw.what), path, flaw.detail);
        self.tell(Finding { at: flaw.at, ..finding }, repaired)
    }

    /// A flaw of the file at `place`, or of what the log holds of it.
    fn of_file(&self, flaw: Flaw, place: &Place, also: &[Arc<Place>]) -> Finding {
        let backing_path = flaw.place.unwrap_or_else(|| place.backing());
        let mut finding = Finding::new(Code::Store(flaw.what), backing_path, flaw.detail);
        let sector = matches!(flaw.what, verify::What::TagSector | verify::What::GenerationSector);
        if sector && flaw.content.is_none() {
            // Nothing of the file is there yet.
            finding.severity = Severity::Warning;
            finding.meaning = "nothing is lost: the file does not go that far yet";
        }
        finding.path = place.logical();
        finding.also = also.iter().filter_map(|place| place.logical()).collect();
        finding.at = flaw.at;
        finding.content(flaw.content)
    }
}

impl Counts {
    fn summary(&self, closed: bool) -> Summary {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let severity = |severity: Severity| get(&self.by_severity[severity as usize]);
        Summary {
            errors: severity(Severity::Error),
            warnings: severity(Severity::Warning),
            notes: severity(Severity::Note),
            repaired: get(&self.repaired),
            left: get(&self.left),
            files: get(&self.files),
            directories: get(&self.directories),
            links: get(&self.links),
            blocks: get(&self.blocks),
            bytes: get(&self.bytes),
            closed,
        }
    }
}

/// What walker and workers share.
struct Job<'a> {
    volume: &'a Volume,
    names: Names,
    quarantine: Quarantine,
    repair: Repair,
    found: &'a Findings<'a>,
}

impl Job<'_> {
    fn counts(&self) -> &Counts {
        self.found.counts
    }

    /// A finding about something of the tree, and what a repair does about it: `dir` is where it
    /// is. True if it was moved away.
    fn judge(&self, finding: Finding, dir: &NodeRef, name: &[u8]) -> Result<bool> {
        let quarantine = finding.code.remedy() == Remedy::Quarantine;
        if !quarantine || !self.repair.does(Remedy::Quarantine) {
            self.found.tell(finding, None)?;
            return Ok(false);
        }
        let aside = self.quarantine.take(dir, name, &finding)?;
        let detail = format!("{}; moved to lost/{aside}", finding.detail);
        self.found.tell(Finding { detail, ..finding }, Some(true))?;
        Ok(true)
    }
}

/// What keeps a check from going on.
fn fatal(error: FsError) -> Error {
    match error {
        FsError::CutOff(_) => Error::new(Kind::Inaccessible, "the key was lost during the check"),
        FsError::Integrity(_) => Error::corrupt(error.to_string()),
        FsError::Os(errno) => Error::io("the check cannot go on", errno.into()),
    }
}

/// Of something that cannot be read: why, unless the check cannot go on.
fn unreadable(error: FsError) -> Result<String> {
    match error {
        FsError::Os(errno) if errno != rustix::io::Errno::NOMEM => {
            Ok(format!("the disk does not give it out: {errno}"))
        }
        error => Err(fatal(error)),
    }
}
