//! Small files that are read and replaced whole, such as the envelope.
//!
//! A replacement is atomic: the new content is complete and on stable storage before it gets the
//! name. A crash may leave the name that it had until then, which the next replacement removes.

use std::io;

use super::{Access, FileKind, NodeRef, RenameMode};

/// Fails for what is no regular file, or larger than `limit` bytes.
pub fn read(dir: &NodeRef, name: &[u8], limit: u64) -> io::Result<Vec<u8>> {
    let node = dir.lookup(name)?;
    let metadata = node.metadata()?;
    if metadata.kind != FileKind::Regular || metadata.size > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a small regular file"));
    }
    let mut bytes = vec![0; usize::try_from(metadata.size).unwrap_or(0)];
    let count = node.open(Access::Read)?.read_at(&mut bytes, 0)?;
    bytes.truncate(count);
    Ok(bytes)
}

/// A file with this content, under a name that counts for nothing.
pub fn prepare(dir: &NodeRef, temporary: &[u8], content: &[u8]) -> io::Result<()> {
    let file = dir.create_unnamed()?;
    file.write_at(content, 0)?;
    file.sync_all()?;
    remove_if_there(dir, temporary)?;
    dir.link_file(&*file, temporary)
}

/// Gives what was prepared its name. Durable when this returns.
pub fn take(dir: &NodeRef, temporary: &[u8], name: &[u8]) -> io::Result<()> {
    dir.rename(temporary, &**dir, name, RenameMode::Replace)?;
    dir.sync()
}

/// Both.
pub fn replace(dir: &NodeRef, temporary: &[u8], name: &[u8], content: &[u8]) -> io::Result<()> {
    prepare(dir, temporary, content)?;
    take(dir, temporary, name)
}

pub fn remove_if_there(dir: &NodeRef, name: &[u8]) -> io::Result<()> {
    match dir.unlink(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
