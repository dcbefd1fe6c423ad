//! The rotation of data encryption keys that runs beside the mount, and what people may do with it:
//! begin it, slow it down, pause it, go on with it, look at it.
//!
//! It goes on by itself after the volume was mounted again or came back from a cut-off. It ends
//! before the store is closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::error::{Context, Error, FsError, Kind, Result};
use crate::key::gate::Gate;
use crate::maintenance::rotate_deks::{self as rotate, Control, End, Job, Progress};
use crate::observe::audit::{Event, Name, Status, emit};
use crate::store::Store;

/// Bytes a second, unless somebody wants another.
const DEFAULT_RATE: u64 = 64 << 20;
const STEP: Duration = Duration::from_millis(200);

/// The rotation of one mounted volume, if there is one.
#[derive(Debug)]
pub struct DekRotation {
    store: Arc<Store>,
    gate: Arc<Gate>,
    state: Mutex<State>,
    /// Held by who changes what he has read of the list, or removes it: one that is done must not
    /// come back.
    list: Arc<Mutex<()>>,
}

#[derive(Debug, Default)]
struct State {
    running: Option<Running>,
    /// Why the last one ended without being done.
    failure: Option<String>,
    /// How far the last one that was done had come.
    done: Option<Arc<Progress>>,
    closed: bool,
}

#[derive(Debug)]
struct Running {
    progress: Arc<Progress>,
    control: Arc<Control>,
    thread: JoinHandle<Result<End>>,
}

impl DekRotation {
    pub fn new(store: Arc<Store>, gate: Arc<Gate>) -> DekRotation {
        DekRotation { store, gate, state: Mutex::default(), list: Arc::default() }
    }

    /// Begins a rotation of the files that have these inodes, or lie below those that do; of all
    /// files, or whatever is unfinished, with None.
    pub fn begin(&self, inodes: Option<&[u64]>, rate: Option<u64>) -> Result<Value> {
        if self.store.is_read_only() {
            return Err(Error::usage("the volume is mounted read-only"));
        }
        if self.gate.check().is_err() {
            let message = "the volume is Inaccessible: `byokfs revalidate` first";
            return Err(Error::new(Kind::Inaccessible, message));
        }
        let mut state = self.state.lock();
        if state.closed {
            return Err(Error::new(Kind::Busy, "the volume is being unmounted"));
        }
        state.reap();
        let list = self.list.lock();
        let unfinished = Job::load(&self.root())?;
        if unfinished.is_some() && inodes.is_some() {
            let message = "a rotation is unfinished: `byokfs rotate dek` without paths goes on \
                           with it";
            return Err(Error::new(Kind::Busy, message));
        }
        if let (Some(running), Some(job)) = (&state.running, &unfinished) {
            if let Some(rate) = rate {
                Job { rate, ..job.clone() }.save(&self.root())?;
                running.control.rate.store(rate, Ordering::Relaxed);
            }
        } else {
            let job = match unfinished {
                Some(job) => Job { paused: false, rate: rate.unwrap_or(job.rate), ..job },
                None => self.new_job(inodes, rate)?,
            };
            job.save(&self.root())?;
            self.start(&mut state, job)?;
        }
        drop(list);
        drop(state);
        self.status()
    }

    fn new_job(&self, inodes: Option<&[u64]>, rate: Option<u64>) -> Result<Job> {
        let files = match inodes {
            None => None,
            Some(inodes) => rotate::files_at(&self.store, inodes).map_err(cannot_rotate)?,
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let before = now.map_or(0, |since| since.as_secs());
        Ok(Job { before, files, rate: rate.unwrap_or(DEFAULT_RATE), paused: false })
    }

    /// Goes on with what a crash, an unmount or a failure left, unless somebody has paused it.
    pub fn resume(&self) {
        if self.store.is_read_only() {
            return;
        }
        let mut state = self.state.lock();
        state.reap();
        if state.running.is_some() || state.closed {
            return;
        }
        let started = match Job::load(&self.root()) {
            Ok(Some(job)) if !job.paused => self.start(&mut state, job),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = started {
            log::error!("the rotation of data encryption keys does not go on: {error}");
            state.failure = Some(error.to_string());
        }
    }

    /// Stops it, until somebody begins it again.
    pub fn pause(&self) -> Result<Value> {
        {
            let mut state = self.state.lock();
            state.stop();
            let Some(job) = Job::load(&self.root())? else {
                let message = "no rotation of data encryption keys is under way";
                return Err(Error::new(Kind::Usage, message));
            };
            Job { paused: true, ..job }.save(&self.root())?;
        }
        self.status()
    }

    /// Before the store is closed: nothing begins after this.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.stop();
    }

    /// Null where there is none.
    pub fn status(&self) -> Result<Value> {
        let mut state = self.state.lock();
        state.reap();
        let job = match Job::load(&self.root()) {
            Ok(job) => job,
            // What else there is to say of the volume must not be lost with it.
            Err(error) => {
                let stage = if state.running.is_some() { "running" } else { "failed" };
                return Ok(json!({"state": stage, "failure": error.to_string()}));
            }
        };
        let Some(job) = job else {
            // One whose work is done may not have ended yet.
            let (stage, progress) = match (&state.running, &state.done) {
                (Some(running), _) => ("running", &running.progress),
                (None, Some(progress)) => ("done", progress),
                (None, None) => return Ok(Value::Null),
            };
            let mut status = json!({"state": stage});
            show_progress(progress, &mut status);
            return Ok(status);
        };
        let stage = match (&state.running, job.paused, &state.failure) {
            (Some(_), ..) => "running",
            (None, true, _) => "paused",
            (None, false, Some(_)) => "failed",
            (None, false, None) => "waiting",
        };
        let mut status = json!({
            "state": stage,
            "before": job.before,
            "rate": job.rate,
            "failure": state.failure,
        });
        if let Some(running) = &state.running {
            show_progress(&running.progress, &mut status);
        }
        Ok(status)
    }

    fn root(&self) -> crate::backing::NodeRef {
        self.store.envelope_dir()
    }

    fn start(&self, state: &mut State, job: Job) -> Result<()> {
        let (progress, control) = (Arc::new(Progress::default()), Arc::new(Control::default()));
        control.rate.store(job.rate, Ordering::Relaxed);
        let worker = Worker {
            store: Arc::clone(&self.store),
            gate: Arc::clone(&self.gate),
            progress: Arc::clone(&progress),
            control: Arc::clone(&control),
            list: Arc::clone(&self.list),
            job,
        };
        let thread = std::thread::Builder::new()
            .name("rotation".into())
            .spawn(move || worker.run())
            .context(|| "cannot start a thread for the rotation".to_owned())?;
        state.failure = None;
        state.running = Some(Running { progress, control, thread });
        Ok(())
    }
}

fn show_progress(progress: &Progress, status: &mut Value) {
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    status["files"] = get(&progress.files).into();
    status["files_done"] = get(&progress.files_done).into();
    status["bytes"] = get(&progress.bytes).into();
    // What files have grown by since they were counted is done too.
    status["bytes_done"] = get(&progress.bytes_done).min(get(&progress.bytes)).into();
    status["keys_destroyed"] = get(&progress.destroyed).into();
    status["damaged_files"] = get(&progress.damaged).into();
}

impl State {
    /// Notes how one ended that has.
    fn reap(&mut self) {
        if self.running.as_ref().is_none_or(|running| !running.thread.is_finished()) {
            return;
        }
        let Some(running) = self.running.take() else { return };
        self.failure = match running.thread.join() {
            Ok(Ok(end)) => {
                self.done = (end == End::Done).then_some(running.progress);
                None
            }
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("it panicked".to_owned()),
        };
    }

    fn stop(&mut self) {
        if let Some(running) = &self.running {
            running.control.stop.store(true, Ordering::Release);
            while !running.thread.is_finished() {
                std::thread::sleep(STEP / 20);
            }
        }
        self.reap();
    }
}

struct Worker {
    store: Arc<Store>,
    gate: Arc<Gate>,
    progress: Arc<Progress>,
    control: Arc<Control>,
    list: Arc<Mutex<()>>,
    job: Job,
}

impl Worker {
    fn run(self) -> Result<End> {
        let event = |status| Event::new(Name::DekRotated).status(status);
        emit(event(Status::Started).with("before", self.job.before));
        let ended = self.work();
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counted = |event: Event| {
            event
                .with("files", get(&self.progress.files_done))
                .with("blocks", get(&self.progress.blocks))
                .with("keys_destroyed", get(&self.progress.destroyed))
                .with("damaged_files", get(&self.progress.damaged))
        };
        match &ended {
            Ok(End::Done) => emit(counted(event(Status::Succeeded))),
            Ok(End::Stopped) => emit(counted(event(Status::Failed)).with("error", "stopped")),
            Err(error) => {
                log::error!("{error}");
                emit(counted(event(Status::Failed)).with("error", error.to_string()));
            }
        }
        ended
    }

    fn work(&self) -> Result<End> {
        let destroyed = |files: &[rotate::FileId], keys| {
            let ids: Vec<String> = files.iter().map(rotate::id_text).collect();
            emit(Event::new(Name::DekDestroyed).with("keys", keys).with("files", ids));
        };
        loop {
            let Worker { store, job, progress, control, .. } = self;
            match rotate::run(store, job, progress, control, &destroyed) {
                Ok(End::Done) => {
                    let _list = self.list.lock();
                    Job::remove(&store.envelope_dir())?;
                    return Ok(End::Done);
                }
                Ok(End::Stopped) => return Ok(End::Stopped),
                Err(FsError::CutOff(_)) => {
                    while self.gate.check().is_err() {
                        if control.stop.load(Ordering::Acquire) {
                            return Ok(End::Stopped);
                        }
                        std::thread::sleep(STEP);
                    }
                }
                Err(error) => return Err(cannot_rotate(error)),
            }
        }
    }
}

fn cannot_rotate(error: FsError) -> Error {
    let what = "the rotation of data encryption keys came to no end";
    match error {
        FsError::CutOff(_) => Error::new(Kind::Inaccessible, format!("{what}: {error}")),
        FsError::Integrity(_) => Error::corrupt(format!("{what}: {error}")),
        FsError::Os(errno) => Error::io(what, errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::memory::MemoryBacking;
    use crate::backing::small_file;
    use crate::crypto::secret::Secret;
    use crate::key::gate::{BootTime, Keyring};
    use crate::store::FormatOptions;

    fn rotation() -> DekRotation {
        let keyring = || Keyring::new(1, Secret::new_with(|key| key.fill(9)).unwrap());
        let (backing, gate) = (MemoryBacking::new(), Gate::new());
        Store::format(&*backing, &keyring(), FormatOptions::default()).unwrap();
        let store = Store::open(backing, Arc::clone(&gate), false).unwrap();
        store.start_session(&keyring()).unwrap();
        assert!(gate.open(keyring(), BootTime::now() + Duration::from_secs(600)));
        store.recover().unwrap();
        DekRotation::new(store, gate)
    }

    #[test]
    fn none_begins_after_the_end() {
        let rotation = rotation();
        rotation.begin(None, None).unwrap();
        rotation.close();
        assert_eq!(rotation.begin(None, None).unwrap_err().kind, Kind::Busy);
        assert!(rotation.state.lock().running.is_none());
    }

    #[test]
    fn a_list_that_cannot_be_read_is_a_rotation_that_fails_and_no_more() {
        let rotation = rotation();
        let root = rotation.root();
        small_file::replace(&root, b"new", b"rotation.json", b"nonsense").unwrap();
        let status = rotation.status().unwrap();
        assert_eq!(status["state"], "failed");
        let failure = status["failure"].as_str().unwrap();
        assert!(failure.contains("remove it from the backing directory"), "{status}");
        // What it says to do helps, without another mount.
        Job::remove(&root).unwrap();
        assert_ne!(rotation.begin(None, None).unwrap()["state"], "failed");
    }

    #[test]
    fn another_rate_for_one_that_is_just_done_brings_nothing_back() {
        let rotation = rotation();
        for _ in 0..40 {
            rotation.begin(None, None).unwrap();
            for rate in 1..20 {
                rotation.begin(None, Some(rate << 30)).unwrap();
            }
            let state = || rotation.status().unwrap()["state"].clone();
            while state() == "running" {
                std::thread::yield_now();
            }
            assert_eq!(state(), "done");
        }
    }

    #[test]
    fn one_whose_work_is_done_runs_until_it_has_ended() {
        let rotation = rotation();
        let (end, may_end) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            may_end.recv().unwrap();
            Ok(End::Done)
        });
        let (progress, control) = Default::default();
        rotation.state.lock().running = Some(Running { progress, control, thread });
        assert_eq!(rotation.status().unwrap()["state"], "running");
        end.send(()).unwrap();
        while rotation.status().unwrap()["state"] == "running" {
            std::thread::sleep(STEP / 20);
        }
        assert_eq!(rotation.status().unwrap()["state"], "done");
    }
}
