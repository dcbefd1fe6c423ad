//! The provider against a scripted server: every row of the table of conditions as it comes over
//! the wire, and every way a connection can go wrong.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{CipherSuite, ServerConfig, ServerConnection, StreamOwned};

use super::super::azure_assertion::tests::{MADE, verified};
use super::super::{AppService, Application, Identity, Imds};
use super::*;
use crate::sync::Mutex;

/// How much later than its deadline a call may end on a busy machine: without one it would never.
const LATE: Duration = Duration::from_secs(30);
const VERSION: &str = "0123456789abcdef0123456789abcdef";

/// What a client sent.
#[derive(Clone, Debug)]
struct Seen {
    method: String,
    path: String,
    bearer: Option<String>,
    identity_header: Option<String>,
    metadata: Option<String>,
    content_type: Option<String>,
    body: String,
}

#[derive(Clone)]
enum Answer {
    Json(u16, String),
    With(u16, &'static str, String),
    /// One byte of a good answer at a time.
    Trickle,
    /// Says it is longer than it is, and hangs up.
    Truncated,
    Endless,
    /// This head, and then that part again and again.
    Forever(&'static str, &'static str),
    Silence,
    HangUp,
}

type Script = Box<dyn Fn(&Seen) -> Answer + Send>;

struct Server {
    address: SocketAddr,
    script: Arc<Mutex<Script>>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    fn start(tls: Option<Arc<ServerConfig>>, script: Script) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (script, seen) = (Arc::new(Mutex::new(script)), Arc::new(Mutex::new(Vec::new())));
        let server = Server { address, script: Arc::clone(&script), seen: Arc::clone(&seen) };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (tls, script, seen) = (tls.clone(), Arc::clone(&script), Arc::clone(&seen));
                thread::spawn(move || {
                    let Some(config) = tls else { return serve(stream, &script, &seen) };
                    if let Ok(connection) = ServerConnection::new(config) {
                        serve(StreamOwned::new(connection, stream), &script, &seen);
                    }
                });
            }
        });
        server
    }

    fn answer(&self, script: impl Fn(&Seen) -> Answer + Send + 'static) {
        *self.script.lock() = Box::new(script);
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().clone()
    }
}

fn serve(mut stream: impl Read + Write, script: &Mutex<Script>, seen: &Mutex<Vec<Seen>>) {
    let Some(request) = read_request(&mut stream) else { return };
    let answer = script.lock()(&request);
    seen.lock().push(request);
    let whole = |status: u16, header: &str, body: &str| {
        let length = body.len();
        format!(
            "HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n\
                 Content-Type: application/json\r\nDate: Sun, 22 Nov 2026 10:00:00 GMT\r\n\
                 x-ms-keyvault-region: westeurope\r\n{header}\r\n{body}"
        )
    };
    let text = match answer {
        Answer::Json(status, body) => whole(status, "", &body),
        Answer::With(status, header, body) => whole(status, &format!("{header}\r\n"), &body),
        Answer::Trickle => {
            for byte in whole(200, "", &bundle()).into_bytes() {
                if stream.write_all(&[byte]).and_then(|()| stream.flush()).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(40));
            }
            return;
        }
        Answer::Truncated => "HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{\"key\":".to_owned(),
        Answer::Forever(head, part) => {
            let part = part.repeat(4096 / part.len());
            let mut next = head.as_bytes();
            while stream.write_all(next).and_then(|()| stream.flush()).is_ok() {
                next = part.as_bytes();
            }
            return;
        }
        Answer::Endless => whole(200, "", &" ".repeat(600 * 1024)),
        Answer::Silence => {
            // Until the client goes.
            let mut rest = [0; 256];
            while stream.read(&mut rest).is_ok_and(|count| count > 0) {}
            return;
        }
        Answer::HangUp => return,
    };
    // The client may have gone already: that is what some tests are about.
    let _ = stream.write_all(text.as_bytes()).and_then(|()| stream.flush());
}

fn read_request(stream: &mut impl Read) -> Option<Seen> {
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
        let length = header("content-length").map_or(0, |length| length.parse().unwrap());
        if body.len() < length {
            continue;
        }
        let mut first = head.split(' ');
        return Some(Seen {
            method: first.next()?.to_owned(),
            path: first.next()?.to_owned(),
            bearer: header("authorization"),
            identity_header: header("x-identity-header"),
            metadata: header("metadata"),
            content_type: header("content-type"),
            body: body.to_owned(),
        });
    }
}

fn kid() -> String {
    format!("https://vault.example/keys/kek/{VERSION}")
}

fn bundle() -> String {
    let n = URL_SAFE_NO_PAD.encode([0xc0; 384]);
    format!(
        r#"{{"key":{{"kid":"{}","kty":"RSA","key_ops":["wrapKey","unwrapKey"],"n":"{n}","e":"AQAB"}},
        "attributes":{{"enabled":true,"created":1,"updated":2,"exp":4000000000,
        "recoveryLevel":"Recoverable","recoverableDays":90}},"tags":{{}}}}"#,
        kid()
    )
}

fn refusal(code: &str, inner: &str) -> String {
    format!(r#"{{"error":{{"code":"{code}","message":"no","innererror":{{"code":"{inner}"}}}}}}"#)
}

fn challenge() -> Answer {
    Answer::With(
        401,
        "WWW-Authenticate: Bearer authorization=\"https://login.example/tenant-1\", \
         resource=\"https://vault.azure.net\"",
        r#"{"error":{"code":"Unauthorized","message":"AKV10000: no token"}}"#.into(),
    )
}

/// A vault that asks for a token and then answers as it is told.
fn authorised(answer: impl Fn(&Seen) -> Answer + Send + 'static) -> Script {
    Box::new(move |seen| if seen.bearer.is_some() { answer(seen) } else { challenge() })
}

fn token() -> Answer {
    let expires = crate::key::wall_clock() + 3600;
    Answer::Json(
        200,
        format!(
            r#"{{"access_token":"tok-en","expires_on":"{expires}","resource":"r","token_type":"Bearer"}}"#
        ),
    )
}

struct Rig {
    vault: Server,
    identity: Server,
    azure: Azure,
    dir: tempfile::TempDir,
}

fn certificate(name: &str) -> (String, Arc<ServerConfig>) {
    with_suites(name, |_| true)
}

fn with_suites(name: &str, keep: fn(CipherSuite) -> bool) -> (String, Arc<ServerConfig>) {
    let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.retain(|suite| keep(suite.suite()));
    let config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    (made.cert.pem(), Arc::new(config))
}

fn rig(script: Script) -> Rig {
    let (pem, tls) = certificate("127.0.0.1");
    rig_with(&pem, Some(tls), script)
}

fn rig_with(trusted: &str, tls: Option<Arc<ServerConfig>>, script: Script) -> Rig {
    rig_as(trusted, tls, script, |identity, dir| {
        Identity::AppService(AppService {
            endpoint: Some(format!("http://{}/msi/token", identity.address)),
            header_file: Some(private_file(dir, "header", "s3cret\n")),
            client_id: Some("id-7".into()),
        })
    })
}

fn private_file(dir: &Path, name: &str, content: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    path
}

/// As another identity, whose files lie in the directory.
fn rig_as(
    trusted: &str,
    tls: Option<Arc<ServerConfig>>,
    script: Script,
    who: impl Fn(&Server, &Path) -> Identity,
) -> Rig {
    let vault = Server::start(tls, script);
    let identity = Server::start(None, Box::new(|_| token()));
    let dir = tempfile::tempdir().unwrap();
    let ca_file = dir.path().join("ca.pem");
    std::fs::write(&ca_file, trusted).unwrap();
    let settings = Settings {
        identity: who(&identity, dir.path()),
        ca_file: Some(ca_file),
        // It says that it is the real one, at an address.
        verify_challenge_resource: ChallengeCheck::Off,
        ..Settings::default()
    };
    let azure = Azure::new(&format!("https://{}/keys/kek", vault.address), &settings).unwrap();
    Rig { vault, identity, azure, dir }
}

impl Rig {
    fn kid(&self) -> String {
        format!("https://{}/keys/kek/{VERSION}", self.vault.address)
    }

    fn with_session<T>(
        &self,
        limit: Duration,
        work: impl FnOnce(&mut dyn Session, &str) -> ProviderResult<T>,
    ) -> ProviderResult<T> {
        let mut session = self.azure.session(BootTime::now() + limit)?;
        work(&mut *session, &self.kid())
    }

    fn get(&self) -> ProviderResult<KeyInfo> {
        self.with_session(Duration::from_secs(10), |session, kid| session.get_key(kid))
    }

    fn unwrap(&self) -> ProviderResult<SecretBytes> {
        self.with_session(Duration::from_secs(10), |session, kid| {
            session.unwrap(kid, Algorithm::RsaOaep256, &[1, 2, 3])
        })
    }

    /// The class of a GET that may take `limit`, and that it really ended about then.
    fn get_within(&self, limit: Duration) -> Class {
        let start = Instant::now();
        let result = self.with_session(limit, |session, kid| session.get_key(kid));
        assert!(start.elapsed() < limit + LATE, "took {:?}", start.elapsed());
        result.unwrap_err().class
    }
}

#[test]
fn the_four_operations() {
    let value = URL_SAFE_NO_PAD.encode([7; 32]);
    let rig = rig(authorised(move |seen| match seen.path.split('?').next().unwrap() {
        path if path.ends_with("/versions") => Answer::Json(
            200,
            format!(
                r#"{{"value":[{{"kid":"{}","attributes":{{"enabled":true,"created":5}}}}],"nextLink":null}}"#,
                kid()
            ),
        ),
        path if path.ends_with("key") => {
            Answer::Json(200, format!(r#"{{"kid":"{}","value":"{value}"}}"#, kid()))
        }
        _ => Answer::Json(200, bundle()),
    }));
    let info = rig.get().unwrap();
    assert_eq!((info.key_type.as_str(), info.bits, info.enabled), ("RSA", Some(3072), true));
    assert_eq!((info.expires, info.not_before), (Some(4_000_000_000), None));
    assert_eq!(info.recoverable_days, Some(90));
    assert_eq!(info.region.as_deref(), Some("westeurope"));
    assert_eq!(info.tenant.as_deref(), Some("tenant-1"));
    assert_eq!(info.service_time.unwrap().unix, 1_795_341_600);
    assert_eq!(rig.unwrap().unwrap().expose(), [7; 32]);
    rig.with_session(Duration::from_secs(10), |session, kid| {
        assert_eq!(session.list_versions(kid)?.len(), 1);
        let plain = SecretBytes::from_vec_wiping(vec![9; 32]).unwrap();
        assert_eq!(session.wrap(kid, Algorithm::RsaOaep256, &plain)?, [7; 32]);
        Ok(())
    })
    .unwrap();

    let seen = rig.vault.seen();
    assert!(seen[0].bearer.is_none() && seen[0].body.is_empty());
    assert!(seen[1..].iter().all(|request| request.bearer.as_deref() == Some("Bearer tok-en")));
    let paths: Vec<_> =
        seen.iter().map(|request| format!("{} {}", request.method, request.path)).collect();
    assert_eq!(paths[1], format!("GET /keys/kek/{VERSION}?api-version=7.4"));
    assert_eq!(paths[2], format!("POST /keys/kek/{VERSION}/unwrapkey?api-version=7.4"));
    assert_eq!(seen[2].body, r#"{"alg":"RSA-OAEP-256","value":"AQID"}"#);
    assert_eq!(paths[3], "GET /keys/kek/versions?api-version=7.4");
    assert_eq!(paths[4], format!("POST /keys/kek/{VERSION}/wrapkey?api-version=7.4"));

    let asked = rig.identity.seen();
    assert_eq!(asked.len(), 1, "the token is kept");
    assert_eq!(asked[0].identity_header.as_deref(), Some("s3cret"));
    assert_eq!(
        asked[0].path,
        "/msi/token?api-version=2019-08-01&resource=https%3A%2F%2Fvault.azure.net&client_id=id-7"
    );
}

#[test]
fn a_key_without_a_version_is_the_current_one() {
    let rig = rig(authorised(|_| Answer::Json(200, bundle())));
    let info = rig
        .with_session(Duration::from_secs(10), |session, kid| {
            session.get_key(kid.strip_suffix(&format!("/{VERSION}")).unwrap())
        })
        .unwrap();
    assert!(info.kid.ends_with(VERSION));
    assert_eq!(rig.vault.seen()[1].path, "/keys/kek?api-version=7.4");
}

#[test]
fn the_table_of_conditions_over_the_wire() {
    use Class::{Denied, Revoked, Transient};
    let rig = rig(authorised(|_| Answer::HangUp));
    let rows: [(u16, String, Class); 17] = [
        (403, refusal("Forbidden", "KeyDisabled"), Revoked(Reason::KeyDisabled)),
        (403, refusal("Forbidden", "ForbiddenByPolicy"), Denied(Reason::PermissionRevoked)),
        (403, refusal("Forbidden", "ForbiddenByRbac"), Denied(Reason::PermissionRevoked)),
        (403, refusal("Forbidden", "ForbiddenByFirewall"), Denied(Reason::NetworkDenied)),
        (403, refusal("Forbidden", "ForbiddenByConnection"), Denied(Reason::NetworkDenied)),
        (403, refusal("AccessDenied", ""), Denied(Reason::PermissionRevoked)),
        (404, refusal("KeyNotFound", ""), Revoked(Reason::KeyNotFound)),
        (409, refusal("Conflict", "ObjectIsBeingDeleted"), Transient(Reason::Unreachable)),
        (400, refusal("BadParameter", ""), Denied(Reason::WrongKeyOrCorruptEnvelope)),
        (429, refusal("Throttled", ""), Transient(Reason::Unreachable)),
        (500, refusal("InternalServerError", ""), Transient(Reason::Unreachable)),
        (503, String::new(), Transient(Reason::Unreachable)),
        (403, "<html>proxy</html>".into(), Transient(Reason::ProxyDenied)),
        (404, "<html>proxy</html>".into(), Transient(Reason::ProxyDenied)),
        (200, "<html>captive portal</html>".into(), Transient(Reason::Unreachable)),
        (200, "{}".into(), Transient(Reason::Unreachable)),
        (200, r#"{"kid":"k","value":7}"#.into(), Transient(Reason::Unreachable)),
    ];
    for (status, body, class) in rows {
        let answer = Answer::Json(status, body.clone());
        rig.vault.answer(authorised(move |_| answer.clone()));
        let error = rig.unwrap().unwrap_err();
        assert_eq!(error.class, class, "{status} {body}");
        if status != 200 {
            assert_eq!(error.status, Some(status));
        }
    }
}

#[test]
fn throttling_says_how_long() {
    let body = refusal("Throttled", "");
    let rig = rig(authorised(move |_| Answer::With(429, "Retry-After: 17", body.clone())));
    assert_eq!(rig.get().unwrap_err().retry_after, Some(Duration::from_secs(17)));
}

#[test]
fn a_deleted_key_is_told_from_a_purged_one() {
    let rig = rig(authorised(|seen| {
        if seen.path.starts_with("/deletedkeys/kek?") {
            return Answer::Json(200, bundle());
        }
        Answer::Json(404, refusal("KeyNotFound", ""))
    }));
    assert_eq!(rig.get().unwrap_err().class, Class::Revoked(Reason::KeyDeleted));
    rig.vault.answer(authorised(|_| Answer::Json(404, refusal("KeyNotFound", ""))));
    assert_eq!(rig.get().unwrap_err().class, Class::Revoked(Reason::KeyNotFound));
}

#[test]
fn a_refused_token_is_replaced_once() {
    let rig = rig(Box::new(|_| challenge()));
    assert_eq!(rig.get().unwrap_err().class, Class::Denied(Reason::TokenRefused));
    // Without a token, with one, with a new one.
    assert_eq!(rig.vault.seen().len(), 3);
    assert_eq!(rig.identity.seen().len(), 2);

    let count = AtomicUsize::new(0);
    rig.vault.answer(move |_| match count.fetch_add(1, Ordering::SeqCst) {
        0 => challenge(),
        _ => Answer::Json(200, bundle()),
    });
    assert!(rig.get().is_ok());
}

#[test]
fn a_hsm_challenge_without_a_body_works_and_no_challenge_is_a_refusal() {
    let rig = rig(Box::new(|seen| match &seen.bearer {
        Some(_) => Answer::Json(200, bundle()),
        None => Answer::With(
            401,
            "WWW-Authenticate: Bearer authorization=\"https://login.example/t\", \
             resource=\"https://managedhsm.azure.net\"",
            String::new(),
        ),
    }));
    assert!(rig.get().is_ok());
    rig.vault.answer(|_| Answer::Json(401, refusal("Unauthorized", "")));
    assert_eq!(rig.get().unwrap_err().class, Class::Denied(Reason::TokenRefused));
}

#[test]
fn a_401_that_is_not_the_services_is_no_refusal() {
    let rig = rig(authorised(|_| Answer::Json(200, bundle())));
    rig.get().unwrap();
    for header in ["WWW-Authenticate: Basic realm=\"proxy\"", "X: y"] {
        rig.vault.answer(move |_| Answer::With(401, header, "<html>log in</html>".into()));
        assert_eq!(rig.get().unwrap_err().class, Class::Transient(Reason::ProxyDenied), "{header}");
    }
    // A Managed HSM's has no body, and is one.
    let header = "WWW-Authenticate: Bearer authorization=\"https://login.example/t\", \
                  resource=\"https://managedhsm.azure.net\"";
    rig.vault.answer(move |_| Answer::With(401, header, String::new()));
    assert_eq!(rig.get().unwrap_err().class, Class::Denied(Reason::TokenRefused));
}

#[test]
fn a_token_of_another_service_is_not_handed_to_an_address() {
    let rig = rig(authorised(|_| Answer::Json(200, bundle())));
    let Rig { vault, identity, azure, .. } = &rig;
    let careful = Azure {
        base: azure.base.clone(),
        ca_file: azure.ca_file.clone(),
        challenge_check: ChallengeCheck::Auto,
        tokens: Tokens::new(&Identity::AppService(AppService {
            endpoint: Some(format!("http://{}/msi/token", identity.address)),
            header_file: Some(rig.dir.path().join("header")),
            client_id: None,
        }))
        .unwrap(),
    };
    let get = || {
        let mut session = careful.session(BootTime::now() + Duration::from_secs(10))?;
        session.get_key(&rig.kid())
    };
    assert_eq!(get().unwrap_err().class, Class::Transient(Reason::TlsUntrusted));
    assert!(identity.seen().is_empty(), "a token was fetched");
    let own: &'static str = Box::leak(
        format!(
            "WWW-Authenticate: Bearer authorization=\"https://login.example/t\", \
             resource=\"https://{}\"",
            vault.address
        )
        .into_boxed_str(),
    );
    vault.answer(move |seen| match seen.bearer {
        Some(_) => Answer::Json(200, bundle()),
        None => Answer::With(401, own, String::new()),
    });
    get().unwrap();
}

#[test]
fn identities_that_are_gone_or_silent() {
    let rig = rig(authorised(|_| Answer::Json(200, bundle())));
    rig.identity.answer(|_| {
        let body = r#"{"error":"invalid_request","error_description":"Identity not found"}"#;
        Answer::Json(400, body.into())
    });
    assert_eq!(rig.get().unwrap_err().class, Class::Denied(Reason::IdentityGone));
    rig.identity.answer(|_| Answer::Json(503, String::new()));
    assert_eq!(rig.get().unwrap_err().class, Class::Transient(Reason::Unreachable));
    rig.identity.answer(|_| Answer::Json(200, "nonsense".into()));
    assert_eq!(rig.get().unwrap_err().class, Class::Transient(Reason::Unreachable));
    rig.identity.answer(|_| Answer::Silence);
    assert_eq!(rig.get_within(Duration::from_millis(500)), Class::Transient(Reason::Unreachable));
    rig.identity.answer(|_| token());
    assert!(rig.get().is_ok());
    rig.identity.answer(|_| Answer::HangUp);
    assert!(rig.get().is_ok(), "the kept token goes on");
}

#[test]
fn a_kept_token_does_not_outlive_a_denied_identity() {
    let rig = rig(authorised(|_| Answer::Json(200, bundle())));
    rig.get().unwrap();
    let age = || {
        // A machine that has just booted cannot have an older one.
        rig.azure.tokens.age();
        BootTime::now().since(BootTime::ZERO) >= Duration::from_secs(5 * 60)
    };
    if !age() {
        return;
    }
    rig.identity.answer(|_| Answer::HangUp);
    assert!(rig.get().is_ok(), "nobody has denied anything");
    age();
    rig.identity.answer(|_| {
        let body = r#"{"error":"invalid_request","error_description":"Identity not found"}"#;
        Answer::Json(400, body.into())
    });
    assert_eq!(rig.get().unwrap_err().class, Class::Denied(Reason::IdentityGone));
    rig.identity.answer(|_| Answer::HangUp);
    assert_eq!(rig.get().unwrap_err().class, Class::Transient(Reason::Unreachable));
    rig.identity.answer(|_| token());
    rig.get().unwrap();
}

#[test]
fn an_impossible_expiry_of_a_token_does_no_harm() {
    let rig = rig(authorised(|_| Answer::Json(200, bundle())));
    rig.identity.answer(|_| {
        let body = format!(r#"{{"access_token":"tok-en","expires_on":{}}}"#, i64::MIN);
        Answer::Json(200, body)
    });
    rig.get().unwrap();
    rig.get().unwrap();
}

/// A rig whose vault answers every request that has a token.
fn rig_for(who: impl Fn(&Server, &Path) -> Identity) -> Rig {
    let (pem, tls) = certificate("127.0.0.1");
    rig_as(&pem, Some(tls), authorised(|_| Answer::Json(200, bundle())), who)
}

fn application(directory: &Server) -> Application {
    Application {
        tenant: Some("72f9-ab".into()),
        client_id: Some("app-1".into()),
        authority: Some(format!("http://{}/", directory.address)),
    }
}

/// The one request for a token: its form, sorted.
#[track_caller]
fn form_of(rig: &Rig) -> Vec<(String, String)> {
    let asked = rig.identity.seen();
    let [request] = &asked[..] else { panic!("{asked:?}") };
    assert_eq!(request.method, "POST");
    assert_eq!(request.path, "/72f9-ab/oauth2/v2.0/token");
    assert_eq!(request.content_type.as_deref(), Some("application/x-www-form-urlencoded"));
    let mut form: Vec<_> =
        url::form_urlencoded::parse(request.body.as_bytes()).into_owned().collect();
    form.sort();
    form
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn a_machine_asks_the_metadata_service() {
    let rig = rig_for(|identity, _| {
        Identity::Imds(Imds {
            endpoint: Some(format!("http://{}/metadata/identity/oauth2/token", identity.address)),
            client_id: Some("id-7".into()),
        })
    });
    rig.get().unwrap();
    let asked = rig.identity.seen();
    assert_eq!(asked.len(), 1);
    assert_eq!((&asked[0].method[..], asked[0].metadata.as_deref()), ("GET", Some("true")));
    assert_eq!(asked[0].identity_header, None);
    assert_eq!(
        asked[0].path,
        "/metadata/identity/oauth2/token?api-version=2018-02-01&\
         resource=https%3A%2F%2Fvault.azure.net&client_id=id-7"
    );
    for status in [404, 410, 429, 500] {
        let fresh = rig_for(|identity, _| {
            let endpoint = Some(format!("http://{}/x", identity.address));
            Identity::Imds(Imds { endpoint, client_id: None })
        });
        fresh.identity.answer(move |_| Answer::Json(status, "{\"error\":\"x\"}".into()));
        assert_eq!(fresh.get().unwrap_err().class, Class::Transient(Reason::Unreachable));
    }
}

#[test]
fn an_application_shows_its_secret() {
    let rig = rig_for(|directory, dir| {
        let file = private_file(dir, "secret", "of+the/app &=\n");
        Identity::ClientSecret(application(directory), file)
    });
    rig.get().unwrap();
    assert_eq!(
        form_of(&rig),
        pairs(&[
            ("client_id", "app-1"),
            ("client_secret", "of+the/app &="),
            ("grant_type", "client_credentials"),
            ("scope", "https://vault.azure.net/.default"),
        ])
    );
    assert!(!format!("{:?}", rig.azure).contains("of+the"));
    assert!(!format!("{:?}", rig.azure.tokens).contains("of+the"));
}

#[test]
fn a_renewed_secret_counts_without_a_mount() {
    let rig = rig_for(|directory, dir| {
        Identity::ClientSecret(application(directory), private_file(dir, "secret", "old"))
    });
    rig.identity.answer(|seen| {
        if seen.body.contains("client_secret=new") {
            return token();
        }
        let body = r#"{"error":"invalid_client","error_description":"AADSTS7000222: The provided client secret keys are expired."}"#;
        Answer::Json(401, body.into())
    });
    let error = rig.get().unwrap_err();
    assert_eq!(error.class, Class::Denied(Reason::CredentialInvalid));
    assert!(error.message().contains("AADSTS7000222"), "{error}");
    private_file(rig.dir.path(), "secret", "new");
    rig.get().unwrap();
    // A file that is gone for a moment says nothing: the directory is asked with what it held.
    std::fs::remove_file(rig.dir.path().join("secret")).unwrap();
    rig.azure.tokens.forget();
    rig.get().unwrap();
}

#[test]
fn an_application_signs_with_its_certificate() {
    let rig = rig_for(|directory, dir| {
        let file = private_file(dir, "app.pem", &MADE.pem);
        Identity::ClientCertificate(application(directory), file)
    });
    rig.get().unwrap();
    let mut form = form_of(&rig);
    let (_, jwt) = form.remove(0);
    assert_eq!(
        form,
        pairs(&[
            ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
            ("client_id", "app-1"),
            ("grant_type", "client_credentials"),
            ("scope", "https://vault.azure.net/.default"),
        ])
    );
    let (_, claims) = verified(&jwt, &MADE.public);
    let audience = format!("http://{}/72f9-ab/oauth2/v2.0/token", rig.identity.address);
    assert_eq!(claims["aud"], audience);
    assert_eq!(claims["sub"], "app-1");
}

#[test]
fn a_workload_shows_its_federated_token() {
    let rig = rig_for(|directory, dir| {
        let file = dir.join("federated");
        std::fs::write(&file, "first.token.x\n").unwrap();
        Identity::WorkloadIdentity(application(directory), Some(file))
    });
    rig.get().unwrap();
    let form = form_of(&rig);
    assert_eq!(form[0], ("client_assertion".into(), "first.token.x".into()));
    assert_eq!(form.len(), 5);
    // Kubernetes replaces the file; the next token is had with the new one.
    std::fs::write(rig.dir.path().join("federated"), "second.token.x").unwrap();
    rig.azure.tokens.forget();
    rig.get().unwrap();
    assert!(rig.identity.seen()[1].body.contains("client_assertion=second.token.x"));
}

#[test]
fn what_a_directory_refuses_is_no_outage() {
    use Class::{Denied, Revoked, Transient};
    let rows = [
        (400, "unauthorized_client", "AADSTS700016: no such app", Denied(Reason::IdentityGone)),
        (401, "invalid_client", "AADSTS7000112: disabled", Revoked(Reason::IdentityGone)),
        (401, "invalid_client", "AADSTS7000215: bad secret", Denied(Reason::CredentialInvalid)),
        (401, "invalid_client", "AADSTS7000222: expired", Denied(Reason::CredentialInvalid)),
        (400, "invalid_request", "AADSTS90002: no tenant", Denied(Reason::CredentialInvalid)),
        (400, "temporarily_unavailable", "busy", Transient(Reason::Unreachable)),
        (429, "x", "slow down", Transient(Reason::Unreachable)),
        (503, "x", "down", Transient(Reason::Unreachable)),
    ];
    for (status, code, text, class) in rows {
        let rig = rig_for(|directory, dir| {
            Identity::ClientSecret(application(directory), private_file(dir, "secret", "s"))
        });
        let body = format!(r#"{{"error":"{code}","error_description":"{text}"}}"#);
        rig.identity.answer(move |_| Answer::Json(status, body.clone()));
        assert_eq!(rig.get().unwrap_err().class, class, "{status} {text}");
    }
}

#[test]
fn a_managed_hsm_is_asked_with_its_own_audience() {
    let rig = rig_for(|directory, dir| {
        Identity::ClientSecret(application(directory), private_file(dir, "secret", "s"))
    });
    let kid = rig.kid();
    rig.vault.answer(move |seen| {
        if seen.bearer.is_none() {
            return Answer::With(
                401,
                "WWW-Authenticate: Bearer authorization=\"https://login.example/72f9-ab\", \
                 resource=\"https://managedhsm.azure.net\"",
                String::new(),
            );
        }
        if seen.path.contains("key?") {
            let value = URL_SAFE_NO_PAD.encode([5; 40]);
            return Answer::Json(200, format!(r#"{{"kid":"{kid}","value":"{value}"}}"#));
        }
        Answer::Json(
            200,
            format!(
                r#"{{"key":{{"kid":"{kid}","kty":"oct-HSM","key_ops":["wrapKey","unwrapKey"]}},
                "attributes":{{"enabled":true,"exportable":false,"recoverableDays":90,
                "recoveryLevel":"Recoverable"}}}}"#
            ),
        )
    });
    let info = rig.get().unwrap();
    assert_eq!(
        (info.key_type.as_str(), info.bits, info.exportable),
        ("oct-HSM", None, Some(false))
    );
    assert!(
        form_of(&rig).contains(&("scope".into(), "https://managedhsm.azure.net/.default".into()))
    );
    rig.with_session(Duration::from_secs(10), |session, kid| {
        let algorithm = session.algorithm(&info, Some(Algorithm::RsaOaep))?;
        assert_eq!(algorithm, Algorithm::A256Kw);
        let rsa = KeyInfo { key_type: "RSA-HSM".into(), ..KeyInfo::default() };
        assert_eq!(session.algorithm(&rsa, None)?, Algorithm::RsaOaep256);
        assert_eq!(session.algorithm(&rsa, Some(Algorithm::A256Kw))?, Algorithm::RsaOaep256);
        assert_eq!(session.algorithm(&rsa, Some(Algorithm::RsaOaep))?, Algorithm::RsaOaep);
        assert_eq!(session.unwrap(kid, algorithm, &[1; 40])?.expose(), [5; 40]);
        Ok(())
    })
    .unwrap();
    assert!(rig.vault.seen().last().unwrap().body.starts_with(r#"{"alg":"A256KW""#));
    // A refusal of its local access control has another form.
    let body = r#"{"error":{"code":"AccessDenied","message":"Not authorized to access Microsoft.KeyVault/managedHsm/keys/unwrap/action on /keys/kek (Activity ID: 1)"}}"#;
    rig.vault.answer(authorised(move |_| Answer::Json(403, body.into())));
    assert_eq!(rig.unwrap().unwrap_err().class, Class::Denied(Reason::PermissionRevoked));
}

#[test]
fn the_deadline_holds_whatever_the_server_does() {
    let rig = rig(authorised(|_| Answer::Trickle));
    let limit = Duration::from_millis(700);
    let lost = Class::Transient(Reason::Unreachable);
    assert_eq!(rig.get_within(limit), lost);
    rig.vault.answer(authorised(|_| Answer::Silence));
    assert_eq!(rig.get_within(limit), lost);
    // A server that accepts and then says nothing, not even TLS.
    let (pem, _) = certificate("127.0.0.1");
    let mute = rig_with(&pem, None, Box::new(|_| Answer::Silence));
    assert_eq!(mute.get_within(limit), lost);
}

#[test]
fn broken_answers_are_no_refusals() {
    let rig = rig(authorised(|_| Answer::Truncated));
    let lost = Class::Transient(Reason::Unreachable);
    assert_eq!(rig.get().unwrap_err().class, lost);
    rig.vault.answer(authorised(|_| Answer::Endless));
    assert_eq!(rig.get().unwrap_err().class, lost);
    rig.vault.answer(authorised(|_| Answer::HangUp));
    assert_eq!(rig.get().unwrap_err().class, lost);
}

/// Each is cut off by its size or by the deadline, and says nothing about the key.
#[test]
fn answers_without_end_are_no_refusals() {
    let rig = rig(authorised(|_| Answer::HangUp));
    let limit = Duration::from_millis(1500);
    for (head, part) in [
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "4\r\nabcd\r\n"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4;", "extension"),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", "Trailer: x\r\n"),
        ("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", "body"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n", "body"),
        ("HTTP/1.1 200 OK\r\n", "X-Header: value\r\n"),
        ("HTTP/1.1 200 OK\r\nX-Header: ", "value"),
        ("", "HTTP/1.1 100 Continue\r\n\r\n"),
        ("", "HTTP/1.1 103 Early Hints\r\n\r\n"),
        ("HTTP/1.1 2", "0"),
        ("", "\r\n"),
    ] {
        rig.vault.answer(authorised(move |_| Answer::Forever(head, part)));
        let class = rig.get_within(limit);
        assert_eq!(class, Class::Transient(Reason::Unreachable), "{head:?} {part:?}");
    }
}

/// A key whose attributes are missing is not a disabled key.
#[test]
fn a_key_without_its_attributes_is_a_broken_answer() {
    let rig = rig(authorised(|_| Answer::Json(200, bundle().replace("\"enabled\":true,", ""))));
    assert_eq!(rig.get().unwrap_err().class, Class::Transient(Reason::Unreachable));
    rig.vault.answer(authorised(|_| Answer::Json(200, bundle().replace("attributes", "other"))));
    assert_eq!(rig.get().unwrap_err().class, Class::Transient(Reason::Unreachable));
}

#[test]
fn redirects_are_not_followed() {
    let target = Server::start(None, Box::new(|_| Answer::Json(200, bundle())));
    let rig = rig(authorised(|_| Answer::HangUp));
    let location: &'static str =
        Box::leak(format!("Location: http://{}/x", target.address).into_boxed_str());
    rig.vault.answer(authorised(move |_| Answer::With(302, location, String::new())));
    assert_eq!(rig.get().unwrap_err().class, Class::Transient(Reason::ProxyDenied));
    assert!(target.seen().is_empty());
}

#[test]
fn an_untrusted_server_is_told_and_gets_nothing() {
    let (other, _) = certificate("127.0.0.1");
    let (pem, tls) = certificate("127.0.0.1");
    let untrusted = rig_with(&other, Some(tls), authorised(|_| Answer::Json(200, bundle())));
    assert_eq!(untrusted.get().unwrap_err().class, Class::Transient(Reason::TlsUntrusted));
    assert!(untrusted.vault.seen().is_empty());

    let (misnamed, tls) = certificate("other.example");
    let misnamed = rig_with(&misnamed, Some(tls), authorised(|_| Answer::Json(200, bundle())));
    assert_eq!(misnamed.get().unwrap_err().class, Class::Transient(Reason::TlsUntrusted));

    // No TLS at all, and nobody there.
    let plain = rig_with(&pem, None, Box::new(|_| Answer::HangUp));
    assert!(matches!(plain.get_within(Duration::from_secs(2)), Class::Transient(_)));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    assert!(TcpStream::connect(address).is_err());
    let Rig { azure, dir: _dir, .. } = plain;
    let nobody = Azure { base: Url::parse(&format!("https://{address}/")).unwrap(), ..azure };
    let mut session = nobody.session(BootTime::now() + Duration::from_secs(2)).unwrap();
    let error = session.get_key(&format!("https://{address}/keys/kek")).unwrap_err();
    assert_eq!(error.class, Class::Transient(Reason::Unreachable));
}

#[test]
fn no_aes_256_is_negotiated() {
    let (pem, tls) = with_suites("127.0.0.1", |suite| format!("{suite:?}").contains("AES_256"));
    let rig = rig_with(&pem, Some(tls), authorised(|_| Answer::Json(200, bundle())));
    assert!(matches!(rig.get().unwrap_err().class, Class::Transient(_)));
    assert!(rig.vault.seen().is_empty());
}

#[test]
fn an_answer_for_another_key_is_refused() {
    let rig = rig(authorised(|_| Answer::Json(200, bundle().replace(VERSION, "fedcba"))));
    let wrong = Class::Denied(Reason::WrongKeyOrCorruptEnvelope);
    assert_eq!(rig.get().unwrap_err().class, wrong);
    rig.vault.answer(authorised(|_| {
        Answer::Json(
            200,
            format!(r#"{{"kid":"{}","value":"AAAA"}}"#, kid().replace("kek", "other")),
        )
    }));
    assert_eq!(rig.unwrap().unwrap_err().class, wrong);
    let elsewhere = rig.with_session(Duration::from_secs(1), |session, _| {
        session.get_key("https://elsewhere.example/keys/kek")
    });
    assert_eq!(elsewhere.unwrap_err().class, wrong);
}

#[test]
fn pages_are_followed_on_the_same_vault_only() {
    let rig = rig(authorised(|_| Answer::HangUp));
    let own = format!("https://{}/keys/kek/versions?page=2", rig.vault.address);
    let page = |next: &str| {
        format!(
            r#"{{"value":[{{"kid":"{}","attributes":{{"enabled":true}}}}],"nextLink":"{next}"}}"#,
            kid()
        )
    };
    let (first, last) = (page(&own), page(""));
    rig.vault.answer(authorised(move |seen| {
        let body = if seen.path.contains("page=2") { &last } else { &first };
        Answer::Json(200, body.clone())
    }));
    let list = |rig: &Rig| {
        rig.with_session(Duration::from_secs(10), |session, kid| session.list_versions(kid))
    };
    let listed = list(&rig).unwrap();
    assert_eq!(listed.len(), 2);
    // Of another host, by its own word; what is followed is asked where this was.
    assert_eq!(listed[0].kid, rig.kid());
    for other in ["https://vault.example/keys/other/01", "https://vault.example/keys/kek", "kek/01"]
    {
        let page = format!(r#"{{"value":[{{"kid":"{other}","attributes":{{"enabled":true}}}}]}}"#);
        rig.vault.answer(authorised(move |_| Answer::Json(200, page.clone())));
        assert_eq!(list(&rig).unwrap_err().class, Class::Transient(Reason::Unreachable), "{other}");
    }
    let stray = page("https://evil.example/keys/kek/versions?page=2");
    rig.vault.answer(authorised(move |_| Answer::Json(200, stray.clone())));
    assert!(list(&rig).is_err());
}

#[test]
fn no_error_shows_a_token() {
    let rig = rig(authorised(|_| {
        Answer::Json(
        403,
        r#"{"error":{"code":"Forbidden","message":"no\r\nCaller: appid=1\r\nAuthorization eyJhbGciOiJSUzI1NiJ9.eyJ9.c2ln"}}"#.into(),
    )
    }));
    let text = format!("{:?}", rig.get().unwrap_err());
    for secret in ["eyJ", "appid", "s3cret", "tok-en"] {
        assert!(!text.contains(secret), "{text}");
    }
    assert!(!format!("{:?}", rig.azure).contains("s3cret"));
}
