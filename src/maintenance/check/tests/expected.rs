//! What is to be found, and the comparison with what is.

use super::support::{Checked, PAGE, SIZE, Volume};
use crate::maintenance::check::{Repair, Severity};

/// What a finding has to be.
pub(super) struct Expected {
    pub code: &'static str,
    pub severity: Severity,
    pub path: Option<&'static str>,
    pub at: Option<u64>,
    pub content: Option<(u64, u64)>,
}

pub(super) fn error(code: &'static str) -> Expected {
    Expected { code, severity: Severity::Error, path: None, at: None, content: None }
}

pub(super) fn warning(code: &'static str) -> Expected {
    Expected { severity: Severity::Warning, ..error(code) }
}

pub(super) fn note(code: &'static str) -> Expected {
    Expected { severity: Severity::Note, ..error(code) }
}

impl Expected {
    pub(super) fn of(self, path: &'static str) -> Expected {
        Expected { path: Some(path), ..self }
    }

    pub(super) fn at(self, at: u64) -> Expected {
        Expected { at: Some(at), ..self }
    }

    pub(super) fn blocks(self, from: u64, to: u64) -> Expected {
        self.content(from * PAGE, (to * PAGE).min(SIZE))
    }

    pub(super) fn content(self, from: u64, to: u64) -> Expected {
        Expected { content: Some((from, to)), ..self }
    }
}

/// Plants `damage` in a fresh volume and expects just this.
#[track_caller]
pub(super) fn finds(damage: impl FnOnce(&Volume), expected: &[Expected]) -> Volume {
    let volume = Volume::new();
    damage(&volume);
    compare(&volume.check(), expected);
    volume
}

/// Neither more nor less, in any order.
#[track_caller]
pub(super) fn compare(checked: &Checked, expected: &[Expected]) {
    let found: Vec<_> = checked
        .findings
        .iter()
        .map(|finding| {
            let content = finding.from.zip(finding.to);
            let path = finding.path.clone();
            (finding.code.name(), finding.severity, path, finding.at, content)
        })
        .collect();
    let mut wanted: Vec<_> = expected
        .iter()
        .map(|one| (one.code, one.severity, one.path.map(str::to_owned), one.at, one.content))
        .collect();
    wanted.sort_by_key(|one| found.iter().position(|found| found == one));
    assert_eq!(found, wanted, "{:#?}", checked.findings);
    let left = found.iter().any(|found| found.1 > Severity::Note);
    assert_eq!(checked.summary.left > 0, left);
}

/// Nothing can be done about what is wrong with the volume, and a repair does nothing.
#[track_caller]
pub(super) fn stays(volume: &Volume) {
    let (found, before) = (volume.check().codes(), volume.fingerprint());
    let repaired = volume.repair(Repair::All);
    assert_eq!(repaired.codes(), found);
    assert_eq!(repaired.summary.repaired, 0, "{:#?}", repaired.findings);
    assert!(repaired.findings.iter().all(|finding| finding.repair.is_none()));
    assert_eq!(volume.fingerprint(), before, "something has changed");
}

/// All that is wrong is repaired, nothing is left of it, and nothing was moved.
#[track_caller]
pub(super) fn is_made_good(volume: &Volume) {
    let repaired = volume.repair(Repair::Safe);
    assert!(repaired.troubles.is_empty(), "{:?}", repaired.troubles);
    assert!(repaired.summary.repaired > 0 && repaired.summary.left == 0);
    let again = volume.check();
    assert!(again.findings.is_empty(), "{:#?}", again.findings);
}
