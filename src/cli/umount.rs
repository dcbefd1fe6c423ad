//! `byokfs umount`: returns when the daemon has ended.

use std::time::{Duration, Instant};

use crate::daemon::control::Verb;
use crate::daemon::{mountinfo, users};
use crate::error::{Context, Error, Kind, Result};
use crate::sys;

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
        // A mount that its daemon and its guard have left: nothing else would take it away.
        return unmount_dead(&mount, target);
    }
    target.call(Verb::Umount, TIMEOUT)?;
    target.client()?.wait_for_end(TIMEOUT)?;
    wait_for_the_table(&mount)
}

fn unmount_dead(mount: &mountinfo::Mount, mut target: Target) -> Result<()> {
    let users = users::of(mount.device);
    if !users.is_empty() {
        let message = format!("{} is busy: {}", mount.mount_point.display(), users::list(&users));
        return Err(Error::new(Kind::Busy, message));
    }
    // Never a mount whose daemon only listens elsewhere: that one answers a plain unmount too.
    match sys::mount::unmount(&mount.mount_point, false) {
        Ok(()) => Ok(()),
        Err(error) => target
            .client()
            .map(drop)
            .and(Err(error).context(|| format!("cannot unmount {}", mount.mount_point.display()))),
    }
}

/// The kernel may need a moment after the daemon's end.
fn wait_for_the_table(mount: &mountinfo::Mount) -> Result<()> {
    let start = Instant::now();
    while mountinfo::is_mounted(mount.device)? {
        if start.elapsed() > Duration::from_secs(10) {
            let message = format!("{} is still mounted", mount.mount_point.display());
            return Err(Error::new(Kind::Busy, message));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
