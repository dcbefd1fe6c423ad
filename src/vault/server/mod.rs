//! `vault serve`: the listeners, their limits, the signals. The only async code of byokfs.
//!
//! Each request is read whole (bounded in size and time), answered by [`Vault`] on a blocking
//! thread, and sent back. A panic in one answer is a 500 for that request and nothing else.

mod http;
mod listen;

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum_server::Handle;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use hyper_util::rt::TokioTimer;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use self::listen::{bind, listen, local_address, reachable};
use super::api::{Mode, Vault};
use super::audit::AuditLog;
use super::certificate::CertificateIssuer;
use super::dir::{VaultDir, remove_if_there, write_atomic};
use super::host::Hosts;
use super::identity::{IMDS_PATH, PATH as TOKEN_PATH};
use super::init::{AUTHORITY_KEY, SIGNING_KEY};
use super::seal::Sealer;
use super::settings::{self, Settings};
use super::store::{self, Store, identities};
use super::system_clock;
use super::token::TokenAuthority;
use crate::crypto::secret::SecretBytes;
use crate::error::{Context, Error, Kind, Result};

/// Also how long an idle connection is kept: longer than clients pool theirs.
const HEADER_TIMEOUT: Duration = Duration::from_secs(90);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long running requests may take once a stop is asked for.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const UPKEEP_INTERVAL: Duration = Duration::from_secs(60);
/// Between tries to listen again after a drill.
const REBIND_INTERVAL: Duration = Duration::from_millis(100);
const BLOCKING_THREADS: usize = 64;

#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// None: the port of the last run.
    pub port: Option<u16>,
    pub identity_port: Option<u16>,
    pub token_lifetime: Duration,
    /// Whether faults can be set.
    pub drills: bool,
    /// Requests in ten seconds; None: any number.
    pub rate_limit: Option<u32>,
    /// The identity of the host that gets tokens from the IMDS endpoint; None: there is none.
    pub imds: Option<String>,
}

/// Serves until SIGTERM or SIGINT. SIGHUP renews the certificate and reopens the audit log.
pub fn serve(dir: &VaultDir, options: &ServeOptions) -> Result<()> {
    dir.require_vault()?;
    let _lock = dir.lock()?;
    harden();
    // Left by a killed server; whoever waits for the files must not find those.
    remove_url_files(dir)?;

    let root = dir.read_root_key()?;
    let database = Store::open(&dir.database())?;
    let mut settings = Settings::load(&database)?;
    let sealer = Sealer::new(root, &settings.vault_id);
    let authority_key = unseal(&database, &sealer, AUTHORITY_KEY)?;
    let signing_key = unseal(&database, &sealer, SIGNING_KEY)?;
    let lifetime = i64::try_from(options.token_lifetime.as_secs())
        .map_err(|_| Error::usage("the token lifetime is too long"))?;
    let tokens = TokenAuthority::new(&signing_key, lifetime)?;
    let certificates = CertificateIssuer::new(
        &settings.name,
        &settings.ca_pem,
        authority_key,
        Hosts::new(&settings.name, settings.flavor, settings.host).certificate_names(),
    );
    let tls = certificates.server_config()?;
    let audit = AuditLog::open(&dir.audit_log(), settings.resource_id(None))?;
    if let Some(name) = &options.imds
        && database.read(|tx| Ok::<_, Error>(identities::find(tx, name)?))?.is_none()
    {
        return Err(Error::usage(format!("there is no identity {name} for the IMDS endpoint")));
    }

    let port = options.port.unwrap_or(settings.port);
    let identity_port = options.identity_port.unwrap_or(settings.identity_port);
    let listener = listen(settings.host, port)?;
    let identity_listener = listen(Ipv4Addr::LOCALHOST.into(), identity_port)?;
    let address = local_address(&listener)?;
    let identity_address = local_address(&identity_listener)?;
    (settings.port, settings.identity_port) = (address.port(), identity_address.port());
    database.write(|tx| {
        Ok::<_, Error>(settings::save_ports(tx, settings.port, settings.identity_port)?)
    })?;

    let mode =
        Mode { drills: options.drills, rate_limit: options.rate_limit, imds: options.imds.clone() };
    let host = settings.host;
    let vault = Vault::new(settings, database, sealer, tokens, audit, system_clock(), mode)?;
    let vault = Arc::new(vault);
    vault.purge_due()?;

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("vault")
        .build()
        .context(|| "cannot start the vault's threads".into())?;
    let url = format!("https://{}", reachable(address));
    let identity_url = format!("http://{identity_address}{TOKEN_PATH}");
    let imds_url = options.imds.is_some().then(|| format!("http://{identity_address}{IMDS_PATH}"));
    let announce = || announce(dir, &url, &identity_url, imds_url.as_deref());
    let keys = KeyListener {
        vault: Arc::clone(&vault),
        tls: RustlsConfig::from_config(Arc::new(tls)),
        certificates: Arc::new(certificates),
        address: SocketAddr::new(host, address.port()),
    };
    let served = runtime.block_on(run(vault, keys, listener, identity_listener, announce));
    runtime.shutdown_timeout(STOP_TIMEOUT);
    remove_url_files(dir)?;
    served
}

async fn run(
    vault: Arc<Vault>,
    keys: KeyListener,
    listener: TcpListener,
    identity_listener: TcpListener,
    announce: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let wait_for = |kind: SignalKind, name: &str| -> Result<Signal> {
        signal(kind).context(|| format!("cannot wait for {name}"))
    };
    let mut terminate = wait_for(SignalKind::terminate(), "SIGTERM")?;
    let mut interrupt = wait_for(SignalKind::interrupt(), "SIGINT")?;
    let hangup = wait_for(SignalKind::hangup(), "SIGHUP")?;
    let (stop, stopped) = watch::channel(false);

    let tokens_handle = Handle::new();
    let mut identity_server = axum_server::from_tcp(identity_listener)
        .context(|| "cannot serve".into())?
        .handle(tokens_handle.clone());
    limit(identity_server.http_builder());
    let tokens = Router::new().fallback(http::token_call).with_state(Arc::clone(&vault));
    let mut tokens = tokio::spawn(
        identity_server.serve(tokens.into_make_service_with_connect_info::<SocketAddr>()),
    );
    let upkeep = tokio::spawn(keep_up(
        Arc::clone(&vault),
        keys.tls.clone(),
        Arc::clone(&keys.certificates),
        hangup,
    ));
    let mut keys = tokio::spawn(keys.serve(listener, stopped));
    // The sockets listen since they were bound: whoever reads this can connect.
    announce()?;

    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        ended = &mut keys => Some(ended),
        ended = &mut tokens => Some(ended),
    };
    upkeep.abort();
    stop.send_replace(true);
    tokens_handle.graceful_shutdown(Some(STOP_TIMEOUT));
    match ended {
        None => {
            for server in [keys, tokens] {
                finish(server.await)?;
            }
            Ok(())
        }
        Some(ended) => {
            finish(ended)?;
            Err(Error::new(Kind::Io, "a listener of the vault ended by itself"))
        }
    }
}

/// The TLS listener, which a drill can close or give a foreign certificate.
struct KeyListener {
    vault: Arc<Vault>,
    tls: RustlsConfig,
    certificates: Arc<CertificateIssuer>,
    address: SocketAddr,
}

impl KeyListener {
    async fn serve(
        self,
        listener: TcpListener,
        mut stop: watch::Receiver<bool>,
    ) -> std::io::Result<()> {
        let mut drill = self.vault.drills.listener();
        let mut listener = Some(listener);
        loop {
            let state = *drill.borrow_and_update();
            if state.refuses {
                listener = None;
                tokio::select! {
                    _ = drill.changed() => continue,
                    () = stopped(&mut stop) => return Ok(()),
                }
            }
            let socket = match listener.take() {
                Some(socket) => socket,
                None => match bind(self.address.ip(), self.address.port()) {
                    Ok(socket) => socket,
                    Err(error) => {
                        log::warn!("after a drill: {error}");
                        tokio::select! {
                            () = tokio::time::sleep(REBIND_INTERVAL) => continue,
                            () = stopped(&mut stop) => return Ok(()),
                        }
                    }
                },
            };
            let tls = if state.untrusted {
                let foreign = self.certificates.foreign_config().map_err(std::io::Error::other)?;
                RustlsConfig::from_config(Arc::new(foreign))
            } else {
                self.tls.clone()
            };
            let handle = Handle::new();
            let acceptor = RustlsAcceptor::new(tls).handshake_timeout(HANDSHAKE_TIMEOUT);
            let mut server =
                axum_server::from_tcp(socket)?.acceptor(acceptor).handle(handle.clone());
            limit(server.http_builder());
            let api = Router::new().fallback(http::api_call).with_state(Arc::clone(&self.vault));
            let mut server =
                tokio::spawn(server.serve(api.into_make_service_with_connect_info::<SocketAddr>()));
            tokio::select! {
                ended = &mut server => return ended.unwrap_or_else(|e| Err(std::io::Error::other(e))),
                _ = drill.changed() => {
                    // Open connections end too: they would not notice the change.
                    handle.shutdown();
                    server.await.unwrap_or_else(|error| Err(std::io::Error::other(error)))?;
                }
                () = stopped(&mut stop) => {
                    handle.graceful_shutdown(Some(STOP_TIMEOUT));
                    return server.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
                }
            }
        }
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An end of the sender is an end of the server.
    let _ = stop.wait_for(|stop| *stop).await;
}

fn finish(ended: Result<std::io::Result<()>, tokio::task::JoinError>) -> Result<()> {
    ended
        .map_err(|error| Error::new(Kind::Io, "a listener of the vault failed").with_source(error))?
        .context(|| "a listener of the vault failed".into())
}

fn limit(builder: &mut hyper_util::server::conn::auto::Builder<hyper_util::rt::TokioExecutor>) {
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
}

/// What is due by the clock: purges, rotations, identities to forget, a new certificate. And what SIGHUP asks for.
async fn keep_up(
    vault: Arc<Vault>,
    tls: RustlsConfig,
    certificates: Arc<CertificateIssuer>,
    mut hangup: Signal,
) {
    let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        let asked = tokio::select! {
            _ = interval.tick() => false,
            received = hangup.recv() => {
                if received.is_none() {
                    return;
                }
                true
            }
        };
        let (vault, certificates) = (Arc::clone(&vault), Arc::clone(&certificates));
        match tokio::task::spawn_blocking(move || upkeep(&vault, &certificates, asked)).await {
            Ok(None) => {}
            Ok(Some(config)) => {
                // Connections that are open keep the old one.
                tls.reload_from_config(Arc::new(config));
                log::info!("the server's certificate was renewed");
            }
            Err(error) => log::error!("the vault's upkeep: {error}"),
        }
    }
}

/// The configuration with a new certificate, if it is time for one. Each part is done whether the
/// others fail or not: a key that cannot be rotated must not let the certificate run out.
fn upkeep(
    vault: &Vault,
    certificates: &CertificateIssuer,
    asked: bool,
) -> Option<rustls::ServerConfig> {
    let reopened = if asked { vault.audit.reopen() } else { Ok(()) };
    let due = asked || certificates.is_renewal_due();
    let config = due.then(|| certificates.server_config()).transpose();
    for done in [reopened, vault.forget_due(), vault.purge_due(), vault.rotate_due()] {
        if let Err(error) = done {
            log::error!("the vault's upkeep: {error}");
        }
    }
    config.unwrap_or_else(|error| {
        log::error!("the vault's upkeep: {error}");
        None
    })
}

fn announce(dir: &VaultDir, url: &str, identity_url: &str, imds_url: Option<&str>) -> Result<()> {
    write_atomic(&dir.identity_url_file(), format!("{identity_url}\n").as_bytes(), 0o644)?;
    write_atomic(&dir.url_file(), format!("{url}\n").as_bytes(), 0o644)?;
    let mut out = std::io::stdout().lock();
    // Whoever started the server may have stopped listening to it: not a reason to end.
    let printed = writeln!(out, "listening {url}")
        .and_then(|()| writeln!(out, "identity {identity_url}"))
        .and_then(|()| imds_url.map_or(Ok(()), |url| writeln!(out, "imds {url}")))
        .and_then(|()| out.flush());
    if let Err(error) = printed {
        log::warn!("cannot write to standard output: {error}");
    }
    Ok(())
}

fn remove_url_files(dir: &VaultDir) -> Result<()> {
    remove_if_there(&dir.url_file())?;
    remove_if_there(&dir.identity_url_file())
}

fn unseal(database: &Store, sealer: &Sealer, name: &str) -> Result<SecretBytes> {
    let sealed = database
        .read(|tx| Ok::<_, Error>(store::sealed(tx, name)?))?
        .ok_or_else(|| Error::corrupt(format!("the vault's database lacks the {name}")))?;
    sealer.open(&[name], &sealed)
}

/// Private keys are in this process's memory: no core dumps, no debugger of the same user.
fn harden() {
    use rustix::process::{DumpableBehavior, Resource, Rlimit};
    if let Err(error) = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        log::warn!("cannot forbid core dumps: {error}");
    }
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = rustix::process::setrlimit(Resource::Core, none) {
        log::warn!("cannot limit core dumps: {error}");
    }
}
