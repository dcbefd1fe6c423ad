//! The volume's directory `lost/`: what is moved out of the way and never removed.
//!
//! Recovery moves names there that a crash has left without a file, and a repair what nobody can
//! reach. The new names are numbers; each is taken once.

use std::io;

use crate::backing::{Node, NodeRef, RenameMode};

/// Beside the tree.
pub const DIRECTORY: &[u8] = b"lost";

#[derive(Debug)]
pub struct Lost {
    dir: NodeRef,
    next: u32,
}

impl Lost {
    /// Makes the directory below the volume's root where there is none.
    pub fn open(root: &NodeRef) -> io::Result<Lost> {
        let dir = match root.lookup(DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                root.mkdir(DIRECTORY, 0o700)?
            }
            found => found?,
        };
        Ok(Lost { dir, next: 0 })
    }

    pub fn dir(&self) -> &NodeRef {
        &self.dir
    }

    /// A name that is not taken.
    pub fn free_name(&mut self) -> io::Result<String> {
        loop {
            let name = format!("{:08}", self.next);
            self.next = self.next.checked_add(1).ok_or(io::ErrorKind::StorageFull)?;
            match self.dir.lookup(name.as_bytes()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(name),
                Err(error) => return Err(error),
                Ok(_) => {}
            }
        }
    }

    /// Moves `name` of `from` here. The caller flushes.
    pub fn take(&self, from: &dyn Node, name: &[u8], as_name: &str) -> io::Result<()> {
        from.rename(name, &*self.dir, as_name.as_bytes(), RenameMode::NoReplace)
    }
}
