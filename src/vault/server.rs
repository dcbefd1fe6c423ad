//! `vault serve`: the listeners, their limits, the signals. The only async code of byokfs.
//!
//! Each request is read whole (bounded in size and time), answered by [`Vault`] on a blocking
//! thread, and sent back. A panic in one answer is a 500 for that request and nothing else.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request as HttpRequest, StatusCode, header};
use axum::response::Response;
use axum_server::Handle;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use hyper_util::rt::TokioTimer;
use tokio::signal::unix::{SignalKind, signal};

use super::api::{Authorization, Reply, Request, Vault};
use super::audit::AuditLog;
use super::dir::{VaultDir, remove_if_there, write_atomic};
use super::host::Hosts;
use super::identity::{HeaderSecret, PATH as TOKEN_PATH, TokenRequest};
use super::init::{AUTHORITY_KEY, SIGNING_KEY};
use super::refusal::Refusal;
use super::seal::Sealer;
use super::settings::{self, Settings};
use super::store::{self, Store};
use super::token::TokenAuthority;
use super::{certificate, system_clock};
use crate::crypto::secret::SecretBytes;
use crate::error::{Context, Error, Kind, Result};

/// No request of the protocol comes near it.
const MAX_BODY: usize = 4 * 1024 * 1024;
/// Also how long an idle connection is kept: longer than clients pool theirs.
const HEADER_TIMEOUT: Duration = Duration::from_secs(90);
const BODY_TIMEOUT: Duration = Duration::from_secs(20);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long running requests may take once a stop is asked for.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const UPKEEP_INTERVAL: Duration = Duration::from_secs(60);
const BLOCKING_THREADS: usize = 64;

#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// None: the port of the last run.
    pub port: Option<u16>,
    pub identity_port: Option<u16>,
    pub token_lifetime: Duration,
}

/// Serves until SIGTERM or SIGINT.
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
    let tokens = TokenAuthority::new(&signing_key, &settings.tenant, lifetime)?;
    let tls = certificate::server_config(
        &settings.name,
        &settings.ca_pem,
        &authority_key,
        Hosts::new(&settings.name, settings.host).certificate_names(),
    )?;
    let audit = AuditLog::open(&dir.audit_log())?;

    let port = options.port.unwrap_or(settings.port);
    let identity_port = options.identity_port.unwrap_or(settings.identity_port);
    let listener = bind(settings.host, port)?;
    let identity_listener = bind(Ipv4Addr::LOCALHOST.into(), identity_port)?;
    let address = local_address(&listener)?;
    let identity_address = local_address(&identity_listener)?;
    (settings.port, settings.identity_port) = (address.port(), identity_address.port());
    database.write(|tx| {
        Ok::<_, Error>(settings::save_ports(tx, settings.port, settings.identity_port)?)
    })?;

    let vault = Arc::new(Vault::new(settings, database, sealer, tokens, audit, system_clock()));
    vault.purge_due()?;

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("vault")
        .build()
        .context(|| "cannot start the vault's threads".into())?;
    let url = format!("https://{}", reachable(address));
    let identity_url = format!("http://{identity_address}{TOKEN_PATH}");
    let announce = || announce(dir, &url, &identity_url);
    let served = runtime.block_on(run(vault, tls, listener, identity_listener, announce));
    runtime.shutdown_timeout(STOP_TIMEOUT);
    remove_url_files(dir)?;
    served
}

async fn run(
    vault: Arc<Vault>,
    tls: rustls::ServerConfig,
    listener: TcpListener,
    identity_listener: TcpListener,
    announce: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let mut terminate =
        signal(SignalKind::terminate()).context(|| "cannot wait for SIGTERM".into())?;
    let mut interrupt =
        signal(SignalKind::interrupt()).context(|| "cannot wait for SIGINT".into())?;
    let (handle, identity_handle) = (Handle::new(), Handle::new());

    let acceptor = RustlsAcceptor::new(RustlsConfig::from_config(Arc::new(tls)))
        .handshake_timeout(HANDSHAKE_TIMEOUT);
    let mut server = axum_server::from_tcp(listener)
        .context(|| "cannot serve".into())?
        .acceptor(acceptor)
        .handle(handle.clone());
    limit(server.http_builder());
    let mut identity_server = axum_server::from_tcp(identity_listener)
        .context(|| "cannot serve".into())?
        .handle(identity_handle.clone());
    limit(identity_server.http_builder());

    let api = Router::new().fallback(api_call).with_state(Arc::clone(&vault));
    let tokens = Router::new().fallback(token_call).with_state(Arc::clone(&vault));
    let mut api =
        tokio::spawn(server.serve(api.into_make_service_with_connect_info::<SocketAddr>()));
    let mut tokens = tokio::spawn(
        identity_server.serve(tokens.into_make_service_with_connect_info::<SocketAddr>()),
    );
    let upkeep = tokio::spawn(keep_up(vault));
    // The sockets listen since they were bound: whoever reads this can connect.
    announce()?;

    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        ended = &mut api => Some(ended),
        ended = &mut tokens => Some(ended),
    };
    upkeep.abort();
    handle.graceful_shutdown(Some(STOP_TIMEOUT));
    identity_handle.graceful_shutdown(Some(STOP_TIMEOUT));
    match ended {
        None => {
            for server in [api, tokens] {
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

fn finish(ended: Result<std::io::Result<()>, tokio::task::JoinError>) -> Result<()> {
    ended
        .map_err(|error| Error::new(Kind::Io, "a listener of the vault failed").with_source(error))?
        .context(|| "a listener of the vault failed".into())
}

fn limit(builder: &mut hyper_util::server::conn::auto::Builder<hyper_util::rt::TokioExecutor>) {
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
}

/// What is due by the clock: purges and rotations.
async fn keep_up(vault: Arc<Vault>) {
    let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        interval.tick().await;
        let vault = Arc::clone(&vault);
        let done = tokio::task::spawn_blocking(move || {
            vault.purge_due().and_then(|()| vault.rotate_due())
        });
        match done.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::error!("the vault's upkeep: {error}"),
            Err(error) => log::error!("the vault's upkeep: {error}"),
        }
    }
}

async fn api_call(
    State(vault): State<Arc<Vault>>,
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    request: HttpRequest<Body>,
) -> Response {
    let (parts, body) = request.into_parts();
    let body = match read_body(body).await {
        Ok(body) => body,
        Err(refusal) => {
            // The rest of the body is not read: nothing can follow it on this connection.
            let mut response = refused(&refusal);
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            return response;
        }
    };
    // An absolute request target names the host; else the header does.
    let host = parts
        .uri
        .authority()
        .map(|authority| authority.as_str().to_owned())
        .or_else(|| text(&parts.headers, &header::HOST))
        .unwrap_or_default();
    let request = Request {
        method: parts.method.as_str().to_owned(),
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        host,
        authorization: text(&parts.headers, &header::AUTHORIZATION).map(Authorization),
        client_request_id: text(&parts.headers, &HeaderName::from_static("x-ms-client-request-id"))
            .filter(|id| id.len() <= 128),
        client: Some(client.ip()),
        body,
    };
    answer(move || vault.handle(&request)).await
}

async fn token_call(
    State(vault): State<Arc<Vault>>,
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    request: HttpRequest<Body>,
) -> Response {
    let request = TokenRequest {
        method: request.method().as_str().to_owned(),
        path: request.uri().path().to_owned(),
        query: request.uri().query().unwrap_or_default().to_owned(),
        header: text(request.headers(), &HeaderName::from_static("x-identity-header"))
            .map(HeaderSecret),
        client: client.ip(),
    };
    answer(move || vault.token(&request)).await
}

async fn answer(work: impl FnOnce() -> Reply + Send + 'static) -> Response {
    match tokio::task::spawn_blocking(work).await {
        Ok(reply) => response(reply),
        Err(error) => {
            log::error!("a request failed: {error}");
            refused(&Refusal::internal())
        }
    }
}

async fn read_body(body: Body) -> Result<Vec<u8>, Refusal> {
    match tokio::time::timeout(BODY_TIMEOUT, axum::body::to_bytes(body, MAX_BODY)).await {
        Ok(Ok(bytes)) => Ok(bytes.into()),
        Ok(Err(_)) => Err(Refusal::new(
            413,
            "RequestEntityTooLarge",
            "The request body was cut off or is too large.",
        )),
        Err(_) => Err(Refusal::new(408, "RequestTimeout", "The request body came too slowly.")),
    }
}

fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn refused(refusal: &Refusal) -> Response {
    response(Reply {
        status: refusal.status,
        headers: vec![("content-type", "application/json; charset=utf-8".into())],
        body: Some(refusal.body().to_string().into_bytes()),
    })
}

fn response(reply: Reply) -> Response {
    let mut response = Response::new(reply.body.map_or_else(Body::empty, Body::from));
    *response.status_mut() =
        StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in reply.headers {
        match HeaderValue::from_str(&value) {
            Ok(value) => {
                response.headers_mut().insert(HeaderName::from_static(name), value);
            }
            Err(_) => log::error!("the header {name} has no valid value"),
        }
    }
    response
}

fn bind(host: IpAddr, port: u16) -> Result<TcpListener> {
    let listener = TcpListener::bind((host, port)).map_err(|error| {
        if error.kind() == std::io::ErrorKind::AddrInUse {
            Error::new(
                Kind::Busy,
                format!(
                    "port {port} of {host} is in use by another program; key ids name the port, \
                     so stop that program, or pass --port (or --identity-port) and use the new \
                     URLs"
                ),
            )
        } else {
            Error::io(format!("cannot listen on {host} port {port}"), error)
        }
    })?;
    listener.set_nonblocking(true).context(|| format!("cannot listen on {host} port {port}"))?;
    Ok(listener)
}

fn local_address(listener: &TcpListener) -> Result<SocketAddr> {
    listener.local_addr().context(|| "cannot learn the port".into())
}

/// An address to connect to: a wildcard stands for loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => {
            SocketAddr::new(Ipv4Addr::LOCALHOST.into(), address.port())
        }
        IpAddr::V6(ip) if ip.is_unspecified() => {
            SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), address.port())
        }
        _ => address,
    }
}

fn announce(dir: &VaultDir, url: &str, identity_url: &str) -> Result<()> {
    write_atomic(&dir.identity_url_file(), format!("{identity_url}\n").as_bytes(), 0o644)?;
    write_atomic(&dir.url_file(), format!("{url}\n").as_bytes(), 0o644)?;
    let mut out = std::io::stdout().lock();
    // Whoever started the server may have stopped listening to it: not a reason to end.
    let printed = writeln!(out, "listening {url}")
        .and_then(|()| writeln!(out, "identity {identity_url}"))
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
