//! Moving to `lost/` what nobody can reach, with a manifest that says what it was.
//!
//! A line of the manifest is on stable storage before the move it speaks of: a power cut leaves at
//! worst a line about something that is still in its place. Nothing is ever removed.

use std::io;

use serde_json::json;

use super::finding::Finding;
use crate::backing::{Access, FileRef, NodeRef};
use crate::error::{Context, Result};
use crate::observe::audit::timestamp;
use crate::store::lost::Lost;
use crate::sync::Mutex;

/// In `lost/`: one JSON object a line.
const MANIFEST: &[u8] = b"manifest.jsonl";

#[derive(Debug)]
pub(super) struct Quarantine {
    root: NodeRef,
    opened: Mutex<Option<Opened>>,
}

#[derive(Debug)]
struct Opened {
    lost: Lost,
    manifest: FileRef,
    end: u64,
}

impl Quarantine {
    /// Makes nothing before something is moved.
    pub(super) fn new(root: NodeRef) -> Quarantine {
        Quarantine { root, opened: Mutex::default() }
    }

    /// Moves `name` of `dir`; durable when this returns. `finding` says what it is and why. The
    /// new name.
    pub(super) fn take(&self, dir: &NodeRef, name: &[u8], finding: &Finding) -> Result<String> {
        let mut slot = self.opened.lock();
        let cannot = || format!("cannot move {} to lost/", finding.backing_path);
        let opened = match &mut *slot {
            Some(opened) => opened,
            None => slot.insert(self.open().context(cannot)?),
        };
        let aside = opened.lost.free_name().context(cannot)?;
        let mut line = json!({
            "name": aside,
            "code": finding.code.name(),
            "path": finding.path,
            "backing_path": finding.backing_path,
            "detail": finding.detail,
            "time": timestamp(std::time::SystemTime::now()),
        })
        .to_string();
        line.push('\n');
        let mut done = || -> io::Result<()> {
            opened.manifest.write_at(line.as_bytes(), opened.end)?;
            opened.manifest.sync_all()?;
            opened.end += line.len() as u64;
            opened.lost.take(&**dir, name, &aside)?;
            // The new name first: a crash leaves both, or the old one, never none.
            opened.lost.dir().sync()?;
            dir.sync()
        };
        done().context(cannot)?;
        Ok(aside)
    }

    fn open(&self) -> io::Result<Opened> {
        let lost = Lost::open(&self.root)?;
        let manifest = match lost.dir().lookup(MANIFEST) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let file = lost.dir().create_unnamed()?;
                lost.dir().link_file(&*file, MANIFEST)?;
                lost.dir().sync()?;
                self.root.sync()?;
                file
            }
            found => found?.open(Access::ReadWrite)?,
        };
        let mut end = manifest.metadata()?.size;
        // A line that a crash cut short stays one of its own.
        let mut last = [b'\n'];
        manifest.read_at(&mut last, end.saturating_sub(1))?;
        if last != [b'\n'] {
            manifest.write_at(b"\n", end)?;
            end += 1;
        }
        Ok(Opened { lost, manifest, end })
    }
}

/// How many things are in `lost/`, the manifest not counted; 0 where there is none.
pub(super) fn count(root: &NodeRef) -> io::Result<u64> {
    let dir = match root.lookup(crate::store::lost::DIRECTORY) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        found => found?,
    };
    let mut stream = dir.read_dir()?;
    let mut count = 0;
    while let Some(entry) = stream.next_entry()? {
        count += u64::from(entry.name != MANIFEST);
    }
    Ok(count)
}
