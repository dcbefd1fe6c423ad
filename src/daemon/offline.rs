//! A volume that nobody has mounted, in the hands of one verb: locked, and opened with its key.
//!
//! The way to the key is that of a mount: pinned, confirmed for this place, checked in full and
//! unwrapped by its service just now. It is watched as under a mount: a key that is lost ends the
//! work.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::pins::{self, Pin, Standing};
use super::volume::{check_key, expect_own_envelope};
use super::{check, harden, hex, mountinfo, rotation, settings};
use crate::backing::linux::LinuxBacking;
use crate::backing::{Backing, NodeRef};
use crate::config::Config;
use crate::crypto;
use crate::error::{Error, FsError, Kind, Result};
use crate::key::envelope::Envelope;
use crate::key::gate::{Gate, Reason};
use crate::key::provider::Provider;
use crate::key::watcher::{CutOffOrder, Handler, Notice, Watcher};
use crate::observe::audit;
use crate::store::{Store, VolumeInfo};

const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// How long a verb waits for the daemon that has just lost its mount.
const PREDECESSOR_LIMIT: Duration = Duration::from_secs(30);

/// Takes a volume that `take` says is Busy as soon as it is free, unless it is mounted: umount(8)
/// returns a moment before the daemon has brought everything home.
pub fn when_free<T>(back: &Path, take: impl Fn() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match take() {
            Err(error) if error.kind == Kind::Busy && start.elapsed() < PREDECESSOR_LIMIT => {
                if let Some(mount) = mountinfo::find(back)? {
                    let message =
                        format!("{} is mounted at {}", back.display(), mount.mount_point.display());
                    return Err(Error::new(Kind::Busy, message));
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            taken => return taken,
        }
    }
}

/// A volume's key in the hands of a verb: watched as under a mount, and gone for good when it is lost.
#[derive(Debug)]
pub struct WatchedKey {
    pub gate: Arc<Gate>,
    watcher: Arc<Watcher>,
}

impl WatchedKey {
    /// By the way of a mount: pinned, confirmed for `back`, checked in full and unwrapped by its
    /// service. Opens the gate.
    pub fn get(
        config: &Config,
        back: &Path,
        root: &NodeRef,
        info: &VolumeInfo,
        gate: &Arc<Gate>,
    ) -> Result<WatchedKey> {
        let pin = pins::read(&config.dir.0, &info.uuid)?;
        let (envelope, provider) = confirmed_envelope(config, back, root, info, &pin)?;
        let revalidated = check_key(&*provider, &envelope, info, &pin, config)?;
        let watcher = Watcher::start(
            settings::watcher(config),
            provider,
            envelope,
            Arc::clone(gate),
            Arc::new(OnLoss(Arc::clone(gate))),
        )?;
        watcher.admit(revalidated)?;
        Ok(WatchedKey { gate: Arc::clone(gate), watcher })
    }
}

impl WatchedKey {
    /// Of the volume key that was unwrapped: the current one, where there are two.
    pub fn fingerprint(&self) -> Result<[u8; 32]> {
        let lost = |_| Error::new(Kind::Inaccessible, "the key was lost meanwhile");
        let lease = self.gate.lease().map_err(lost)?;
        lease.keyring().fingerprint()
    }
}

impl Drop for WatchedKey {
    fn drop(&mut self) {
        self.watcher.stop();
        self.gate.shut(Reason::Operator);
        self.gate.drain(DRAIN_LIMIT);
        self.gate.wipe();
    }
}

/// The envelope, if it is this volume's and confirmed at this place, and the service of its key.
fn confirmed_envelope(
    config: &Config,
    back: &Path,
    root: &NodeRef,
    info: &VolumeInfo,
    pin: &Pin,
) -> Result<(Envelope, Arc<dyn Provider>)> {
    let envelope = Envelope::load(root)?;
    expect_own_envelope(&envelope, info)?;
    match pin.standing(back, &envelope.kid) {
        Standing::Confirmed => {}
        standing => return Err(rotation::unconfirmed(&standing, &envelope)),
    }
    let provider = settings::provider(config, &envelope.kid)?;
    Ok((envelope, provider))
}

/// Ends the work by shutting the gate; nothing brings it back.
#[derive(Debug)]
struct OnLoss(Arc<Gate>);

impl Handler for OnLoss {
    fn cut_off(&self, order: &CutOffOrder) {
        self.0.shut(order.reason);
        self.0.drain(DRAIN_LIMIT);
        self.0.wipe();
    }

    fn heal(&self) -> Result<()> {
        Err(Error::new(Kind::Inaccessible, "the work does not go on after its key was lost"))
    }

    fn notice(&self, _: &Notice) {}

    fn newer_version(&self, _: &str) {}
}

#[derive(Debug)]
pub struct Offline {
    pub back: PathBuf,
    pub config: Config,
    pub info: VolumeInfo,
    pub pin: Pin,
    pub store: Arc<Store>,
}

impl Offline {
    /// Takes the volume, for a process that calls itself `name`. Needs no key yet.
    pub fn open(
        back: &Path,
        config: Config,
        name: &'static str,
        read_only: bool,
    ) -> Result<Offline> {
        let back = check::resolve("the backing directory", back)?;
        // It will hold the volume key.
        harden::process(name)?;
        crypto::selftest::run()?;
        let backing: Arc<dyn Backing> = LinuxBacking::open(&back)?;
        let info = Store::inspect(&*backing)?;
        if let Some(file) = &config.audit.file {
            check::parent_dir(file)?;
            audit::install(file, &[("volume", hex::uuid(&info.uuid))])?;
        }
        let open = || Store::open(Arc::clone(&backing), Gate::new(), read_only);
        let store = when_free(&back, open)?;
        // With the volume in hand: whoever had it until now may have rotated its key.
        let pin = pins::read(&config.dir.0, &info.uuid)?;
        Ok(Offline { back, config, info, pin, store })
    }

    /// Where the envelope is.
    pub fn dir(&self) -> NodeRef {
        self.store.envelope_dir()
    }

    pub fn config_dir(&self) -> &Path {
        &self.config.dir.0
    }

    pub fn envelope(&self) -> Result<(Envelope, Arc<dyn Provider>)> {
        confirmed_envelope(&self.config, &self.back, &self.dir(), &self.info, &self.pin)
    }

    /// The volume's key, after the full check, and the gate open. The log is not looked at.
    pub fn key(&self) -> Result<WatchedKey> {
        WatchedKey::get(&self.config, &self.back, &self.dir(), &self.info, self.store.gate())
    }

    /// With the gate open: brings home what the log holds.
    pub fn recover(&self) -> Result<()> {
        self.store.start_session_by_gate()?;
        self.store.recover().map(drop)
    }

    /// Everything is home and durable afterwards. Nobody else gets the volume before this value
    /// goes.
    pub fn close(&self) -> Result<()> {
        self.store.close().map_err(|error| match error {
            FsError::CutOff(_) => Error::new(Kind::Inaccessible, "the key was lost meanwhile"),
            error => Error::new(Kind::Io, format!("not everything could be brought home: {error}")),
        })
    }
}
