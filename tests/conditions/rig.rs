//! A watcher over the fake, with a gate and a handler that does what the daemon does.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use byokfs::Result;
use byokfs::key::custody::{Enrolment, enrol, revalidate};
use byokfs::key::envelope::Envelope;
use byokfs::key::gate::{Gate, Reason, State};
use byokfs::key::policy;
use byokfs::key::provider::{
    Algorithm, Application, Identity, Provider, ProviderError, ProviderResult, Session, Settings,
    for_key,
};
use byokfs::key::requirement;
use byokfs::key::rewrap::{NewKey, rewrap};
use byokfs::key::watcher::{self, CutOffOrder, Handler, Notice, Watcher};
use parking_lot::Mutex;

use crate::fake::{Fake, Fault};

pub const LIMIT: Duration = Duration::from_secs(30);
/// At once, or after confirmation: nothing like [`STALENESS`].
pub const SOON: Duration = Duration::from_secs(15);
/// How long an unreachable service is borne where that is not what a test is about.
pub const STALENESS: Duration = Duration::from_secs(300);

/// Some milliseconds where the real thing has seconds, with the proportions of the defaults.
pub fn quick() -> watcher::Settings {
    watcher::Settings {
        interval: Duration::from_millis(150),
        deadline: Duration::from_secs(2),
        policy: policy::Settings {
            confirm_after: Duration::from_millis(100),
            confirm_within: Duration::from_secs(60),
            max_staleness: STALENESS,
            cut_off_lead: Duration::from_secs(1),
            ..policy::Settings::default()
        },
        ..watcher::Settings::default()
    }
}

/// The fake's provider, whose vault's name may cease to exist.
#[derive(Debug)]
pub struct Nameable {
    real: Arc<dyn Provider>,
    gone: Arc<dyn Provider>,
    is_gone: Mutex<bool>,
}

impl Provider for Nameable {
    fn name(&self) -> &'static str {
        self.real.name()
    }

    fn names_version(&self, url: &str) -> bool {
        self.real.names_version(url)
    }

    fn session(
        &self,
        deadline: byokfs::key::gate::BootTime,
    ) -> ProviderResult<Box<dyn Session + '_>> {
        if !*self.is_gone.lock() {
            return self.real.session(deadline);
        }
        let mut session = self.gone.session(deadline)?;
        let error = session.get_key("https://vault.invalid/keys/kek").map(drop);
        Err(error.err().unwrap_or_else(|| ProviderError::unreachable("it answered")))
    }
}

pub struct Rig {
    pub fake: Fake,
    /// Another vault, for which the same identity is good.
    pub other: Fake,
    access: Settings,
    pub gate: Arc<Gate>,
    pub handler: Arc<Recorder>,
    pub watcher: Arc<Watcher>,
    provider: Arc<Nameable>,
    _dir: tempfile::TempDir,
}

/// What the daemon does, and what it was told.
pub struct Recorder {
    gate: Arc<Gate>,
    provider: Arc<Nameable>,
    enrolment: Enrolment,
    watcher: Mutex<std::sync::Weak<Watcher>>,
    pub orders: Mutex<Vec<(Reason, Option<String>)>>,
    pub notices: Mutex<Vec<Notice>>,
}

impl Recorder {
    pub fn envelope(&self) -> Envelope {
        self.enrolment.envelope([1; 16])
    }

    /// `byokfs revalidate`.
    pub fn revalidate(&self) -> Result<()> {
        let settings = requirement::Settings::default();
        let pin = &self.enrolment.fingerprint;
        let good = revalidate(&*self.provider, &self.envelope(), pin, &settings, LIMIT)?;
        self.watcher.lock().upgrade().unwrap().admit(good)
    }
}

impl Handler for Recorder {
    fn cut_off(&self, order: &CutOffOrder) {
        self.orders.lock().push((order.reason, order.detail.clone()));
        self.gate.shut(order.reason);
        self.gate.drain(LIMIT);
        self.gate.wipe();
    }

    fn heal(&self) -> Result<()> {
        self.revalidate()
    }

    fn notice(&self, notice: &Notice) {
        self.notices.lock().push(notice.clone());
    }

    fn newer_version(&self, _kid: &str) {}
}

impl Rig {
    pub fn serving(settings: watcher::Settings) -> Rig {
        let (fake, other) = (Fake::start(), Fake::start());
        let dir = tempfile::tempdir().unwrap();
        let (ca_file, secret) = (dir.path().join("ca.pem"), dir.path().join("secret"));
        std::fs::write(&ca_file, format!("{}{}", fake.ca, other.ca)).unwrap();
        std::fs::write(&secret, "not-a-secret").unwrap();
        std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
        let application = Application {
            tenant: Some("tenant".into()),
            client_id: Some("application".into()),
            authority: Some(format!("http://{}/", fake.directory)),
        };
        let access = Settings {
            identity: Identity::ClientSecret(application, secret),
            ca_file: Some(ca_file),
            ..Settings::default()
        };
        let provider = Arc::new(Nameable {
            real: for_key(&fake.key(), &access).unwrap(),
            gone: for_key("https://vault.invalid/keys/kek", &access).unwrap(),
            is_gone: Mutex::new(false),
        });
        let requirements = requirement::Settings::default();
        let algorithm = Algorithm::RsaOaep256;
        let enrolment = enrol(&*provider, &fake.key(), algorithm, &requirements, LIMIT).unwrap();
        let gate = Gate::new();
        let handler = Arc::new(Recorder {
            gate: Arc::clone(&gate),
            provider: Arc::clone(&provider),
            enrolment,
            watcher: Mutex::default(),
            orders: Mutex::default(),
            notices: Mutex::default(),
        });
        let watcher = Watcher::start(
            settings,
            Arc::clone(&provider) as _,
            handler.envelope(),
            Arc::clone(&gate),
            Arc::clone(&handler) as _,
        )
        .unwrap();
        *handler.watcher.lock() = Arc::downgrade(&watcher);
        handler.revalidate().unwrap();
        Rig { fake, other, access, gate, handler, watcher, provider, _dir: dir }
    }

    pub fn state(&self) -> (State, Option<Reason>) {
        let status = self.gate.status();
        (status.state, status.reason)
    }

    #[track_caller]
    pub fn wait_for(&self, what: &str, state: State, reason: Option<Reason>) -> Duration {
        let start = Instant::now();
        while self.state() != (state, reason) {
            let seen = self.watcher.status();
            assert!(start.elapsed() < LIMIT, "{what}: {state} {reason:?} never came: {seen:?}");
            std::thread::sleep(Duration::from_millis(3));
        }
        start.elapsed()
    }

    /// So many more probes, whatever they find.
    pub fn probes(&self, count: usize) {
        (0..count).for_each(|_| drop(self.watcher.probe_now(LIMIT)));
    }

    pub fn vault_is_gone(&self, gone: bool) {
        *self.provider.is_gone.lock() = gone;
    }

    /// All is well again, for whoever asks.
    pub fn mend(&self) {
        self.vault_is_gone(false);
        self.fake.fault(Fault::None);
    }

    /// `byokfs rotate kek --to` the other vault.
    pub fn move_to_other(&self) {
        let to = for_key(&self.other.key(), &self.access).unwrap();
        let url = self.other.key();
        let new = NewKey {
            provider: &*to,
            url: &url,
            algorithm: None,
            follow: None,
            forget_earlier: false,
        };
        let (envelope, pin) = (self.handler.envelope(), self.handler.enrolment.fingerprint);
        let settings = requirement::Settings::default();
        let rewrapped = rewrap(&*self.provider, &envelope, &pin, &new, &settings, LIMIT);
        self.watcher.rotated(&rewrapped.unwrap().unwrap(), to);
    }

    pub fn degradations(&self) -> Vec<Reason> {
        let notices = self.handler.notices.lock();
        let degraded = notices.iter().filter_map(|notice| match notice {
            Notice::Degraded { reason, .. } => Some(*reason),
            _ => None,
        });
        degraded.collect()
    }

    pub fn forget(&self) {
        self.handler.orders.lock().clear();
        self.handler.notices.lock().clear();
    }
}
