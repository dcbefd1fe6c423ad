//! The sockets of `vault serve`: which port a vault gets that was given none, and what is said
//! where a port is taken.
//!
//! Key ids name the port, so a vault has to get the same one at each start. One that the kernel
//! gives to outgoing connections too may be somebody's by then, and the vault stays down.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::ops::RangeInclusive;

use crate::crypto::random;
use crate::error::{Context, Error, Kind, Result};

/// Ports that IANA gives to nobody (RFC 6335), above those of Linux's outgoing connections.
const LASTING: RangeInclusive<u16> = 61_000..=65_535;
/// Linux's own choice (ip(7)), for where it cannot be learned.
const OUTGOING: RangeInclusive<u16> = 32_768..=60_999;
const OUTGOING_FILE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const TRIES: usize = 64;

/// Listens on `port`; 0: on a free one that will be free at later starts too, if there is any.
pub(super) fn listen(host: IpAddr, port: u16) -> Result<TcpListener> {
    if port != 0 {
        return bind(host, port);
    }
    let outgoing = std::fs::read_to_string(OUTGOING_FILE).ok().and_then(|text| range(&text));
    let lasting = lasting(&outgoing.unwrap_or(OUTGOING));
    for _ in 0..TRIES {
        let Some(port) = any_of(&lasting)? else { break };
        match bind(host, port) {
            Err(error) if error.kind == Kind::Busy => {}
            answer => return answer,
        }
    }
    let listener = bind(host, 0)?;
    log::warn!(
        "port {} is one that the kernel may give to another program's connection before the next \
         start; --port and --identity-port of `vault serve` choose others",
        local_address(&listener)?.port()
    );
    Ok(listener)
}

/// Listens on this very port.
pub(super) fn bind(host: IpAddr, port: u16) -> Result<TcpListener> {
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

pub(super) fn local_address(listener: &TcpListener) -> Result<SocketAddr> {
    listener.local_addr().context(|| "cannot learn the port".into())
}

/// An address to connect to: a wildcard stands for loopback.
pub(super) fn reachable(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => {
            SocketAddr::new(Ipv4Addr::LOCALHOST.into(), address.port())
        }
        IpAddr::V6(ip) if ip.is_unspecified() => {
            SocketAddr::new(Ipv6Addr::LOCALHOST.into(), address.port())
        }
        _ => address,
    }
}

/// `FIRST LAST`, as the kernel writes a range of ports.
fn range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut words = text.split_ascii_whitespace().map(str::parse);
    match (words.next(), words.next(), words.next()) {
        (Some(Ok(first)), Some(Ok(last)), None) => Some(first..=last),
        _ => None,
    }
}

fn lasting(outgoing: &RangeInclusive<u16>) -> Vec<u16> {
    LASTING.filter(|port| !outgoing.contains(port)).collect()
}

fn any_of(ports: &[u16]) -> Result<Option<u16>> {
    let random = usize::from(u16::from_le_bytes(random::bytes()?));
    Ok(random.checked_rem(ports.len()).map(|index| ports[index]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[test]
    fn ports_of_outgoing_connections_do_not_last() {
        assert_eq!(lasting(&range("32768\t60999\n").unwrap()).len(), 4_536);
        assert_eq!(lasting(&range("1024 64999").unwrap()), (65_000..=65_535).collect::<Vec<_>>());
        assert!(lasting(&range("1024 65535").unwrap()).is_empty());
        for bad in ["", "1024", "1024 x", "1024 70000", "1 2 3"] {
            assert_eq!(range(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn one_of_many_is_taken_and_none_of_none() {
        assert_eq!(any_of(&[]).unwrap(), None);
        let ports = [61_000, 61_001];
        let taken: std::collections::BTreeSet<_> =
            (0..200).map(|_| any_of(&ports).unwrap().unwrap()).collect();
        assert_eq!(taken, ports.into());
    }

    #[test]
    fn a_port_that_nobody_chose_is_outside_of_those_and_one_in_use_is_refused() {
        let outgoing = range(&std::fs::read_to_string(OUTGOING_FILE).unwrap()).unwrap();
        let listener = listen(HOST, 0).unwrap();
        let port = local_address(&listener).unwrap().port();
        assert!(!outgoing.contains(&port) || lasting(&outgoing).is_empty());
        assert_eq!(listen(HOST, port).unwrap_err().kind, Kind::Busy);
    }
}
