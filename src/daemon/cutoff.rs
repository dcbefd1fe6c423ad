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

use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use super::fence::{Fence, Outcome};
use super::notify;
use crate::error::{Error, Kind, Result};
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

/// What the cut-off asks of the mounted file system.
pub trait Mounted: Send + Sync {
    /// Has the kernel write back and drop the pages of files that are mapped. May block.
    fn invalidate_mapped(&self);
    /// Has it drop everything it caches of any inode. May block.
    fn invalidate_all(&self);
    /// Has it look every name up again.
    fn raise_epoch(&self);
    /// Makes what was sealed durable.
    fn sync(&self) -> Result<()>;
}

/// Performs cut-offs, one at a time.
pub struct CutOff {
    gate: Arc<Gate>,
    fence: Fence,
    mounted: Arc<dyn Mounted>,
    /// Held by a cut-off or a revalidation: neither may see the other half-way.
    transition: Mutex<Side>,
}

/// Which side of the cut-off the volume is on.
#[derive(Debug, PartialEq, Eq)]
pub enum Side {
    Open,
    CutOff,
}

impl std::fmt::Debug for CutOff {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CutOff").field("transition", &self.transition).finish_non_exhaustive()
    }
}

impl CutOff {
    pub fn new(gate: Arc<Gate>, fence: Fence, mounted: Arc<dyn Mounted>) -> Arc<CutOff> {
        Arc::new(CutOff { gate, fence, mounted, transition: Mutex::new(Side::Open) })
    }

    /// Starts the cut-off and returns at once. On a volume that is cut off already, the reason
    /// becomes this one.
    pub fn begin(self: &Arc<Self>, reason: Reason) {
        let this = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("cut-off".into()).spawn({
            let this = Arc::clone(self);
            move || this.run(reason)
        });
        if let Err(error) = spawned {
            log::error!("no thread for the cut-off ({error}): it runs on this one");
            this.run(reason);
        }
    }

    /// Waits for a running transition to end, and keeps others from starting. None after `limit`.
    pub fn transition(&self, limit: Duration) -> Option<MutexGuard<'_, Side>> {
        self.transition.try_lock_for(limit)
    }

    pub fn run(self: &Arc<Self>, reason: Reason) {
        let mut side = self.transition.lock();
        if *side == Side::CutOff {
            self.gate.shut(reason);
            return;
        }
        let start = Instant::now();
        log::error!("cutting the volume off: {}", reason.name());
        notify::status(&format!("cutting off: {}", reason.name()));
        let event = || Event::new(Name::MakeInaccessible).with("reason", reason.name());
        emit(event().status(Status::Started));

        let fencing = self.fence_and_write_back();
        self.gate.shut(reason);
        let shut_after = start.elapsed();
        // The old lease holders see the shut gate; what they seal from here on is refused.
        let drained = self.gate.drain(DRAIN_LIMIT);
        self.gate.wipe();
        let flushed = self.flush();
        let mounted = Arc::clone(&self.mounted);
        let mut purge = Step::start("purge", move || {
            mounted.invalidate_all();
            mounted.raise_epoch();
        });
        let purged = purge.wait(PURGE_LIMIT).is_some();
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
        let mut limit = MAPPED_LIMIT;
        let mut fencing = None;
        if self.fence.is_on() {
            let start = Instant::now();
            let fence = self.fence.clone();
            let mut step = Step::start("fence", move || fence.stop_server());
            step.wait(self.fence.timeout().saturating_sub(MAPPED_LIMIT));
            limit = limit.min(self.fence.timeout().saturating_sub(start.elapsed()));
            fencing = Some(step);
        }
        let mounted = Arc::clone(&self.mounted);
        if Step::start("write-back", move || mounted.invalidate_mapped()).wait(limit).is_none() {
            log::error!("shared mappings were not written back in time");
        }
        fencing
    }

    fn flush(&self) -> Result<()> {
        let mounted = Arc::clone(&self.mounted);
        let mut flush = Step::start("flush", move || mounted.sync());
        flush.wait(FLUSH_LIMIT);
        let late = || Err(Error::new(Kind::Io, "the backing storage does not answer"));
        flush.result.unwrap_or_else(late)
    }

    /// Looks for a server that its supervisor starts again, until the volume is back.
    fn linger(self: &Arc<Self>) {
        if !self.fence.is_on() {
            return;
        }
        let this = Arc::clone(self);
        let spawned = std::thread::Builder::new().name("linger".into()).spawn(move || {
            this.fence.linger(LINGER, || this.gate.status().state != State::Inaccessible);
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

    struct Recorder {
        gate: Arc<Gate>,
        steps: Mutex<Vec<(&'static str, bool)>>,
        slow: Duration,
    }

    impl Recorder {
        fn record(&self, step: &'static str) {
            self.steps.lock().push((step, self.gate.check().is_ok()));
        }
    }

    impl Mounted for Recorder {
        fn invalidate_mapped(&self) {
            self.record("mapped");
            std::thread::sleep(self.slow);
        }
        fn invalidate_all(&self) {
            self.record("all");
        }
        fn raise_epoch(&self) {
            self.record("epoch");
        }
        fn sync(&self) -> Result<()> {
            self.record("sync");
            Ok(())
        }
    }

    fn open_volume(slow: Duration) -> (Arc<CutOff>, Arc<Recorder>) {
        let gate = Gate::new();
        let keyring = Keyring::new(Secret::random().unwrap());
        gate.open(keyring, BootTime::now() + Duration::from_secs(60));
        let steps = Mutex::new(Vec::new());
        let recorder = Arc::new(Recorder { gate: Arc::clone(&gate), steps, slow });
        let fence = Fence::new(config::Fence::default(), Device { major: 0, minor: 0 });
        (CutOff::new(gate, fence, Arc::clone(&recorder) as Arc<dyn Mounted>), recorder)
    }

    #[test]
    fn the_order_of_the_steps() {
        let (cut_off, recorder) = open_volume(Duration::ZERO);
        cut_off.run(Reason::KeyDisabled);
        let steps = recorder.steps.lock().clone();
        assert_eq!(steps, [("mapped", true), ("sync", false), ("all", false), ("epoch", false)]);
        assert_eq!(cut_off.gate.status().reason, Some(Reason::KeyDisabled));
        assert_eq!(*cut_off.transition(Duration::ZERO).unwrap(), Side::CutOff);
        // Again: only the reason changes.
        cut_off.run(Reason::KeyDeleted);
        assert_eq!(cut_off.gate.status().reason, Some(Reason::KeyDeleted));
        assert_eq!(recorder.steps.lock().len(), 4);
    }

    #[test]
    fn a_stuck_write_back_does_not_keep_the_gate_open() {
        let (cut_off, _) = open_volume(Duration::from_secs(20));
        let start = Instant::now();
        cut_off.begin(Reason::KeyDisabled);
        while cut_off.gate.check().is_ok() {
            assert!(start.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(start.elapsed() >= MAPPED_LIMIT);
    }
}
