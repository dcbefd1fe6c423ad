//! A real `byokfs vault serve --drills`, with one key, a managed identity and an application.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use byokfs::key::provider::{AppService, Application, Identity, Settings};
use serde_json::Value;

use crate::ports;
use crate::rig::Service;

pub const ALL: &str = "get,list,wrapKey,unwrapKey";
pub const HOST: &str = "db";
pub const APP: &str = "app";

/// As whom the vault is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// A managed identity, over the App Service endpoint.
    Host,
    /// An application with a secret, at the vault's own token endpoint.
    Application,
}

pub struct Vault {
    dir: tempfile::TempDir,
    server: Option<Child>,
    who: Who,
    pub url: String,
    pub key: String,
    endpoint: String,
    tenant: String,
    client_id: String,
}

impl Vault {
    pub fn start(who: Who) -> Vault {
        Vault::start_with(who, &[], &["--size", "2048"]).granting()
    }

    fn granting(self) -> Vault {
        self.grant(ALL);
        self
    }

    /// One whose keys can be purged.
    pub fn start_unprotected(who: Who) -> Vault {
        Vault::start_with(who, &["--no-purge-protection"], &["--size", "2048"]).granting()
    }

    /// With options of `init`, a key of that type, and nothing granted.
    pub fn start_with(who: Who, init: &[&str], key: &[&str]) -> Vault {
        let dir = tempfile::tempdir().unwrap();
        let mut vault = Vault {
            dir,
            server: None,
            who,
            url: String::new(),
            key: String::new(),
            endpoint: String::new(),
            tenant: String::new(),
            client_id: String::new(),
        };
        let [port, identity_port] = &ports::options();
        let path = vault.path();
        vault.run(&[&["init", path.to_str().unwrap(), port, identity_port], init].concat());
        vault.serve();
        vault.key = vault.run(&[&["key", "create", "--name", "kek"], key].concat()).trim().into();
        vault.create_host();
        vault.create_application();
        vault
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("vault")
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts the server, on the ports it had before. Its tokens are so short that each request
    /// has one of its own, as if hours had passed between two of them.
    pub fn serve(&mut self) {
        let mut server = Command::new(env!("CARGO_BIN_EXE_byokfs"))
            .args(["vault", "serve", "--drills", "--token-lifetime", "60"])
            .arg(self.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(server.stdout.take().unwrap()).lines();
        let mut word = || lines.next().unwrap().unwrap().split(' ').next_back().unwrap().to_owned();
        self.url = word();
        self.endpoint = word();
        self.server = Some(server);
    }

    pub fn pid(&self) -> i32 {
        self.server.as_ref().unwrap().id().try_into().unwrap()
    }

    pub fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }

    /// A verb that must work.
    pub fn run(&self, args: &[&str]) -> String {
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

    pub fn fault(&self, args: &[&str]) {
        self.run(&[&["fault", "set"], args].concat());
    }

    pub fn clear_faults(&self) {
        self.run(&["fault", "clear"]);
    }

    pub fn set(&self, attribute: &str, value: &str) {
        self.run(&["key", "set-attributes", "--name", "kek", attribute, value]);
    }

    pub fn grant(&self, permissions: &str) {
        for name in [HOST, APP] {
            self.run(&["grant", "--identity", name, "--key-permissions", permissions]);
        }
    }

    pub fn revoke(&self, permissions: &str) {
        for name in [HOST, APP] {
            self.run(&["revoke", "--identity", name, "--key-permissions", permissions]);
        }
    }

    pub fn role(&self, verb: &str, role: &str) {
        for name in [HOST, APP] {
            self.run(&["role", verb, "--identity", name, "--role", role]);
        }
    }

    /// In the place of one that was deleted, perhaps.
    pub fn create_host(&self) {
        let header = self.file("host.header");
        let _ = std::fs::remove_file(&header);
        self.run(&["identity", "create", HOST, "--header-file", header.to_str().unwrap()]);
    }

    pub fn create_application(&mut self) {
        let app = self.run(&["identity", "create", APP, "--user-assigned", "--json"]);
        let app: Value = serde_json::from_str(&app).unwrap();
        let text = |field: &str| app[field].as_str().unwrap().to_owned();
        (self.tenant, self.client_id) = (text("tenantId"), text("clientId"));
        self.add_secret(&[]);
    }

    /// The application's secret is another one from then on; those before it are taken away.
    pub fn add_secret(&self, options: &[&str]) {
        self.remove_secrets();
        let file = self.file("secret");
        let _ = std::fs::remove_file(&file);
        let args = ["identity", "add-secret", APP, "--secret-file", file.to_str().unwrap()];
        self.run(&[&args[..], options].concat());
    }

    pub fn remove_secrets(&self) {
        let listed = self.run(&["identity", "credentials", APP, "--json"]);
        let listed: Value = serde_json::from_str(&listed).unwrap();
        for credential in listed.as_array().unwrap() {
            let id = credential["id"].to_string();
            self.run(&["identity", "remove-credential", APP, "--id", id.trim_matches('"')]);
        }
    }

    pub fn tenant(&self) -> &str {
        &self.tenant
    }

    /// Calls of the key routes so far, as its own audit log has them.
    pub fn calls(&self) -> usize {
        let log = std::fs::read_to_string(self.path().join("audit.jsonl")).unwrap();
        log.lines().filter(|line| line.contains("\"operationName\":\"Key")).count()
    }

    pub fn settings(&self, who: Who) -> Settings {
        let identity = match who {
            Who::Host => Identity::AppService(AppService {
                endpoint: Some(self.endpoint.clone()),
                header_file: Some(self.file("host.header")),
                client_id: None,
            }),
            Who::Application => {
                let application = Application {
                    tenant: Some(self.tenant.clone()),
                    client_id: Some(self.client_id.clone()),
                    authority: Some(self.url.clone()),
                };
                Identity::ClientSecret(application, self.file("secret"))
            }
        };
        let ca_file = Some(self.path().join("ca.pem"));
        Settings { identity, ca_file, ..Settings::default() }
    }
}

impl Service for Vault {
    fn key(&self) -> String {
        self.key.clone()
    }

    fn access(&self) -> Settings {
        self.settings(self.who)
    }
}

impl Drop for Vault {
    fn drop(&mut self) {
        self.stop();
    }
}

/// In RFC 3339, as the vault's verbs take it.
pub fn in_seconds(seconds: i64) -> String {
    use time::format_description::well_known::Rfc3339;
    let at = time::OffsetDateTime::now_utc() + time::Duration::seconds(seconds);
    at.replace_nanosecond(0).unwrap().format(&Rfc3339).unwrap()
}
