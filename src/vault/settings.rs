//! What a vault is. `init` decides it; the ports change with each start, and tenant, access model
//! and network rules when the administrator says so.

use std::net::IpAddr;

use rusqlite::Transaction;

use super::network::NetworkRules;
use super::store::{self, Store};
use super::wire::Recovery;
use crate::error::{Error, Result};

/// Which service the vault behaves as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavor {
    /// A key vault: RSA keys, access policies or roles.
    Vault,
    /// A Managed HSM: RSA-HSM and oct-HSM keys, its own roles, errors and challenge.
    Mhsm,
}

impl Flavor {
    pub const fn name(self) -> &'static str {
        match self {
            Flavor::Vault => "vault",
            Flavor::Mhsm => "mhsm",
        }
    }

    pub fn from_name(name: &str) -> Option<Flavor> {
        [Flavor::Vault, Flavor::Mhsm].into_iter().find(|flavor| flavor.name() == name)
    }
}

/// What permissions follow from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AccessModel {
    Policies,
    Roles,
}

impl AccessModel {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            AccessModel::Policies => "policies",
            AccessModel::Roles => "roles",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<AccessModel> {
        [AccessModel::Policies, AccessModel::Roles].into_iter().find(|model| model.name() == name)
    }
}

pub(crate) const TENANT: &str = "tenant";
pub(crate) const ACCESS_MODEL: &str = "access_model";
const FLAVOR: &str = "flavor";
const PUBLIC_ACCESS: &str = "public_network_access";
const DEFAULT_ALLOW: &str = "network_default_allow";
const ALLOWED: &str = "network_allowed";

#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Random; binds sealed keys to this vault.
    pub(crate) vault_id: String,
    pub(crate) name: String,
    pub(crate) flavor: Flavor,
    /// What `x-ms-keyvault-region` says.
    pub(crate) region: String,
    pub(crate) recovery: Recovery,
    /// Address of the TLS listener.
    pub(crate) host: IpAddr,
    /// Ports of the last run, so that key ids stay good; 0: any.
    pub(crate) port: u16,
    pub(crate) identity_port: u16,
    pub(crate) ca_pem: String,
}

impl Settings {
    /// Of the vault or a key of it, as role assignments and log records name it. There is no
    /// subscription here.
    pub(crate) fn resource_id(&self, key: Option<&str>) -> String {
        let kind = match self.flavor {
            Flavor::Vault => "vaults",
            Flavor::Mhsm => "managedHSMs",
        };
        let key = key.map(|key| format!("/keys/{key}")).unwrap_or_default();
        format!(
            "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/byokfs/providers/\
             Microsoft.KeyVault/{kind}/{}{key}",
            self.name
        )
    }

    pub(crate) fn save(&self, tx: &Transaction<'_>) -> rusqlite::Result<()> {
        let values = [
            ("vault_id", self.vault_id.clone()),
            ("name", self.name.clone()),
            (FLAVOR, self.flavor.name().to_owned()),
            ("region", self.region.clone()),
            ("retention_days", self.recovery.days.to_string()),
            ("purge_protection", self.recovery.purge_protection.to_string()),
            ("host", self.host.to_string()),
            ("ca_pem", self.ca_pem.clone()),
        ];
        for (name, value) in values {
            store::set_setting(tx, name, &value)?;
        }
        save_ports(tx, self.port, self.identity_port)
    }

    pub(crate) fn load(store: &Store) -> Result<Settings> {
        store.read(|tx| {
            let text = |name: &str| -> Result<String> {
                store::setting(tx, name)?.ok_or_else(|| {
                    Error::corrupt(format!("the vault's database lacks the setting {name}"))
                })
            };
            Ok(Settings {
                vault_id: text("vault_id")?,
                name: text("name")?,
                // Older vaults know of one flavor only.
                flavor: match store::setting(tx, FLAVOR)? {
                    None => Flavor::Vault,
                    Some(text) => Flavor::from_name(&text).ok_or_else(|| bad_value(FLAVOR))?,
                },
                region: text("region")?,
                recovery: Recovery {
                    days: parse("retention_days", &text("retention_days")?)?,
                    purge_protection: parse("purge_protection", &text("purge_protection")?)?,
                },
                host: parse("host", &text("host")?)?,
                port: parse("port", &text("port")?)?,
                identity_port: parse("identity_port", &text("identity_port")?)?,
                ca_pem: text("ca_pem")?,
            })
        })
    }
}

pub(crate) fn save_ports(tx: &Transaction<'_>, port: u16, identity: u16) -> rusqlite::Result<()> {
    store::set_setting(tx, "port", &port.to_string())?;
    store::set_setting(tx, "identity_port", &identity.to_string())
}

/// What may change while the vault is served; what older vaults lack has its default.
pub(crate) fn load_access(tx: &Transaction<'_>) -> Result<(String, AccessModel, NetworkRules)> {
    let tenant = store::setting(tx, TENANT)?
        .ok_or_else(|| Error::corrupt("the vault's database lacks the setting tenant"))?;
    let model = match store::setting(tx, ACCESS_MODEL)? {
        None => AccessModel::Policies,
        Some(text) => AccessModel::from_name(&text).ok_or_else(|| bad_value(ACCESS_MODEL))?,
    };
    let flag = |name: &str| -> Result<bool> {
        store::setting(tx, name)?.map_or(Ok(true), |text| parse(name, &text))
    };
    let network = NetworkRules {
        public_access: flag(PUBLIC_ACCESS)?,
        default_allow: flag(DEFAULT_ALLOW)?,
        allowed: NetworkRules::parse_allowed(&store::setting(tx, ALLOWED)?.unwrap_or_default())
            .map_err(|_| bad_value(ALLOWED))?,
    };
    Ok((tenant, model, network))
}

pub(crate) fn save_network(tx: &Transaction<'_>, rules: &NetworkRules) -> rusqlite::Result<()> {
    store::set_setting(tx, PUBLIC_ACCESS, &rules.public_access.to_string())?;
    store::set_setting(tx, DEFAULT_ALLOW, &rules.default_allow.to_string())?;
    store::set_setting(tx, ALLOWED, &rules.allowed_text())
}

fn parse<T: std::str::FromStr>(name: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| bad_value(name))
}

fn bad_value(name: &str) -> Error {
    Error::corrupt(format!("the vault's database has a bad value for the setting {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_last_and_damage_is_named() {
        let (_dir, store) = store::tests::store();
        let settings = Settings {
            vault_id: "id".into(),
            name: "kv1".into(),
            flavor: Flavor::Mhsm,
            region: "local".into(),
            recovery: Recovery { days: 90, purge_protection: true },
            host: IpAddr::from([127, 0, 0, 1]),
            port: 0,
            identity_port: 0,
            ca_pem: "pem".into(),
        };
        store.write(|tx| Ok::<_, Error>(settings.save(tx)?)).unwrap();
        store.write(|tx| Ok::<_, Error>(save_ports(tx, 8443, 8081)?)).unwrap();
        let loaded = Settings::load(&store).unwrap();
        assert_eq!((loaded.port, loaded.identity_port, loaded.name.as_str()), (8443, 8081, "kv1"));
        assert_eq!(loaded.flavor, Flavor::Mhsm);
        store.write(|tx| Ok::<_, Error>(store::set_setting(tx, "host", "x")?)).unwrap();
        assert!(Settings::load(&store).unwrap_err().to_string().contains("setting host"));
    }

    #[test]
    fn rules_last_and_have_defaults() {
        let (_dir, store) = store::tests::store();
        let load = || store.read(load_access);
        assert!(load().unwrap_err().to_string().contains("setting tenant"));
        store.write(|tx| Ok::<_, Error>(store::set_setting(tx, TENANT, "t")?)).unwrap();
        let defaults = ("t".to_owned(), AccessModel::Policies, NetworkRules::default());
        assert_eq!(load().unwrap(), defaults);
        let rules = NetworkRules {
            public_access: true,
            default_allow: false,
            allowed: NetworkRules::parse_allowed("192.0.2.0/24").unwrap(),
        };
        store
            .write(|tx| {
                save_network(tx, &rules)?;
                store::set_setting(tx, ACCESS_MODEL, "roles")?;
                Ok::<_, Error>(())
            })
            .unwrap();
        assert_eq!(load().unwrap(), ("t".to_owned(), AccessModel::Roles, rules));
    }
}
