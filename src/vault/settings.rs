//! What a vault is, as `init` decided it; only the ports change afterwards.

use std::net::IpAddr;

use rusqlite::Transaction;

use super::store::{self, Store};
use super::wire::Recovery;
use crate::error::{Error, Result};

#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Random; binds sealed keys to this vault.
    pub(crate) vault_id: String,
    pub(crate) name: String,
    pub(crate) tenant: String,
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
    pub(crate) fn save(&self, tx: &Transaction<'_>) -> rusqlite::Result<()> {
        let values = [
            ("vault_id", self.vault_id.clone()),
            ("name", self.name.clone()),
            ("tenant", self.tenant.clone()),
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
                tenant: text("tenant")?,
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

fn parse<T: std::str::FromStr>(name: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| {
        Error::corrupt(format!("the vault's database has a bad value for the setting {name}"))
    })
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
            tenant: "t".into(),
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
        store.write(|tx| Ok::<_, Error>(store::set_setting(tx, "host", "x")?)).unwrap();
        assert!(Settings::load(&store).unwrap_err().to_string().contains("setting host"));
    }
}
