//! Pins: the fingerprint of each volume's key, kept on this host beside its configuration.
//!
//! Anyone can wrap a key of their own with a public key. A pin tells an envelope that someone
//! with write access to the backing storage has planted from the one that `init` made.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::hex;
use crate::error::{Context, Error, Kind, Result};

const DIR: &str = "volumes.d";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// SHA-256 by way of a key derivation, hex.
    fingerprint: String,
    /// False: made with `init --no-requirements`.
    #[serde(default = "yes")]
    requirements: bool,
}

fn yes() -> bool {
    true
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pin {
    pub fingerprint: [u8; 32],
    /// Whether the key must meet the requirements that byokfs could do without.
    pub requirements: bool,
}

/// `<config dir>/volumes.d/<uuid>.toml`.
pub fn path(config_dir: &Path, uuid: &[u8; 16]) -> PathBuf {
    config_dir.join(DIR).join(format!("{}.toml", hex::uuid(uuid)))
}

/// Writes a new pin, durably, or nothing; an existing one is never replaced.
pub fn create(config_dir: &Path, uuid: &[u8; 16], pin: &Pin) -> Result<PathBuf> {
    let path = path(config_dir, uuid);
    let dir = config_dir.join(DIR);
    let failed = || format!("cannot write the pin {}", path.display());
    DirBuilder::new().recursive(true).mode(0o700).create(&dir).context(failed)?;
    let entry =
        Entry { fingerprint: hex::encode(&pin.fingerprint), requirements: pin.requirements };
    let body = toml::to_string(&entry)
        .map_err(|error| Error::new(Kind::Io, failed()).with_source(error))?;
    let text = format!("# Volume key of the byokfs volume {}.\n{body}", hex::uuid(uuid));
    let temporary = dir.join(format!(".{}.{}", hex::uuid(uuid), std::process::id()));
    let written = write(&temporary, &text).and_then(|()| {
        // Unlike a rename, a link fails when the name is taken.
        fs::hard_link(&temporary, &path)?;
        File::open(&dir)?.sync_all()
    });
    let removed = match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    written.and(removed).context(failed)?;
    Ok(path)
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// The volume's pin; a volume without one is refused.
pub fn read(config_dir: &Path, uuid: &[u8; 16]) -> Result<Pin> {
    let path = path(config_dir, uuid);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Error::new(
                Kind::Denied,
                format!(
                    "this host has no pin for volume {}: copy {} from the host that made the \
                     volume, by a way you trust, to {}",
                    hex::uuid(uuid),
                    Path::new(DIR).join(format!("{}.toml", hex::uuid(uuid))).display(),
                    path.display()
                ),
            ));
        }
        Err(error) => return Err(Error::io(format!("cannot read {}", path.display()), error)),
    };
    let wrong = || Error::new(Kind::Config, format!("{} is not a volume's pin", path.display()));
    let entry: Entry = toml::from_str(&text).map_err(|error| wrong().with_source(error))?;
    let bytes = hex::decode(&entry.fingerprint).ok_or_else(wrong)?;
    let fingerprint = bytes.try_into().map_err(|_| wrong())?;
    Ok(Pin { fingerprint, requirements: entry.requirements })
}

/// Takes back a pin that was made for a volume that then failed to be made.
pub fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const ONE: Pin = Pin { fingerprint: [1; 32], requirements: false };
    const OTHER: Pin = Pin { fingerprint: [2; 32], requirements: true };

    #[test]
    fn a_pin_is_private_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = [7; 16];
        assert_eq!(read(dir.path(), &uuid).unwrap_err().kind, Kind::Denied);
        let path = create(dir.path(), &uuid, &ONE).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read(dir.path(), &uuid).unwrap(), ONE);
        assert!(create(dir.path(), &uuid, &OTHER).is_err());
        assert_eq!(read(dir.path(), &uuid).unwrap(), ONE);
        assert_eq!(fs::read_dir(dir.path().join(DIR)).unwrap().count(), 1);
        remove(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn nonsense_is_not_a_pin() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = [7; 16];
        let path = create(dir.path(), &uuid, &ONE).unwrap();
        for text in ["fingerprint = \"zz\"", "fingerprint = \"aa\"", "x = 1", "fingerprint = 1"] {
            fs::write(&path, text).unwrap();
            assert_eq!(read(dir.path(), &uuid).unwrap_err().kind, Kind::Config, "{text}");
        }
    }
}
