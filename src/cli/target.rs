//! From the mount point or backing directory that a verb names to the daemon behind it, without
//! touching the mount: it may be cut off, or its daemon may hang.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::config::Config;
use crate::daemon::control::{self, Client, Verb};
use crate::daemon::mountinfo::{self, Mount};
use crate::error::{Error, Kind, Result};

use super::args::TargetArgs;

/// A mount that a verb works on.
#[derive(Debug)]
pub(super) struct Target {
    pub mnt: PathBuf,
    /// None when it has left the mount table (`umount --lazy`) and its daemon still runs.
    pub mount: Option<Mount>,
    client: Option<Client>,
    run_dir: PathBuf,
}

impl Target {
    pub(super) fn find(args: &TargetArgs) -> Result<Target> {
        let config = Config::load(args.config.config.as_deref(), &[])?;
        let run_dir = config.run.dir;
        let mut names = vec![absolute(&args.target)?];
        let mut found = search(&run_dir, &names[0])?;
        if found.is_none() {
            // Only what is no mount of ours is asked for its real name.
            names.extend(std::fs::canonicalize(&names[0]));
            found = names.last().map_or(Ok(None), |name| search(&run_dir, name))?;
        }
        let Some((mnt, mount)) = found else {
            let message = format!("no volume is mounted at {}", args.target.display());
            return Err(Error::new(Kind::NotMounted, message));
        };
        let client = Client::connect(&run_dir, &mnt)?;
        if client.is_none() && mount.is_none() {
            let message = format!("no volume is mounted at {}", args.target.display());
            return Err(Error::new(Kind::NotMounted, message));
        }
        Ok(Target { mnt, mount, client, run_dir })
    }

    pub(super) fn client(&mut self) -> Result<&mut Client> {
        self.client.as_mut().ok_or_else(|| {
            Error::new(
                Kind::NotMounted,
                format!(
                    "{} is mounted, but no daemon of it answers in {}: use the configuration \
                     that it was mounted with, or take a dead mount away with `umount --lazy {}`",
                    self.mnt.display(),
                    self.run_dir.display(),
                    self.mnt.display()
                ),
            )
        })
    }

    pub(super) fn call(&mut self, verb: Verb, timeout: Duration) -> Result<Value> {
        self.client()?.call(verb, timeout)
    }
}

fn search(run_dir: &Path, name: &Path) -> Result<Option<(PathBuf, Option<Mount>)>> {
    if let Some(mount) = mountinfo::find(name)? {
        return Ok(Some((mount.mount_point.clone(), Some(mount))));
    }
    let described = control::descriptions(run_dir);
    let described = described.into_iter().find(|one| one.mnt == name || one.back == name);
    Ok(described.map(|one| (one.mnt, None)))
}

/// Absolute, the parent's symbolic links resolved: the last component may be a mount point.
fn absolute(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path)
        .map_err(|error| Error::usage(format!("{}: {error}", path.display())))?;
    Ok(match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            std::fs::canonicalize(parent).map_or(path.clone(), |parent| parent.join(name))
        }
        _ => path,
    })
}
