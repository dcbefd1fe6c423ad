//! `byokfs rotate dek`: has the daemon encrypt files anew, and watches.

use std::io::IsTerminal;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::daemon::control::Verb;
use crate::error::{Context, Error, Kind, Result};

use super::args::RotateDekArgs;
use super::output;
use super::status::describe_rotation;
use super::target::Target;

/// The files are looked for before the answer.
const TIMEOUT: Duration = Duration::from_secs(600);
const LOOK_EVERY: Duration = Duration::from_millis(300);

pub(super) fn run(args: RotateDekArgs) -> Result<()> {
    let mut target = Target::find(&args.report.target)?;
    if args.pause {
        let status = target.call(Verb::PauseRotation, TIMEOUT)?;
        return show(&args, &status);
    }
    let inodes = match args.paths.as_slice() {
        [] => None,
        paths => Some(paths.iter().map(|path| inode(path, &target.mnt)).collect::<Result<_>>()?),
    };
    let begun = target.call(Verb::RotateDek { inodes, rate: args.rate }, TIMEOUT)?;
    if args.no_wait {
        return show(&args, &begun);
    }
    let ended = wait(&args, begun)?;
    show(&args, &ended)
}

/// Of a file of the mount: what it is on the disk below too.
fn inode(path: &Path, mnt: &Path) -> Result<u64> {
    let of = |path: &Path| {
        std::fs::symlink_metadata(path).context(|| format!("cannot look at {}", path.display()))
    };
    let metadata = of(path)?;
    if metadata.dev() != of(mnt)?.dev() {
        return Err(Error::usage(format!("{} is not in {}", path.display(), mnt.display())));
    }
    if !metadata.is_file() && !metadata.is_dir() {
        let message = format!("{} is neither a file nor a directory", path.display());
        return Err(Error::usage(message));
    }
    Ok(metadata.ino())
}

/// Until it is done.
fn wait(args: &RotateDekArgs, mut status: Value) -> Result<Value> {
    let terminal = std::io::stderr().is_terminal();
    loop {
        let Some(rotation) = status.as_object() else { return Ok(status) };
        let line = describe_rotation(rotation);
        match rotation.get("state").and_then(Value::as_str) {
            Some("running" | "waiting") => {}
            Some("done") => {
                if terminal {
                    output::end_progress();
                }
                return finished(rotation.clone());
            }
            _ => return Err(Error::new(Kind::Io, format!("it is not done: {line}"))),
        }
        if terminal {
            output::progress(&line);
        }
        std::thread::sleep(LOOK_EVERY);
        // A connection of its own each time: the daemon ends one that is silent.
        let mut target = Target::find(&args.report.target)?;
        status = target.call(Verb::Status, TIMEOUT)?["rotation"].take();
    }
}

/// What cannot be read keeps its key: that is for the caller to know.
fn finished(rotation: serde_json::Map<String, Value>) -> Result<Value> {
    if rotation.get("damaged_files").and_then(Value::as_u64).unwrap_or(0) > 0 {
        return Err(Error::corrupt(describe_rotation(&rotation)));
    }
    Ok(Value::Object(rotation))
}

fn show(args: &RotateDekArgs, status: &Value) -> Result<()> {
    if args.report.json {
        return output::json(status);
    }
    match status.as_object() {
        Some(rotation) => output::line(&describe_rotation(rotation)),
        None => output::line("no rotation is under way"),
    }
}
