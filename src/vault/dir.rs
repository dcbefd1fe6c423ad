//! The vault's directory: names, modes, the lock, the root key, files written whole or not at all.
//!
//! | file | holds |
//! |---|---|
//! | `vault.db` | everything that lasts; its presence means that `init` finished |
//! | `root.key` | 32 random bytes that seal the private keys in `vault.db` |
//! | `ca.pem` | certificate a client must trust |
//! | `admin.header` | header secret of the administrator's identity |
//! | `identities/NAME.header` | header secrets of other identities, as `vault identity create` writes them |
//! | `url`, `identity.url` | where the server listens; there while it runs |
//! | `audit.jsonl` | one line per call |
//! | `lock` | held by the one server |

use std::fs::{File, OpenOptions, Permissions as Mode};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::crypto::random;
use crate::crypto::secret::{Secret, SecretString};
use crate::error::{Context, Error, Kind, Result};

/// Far above any header secret or URL.
const MAX_SMALL_FILE: u64 = 4096;

#[derive(Debug, Clone)]
pub struct VaultDir {
    path: PathBuf,
}

/// Held for as long as the server, or `init`, works on the directory.
#[derive(Debug)]
pub(crate) struct DirLock(#[allow(dead_code, reason = "held, never read")] File);

impl VaultDir {
    /// Names a directory without looking at it.
    pub fn new(path: impl Into<PathBuf>) -> VaultDir {
        VaultDir { path: path.into() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn ca_certificate(&self) -> PathBuf {
        self.path.join("ca.pem")
    }

    pub fn admin_header(&self) -> PathBuf {
        self.path.join("admin.header")
    }

    pub fn identity_header(&self, name: &str) -> PathBuf {
        self.path.join("identities").join(format!("{name}.header"))
    }

    pub fn url_file(&self) -> PathBuf {
        self.path.join("url")
    }

    pub fn identity_url_file(&self) -> PathBuf {
        self.path.join("identity.url")
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.path.join("vault.db")
    }

    pub(crate) fn root_key(&self) -> PathBuf {
        self.path.join("root.key")
    }

    pub(crate) fn audit_log(&self) -> PathBuf {
        self.path.join("audit.jsonl")
    }

    pub(crate) fn lock_file(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// Fails unless `init` has finished here and nobody but the owner gets in.
    pub(crate) fn require_vault(&self) -> Result<()> {
        self.require_private()?;
        if !self.database().exists() {
            return Err(Error::new(
                Kind::NotAVolume,
                format!(
                    "{} is not a key vault; `byokfs vault init {0}` makes one",
                    self.path.display()
                ),
            ));
        }
        Ok(())
    }

    pub(crate) fn require_private(&self) -> Result<()> {
        let metadata = std::fs::metadata(&self.path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Error::new(
                Kind::NotAVolume,
                format!("{} does not exist; `byokfs vault init {0}` makes it", self.path.display()),
            ),
            _ => Error::io(format!("cannot look at {}", self.path.display()), error),
        })?;
        if !metadata.is_dir() {
            return Err(Error::new(
                Kind::NotAVolume,
                format!("{} is not a directory", self.path.display()),
            ));
        }
        require_owner_only(&self.path, &metadata, "0700")
    }

    /// Creates the directory, or takes an empty one over, with mode 0700.
    pub(crate) fn create(&self) -> Result<()> {
        match std::fs::DirBuilder::new().mode(0o700).create(&self.path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                std::fs::set_permissions(&self.path, Mode::from_mode(0o700))
                    .context(|| format!("cannot set the mode of {}", self.path.display()))
            }
            Err(error) => Err(Error::io(format!("cannot create {}", self.path.display()), error)),
        }
    }

    /// `Busy` when another server holds it.
    pub(crate) fn lock(&self) -> Result<DirLock> {
        let path = self.lock_file();
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .context(|| format!("cannot open {}", path.display()))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(DirLock(file)),
            Err(Errno::WOULDBLOCK) => Err(Error::new(
                Kind::Busy,
                format!("another server already serves the vault {}", self.path.display()),
            )),
            Err(error) => Err(Error::io(format!("cannot lock {}", path.display()), error.into())),
        }
    }

    /// Reads the root key, refusing a file that anyone else could read.
    pub(crate) fn read_root_key(&self) -> Result<Secret<32>> {
        VaultDir::read_root_key_at(&self.root_key())
    }

    pub(crate) fn read_root_key_at(path: &Path) -> Result<Secret<32>> {
        let mut file = open_private(path)?;
        let mut bytes = [0u8; 33];
        let mut len = 0;
        while len < bytes.len() {
            let read = file
                .read(&mut bytes[len..])
                .context(|| format!("cannot read {}", path.display()))?;
            if read == 0 {
                break;
            }
            len += read;
        }
        Secret::from_slice_wiping(&mut bytes[..len])?.ok_or_else(|| {
            Error::corrupt(format!(
                "{} is not 32 bytes long; put the root key of this vault back",
                path.display()
            ))
        })
    }

    /// Reads a header secret from a file that only its owner may read.
    pub fn read_header(path: &Path) -> Result<SecretString> {
        let mut file = open_private(path)?;
        let text = read_small(&mut file, path)?;
        SecretString::from_string_wiping(text.trim().to_owned())
    }

    /// Where the running server listens; `Unreachable` when none does.
    pub fn read_url(&self, path: &Path) -> Result<String> {
        match File::open(path) {
            Ok(mut file) => Ok(read_small(&mut file, path)?.trim().to_owned()),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(Error::new(
                Kind::Unreachable,
                format!(
                    "the vault is not running ({} is not there); start it with \
                     `byokfs vault serve {}`",
                    path.display(),
                    self.path.display()
                ),
            )),
            Err(error) => Err(Error::io(format!("cannot read {}", path.display()), error)),
        }
    }

    pub(crate) fn sync(&self) -> Result<()> {
        sync_dir(&self.path)
    }
}

fn read_small(file: &mut File, path: &Path) -> Result<String> {
    let mut text = String::new();
    file.take(MAX_SMALL_FILE)
        .read_to_string(&mut text)
        .context(|| format!("cannot read {}", path.display()))?;
    Ok(text)
}

/// Opens a secret's file, which must be a regular file of ours with no access for others.
fn open_private(path: &Path) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .context(|| format!("cannot open {}", path.display()))?;
    let metadata = file.metadata().context(|| format!("cannot look at {}", path.display()))?;
    if !metadata.is_file() {
        return Err(Error::new(Kind::Denied, format!("{} is not a regular file", path.display())));
    }
    require_owner_only(path, &metadata, "0600")?;
    Ok(file)
}

fn require_owner_only(path: &Path, metadata: &std::fs::Metadata, wanted: &str) -> Result<()> {
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Error::new(
            Kind::Denied,
            format!(
                "{} has mode {mode:04o}: others could get at the vault's keys; \
                 make sure nobody did, then `chmod {wanted} {0}`",
                path.display()
            ),
        ));
    }
    let me = rustix::process::geteuid().as_raw();
    if metadata.uid() != me {
        return Err(Error::new(
            Kind::Denied,
            format!(
                "{} belongs to user {}, not to user {me} who runs this",
                path.display(),
                metadata.uid()
            ),
        ));
    }
    Ok(())
}

pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    match File::open(path).and_then(|dir| dir.sync_all()) {
        // Some network file systems cannot flush a directory: nothing failed.
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
        flushed => flushed.context(|| format!("cannot flush the directory {}", path.display())),
    }
}

/// Replaces `path` by a file with these bytes: a reader sees the old or the new one, whole.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.new", hex_suffix()?));
    let temporary = path.with_file_name(name);
    let written = write_new(&temporary, bytes, mode).and_then(|()| {
        std::fs::rename(&temporary, path)
            .context(|| format!("cannot rename {} to {}", temporary.display(), path.display()))
    });
    if written.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(&temporary);
    }
    written?;
    sync_dir(path.parent().unwrap_or(Path::new("/")))
}

/// Writes and flushes a file that must not be there yet. It lasts when this returns, and is not
/// there if this fails: half of it would stand in the way of the next try.
pub fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .context(|| format!("cannot create {}", path.display()))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let written = file
        .set_permissions(Mode::from_mode(mode))
        .and_then(|()| file.write_all(bytes))
        .and_then(|()| file.sync_all())
        .context(|| format!("cannot write {}", path.display()))
        .and_then(|()| sync_dir(parent.unwrap_or(Path::new("."))));
    if written.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(path);
    }
    written
}

pub(crate) fn remove_if_there(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

fn hex_suffix() -> Result<String> {
    Ok(super::codec::to_hex(&random::bytes::<6>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vault_dir() -> (tempfile::TempDir, VaultDir) {
        let parent = tempfile::tempdir().unwrap();
        let dir = VaultDir::new(parent.path().join("v"));
        dir.create().unwrap();
        (parent, dir)
    }

    #[test]
    fn a_root_key_others_could_read_is_refused() {
        let (_parent, dir) = vault_dir();
        write_new(&dir.root_key(), &[7; 32], 0o600).unwrap();
        assert_eq!(dir.read_root_key().unwrap().expose(), &[7; 32]);
        for mode in [0o644, 0o640, 0o604, 0o601] {
            std::fs::set_permissions(dir.root_key(), Mode::from_mode(mode)).unwrap();
            let error = dir.read_root_key().unwrap_err();
            assert_eq!(error.kind, Kind::Denied);
            assert!(error.to_string().contains("root.key"), "{error}");
        }
    }

    #[test]
    fn a_root_key_of_another_length_or_behind_a_link_is_refused() {
        let (_parent, dir) = vault_dir();
        for len in [0, 31, 33, 64] {
            write_atomic(&dir.root_key(), &vec![1; len], 0o600).unwrap();
            assert_eq!(dir.read_root_key().unwrap_err().kind, Kind::Corrupt);
        }
        let elsewhere = dir.path().join("elsewhere");
        write_new(&elsewhere, &[1; 32], 0o600).unwrap();
        std::fs::remove_file(dir.root_key()).unwrap();
        std::os::unix::fs::symlink(&elsewhere, dir.root_key()).unwrap();
        assert!(dir.read_root_key().is_err());
    }

    #[test]
    fn the_second_lock_is_refused_until_the_first_is_gone() {
        let (_parent, dir) = vault_dir();
        let first = dir.lock().unwrap();
        assert_eq!(dir.lock().unwrap_err().kind, Kind::Busy);
        drop(first);
        dir.lock().unwrap();
    }

    #[test]
    fn an_open_directory_is_refused() {
        let (_parent, dir) = vault_dir();
        std::fs::set_permissions(dir.path(), Mode::from_mode(0o755)).unwrap();
        assert_eq!(dir.require_private().unwrap_err().kind, Kind::Denied);
    }

    #[test]
    fn an_atomic_write_replaces_and_leaves_nothing_else() {
        let (_parent, dir) = vault_dir();
        write_atomic(&dir.url_file(), b"one", 0o600).unwrap();
        write_atomic(&dir.url_file(), b"two", 0o600).unwrap();
        assert_eq!(dir.read_url(&dir.url_file()).unwrap(), "two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
