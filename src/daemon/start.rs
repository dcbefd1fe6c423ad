//! The daemon's life, from its plan to its end. The order of the start:
//!
//! 1. What needs no key, so that a wrong argument costs the key service nothing: mount point,
//!    header, pin, envelope, the writer lock.
//! 2. The key: checked in full, unwrapped by its service, compared with the pin.
//! 3. A session of the store, the gate, the watcher.
//! 4. The mount, the control socket, and the report that it serves.

use std::fs::File;
use std::io::BufReader;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicI32;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::alert::Alerts;
use super::control::{self, Description};
use super::cutoff::{self, CutOff};
use super::dek_rotation::DekRotation;
use super::fence::Fence;
use super::pins::{self, Standing};
use super::plan::{Plan, Watch};
use super::report::{self, Report};
use super::volume::{Integrity, Mount, Orders, Volume, check_key, log_warnings};
use super::{check, harden, hex, keeper, mountinfo, notify, rotation, settings, volume_key};
use crate::backing::Backing;
use crate::backing::linux::LinuxBacking;
use crate::crypto;
use crate::error::{Context, Error, Kind, Result};
use crate::fuse::{self, MountOptions};
use crate::key::envelope::Envelope;
use crate::key::gate::Gate;
use crate::key::reason::Reason;
use crate::key::watcher::Watcher;
use crate::observe::audit::{self, Event, Name, Status, emit};
use crate::observe::log as logging;
use crate::store::Store;
use crate::sys;
use crate::vfs::{AuditSink, Filesystem, FilesystemOptions};

/// For the end of a mount that failed.
const END_LIMIT: Duration = Duration::from_secs(5);
/// For an unmount to take the mount out of the table too.
const GONE_LIMIT: Duration = Duration::from_secs(2);
/// For the alert of the unmount to be sent.
const ALERTS_LIMIT: Duration = Duration::from_secs(5);
/// How long a mount waits for the daemon of the one before it.
const PREDECESSOR_LIMIT: Duration = Duration::from_secs(60);
/// A service that is to end, and whose mount is in use, tries again so often.
const TRY_AGAIN: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Runs the daemon of the plan on standard input; returns when its mount is gone.
pub fn run() -> Result<()> {
    harden::process("byokfs")?;
    let signals = sys::signals::open(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])
        .context(|| "cannot take signals".to_owned())?;
    let result = Plan::from_stdin().and_then(|(plan, life)| {
        install_log(&plan)?;
        serve(plan, life, signals)
    });
    if let Err(error) = &result {
        log::error!("{error}");
        Report::Failed(error.into()).send();
    }
    result
}

/// The daemon's and the guard's log.
pub(super) fn install_log(plan: &Plan) -> Result<()> {
    let target = match &plan.config.log.file {
        Some(file) if !plan.foreground => {
            check::parent_dir(file)?;
            logging::Target::File(file)
        }
        _ => logging::Target::Stderr,
    };
    logging::install(target, plan.config.log.level.into())
}

fn serve(plan: Plan, life: BufReader<File>, signals: OwnedFd) -> Result<()> {
    // A new session: what a terminal sends to the foreground is for the guard alone.
    rustix::process::setsid().context(|| "cannot start a session".to_owned())?;
    let alerts = Alerts::start(&plan.config.alert)?;
    let volume = open(plan)?;
    let result = mount_and_serve(&volume, life, signals);
    if result.is_err() {
        take_away(&volume);
    }
    let closed = volume.close();
    let gone = see_the_mount_gone(&volume);
    if result.is_ok() && gone.is_ok() {
        log::info!("{} is unmounted", volume.plan.mnt.display());
        emit(Event::new(Name::VolumeUnmounted).with("reason", "Unmounted"));
    }
    if let Some(alerts) = alerts {
        alerts.finish(ALERTS_LIMIT);
    }
    result.and(closed).and(gone)
}

/// While this process still keeps others from mounting the volume. A mount whose connection was ended
/// by force is left behind: that is for the guard, as if this daemon had been killed.
fn see_the_mount_gone(volume: &Volume) -> Result<()> {
    let Some(mount) = volume.mount.get() else { return Ok(()) };
    let start = Instant::now();
    while mountinfo::is_mounted(mount.device, &volume.plan.back)? {
        if start.elapsed() > GONE_LIMIT {
            let mnt = volume.plan.mnt.display();
            let message =
                format!("the connection of {mnt} was ended, and the mount is left behind");
            return Err(Error::new(Kind::Io, message));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A mount that could not be made to serve must not be taken for that of a killed daemon.
fn take_away(volume: &Volume) {
    let Some(mount) = volume.mount.get() else { return };
    if let Err(error) = mount.session.unmount(true) {
        log::error!("{error}");
    }
    if !mount.session.wait_timeout(END_LIMIT) {
        log::error!("{} is still in use", volume.plan.mnt.display());
    }
}

/// Steps 1 to 3.
fn open(plan: Plan) -> Result<Arc<Volume>> {
    crypto::selftest::run()?;
    check::mount_point(&plan.back, &plan.mnt)?;
    check::own_paths(&plan)?;
    let backing: Arc<dyn Backing> = if plan.no_atime {
        LinuxBacking::open_noatime(&plan.back)?
    } else {
        LinuxBacking::open(&plan.back)?
    };
    let info = Store::inspect(&*backing)?;
    if info.damaged_copy {
        log::warn!("one copy of {}'s volume header is damaged", plan.back.display());
    }
    if let Some(file) = &plan.config.audit.file {
        check::parent_dir(file)?;
        let context =
            [("volume", hex::uuid(&info.uuid)), ("mount", plan.mnt.to_string_lossy().into_owned())];
        audit::install(file, &context)?;
    }
    let gate = Gate::new();
    let store = open_store(&backing, &gate, plan.read_only)?;
    // With the volume in hand: whoever had it until now may have rotated its key.
    let pin = pins::read(&plan.config_dir, &info.uuid)?;
    let envelope = Envelope::load(&store.envelope_dir())?;
    let provider = settings::provider(&plan.config, &envelope.kid)?;

    let standing = pin.standing(&plan.back, &envelope.kid);
    let (revalidated, unconfirmed) = if standing == Standing::Confirmed {
        let revalidated = check_key(&*provider, &envelope, &info, &pin, &plan.config)?;
        log_warnings(&revalidated.report);
        store.start_session(&revalidated.keyring)?;
        let saved = (&envelope, &store.envelope_dir());
        let keyring = &revalidated.keyring;
        volume_key::settle(&plan.config_dir, &info.uuid, &pin, saved, keyring, plan.read_only)?;
        (Some(revalidated), None)
    } else {
        // Not a failure: the mount is there, shut, until a person has confirmed it.
        let why = rotation::unconfirmed(&standing, &envelope).to_string();
        log::warn!("{why}");
        (None, Some(why))
    };
    let kid = envelope.kid.clone();

    let syncer = Arc::clone(&store);
    let sync = move || syncer.sync_all().map_err(|error| Error::new(Kind::Io, error.to_string()));
    let cut_off = CutOff::new(Arc::clone(&gate), Arc::new(sync));
    let orders = Arc::new(Orders { volume: OnceLock::new(), cut_off: Arc::clone(&cut_off) });
    let watcher = Watcher::start(
        settings::watcher(&plan.config),
        provider,
        envelope,
        Arc::clone(&gate),
        Arc::clone(&orders) as _,
    )?;
    let dek_rotation = DekRotation::new(Arc::clone(&store), Arc::clone(&gate));
    let config = Arc::new(plan.config.clone());
    let volume = Arc::new(Volume {
        plan,
        info,
        unconfirmed,
        config: Mutex::new(config),
        envelope: Mutex::default(),
        backing,
        store,
        gate,
        cut_off,
        integrity: Arc::new(Integrity::default()),
        watcher: OnceLock::new(),
        mount: OnceLock::new(),
        guard: AtomicI32::new(parent()),
        recovery: OnceLock::new(),
        dek_rotation,
    });
    match revalidated {
        Some(revalidated) => {
            watcher.admit(revalidated)?;
            volume.confirm(&kid);
            recover(&volume)?;
        }
        None => volume.cut_off.start_shut(Reason::NotConfirmed),
    }
    if volume.watcher.set(watcher).is_err() || orders.volume.set(Arc::downgrade(&volume)).is_err() {
        log::error!("started twice");
    }
    Ok(volume)
}

/// When the gate is open for the first time. Says what there was to recover.
pub(super) fn recover(volume: &Volume) -> Result<()> {
    let recovery = volume.store.recover()?;
    if volume.recovery.get().is_some() {
        return Ok(());
    }
    let of_files = recovery.records + recovery.incomplete + recovery.of_removed_files;
    if of_files + recovery.unborn > 0 {
        log::info!(
            "recovered: {} changes of {} files, in {:.1} s",
            recovery.records,
            recovery.files,
            recovery.duration.as_secs_f64()
        );
        let event = Event::new(Name::Recovered)
            .with("records", recovery.records)
            .with("files", recovery.files)
            .with("records_of_removed_files", recovery.of_removed_files)
            .with("records_incomplete", recovery.incomplete)
            .with("files_never_flushed", recovery.unborn)
            .with("milliseconds", u64::try_from(recovery.duration.as_millis()).unwrap_or(u64::MAX));
        emit(event.status(Status::Succeeded));
    }
    volume.store.start_background(|reason| {
        notify::status(&format!("writes fail: {reason}"));
        emit(Event::new(Name::LogFailed).with("error", reason));
    })?;
    // Not before: whoever tries again after a failure has this to do.
    if volume.recovery.set(recovery).is_err() {
        log::error!("recovered twice");
    }
    volume.dek_rotation.resume();
    Ok(())
}

/// umount(8) returns when the mount is gone, a moment before its daemon has ended: the one who
/// mounts again waits for that.
fn open_store(backing: &Arc<dyn Backing>, gate: &Arc<Gate>, read_only: bool) -> Result<Arc<Store>> {
    let start = Instant::now();
    loop {
        match Store::open(Arc::clone(backing), Arc::clone(gate), read_only) {
            Err(error) if error.kind == Kind::Busy && start.elapsed() < PREDECESSOR_LIMIT => {
                thread::sleep(Duration::from_millis(50));
            }
            opened => return opened,
        }
    }
}

/// Step 4, and all that follows until the mount is gone.
fn mount_and_serve(volume: &Arc<Volume>, life: BufReader<File>, signals: OwnedFd) -> Result<()> {
    let plan = &volume.plan;
    let filesystem = Filesystem::new(
        Arc::clone(&volume.store),
        Arc::clone(&volume.backing),
        Arc::clone(&volume.gate),
        Arc::clone(&volume.integrity) as Arc<dyn AuditSink>,
        FilesystemOptions { read_only: plan.read_only },
    );
    let options = MountOptions {
        read_only: plan.read_only,
        errno: settings::errno(&plan.config.mount),
        transport: settings::transport(&plan.config.mount),
        threads: plan.config.mount.threads.into(),
        noexec: plan.no_exec,
        noatime: plan.no_atime,
        ..MountOptions::new(plan.back.to_string_lossy(), &plan.mnt)
    };
    let session = fuse::mount(filesystem, &options)?;
    let device = mountinfo::at(&plan.mnt)?
        .filter(|mount| mount.fs_type == mountinfo::FS_TYPE)
        .map(|mount| mount.device)
        .ok_or_else(|| Error::new(Kind::Io, "the new mount is not in the mount table"))?;
    Report::Mounted(device).send();
    let fence = Fence::new(plan.config.fence.clone(), device);
    if let Some(why) = fence.complaint() {
        log::warn!("{why} (a server that cannot be asked to stop is stopped by signals)");
    }
    volume.cut_off.mounted(cutoff::Mounted { fence, cache: Box::new(session.purge()) });
    // Until here a cut-off could not purge; it had nothing to.
    if volume.gate.check().is_err() && volume.unconfirmed.is_none() {
        return Err(Error::new(
            Kind::Inaccessible,
            "the key was lost while the volume was mounted",
        ));
    }
    if volume.mount.set(Mount { session, device, since: SystemTime::now() }).is_err() {
        log::error!("mounted twice");
    }
    let description =
        Description { back: plan.back.clone(), mnt: plan.mnt.clone(), pid: std::process::id() };
    let control = control::Server::bind(&plan.config.run.dir, &description)?;
    let answers = Arc::clone(volume);
    control.serve(move |verb| answers.answer(verb))?;
    take_signals(Arc::clone(volume), signals)?;
    let guarded = Arc::clone(volume);
    let watch = Watch { pid: i32::try_from(std::process::id()).unwrap_or_default(), device };
    keeper::start(life, plan.clone(), watch, move |pid| {
        guarded.guard.store(pid, std::sync::atomic::Ordering::Relaxed);
    })?;

    emit(Event::new(Name::VolumeMounted).with("back", plan.back.to_string_lossy()));
    if !plan.config.fence.enabled {
        log::warn!(
            "the fence is off (fence.enabled): after a cut-off a database server serves on what \
             it has cached"
        );
    }
    log::info!("{} is mounted at {}", plan.back.display(), plan.mnt.display());
    match &volume.unconfirmed {
        None => {
            notify::status("Available");
            Report::Ready.send();
        }
        Some(why) => {
            emit(
                Event::new(Name::MakeInaccessible)
                    .status(Status::Succeeded)
                    .with("reason", Reason::NotConfirmed.name())
                    .with("detail", why.as_str()),
            );
            notify::status(&format!("Inaccessible: {}", Reason::NotConfirmed.name()));
            Report::Shut(why.clone()).send();
        }
    }
    report::close()?;

    if let Some(mount) = volume.mount.get() {
        mount.session.wait();
    }
    volume.cut_off.unmounted();
    notify::stopping();
    drop(control);
    Ok(())
}

fn take_signals(volume: Arc<Volume>, signals: OwnedFd) -> Result<()> {
    let take = move || {
        let mut owed = false;
        loop {
            let timeout = owed.then_some(&TRY_AGAIN);
            match poll(&mut [PollFd::new(&signals, PollFlags::IN)], timeout) {
                Ok(0) => {
                    owed = volume.unmount().is_err();
                    continue;
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return log::error!("cannot take signals any more: {error}"),
            }
            match sys::signals::next(&signals) {
                // A service manager that has asked once does not ask again, but kills in the end.
                Ok(Some(libc::SIGTERM | libc::SIGINT)) => {
                    owed = !volume.terminate() && notify::is_service();
                }
                Ok(_) => {}
                Err(error) => return log::error!("cannot take signals any more: {error}"),
            }
        }
    };
    thread::Builder::new()
        .name("signals".into())
        .spawn(take)
        .map(drop)
        .context(|| "cannot start a thread".to_owned())
}

fn parent() -> i32 {
    rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get())
}
