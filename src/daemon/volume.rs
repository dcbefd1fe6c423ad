//! A mounted volume: what the watcher, the control socket and the signals act on.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::control::Verb;
use super::cutoff::{CutOff, Side};
use super::dek_rotation::DekRotation;
use super::mountinfo::{self, Device};
use super::pins::{self, Standing};
use super::plan::Plan;
use super::{check, hex, notify, rotation, settings, users};
use crate::backing::{Backing, NodeRef};
use crate::config::Config;
use crate::error::{Error, FsError, FsResult, Kind, Result};
use crate::fuse;
use crate::key::custody::{self, Refusal};
use crate::key::envelope::Envelope;
use crate::key::gate::{Gate, State};
use crate::key::provider::Provider;
use crate::key::reason::Reason;
use crate::key::requirement::Report;
use crate::key::watcher::{self, CutOffOrder, Handler, Notice, Watcher};
use crate::observe::audit::{self, Event, Name, Status, emit, timestamp};
use crate::store::{LogStatus, Recovery, Store, VolumeInfo};
use crate::vfs::{AuditSink, IntegrityEvent};

/// For the full check of a key, which is several calls.
pub const REVALIDATE_LIMIT: Duration = Duration::from_secs(30);
/// How long a revalidation waits for a cut-off under way.
const TRANSITION_LIMIT: Duration = Duration::from_secs(120);
const PROBE_LIMIT: Duration = Duration::from_secs(60);
const STEP: Duration = Duration::from_millis(100);

/// Counts integrity failures and hands them to the audit trail.
#[derive(Debug, Default)]
pub struct Integrity(AtomicU64);

impl AuditSink for Integrity {
    fn integrity_failure(&self, event: &IntegrityEvent) {
        self.0.fetch_add(1, Ordering::Relaxed);
        audit::integrity_failure(&event.failure, &event.logical_path, &event.backing_path);
    }
}

/// The mount of a volume, once there is one.
#[derive(Debug)]
pub struct Mount {
    pub session: fuse::Mounted,
    pub device: Device,
    pub since: SystemTime,
}

/// Who wants a revalidation.
#[derive(Clone, Copy, Debug)]
enum Asked<'a> {
    /// `accept_key`: the other key version that the person has accepted.
    ByPerson {
        accept_key: Option<&'a str>,
    },
    ByWatcher,
}

#[derive(Debug)]
pub struct Volume {
    pub plan: Plan,
    pub info: VolumeInfo,
    /// Why the volume was not opened when it was mounted.
    pub unconfirmed: Option<String>,
    /// The plan's, with `[key]` and `[[service]]` as they were when they were last good for a key.
    pub config: Mutex<Arc<Config>>,
    /// Held by who reads the envelope to act on it, or replaces it.
    pub envelope: Mutex<()>,
    pub backing: Arc<dyn Backing>,
    pub store: Arc<Store>,
    pub gate: Arc<Gate>,
    pub cut_off: Arc<CutOff>,
    pub integrity: Arc<Integrity>,
    pub watcher: OnceLock<Arc<Watcher>>,
    pub mount: OnceLock<Mount>,
    /// Process id of the guard.
    pub guard: AtomicI32,
    /// What the mount found in the log.
    pub recovery: OnceLock<Recovery>,
    pub dek_rotation: DekRotation,
}

impl Volume {
    /// Answers a request of the control socket.
    pub fn answer(&self, verb: Verb) -> Result<Value> {
        match verb {
            Verb::Status => self.status(),
            Verb::Probe => {
                self.watcher()?.probe_now(PROBE_LIMIT);
                self.status()
            }
            Verb::Revalidate { accept_key } => {
                let asked = Asked::ByPerson { accept_key: accept_key.as_deref() };
                let report = self.revalidate(asked)?;
                let mut status = self.status()?;
                status["requirements"] = json!(report);
                Ok(status)
            }
            Verb::RotateKek { to, algorithm, rekey } => {
                let algorithm = algorithm.as_deref().map(rotation::algorithm).transpose()?;
                self.rotate(&rotation::Order { to, algorithm, rekey, followed: false })
            }
            Verb::RotateDek { inodes, rate } => self.dek_rotation.begin(inodes.as_deref(), rate),
            Verb::PauseRotation => self.dek_rotation.pause(),
            Verb::ForgetKey { kid, no_copies } => self.forget_key(&kid, no_copies),
            Verb::Sync => self.sync().map_err(sync_error).map(|()| Value::Null),
            Verb::Umount => self.unmount().map(|()| Value::Null),
        }
    }

    /// Everything is durable afterwards and, unless the keys are gone, home.
    fn sync(&self) -> FsResult<()> {
        if self.gate.check().is_ok() {
            self.store.checkpoint()?;
        }
        self.store.sync_all()
    }

    fn watcher(&self) -> Result<&Arc<Watcher>> {
        self.watcher.get().ok_or_else(|| Error::new(Kind::Busy, "the daemon is still starting"))
    }

    fn mount(&self) -> Result<&Mount> {
        self.mount.get().ok_or_else(|| Error::new(Kind::Busy, "the daemon is still starting"))
    }

    /// Unmounts, unless somebody uses the mount.
    pub fn unmount(&self) -> Result<()> {
        let mount = self.mount()?;
        let mnt = self.plan.mnt.display();
        // One that was detached leaves its place to another, which is not ours to take away.
        let ours = |on: mountinfo::Mount| on.is(mount.device, &self.plan.back);
        if !mountinfo::at(&self.plan.mnt)?.is_some_and(ours) {
            let message =
                format!("{mnt} is detached: the daemon ends when its last file is closed");
            return Err(Error::new(Kind::NotMounted, message));
        }
        let in_use = || {
            let users = users::of(mount.device);
            (!users.is_empty()).then(|| {
                let message = format!("{mnt} is in use: {}", users::list(&users));
                Error::new(Kind::Busy, message)
            })
        };
        if let Some(error) = in_use() {
            return Err(error);
        }
        // Most of what has to go home goes now: nobody waits for it after the unmount.
        if self.gate.check().is_ok()
            && let Err(error) = self.store.checkpoint()
        {
            log::warn!("not everything went home before the unmount: {error}");
        }
        match mount.session.unmount(false) {
            // Somebody came between the look and the unmount.
            Err(error) if error.kind == Kind::Busy => Err(in_use().unwrap_or(error)),
            result => result,
        }
    }

    /// On a request to terminate: a clean unmount, or a refusal that says why; true if it was the
    /// former.
    pub fn terminate(&self) -> bool {
        log::info!("asked to terminate");
        let Err(error) = self.unmount() else { return true };
        let message = format!("not terminating: {error}");
        log::error!("{message}");
        notify::status(&message);
        emit(Event::new(Name::UnmountRefused).with("error", error.to_string()));
        false
    }

    /// The envelope, for a rotation or a revalidation.
    fn envelope_lock(&self) -> Result<parking_lot::MutexGuard<'_, ()>> {
        self.envelope.try_lock_for(TRANSITION_LIMIT).ok_or_else(|| {
            Error::new(Kind::Busy, "a rotation of the key is under way; try again when it is done")
        })
    }

    fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.lock())
    }

    /// For what a person asks: `[key]` and `[[service]]` may have been changed for it.
    fn config_of_today(&self) -> Result<Arc<Config>> {
        let config = self.config().with_services_of_today()?;
        check::own_paths(&Plan { config: config.clone(), ..self.plan.clone() })?;
        Ok(Arc::new(config))
    }

    fn site<'a>(&'a self, dir: &'a NodeRef, config: &'a Config) -> rotation::Site<'a> {
        rotation::Site {
            dir,
            back: &self.plan.back,
            info: &self.info,
            config,
            config_dir: &self.plan.config_dir,
        }
    }

    /// Gives the volume another key, or another version of its key, while it serves.
    fn rotate(&self, order: &rotation::Order) -> Result<Value> {
        let mnt = self.plan.mnt.display();
        if self.plan.read_only {
            return Err(Error::usage(format!(
                "{mnt} is mounted read-only: unmount it, and rotate the backing directory"
            )));
        }
        let watcher = self.watcher()?;
        let _one = self.envelope_lock()?;
        if self.gate.check().is_err() {
            let message = format!("{mnt} is Inaccessible: `byokfs revalidate {mnt}` first");
            return Err(Error::new(Kind::Inaccessible, message));
        }
        let dir = self.store.envelope_dir();
        let before = watcher.status().kid;
        let config = if order.followed { self.config() } else { self.config_of_today()? };
        let found = Envelope::load(&dir)?;
        let rotated = rotation::rotate(&self.site(&dir, &config), order)
            .inspect_err(|_| self.watch_what_is_saved(&dir, &found, &config, watcher))?;
        if let Some(rotated) = &rotated {
            *self.config.lock() = config;
            watcher.rotated(&rotated.rewrapped, Arc::clone(&rotated.provider));
            log::info!("the volume's key is now {}", rotated.rewrapped.envelope.kid);
        }
        rotation::outcome(&self.info, &before, rotated.as_ref(), &dir)
    }

    /// A rotation can fail when its envelope is there already: it is that one's key that is watched.
    /// Never what the rotation has `found` there, nor what no rotation has put there: the key of an
    /// envelope that somebody has planted must not stand in for the one that the customer revokes.
    fn watch_what_is_saved(
        &self,
        dir: &NodeRef,
        found: &Envelope,
        config: &Config,
        watcher: &Watcher,
    ) {
        let watched = Envelope::load(dir).and_then(|envelope| {
            if envelope != *found && envelope.kid != watcher.status().kid {
                expect_own_envelope(&envelope, &self.info)?;
                let pin = pins::read(&self.plan.config_dir, &self.info.uuid)?;
                let standing = pin.standing(&self.plan.back, &envelope.kid);
                if standing != Standing::Confirmed {
                    return Err(rotation::unconfirmed(&standing, &envelope));
                }
                let provider = settings::provider(config, &envelope.kid)?;
                watcher.replace_envelope(envelope, provider);
            }
            Ok(())
        });
        if let Err(error) = watched {
            log::error!("the volume's envelope cannot be watched: {error}");
        }
    }

    /// A newer version of a followed key.
    fn follow(&self, kid: String) {
        if self.plan.read_only || !self.plan.config.watcher.follow_versions {
            return;
        }
        let order = rotation::Order { to: Some(kid), followed: true, ..Default::default() };
        if let Err(error) = self.rotate(&order) {
            log::error!("the new version of the key is not followed yet: {error}");
        }
    }

    fn forget_key(&self, kid: &str, no_copies: bool) -> Result<Value> {
        if self.plan.read_only {
            let mnt = self.plan.mnt.display();
            let message = format!("{mnt} is mounted read-only: its envelope is not written");
            return Err(Error::usage(message));
        }
        let _one = self.envelope_lock()?;
        let dir = self.store.envelope_dir();
        rotation::forget(&self.site(&dir, &self.config()), kid, no_copies)?;
        // The list is a part of the envelope.
        if let Some(watcher) = self.watcher.get() {
            watcher.envelope_saved(Envelope::load(&dir)?);
        }
        Ok(Value::Null)
    }

    /// Checks the key in full, and opens the volume with it if it is shut.
    fn revalidate(&self, asked: Asked<'_>) -> Result<Report> {
        // Before the transition: a cut-off must not wait for a rotation to end.
        let _one = self.envelope_lock()?;
        let mut side = self.settled()?;
        if *side == Side::Open {
            // Nor for this check, which changes nothing.
            drop(side);
            let result = self.reopen(false, asked);
            // Whatever was found, the watcher is to know it too.
            self.watcher()?.probe_now(PROBE_LIMIT);
            return result;
        }
        let by_person = matches!(asked, Asked::ByPerson { .. });
        emit(Event::new(Name::MakeAccessible).status(Status::Started).with("asked", by_person));
        // A denial from before the key was back may have come in meanwhile. Another one counts.
        let result = match self.reopen(true, asked) {
            Err(error) if error.kind == Kind::Inaccessible => self.reopen(true, asked),
            result => result,
        };
        match result {
            Ok(report) => {
                *side = Side::Open;
                drop(side);
                let event = Event::new(Name::MakeAccessible).status(Status::Succeeded);
                emit(event.with("kek", report.kid.as_str()));
                log::info!("the volume is Available again");
                notify::status("Available");
                Ok(report)
            }
            Err(error) => {
                let event = Event::new(Name::MakeAccessible).status(Status::Failed);
                emit(event.with("error", error.to_string()));
                log::error!("the volume stays Inaccessible: {error}");
                Err(error)
            }
        }
    }

    /// No transition under way: either the gate is open, or the cut-off is complete.
    fn settled(&self) -> Result<parking_lot::MutexGuard<'_, Side>> {
        let start = Instant::now();
        while start.elapsed() < TRANSITION_LIMIT {
            let left = TRANSITION_LIMIT.saturating_sub(start.elapsed());
            if let Some(side) = self.cut_off.transition(left)
                && (*side == Side::CutOff || self.gate.check().is_ok())
            {
                return Ok(side);
            }
            // The gate has shut by itself, and the watcher is about to order the cut-off.
            std::thread::sleep(STEP);
        }
        Err(Error::new(Kind::Busy, "the cut-off is still under way; try again when it is done"))
    }

    /// The caller holds the envelope.
    fn reopen(&self, open: bool, asked: Asked<'_>) -> Result<Report> {
        let envelope = Envelope::load(&self.store.envelope_dir())?;
        let config = match asked {
            Asked::ByPerson { .. } => self.config_of_today()?,
            Asked::ByWatcher => self.config(),
        };
        let pin = pins::read(&self.plan.config_dir, &self.info.uuid)?;
        let standing = pin.standing(&self.plan.back, &envelope.kid);
        let confirmed = match (&standing, asked) {
            (Standing::Confirmed, _) | (Standing::Elsewhere, Asked::ByPerson { .. }) => true,
            (Standing::OtherKey(_), Asked::ByPerson { accept_key }) => {
                accept_key == Some(envelope.kid.as_str())
            }
            (_, Asked::ByWatcher) => false,
        };
        if !confirmed {
            return Err(rotation::unconfirmed(&standing, &envelope));
        }
        if let Asked::ByPerson { accept_key: Some(key) } = asked
            && key != envelope.kid
        {
            let message =
                format!("the envelope names {}, not {key}: none is accepted", envelope.kid);
            return Err(Error::new(Kind::Denied, message));
        }
        let provider = settings::provider(&config, &envelope.kid)?;
        let revalidated = check_key(&*provider, &envelope, &self.info, &pin, &config)?;
        let report = revalidated.report.clone();
        log_warnings(&report);
        let kid = envelope.kid.clone();
        *self.config.lock() = config;
        if open {
            self.store.start_session(&revalidated.keyring)?;
        }
        let watcher = self.watcher()?;
        match asked {
            // The identity may be another one; and a provider remembers what its service refused.
            Asked::ByPerson { .. } => watcher.watch(envelope, provider),
            Asked::ByWatcher => watcher.replace_envelope(envelope, provider),
        }
        if open {
            let before = self.gate.status().reason.unwrap_or(Reason::Unreachable);
            match asked {
                Asked::ByPerson { .. } => watcher.admit(revalidated)?,
                Asked::ByWatcher => watcher.admit_by_itself(revalidated)?,
            }
            if let Err(error) = super::start::recover(self) {
                // It counts as cut off, and no cut-off would take these keys away again.
                watcher.cut_off(before);
                self.shut_and_wipe(before);
                return Err(error);
            }
        }
        self.confirm(&kid);
        Ok(report)
    }

    /// Records that the volume was opened here with this key version. It serves all the same where
    /// that cannot be recorded; the next mount asks again then.
    pub fn confirm(&self, kid: &str) {
        let Plan { config_dir, back, .. } = &self.plan;
        if let Err(error) = pins::confirm(config_dir, &self.info.uuid, back, kid, None) {
            log::warn!("{error}");
        }
    }

    pub fn status(&self) -> Result<Value> {
        let status = self.watcher()?.status();
        let gate = &status.gate;
        let mount = self.mount.get();
        let kek_version = status.kid.rsplit('/').next();
        let detail =
            self.unconfirmed.as_ref().filter(|_| gate.reason == Some(Reason::NotConfirmed));
        Ok(json!({
            "state": gate.state.name(),
            "reason": gate.reason.map(Reason::name),
            "reason_text": gate.reason.map(Reason::describe),
            "reason_detail": detail,
            "since": timestamp(gate.since),
            "volume": hex::uuid(&self.info.uuid),
            "mnt": self.plan.mnt.to_string_lossy(),
            "back": self.plan.back.to_string_lossy(),
            "read_only": self.plan.read_only,
            "kek": status.kid,
            "kek_version": kek_version,
            "kek_expires": status.expires.map(timestamp),
            "last_success": status.last_success.map(timestamp),
            "last_probe": status.last_probe.as_ref().map(probe_json),
            "next_probe": status.next_probe_in.map(|left| timestamp(SystemTime::now() + left)),
            "valid_for_seconds": gate.valid_for.as_secs(),
            "mounted_since": mount.map(|mount| timestamp(mount.since)),
            "device": mount.map(|mount| mount.device.to_string()),
            "transport": mount.map(|mount| mount.session.transport().name()),
            "fence": self.plan.config.fence.enabled,
            "pid": std::process::id(),
            "guard_pid": self.guard.load(Ordering::Relaxed),
            "log": self.store.log_status().as_ref().map(log_json),
            "rotation": self.dek_rotation.status()?,
            "recovery": self.recovery.get().map(recovery_json),
            "counters": {
                "epochs": gate.epoch,
                "failed_probes": status.failures,
                "integrity_failures": self.integrity.0.load(Ordering::Relaxed),
            },
        }))
    }

    fn shut_and_wipe(&self, reason: Reason) {
        self.gate.shut(reason);
        if !self.gate.drain(Duration::from_secs(5)) {
            log::error!("operations still hold keys");
        }
        self.gate.wipe();
    }

    /// Ends the keys' life in this process, after the mount is gone or never was.
    pub fn close(&self) -> Result<()> {
        self.dek_rotation.close();
        // So that the next mount, and whoever copies the volume, finds the log empty. What cannot go
        // home now is in it.
        if self.gate.check().is_ok()
            && let Err(error) = self.store.close()
        {
            log::warn!("the log keeps what the next mount will bring home: {error}");
        }
        if let Some(watcher) = self.watcher.get() {
            watcher.stop();
        }
        self.shut_and_wipe(Reason::Operator);
        self.store.sync_all().map_err(sync_error)
    }
}

/// The one way to the volume's key: unwrapped by its service just now, and the one pinned here.
pub fn check_key(
    provider: &dyn Provider,
    envelope: &Envelope,
    info: &VolumeInfo,
    pin: &super::pins::Pin,
    config: &Config,
) -> Result<custody::Revalidated> {
    expect_own_envelope(envelope, info)?;
    let settings = settings::requirements(config, &envelope.kid, !pin.requirements);
    custody::revalidate(provider, envelope, pin.pinned(), &settings, REVALIDATE_LIMIT)
        .map_err(|refusal: Refusal| name_the_service(refusal.error, &envelope.kid))
}

/// What protects from accidents, and is missing.
pub fn log_warnings(report: &Report) {
    for row in report.warnings() {
        log::warn!("{}: {}: {}; {}", report.kid, row.requirement, row.found, row.fix);
    }
}

pub fn expect_own_envelope(envelope: &Envelope, info: &VolumeInfo) -> Result<()> {
    if envelope.volume == info.uuid {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "the envelope belongs to volume {}, not to {}: restore envelope.json from a backup",
        hex::uuid(&envelope.volume),
        hex::uuid(&info.uuid)
    )))
}

/// A failure to connect says what was tried.
pub fn name_the_service(error: Error, kid: &str) -> Error {
    if error.kind != Kind::Unreachable || error.to_string().contains(kid) {
        return error;
    }
    Error::new(error.kind, format!("cannot reach the key service for {kid}: {error}"))
}

fn probe_json(probe: &watcher::ProbeReport) -> Value {
    json!({
        "at": timestamp(probe.at),
        "milliseconds": u64::try_from(probe.took.as_millis()).unwrap_or(u64::MAX),
        "complete": probe.complete,
        "result": probe.result,
        "reason": probe.reason.map(Reason::name),
        "detail": probe.detail,
    })
}

fn log_json(log: &LogStatus) -> Value {
    json!({
        "used": log.used,
        "capacity": log.capacity,
        "dirty_files": log.dirty_files,
        "checkpoints": log.checkpoints,
        "failure": log.poisoned,
        "checkpoint_failure": log.checkpoint_failure,
    })
}

fn recovery_json(recovery: &Recovery) -> Value {
    json!({
        "records": recovery.records,
        "files": recovery.files,
        "records_of_removed_files": recovery.of_removed_files,
        "records_incomplete": recovery.incomplete,
        "files_never_flushed": recovery.unborn,
        "milliseconds": u64::try_from(recovery.duration.as_millis()).unwrap_or(u64::MAX),
    })
}

fn sync_error(error: FsError) -> Error {
    match error {
        FsError::CutOff(_) => Error::new(Kind::Inaccessible, error.to_string()),
        FsError::Integrity(_) => Error::corrupt(error.to_string()),
        FsError::Os(errno) => Error::io("cannot flush the volume", errno.into()),
    }
}

/// The watcher's handler. It holds the volume weakly: the volume owns the watcher.
#[derive(Debug)]
pub struct Orders {
    pub volume: OnceLock<std::sync::Weak<Volume>>,
    pub cut_off: Arc<CutOff>,
}

impl Orders {
    fn volume(&self) -> Result<Arc<Volume>> {
        self.volume
            .get()
            .and_then(std::sync::Weak::upgrade)
            .ok_or_else(|| Error::new(Kind::Busy, "the daemon is starting or ending"))
    }
}

impl Handler for Orders {
    fn cut_off(&self, order: &CutOffOrder) {
        self.cut_off.run(order.reason, order.detail.as_deref());
    }

    fn heal(&self) -> Result<()> {
        self.volume()?.revalidate(Asked::ByWatcher).map(drop)
    }

    fn newer_version(&self, kid: &str) {
        let Ok(volume) = self.volume() else { return };
        let kid = kid.to_owned();
        let spawned = std::thread::Builder::new().name("follow".into());
        if let Err(error) = spawned.spawn(move || volume.follow(kid)) {
            log::error!("no thread to follow the key's new version: {error}");
        }
    }

    fn notice(&self, notice: &Notice) {
        let with_reason = |name, reason: &Reason, detail: &Option<String>| {
            let event = Event::new(name).with("reason", reason.name());
            match detail {
                Some(detail) => event.with("detail", detail.as_str()),
                None => event,
            }
        };
        emit(match notice {
            Notice::Degraded { reason, detail } => {
                notify::status(&format!("{}: {}", State::Degraded, reason.describe()));
                with_reason(Name::KeyDegraded, reason, detail)
            }
            Notice::Restored => {
                notify::status(State::Available.name());
                Event::new(Name::KeyRecovered)
            }
            Notice::ReasonChanged { reason, detail } => {
                notify::status(&format!("{}: {}", State::Inaccessible, reason.describe()));
                with_reason(Name::ReasonChanged, reason, detail)
            }
            Notice::Alert { reason, detail } => with_reason(Name::KeyAlert, reason, detail),
            Notice::KeyExpiryWarning { expires, days } => Event::new(Name::KeyExpiryWarning)
                .with("expires", timestamp(*expires))
                .with("days", *days),
            Notice::HealFailed { detail } => {
                Event::new(Name::HealFailed).with("detail", detail.as_str())
            }
        });
    }
}
