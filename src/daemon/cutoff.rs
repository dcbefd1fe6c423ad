//! The cut-off: from "the key is lost" to "no plaintext is left here", in an order that matters.
//!
//! 1. Fence the database server, while the gate is still open: a clean shutdown writes.
//! 2. Have the kernel write dirty shared mappings back and drop them, still with the gate open.
//! 3. Shut the gate. The two steps before cannot delay it beyond `fence.timeout`; a server that
//!    stops sooner shuts it sooner.
//! 4. Drain the running leases (5 s at most), wipe every key, flush what was sealed.
//! 5. Invalidate every inode the kernel knows, so that no cached page answers, and its names.
//!
//! The mount and the daemon stay, and answer the cut-off errno: a connection that ended would
//! leave cached pages readable. All of it runs on a thread of its own, which holds no lock that a
//! request could want. Whatever fails on the way is reported, and the next step is taken.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use super::fence::{Fence, Outcome};
use super::notify;
use crate::error::{Error, Kind, Result};
use crate::fuse::Purge;
use crate::key::gate::{Gate, State};
use crate::key::reason::Reason;
use crate::observe::audit::{Event, Name, Status, emit};

/// For writing dirty mappings back; a part of it is taken from the end of the fence's time.
const MAPPED_LIMIT: Duration = Duration::from_secs(2);
const DRAIN_LIMIT: Duration = Duration::from_secs(5);
const FLUSH_LIMIT: Duration = Duration::from_secs(30);
const PURGE_LIMIT: Duration = Duration::from_secs(30);
/// How long a restarted server is looked for after the cut-off.
const LINGER: Duration = Duration::from_secs(600);

/// What the cut-off asks of the kernel. Both give up after `limit`, and return false then.
pub trait KernelCache: fmt::Debug + Send + Sync {
    /// Has dirty shared mappings written back.
    fn write_back(&self, limit: Duration) -> bool;
    /// Has every cached page, attribute and name dropped.
    fn drop_all(&self, limit: Duration) -> bool;
}

impl KernelCache for Purge {
    fn write_back(&self, limit: Duration) -> bool {
        Purge::write_back(self, limit)
    }

    fn drop_all(&self, limit: Duration) -> bool {
        Purge::drop_all(self, limit)
    }
}

/// What there is only once the volume is mounted.
#[derive(Debug)]
pub struct Mounted {
    pub fence: Fence,
    pub cache: Box<dyn KernelCache>,
}

/// Performs cut-offs, one at a time.
pub struct CutOff {
    gate: Arc<Gate>,
    /// Makes what was sealed durable.
    sync: Arc<dyn Fn() -> Result<()> + Send + Sync>,
    mounted: OnceLock<Mounted>,
    /// The mount has ended: who uses its number now uses another one.
    unmounted: Arc<AtomicBool>,
    /// Held by a cut-off or a revalidation: neither may see the other half-way.
    transition: Mutex<Side>,
}

/// Which side of the cut-off the volume is on.
#[derive(Debug, PartialEq, Eq)]
pub enum Side {
    Open,
    CutOff,
}

impl fmt::Debug for CutOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CutOff").field("transition", &self.transition).finish_non_exhaustive()
    }
}

impl CutOff {
    pub fn new(gate: Arc<Gate>, sync: Arc<dyn Fn() -> Result<()> + Send + Sync>) -> Arc<CutOff> {
        let transition = Mutex::new(Side::Open);
        let (mounted, unmounted) = (OnceLock::new(), Arc::default());
        Arc::new(CutOff { gate, sync, mounted, unmounted, transition })
    }

    /// The volume starts on the far side: it is mounted, and was never opened.
    pub fn start_shut(&self, reason: Reason) {
        self.gate.shut(reason);
        *self.transition.lock() = Side::CutOff;
    }

    /// To be called once, when the mount is there.
    pub fn mounted(&self, mounted: Mounted) {
        if self.mounted.set(mounted).is_err() {
            log::error!("mounted twice");
        }
    }

    /// To be called when the mount has ended: no server is stopped any more.
    pub fn unmounted(&self) {
        self.unmounted.store(true, Ordering::SeqCst);
    }

    /// Waits for a running transition to end, and keeps others from starting. None after `limit`.
    pub fn transition(&self, limit: Duration) -> Option<MutexGuard<'_, Side>> {
        self.transition.try_lock_for(limit)
    }

    /// Cuts the volume off, and returns when that is done. On a volume that is cut off already,
    /// the reason becomes this one. `detail` is what the key service said.
    pub fn run(self: &Arc<Self>, reason: Reason, detail: Option<&str>) {
        let mut side = self.transition.lock();
        if *side == Side::CutOff {
            self.gate.shut(reason);
            return;
        }
        let start = Instant::now();
        log::error!("cutting the volume off: {}", reason.name());
        notify::status(&format!("cutting off: {}", reason.name()));
        let event = || {
            let event = Event::new(Name::MakeInaccessible).with("reason", reason.name());
            detail.map_or(event.clone(), |detail| event.with("detail", detail))
        };
        emit(event().status(Status::Started));

        let fencing = self.fence_and_write_back();
        self.gate.shut(reason);
        let shut_after = start.elapsed();
        // The old lease holders see the shut gate; what they seal from here on is refused.
        let drained = self.gate.drain(DRAIN_LIMIT);
        self.gate.wipe();
        let flushed = self.flush();
        let purged = self.mounted.get().is_none_or(|mounted| mounted.cache.drop_all(PURGE_LIMIT));
        // SIGKILL may have come with the gate's end; its outcome is a matter of moments.
        let outcome = match fencing {
            Some(mut step) => step.wait(MAPPED_LIMIT).copied().unwrap_or(Outcome::Survived),
            None => Outcome::Off,
        };
        *side = Side::CutOff;
        drop(side);

        let mut event = event()
            .with("fence", outcome.name())
            .with("gate_shut_after_milliseconds", millis(shut_after))
            .with("milliseconds", millis(start.elapsed()));
        let failures = [
            (!drained).then(|| "operations still hold keys".to_owned()),
            flushed.err().map(|error| format!("not everything was flushed: {error}")),
            (!purged).then(|| "the kernel's cache is not purged yet".to_owned()),
            (outcome == Outcome::Survived).then(|| "the database server still runs".to_owned()),
        ];
        let failures: Vec<String> = failures.into_iter().flatten().collect();
        let status = if failures.is_empty() { Status::Succeeded } else { Status::Failed };
        if !failures.is_empty() {
            log::error!("the volume is cut off, but {}", failures.join("; "));
            event = event.with("failures", failures);
        }
        emit(event.status(status));
        notify::status(&format!("Inaccessible: {}", reason.name()));
        log::error!("the volume is Inaccessible: {}", reason.name());
        self.linger();
    }

    /// Steps 1 and 2, within the fence's timeout. The fence, which may have to go on while the
    /// gate shuts.
    fn fence_and_write_back(&self) -> Option<Step<Outcome>> {
        let mounted = self.mounted.get().filter(|_| !self.unmounted.load(Ordering::SeqCst))?;
        let mut limit = MAPPED_LIMIT;
        let mut fencing = None;
        if mounted.fence.is_on() {
            let start = Instant::now();
            let fence = mounted.fence.clone();
            let timeout = fence.timeout();
            let mut step = Step::start("fence", move || fence.stop_server());
            step.wait(timeout.saturating_sub(MAPPED_LIMIT));
            limit = limit.min(timeout.saturating_sub(start.elapsed()));
            fencing = Some(step);
        }
        if !mounted.cache.write_back(limit) {
            log::error!("shared mappings were not written back in time");
        }
        fencing
    }

    fn flush(&self) -> Result<()> {
        let sync = Arc::clone(&self.sync);
        let mut flush = Step::start("flush", move || sync());
        flush.wait(FLUSH_LIMIT);
        let late = || Err(Error::new(Kind::Io, "the backing storage does not answer"));
        flush.result.unwrap_or_else(late)
    }

    /// Looks for a server that its supervisor starts again, until the volume is back.
    fn linger(&self) {
        let Some(fence) = self.mounted.get().map(|mounted| mounted.fence.clone()) else { return };
        if !fence.is_on() {
            return;
        }
        let (gate, unmounted) = (Arc::clone(&self.gate), Arc::clone(&self.unmounted));
        let spawned = std::thread::Builder::new().name("linger".into()).spawn(move || {
            let is_back = || gate.status().state != State::Inaccessible;
            fence.linger(LINGER, || unmounted.load(Ordering::SeqCst) || is_back());
        });
        if let Err(error) = spawned {
            log::error!("cannot watch for a restarted server: {error}");
        }
    }
}

/// Work on a thread of its own, which can be left behind.
struct Step<T> {
    heard: mpsc::Receiver<T>,
    result: Option<T>,
}

impl<T: Send + 'static> Step<T> {
    fn start(name: &str, work: impl FnOnce() -> T + Send + 'static) -> Step<T> {
        let (told, heard) = mpsc::channel();
        let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            if told.send(work()).is_err() {
                log::warn!("a step of the cut-off has ended late");
            }
        });
        if let Err(error) = spawned {
            log::error!("no thread for the cut-off's {name}: {error}");
        }
        Step { heard, result: None }
    }

    /// None when the work has not ended within `limit`, or could not begin.
    fn wait(&mut self, limit: Duration) -> Option<&T> {
        if self.result.is_none() {
            self.result = self.heard.recv_timeout(limit).ok();
        }
        self.result.as_ref()
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::crypto::secret::Secret;
    use crate::daemon::mountinfo::Device;
    use crate::key::clock::BootTime;
    use crate::key::gate::Keyring;

    #[derive(Clone, Debug)]
    struct Recorder {
        gate: Arc<Gate>,
        steps: Arc<Mutex<Vec<(&'static str, bool)>>>,
        slow: Duration,
    }

    impl Recorder {
        fn record(&self, step: &'static str) {
            self.steps.lock().push((step, self.gate.check().is_ok()));
        }
    }

    impl KernelCache for Recorder {
        fn write_back(&self, limit: Duration) -> bool {
            self.record("write back");
            std::thread::sleep(self.slow.min(limit));
            self.slow < limit
        }
        fn drop_all(&self, _limit: Duration) -> bool {
            self.record("drop all");
            true
        }
    }

    fn open_volume(slow: Duration) -> (Arc<CutOff>, Recorder) {
        let gate = Gate::new();
        let keyring = Keyring::new(1, Secret::random().unwrap());
        gate.open(keyring, BootTime::now() + Duration::from_secs(60));
        let recorder = Recorder { gate: Arc::clone(&gate), steps: Arc::default(), slow };
        let syncer = recorder.clone();
        let sync = move || {
            syncer.record("sync");
            Ok(())
        };
        let cut_off = CutOff::new(gate, Arc::new(sync));
        let fence = Fence::new(config::Fence::default(), Device { major: 0, minor: 0 });
        cut_off.mounted(Mounted { fence, cache: Box::new(recorder.clone()) });
        (cut_off, recorder)
    }

    #[test]
    fn the_order_of_the_steps() {
        let (cut_off, recorder) = open_volume(Duration::ZERO);
        cut_off.run(Reason::KeyDisabled, None);
        let steps = recorder.steps.lock().clone();
        assert_eq!(steps, [("write back", true), ("sync", false), ("drop all", false)]);
        assert_eq!(cut_off.gate.status().reason, Some(Reason::KeyDisabled));
        assert_eq!(*cut_off.transition(Duration::ZERO).unwrap(), Side::CutOff);
        // Again: only the reason changes.
        cut_off.run(Reason::KeyDeleted, None);
        assert_eq!(cut_off.gate.status().reason, Some(Reason::KeyDeleted));
        assert_eq!(recorder.steps.lock().len(), 3);
    }

    #[test]
    fn a_stuck_write_back_does_not_keep_the_gate_open() {
        let (cut_off, recorder) = open_volume(Duration::from_secs(20));
        let start = Instant::now();
        cut_off.run(Reason::KeyDisabled, Some("disabled"));
        assert!((MAPPED_LIMIT..2 * MAPPED_LIMIT).contains(&start.elapsed()));
        assert_eq!(recorder.steps.lock().len(), 3);
    }

    #[test]
    fn after_the_mount_no_server_is_stopped() {
        let (cut_off, recorder) = open_volume(Duration::ZERO);
        cut_off.unmounted();
        cut_off.run(Reason::KeyDisabled, None);
        assert!(!recorder.steps.lock().iter().any(|(step, _)| *step == "write back"));
        assert!(cut_off.gate.check().is_err());
    }

    #[test]
    fn before_the_mount_there_is_only_the_gate() {
        let gate = Gate::new();
        let keyring = Keyring::new(1, Secret::random().unwrap());
        gate.open(keyring, BootTime::now() + Duration::from_secs(60));
        let cut_off = CutOff::new(Arc::clone(&gate), Arc::new(|| Ok(())));
        cut_off.run(Reason::KeyDisabled, None);
        assert!(gate.check().is_err());
    }
}
