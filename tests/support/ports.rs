//! Ports for servers that a test stops and starts again at the same address.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};

/// Below those that the kernel gives to outgoing connections, and to whoever asks for any.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;

/// A port that no other test gets, of this process or another, until this process ends.
pub fn claim() -> u16 {
    let start = RandomState::new().hash_one(FIRST) % u64::from(COUNT);
    let start = u16::try_from(start).unwrap();
    (0..COUNT)
        .map(|step| FIRST + (start + step) % COUNT)
        .find(|port| claimed(*port))
        .expect("no port is free")
}

fn claimed(port: u16) -> bool {
    // A name that belongs to one process per network, as the port does.
    let name = SocketAddr::from_abstract_name(format!("byokfs-test-port-{port}")).unwrap();
    let Ok(claim) = UnixListener::bind_addr(&name) else { return false };
    // Somebody who knows nothing of claims may have it.
    if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_err() {
        return false;
    }
    // Kept to the end of the process: a vault may come back elsewhere, from its backup.
    std::mem::forget(claim);
    true
}

/// The options of `vault init` for a vault that has its ports to itself.
pub fn options() -> [String; 2] {
    [format!("--port={}", claim()), format!("--identity-port={}", claim())]
}
