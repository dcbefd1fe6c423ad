//! What the log holds when a volume is opened: put over the files at home, and brought home.
//!
//! Every record is put into force in order, as when it was made, and then one ordinary checkpoint
//! runs: so recovery may be cut short anywhere and starts again from the same log. A read-only mount
//! keeps the changes in memory. Records of a file that is not there are of one that was removed:
//! before anything of a new file is acknowledged as durable, its name is.
//!
//! Blocks that went home past the log may be missing there if their record was not durable yet.
//! Then the record does not count, and neither does any later one of that file. A record that
//! counts as durable is not questioned: what is wrong with its blocks is damage, and reads as such.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Store;
use super::block::Opener;
use super::file::File;
use super::intent_log::{Found, Record, STREAMS};
use super::layout::{BLOCK_LEN, HEADERS_LEN, block_at};
use super::lost::Lost;
use super::page::Entry;
use crate::backing::{Access, FileKind, FileRef, NodeId, NodeRef};
use crate::error::{Context, Error, FsError, FsResult, Kind, Result};

type FileId = [u8; 16];

/// What recovery found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// In the log, of files that are there.
    pub records: u64,
    pub files: u64,
    /// Records of files that were removed.
    pub of_removed_files: u64,
    /// Records that were not durable, whose blocks are not there.
    pub incomplete: u64,
    /// Files of which the crash left a name and nothing else.
    pub unborn: u64,
    pub duration: Duration,
}

/// Files, and where they are on the disk.
type Homes = HashMap<FileId, (FileRef, String)>;

/// A file that the log has something of.
struct Home {
    file: Arc<File>,
    /// On the disk.
    path: String,
}

/// An interval after which a long recovery says how far it is.
const REPORT_EVERY: Duration = Duration::from_secs(1);

impl Store {
    /// Replays `found`. Fails where that cannot be done without loss; nothing has changed then.
    pub(super) fn replay(&self, found: &Found) -> Result<Recovery> {
        let start = Instant::now();
        let mut report = Recovery::default();
        if found.clean && found.records.is_empty() {
            return Ok(report);
        }
        let all = || found.records.iter().chain(&found.cut_short);
        let wanted: HashSet<FileId> = all().map(|record| record.draft.file_id).collect();
        let (homes, unborn) = self.find_homes(&wanted)?;
        report.unborn = unborn.len() as u64;
        if self.shared.read_only {
            self.shared.unborn.get_or_init(|| unborn.iter().map(|unborn| unborn.node).collect());
        } else {
            self.put_aside(unborn)?;
        }
        let mut files: HashMap<FileId, Home> = HashMap::new();
        for (id, (home, path)) in homes {
            let file = self.open_home(home).map_err(|error| cannot_replay(&path, &error))?;
            files.insert(id, Home { file, path });
        }
        report.files = files.len() as u64;
        for record in &found.cut_short {
            let id = record.draft.file_id;
            let Some(Home { file, path }) = files.get(&id) else { continue };
            let brought = file.has_brought_home(&record.draft.entries);
            if brought.map_err(|error| cannot_replay(path, &error))? {
                return Err(Error::corrupt(format!(
                    "the log is damaged: records of {path} are missing that were on stable storage; \
                     restore the volume from a backup"
                )));
            }
        }
        let incomplete = self.incomplete(found, &files)?;
        let mut told = start;
        for (i, record) in found.records.iter().enumerate() {
            if told.elapsed() >= REPORT_EVERY {
                told = Instant::now();
                log::info!("recovery: {i} of {} records", found.records.len());
            }
            let id = record.draft.file_id;
            let Some(Home { file, path }) = files.get(&id) else {
                report.of_removed_files += 1;
                continue;
            };
            if incomplete.get(&id).is_some_and(|&order| record.place.order >= order) {
                report.incomplete += 1;
                continue;
            }
            file.replay(record).map_err(|error| cannot_replay(path, &error))?;
            report.records += 1;
        }
        files.into_values().for_each(|home| self.shared.dirty.add(home.file));
        report.duration = start.elapsed();
        Ok(report)
    }

    /// The backing files with these ids and where they lie, and those that have nothing where their header should be.
    /// Two with the same id: nobody can tell which is meant.
    fn find_homes(&self, wanted: &HashSet<FileId>) -> Result<(Homes, Vec<Unborn>)> {
        let mut unborn = Vec::new();
        let mut found: HashMap<FileId, (NodeId, FileRef, String)> = HashMap::new();
        let access = if self.shared.read_only { Access::Read } else { Access::ReadWrite };
        let shown = self.backing.display_path();
        let mut directories = vec![(self.tree.clone(), format!("{shown}/tree"))];
        while let Some((directory, path)) = directories.pop() {
            let cannot = || format!("cannot look for files in {path}");
            let mut entries = directory.read_dir().context(cannot)?;
            while let Some(entry) = entries.next_entry().context(cannot)? {
                if !matches!(entry.kind, None | Some(FileKind::Regular) | Some(FileKind::Directory))
                {
                    continue;
                }
                let node: NodeRef = directory.lookup(&entry.name).context(cannot)?;
                let here = format!("{path}/{}", String::from_utf8_lossy(&entry.name));
                match node.metadata().context(cannot)?.kind {
                    FileKind::Directory => directories.push((node, here)),
                    FileKind::Regular => {
                        let file = node.open(Access::Peek).context(cannot)?;
                        let Some(id) = self.id_of(&file)? else {
                            if has_no_header(&file).context(cannot)? {
                                let (directory, node) = (directory.clone(), node.id());
                                let name = entry.name;
                                unborn.push(Unborn { directory, name, node, path: here });
                            }
                            continue;
                        };
                        if !wanted.contains(&id) {
                            continue;
                        }
                        if let Some((other, _, there)) = found.get(&id) {
                            if *other == node.id() {
                                continue;
                            }
                            return Err(Error::corrupt(format!(
                                "{there} and {here} are copies of one file: move one of them away, \
                                 so that it is clear to which the log belongs"
                            )));
                        }
                        let file = node.open(access).context(cannot)?;
                        found.insert(id, (node.id(), file, here));
                    }
                    _ => {}
                }
            }
        }
        let homes = found.into_iter().map(|(id, (_, file, path))| (id, (file, path))).collect();
        Ok((homes, unborn))
    }

    /// A new file is flushed with its first `fsync`, or a few seconds later. A crash before that
    /// may leave its name without it: then it was never made, as far as anybody was promised. What
    /// there is of it is moved, not removed.
    fn put_aside(&self, unborn: Vec<Unborn>) -> Result<()> {
        if unborn.is_empty() {
            return Ok(());
        }
        let cannot = || format!("cannot move a file to {}/lost", self.backing.display_path());
        let mut lost = Lost::open(&self.root).context(cannot)?;
        for Unborn { directory, name, path, .. } in unborn {
            let aside = lost.free_name().context(cannot)?;
            lost.take(&*directory, &name, &aside).context(cannot)?;
            log::warn!("{path} was never flushed and is empty: moved to lost/{aside}");
        }
        self.backing.sync_fs().context(cannot)
    }

    /// None for what is no file of this volume.
    fn id_of(&self, file: &FileRef) -> Result<Option<FileId>> {
        match self.shared.read_header(file) {
            Ok(header) => Ok(Some(header.file_id)),
            Err(FsError::Integrity(_)) => Ok(None),
            Err(error) => {
                let kind = match error {
                    FsError::CutOff(_) => Kind::Inaccessible,
                    _ => Kind::Io,
                };
                Err(Error::new(kind, format!("cannot read a file header: {error}")))
            }
        }
    }

    /// By file, the first record that does not count because blocks of it are missing.
    fn incomplete(
        &self,
        found: &Found,
        files: &HashMap<FileId, Home>,
    ) -> Result<HashMap<FileId, u64>> {
        let open_to_doubt = |record: &Record| {
            let stream = usize::from(record.place.stream) % STREAMS;
            record.place.seq > found.durable[stream] && !record.direct().is_empty()
        };
        let Some(from) = found.records.iter().position(open_to_doubt) else {
            return Ok(HashMap::new());
        };
        let later = Later::of(&found.records[from..]);
        // By file: records with a block that is not at home, and the first that replaces it.
        let mut lacking: HashMap<FileId, Vec<(u64, u64)>> = HashMap::new();
        // Blocks that are there, by the record that brought them.
        let mut there_by: HashMap<FileId, Vec<(u64, u64)>> = HashMap::new();
        for record in found.records[from..].iter().filter(|record| open_to_doubt(record)) {
            let id = record.draft.file_id;
            let Some(Home { file, path }) = files.get(&id) else { continue };
            for listed in record.direct() {
                let there = match Entry::decode(&listed.bytes) {
                    Some(entry) => file.is_home(listed.block, &entry),
                    None => Ok(false),
                };
                let order = record.place.order;
                if there.map_err(|error| cannot_replay(path, &error))? {
                    there_by.entry(id).or_default().push((order, listed.block));
                } else {
                    let replaced = later.replaces(&id, listed.block, order);
                    lacking.entry(id).or_default().push((order, replaced.unwrap_or(u64::MAX)));
                }
            }
        }
        let mut missing = HashMap::new();
        for (id, mut lacking) in lacking {
            let Some(Home { file, path }) = files.get(&id) else { continue };
            let brought = brought_home(found, &id, file);
            let brought = brought.map_err(|error| cannot_replay(path, &error))?;
            lacking.retain(|(order, _)| *order > brought);
            if let Some(cut) = first_cut(lacking) {
                missing.insert(id, cut);
            }
        }
        if !self.shared.read_only {
            for (id, mut blocks) in there_by {
                let Some(Home { file, path }) = files.get(&id) else { continue };
                blocks.retain(|(order, _)| missing.get(&id).is_none_or(|cut| order < cut));
                let done = file.write_again(blocks.iter().map(|(_, block)| *block));
                done.map_err(|error| cannot_replay(path, &error))?;
            }
        }
        Ok(missing)
    }
}

/// The last record of the file that an unfinished checkpoint is known to have brought home, by its
/// order: it, and all before it, was on stable storage, whatever has become of its blocks since.
fn brought_home(found: &Found, id: &FileId, file: &File) -> FsResult<u64> {
    let mine = found.records.iter().rev().filter(|record| record.draft.file_id == *id);
    for record in mine {
        if file.has_brought_home(&record.draft.entries)? {
            return Ok(record.place.order);
        }
    }
    Ok(0)
}

/// The first record that does not count, given those that lack a block and what replaces it. Who
/// replaces a block must count itself, so one that goes may take an earlier one along.
fn first_cut(lacking: Vec<(u64, u64)>) -> Option<u64> {
    let mut cut = u64::MAX;
    loop {
        let bare = lacking.iter().filter(|(order, replaced)| *order < cut && *replaced >= cut);
        match bare.map(|(order, _)| *order).min() {
            Some(order) => cut = order,
            None => return (cut < u64::MAX).then_some(cut),
        }
    }
}

/// A name of the disk without a file behind it.
struct Unborn {
    directory: NodeRef,
    name: Vec<u8>,
    node: NodeId,
    path: String,
}

fn has_no_header(file: &FileRef) -> std::io::Result<bool> {
    let mut pages = [0; HEADERS_LEN as usize];
    file.read_at(&mut pages, 0)?;
    Ok(pages.iter().all(|&byte| byte == 0))
}

/// What later records do to blocks, in order.
struct Later {
    blocks: HashMap<(FileId, u64), Vec<u64>>,
    holes: HashMap<FileId, Vec<(u64, Range<u64>)>>,
}

impl Later {
    fn of(records: &[Record]) -> Later {
        let mut later = Later { blocks: HashMap::new(), holes: HashMap::new() };
        for record in records {
            let (id, order) = (record.draft.file_id, record.place.order);
            for entry in &record.draft.entries {
                later.blocks.entry((id, entry.block)).or_default().push(order);
            }
            let (from, to) = record.draft.holes;
            if from < to {
                later.holes.entry(id).or_default().push((order, from..to));
            }
        }
        later
    }

    /// The first record after `order` after which nobody needs the block any more.
    fn replaces(&self, id: &FileId, block: u64, order: u64) -> Option<u64> {
        let written = self.blocks.get(&(*id, block)).into_iter().flatten().copied();
        let holes = self.holes.get(id).into_iter().flatten();
        let emptied = holes.filter(|(_, range)| range.contains(&block)).map(|(at, _)| *at);
        written.chain(emptied).filter(|&at| at > order).min()
    }
}

impl File {
    /// Whether the home file has the block that the entry speaks of.
    fn is_home(&self, block: u64, entry: &Entry) -> FsResult<bool> {
        let mut bytes = vec![0; BLOCK_LEN];
        if self.backing().read_at(&mut bytes, block_at(block))? < BLOCK_LEN {
            return Ok(false);
        }
        let lease = self.shared().gate.lease()?;
        let opened =
            Opener::new(self.shared(), &self.keys(), &lease).open(block, entry, &mut bytes);
        match opened {
            Ok(()) => Ok(true),
            Err(FsError::Integrity(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Has blocks on stable storage that are home. The kernel shows from its memory also what it could
    /// not write, and has told of that once.
    fn write_again(&self, blocks: impl Iterator<Item = u64>) -> FsResult<()> {
        let mut bytes = vec![0; BLOCK_LEN];
        for block in blocks {
            let count = self.backing().read_at(&mut bytes, block_at(block))?;
            self.backing().write_at(&bytes[..count], block_at(block))?;
        }
        Ok(self.backing().sync_data()?)
    }
}

fn cannot_replay(path: &str, error: &FsError) -> Error {
    let message = format!("cannot replay the log into {path}: {error}");
    match error {
        FsError::CutOff(_) => Error::new(Kind::Inaccessible, message),
        FsError::Integrity(_) => Error::corrupt(message),
        FsError::Os(errno) => Error::io(message, (*errno).into()),
    }
}
