//! A directory with a running key vault, a volume and a mount; all of it ends when it is dropped.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use super::process::{Answer, alive, name, parent, signal};
use super::{SOON, ports, until, within};

pub const KEY: &str = "kek";
pub const IDENTITY: &str = "host";

pub struct Sandbox {
    dir: tempfile::TempDir,
    back: PathBuf,
    vault: Option<Child>,
    /// Guards and daemons of mounts made here, to be ended with the sandbox.
    daemons: Vec<i32>,
}

impl Sandbox {
    /// A vault with an identity, an RSA key and the grant of what a host needs; no volume yet.
    pub fn bare() -> Sandbox {
        Sandbox::bare_with(&[])
    }

    /// The same, its vault made with further options.
    pub fn bare_with(vault_options: &[&str]) -> Sandbox {
        let dir = tempfile::Builder::new().prefix("byokfs-e2e.").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let back = dir.path().join("back");
        let mut sandbox = Sandbox { dir, back, vault: None, daemons: Vec::new() };
        for name in ["back", "mnt", "config", "log", "run"] {
            fs::create_dir(sandbox.path(name)).unwrap();
        }
        let vault = sandbox.path("vault");
        let [port, identity_port] = &ports::options();
        let init = ["vault", "init", path(&vault), port, identity_port];
        sandbox.byokfs(&[&init, vault_options].concat()).ok();
        sandbox.start_vault();
        sandbox.create_key(KEY, &["--kty", "RSA", "--size", "3072"]);
        sandbox.create_identity(IDENTITY);
        sandbox.vault(&[
            "grant",
            "--identity",
            IDENTITY,
            "--key-permissions",
            "get,list,wrapKey,unwrapKey",
        ]);
        sandbox.configure("");
        sandbox
    }

    /// With a volume, mounted.
    pub fn mounted() -> Sandbox {
        Sandbox::mounted_with("")
    }

    /// The same with more lines of configuration: whole sections, or `[watcher]`'s keys.
    pub fn mounted_with(config: &str) -> Sandbox {
        Sandbox::bare().and_mounted(config)
    }

    /// Makes the volume and mounts it, open to all users.
    pub fn and_mounted(self, config: &str) -> Sandbox {
        self.and_mounted_after(config, |_| ())
    }

    /// The same, with something else done to the configuration before.
    pub fn and_mounted_after(mut self, config: &str, change: impl FnOnce(&Sandbox)) -> Sandbox {
        self.configure(config);
        change(&self);
        self.init().ok();
        self.mount();
        // A new volume's root is its maker's alone.
        fs::set_permissions(self.mnt(), fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn back(&self) -> PathBuf {
        self.back.clone()
    }

    /// Has the volume elsewhere, on a file system of its own for example.
    pub fn set_back(&mut self, back: PathBuf) {
        self.back = back;
    }

    pub fn mnt(&self) -> PathBuf {
        self.path("mnt")
    }

    /// The encrypted tree in the backing directory.
    pub fn tree(&self) -> PathBuf {
        self.back().join("tree")
    }

    // ---- byokfs ------------------------------------------------------------------------------

    pub fn command(&self) -> Command {
        // A release build, where a test takes too long with this one.
        let binary = std::env::var_os("BYOKFS_BINARY");
        let mut command = Command::new(binary.unwrap_or(env!("CARGO_BIN_EXE_byokfs").into()));
        command.env("BYOKFS_CONFIG", self.path("config/byokfs.toml"));
        command.env("BYOKFS_VAULT", self.path("vault"));
        command.env("SOFTHSM2_CONF", self.path("hsm/softhsm2.conf"));
        command
    }

    pub fn byokfs(&self, args: &[&str]) -> Answer {
        Answer::of(self.command().args(args))
    }

    /// Writes the configuration; `more` may hold further sections, or begin with keys of
    /// `[watcher]`.
    pub fn configure(&self, more: &str) {
        let probe = match more.contains("interval") {
            true => "",
            false => "interval = \"1s\"\ndeadline = \"5s\"\nconfirm_after = \"1s\"\n",
        };
        let config = format!(
            "[key]\nidentity = \"app-service\"\nidentity_endpoint = \"{}\"\n\
             identity_header_file = \"{}\"\nca_file = \"{}\"\n\
             [audit]\nfile = \"{}\"\n[log]\nfile = \"{}\"\nlevel = \"debug\"\n[run]\ndir = \"{}\"\n\
             [watcher]\n{probe}{more}\n",
            self.identity_endpoint(),
            self.path("config/identity.header").display(),
            self.path("vault/ca.pem").display(),
            self.path("log/audit.jsonl").display(),
            self.path("log/byokfs.log").display(),
            self.path("run").display(),
        );
        fs::write(self.path("config/byokfs.toml"), config).unwrap();
    }

    pub fn init(&self) -> Answer {
        self.byokfs(&["init", path(&self.back()), "--kek", &self.kek(), "--log-size", "32MiB"])
    }

    #[track_caller]
    pub fn mount(&mut self) {
        self.try_mount().ok();
    }

    /// For a mount that may fail. It answers as the verb did.
    #[track_caller]
    pub fn try_mount(&mut self) -> Answer {
        self.try_mount_with(&[])
    }

    #[track_caller]
    pub fn try_mount_with(&mut self, more: &[&str]) -> Answer {
        let (back, mnt) = (self.back(), self.mnt());
        let answer = self.byokfs(&[&["mount", path(&back), path(&mnt)], more].concat());
        if answer.code == Some(0) {
            let daemon = self.daemon();
            self.daemons.push(daemon);
            if let Some(guard) = self.guard() {
                self.daemons.push(guard);
            }
        }
        answer
    }

    #[track_caller]
    pub fn umount(&self) {
        self.byokfs(&["umount", path(&self.mnt())]).ok();
        assert!(!self.is_mounted(), "umount said it was done");
    }

    /// Kills the daemon with SIGKILL and waits for its end. The guard lives on.
    #[track_caller]
    pub fn kill_daemon(&self) {
        let daemon = self.daemon();
        signal(daemon, Signal::KILL);
        until("the daemon to end", || !alive(daemon));
    }

    /// Starts to mount and kills all that belongs to it after that time, wherever it is by then.
    /// The test must be alone in its process namespace.
    pub fn mount_and_kill(&self, after: Duration) {
        let mut verb = self
            .command()
            .args(["mount", path(&self.back()), path(&self.mnt())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(after);
        let vault = self.vault.as_ref().map(|vault| vault.id() as i32);
        let theirs = || -> Vec<i32> {
            let entries = fs::read_dir("/proc").unwrap().flatten();
            let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
            // Not by its name: until it has become what it is to be, it has that of a thread of who made it.
            let byokfs = |pid: &i32| {
                let program = fs::read_link(format!("/proc/{pid}/exe")).ok();
                let name = program.as_ref().and_then(|path| path.file_name()?.to_str());
                name.is_some_and(|name| name.starts_with("byokfs"))
            };
            pids.filter(|pid| Some(*pid) != vault && alive(*pid)).filter(byokfs).collect()
        };
        // Also what one of them has started since.
        until("all that mounts to be killed", || {
            let found = theirs();
            found.iter().for_each(|pid| signal(*pid, Signal::STOP));
            found.iter().for_each(|pid| signal(*pid, Signal::KILL));
            found.is_empty()
        });
        verb.wait().unwrap();
        if self.is_mounted() {
            Answer::of(Command::new("umount").arg("--lazy").arg(self.mnt())).ok();
        }
    }

    /// Kills guard and daemon, as the loss of the machine does: neither gets to do anything more.
    /// True once all have ended.
    pub fn kill_everything(&mut self) -> bool {
        let ours = |pid: i32| name(pid).is_some_and(|name| name.starts_with("byokfs"));
        let pids: Vec<i32> = self.daemons.drain(..).filter(|pid| ours(*pid)).collect();
        // Each would act on the end of the other.
        for signal_sent in [Signal::STOP, Signal::KILL] {
            pids.iter().for_each(|pid| signal(*pid, signal_sent));
        }
        pids.iter().all(|pid| within(SOON, || !alive(*pid)))
    }

    pub fn is_mounted(&self) -> bool {
        mounted(&self.mnt())
    }

    pub fn status(&self) -> Value {
        let answer = self.byokfs(&["status", path(&self.mnt()), "--json"]);
        serde_json::from_str(&answer.out).unwrap_or_else(|error| panic!("{error}: {answer}"))
    }

    pub fn state(&self) -> String {
        self.status()["state"].as_str().unwrap_or_default().to_owned()
    }

    /// The process that holds the keys.
    #[track_caller]
    pub fn daemon(&self) -> i32 {
        let status = self.status();
        status["pid"].as_i64().and_then(|pid| pid.try_into().ok()).unwrap_or_else(|| {
            panic!("status does not tell the daemon's pid: {status}");
        })
    }

    /// Its keyless parent.
    pub fn guard(&self) -> Option<i32> {
        parent(self.daemon())
            .filter(|pid| name(*pid).is_some_and(|name| name.starts_with("byokfs")))
    }

    #[track_caller]
    pub fn until_inaccessible(&self) {
        until("the volume to be Inaccessible", || self.state() == "Inaccessible");
    }

    #[track_caller]
    pub fn revalidate(&self) {
        self.byokfs(&["revalidate", path(&self.mnt())]).ok();
        assert_eq!(self.state(), "Available");
    }

    /// Disables the key and waits for the cut-off.
    #[track_caller]
    pub fn revoke(&self) {
        self.enable_key(false);
        self.until_inaccessible();
    }

    /// Enables the key again and opens the gate.
    #[track_caller]
    pub fn recover(&self) {
        self.enable_key(true);
        self.revalidate();
    }

    /// The lines of the audit trail with this event.
    pub fn audit(&self, event: &str) -> Vec<Value> {
        let trail = fs::read_to_string(self.path("log/audit.jsonl")).unwrap_or_default();
        trail
            .lines()
            .map(|line| serde_json::from_str(line).expect("an audit line that is not JSON"))
            .filter(|line: &Value| line["event"] == event)
            .collect()
    }

    // ---- the vault ---------------------------------------------------------------------------

    #[track_caller]
    pub fn vault(&self, args: &[&str]) -> String {
        let mut command = self.command();
        Answer::of(command.arg("vault").args(args)).ok()
    }

    #[track_caller]
    pub fn start_vault(&mut self) {
        for name in ["vault/url", "vault/identity.url"] {
            // Written anew by each start; a leftover would be taken for readiness.
            let _ = fs::remove_file(self.path(name));
        }
        let log =
            fs::File::options().create(true).append(true).open(self.path("log/vault.log")).unwrap();
        let mut child = self
            .command()
            .args(["vault", "serve", path(&self.path("vault"))])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        until("the vault to listen", || {
            assert!(child.try_wait().unwrap().is_none(), "the vault ended: {}", self.log("vault"));
            let filled = |name| fs::metadata(self.path(name)).is_ok_and(|meta| meta.len() > 0);
            filled("vault/url") && filled("vault/identity.url")
        });
        self.vault = Some(child);
    }

    pub fn stop_vault(&mut self) {
        if let Some(mut vault) = self.vault.take() {
            let _ = vault.kill();
            let _ = vault.wait();
        }
    }

    pub fn create_key(&self, name: &str, kind: &[&str]) {
        let mut args = vec!["key", "create", "--name", name];
        args.extend(kind);
        self.vault(&args);
    }

    /// Leaves the identity's secret where the configuration expects it.
    pub fn create_identity(&self, name: &str) {
        let file = self.path("config/identity.header");
        let _ = fs::remove_file(&file);
        self.vault(&["identity", "create", name, "--header-file", path(&file)]);
    }

    pub fn enable_key(&self, enabled: bool) {
        let enabled = if enabled { "true" } else { "false" };
        self.vault(&["key", "set-attributes", "--name", KEY, "--enabled", enabled]);
    }

    pub fn url(&self) -> String {
        fs::read_to_string(self.path("vault/url")).unwrap().trim().trim_end_matches('/').to_owned()
    }

    pub fn identity_endpoint(&self) -> String {
        fs::read_to_string(self.path("vault/identity.url")).unwrap().trim().to_owned()
    }

    /// The key version that the mounted volume is wrapped with.
    pub fn kek_in_use(&self) -> String {
        self.status()["kek"].as_str().unwrap_or_default().to_owned()
    }

    /// `byokfs info --keys`: key version and role.
    pub fn needed_keys(&self, back: &Path) -> Vec<(String, String)> {
        let keys = self.byokfs(&["info", "--keys", "--json", path(back)]).ok();
        let keys: Vec<Value> = serde_json::from_str(&keys).unwrap();
        let text = |key: &Value, field: &str| key[field].as_str().unwrap().to_owned();
        keys.iter().map(|key| (text(key, "kid"), text(key, "role"))).collect()
    }

    pub fn kek(&self) -> String {
        self.key_url(KEY)
    }

    pub fn key_url(&self, name: &str) -> String {
        format!("{}/keys/{name}", self.url())
    }

    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path(&format!("log/{name}.log"))).unwrap_or_default()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log("byokfs");
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("---- byokfs.log ----");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
        if self.is_mounted() {
            let _ = self.byokfs(&["umount", path(&self.mnt())]);
        }
        let stuck = self.is_mounted();
        for pid in self.daemons.drain(..) {
            let ours = name(pid).is_some_and(|name| name.starts_with("byokfs"));
            if ours && (stuck || !within(SOON, || !alive(pid))) {
                signal(pid, Signal::KILL);
            }
        }
        if self.is_mounted() {
            let _ = Answer::of(Command::new("umount").arg("--lazy").arg(self.mnt()));
        }
        self.stop_vault();
    }
}

pub fn mounted(at: &Path) -> bool {
    let at = path(at).replace(' ', "\\040");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(at.as_str()))
}

/// Paths of the tests are always UTF-8.
pub fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
