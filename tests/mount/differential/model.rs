//! The operations on a file system in memory, written to be obvious.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::{Answer, Op, Rename, SLOTS, Space};

const ROOT: usize = 0;

#[derive(Debug)]
enum Kind {
    File(Vec<u8>),
    Directory(BTreeMap<String, usize>),
    Link(String),
}

#[derive(Debug)]
struct Node {
    kind: Kind,
    mode: u32,
    names: u64,
    xattrs: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug)]
pub(super) struct Model {
    /// Never reused: what has no name any more may still be open.
    nodes: Vec<Node>,
    slots: [Option<usize>; SLOTS],
}

/// A content in few words.
pub(super) fn summary(data: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    data.hash(&mut hasher);
    format!("{} bytes, {:016x}", data.len(), hasher.finish())
}

impl Node {
    fn describe(&self) -> String {
        match &self.kind {
            Kind::File(data) => {
                format!("file {:o}, {} bytes, {} names", self.mode, data.len(), self.names)
            }
            Kind::Directory(_) => format!("directory {:o}", self.mode),
            Kind::Link(target) => format!("link, {} bytes, {} names", target.len(), self.names),
        }
    }

    fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory(_))
    }
}

impl Model {
    pub(super) fn new() -> Model {
        let mut model = Model { nodes: Vec::new(), slots: Default::default() };
        model.add(Kind::Directory(BTreeMap::new()), 0o755);
        model
    }

    fn add(&mut self, kind: Kind, mode: u32) -> usize {
        self.nodes.push(Node { kind, mode, names: 1, xattrs: BTreeMap::new() });
        self.nodes.len() - 1
    }

    fn entries(&self, node: usize) -> Result<&BTreeMap<String, usize>, i32> {
        match &self.nodes[node].kind {
            Kind::Directory(entries) => Ok(entries),
            Kind::File(_) => Err(libc::ENOTDIR),
            // Link targets lead nowhere in these tests.
            Kind::Link(_) => Err(libc::ENOENT),
        }
    }

    fn entries_mut(&mut self, node: usize) -> &mut BTreeMap<String, usize> {
        match &mut self.nodes[node].kind {
            Kind::Directory(entries) => entries,
            _ => panic!("not a directory"),
        }
    }

    /// The directory of a path, and the last name.
    fn parent<'a>(&self, path: &'a str) -> Result<(usize, &'a str), i32> {
        let (directories, name) = path.rsplit_once('/').unwrap_or(("", path));
        let mut node = ROOT;
        for name in directories.split('/').filter(|name| !name.is_empty()) {
            node = *self.entries(node)?.get(name).ok_or(libc::ENOENT)?;
        }
        self.entries(node)?;
        Ok((node, name))
    }

    /// The last component is not followed.
    fn find(&self, path: &str) -> Result<usize, i32> {
        let (parent, name) = self.parent(path)?;
        self.entries(parent)?.get(name).copied().ok_or(libc::ENOENT)
    }

    fn follow(&self, path: &str) -> Result<usize, i32> {
        let node = self.find(path)?;
        match self.nodes[node].kind {
            Kind::Link(_) => Err(libc::ENOENT),
            _ => Ok(node),
        }
    }

    /// Where a new name goes; EEXIST if it is taken.
    fn vacant<'a>(&self, path: &'a str) -> Result<(usize, &'a str), i32> {
        let (parent, name) = self.parent(path)?;
        if self.entries(parent)?.contains_key(name) {
            Err(libc::EEXIST)
        } else {
            Ok((parent, name))
        }
    }

    fn insert(&mut self, (parent, name): (usize, &str), node: usize) {
        self.entries_mut(parent).insert(name.to_owned(), node);
    }

    fn data(&mut self, slot: usize) -> Result<&mut Vec<u8>, i32> {
        let node = self.slots[slot].ok_or(libc::EBADF)?;
        match &mut self.nodes[node].kind {
            Kind::File(data) => Ok(data),
            _ => panic!("only files are open"),
        }
    }

    pub(super) fn apply(&mut self, op: &Op) -> Answer {
        let done = Ok("done".to_owned());
        match op {
            Op::Open { slot, path, create, exclusive, truncate } => {
                let (parent, name) = self.parent(path)?;
                let node = match self.entries(parent)?.get(name) {
                    Some(_) if *create && *exclusive => return Err(libc::EEXIST),
                    Some(node) => *node,
                    None if *create => {
                        let node = self.add(Kind::File(Vec::new()), 0o644);
                        self.insert((parent, name), node);
                        node
                    }
                    None => return Err(libc::ENOENT),
                };
                match &mut self.nodes[node].kind {
                    Kind::Directory(_) => return Err(libc::EISDIR),
                    Kind::Link(_) => return Err(libc::ELOOP),
                    Kind::File(data) if *truncate => data.clear(),
                    Kind::File(_) => {}
                }
                self.slots[*slot] = Some(node);
                done
            }
            Op::Close { slot } => {
                self.slots[*slot] = None;
                done
            }
            Op::Write { slot, offset, len, byte } => {
                let data = self.data(*slot)?;
                let (from, to) = (*offset as usize, *offset as usize + len);
                data.resize(data.len().max(to), 0);
                data[from..to].fill(*byte);
                done
            }
            Op::Append { slot, len, byte } => {
                let data = self.data(*slot)?;
                data.resize(data.len() + len, *byte);
                done
            }
            Op::Read { slot, offset, len } => {
                let data = self.data(*slot)?;
                let from = data.len().min(*offset as usize);
                let to = data.len().min(*offset as usize + len);
                Ok(summary(&data[from..to]))
            }
            Op::SetLen { slot, len } => {
                self.data(*slot)?.resize(*len as usize, 0);
                done
            }
            Op::Space { slot, how, offset, len } => {
                let data = self.data(*slot)?;
                let (from, to) = (*offset as usize, (*offset + *len) as usize);
                if matches!(how, Space::Allocate | Space::Zero) {
                    data.resize(data.len().max(to), 0);
                }
                if matches!(how, Space::Punch | Space::Zero) {
                    let end = data.len();
                    data[from.min(end)..to.min(end)].fill(0);
                }
                done
            }
            Op::StatOpen { slot } => {
                Ok(self.nodes[self.slots[*slot].ok_or(libc::EBADF)?].describe())
            }
            Op::Sync { slot } => self.data(*slot).map(|_| ()).and(done),
            Op::Mkdir { path } => {
                let place = self.vacant(path)?;
                let node = self.add(Kind::Directory(BTreeMap::new()), 0o755);
                self.insert(place, node);
                done
            }
            Op::Rmdir { path } => {
                let (parent, name) = self.parent(path)?;
                let node = self.find(path)?;
                match &self.nodes[node].kind {
                    Kind::Directory(entries) if entries.is_empty() => {}
                    Kind::Directory(_) => return Err(libc::ENOTEMPTY),
                    _ => return Err(libc::ENOTDIR),
                }
                self.entries_mut(parent).remove(name);
                done
            }
            Op::Unlink { path } => {
                let (parent, name) = self.parent(path)?;
                let node = self.find(path)?;
                if self.nodes[node].is_directory() {
                    return Err(libc::EISDIR);
                }
                self.entries_mut(parent).remove(name);
                self.nodes[node].names -= 1;
                done
            }
            Op::Rename { from, to, how } => self.rename(from, to, *how).and(done),
            Op::Link { from, to } => {
                let node = self.find(from)?;
                let place = self.vacant(to)?;
                if self.nodes[node].is_directory() {
                    return Err(libc::EPERM);
                }
                self.insert(place, node);
                self.nodes[node].names += 1;
                done
            }
            Op::Symlink { target, path } => {
                let place = self.vacant(path)?;
                let node = self.add(Kind::Link(target.clone()), 0o777);
                self.insert(place, node);
                done
            }
            Op::ReadLink { path } => match &self.nodes[self.find(path)?].kind {
                Kind::Link(target) => Ok(target.clone()),
                _ => Err(libc::EINVAL),
            },
            Op::Chmod { path, mode } => {
                let node = self.follow(path)?;
                self.nodes[node].mode = *mode;
                done
            }
            Op::SetTimes { path, seconds } => {
                self.find(path)?;
                Ok(format!("{seconds} 123456789"))
            }
            Op::SetXattr { path, name, value } => {
                let node = self.find(path)?;
                if matches!(self.nodes[node].kind, Kind::Link(_)) {
                    return Err(libc::EPERM);
                }
                self.nodes[node].xattrs.insert(name.clone(), value.clone());
                done
            }
            Op::GetXattr { path, name } => {
                let node = self.find(path)?;
                let value = self.nodes[node].xattrs.get(name).ok_or(libc::ENODATA)?;
                Ok(summary(value))
            }
            Op::RemoveXattr { path, name } => {
                let node = self.find(path)?;
                if matches!(self.nodes[node].kind, Kind::Link(_)) {
                    return Err(libc::EPERM);
                }
                self.nodes[node].xattrs.remove(name).ok_or(libc::ENODATA)?;
                done
            }
            Op::Stat { path } => Ok(self.nodes[self.find(path)?].describe()),
            Op::List { path } => {
                let entries = self.entries(self.find(path)?)?;
                Ok(format!("{:?}", entries.keys().collect::<Vec<_>>()))
            }
        }
    }

    fn rename(&mut self, from: &str, to: &str, how: Rename) -> Result<(), i32> {
        let (old_parent, old_name) = self.parent(from)?;
        let (new_parent, new_name) = self.parent(to)?;
        let old = *self.entries(old_parent)?.get(old_name).ok_or(libc::ENOENT)?;
        let new = self.entries(new_parent)?.get(new_name).copied();
        match (how, new) {
            (Rename::NoReplace, Some(_)) => return Err(libc::EEXIST),
            (Rename::Exchange, None) => return Err(libc::ENOENT),
            _ => {}
        }
        if to.starts_with(&format!("{from}/")) {
            return Err(libc::EINVAL);
        }
        if from.starts_with(&format!("{to}/")) {
            let exchange = matches!(how, Rename::Exchange);
            return Err(if exchange { libc::EINVAL } else { libc::ENOTEMPTY });
        }
        if new == Some(old) {
            return Ok(());
        }
        if let (Rename::Exchange, Some(new)) = (how, new) {
            self.insert((old_parent, old_name), new);
            self.insert((new_parent, new_name), old);
            return Ok(());
        }
        if let Some(new) = new {
            match (&self.nodes[old].kind, &self.nodes[new].kind) {
                (Kind::Directory(_), Kind::Directory(entries)) if entries.is_empty() => {}
                (Kind::Directory(_), Kind::Directory(_)) => return Err(libc::ENOTEMPTY),
                (Kind::Directory(_), _) => return Err(libc::ENOTDIR),
                (_, Kind::Directory(_)) => return Err(libc::EISDIR),
                _ => {}
            }
            self.nodes[new].names -= 1;
        }
        self.entries_mut(old_parent).remove(old_name);
        self.insert((new_parent, new_name), old);
        Ok(())
    }

    pub(super) fn tree(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.below(ROOT, "", &mut out);
        out
    }

    fn below(&self, node: usize, path: &str, out: &mut Vec<String>) {
        let Kind::Directory(entries) = &self.nodes[node].kind else { return };
        for (name, node) in entries {
            let path = if path.is_empty() { name.clone() } else { format!("{path}/{name}") };
            let content = match &self.nodes[*node].kind {
                Kind::File(data) => summary(data),
                Kind::Link(target) => target.clone(),
                Kind::Directory(_) => String::new(),
            };
            out.push(format!("{path}: {} {content}", self.nodes[*node].describe()));
            self.below(*node, &path, out);
        }
    }
}
