//! A key vault over TLS and its directory's token service, with a fault that can be changed at any
//! time. It wraps by flipping bits: what matters here is what it answers, not how it encrypts.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

pub const VERSION: &str = "0123456789abcdef0123456789abcdef";

/// Which calls go wrong, and how.
#[derive(Clone, Debug, Default)]
pub enum Fault {
    #[default]
    None,
    /// Every call with a token is answered with this status and body.
    Vault(u16, String),
    /// The same, for calls whose path ends so.
    Calls(&'static str, u16, String),
    /// The token service answers so.
    Directory(u16, String),
    /// With this header.
    Header(u16, &'static str, String),
    /// The key is gone; `deletedkeys` has it or not.
    Deleted {
        recoverable: bool,
    },
    /// Attributes of the key, merged over the good ones.
    Attributes(Value),
    /// One byte at a time, for longer than anybody waits.
    Trickle,
    /// Says it is longer than it is, and hangs up.
    Truncated,
    Silence,
    HangUp,
    /// Each answer takes this long.
    Slow(Duration),
    /// Unwraps to other bytes.
    OtherMaterial,
    /// A certificate that nobody trusts.
    Untrusted,
}

pub fn refusal(code: &str, inner: &str, message: &str) -> String {
    let error = json!({"code": code, "message": message, "innererror": {"code": inner}});
    json!({ "error": error }).to_string()
}

pub struct Fake {
    pub address: SocketAddr,
    pub directory: SocketAddr,
    /// PEM of the certificate to be trusted.
    pub ca: String,
    state: Arc<State>,
}

struct State {
    fault: Mutex<Fault>,
    trusted: Arc<ServerConfig>,
    untrusted: Arc<ServerConfig>,
    requests: AtomicUsize,
    /// Those of them that were to the vault.
    vault_requests: AtomicUsize,
    /// Conversations under way, and the most there have been at once.
    open: AtomicUsize,
    most: AtomicUsize,
}

struct Request {
    path: String,
    authorised: bool,
    body: String,
}

fn certificate() -> (String, Arc<ServerConfig>) {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    (made.cert.pem(), Arc::new(config))
}

impl Fake {
    pub fn start() -> Fake {
        let (ca, trusted) = certificate();
        let (_, untrusted) = certificate();
        let state = Arc::new(State {
            fault: Mutex::default(),
            trusted,
            untrusted,
            requests: AtomicUsize::new(0),
            vault_requests: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
        });
        let vault = TcpListener::bind("127.0.0.1:0").unwrap();
        let directory = TcpListener::bind("127.0.0.1:0").unwrap();
        let fake = Fake {
            address: vault.local_addr().unwrap(),
            directory: directory.local_addr().unwrap(),
            ca,
            state: Arc::clone(&state),
        };
        let (address, of_directory) = (fake.address, Arc::clone(&state));
        accept(vault, move |stream| state.vault(stream, address));
        accept(directory, move |stream| of_directory.token(stream));
        fake
    }

    pub fn fault(&self, fault: Fault) {
        *self.state.fault.lock() = fault;
    }

    pub fn key(&self) -> String {
        format!("https://{}/keys/kek/{VERSION}", self.address)
    }

    /// Requests so far, to vault and directory.
    pub fn requests(&self) -> usize {
        self.state.requests.load(Ordering::SeqCst)
    }

    /// Requests so far, to the vault alone.
    pub fn vault_requests(&self) -> usize {
        self.state.vault_requests.load(Ordering::SeqCst)
    }

    /// The most conversations that were ever under way at once.
    pub fn most_at_once(&self) -> usize {
        self.state.most.load(Ordering::SeqCst)
    }
}

fn accept(listener: TcpListener, serve: impl Fn(TcpStream) + Send + Sync + 'static) {
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = Arc::clone(&serve);
            thread::spawn(move || serve(stream));
        }
    });
}

fn answer(stream: &mut impl Write, status: u16, header: &str, body: &str) {
    let now = time::OffsetDateTime::now_utc();
    let form = time::macros::format_description!(
        "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
    );
    let text = format!(
        "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\
         Content-Type: application/json\r\nDate: {}\r\n{header}\r\n{body}",
        body.len(),
        now.format(&form).unwrap()
    );
    // The client may have given up: that is what some rows are about.
    let _ = stream.write_all(text.as_bytes()).and_then(|()| stream.flush());
}

fn read(stream: &mut impl Read) -> Option<Request> {
    let (mut bytes, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let count = stream.read(&mut chunk).ok().filter(|&count| count > 0)?;
        bytes.extend_from_slice(&chunk[..count]);
        let text = String::from_utf8_lossy(&bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let header = |name: &str| {
            head.lines().skip(1).find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
            })
        };
        if body.len() < header("content-length").map_or(0, |length| length.parse().unwrap()) {
            continue;
        }
        let path = head.split(' ').nth(1)?.split('?').next()?.to_owned();
        let authorised = header("authorization").is_some();
        return Some(Request { path, authorised, body: body.to_owned() });
    }
}

/// Counts as under way until its answer begins: after that the client may start the next one.
struct Conversation<'a> {
    open: &'a AtomicUsize,
    ended: bool,
}

impl Conversation<'_> {
    fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            self.open.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Drop for Conversation<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

struct Answered<'a, 'b, S> {
    stream: S,
    conversation: &'a mut Conversation<'b>,
}

impl<S: Read> Read for Answered<'_, '_, S> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.stream.read(buf)
    }
}

impl<S: Write> Write for Answered<'_, '_, S> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.conversation.end();
        self.stream.write(buf)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

impl State {
    fn vault(&self, stream: TcpStream, address: SocketAddr) {
        let fault = self.fault.lock().clone();
        let open = self.open.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(open, Ordering::SeqCst);
        let tls = match fault {
            Fault::Untrusted => Arc::clone(&self.untrusted),
            _ => Arc::clone(&self.trusted),
        };
        let mut conversation = Conversation { open: &self.open, ended: false };
        if let Ok(connection) = ServerConnection::new(tls) {
            let stream = StreamOwned::new(connection, stream);
            let mut stream = Answered { stream, conversation: &mut conversation };
            // Several requests may come over one connection.
            if let Some(request) = read(&mut stream) {
                self.requests.fetch_add(1, Ordering::SeqCst);
                self.vault_requests.fetch_add(1, Ordering::SeqCst);
                self.serve(&mut stream, &request, &fault, address);
            }
        }
    }

    fn serve(
        &self,
        stream: &mut (impl Read + Write),
        request: &Request,
        fault: &Fault,
        address: SocketAddr,
    ) {
        if !request.authorised {
            let challenge = "WWW-Authenticate: Bearer authorization=\"https://login.example/t\", \
                             resource=\"https://vault.azure.net\"\r\n";
            let body = refusal("Unauthorized", "", "AKV10000: no token");
            return answer(stream, 401, challenge, &body);
        }
        match fault {
            Fault::Vault(status, body) => return answer(stream, *status, "", body),
            Fault::Calls(end, status, body) if request.path.ends_with(end) => {
                return answer(stream, *status, "", body);
            }
            Fault::Header(status, header, body) => {
                return answer(stream, *status, &format!("{header}\r\n"), body);
            }
            Fault::Deleted { recoverable } => {
                let deleted = request.path.contains("/deletedkeys/") && *recoverable;
                let body = refusal("KeyNotFound", "", "A key with (name/id) kek was not found");
                let (status, body) = if deleted { (200, "{}".into()) } else { (404, body) };
                return answer(stream, status, "", &body);
            }
            Fault::Trickle => {
                for _ in 0..3000 {
                    if stream.write_all(b"H").and_then(|()| stream.flush()).is_err() {
                        return;
                    }
                    thread::sleep(Duration::from_millis(20));
                }
                return;
            }
            Fault::Truncated => {
                let text = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{\"key\":";
                let _ = stream.write_all(text).and_then(|()| stream.flush());
                return;
            }
            Fault::Silence => return thread::sleep(Duration::from_secs(60)),
            Fault::HangUp => return,
            Fault::Slow(time) => thread::sleep(*time),
            _ => {}
        }
        let kid = format!("https://{address}/keys/kek/{VERSION}");
        let flip = |text: &str, with: u8| {
            let bytes = URL_SAFE_NO_PAD.decode(text).unwrap();
            URL_SAFE_NO_PAD.encode(bytes.iter().map(|byte| byte ^ with).collect::<Vec<_>>())
        };
        let value = |with: u8| {
            let body: Value = serde_json::from_str(&request.body).unwrap();
            json!({"kid": kid, "value": flip(body["value"].as_str().unwrap(), with)})
        };
        let attributes = |more: &Fault| {
            let mut attributes = json!({
                "enabled": true, "created": 1, "updated": 1,
                "recoveryLevel": "Recoverable", "recoverableDays": 90,
            });
            if let Fault::Attributes(more) = more {
                let more = more.as_object().unwrap().clone();
                attributes.as_object_mut().unwrap().extend(more);
            }
            attributes
        };
        let body = match request.path.rsplit('/').next() {
            Some("wrapkey") => value(0x5a),
            Some("unwrapkey") if matches!(fault, Fault::OtherMaterial) => value(0x33),
            Some("unwrapkey") => value(0x5a),
            Some("versions") => json!({"value": [{"kid": kid, "attributes": attributes(fault)}]}),
            _ => json!({
                "key": {
                    "kid": kid, "kty": "RSA", "key_ops": ["wrapKey", "unwrapKey"],
                    "n": URL_SAFE_NO_PAD.encode([0xc0; 384]), "e": "AQAB",
                },
                "attributes": attributes(fault),
            }),
        };
        answer(stream, 200, "x-ms-keyvault-region: local\r\n", &body.to_string());
    }

    fn token(&self, mut stream: TcpStream) {
        let fault = self.fault.lock().clone();
        if read(&mut stream).is_none() {
            return;
        }
        self.requests.fetch_add(1, Ordering::SeqCst);
        if let Fault::Directory(status, body) = fault {
            return answer(&mut stream, status, "", &body);
        }
        // So short that each probe asks for another.
        let body = json!({"token_type": "Bearer", "expires_in": 60, "access_token": "to-ken"});
        answer(&mut stream, 200, "", &body.to_string());
    }
}

pub fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(since.as_secs()).unwrap()
}
