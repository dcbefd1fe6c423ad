//! Escrow: a backup of the KEK, made by its own key service before the key is first needed.
//!
//! A purged key without one is the end of the data. What the service hands out only the service
//! itself can use; it lies in a file of its owner's alone, outside the volume, and the pin notes
//! when it was made and of which key version.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use super::check;
use super::pins::Escrow;
use crate::error::{Context, Error, Result};
use crate::key::clock::BootTime;
use crate::key::provider::Provider;
use crate::key::requirement::{Row, Verdict};
use crate::observe::audit::timestamp;

const LIMIT: Duration = Duration::from_secs(60);
const REQUIREMENT: &str = "key backup";
const FIX: &str = "have the key backed up and noted: `byokfs escrow`";

/// A backup that was written; it is removed again unless [`Written::keep`]s it.
#[derive(Debug)]
pub struct Written<'a> {
    file: &'a Path,
    kept: bool,
}

impl Written<'_> {
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Written<'_> {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = std::fs::remove_file(self.file)
        {
            log::warn!("cannot remove {}: {error}", self.file.display());
        }
    }
}

/// Has the service back the key up to a new file outside `back`. Durable when this returns.
pub fn back_up<'a>(
    provider: &dyn Provider,
    kid: &str,
    back: &Path,
    file: &'a Path,
) -> Result<Written<'a>> {
    if check::real(file).starts_with(back) {
        return Err(Error::usage(format!(
            "{} lies in the volume, which needs that very key: put the backup elsewhere, best on \
             another machine",
            file.display()
        )));
    }
    let mut session = provider.session(BootTime::now() + LIMIT)?;
    let backup = session.back_up(kid).map_err(|error| {
        let hint = "the identity of a host need not have that right: have the key officer make \
                    the backup, and note it with `byokfs escrow BACK --made-elsewhere`";
        Error::new(Error::from(error.clone()).kind, format!("{error}; {hint}"))
    })?;
    let failed = || format!("cannot write the key's backup {}", file.display());
    let mut target =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(file).context(failed)?;
    let written = Written { file, kept: false };
    target.write_all(&backup).and_then(|()| target.sync_all()).context(failed)?;
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).context(failed)?;
    Ok(written)
}

/// For the pin. Without a file it was made elsewhere.
pub fn note(kid: &str, file: Option<&Path>) -> Result<Escrow> {
    let file = file
        .map(|file| {
            let absolute = std::path::absolute(file);
            absolute.map_err(|error| Error::io(format!("cannot resolve {}", file.display()), error))
        })
        .transpose()?;
    Ok(Escrow { kek: kid.to_owned(), made: timestamp(std::time::SystemTime::now()), file })
}

/// `check-key`'s row on it, for a volume whose envelope names `kid`.
pub fn row(escrow: Option<&Escrow>, kid: &str, strict: bool) -> Row {
    let bad = if strict { Verdict::Fail } else { Verdict::Warn };
    let row = |found: String, verdict| {
        let fix = if verdict == Verdict::Ok { "" } else { FIX };
        Row { requirement: REQUIREMENT, found, verdict, fix, reason: None }
    };
    let Some(escrow) = escrow else { return row("none known".into(), bad) };
    let made = format!("made {}", escrow.made);
    if escrow.kek != kid {
        return row(format!("{made}, of an earlier version"), bad);
    }
    match &escrow.file {
        // A file that was taken to a safer place is as it should be; an empty one is not.
        Some(file) if std::fs::metadata(file).is_ok_and(|meta| meta.len() == 0) => {
            row(format!("{} is empty", file.display()), bad)
        }
        _ => row(made, Verdict::Ok),
    }
}

/// What `init` says where it made none.
pub const HINT: &str = "no backup of the key is known: without one a purged key is the end of the \
                        data; `byokfs escrow` makes or notes one";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows() {
        let escrow = note("k/1", None).unwrap();
        assert_eq!(row(Some(&escrow), "k/1", true).verdict, Verdict::Ok);
        assert_eq!(row(Some(&escrow), "k/2", false).verdict, Verdict::Warn);
        assert_eq!(row(None, "k/1", false).verdict, Verdict::Warn);
        assert_eq!(row(None, "k/1", true).verdict, Verdict::Fail);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("backup");
        let escrow = note("k/1", Some(&file)).unwrap();
        assert_eq!(row(Some(&escrow), "k/1", false).verdict, Verdict::Ok, "taken elsewhere");
        std::fs::write(&file, "").unwrap();
        assert_eq!(row(Some(&escrow), "k/1", false).verdict, Verdict::Warn);
        std::fs::write(&file, "x").unwrap();
        assert_eq!(row(Some(&escrow), "k/1", false).verdict, Verdict::Ok);
    }
}
