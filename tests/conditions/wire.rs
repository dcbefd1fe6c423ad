//! The wire between the client and a real vault: passes bytes on, counts conversations, and can be
//! slow or silent in a way that no answer of a server is. It sees only TLS.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use byokfs::key::provider::Settings;
use parking_lot::Mutex;

use crate::rig::Service;
use crate::vault::Vault;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mood {
    #[default]
    Fast,
    /// Connections are taken, and nothing is passed on.
    Silent,
    /// One byte of the server's at a time, the TLS handshake's too.
    Trickling(Duration),
    /// Each answer is held up for so long.
    Slow(Duration),
}

struct State {
    mood: Mutex<Mood>,
    open: AtomicUsize,
    most: AtomicUsize,
    connections: AtomicUsize,
}

/// A vault that is reached over such a wire.
pub struct Wired {
    pub vault: Vault,
    address: SocketAddr,
    state: Arc<State>,
}

impl Wired {
    pub fn to(vault: Vault) -> Wired {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            mood: Mutex::default(),
            open: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
        });
        let server = vault.url.strip_prefix("https://").unwrap().trim_end_matches('/').to_owned();
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (state, server) = (Arc::clone(&shared), server.clone());
                thread::spawn(move || {
                    state.connections.fetch_add(1, Ordering::SeqCst);
                    let open = state.open.fetch_add(1, Ordering::SeqCst) + 1;
                    state.most.fetch_max(open, Ordering::SeqCst);
                    state.pass_on(client, &server);
                });
            }
        });
        Wired { vault, address, state }
    }

    pub fn mood(&self, mood: Mood) {
        *self.state.mood.lock() = mood;
    }

    /// The most connections that were ever open at once.
    pub fn most_at_once(&self) -> usize {
        self.state.most.load(Ordering::SeqCst)
    }

    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }
}

impl Service for Wired {
    fn key(&self) -> String {
        let path = self.vault.key.split_once("/keys/").unwrap().1;
        format!("https://{}/keys/{path}", self.address)
    }

    fn access(&self) -> Settings {
        self.vault.access()
    }
}

impl State {
    /// Until either side closes. Counted as open until the client has closed.
    fn pass_on(self: &Arc<State>, client: TcpStream, server: &str) {
        let Ok(server) = TcpStream::connect(server) else {
            self.open.fetch_sub(1, Ordering::SeqCst);
            return;
        };
        for stream in [&client, &server] {
            stream.set_nodelay(true).unwrap();
        }
        let (to_client, from_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let state = Arc::clone(self);
        thread::spawn(move || state.answers(from_server, to_client));
        self.requests(client, server);
        self.open.fetch_sub(1, Ordering::SeqCst);
    }

    fn requests(&self, mut client: TcpStream, mut server: TcpStream) {
        let mut buf = [0; 4096];
        while let Ok(count @ 1..) = client.read(&mut buf) {
            if *self.mood.lock() != Mood::Silent && server.write_all(&buf[..count]).is_err() {
                break;
            }
        }
        let _ = server.shutdown(Shutdown::Both);
        let _ = client.shutdown(Shutdown::Both);
    }

    fn answers(&self, mut server: TcpStream, mut client: TcpStream) {
        let mut buf = [0; 4096];
        while let Ok(count @ 1..) = server.read(&mut buf) {
            let mood = *self.mood.lock();
            let sent = match mood {
                Mood::Fast => client.write_all(&buf[..count]),
                Mood::Silent => Ok(()),
                Mood::Slow(time) => {
                    thread::sleep(time);
                    client.write_all(&buf[..count])
                }
                Mood::Trickling(time) => buf[..count].iter().try_for_each(|byte| {
                    thread::sleep(time);
                    client.write_all(&[*byte])
                }),
            };
            if sent.is_err() {
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    }
}
