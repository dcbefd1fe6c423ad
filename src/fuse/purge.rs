//! Takes plaintext back from the kernel, and out of the workers' buffers, at a cut-off.
//!
//! An invalidation waits for the pages it takes, and those may wait for a request that is being
//! served: so this runs on threads of its own, which hold no lock, and for a limited time. What
//! is not done by then goes on in the background.

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::wire::{OUT_HEADER_LEN, Writer};
use super::worker::Workers;
use crate::vfs::types::ROOT;

const NOTIFY_INVAL_INODE: u32 = 2;
const NOTIFY_INC_EPOCH: u32 = 8;
const NOTIFY_PRUNE: u32 = 9;
const PRUNE_BATCH: usize = 500;

/// Clone it as you like. Call it from a thread that serves no request and holds no lock.
#[derive(Clone, Debug)]
pub struct Purge {
    device: Arc<OwnedFd>,
    workers: Arc<Workers>,
}

impl Purge {
    pub(super) fn new(device: Arc<OwnedFd>, workers: Arc<Workers>) -> Purge {
        Purge { device, workers }
    }

    /// Before the gate shuts: has the dirty pages of shared mappings written, and takes the
    /// pages of every open file. False when the time was up first.
    pub fn write_back(&self, limit: Duration) -> bool {
        let purge = self.clone();
        within(limit, move || {
            for node in purge.workers.adapter().filesystem().open_nodes() {
                purge.invalidate(node);
            }
        })
    }

    /// After the gate is shut and drained: overwrites the workers' buffers, takes every page,
    /// attribute and access list that the kernel holds, and has it look up every name anew.
    /// False when the time was up first.
    pub fn drop_all(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let purge = self.clone();
        // A worker may be held up by the disk: the kernel's pages do not wait for it.
        let taken = start(move || {
            for node in purge.workers.adapter().filesystem().known_nodes() {
                purge.invalidate(node);
            }
            purge.notify(NOTIFY_INC_EPOCH, &[]);
        });
        let wiped = self.workers.wipe(until);
        taken.is_some_and(|taken| ends(&taken, until)) && wiped
    }

    /// Asks the kernel to forget `nodes`; it keeps those that are in use. False from a kernel
    /// that cannot be asked (before 6.18).
    pub(super) fn prune(&self, nodes: &[u64]) -> bool {
        let mut body = vec![0; 16 + PRUNE_BATCH * 8];
        for batch in nodes.chunks(PRUNE_BATCH) {
            let mut writer = Writer::new(&mut body);
            writer.u32(batch.len() as u32).u32(0).u64(0);
            for node in batch {
                writer.u64(*node);
            }
            let len = writer.len();
            match self.send(NOTIFY_PRUNE, &body[..len]) {
                Ok(()) | Err(Errno::NOENT | Errno::NODEV | Errno::NOTCONN) => {}
                Err(error @ (Errno::INVAL | Errno::NOSYS)) => {
                    log::info!("the kernel cannot be asked to forget nodes: {error}");
                    return false;
                }
                // Asked again in a while.
                Err(error) => log::warn!("the kernel was not asked to forget nodes: {error}"),
            }
        }
        true
    }

    fn invalidate(&self, node: u64) {
        let mut body = [0; 24];
        // From the start, to the end.
        Writer::new(&mut body).u64(node).u64(0).u64(0);
        self.notify(NOTIFY_INVAL_INODE, &body);
    }

    fn send(&self, code: u32, body: &[u8]) -> Result<(), Errno> {
        let mut header = [0; OUT_HEADER_LEN];
        let len = OUT_HEADER_LEN + body.len();
        Writer::new(&mut header).u32(len as u32).u32(code).u64(0);
        let parts = [IoSlice::new(&header), IoSlice::new(body)];
        rustix::io::writev(self.device.as_fd(), &parts).map(drop)
    }

    fn notify(&self, code: u32, body: &[u8]) {
        match self.send(code, body) {
            Ok(()) => {}
            // The kernel had dropped it, or the mount is gone.
            Err(Errno::NOENT | Errno::NODEV | Errno::NOTCONN) => {}
            // A kernel without epochs (before 6.17): names are looked up anew within the hour,
            // and a lookup answers the cut-off.
            Err(Errno::INVAL | Errno::NOSYS) if code == NOTIFY_INC_EPOCH => {
                log::warn!("this kernel keeps the names it has cached for up to an hour");
            }
            Err(error) => log::error!("notification {code} to the kernel failed: {error}"),
        }
    }
}

/// Runs `work` on a thread of its own; false if it has not ended in time.
fn within(limit: Duration, work: impl FnOnce() + Send + 'static) -> bool {
    let until = Instant::now() + limit;
    start(work).is_some_and(|work| ends(&work, until))
}

/// Runs `work` on a thread of its own, which says when it has ended.
fn start(work: impl FnOnce() + Send + 'static) -> Option<mpsc::Receiver<()>> {
    let (done, wait) = mpsc::channel();
    let started = thread::Builder::new().name("fuse-purge".into()).spawn(move || {
        work();
        // Nobody waits any more when the time is up.
        let _ = done.send(());
    });
    started.map(|_| wait).map_err(|error| log::error!("cannot start the purge: {error}")).ok()
}

fn ends(work: &mpsc::Receiver<()>, until: Instant) -> bool {
    work.recv_timeout(until.saturating_duration_since(Instant::now())).is_ok()
}

const _: () = assert!(ROOT == 1, "FUSE_ROOT_ID");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_purge_that_hangs_is_left_behind() {
        assert!(within(Duration::from_secs(10), || {}));
        assert!(!within(Duration::from_millis(10), || thread::sleep(Duration::from_secs(1))));
    }
}
