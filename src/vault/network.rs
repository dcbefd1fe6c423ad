//! Network rules of a vault: who may reach its keys, by address.
//!
//! They hold for the key routes of callers whose token is good, as at the real service: the challenge is
//! answered to anyone, and management is not subject to them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Addresses that share the first bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    bits: u8,
}

impl Cidr {
    pub(crate) fn contains(&self, other: IpAddr) -> bool {
        match (self.address, other.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                same_prefix(u32::from(own).into(), u32::from(other).into(), 32, self.bits)
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                same_prefix(own.into(), other.into(), 128, self.bits)
            }
            _ => false,
        }
    }
}

/// Of numbers `width` bits wide.
fn same_prefix(one: u128, other: u128, width: u8, bits: u8) -> bool {
    let differing = (one ^ other) << (128 - u32::from(width));
    differing.leading_zeros() >= u32::from(bits)
}

impl FromStr for Cidr {
    type Err = String;

    /// `ADDRESS/BITS`, or an address alone.
    fn from_str(text: &str) -> Result<Cidr, String> {
        let wrong = || format!("'{text}' is no address range, as 192.0.2.0/24 or 2001:db8::/32");
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.trim().parse().map_err(|_| wrong())?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            Some(bits) => {
                bits.trim().parse().ok().filter(|bits| *bits <= width).ok_or_else(wrong)?
            }
            None => width,
        };
        // One range has one name, so that it can be found again and taken away.
        let address = match address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
                Ipv4Addr::from(u32::from(address) & mask).into()
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
                Ipv6Addr::from(u128::from(address) & mask).into()
            }
        };
        Ok(Cidr { address, bits })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetworkRules {
    /// False: nobody reaches the keys, whatever the rules say.
    pub(crate) public_access: bool,
    /// For addresses that no rule names.
    pub(crate) default_allow: bool,
    pub(crate) allowed: Vec<Cidr>,
}

impl Default for NetworkRules {
    fn default() -> NetworkRules {
        NetworkRules { public_access: true, default_allow: true, allowed: Vec::new() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NetworkDenial {
    Firewall,
    PublicAccess,
}

impl NetworkRules {
    pub(crate) fn check(&self, client: Option<IpAddr>) -> Result<(), NetworkDenial> {
        if !self.public_access {
            return Err(NetworkDenial::PublicAccess);
        }
        let named =
            client.is_some_and(|client| self.allowed.iter().any(|rule| rule.contains(client)));
        if self.default_allow || named { Ok(()) } else { Err(NetworkDenial::Firewall) }
    }

    pub(crate) fn allowed_text(&self) -> String {
        self.allowed.iter().map(Cidr::to_string).collect::<Vec<_>>().join(",")
    }

    pub(crate) fn parse_allowed(text: &str) -> Result<Vec<Cidr>, String> {
        text.split(',').map(str::trim).filter(|one| !one.is_empty()).map(str::parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_what_shares_their_bits() {
        let contains = |range: &str, address: &str| {
            range.parse::<Cidr>().unwrap().contains(address.parse().unwrap())
        };
        assert!(contains("192.0.2.0/24", "192.0.2.255"));
        assert!(!contains("192.0.2.0/24", "192.0.3.0"));
        assert!(contains("192.0.2.7", "192.0.2.7") && !contains("192.0.2.7", "192.0.2.6"));
        assert!(contains("0.0.0.0/0", "203.0.113.9") && !contains("0.0.0.0/0", "2001:db8::1"));
        assert!(contains("2001:db8::/32", "2001:db8:ffff::1"));
        assert!(!contains("2001:db8::/32", "2001:db9::1"));
        assert!(contains("::/0", "2001:db8::1"));
        assert!(contains("192.0.2.0/24", "::ffff:192.0.2.1"));
        for bad in ["", "192.0.2.0/33", "192.0.2/24", "x/8", "::/129", "192.0.2.0/-1", "192.0.2.0/"]
        {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn rules_are_judged_in_order() {
        let client = Some("192.0.2.9".parse().unwrap());
        let mut rules = NetworkRules::default();
        assert_eq!(rules.check(client), Ok(()));
        rules.default_allow = false;
        assert_eq!(rules.check(client), Err(NetworkDenial::Firewall));
        assert_eq!(rules.check(None), Err(NetworkDenial::Firewall));
        rules.allowed = NetworkRules::parse_allowed("10.0.0.0/8, 192.0.2.0/24").unwrap();
        assert_eq!(rules.check(client), Ok(()));
        assert_eq!(NetworkRules::parse_allowed(&rules.allowed_text()).unwrap(), rules.allowed);
        rules.public_access = false;
        assert_eq!(rules.check(client), Err(NetworkDenial::PublicAccess));
    }
}
