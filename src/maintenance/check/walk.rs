//! The walk through the tree: names, links, attributes; files are for the [`Pool`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::place::Place;
use super::pool::{Pool, Work};
use super::{Code, Finding, Job, unreadable};
use crate::backing::{FileKind, Metadata, NodeId, NodeRef};
use crate::error::{FsError, FsResult, Result};
use crate::store::lost::DIRECTORY;
use crate::store::verify::What;
use crate::vfs::verify::{EntryName, Names};

const READ: Code = Code::Store(What::Read);

struct Walk<'a, 'b> {
    job: &'a Job<'b>,
    pool: &'a Pool,
    /// Files with several names wait until all names are known.
    linked: HashMap<NodeId, Vec<(NodeRef, Arc<Place>)>>,
    /// Other things with several names that were looked at.
    seen: HashSet<NodeId>,
    /// Files in `links/` that a link refers to.
    targets: HashSet<Vec<u8>>,
    /// Everything could be looked at, so that what is not referred to belongs to nothing.
    complete: bool,
    /// The check has failed.
    stopped: bool,
}

/// A directory that is to be read.
struct Pending {
    above: NodeRef,
    place: Arc<Place>,
}

pub(super) fn run(job: &Job<'_>, pool: &Pool, progress: bool) -> Result<()> {
    let tree = job.volume.tree();
    if progress {
        job.found.report.total(space(&tree));
    }
    let path = format!("{}/tree", job.found.check.backing.display_path());
    let root = Place::root(path);
    let mut walk = Walk {
        job,
        pool,
        linked: HashMap::new(),
        seen: HashSet::new(),
        targets: HashSet::new(),
        complete: true,
        stopped: false,
    };
    attributes(job, &tree, &root)?;
    let mut pending = Vec::new();
    walk.directory(&tree, &root, &mut pending)?;
    while let Some(Pending { above, place }) = pending.pop() {
        if walk.stopped {
            return Ok(());
        }
        match above.lookup(place.name()) {
            Ok(node) => walk.directory(&node, &place, &mut pending)?,
            Err(error) => walk.cannot_read(&place, error)?,
        }
    }
    walk.files_with_several_names()?;
    walk.targets_of_links()
}

impl Walk<'_, '_> {
    fn directory(
        &mut self,
        node: &NodeRef,
        place: &Arc<Place>,
        pending: &mut Vec<Pending>,
    ) -> Result<()> {
        self.job.counts().directories.fetch_add(1, Ordering::Relaxed);
        let mut entries = match node.read_dir() {
            Ok(entries) => entries,
            Err(error) => return self.cannot_read(place, error),
        };
        loop {
            let entry = match entries.next_entry() {
                Ok(Some(entry)) if !self.stopped => entry,
                Ok(_) => return Ok(()),
                Err(error) => return self.cannot_read(place, error),
            };
            self.entry(node, place, entry.name, pending)?;
        }
    }

    fn entry(
        &mut self,
        dir: &NodeRef,
        above: &Arc<Place>,
        name: Vec<u8>,
        pending: &mut Vec<Pending>,
    ) -> Result<()> {
        let read = self.job.names.entry(dir, &name);
        let found = match dir.lookup(&name) {
            // A repair has moved it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            found => found.and_then(|node| Ok((node.metadata()?, node))),
        };
        let plain = match &read {
            Ok(EntryName::Listed(plain)) => plain.clone(),
            _ => None,
        };
        let place = above.below(name, plain);
        let (metadata, node) = match found {
            Ok(found) => found,
            Err(error) => return self.cannot_read(&place, error),
        };
        if metadata.id.dev != self.job.volume.tree().id().dev {
            return self.tell(Code::MountPoint, &place, "another file system is mounted on it");
        }
        match read {
            Err(error) => {
                self.cannot_open(&place, error)?;
                // No file of the mount, and not to be judged as one.
                if Names::is_side_file(place.name()) {
                    return Ok(());
                }
            }
            Ok(EntryName::Listed(_)) => {}
            Ok(EntryName::SideFile) => return Ok(()),
            Ok(EntryName::Orphan) => {
                let detail = "no entry has the long name that it holds";
                let finding = self.finding(Code::SideFile, &place, detail);
                return self.job.judge(finding, dir, place.name()).map(drop);
            }
            Ok(EntryName::Unreadable(why)) => {
                let finding = self.finding(Code::Name, &place, why);
                if self.job.judge(finding, dir, place.name())? {
                    return Ok(());
                }
            }
            Ok(EntryName::LongName(why)) => {
                let finding = self.finding(Code::LongName, &place, &why);
                if self.job.judge(finding, dir, place.name())? {
                    return self.side_file_of(&place, dir, above);
                }
            }
        }
        self.node(dir, node, &metadata, place, pending)
    }

    fn node(
        &mut self,
        dir: &NodeRef,
        node: NodeRef,
        metadata: &Metadata,
        place: Arc<Place>,
        pending: &mut Vec<Pending>,
    ) -> Result<()> {
        match metadata.kind {
            FileKind::Directory => {
                attributes(self.job, &node, &place)?;
                pending.push(Pending { above: dir.clone(), place });
                return Ok(());
            }
            FileKind::Regular if metadata.nlink > 1 => {
                self.linked.entry(metadata.id).or_default().push((dir.clone(), place));
                return Ok(());
            }
            FileKind::Regular => {
                let names = vec![(dir.clone(), place)];
                self.stopped |= !self.pool.push(Work { node, names });
                return Ok(());
            }
            _ => {}
        }
        if metadata.nlink > 1 && !self.seen.insert(metadata.id) {
            return Ok(());
        }
        attributes(self.job, &node, &place)?;
        if metadata.kind == FileKind::Symlink {
            self.link(&node, &place)?;
        }
        Ok(())
    }

    fn link(&mut self, node: &NodeRef, place: &Arc<Place>) -> Result<()> {
        self.job.counts().links.fetch_add(1, Ordering::Relaxed);
        match self.job.names.link(node) {
            Ok(link) => {
                self.targets.extend(link.target_file);
                match link.damage {
                    Some(damage) => self.tell(Code::Symlink, place, &damage),
                    None => Ok(()),
                }
            }
            Err(error) => self.cannot_open(place, error),
        }
    }

    /// After its entry was moved away, a side file belongs to nothing.
    fn side_file_of(&self, place: &Place, dir: &NodeRef, above: &Arc<Place>) -> Result<()> {
        let Some(side) = Names::side_file(place.name()) else { return Ok(()) };
        if dir.lookup(&side).is_err() {
            return Ok(());
        }
        let place = above.below(side, None);
        let finding = self.finding(Code::SideFile, &place, "its entry was moved away");
        self.job.judge(finding, dir, place.name()).map(drop)
    }

    fn files_with_several_names(&mut self) -> Result<()> {
        for (id, names) in std::mem::take(&mut self.linked) {
            let Some((dir, place)) = names.first() else { continue };
            match dir.lookup(place.name()) {
                Ok(node) if node.id() == id => {
                    if !self.pool.push(Work { node, names }) {
                        return Ok(());
                    }
                }
                Ok(_) => {}
                Err(error) => self.cannot_read(&place.clone(), error)?,
            }
        }
        Ok(())
    }

    /// What links in `lost/` refer to: put back, they must find it.
    fn targets_of_moved_links(&mut self) -> Result<()> {
        let check = self.job.found.check;
        let mut pending = vec![(check.backing.root(), DIRECTORY.to_vec())];
        while let Some((above, name)) = pending.pop() {
            let dir = match above.lookup(&name) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                dir => dir,
            };
            let looked = dir.map_err(FsError::from);
            let looked = looked.and_then(|dir| self.moved_links(&dir, &mut pending));
            if let Err(error) = looked {
                self.complete = false;
                let path = format!("{}/lost", check.backing.display_path());
                self.job.found.tell(Finding::new(READ, path, unreadable(error)?), None)?;
            }
        }
        Ok(())
    }

    fn moved_links(
        &mut self,
        dir: &NodeRef,
        pending: &mut Vec<(NodeRef, Vec<u8>)>,
    ) -> FsResult<()> {
        let mut entries = dir.read_dir()?;
        while let Some(entry) = entries.next_entry()? {
            let node = dir.lookup(&entry.name)?;
            match node.metadata()?.kind {
                FileKind::Directory => pending.push((dir.clone(), entry.name)),
                FileKind::Symlink => {
                    self.targets.extend(self.job.names.link(&node)?.target_file);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn targets_of_links(&mut self) -> Result<()> {
        self.targets_of_moved_links()?;
        let path = format!("{}/links", self.job.found.check.backing.display_path());
        let listed = self.job.names.target_files();
        let (dir, mut entries) = match listed {
            Ok(None) => return Ok(()),
            Ok(Some(listed)) => listed,
            Err(error) => {
                let finding = Finding::new(READ, path, unreadable(error)?);
                return self.job.found.tell(finding, None);
            }
        };
        loop {
            let entry = match entries.next_entry() {
                Ok(Some(entry)) => entry,
                Ok(None) => return Ok(()),
                Err(error) => {
                    let finding = Finding::new(READ, path, unreadable(error.into())?);
                    return self.job.found.tell(finding, None);
                }
            };
            // Where something could not be read, nobody knows what it refers to.
            if self.complete && !self.targets.contains(&entry.name) {
                let shown = format!("{path}/{}", String::from_utf8_lossy(&entry.name));
                let detail = "no symbolic link refers to it".to_owned();
                let finding = Finding::new(Code::LinkTarget, shown, detail);
                self.job.judge(finding, &dir, &entry.name)?;
            }
        }
    }

    fn finding(&self, code: Code, place: &Place, detail: &str) -> Finding {
        let finding = Finding::new(code, place.backing(), detail.to_owned());
        Finding { path: place.logical(), ..finding }
    }

    fn tell(&self, code: Code, place: &Place, detail: &str) -> Result<()> {
        self.job.found.tell(self.finding(code, place, detail), None)
    }

    fn cannot_read(&mut self, place: &Arc<Place>, error: std::io::Error) -> Result<()> {
        self.cannot_open(place, error.into())
    }

    fn cannot_open(&mut self, place: &Arc<Place>, error: FsError) -> Result<()> {
        self.complete = false;
        self.tell(READ, place, &unreadable(error)?)
    }
}

/// The extended attributes of anything.
pub(super) fn attributes(job: &Job<'_>, node: &NodeRef, place: &Place) -> Result<()> {
    let (code, damage) = match job.names.xattrs(node) {
        Ok(damage) => (Code::Xattr, damage),
        Err(error) => (READ, vec![unreadable(error)?]),
    };
    for detail in damage {
        let finding = Finding::new(code, place.backing(), detail);
        job.found.tell(Finding { path: place.logical(), ..finding }, None)?;
    }
    Ok(())
}

/// Of all regular files, in bytes; what cannot be read does not count.
fn space(tree: &NodeRef) -> u64 {
    let mut bytes = 0;
    let mut pending = vec![(tree.clone(), None::<Vec<u8>>)];
    while let Some((above, name)) = pending.pop() {
        let node = match name {
            Some(name) => above.lookup(&name),
            None => Ok(above),
        };
        let Ok((node, mut entries)) = node.and_then(|node| Ok((node.clone(), node.read_dir()?)))
        else {
            continue;
        };
        while let Ok(Some(entry)) = entries.next_entry() {
            let Ok(found) = node.lookup(&entry.name) else { continue };
            match found.metadata() {
                Ok(metadata) if metadata.id.dev != tree.id().dev => {}
                Ok(metadata) if metadata.kind == FileKind::Directory => {
                    pending.push((node.clone(), Some(entry.name)));
                }
                Ok(metadata) if metadata.kind == FileKind::Regular => {
                    bytes += metadata.blocks * 512 / metadata.nlink.max(1);
                }
                _ => {}
            }
        }
    }
    bytes
}
