//! Files that hold a secret: a header, a password, a private key, a PIN.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::crypto::secret::SecretString;
use crate::error::{Context, Error, Kind, Result};
use crate::sync::Mutex;

/// A secret is a line, a token or a private key: nothing longer is read.
const LIMIT: u64 = 15 * 1024;

/// A secret that its file may renew at any time. While the file cannot be read, what it last held
/// counts: who holds it is asked for the verdict, and not the file.
pub(super) struct SecretFile {
    key: &'static str,
    path: PathBuf,
    read: fn(&str, &Path) -> Result<SecretString>,
    last: Mutex<Arc<SecretString>>,
}

impl SecretFile {
    /// One that nobody else may read; it must be there now. `key` is the configuration's name.
    pub(super) fn private(key: &'static str, path: &Path) -> Result<SecretFile> {
        SecretFile::open(key, path, read_private)
    }

    /// One that others put there with the modes that they choose.
    pub(super) fn any(key: &'static str, path: &Path) -> Result<SecretFile> {
        SecretFile::open(key, path, read_any)
    }

    fn open(
        key: &'static str,
        path: &Path,
        read: fn(&str, &Path) -> Result<SecretString>,
    ) -> Result<SecretFile> {
        let last = Mutex::new(Arc::new(read(key, path)?));
        Ok(SecretFile { key, path: path.to_owned(), read, last })
    }

    pub(super) fn get(&self) -> Arc<SecretString> {
        let mut last = self.last.lock();
        match (self.read)(self.key, &self.path) {
            Ok(secret) => *last = Arc::new(secret),
            Err(error) => log::warn!("{error}; going on with what it held before"),
        }
        Arc::clone(&last)
    }

    /// As messages name it.
    pub(super) fn name(&self) -> String {
        format!("{} {}", self.key, self.path.display())
    }
}

/// The text of a file that nobody but its owner, who is we or root, may read, without the line's
/// end. `key` is the configuration's name for it.
fn read_private(key: &str, path: &Path) -> Result<SecretString> {
    let name = || format!("{key} {}", path.display());
    let file = regular_file(path).context(name)?;
    let metadata = file.metadata().context(name)?;
    let me = rustix::process::geteuid().as_raw();
    if metadata.permissions().mode() & 0o077 != 0 || ![0, me].contains(&metadata.uid()) {
        let why = "is readable by others, or another's: chown it and chmod it to 0600";
        return Err(Error::new(Kind::Config, format!("{} {why}", name())));
    }
    read(&name(), &file)
}

/// As [`read_private`], for what others put there with the modes that they choose.
fn read_any(key: &str, path: &Path) -> Result<SecretString> {
    let name = format!("{key} {}", path.display());
    let file = regular_file(path).context(|| name.clone())?;
    read(&name, &file)
}

/// A pipe that nobody writes to would hold up whoever opens it, a probe for example.
pub(super) fn regular_file(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

fn read(name: &str, file: &File) -> Result<SecretString> {
    let refused = |why: &str| Error::new(Kind::Config, format!("{name} {why}"));
    let mut text = String::new();
    file.take(LIMIT + 1).read_to_string(&mut text).context(|| name.to_owned())?;
    if text.len() as u64 > LIMIT {
        return Err(refused("is too long"));
    }
    text.truncate(text.trim_end().len());
    if text.is_empty() {
        return Err(refused("is empty"));
    }
    SecretString::from_string_wiping(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_private_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("header");
        std::fs::write(&path, "s3cret\n").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        assert!(read_private("pin_file", &path).unwrap_err().to_string().contains("0600"));
        assert!(read_any("token_file", &path).unwrap().ct_eq("s3cret"));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        assert!(read_private("pin_file", &path).unwrap().ct_eq("s3cret"));
        // A pipe, where opening it would wait for a writer.
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        for read in [read_private, read_any] {
            assert!(read("pin_file", &pipe).unwrap_err().to_string().contains("pin_file"));
        }
    }

    #[test]
    fn a_secret_is_renewed_and_outlives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        assert!(SecretFile::any("token_file", &path).is_err());
        std::fs::write(&path, "one").unwrap();
        let file = SecretFile::any("token_file", &path).unwrap();
        std::fs::write(&path, "two").unwrap();
        assert!(file.get().ct_eq("two"));
        std::fs::remove_file(&path).unwrap();
        assert!(file.get().ct_eq("two"));
        std::fs::write(&path, "three").unwrap();
        assert!(file.get().ct_eq("three"));
    }

    #[test]
    fn what_is_no_secret_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("header");
        for (content, why) in [("\n".to_owned(), "is empty"), ("x".repeat(20_000), "too long")] {
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
            let message = read_private("pin_file", &path).unwrap_err().to_string();
            assert!(message.starts_with("pin_file") && message.contains(why), "{message}");
        }
        let missing = read_any("token_file", &dir.path().join("none")).unwrap_err();
        assert!(missing.to_string().contains("token_file"));
    }
}
