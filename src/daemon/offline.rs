//! A volume that nobody has mounted, in the hands of one verb: locked, and opened with its key.
//!
//! The way to the key is that of a mount: pinned, confirmed for this place, checked in full and
//! unwrapped by its service just now. No watcher runs: the gate shuts by itself after a while.

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
use crate::error::{Error, Kind, Result};
use crate::key::custody::Revalidated;
use crate::key::envelope::Envelope;
use crate::key::gate::{BootTime, Gate, Keyring, Reason};
use crate::key::provider::Provider;
use crate::observe::audit;
use crate::store::{Store, VolumeInfo};

/// How long a verb may take with the key in its hands.
const LIMIT: Duration = Duration::from_secs(3600);

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

#[derive(Debug)]
pub struct Offline {
    pub back: PathBuf,
    pub config: Config,
    pub info: VolumeInfo,
    pub pin: Pin,
    pub store: Arc<Store>,
    gate: Arc<Gate>,
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
        let pin = pins::read(&config.dir.0, &info.uuid)?;
        if let Some(file) = &config.audit.file {
            check::parent_dir(file)?;
            audit::install(file, &[("volume", hex::uuid(&info.uuid))])?;
        }
        let gate = Gate::new();
        let store =
            when_free(&back, || Store::open(Arc::clone(&backing), Arc::clone(&gate), read_only))?;
        Ok(Offline { back, config, info, pin, store, gate })
    }

    /// Where the envelope is.
    pub fn dir(&self) -> NodeRef {
        self.store.envelope_dir()
    }

    pub fn config_dir(&self) -> &Path {
        &self.config.dir.0
    }

    /// The envelope, if it is this volume's and confirmed here, and the service of its key.
    pub fn envelope(&self) -> Result<(Envelope, Arc<dyn Provider>)> {
        let envelope = Envelope::load(&self.dir())?;
        expect_own_envelope(&envelope, &self.info)?;
        match self.pin.standing(&self.back, &envelope.kid) {
            Standing::Confirmed => {}
            standing => return Err(rotation::unconfirmed(&standing, &envelope)),
        }
        let provider = settings::provider(&self.config, &envelope.kid)?;
        Ok((envelope, provider))
    }

    /// The volume key, after the full check.
    pub fn key(&self, envelope: &Envelope, provider: &dyn Provider) -> Result<Revalidated> {
        check_key(provider, envelope, &self.info, &self.pin, &self.config)
    }

    /// Opens the volume with its key, and brings home what its log holds.
    pub fn unlock(&self, keyring: &Keyring) -> Result<()> {
        self.store.start_session(keyring)?;
        if !self.gate.open(keyring.try_clone()?, BootTime::now() + LIMIT) {
            return Err(Error::new(Kind::Io, "the gate does not open"));
        }
        self.store.recover().map(drop)
    }

    /// Everything is home and durable afterwards, and no key is left in memory. Nobody else gets the
    /// volume before this value goes.
    pub fn close(&self) -> Result<()> {
        let closed = self.store.close().map_err(|error| Error::new(Kind::Io, error.to_string()));
        self.gate.shut(Reason::Operator);
        self.gate.wipe();
        closed
    }
}
