//! Keeps the nodes that the kernel remembers from using up this process's descriptors.
//!
//! Each node that the kernel has looked up is held by a descriptor, until the kernel forgets it;
//! which it does when it needs memory, not when we need descriptors. So we ask.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::purge::Purge;
use super::worker::Workers;
use crate::error::{Context, Result};

/// What Linux allows a process by default (fs.nr_open).
const DESCRIPTORS: u64 = 1 << 20;
/// How often the thread looks whether the mount is still there.
const LOOK: Duration = Duration::from_secs(1);
/// After a round that the kernel could not follow: everything is in use.
const PAUSE: Duration = Duration::from_millis(100);

pub(super) fn raise_descriptor_limit() {
    let set = |limit: u64| {
        let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
        setrlimit(Resource::Nofile, limit)
    };
    let now = getrlimit(Resource::Nofile);
    if now.current.is_none_or(|current| current >= DESCRIPTORS) || set(DESCRIPTORS).is_ok() {
        return;
    }
    if let Some(maximum) = now.maximum
        && let Err(error) = set(maximum)
    {
        log::warn!("cannot raise the limit of open files to {maximum}: {error}");
    }
}

/// Half of the descriptors are for nodes, half for what is open.
pub(super) fn start(purge: Purge, workers: &Arc<Workers>) -> Result<()> {
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(DESCRIPTORS);
    workers.adapter().filesystem().set_many_nodes((descriptors / 2) as usize);
    let workers = Arc::clone(workers);
    let run = move || {
        while !workers.join(Some(Duration::ZERO)) {
            let fs = workers.adapter().filesystem();
            let surplus = fs.crowded(LOOK);
            if surplus.is_empty() {
                continue;
            }
            if !purge.prune(&surplus) {
                return;
            }
            thread::sleep(PAUSE);
        }
    };
    thread::Builder::new()
        .name("fuse-trim".into())
        .spawn(run)
        .map(drop)
        .context(|| "cannot start a thread".into())
}
