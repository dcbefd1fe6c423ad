//! Directory trees: fingerprints, and searches for words.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Every path below `root`, `root` itself first, in a stable order; symbolic links not followed.
pub fn paths(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![root.to_owned()];
    let mut next = 0;
    while next < found.len() {
        let path = found[next].clone();
        next += 1;
        if fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir()) {
            let mut names: Vec<PathBuf> =
                fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).collect();
            names.sort();
            found.extend(names);
        }
    }
    found
}

pub fn files(root: &Path) -> Vec<PathBuf> {
    paths(root).into_iter().filter(|path| fs::symlink_metadata(path).unwrap().is_file()).collect()
}

/// Names, modes, owners, sizes and contents: equal before and after means nothing on disk changed.
/// Lock files are left out: taking a lock is no change of the volume.
pub fn fingerprint(root: &Path) -> String {
    let mut lines = String::new();
    for path in paths(root) {
        if path.file_name().is_some_and(|name| name == "lock") {
            continue;
        }
        let meta = fs::symlink_metadata(&path).unwrap();
        let content = match meta.is_file() {
            true => digest(&fs::read(&path).unwrap()),
            false => String::new(),
        };
        lines += &format!(
            "{} {:o} {}:{} {} {content}\n",
            path.strip_prefix(root).unwrap().display(),
            meta.permissions().mode(),
            meta.uid(),
            meta.gid(),
            if meta.is_file() { meta.len() } else { 0 },
        );
    }
    lines
}

fn digest(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Paths below `root` whose name or content holds `word`.
pub fn holding(root: &Path, word: &[u8]) -> Vec<PathBuf> {
    paths(root)
        .into_iter()
        .filter(|path| {
            let name = path.file_name().map(|name| name.as_bytes()).unwrap_or_default();
            let in_name = path != root && find(name, word).is_some();
            let in_file = || {
                fs::symlink_metadata(path).unwrap().is_file()
                    && find(&fs::read(path).unwrap(), word).is_some()
            };
            in_name || in_file()
        })
        .collect()
}

pub fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    let (&first, rest) = needle.split_first()?;
    let mut from = 0;
    while let Some(at) = hay[from..].iter().position(|byte| *byte == first) {
        let at = from + at;
        if hay[at + 1..].starts_with(rest) {
            return Some(at);
        }
        from = at + 1;
    }
    None
}
