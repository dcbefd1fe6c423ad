//! `vault init`: a new vault in an empty directory.
//!
//! The database is made under another name and renamed last: a killed `init` leaves no vault,
//! and the next one starts over.

use std::fs::OpenOptions;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::codec;
use super::dir::{VaultDir, remove_if_there, write_atomic, write_new};
use super::identity::header_sha256;
use super::permission::Permissions;
use super::seal::Sealer;
use super::settings::{self, AccessModel, Flavor, Settings};
use super::store::identities::{self, ADMIN, Identity};
use super::store::{self, Store};
use super::wire::{FULL_RETENTION_DAYS, Recovery, is_vault_name};
use super::{certificate, token};
use crate::crypto::secret::{Secret, SecretString};
use crate::error::{Context, Error, Kind, Result};

pub(crate) const AUTHORITY_KEY: &str = "authority key";
pub(crate) const SIGNING_KEY: &str = "token signing key";

/// The real service's limits.
const MIN_RETENTION_DAYS: u16 = 7;

#[derive(Debug, Clone)]
pub struct InitOptions {
    pub name: String,
    pub flavor: Flavor,
    /// Permissions by roles, not by access policies; a Managed HSM has roles anyway.
    pub roles: bool,
    pub host: IpAddr,
    /// 0: a free port, chosen at the first start.
    pub port: u16,
    /// The same, for the identity endpoint.
    pub identity_port: u16,
    pub region: String,
    /// Random if not given.
    pub tenant: Option<String>,
    pub retention_days: u16,
    pub purge_protection: bool,
}

/// What `init` made, for its caller to show.
#[derive(Debug, Clone)]
pub struct Initialised {
    pub ca_certificate: PathBuf,
    pub tenant: String,
}

pub fn init(dir: &VaultDir, options: &InitOptions) -> Result<Initialised> {
    check(options)?;
    refuse_occupied(dir)?;
    dir.create()?;
    let _lock = dir.lock()?;
    // Looked at again: another init may have been faster.
    refuse_occupied(dir)?;

    let root = Secret::random()?;
    remove_if_there(&dir.root_key())?;
    write_new(&dir.root_key(), root.expose(), 0o600)?;
    let admin_header = new_header_secret()?;
    remove_if_there(&dir.admin_header())?;
    write_new(&dir.admin_header(), admin_header.expose().as_bytes(), 0o600)?;
    let (ca_pem, authority_key) = certificate::new_authority(&options.name)?;
    write_atomic(&dir.ca_certificate(), ca_pem.as_bytes(), 0o644)?;

    let tenant = match &options.tenant {
        Some(tenant) => tenant.to_ascii_lowercase(),
        None => codec::new_uuid()?,
    };
    let roles = options.roles || options.flavor == Flavor::Mhsm;
    let model = if roles { AccessModel::Roles } else { AccessModel::Policies };
    let settings = Settings {
        vault_id: codec::new_uuid()?,
        name: options.name.clone(),
        flavor: options.flavor,
        region: options.region.clone(),
        recovery: Recovery {
            days: options.retention_days,
            purge_protection: options.purge_protection,
        },
        host: options.host,
        port: options.port,
        identity_port: options.identity_port,
        ca_pem,
    };
    let sealer = Sealer::new(root, &settings.vault_id);
    let authority_key = sealer.seal(&[AUTHORITY_KEY], authority_key.expose())?;
    let signing_key = sealer.seal(&[SIGNING_KEY], token::new_signing_key()?.expose())?;
    let admin = Identity {
        name: ADMIN.to_owned(),
        object_id: codec::new_uuid()?,
        client_id: codec::new_uuid()?,
        header_sha256: Some(header_sha256(admin_header.expose())),
        tenant: tenant.clone(),
        permissions: Permissions::all(),
        is_admin: true,
        enabled: true,
        deleted: None,
        created: (super::system_clock())(),
    };

    let unfinished = unfinished_database(dir)?;
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unfinished)
        .context(|| format!("cannot create {}", unfinished.display()))?;
    let database = Store::create(&unfinished)?;
    database.write(|tx| {
        settings.save(tx)?;
        store::set_setting(tx, settings::TENANT, &tenant)?;
        store::set_setting(tx, settings::ACCESS_MODEL, model.name())?;
        store::set_sealed(tx, AUTHORITY_KEY, &authority_key)?;
        store::set_sealed(tx, SIGNING_KEY, &signing_key)?;
        identities::insert(tx, &admin)?;
        Ok::<_, Error>(())
    })?;
    drop(database);
    finish_database(dir, &unfinished)?;
    Ok(Initialised { ca_certificate: dir.ca_certificate(), tenant })
}

/// Where the database is made; nothing of it is there.
pub(crate) fn unfinished_database(dir: &VaultDir) -> Result<PathBuf> {
    let unfinished = dir.database().with_extension("db.new");
    for leftover in [unfinished.clone(), unfinished.with_extension("new-journal")] {
        remove_if_there(&leftover)?;
    }
    Ok(unfinished)
}

/// From now on there is a vault.
pub(crate) fn finish_database(dir: &VaultDir, unfinished: &Path) -> Result<()> {
    std::fs::rename(unfinished, dir.database())
        .context(|| format!("cannot rename {}", unfinished.display()))?;
    dir.sync()
}

/// 32 random bytes in base64url.
pub fn new_header_secret() -> Result<SecretString> {
    let bytes: Secret<32> = Secret::random()?;
    SecretString::from_string_wiping(codec::to_base64url(bytes.expose()))
}

/// Of regions and tenants.
pub(crate) fn is_plain(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'))
}

fn check(options: &InitOptions) -> Result<()> {
    if !is_vault_name(&options.name) {
        return Err(Error::usage(format!(
            "'{}' is no vault name: 3 to 24 letters, digits and single dashes, a letter first",
            options.name
        )));
    }
    if !(MIN_RETENTION_DAYS..=FULL_RETENTION_DAYS).contains(&options.retention_days) {
        return Err(Error::usage(format!(
            "the retention of deleted keys is {MIN_RETENTION_DAYS} to {FULL_RETENTION_DAYS} days"
        )));
    }
    if !is_plain(&options.region)
        || options.tenant.as_deref().is_some_and(|tenant| !is_plain(tenant))
    {
        return Err(Error::usage("a region or tenant is 1 to 64 letters, digits, dots and dashes"));
    }
    Ok(())
}

/// An existing vault is left alone, as is a directory with anything `init` does not make.
pub(crate) fn refuse_occupied(dir: &VaultDir) -> Result<()> {
    if dir.database().exists() {
        return Err(Error::new(
            Kind::Busy,
            format!("{} already holds a key vault; nothing was changed", dir.path().display()),
        ));
    }
    let entries = match std::fs::read_dir(dir.path()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.context(|| format!("cannot read {}", dir.path().display()))?,
    };
    for entry in entries {
        let name = entry.context(|| format!("cannot read {}", dir.path().display()))?.file_name();
        let ours = name.to_str().is_some_and(|name| {
            matches!(name, "root.key" | "admin.header" | "ca.pem" | "lock" | "vault.db.new")
                || name.starts_with("vault.db.new-")
                || (name.starts_with("ca.pem.") && name.ends_with(".new"))
        });
        if !ours {
            return Err(Error::new(
                Kind::Busy,
                format!(
                    "{} is not empty ({} is there); nothing was changed",
                    dir.path().display(),
                    name.to_string_lossy()
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn options() -> InitOptions {
        InitOptions {
            name: "kv1".into(),
            flavor: Flavor::Vault,
            roles: false,
            host: IpAddr::from([127, 0, 0, 1]),
            port: 0,
            identity_port: 0,
            region: "local".into(),
            tenant: None,
            retention_days: 90,
            purge_protection: true,
        }
    }

    fn mode(path: &std::path::Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_new_vault_is_private_and_a_second_init_changes_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let dir = VaultDir::new(parent.path().join("v"));
        init(&dir, &options()).unwrap();
        assert_eq!(mode(dir.path()), 0o700);
        for file in [dir.root_key(), dir.admin_header(), dir.database()] {
            assert_eq!(mode(&file), 0o600, "{}", file.display());
        }
        let root = std::fs::read(dir.root_key()).unwrap();
        assert_eq!(init(&dir, &options()).unwrap_err().kind, Kind::Busy);
        assert_eq!(std::fs::read(dir.root_key()).unwrap(), root);
    }

    #[test]
    fn a_killed_init_can_be_repeated_and_strangers_files_stay() {
        let parent = tempfile::tempdir().unwrap();
        let dir = VaultDir::new(parent.path().join("v"));
        std::fs::create_dir(dir.path()).unwrap();
        std::fs::write(dir.root_key(), b"half").unwrap();
        std::fs::write(dir.path().join("vault.db.new"), b"half").unwrap();
        std::fs::write(dir.path().join("vault.db.new-journal"), b"half").unwrap();
        init(&dir, &options()).unwrap();

        let other = VaultDir::new(parent.path().join("w"));
        std::fs::create_dir(other.path()).unwrap();
        std::fs::write(other.path().join("letter"), b"dear").unwrap();
        assert!(init(&other, &options()).unwrap_err().to_string().contains("letter"));
        assert_eq!(std::fs::read_dir(other.path()).unwrap().count(), 1);
    }

    #[test]
    fn nonsense_is_refused_before_anything_is_made() {
        let parent = tempfile::tempdir().unwrap();
        let dir = VaultDir::new(parent.path().join("v"));
        for bad in [
            InitOptions { name: "x".into(), ..options() },
            InitOptions { retention_days: 6, ..options() },
            InitOptions { retention_days: 91, ..options() },
            InitOptions { region: "a\nb".into(), ..options() },
        ] {
            assert_eq!(init(&dir, &bad).unwrap_err().kind, Kind::Usage);
        }
        assert!(!dir.path().exists());
    }
}
