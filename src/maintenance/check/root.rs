//! What lies in the backing directory beside the tree.

use super::{Check, Code, Findings, quarantine};
use crate::error::{Context, Kind, Result};
use crate::key::envelope::{self, Envelope};
use crate::maintenance::rotate_deks;
use crate::store::Store;
use crate::store::verify::Volume;
use crate::vfs::verify::Names;

pub(super) fn check(check: &Check, volume: &Volume, found: &Findings<'_>) -> Result<()> {
    envelopes(check, volume, found)?;
    let root = check.backing.root();
    let cannot = || format!("cannot read {}", check.backing.display_path());
    let mut entries = root.read_dir().context(cannot)?;
    while let Some(entry) = entries.next_entry().context(cannot)? {
        let name = &entry.name[..];
        let shown = String::from_utf8_lossy(name);
        if Envelope::is_file(name, true)
            || rotate_deks::is_root_name(name, true)
            || Store::is_root_name(name, true)
        {
            let detail = "it belongs to an update of a file that was not completed";
            found.tell(check.at_root(Code::Leftover, &shown, detail), None)?;
        } else if !Store::is_root_name(name, false)
            && !Names::is_root_name(name)
            && !Envelope::is_file(name, false)
            && !rotate_deks::is_root_name(name, false)
        {
            let detail = "no file of a volume has this name";
            found.tell(check.at_root(Code::Foreign, &shown, detail), None)?;
        }
    }
    let lost = quarantine::count(&root).context(cannot)?;
    if lost > 0 {
        let detail = format!("{lost} things are there");
        found.tell(check.at_root(Code::Lost, "lost", detail), None)?;
    }
    Ok(())
}

fn envelopes(check: &Check, volume: &Volume, found: &Findings<'_>) -> Result<()> {
    let root = check.backing.root();
    let foreign = |envelope: &Envelope| {
        (envelope.volume != volume.info().uuid).then(|| "it belongs to another volume".to_owned())
    };
    let judge = |read: Result<Option<Envelope>>| match read {
        Ok(None) => Ok(None),
        Ok(Some(envelope)) => Ok(Some(foreign(&envelope))),
        Err(error) if error.kind == Kind::Unsupported || error.kind == Kind::Corrupt => {
            Ok(Some(Some(error.to_string())))
        }
        // Not a regular file, or the disk does not give it out.
        Err(error) => Ok::<_, crate::Error>(Some(Some(error.to_string()))),
    };
    let previous = judge(Envelope::load_previous(&root))?;
    let current = Envelope::load_current(&root);
    if let Ok(Some(Envelope { retiring: Some(old), .. })) = &current {
        let detail = format!("it still has volume key {}, which is being replaced", old.id);
        found.tell(check.at_root(Code::RetiringKey, envelope::FILE, detail), None)?;
    }
    match judge(current)? {
        Some(None) => {}
        Some(Some(detail)) => {
            found.tell(check.at_root(Code::Envelope, envelope::FILE, detail), None)?;
        }
        None if previous.as_ref().is_some_and(Option::is_none) => {
            let detail = "it is missing";
            found.tell(check.at_root(Code::EnvelopeMissing, envelope::FILE, detail), None)?;
        }
        None => {
            let detail = "it is missing";
            found.tell(check.at_root(Code::Envelope, envelope::FILE, detail), None)?;
        }
    }
    if let Some(Some(detail)) = previous {
        let finding = check.at_root(Code::EnvelopePrevious, envelope::PREVIOUS_FILE, detail);
        found.tell(finding, None)?;
    }
    Ok(())
}
