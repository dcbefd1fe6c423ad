//! Pins: the fingerprint of each volume's key, kept on this host beside its configuration.
//!
//! Anyone can wrap a key of their own with a public key. A pin tells an envelope that someone
//! with write access to the backing storage has planted from the one that `init` made.
//!
//! It also says where the volume lies ([`Place`]) and which key version its envelope names there.
//! Somewhere else, on another host or with another key version (a copy, a restored backup, an old
//! envelope that somebody put back so that a revoked key does not matter) it is not served until a
//! person has confirmed that. A pin without places, as one that a configuration manager writes,
//! confirms every place and every key version.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::hex;
use crate::error::{Context, Error, Kind, Result};
use crate::key::custody::Pinned;

const DIR: &str = "volumes.d";
const MACHINE_ID: &str = "/etc/machine-id";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// SHA-256 by way of a key derivation, hex.
    fingerprint: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fingerprint_next: Option<String>,
    /// False: made with `init --no-requirements`.
    #[serde(default = "yes")]
    requirements: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    place: Option<Vec<Place>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    escrow: Option<Escrow>,
}

fn yes() -> bool {
    true
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    pub fingerprint: [u8; 32],
    /// Of the volume key that is to replace it, while that is under way.
    pub fingerprint_next: Option<[u8; 32]>,
    /// Whether the key must meet the requirements that byokfs could do without.
    pub requirements: bool,
    /// None: anywhere, with any version of any key.
    pub places: Option<Vec<Place>>,
    pub escrow: Option<Escrow>,
}

/// The backup of the key that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Escrow {
    /// The newest version that is in it.
    pub kek: String,
    /// RFC 3339, UTC.
    pub made: String,
    /// None: the key officer keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// Where a volume lies, and the key version of its envelope there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Of the machine, derived from its id.
    pub host: String,
    /// The backing directory.
    pub back: PathBuf,
    pub kek: String,
    /// A rotation to this one has begun; whether the envelope was replaced before a crash, it
    /// says itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kek_next: Option<String>,
}

/// What a volume's pin says of where it lies now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    Confirmed,
    /// Never opened here.
    Elsewhere,
    /// Opened here, with this other key version.
    OtherKey(String),
}

impl Pin {
    /// The volume keys that are accepted.
    pub fn pinned(&self) -> Pinned {
        Pinned { current: self.fingerprint, next: self.fingerprint_next }
    }

    pub fn standing(&self, back: &Path, kid: &str) -> Standing {
        let Some(places) = &self.places else { return Standing::Confirmed };
        let host = this_host();
        match places.iter().find(|place| place.host == host && place.back == back) {
            None => Standing::Elsewhere,
            Some(place) if place.kek == kid || place.kek_next.as_deref() == Some(kid) => {
                Standing::Confirmed
            }
            Some(place) => Standing::OtherKey(place.kek.clone()),
        }
    }

    /// The same with the volume at `back` on this host confirmed with key version `kid`, and
    /// `next` too while a rotation is under way. Unchanged where places do not matter.
    fn with_place(mut self, back: &Path, kid: &str, next: Option<&str>) -> Pin {
        let Some(places) = &mut self.places else { return self };
        let host = this_host();
        let kek_next = next.map(str::to_owned);
        let place = Place { host, back: back.to_owned(), kek: kid.to_owned(), kek_next };
        let known =
            places.iter_mut().find(|known| known.host == place.host && known.back == place.back);
        match known {
            Some(known) => *known = place,
            None => places.push(place),
        }
        self
    }

    fn to_text(&self, uuid: &[u8; 16]) -> Result<String> {
        let entry = Entry {
            fingerprint: hex::encode(&self.fingerprint),
            fingerprint_next: self.fingerprint_next.as_ref().map(|next| hex::encode(next)),
            requirements: self.requirements,
            place: self.places.clone(),
            escrow: self.escrow.clone(),
        };
        let body = toml::to_string(&entry)
            .map_err(|error| Error::new(Kind::Io, "cannot write a pin").with_source(error))?;
        Ok(format!("# Volume key of the byokfs volume {}.\n{body}", hex::uuid(uuid)))
    }
}

/// A name for this machine that is of no use elsewhere; empty where it has no id.
pub fn this_host() -> String {
    let Ok(id) = fs::read_to_string(MACHINE_ID) else { return String::new() };
    let id = id.trim();
    if id.is_empty() {
        return String::new();
    }
    let name = format!("byokfs host {id}");
    hex::encode(&ring::digest::digest(&ring::digest::SHA256, name.as_bytes()).as_ref()[..16])
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
    let text = pin.to_text(uuid)?;
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

/// The volume at `back` is confirmed there with key version `kid`, and with `next` as long as a
/// rotation to that is under way. Durable when this returns.
pub fn confirm(
    config_dir: &Path,
    uuid: &[u8; 16],
    back: &Path,
    kid: &str,
    next: Option<&str>,
) -> Result<()> {
    update(config_dir, uuid, |pin| pin.with_place(back, kid, next))
}

/// Another volume key is accepted besides the one that was.
pub fn begin_volume_key(config_dir: &Path, uuid: &[u8; 16], next: [u8; 32]) -> Result<()> {
    update(config_dir, uuid, |pin| Pin { fingerprint_next: Some(next), ..pin })
}

/// Only this volume key is accepted from now on. The pin with the one before it is kept beside it,
/// for copies of the volume from before.
pub fn end_volume_key(
    config_dir: &Path,
    uuid: &[u8; 16],
    fingerprint: [u8; 32],
    old_id: u32,
) -> Result<()> {
    let old = read(config_dir, uuid)?;
    if old.fingerprint_next == Some(fingerprint) {
        let kept = path(config_dir, uuid).with_extension(format!("toml.volume-key-{old_id}"));
        let failed = || format!("cannot write {}", kept.display());
        let text = Pin { fingerprint_next: None, ..old }.to_text(uuid)?;
        match fs::remove_file(&kept) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => write(&kept, &text),
        }
        .context(failed)?;
    }
    update(config_dir, uuid, |pin| match pin.pinned().has(&fingerprint) {
        true => Pin { fingerprint, fingerprint_next: None, ..pin },
        // Another rotation has ended since the caller looked.
        false => pin,
    })
}

/// Records the backup of the key.
pub fn note_escrow(config_dir: &Path, uuid: &[u8; 16], escrow: Escrow) -> Result<()> {
    update(config_dir, uuid, |pin| Pin { escrow: Some(escrow), ..pin })
}

fn update(config_dir: &Path, uuid: &[u8; 16], change: impl FnOnce(Pin) -> Pin) -> Result<()> {
    let path = path(config_dir, uuid);
    let dir = config_dir.join(DIR);
    let failed = || format!("cannot write the pin {}", path.display());
    let locked = File::open(&dir).context(failed)?;
    // Two copies of a volume on one host share its pin.
    rustix::fs::flock(&locked, rustix::fs::FlockOperation::LockExclusive).context(failed)?;
    let before = read(config_dir, uuid)?;
    let pin = change(before.clone());
    if pin == before {
        return Ok(());
    }
    let text = pin.to_text(uuid)?;
    let temporary = dir.join(format!(".{}.new", hex::uuid(uuid)));
    let replace = || {
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        write(&temporary, &text)?;
        fs::rename(&temporary, &path)?;
        locked.sync_all()
    };
    replace().context(failed)
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// The volume's pin; a volume without one is refused.
pub fn read(config_dir: &Path, uuid: &[u8; 16]) -> Result<Pin> {
    find(config_dir, uuid)?.ok_or_else(|| {
        Error::new(
            Kind::Denied,
            format!(
                "this host has no pin for volume {}: copy {} from the host that made the volume, \
                 by a way you trust, to {}",
                hex::uuid(uuid),
                Path::new(DIR).join(format!("{}.toml", hex::uuid(uuid))).display(),
                path(config_dir, uuid).display()
            ),
        )
    })
}

/// The volume's pin, if this host has one.
pub fn find(config_dir: &Path, uuid: &[u8; 16]) -> Result<Option<Pin>> {
    let path = path(config_dir, uuid);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(format!("cannot read {}", path.display()), error)),
    };
    let wrong = || Error::new(Kind::Config, format!("{} is not a volume's pin", path.display()));
    let entry: Entry = toml::from_str(&text).map_err(|error| wrong().with_source(error))?;
    let digest = |text: &str| -> Result<[u8; 32]> {
        hex::decode(text).ok_or_else(wrong)?.try_into().map_err(|_| wrong())
    };
    Ok(Some(Pin {
        fingerprint: digest(&entry.fingerprint)?,
        fingerprint_next: entry.fingerprint_next.as_deref().map(digest).transpose()?,
        requirements: entry.requirements,
        places: entry.place,
        escrow: entry.escrow,
    }))
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

    fn one() -> Pin {
        Pin {
            fingerprint: [1; 32],
            fingerprint_next: None,
            requirements: false,
            places: Some(Vec::new()),
            escrow: None,
        }
    }

    fn other() -> Pin {
        Pin { fingerprint: [2; 32], requirements: true, places: None, ..one() }
    }

    #[test]
    fn a_pin_is_private_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = [7; 16];
        assert_eq!(read(dir.path(), &uuid).unwrap_err().kind, Kind::Denied);
        let path = create(dir.path(), &uuid, &one()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read(dir.path(), &uuid).unwrap(), one());
        assert!(create(dir.path(), &uuid, &other()).is_err());
        assert_eq!(read(dir.path(), &uuid).unwrap(), one());
        assert_eq!(fs::read_dir(dir.path().join(DIR)).unwrap().count(), 1);
        remove(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn nonsense_is_not_a_pin() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = [7; 16];
        let path = create(dir.path(), &uuid, &one()).unwrap();
        for text in ["fingerprint = \"zz\"", "fingerprint = \"aa\"", "x = 1", "fingerprint = 1"] {
            fs::write(&path, text).unwrap();
            assert_eq!(read(dir.path(), &uuid).unwrap_err().kind, Kind::Config, "{text}");
        }
    }

    #[test]
    fn a_place_is_confirmed_with_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let (uuid, back, copy) = ([7; 16], Path::new("/srv/back"), Path::new("/srv/copy"));
        create(dir.path(), &uuid, &one()).unwrap();
        let standing = |back, kid| read(dir.path(), &uuid).unwrap().standing(back, kid);
        assert_eq!(standing(back, "k/1"), Standing::Elsewhere);
        confirm(dir.path(), &uuid, back, "k/1", None).unwrap();
        assert_eq!(standing(back, "k/1"), Standing::Confirmed);
        assert_eq!(standing(back, "k/2"), Standing::OtherKey("k/1".into()));
        assert_eq!(standing(copy, "k/1"), Standing::Elsewhere);
        confirm(dir.path(), &uuid, copy, "k/1", None).unwrap();
        // A rotation: either of the two while it is under way, then the new one only.
        confirm(dir.path(), &uuid, back, "k/1", Some("k/2")).unwrap();
        assert_eq!(standing(back, "k/1"), Standing::Confirmed);
        assert_eq!(standing(back, "k/2"), Standing::Confirmed);
        confirm(dir.path(), &uuid, back, "k/2", None).unwrap();
        assert_eq!(standing(back, "k/1"), Standing::OtherKey("k/2".into()));
        assert_eq!(standing(copy, "k/1"), Standing::Confirmed);
        let pin = read(dir.path(), &uuid).unwrap();
        assert_eq!((pin.fingerprint, pin.requirements), ([1; 32], false));
        assert_eq!(fs::read_dir(dir.path().join(DIR)).unwrap().count(), 1);
        let mode = fs::metadata(path(dir.path(), &uuid)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_new_volume_key_is_accepted_beside_the_old_one_and_then_alone() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = [7; 16];
        create(dir.path(), &uuid, &one()).unwrap();
        begin_volume_key(dir.path(), &uuid, [5; 32]).unwrap();
        let pinned = || read(dir.path(), &uuid).unwrap().pinned();
        assert!(pinned().has(&[1; 32]) && pinned().has(&[5; 32]) && !pinned().has(&[6; 32]));
        for _ in 0..2 {
            end_volume_key(dir.path(), &uuid, [5; 32], 1).unwrap();
            assert_eq!(pinned(), (&[5; 32]).into());
        }
        // The old pin is there for who needs it.
        let kept = path(dir.path(), &uuid).with_extension("toml.volume-key-1");
        fs::rename(kept, path(dir.path(), &uuid)).unwrap();
        assert_eq!(pinned(), (&[1; 32]).into());
    }

    #[test]
    fn of_another_host_it_is_not() {
        let place = Place {
            host: "another".into(),
            back: "/srv/back".into(),
            kek: "k/1".into(),
            kek_next: None,
        };
        let pin = Pin { places: Some(vec![place]), ..one() };
        assert_eq!(pin.standing(Path::new("/srv/back"), "k/1"), Standing::Elsewhere);
    }

    #[test]
    fn a_pin_without_places_confirms_everything_and_stays_so() {
        let dir = tempfile::tempdir().unwrap();
        let uuid = [7; 16];
        create(dir.path(), &uuid, &other()).unwrap();
        confirm(dir.path(), &uuid, Path::new("/srv/back"), "k/1", None).unwrap();
        let pin = read(dir.path(), &uuid).unwrap();
        assert_eq!(pin, other());
        assert_eq!(pin.standing(Path::new("/x"), "k/9"), Standing::Confirmed);
    }
}
