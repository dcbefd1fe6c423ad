//! `byokfs umount`: returns when the daemon has ended.

use std::time::{Duration, Instant};

use crate::daemon::control::Verb;
use crate::daemon::{mountinfo, users};
use crate::error::{Error, Kind, Result};

use super::args::TargetArgs;
use super::target::Target;

/// For the daemon's last flush.
const TIMEOUT: Duration = Duration::from_secs(600);

pub(super) fn run(args: TargetArgs) -> Result<()> {
    let mut target = Target::find(&args)?;
    let Some(mount) = target.mount.clone() else {
        // Detached already: the daemon ends when its last file is closed.
        return target.client()?.wait_for_end(TIMEOUT);
    };
    if target.client().is_err() {
        // Left behind by its daemon and its guard, or of another run directory; in both cases a
        // plain unmount does no harm.
        return unmount_unattended(&mount);
    }
    match target.call(Verb::Umount, TIMEOUT) {
        // The daemon may have ended before its answer was out.
        Err(_) if !mountinfo::is_mounted(mount.device, &mount.source)? => {}
        result => result.map(drop)?,
    }
    target.client()?.wait_for_end(TIMEOUT)?;
    wait_for_the_table(&mount)
}

fn unmount_unattended(mount: &mountinfo::Mount) -> Result<()> {
    let users = users::of(mount.device);
    if !users.is_empty() {
        let message = format!("{} is busy: {}", mount.mount_point.display(), users::list(&users));
        return Err(Error::new(Kind::Busy, message));
    }
    mountinfo::unmount(&mount.mount_point, false)
}

/// The kernel may need a moment after the daemon's end.
fn wait_for_the_table(mount: &mountinfo::Mount) -> Result<()> {
    let start = Instant::now();
    while mountinfo::is_mounted(mount.device, &mount.source)? {
        if start.elapsed() > Duration::from_secs(10) {
            let message = format!("{} is still mounted", mount.mount_point.display());
            return Err(Error::new(Kind::Busy, message));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
