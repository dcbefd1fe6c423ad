//! The daemon's side of its guard: notices that it is gone, and starts another.
//!
//! A daemon without a guard serves on: its watcher still cuts the key off, and ending the service
//! would be the greater harm. But until another guard runs, a killed daemon would leave a server
//! serving from its cache.

use std::io::Read;
use std::process::Stdio;
use std::time::Duration;

use super::guard;
use super::plan::{Plan, Watch};
use crate::error::{Context, Result};
use crate::observe::audit::{Event, Name, emit};

/// A guard that ends at once must not be started in a loop without pause.
const PAUSE: Duration = Duration::from_secs(5);

/// Watches `life`, which ends with the guard, from a thread of its own. `changed` is told the
/// process id of each new guard.
pub fn start(
    mut life: impl Read + Send + 'static,
    plan: Plan,
    watch: Watch,
    changed: impl Fn(i32) + Send + 'static,
) -> Result<()> {
    let keep = move || {
        let mut rest = [0; 64];
        // Nothing more is ever written: whatever ends this read is the guard's end.
        while matches!(life.read(&mut rest), Ok(1..)) {}
        loop {
            log::error!("the guard of {} is gone; starting another", plan.mnt.display());
            emit(Event::new(Name::GuardDied));
            if let Err(error) = replace(&plan, watch, &changed) {
                log::error!("cannot start another guard: {error}");
            }
            std::thread::sleep(PAUSE);
        }
    };
    std::thread::Builder::new()
        .name("keeper".into())
        .spawn(keep)
        .map(drop)
        .context(|| "cannot start a thread".to_owned())
}

/// Starts a guard and waits for its end.
fn replace(plan: &Plan, watch: Watch, changed: &impl Fn(i32)) -> Result<()> {
    let plan = Plan { watch: Some(watch), ..plan.clone() };
    let mut child = guard::spawn("__guard", &plan, Stdio::null(), Stdio::inherit())?;
    changed(i32::try_from(child.id()).unwrap_or_default());
    let _life = guard::send_plan(&mut child, &plan)?;
    let status = child.wait().context(|| "cannot wait for the guard".to_owned())?;
    log::error!("the guard ended with {status}");
    Ok(())
}
