//! Where something is: below the backing directory, and below the mount.

use std::sync::Arc;

/// A name on the disk and what it means, and those of the directories above it.
#[derive(Debug)]
pub(super) struct Place {
    above: Option<Arc<Place>>,
    disk: Vec<u8>,
    /// None where it cannot be read.
    plain: Option<Vec<u8>>,
}

impl Place {
    /// That of the logical root; `tree` is the path of its directory.
    pub(super) fn root(tree: String) -> Arc<Place> {
        Arc::new(Place { above: None, disk: tree.into_bytes(), plain: Some(Vec::new()) })
    }

    pub(super) fn below(self: &Arc<Place>, disk: Vec<u8>, plain: Option<Vec<u8>>) -> Arc<Place> {
        Arc::new(Place { above: Some(self.clone()), disk, plain })
    }

    pub(super) fn backing(&self) -> String {
        let own = String::from_utf8_lossy(&self.disk);
        match &self.above {
            Some(above) => format!("{}/{own}", above.backing()),
            None => own.into_owned(),
        }
    }

    /// None where a name on the way cannot be read.
    pub(super) fn logical(&self) -> Option<String> {
        let path = self.logical_below()?;
        Some(if path.is_empty() { "/".to_owned() } else { path })
    }

    fn logical_below(&self) -> Option<String> {
        let plain = String::from_utf8_lossy(self.plain.as_deref()?);
        match &self.above {
            Some(above) => Some(format!("{}/{plain}", above.logical_below()?)),
            None => Some(String::new()),
        }
    }

    pub(super) fn name(&self) -> &[u8] {
        &self.disk
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let root = Place::root("/b/tree".into());
        let dir = root.below(b"QQ".to_vec(), Some(b"d".to_vec()));
        let file = dir.below(b"Rg".to_vec(), Some(b"f".to_vec()));
        assert_eq!((root.logical().unwrap(), root.backing()), ("/".into(), "/b/tree".into()));
        assert_eq!(
            (file.logical().unwrap(), file.backing()),
            ("/d/f".into(), "/b/tree/QQ/Rg".into())
        );
        let hidden = dir.below(b"x".to_vec(), None).below(b"y".to_vec(), Some(b"y".to_vec()));
        assert_eq!((hidden.logical(), hidden.backing()), (None, "/b/tree/QQ/x/y".into()));
    }
}
