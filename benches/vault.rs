//! Unwraps of RSA 2048 by the embedded key vault: how many a second, and how long the slowest of a
//! hundred takes. Clients with connections of their own, over TLS, on this machine: they take
//! their share of its processors. Run with `cargo bench --bench vault`.
//!
//! `BYOKFS_BINARY` names another server; `BENCH_CLIENTS` (16) and `BENCH_SECONDS` (10) what they say.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

struct Server {
    child: Child,
    dir: tempfile::TempDir,
    url: String,
    identity: String,
}

impl Server {
    fn start() -> Result<Server> {
        let binary = std::env::var_os("BYOKFS_BINARY")
            .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_byokfs")), PathBuf::from);
        let dir = tempfile::tempdir()?;
        let vault = dir.path().join("vault");
        let made = Command::new(&binary).args(["vault", "init"]).arg(&vault).output()?;
        if !made.status.success() {
            return Err(String::from_utf8_lossy(&made.stderr).into());
        }
        let mut child = Command::new(&binary)
            .args(["vault", "serve"])
            .arg(&vault)
            .stdout(Stdio::piped())
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        let mut word = || -> Result<String> {
            let line = lines.next().ok_or("the server ended early")??;
            Ok(line.rsplit(' ').next().unwrap_or_default().to_owned())
        };
        let (url, identity) = (word()?, word()?);
        Ok(Server { child, dir, url, identity })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("vault").join(name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn agent(ca: &Path) -> Result<Agent> {
    let ca = Certificate::from_pem(&std::fs::read(ca)?)?;
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .root_certs(RootCerts::new_with_certs(&[ca]))
        .build();
    Ok(Agent::config_builder().tls_config(tls).proxy(None).build().new_agent())
}

fn post(agent: &Agent, url: &str, token: &str, body: &Value) -> Result<Value> {
    let mut reply = agent
        .post(url)
        .header("authorization", format!("Bearer {token}"))
        .send(body.to_string())?;
    Ok(serde_json::from_str(&reply.body_mut().read_to_string()?)?)
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn main() -> Result<()> {
    let clients = setting("BENCH_CLIENTS", 16);
    let time = Duration::from_secs(setting("BENCH_SECONDS", 10));
    let server = Server::start()?;
    let first = agent(&server.path("ca.pem"))?;
    let header = std::fs::read_to_string(server.path("admin.header"))?;
    let ask = format!("{}?api-version=2019-08-01&resource={}", server.identity, server.url);
    let reply =
        first.get(&ask).header("X-IDENTITY-HEADER", header).call()?.body_mut().read_to_string()?;
    let reply: Value = serde_json::from_str(&reply)?;
    let token = reply["access_token"].as_str().ok_or("no token")?.to_owned();
    let url = |path: &str| format!("{}/keys/kek/{path}?api-version=7.4", server.url);
    post(&first, &url("create"), &token, &json!({ "kty": "RSA", "key_size": 2048 }))?;
    let secret = URL_SAFE_NO_PAD.encode([7; 32]);
    let body = json!({ "alg": "RSA-OAEP-256", "value": secret });
    let wrapped = post(&first, &url("wrapkey"), &token, &body)?;
    let unwrap = json!({ "alg": "RSA-OAEP-256", "value": wrapped["value"] });
    let url = url("unwrapkey");

    let stop = AtomicBool::new(false);
    let (mut times, elapsed) = std::thread::scope(|scope| -> Result<_> {
        let threads: Vec<_> = (0..clients)
            .map(|_| {
                scope.spawn(|| -> Result<Vec<Duration>> {
                    let agent = agent(&server.path("ca.pem"))?;
                    let mut times = Vec::new();
                    while !stop.load(Ordering::Relaxed) {
                        let start = Instant::now();
                        let opened = post(&agent, &url, &token, &unwrap)?;
                        times.push(start.elapsed());
                        if opened["value"] != secret.as_str() {
                            return Err("another value was unwrapped".into());
                        }
                    }
                    Ok(times)
                })
            })
            .collect();
        let start = Instant::now();
        std::thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
        let elapsed = start.elapsed();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().map_err(|_| "a client panicked")??);
        }
        Ok((all, elapsed))
    })?;
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1000.0;
    println!(
        "{:.0} unwraps/s, {clients} clients; p50 {:.2} ms, p99 {:.2} ms, longest {:.2} ms",
        times.len() as f64 / elapsed.as_secs_f64(),
        at(50),
        at(99),
        at(100),
    );
    Ok(())
}
