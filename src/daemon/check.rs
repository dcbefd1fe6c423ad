//! What must hold of a mount point, and of the daemon's own paths, before a mount.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::mountinfo::{self, FS_TYPE};
use super::plan::Plan;
use crate::error::{Context, Error, Kind, Result};

/// An empty directory that no byokfs mount lies on, and apart from the backing directory.
pub fn mount_point(back: &Path, mnt: &Path) -> Result<()> {
    let busy = |why: String| Err(Error::new(Kind::Busy, why));
    if let Some(mount) = mountinfo::at(mnt)?
        && mount.fs_type == FS_TYPE
    {
        return busy(format!(
            "{} is mounted already, with {}",
            mnt.display(),
            mount.source.display()
        ));
    }
    if let Some(mount) = mountinfo::find(back)?
        && mount.source == back
    {
        return busy(format!(
            "{} is mounted already, at {}",
            back.display(),
            mount.mount_point.display()
        ));
    }
    if mnt.starts_with(back) || back.starts_with(mnt) {
        return busy(format!(
            "the mount point {} and the backing directory {} lie within each other",
            mnt.display(),
            back.display()
        ));
    }
    let mut entries =
        fs::read_dir(mnt).context(|| format!("cannot use {} as a mount point", mnt.display()))?;
    if entries.next().is_some() {
        return busy(format!("the mount point {} is not empty", mnt.display()));
    }
    Ok(())
}

/// The daemon must never touch its own mount: it would wait for itself.
pub fn own_paths(plan: &Plan) -> Result<()> {
    let config = &plan.config;
    let paths = [
        ("the configuration", Some(&plan.config_dir)),
        ("run.dir", Some(&config.run.dir)),
        ("audit.file", config.audit.file.as_ref()),
        ("alert.command", config.alert.command.as_ref()),
        ("log.file", config.log.file.as_ref()),
        ("fence.socket", config.fence.socket.as_ref()),
        ("fence.pid_file", config.fence.pid_file.as_ref()),
        ("fence.option_file", config.fence.option_file.as_ref()),
    ];
    let of_key = config.services().flat_map(|(section, key)| {
        key.files().map(|(name, path)| (format!("{section}{name}"), path))
    });
    let paths = paths.map(|(name, path)| (name.to_owned(), path.map(PathBuf::as_path)));
    for (key, path) in paths.into_iter().chain(of_key) {
        let Some(path) = path else { continue };
        if real(path).starts_with(&plan.mnt) {
            return Err(Error::new(
                Kind::Config,
                format!(
                    "{key} {} lies on the mount {} itself: put it elsewhere",
                    path.display(),
                    plan.mnt.display()
                ),
            ));
        }
    }
    Ok(())
}

/// Absolute, with the symbolic links of the part that exists resolved.
pub fn real(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path);
    let path = absolute.as_deref().unwrap_or(path);
    let mut missing = Vec::new();
    let mut existing = path;
    loop {
        if let Ok(real) = fs::canonicalize(existing) {
            return missing.iter().rev().fold(real, |path, name| path.join(name));
        }
        let (Some(parent), Some(name)) = (existing.parent(), existing.file_name()) else {
            return path.to_owned();
        };
        missing.push(name);
        existing = parent;
    }
}

/// Absolute, without symbolic links. A dead mount is named as such.
pub fn resolve(what: &str, path: &Path) -> Result<PathBuf> {
    fs::canonicalize(path).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOTCONN) => {
            let path = path.display();
            let message = format!(
                "{what} {path} is a mount whose daemon is gone: take it away with `umount --lazy \
                 {path}`"
            );
            Error::new(Kind::Busy, message)
        }
        _ => Error::io(format!("cannot use {what} {}", path.display()), error),
    })
}

/// Makes the directory of a file the daemon is to write.
pub fn parent_dir(file: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let Some(dir) = file.parent() else { return Ok(()) };
    match fs::DirBuilder::new().recursive(true).mode(0o750).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).context(|| format!("cannot make {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points() {
        let dir = tempfile::tempdir().unwrap();
        let dir = fs::canonicalize(dir.path()).unwrap();
        let path = |name: &str| {
            let path = dir.join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let (back, mnt) = (path("back"), path("mnt"));
        mount_point(&back, &mnt).unwrap();
        fs::write(mnt.join("file"), "").unwrap();
        let kind = |back: &Path, mnt: &Path| mount_point(back, mnt).unwrap_err().kind;
        assert_eq!(kind(&back, &mnt), Kind::Busy);
        assert_eq!(kind(&back, &back), Kind::Busy);
        assert_eq!(kind(&back, &path("back/inner")), Kind::Busy);
        assert_eq!(kind(&back, &dir.join("missing")), Kind::Io);
        assert_eq!(kind(&back, &mnt.join("file")), Kind::Io);
    }

    #[test]
    fn missing_parts_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let real_dir = fs::canonicalize(dir.path()).unwrap();
        std::os::unix::fs::symlink(&real_dir, real_dir.join("link")).unwrap();
        assert_eq!(real(&real_dir.join("link/a/b")), real_dir.join("a/b"));
        let here = fs::canonicalize(".").unwrap();
        assert_eq!(real(Path::new("no-such-file")), here.join("no-such-file"));
    }
}
