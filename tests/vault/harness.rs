//! A vault in a temporary directory, its server, and a client that sends whatever a test wants.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::{HeaderMap, Request};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

use crate::ports;

pub(crate) const API: &str = "api-version=7.4";

pub(crate) fn byokfs() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_byokfs"));
    command.env_remove("BYOKFS_VAULT");
    command
}

/// A vault's directory; removed at the end.
pub(crate) struct Vault {
    _parent: tempfile::TempDir,
    pub(crate) dir: PathBuf,
}

impl Vault {
    pub(crate) fn new(options: &[&str]) -> Vault {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("vault");
        let mut init = byokfs();
        init.args(["vault", "init"]).arg(&dir).args(ports::options()).args(options);
        let output = init.output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        Vault { _parent: parent, dir }
    }

    /// One that is there already.
    pub(crate) fn at(parent: tempfile::TempDir, dir: PathBuf) -> Vault {
        Vault { _parent: parent, dir }
    }

    pub(crate) fn serve(&self) -> Server {
        self.serve_with(&[])
    }

    pub(crate) fn serve_with(&self, options: &[&str]) -> Server {
        let mut child = byokfs()
            .args(["vault", "serve"])
            .arg(&self.dir)
            .args(options)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut word = |name: &str| {
            let line = lines.next().expect("the server ended early").unwrap();
            line.strip_prefix(name).unwrap().trim().to_owned()
        };
        let url = word("listening");
        let identity_url = word("identity");
        Server {
            agent: agent(&self.dir.join("ca.pem")),
            child,
            url,
            identity_url,
            dir: self.dir.clone(),
        }
    }

    pub(crate) fn cli(&self, args: &[&str]) -> Output {
        byokfs().arg("vault").args(args).env("BYOKFS_VAULT", &self.dir).output().unwrap()
    }

    /// Runs a verb that must work; its JSON.
    pub(crate) fn cli_json(&self, args: &[&str]) -> Value {
        let output = self.cli(&[args, &["--json"]].concat());
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

pub(crate) fn agent(ca: &Path) -> Agent {
    let ca = Certificate::from_pem(&std::fs::read(ca).unwrap()).unwrap();
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .root_certs(RootCerts::new_with_certs(&[ca]))
        .build();
    Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(60)))
        .proxy(None)
        .build()
        .new_agent()
}

/// A running server; killed at the end.
pub(crate) struct Server {
    agent: Agent,
    child: Child,
    dir: PathBuf,
    pub(crate) url: String,
    pub(crate) identity_url: String,
}

/// Status, headers and JSON body (null if there is none).
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
}

impl Answer {
    /// `code/innererror.code`, or the code alone.
    pub(crate) fn code(&self) -> String {
        let code = self.body["error"]["code"].as_str().unwrap_or("-");
        match self.body["error"]["innererror"]["code"].as_str() {
            Some(inner) => format!("{code}/{inner}"),
            None => code.to_owned(),
        }
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn ok(self) -> Value {
        assert!((200..300).contains(&self.status), "{} {}", self.status, self.body);
        self.body
    }
}

impl Server {
    pub(crate) fn send(
        &self,
        method: &str,
        url: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Answer, ureq::Error> {
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = self.agent.run(request.body(body).unwrap())?;
        let text = response.body_mut().read_to_string()?;
        Ok(Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            body: serde_json::from_str(&text).unwrap_or(Value::Null),
        })
    }

    /// A call with a token; `path` without the origin.
    pub(crate) fn try_call(
        &self,
        token: &str,
        method: &str,
        path: &str,
        body: &Value,
    ) -> Result<Answer, ureq::Error> {
        let separator = if path.contains('?') { '&' } else { '?' };
        let url = format!("{}{path}{separator}{API}", self.url);
        let authorization = format!("Bearer {token}");
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.send(method, &url, &[("authorization", &authorization)], body.as_bytes())
    }

    pub(crate) fn call(&self, token: &str, method: &str, path: &str, body: Value) -> Answer {
        self.try_call(token, method, path, &body).unwrap()
    }

    pub(crate) fn ask_token(&self, header: &str, resource: &str) -> Answer {
        let url = format!("{}?api-version=2019-08-01&resource={resource}", self.identity_url);
        self.send("GET", &url, &[("X-IDENTITY-HEADER", header)], b"").unwrap()
    }

    pub(crate) fn token_of(&self, header_file: &Path) -> String {
        let header = std::fs::read_to_string(header_file).unwrap();
        let reply = self.ask_token(&header, &self.url).ok();
        reply["access_token"].as_str().unwrap().to_owned()
    }

    pub(crate) fn admin(&self) -> String {
        self.token_of(&self.dir.join("admin.header"))
    }

    pub(crate) fn create_key(&self, token: &str, name: &str) -> Value {
        let path = format!("/keys/{name}/create");
        self.call(token, "POST", &path, json!({ "kty": "RSA", "key_size": 2048 })).ok()
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().try_into().unwrap()
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; the exit code.
    pub(crate) fn stop(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_raw(self.pid()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Creates an identity with these permissions; its token.
pub(crate) fn identity(vault: &Vault, server: &Server, name: &str, permissions: &str) -> String {
    let made = vault.cli_json(&["identity", "create", name]);
    if !permissions.is_empty() {
        grant(vault, name, permissions);
    }
    server.token_of(Path::new(made["headerFile"].as_str().unwrap()))
}

pub(crate) fn grant(vault: &Vault, name: &str, permissions: &str) {
    vault.cli_json(&["grant", "--identity", name, "--key-permissions", permissions]);
}

pub(crate) fn revoke(vault: &Vault, name: &str, permissions: &str) {
    vault.cli_json(&["revoke", "--identity", name, "--key-permissions", permissions]);
}

pub(crate) fn b64(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn now() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}

/// Sets a fault; its number.
pub(crate) fn fault(vault: &Vault, args: &[&str]) -> String {
    vault.cli_json(&[&["fault", "set"], args].concat())["id"].to_string()
}

pub(crate) fn clear_faults(vault: &Vault) {
    vault.cli_json(&["fault", "clear"]);
}
