//! The file system as a whole: what its operations share.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::audit::{AuditSink, IntegrityEvent};
use super::handle::HandleTable;
use super::inode::{Inode, InodeTable};
use super::keys::Keys;
use super::long_name;
use super::name::{self, DiskName, Listed};
use super::types::ROOT;
use super::unsettled::{Directories, Unsettled};
use crate::backing::{Backing, FileKind, NodeRef, StatFs};
use crate::error::{CutOff, FsError, FsResult, IntegrityFailure};
use crate::key::gate::Gate;
use crate::store::{FEATURE_PLAINTEXT_NAMES, Store};
use crate::sync::Mutex;

/// Directories one below the other, at most.
const PATH_MAX: usize = 1000;
/// Foreign names reported at most: someone may have copied a whole tree into the volume.
const FOREIGN_REPORTED_MAX: usize = 1000;

#[derive(Clone, Copy, Debug, Default)]
pub struct FilesystemOptions {
    pub read_only: bool,
}

/// A mounted volume, from its logical root down.
#[derive(Debug)]
pub struct Filesystem {
    pub(super) store: Arc<Store>,
    pub(super) backing: Arc<dyn Backing>,
    pub(super) gate: Arc<Gate>,
    pub(super) keys: Arc<Keys>,
    pub(super) inodes: InodeTable,
    pub(super) handles: HandleTable,
    /// A volume made with `--plaintext-names`: names go to the disk as they are.
    pub(super) plain_names: bool,
    /// Held while a long name's side file and its entry change together.
    pub(super) long_names: Mutex<()>,
    unsettled: Unsettled,
    audit: Arc<dyn AuditSink>,
    foreign_reported: Mutex<HashSet<(u64, Vec<u8>)>>,
    options: FilesystemOptions,
}

impl Filesystem {
    pub fn new(
        store: Arc<Store>,
        backing: Arc<dyn Backing>,
        gate: Arc<Gate>,
        audit: Arc<dyn AuditSink>,
        options: FilesystemOptions,
    ) -> Arc<Filesystem> {
        let keys = Keys::new(Arc::clone(&gate), Arc::clone(&store));
        let inodes = InodeTable::new(store.tree());
        let plain_names = store.info().features & FEATURE_PLAINTEXT_NAMES != 0;
        Arc::new(Filesystem {
            store,
            backing,
            gate,
            keys,
            inodes,
            handles: HandleTable::new(),
            plain_names,
            long_names: Mutex::new(()),
            unsettled: Unsettled::default(),
            audit,
            foreign_reported: Mutex::new(HashSet::new()),
            options,
        })
    }

    /// Whether operations are served now.
    pub fn check_open(&self) -> Result<(), CutOff> {
        self.gate.check()
    }

    pub fn read_only(&self) -> bool {
        self.options.read_only
    }

    /// The numbers of the backing file system: byokfs takes 1 block in 120, and a page or two a
    /// file, out of them.
    pub fn statfs(&self) -> FsResult<StatFs> {
        self.gate.check()?;
        let numbers = self.backing.statfs()?;
        self.gate.check()?;
        Ok(StatFs { name_max: super::types::NAME_MAX as u64, ..numbers })
    }

    /// Every node the kernel may have something cached for.
    pub fn known_nodes(&self) -> Vec<u64> {
        self.inodes.ids()
    }

    /// From how many known nodes on [`Filesystem::crowded`] finds them too many.
    pub fn set_many_nodes(&self, many: usize) {
        self.inodes.set_many(many);
    }

    /// Waits until too many nodes are known, at most `limit`, and returns those that the kernel
    /// should forget if it can; none if there are not too many.
    pub fn crowded(&self, limit: Duration) -> Vec<u64> {
        self.inodes.crowded(limit)
    }

    /// Every node that is open as a file, and so may be mapped.
    pub fn open_nodes(&self) -> Vec<u64> {
        self.handles.open_files()
    }

    pub(super) fn writable(&self) -> FsResult<()> {
        self.gate.check()?;
        if self.options.read_only { Err(FsError::Os(Errno::ROFS)) } else { Ok(()) }
    }

    pub(super) fn directory(&self, id: u64) -> FsResult<Arc<Inode>> {
        let inode = self.inodes.get(id)?;
        if inode.kind == FileKind::Directory { Ok(inode) } else { Err(FsError::Os(Errno::NOTDIR)) }
    }

    /// Attributes of the inode were changed.
    pub(super) fn touched(&self, inode: &Inode) {
        inode.note_attributes();
        self.store.touched(inode.key);
    }

    /// A name in `dir` was given, taken or moved.
    pub(super) fn name_changed(&self, dir: &Inode) {
        self.unsettled.add(dir.key, &dir.node);
    }

    /// Before anything may count as durable: every change of a name before it. See [`Unsettled`].
    pub(super) fn settle_names(&self) -> FsResult<()> {
        if self.read_only() {
            return Ok(());
        }
        self.unsettled.settle(|owed| match owed {
            Directories::These(known) => self.store.flush_names(known.values()),
            Directories::Any => self.store.flush_all_names(),
        })
    }

    pub(super) fn seal_name(&self, name: &[u8]) -> FsResult<DiskName> {
        name::check(name)?;
        if self.plain_names {
            return Ok(DiskName { entry: name.to_vec(), long: None });
        }
        self.keys.with(|ciphers| name::seal(ciphers, name))
    }

    /// The plaintext of a directory entry; None for what is not to be listed. Entries that are
    /// not byokfs's, or damaged, are reported once.
    pub(super) fn open_name(&self, dir: &Inode, entry: &[u8]) -> FsResult<Option<Vec<u8>>> {
        if self.plain_names {
            return Ok(Some(entry.to_vec()));
        }
        let sealed = match name::classify(entry) {
            Listed::Name(sealed) => sealed,
            Listed::Long(side) => match long_name::read_side_file(&dir.node, &side) {
                Ok(sealed) if name::side_matches(&side, &sealed) => sealed,
                Ok(_) => {
                    self.report_foreign(dir, entry, "its long name belongs to another entry");
                    return Ok(None);
                }
                // Removed between the listing and now: the entry went with it.
                Err(FsError::Os(Errno::NOENT)) if dir.node.lookup(entry).is_err() => {
                    return Ok(None);
                }
                // It says nothing about the name.
                Err(error @ FsError::Os(Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => {
                    return Err(error);
                }
                Err(FsError::Os(errno)) => {
                    self.report_foreign(dir, entry, &format!("its long name: {errno}"));
                    return Ok(None);
                }
                Err(error) => return Err(error),
            },
            Listed::Side => return Ok(None),
            Listed::Foreign => {
                self.report_foreign(dir, entry, "not written by byokfs");
                return Ok(None);
            }
        };
        let opened = self.keys.with(|ciphers| name::open(ciphers, &sealed))?;
        if opened.is_none() {
            self.report_foreign(dir, entry, "does not decrypt with this volume's key");
        }
        Ok(opened)
    }

    fn report_foreign(&self, dir: &Inode, entry: &[u8], why: &str) {
        {
            let mut reported = self.foreign_reported.lock();
            if reported.len() >= FOREIGN_REPORTED_MAX || !reported.insert((dir.id, entry.to_vec()))
            {
                return;
            }
        }
        let mut backing_path = self.backing_path(dir);
        backing_path.push(lossy(entry));
        self.audit.integrity_failure(&IntegrityEvent {
            failure: IntegrityFailure {
                what: "name",
                file_id: String::new(),
                index: None,
                detail: why.to_owned(),
            },
            logical_path: String::new(),
            backing_path: backing_path.display().to_string(),
        });
    }

    /// Reports `error` if it is an integrity failure, with the names of `inode`, and passes it on.
    pub(super) fn audited<T>(&self, inode: &Inode, result: FsResult<T>) -> FsResult<T> {
        if let Err(error) = &result {
            self.report(inode, error);
        }
        result
    }

    pub(super) fn report(&self, inode: &Inode, error: &FsError) {
        if let FsError::Integrity(failure) = error {
            self.audit.integrity_failure(&IntegrityEvent {
                failure: (**failure).clone(),
                logical_path: self.logical_path(inode),
                backing_path: self.backing_path(inode).display().to_string(),
            });
        }
    }

    /// From the root to `inode`, as disk names; None where the way is not known any more.
    fn disk_path(&self, inode: &Inode) -> Option<Vec<(u64, Box<[u8]>)>> {
        let mut path = Vec::new();
        let mut place = inode.place();
        if inode.id == ROOT {
            return Some(path);
        }
        while let Some(step) = place {
            let parent = step.parent;
            path.push((parent, step.entry));
            if parent == ROOT {
                path.reverse();
                return Some(path);
            }
            // A rename that is under way could show a loop.
            if path.len() > PATH_MAX {
                return None;
            }
            place = self.inodes.get(parent).ok()?.place();
        }
        None
    }

    fn backing_path(&self, inode: &Inode) -> PathBuf {
        let mut path = PathBuf::from(self.backing.display_path());
        path.push("tree");
        match self.disk_path(inode) {
            Some(steps) => path.extend(steps.iter().map(|(_, entry)| lossy(entry))),
            None => path.push(format!("(inode {})", inode.key.ino)),
        }
        path
    }

    /// Empty when some name on the way cannot be read.
    fn logical_path(&self, inode: &Inode) -> String {
        let name_of = |(parent, entry): (u64, Box<[u8]>)| -> Option<String> {
            if self.plain_names {
                return Some(format!("/{}", lossy(&entry)));
            }
            let sealed = match name::classify(&entry) {
                Listed::Name(sealed) => sealed,
                Listed::Long(side) => {
                    long_name::read_side_file(&self.inodes.get(parent).ok()?.node, &side).ok()?
                }
                Listed::Side | Listed::Foreign => return None,
            };
            let plain = self.keys.with(|ciphers| name::open(ciphers, &sealed)).ok()??;
            Some(format!("/{}", String::from_utf8_lossy(&plain)))
        };
        let names: Option<String> =
            self.disk_path(inode).and_then(|steps| steps.into_iter().map(name_of).collect());
        match names {
            Some(names) if inode.id == ROOT => format!("/{names}"),
            Some(names) => names,
            None => String::new(),
        }
    }
}

/// What a node of the disk is to `vfs`.
pub(super) fn kind_of(node: &NodeRef) -> FsResult<FileKind> {
    Ok(node.metadata()?.kind)
}

fn lossy(entry: &[u8]) -> String {
    String::from_utf8_lossy(entry).into_owned()
}
