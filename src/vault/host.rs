//! Which host a request was sent to, and the names and audience that follow from it.
//!
//! The vault answers under a few names (its address, `localhost`, `NAME.vault.localhost`), and
//! key ids repeat the one the caller used, as they do at the real service. Any other name is
//! refused: the certificate does not hold it either.

use std::net::IpAddr;

use super::settings::Flavor;

/// Where tokens are asked for, under a name: what `login.microsoftonline.com` is to the real service.
pub(crate) const LOGIN_HOST: &str = "login.localhost";

/// Parent domain of the vault's own name: what `vault.azure.net` is to the real service.
const fn domain(flavor: Flavor) -> &'static str {
    match flavor {
        Flavor::Vault => "vault.localhost",
        Flavor::Mhsm => "managedhsm.localhost",
    }
}

/// The host names a vault answers to.
#[derive(Debug, Clone)]
pub(crate) struct Hosts {
    dns_name: String,
    domain: &'static str,
    addresses: Vec<IpAddr>,
}

/// One name a request came in under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    /// `https://HOST[:PORT]`, as key ids begin.
    pub(crate) url: String,
    /// Audience its tokens must have. The official clients insist that the host asked ends in
    /// `.` + this one's host; an address has no parent domain and is its own audience.
    pub(crate) resource: String,
    /// A name for the token endpoint alone: there are no keys under it.
    pub(crate) is_login: bool,
}

impl Hosts {
    pub(crate) fn new(vault_name: &str, flavor: Flavor, listen: IpAddr) -> Hosts {
        let mut addresses =
            vec![IpAddr::from([127, 0, 0, 1]), std::net::Ipv6Addr::LOCALHOST.into()];
        if !listen.is_unspecified() && !addresses.contains(&listen) {
            addresses.push(listen);
        }
        let domain = domain(flavor);
        let dns_name = format!("{}.{domain}", vault_name.to_ascii_lowercase());
        Hosts { dns_name, domain, addresses }
    }

    /// The names for the server's certificate.
    pub(crate) fn certificate_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.addresses.iter().map(IpAddr::to_string).collect();
        names.extend(["localhost", &self.dns_name, self.domain, LOGIN_HOST].map(String::from));
        names
    }

    /// Judges a `Host` header; None if the vault does not answer to that name.
    pub(crate) fn origin(&self, header: &str) -> Option<Origin> {
        let lower = header.trim().to_ascii_lowercase();
        let (host, port) = split_port(&lower)?;
        let suffix = port.map(|port| format!(":{port}")).unwrap_or_default();
        let known = host == "localhost"
            || host == self.dns_name
            || host == LOGIN_HOST
            || host
                .trim_matches(['[', ']'])
                .parse::<IpAddr>()
                .is_ok_and(|address| self.addresses.contains(&address));
        if !known {
            return None;
        }
        let url = format!("https://{host}{suffix}");
        let resource = if host == self.dns_name {
            format!("https://{}{suffix}", self.domain)
        } else {
            url.clone()
        };
        Some(Origin { url, resource, is_login: host == LOGIN_HOST })
    }
}

fn split_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let after_brackets = authority.rfind(']').map_or(0, |end| end + 1);
    match authority[after_brackets..].find(':') {
        None => Some((authority, None)),
        Some(colon) => {
            let (host, port) = authority.split_at(after_brackets + colon);
            Some((host, Some(port[1..].parse().ok()?)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts() -> Hosts {
        Hosts::new("Kv1", Flavor::Vault, IpAddr::from([127, 0, 0, 1]))
    }

    #[test]
    fn an_address_is_its_own_audience_and_a_name_has_its_parents() {
        let origin = hosts().origin("127.0.0.1:8443").unwrap();
        assert_eq!(origin.url, "https://127.0.0.1:8443");
        assert_eq!(origin.resource, origin.url);
        let origin = hosts().origin("KV1.vault.localhost:8443").unwrap();
        assert_eq!(origin.url, "https://kv1.vault.localhost:8443");
        assert_eq!(origin.resource, "https://vault.localhost:8443");
        assert_eq!(hosts().origin("[::1]:1").unwrap().url, "https://[::1]:1");
        assert_eq!(hosts().origin("localhost").unwrap().url, "https://localhost");
        assert!(hosts().origin("login.localhost:1").unwrap().is_login);
        let hsm = Hosts::new("hsm1", Flavor::Mhsm, IpAddr::from([127, 0, 0, 1]));
        let origin = hsm.origin("hsm1.managedhsm.localhost:8443").unwrap();
        assert_eq!(origin.resource, "https://managedhsm.localhost:8443");
        assert_eq!(hsm.origin("hsm1.vault.localhost:8443"), None);
    }

    #[test]
    fn other_names_are_not_answered() {
        for header in [
            "evil.example:8443",
            "vault.localhost",
            "kv2.vault.localhost",
            "10.0.0.1",
            "",
            "localhost:x",
        ] {
            assert_eq!(hosts().origin(header), None, "{header}");
        }
    }
}
