//! `byokfs mount`, and `mount.byokfs`: returns when the mount serves, or with the error.

use crate::config::{Config, Override};
use crate::daemon::check::{self, resolve};
use crate::daemon::guard;
use crate::daemon::plan::Plan;
use crate::error::Result;

use super::mount_options::MountRequest;
use super::output;

pub(super) fn run(request: MountRequest) -> Result<()> {
    let options = request.options;
    options.check()?;
    if options.remount {
        return super::remount::run(&request.mnt, &options);
    }
    let overrides: Vec<Override> = options.overrides.into_iter().map(Override::from).collect();
    let config = Config::load(options.config.as_deref(), &overrides)?;
    config.expect_server_of_fence()?;
    let plan = Plan {
        back: resolve("the backing directory", &request.back)?,
        mnt: resolve("the mount point", &request.mnt)?,
        read_only: options.read_only,
        no_exec: options.no_exec,
        no_atime: options.no_atime,
        foreground: request.foreground,
        config_dir: config.dir.0.clone(),
        config_file: config.file.clone(),
        config,
        watch: None,
    };
    check::own_paths(&plan)?;
    if options.fake {
        return Ok(());
    }
    if plan.foreground {
        return guard::run(&plan);
    }
    if let Some(why) = guard::start_in_background(&plan)? {
        output::warning(&format!("mounted, and Inaccessible: {why}"));
    }
    Ok(())
}
