//! What the audit trail has of a repair: `byokfs fsck --repair`.

use parking_lot::Mutex;

use super::{check, hex};
use crate::config::Config;
use crate::error::Result;
use crate::maintenance::check::{Finding, Remedy, Repair, Report, Summary};
use crate::observe::audit::{self, Event, Name, Status, emit};
use crate::store::VolumeInfo;

/// Paths that an event names; the manifest in `lost/` has them all.
const PATHS: usize = 100;

/// Opens the trail that the configuration names.
pub fn open_trail(config: &Config, info: &VolumeInfo) -> Result<()> {
    let Some(file) = &config.audit.file else { return Ok(()) };
    check::parent_dir(file)?;
    audit::install(file, &[("volume", hex::uuid(&info.uuid))])
}

/// Carries out a repair, which tells the report that it is given what it finds and does.
pub fn audited(
    repair: Repair,
    report: &dyn Report,
    carry_out: impl FnOnce(&dyn Report) -> Result<Summary>,
) -> Result<Summary> {
    let event = |status| {
        let moves = repair == Repair::All;
        Event::new(Name::VolumeRepaired).status(status).with("moves", moves)
    };
    emit(event(Status::Started));
    let noted = Noted { report, done: Mutex::default() };
    let outcome = carry_out(&noted);
    let Done { repaired, quarantined, paths, trouble } = noted.done.into_inner();
    let error = outcome.as_ref().err().map(ToString::to_string).or(trouble);
    let status = if error.is_some() { Status::Failed } else { Status::Succeeded };
    // Also of one that was cut short: what was moved is where it is.
    let mut ended = event(status)
        .with("repaired", repaired)
        .with("quarantined", quarantined)
        .with("paths", paths);
    if let Ok(summary) = &outcome {
        ended = ended
            .with("errors", summary.errors)
            .with("warnings", summary.warnings)
            .with("notes", summary.notes)
            .with("left", summary.left);
    }
    if let Some(error) = error {
        ended = ended.with("error", error);
    }
    emit(ended);
    outcome
}

#[derive(Debug, Default)]
struct Done {
    repaired: u64,
    quarantined: u64,
    /// Where the first of these were, on the disk.
    paths: Vec<String>,
    /// The first thing that could not be done.
    trouble: Option<String>,
}

/// Passes everything on.
struct Noted<'a> {
    report: &'a dyn Report,
    done: Mutex<Done>,
}

impl Report for Noted<'_> {
    fn finding(&self, finding: &Finding) -> Result<()> {
        if finding.repaired == Some(true) {
            let mut done = self.done.lock();
            done.repaired += 1;
            if finding.code.remedy() == Remedy::Quarantine {
                done.quarantined += 1;
                if done.paths.len() < PATHS {
                    done.paths.push(finding.backing_path.clone());
                }
            }
        }
        self.report.finding(finding)
    }

    fn trouble(&self, message: &str) {
        self.done.lock().trouble.get_or_insert_with(|| message.to_owned());
        self.report.trouble(message);
    }

    fn total(&self, bytes: u64) {
        self.report.total(bytes);
    }

    fn progress(&self, bytes: u64) {
        self.report.progress(bytes);
    }
}
