//! `mount -o remount`: what the kernel can change of a mount that is there. All else (the key, the
//! fence, the threads) stays as it was mounted.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::daemon::control::Verb;
use crate::daemon::users;
use crate::error::{Error, Kind, Result};
use crate::fuse;

use super::args::{ConfigArg, TargetArgs};
use super::mount_options::MountOptions;
use super::target::Target;

const STATUS_TIMEOUT: Duration = Duration::from_secs(30);
/// For the flush before a mount becomes read-only.
const SYNC_TIMEOUT: Duration = Duration::from_secs(600);

pub(super) fn run(mnt: &Path, options: &MountOptions) -> Result<()> {
    let config = ConfigArg { config: options.config.clone() };
    let mut target = Target::find(&TargetArgs { target: mnt.to_owned(), config })?;
    let shown = target.mnt.display().to_string();
    let Some(mount) = target.mount.clone() else {
        return Err(Error::new(Kind::NotMounted, format!("{shown} is being unmounted")));
    };
    let status = target.call(Verb::Status, STATUS_TIMEOUT)?;
    if !options.read_only && status.get("read_only") != Some(&Value::Bool(false)) {
        let message = format!("{shown} was mounted read-only: unmount it, and mount it again");
        return Err(Error::usage(message));
    }
    if options.fake {
        return Ok(());
    }
    let flags = fuse::Flags {
        read_only: options.read_only,
        noexec: options.no_exec,
        noatime: options.no_atime,
    };
    if let Err(error) = fuse::remount(&target.mnt, flags) {
        if error.kind != Kind::Busy {
            return Err(error);
        }
        let users = users::of(mount.device);
        let message = format!("{error}: {}", users::list(&users));
        return Err(Error::new(Kind::Busy, message));
    }
    if options.read_only {
        // What is read-only is not written later either.
        target.call(Verb::Sync, SYNC_TIMEOUT)?;
    }
    Ok(())
}
