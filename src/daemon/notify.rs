//! The service manager's notification protocol, sd_notify(3), where it asks for it.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

const SOCKET: &str = "NOTIFY_SOCKET";

/// A service manager has started this and is to be told how it is.
pub fn is_service() -> bool {
    socket().is_some()
}

pub fn ready(status: &str) {
    send(&format!("READY=1\nSTATUS={}", one_line(status)));
}

pub fn status(status: &str) {
    send(&format!("STATUS={}", one_line(status)));
}

pub fn stopping() {
    send("STOPPING=1");
}

/// A newline would begin another assignment.
fn one_line(text: &str) -> String {
    text.replace('\n', " ")
}

fn send(message: &str) {
    let Some(path) = socket() else { return };
    if let Err(error) = send_to(path.as_bytes(), message) {
        log::warn!("cannot notify the service manager: {error}");
    }
}

fn socket() -> Option<OsString> {
    std::env::var_os(SOCKET).filter(|path| !path.is_empty())
}

fn send_to(path: &[u8], message: &str) -> io::Result<()> {
    let address = match path.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path))?,
    };
    let socket = UnixDatagram::unbound()?;
    // A service manager that does not read must not hold up a cut-off.
    socket.set_nonblocking(true)?;
    socket.send_to_addr(message.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_address() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        send_to(path.as_os_str().as_bytes(), "READY=1").unwrap();
        let name = format!("byokfs-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let abstract_socket = UnixDatagram::bind_addr(&address).unwrap();
        send_to(format!("@{name}").as_bytes(), "STOPPING=1").unwrap();
        let mut buf = [0; 64];
        assert_eq!(socket.recv(&mut buf).unwrap(), 7);
        assert_eq!(abstract_socket.recv(&mut buf).unwrap(), 10);
    }

    #[test]
    fn a_status_is_one_line() {
        assert_eq!(one_line("a\nREADY=1"), "a READY=1");
    }
}
