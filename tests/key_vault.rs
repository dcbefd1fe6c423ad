//! The key client against the embedded key vault: every way to lose a key, and every way back,
//! with the state, the reason and the time reached. Needs no root and no /dev/fuse.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use byokfs::key::custody::{Enrolment, Revalidated, enrol, revalidate};
use byokfs::key::envelope::Envelope;
use byokfs::key::gate::{Gate, Reason, State};
use byokfs::key::policy;
use byokfs::key::provider::{Algorithm, AppService, Identity, Provider, Settings, for_key};
use byokfs::key::requirement;
use byokfs::key::watcher::{self, CutOffOrder, Handler, Notice, Watcher};
use byokfs::{Kind, Result};

const LIMIT: Duration = Duration::from_secs(20);
const ALL: &str = "get,list,wrapKey,unwrapKey";

/// A vault of its own, with one key and one identity that may use it.
struct Vault {
    dir: tempfile::TempDir,
    server: Option<Child>,
    key_url: String,
    endpoint: String,
}

impl Vault {
    fn start() -> Vault {
        Vault::start_with(&[])
    }

    fn start_with(options: &[&str]) -> Vault {
        let dir = tempfile::tempdir().unwrap();
        let mut vault =
            Vault { dir, server: None, key_url: String::new(), endpoint: String::new() };
        vault.run(&[&["init", vault.path().to_str().unwrap()], options].concat());
        vault.serve();
        vault.key_url = vault.run(&["key", "create", "--name", "kek"]).trim().to_owned();
        let header = vault.dir.path().join("db.header");
        vault.run(&["identity", "create", "db", "--header-file", header.to_str().unwrap()]);
        vault.grant(ALL);
        vault
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("vault")
    }

    /// Starts the server, on the ports it had before.
    fn serve(&mut self) {
        let mut server = Command::new(env!("CARGO_BIN_EXE_byokfs"))
            .args(["vault", "serve"])
            .arg(self.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
        let mut word = || lines.next().unwrap().unwrap().split(' ').next_back().unwrap().to_owned();
        let _url = word();
        self.endpoint = word();
        self.server = Some(server);
    }

    fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }

    fn run(&self, args: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_byokfs"))
            .arg("vault")
            .args(args)
            .env("BYOKFS_VAULT", self.path())
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "vault {args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn set(&self, attribute: &str, value: &str) {
        self.run(&["key", "set-attributes", "--name", "kek", attribute, value]);
    }

    fn grant(&self, permissions: &str) {
        self.run(&["grant", "--identity", "db", "--key-permissions", permissions]);
    }

    fn revoke(&self, permissions: &str) {
        self.run(&["revoke", "--identity", "db", "--key-permissions", permissions]);
    }

    fn settings(&self) -> Settings {
        Settings {
            identity: Identity::AppService(AppService {
                endpoint: Some(self.endpoint.clone()),
                header_file: Some(self.dir.path().join("db.header")),
                client_id: None,
            }),
            ca_file: Some(self.path().join("ca.pem")),
            ..Settings::default()
        }
    }

    fn provider(&self) -> Arc<dyn Provider> {
        for_key(&self.key_url, &self.settings()).unwrap()
    }
}

impl Drop for Vault {
    fn drop(&mut self) {
        self.stop();
    }
}

fn requirements() -> requirement::Settings {
    requirement::Settings::default()
}

fn enrolled(vault: &Vault) -> Enrolment {
    let algorithm = Algorithm::RsaOaep256;
    enrol(&*vault.provider(), &vault.key_url, algorithm, &requirements(), LIMIT).unwrap()
}

/// In RFC 3339, as the vault's verbs take it.
fn in_seconds(seconds: i64) -> String {
    use time::format_description::well_known::Rfc3339;
    let at = time::OffsetDateTime::now_utc() + time::Duration::seconds(seconds);
    at.replace_nanosecond(0).unwrap().format(&Rfc3339).unwrap()
}

/// A volume without files: what the daemon does around the watcher.
struct Daemon {
    gate: Arc<Gate>,
    provider: Arc<dyn Provider>,
    envelope: Envelope,
    pin: [u8; 32],
    watcher: parking_lot::Mutex<Option<Arc<Watcher>>>,
}

impl Daemon {
    fn start(vault: &Vault, settings: watcher::Settings) -> Arc<Daemon> {
        let enrolment = enrolled(vault);
        let daemon = Arc::new(Daemon {
            gate: Gate::new(),
            provider: vault.provider(),
            envelope: enrolment.envelope([1; 16]),
            pin: enrolment.fingerprint,
            watcher: parking_lot::Mutex::new(None),
        });
        let watcher = Watcher::start(
            settings,
            Arc::clone(&daemon.provider),
            daemon.envelope.clone(),
            Arc::clone(&daemon.gate),
            Arc::clone(&daemon) as Arc<dyn Handler>,
        )
        .unwrap();
        *daemon.watcher.lock() = Some(watcher);
        daemon.revalidate().unwrap();
        daemon
    }

    fn watcher(&self) -> Arc<Watcher> {
        self.watcher.lock().clone().unwrap()
    }

    fn unwrap(&self) -> Result<Revalidated> {
        Ok(revalidate(&*self.provider, &self.envelope, &self.pin, &requirements(), LIMIT)?)
    }

    fn revalidate(&self) -> Result<()> {
        self.watcher().admit(self.unwrap()?)
    }

    fn state(&self) -> (State, Option<Reason>) {
        let status = self.gate.status();
        (status.state, status.reason)
    }

    fn wait_for(&self, what: &str, state: State, reason: Option<Reason>) -> Duration {
        let start = Instant::now();
        while self.state() != (state, reason) {
            let seen = self.watcher().status();
            assert!(start.elapsed() < LIMIT, "{what}: {state} {reason:?} never came: {seen:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
        start.elapsed()
    }
}

impl Handler for Daemon {
    fn cut_off(&self, order: &CutOffOrder) {
        self.gate.shut(order.reason);
        self.gate.drain(LIMIT);
        self.gate.wipe();
    }

    fn heal(&self) -> Result<()> {
        self.revalidate()
    }

    fn notice(&self, _notice: &Notice) {}

    fn newer_version(&self, _kid: &str) {}
}

fn quick() -> watcher::Settings {
    watcher::Settings {
        interval: Duration::from_millis(250),
        deadline: Duration::from_secs(5),
        policy: policy::Settings {
            confirm_after: Duration::from_millis(300),
            ..policy::Settings::default()
        },
        ..watcher::Settings::default()
    }
}

#[test]
fn a_new_key_meets_the_requirements() {
    let vault = Vault::start();
    let enrolment = enrolled(&vault);
    let strict = requirement::Settings { strict: true, ..requirements() };
    let algorithm = Algorithm::RsaOaep256;
    enrol(&*vault.provider(), &vault.key_url, algorithm, &strict, LIMIT).unwrap();
    assert_eq!(enrolment.report.failures().count(), 0);
    assert_eq!(enrolment.info.kid, vault.key_url);
    assert_eq!(enrolment.info.bits, Some(3072));
    assert_eq!(enrolment.info.region.as_deref(), Some("local"));
    assert!(enrolment.info.tenant.is_some() && enrolment.info.service_time.is_some());
    let envelope = enrolment.envelope([1; 16]);
    let provider = vault.provider();
    let back = revalidate(&*provider, &envelope, &enrolment.fingerprint, &strict, LIMIT).unwrap();
    assert_eq!(back.keyring.fingerprint().unwrap(), enrolment.fingerprint);
}

#[test]
fn a_key_named_without_a_version_is_resolved() {
    let vault = Vault::start();
    let (bare, _) = vault.key_url.rsplit_once('/').unwrap();
    let provider = vault.provider();
    let enrolment = enrol(&*provider, bare, Algorithm::RsaOaep256, &requirements(), LIMIT).unwrap();
    let envelope = enrolment.envelope([1; 16]);
    assert_eq!(envelope.kid, vault.key_url);
    assert!(envelope.follow_versions);
}

#[test]
fn bad_keys_are_refused_at_init() {
    let vault = Vault::start();
    let algorithm = Algorithm::RsaOaep256;
    let attempt = || enrol(&*vault.provider(), &vault.key_url, algorithm, &requirements(), LIMIT);
    vault.set("--enabled", "false");
    let refusal = attempt().unwrap_err();
    assert_eq!((refusal.reason, refusal.error.kind), (Reason::KeyDisabled, Kind::Denied));
    vault.set("--enabled", "true");
    for permission in ALL.split(',') {
        vault.revoke(permission);
        let refusal = attempt().unwrap_err();
        assert_eq!(refusal.reason, Reason::PermissionRevoked, "{permission}");
        vault.grant(permission);
    }
    let missing = vault.key_url.replace("/kek/", "/none/");
    let missing = enrol(&*vault.provider(), &missing, algorithm, &requirements(), LIMIT);
    assert_eq!(missing.unwrap_err().reason, Reason::KeyNotFound);
    attempt().unwrap();
}

#[test]
fn another_volumes_envelope_is_refused() {
    let vault = Vault::start();
    let (mine, other) = (enrolled(&vault), enrolled(&vault));
    let provider = vault.provider();
    let planted = other.envelope([1; 16]);
    let refusal =
        revalidate(&*provider, &planted, &mine.fingerprint, &requirements(), LIMIT).unwrap_err();
    assert_eq!(refusal.reason, Reason::KeyMaterialMismatch);
    let mut broken = mine.envelope([1; 16]);
    broken.wrapped_volume_key[17] ^= 1;
    let refusal =
        revalidate(&*provider, &broken, &mine.fingerprint, &requirements(), LIMIT).unwrap_err();
    assert_eq!(refusal.reason, Reason::WrongKeyOrCorruptEnvelope);
}

/// One loss: what it is called, how it happens, what it is reported as, and its way back.
type Loss = (&'static str, fn(&Vault), Reason, fn(&Vault));

#[test]
fn every_way_to_lose_a_key_and_every_way_back() {
    let vault = Vault::start();
    let daemon = Daemon::start(&vault, quick());
    let losses: [Loss; 9] = [
        (
            "disabled",
            |vault| vault.set("--enabled", "false"),
            Reason::KeyDisabled,
            |vault| vault.set("--enabled", "true"),
        ),
        (
            "expired",
            |vault| vault.set("--expires", &in_seconds(-5)),
            Reason::KeyExpired,
            |vault| vault.set("--expires", "none"),
        ),
        (
            "not yet valid",
            |vault| vault.set("--not-before", &in_seconds(3600)),
            Reason::KeyNotYetValid,
            |vault| vault.set("--not-before", "none"),
        ),
        (
            "deleted",
            |vault| drop(vault.run(&["key", "delete", "--name", "kek"])),
            Reason::KeyDeleted,
            |vault| drop(vault.run(&["key", "recover", "--name", "kek"])),
        ),
        ("get", |vault| vault.revoke("get"), Reason::PermissionRevoked, |vault| vault.grant("get")),
        (
            "list",
            |vault| vault.revoke("list"),
            Reason::PermissionRevoked,
            |vault| {
                vault.grant("list");
            },
        ),
        (
            "wrap",
            |vault| vault.revoke("wrapKey"),
            Reason::PermissionRevoked,
            |vault| {
                vault.grant("wrapKey");
            },
        ),
        (
            "unwrap",
            |vault| vault.revoke("unwrapKey"),
            Reason::PermissionRevoked,
            |vault| {
                vault.grant("unwrapKey");
            },
        ),
        ("all", |vault| vault.revoke(ALL), Reason::PermissionRevoked, |vault| vault.grant(ALL)),
    ];
    for (epoch, (what, lose, reason, mend)) in (1..).zip(losses) {
        daemon.wait_for(what, State::Available, None);
        assert_eq!(daemon.gate.epoch(), epoch, "{what}: it came back before it was lost");
        lose(&vault);
        let took = daemon.wait_for(what, State::Inaccessible, Some(reason));
        assert!(daemon.gate.lease().is_err());
        println!("{what}: {reason} after {took:?}");
        assert!(daemon.unwrap().is_err(), "{what}: a lost key revalidates");
        mend(&vault);
        // It stays so, until someone says otherwise.
        daemon.watcher().probe_now(LIMIT);
        assert_eq!(daemon.state(), (State::Inaccessible, Some(reason)), "{what}");
        daemon.revalidate().unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

#[test]
fn a_purged_key_comes_back_from_its_backup_only() {
    let vault = Vault::start_with(&["--no-purge-protection"]);
    let daemon = Daemon::start(&vault, quick());
    let backup = vault.dir.path().join("kek.backup");
    let backup = backup.to_str().unwrap();
    vault.run(&["key", "backup", "--name", "kek", "--file", backup]);
    vault.run(&["key", "delete", "--name", "kek"]);
    daemon.wait_for("deleted", State::Inaccessible, Some(Reason::KeyDeleted));
    vault.run(&["key", "purge", "--name", "kek"]);
    // Still Inaccessible, and for another reason: there is no recovering it.
    daemon.wait_for("purged", State::Inaccessible, Some(Reason::KeyNotFound));
    // Another key of the same name is another key.
    vault.run(&["key", "create", "--name", "kek"]);
    assert!(daemon.revalidate().is_err());
    vault.run(&["key", "delete", "--name", "kek"]);
    vault.run(&["key", "purge", "--name", "kek"]);
    vault.run(&["key", "restore", "--file", backup]);
    daemon.revalidate().unwrap();
    daemon.wait_for("restored", State::Available, None);
}

#[test]
fn expiry_while_serving_is_met_by_the_second_without_a_probe() {
    let vault = Vault::start();
    let settings = watcher::Settings { interval: Duration::from_secs(3600), ..quick() };
    let daemon = Daemon::start(&vault, settings);
    vault.set("--expires", &in_seconds(4));
    let expires = daemon.watcher().probe_now(LIMIT).expires.unwrap();
    daemon.wait_for("expiry", State::Inaccessible, Some(Reason::KeyExpired));
    let late = SystemTime::now().duration_since(expires).unwrap();
    assert!(late < Duration::from_secs(2), "{late:?}");
}

#[test]
fn a_vault_that_is_away_degrades_cuts_off_and_heals() {
    let mut vault = Vault::start();
    let settings = watcher::Settings {
        policy: policy::Settings {
            max_staleness: Duration::from_secs(6),
            cut_off_lead: Duration::from_secs(2),
            ..policy::Settings::default()
        },
        ..quick()
    };
    let daemon = Daemon::start(&vault, settings);
    vault.stop();
    daemon.wait_for("away", State::Degraded, Some(Reason::Unreachable));
    assert!(daemon.gate.lease().is_ok());
    daemon.wait_for("away for long", State::Inaccessible, Some(Reason::Unreachable));
    vault.serve();
    daemon.wait_for("back", State::Available, None);
    assert_eq!(daemon.gate.epoch(), 2);
}

#[test]
fn a_deleted_identity_is_noticed() {
    let vault = Vault::start();
    let daemon = Daemon::start(&vault, quick());
    vault.run(&["identity", "delete", "db"]);
    let start = Instant::now();
    while daemon.state().0 != State::Inaccessible {
        assert!(start.elapsed() < LIMIT, "{:?}", daemon.watcher().status());
        std::thread::sleep(Duration::from_millis(5));
    }
    let reason = daemon.state().1.unwrap();
    assert!(
        [Reason::IdentityGone, Reason::TokenRefused, Reason::CredentialInvalid].contains(&reason),
        "{reason}"
    );
}

#[test]
fn an_untrusted_vault_gets_no_token() {
    let (vault, other) = (Vault::start(), Vault::start());
    let settings = Settings { ca_file: Some(other.path().join("ca.pem")), ..vault.settings() };
    let provider = for_key(&vault.key_url, &settings).unwrap();
    let algorithm = Algorithm::RsaOaep256;
    let refusal = enrol(&*provider, &vault.key_url, algorithm, &requirements(), LIMIT).unwrap_err();
    assert_eq!((refusal.reason, refusal.error.kind), (Reason::TlsUntrusted, Kind::Unreachable));
}
