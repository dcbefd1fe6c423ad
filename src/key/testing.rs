//! A key service in memory, for the tests of everything above [`super::provider`].

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::clock::BootTime;
use super::provider::{
    Algorithm, Class, KeyInfo, Provider, ProviderError, ProviderResult, Session, VersionInfo,
};
use super::reason::Reason;
use crate::crypto::secret::SecretBytes;
use crate::sync::Mutex;

/// The key as the service sees it, and how it misbehaves.
#[derive(Clone, Debug)]
pub(super) struct FakeKey {
    pub(super) info: KeyInfo,
    pub(super) newer_version: bool,
    pub(super) denied: Vec<&'static str>,
    pub(super) failure: Option<Class>,
    /// The calls that use this permission end so.
    pub(super) failing: Option<(&'static str, Class)>,
    pub(super) retry_after: Option<Duration>,
    /// What wrapping mixes in; another value is another key under the same name.
    pub(super) material: u8,
    /// Every call takes this long.
    pub(super) delay: Duration,
}

impl FakeKey {
    pub(super) fn good() -> FakeKey {
        FakeKey {
            info: KeyInfo {
                kid: FakeService::KID.into(),
                key_type: "RSA".into(),
                bits: Some(3072),
                operations: ["wrapKey", "unwrapKey"].map(String::from).into(),
                enabled: true,
                created: Some(1),
                recovery_level: Some("Recoverable".into()),
                recoverable_days: Some(90),
                ..KeyInfo::default()
            },
            newer_version: false,
            denied: Vec::new(),
            failure: None,
            failing: None,
            retry_after: None,
            material: 0x5a,
            delay: Duration::ZERO,
        }
    }

    pub(super) fn deny(&mut self, permission: &'static str) {
        self.denied.push(permission);
    }

    pub(super) fn fail_all(&mut self, class: Class) {
        self.failure = Some(class);
    }
}

/// Clones are the same service.
#[derive(Clone, Debug)]
pub(super) struct FakeService {
    key: Arc<Mutex<FakeKey>>,
    calls: Arc<AtomicUsize>,
}

impl FakeService {
    pub(super) const KID: &'static str = "https://kv.example/keys/kek/01";

    pub(super) fn new(key: FakeKey) -> FakeService {
        FakeService { key: Arc::new(Mutex::new(key)), calls: Arc::default() }
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut FakeKey)) {
        change(&mut self.key.lock());
    }

    pub(super) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    pub(super) fn key(&self) -> FakeKey {
        self.key.lock().clone()
    }

    fn used(&self, permission: &'static str) -> ProviderResult<FakeKey> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let key = self.key.lock().clone();
        std::thread::sleep(key.delay);
        if let Some(class) = key.failure {
            let mut error = ProviderError::new(class, "as the test wishes");
            error.retry_after = key.retry_after;
            return Err(error);
        }
        if let Some((failing, class)) = key.failing
            && failing == permission
        {
            return Err(ProviderError::new(class, format!("{permission} fails")));
        }
        if key.denied.contains(&permission) {
            let class = Class::Denied(Reason::PermissionRevoked);
            return Err(ProviderError::new(class, format!("no permission {permission}")));
        }
        if !key.info.enabled && permission.ends_with("rapKey") {
            return Err(ProviderError::new(Class::Revoked(Reason::KeyDisabled), "disabled"));
        }
        Ok(key)
    }
}

impl Provider for FakeService {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn names_version(&self, url: &str) -> bool {
        url.split('/').count() == FakeService::KID.split('/').count()
    }

    fn session(&self, _deadline: BootTime) -> ProviderResult<Box<dyn Session + '_>> {
        Ok(Box::new(self.clone()))
    }
}

impl Session for FakeService {
    fn get_key(&mut self, _kid: &str) -> ProviderResult<KeyInfo> {
        Ok(self.used("get")?.info)
    }

    fn list_versions(&mut self, _kid: &str) -> ProviderResult<Vec<VersionInfo>> {
        let key = self.used("list")?;
        let version = |kid: String, created| VersionInfo {
            kid,
            enabled: true,
            not_before: None,
            expires: None,
            created: Some(created),
        };
        let mut versions = vec![version(key.info.kid, 1)];
        if key.newer_version {
            versions.push(version("https://kv.example/keys/kek/02".into(), 2));
        }
        Ok(versions)
    }

    fn wrap(&mut self, _: &str, _: Algorithm, plain: &SecretBytes) -> ProviderResult<Vec<u8>> {
        let key = self.used("wrapKey")?;
        let mut wrapped = vec![0xee];
        wrapped.extend(plain.expose().iter().map(|byte| byte ^ key.material));
        Ok(wrapped)
    }

    fn unwrap(&mut self, _: &str, _: Algorithm, wrapped: &[u8]) -> ProviderResult<SecretBytes> {
        let key = self.used("unwrapKey")?;
        let Some((0xee, rest)) = wrapped.split_first() else {
            let class = Class::Denied(Reason::WrongKeyOrCorruptEnvelope);
            let mut error = ProviderError::new(class, "bad parameter");
            error.status = Some(400);
            return Err(error);
        };
        let plain = rest.iter().map(|byte| byte ^ key.material).collect();
        Ok(SecretBytes::from_vec_wiping(plain).unwrap())
    }
}
