//! Where a volume's intent log lies, and how it gets another size or another place.
//!
//! The log is two files in the volume's root, or in the directory that the symbolic link `log` in
//! the root names. Which log belongs to the volume, its header says by an id, and a log that is
//! being put in its place has its files under other names ([`NEW_FILES`]), and the link that leads
//! to it too ([`NEW_LINK`]): so the header decides, by one write, which of the two counts, and
//! whatever a crash leaves of the rest is put in order by the next mount ([`Found::settle`]).
//!
//! A directory elsewhere is locked as the volume is, and names the volume it serves: a copy of the
//! volume has the same link in it, and must not take the log of the original for its own.

use std::fmt::Debug;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::LOCK;
use super::intent_log::{FILES, Log, LogFile, STREAMS};
use super::keys::{MacKeys, hex};
use crate::backing::{Backing, NodeRef, RenameMode, small_file};
use crate::error::{Context, Error, Kind, Result};

pub(super) const LINK: &[u8] = b"log";
pub(super) const NEW_LINK: &[u8] = b"log.new";
/// The log's files before they have their names.
pub(super) const NEW_FILES: [&[u8]; STREAMS] = [b"log.hot.new", b"log.bulk.new"];
/// In a directory elsewhere: whose log that is.
const OWNER: &[u8] = b"log.owner";
const NEW_OWNER: &[u8] = b"log.owner.new";
/// A path and an id.
const OWNER_LIMIT: u64 = 8192;

/// A directory that a log lies in.
#[derive(Debug)]
pub(super) struct Place {
    pub dir: NodeRef,
    /// For messages.
    pub shown: String,
    /// None: the volume's root.
    path: Option<PathBuf>,
    /// Keeps other users of the directory out.
    _lock: Option<Box<dyn Debug + Send + Sync>>,
}

impl Place {
    fn root(backing: &dyn Backing) -> Place {
        let shown = backing.display_path();
        Place { dir: backing.root(), shown, path: None, _lock: None }
    }

    /// A directory elsewhere, locked unless nothing is to be written.
    fn elsewhere(backing: &dyn Backing, path: &Path, write: bool) -> Result<Place> {
        let shown = path.display().to_string();
        let other = backing.elsewhere(path).map_err(|error| {
            let message = format!("the log's own directory cannot be used: {error}");
            Error::new(error.kind, message)
        })?;
        let lock = match write {
            false => None,
            true => Some(other.lock(LOCK).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => {
                    Error::new(Kind::Busy, format!("the log in {shown} is in use"))
                }
                _ => Error::io(format!("cannot lock {shown}"), error),
            })?),
        };
        Ok(Place { dir: other.root(), shown, path: Some(path.to_owned()), _lock: lock })
    }

    /// Whether both are the same directory.
    fn is(&self, other: &Place) -> bool {
        self.dir.id() == other.dir.id()
    }

    /// A directory elsewhere serves one volume, at one place.
    fn check_owner(&self, backing: &dyn Backing, uuid: &[u8; 16]) -> Result<()> {
        if self.path.is_none() {
            return Ok(());
        }
        let read = small_file::read(&self.dir, OWNER, OWNER_LIMIT);
        let owner = read.context(|| format!("cannot read {}/log.owner", self.shown))?;
        if owner == owner_text(backing, uuid) {
            return Ok(());
        }
        Err(Error::new(
            Kind::Denied,
            format!(
                "the log in {} is that of another volume, or of the same one at another place: {}. \
                 A copy of a volume needs a copy of its log, and a link `log` to that; where the \
                 volume was moved, correct {}/log.owner",
                self.shown,
                String::from_utf8_lossy(&owner).trim().replace('\n', " "),
                self.shown
            ),
        ))
    }

    fn write_owner(&self, backing: &dyn Backing, uuid: &[u8; 16]) -> Result<()> {
        if self.path.is_none() {
            return Ok(());
        }
        let text = owner_text(backing, uuid);
        small_file::replace(&self.dir, NEW_OWNER, OWNER, &text)
            .context(|| format!("cannot write {}/log.owner", self.shown))
    }
}

fn owner_text(backing: &dyn Backing, uuid: &[u8; 16]) -> Vec<u8> {
    format!("{}\n{}\n", hex(uuid), backing.display_path()).into_bytes()
}

/// Where a link in the root leads to; None where there is none.
fn target(root: &NodeRef, link: &[u8]) -> io::Result<Option<PathBuf>> {
    let node = match root.lookup(link) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        node => node?,
    };
    let target = node.read_link()?;
    Ok(Some(PathBuf::from(std::ffi::OsStr::from_bytes(&target))))
}

/// The files of the log that belongs to a volume.
#[derive(Debug)]
pub(super) struct Found {
    places: Vec<Arc<Place>>,
    /// Of each stream: where, and by which name.
    files: [(usize, &'static [u8]); STREAMS],
}

impl Found {
    /// Looks for the log with that id in every place where a change of it may have left it. Where
    /// there is none: the place and the names that it ought to have. A place that a change was to bring
    /// it to does not matter where it is in another, and may be gone since; with `lost`, no place does
    /// that cannot be looked at. Without keys, what has the form of an anchor is believed.
    pub(super) fn look(
        backing: &dyn Backing,
        uuid: &[u8; 16],
        log_id: &[u8; 16],
        keys: Option<&MacKeys>,
        write: bool,
        lost: bool,
    ) -> Result<Found> {
        let root = backing.root();
        let shown = backing.display_path();
        let mut places: Vec<Arc<Place>> = Vec::new();
        let mut unseen = None;
        for link in [Some(LINK), Some(NEW_LINK), None] {
            let place = match link {
                None => Place::root(backing),
                Some(link) => {
                    let path = target(&root, link).context(|| {
                        format!("cannot read the link {shown}/{}", String::from_utf8_lossy(link))
                    })?;
                    let known = |path: &PathBuf| {
                        places.iter().any(|place| place.path.as_ref() == Some(path))
                    };
                    match path.filter(|path| !known(path)) {
                        None => continue,
                        Some(path) => match Place::elsewhere(backing, &path, write) {
                            // The log that counts is where the other link leads, if it is there.
                            Err(error) if lost || link == NEW_LINK => {
                                log::warn!("{error}");
                                unseen.get_or_insert(error);
                                continue;
                            }
                            place => place?,
                        },
                    }
                }
            };
            if !places.iter().any(|known| known.is(&place)) {
                places.push(Arc::new(place));
            }
        }
        let mut files = [(0, FILES[0]), (0, FILES[1])];
        let mut there = 0;
        for (stream, file) in files.iter_mut().enumerate() {
            let candidates =
                (0..places.len()).flat_map(|i| [(i, FILES[stream]), (i, NEW_FILES[stream])]);
            for (i, name) in candidates {
                let place = &places[i];
                let has = Log::is_at(&place.dir, name, stream, log_id, keys)
                    .context(|| cannot("read", place, name))?;
                if has {
                    place.check_owner(backing, uuid)?;
                    *file = (i, name);
                    there += 1;
                    break;
                }
            }
        }
        match unseen {
            Some(error) if there < STREAMS && !lost => Err(error),
            _ => Ok(Found { places, files }),
        }
    }

    /// For [`Log::find`].
    pub(super) fn log_files(&self) -> [LogFile; STREAMS] {
        self.files.map(|(i, name)| {
            let place = &self.places[i];
            LogFile { dir: place.dir.clone(), name, shown: place.shown.clone() }
        })
    }

    /// The place of the log, and whatever else was locked to find it.
    pub(super) fn places(&self) -> &[Arc<Place>] {
        &self.places
    }

    fn home(&self) -> &Arc<Place> {
        &self.places[self.files[0].0]
    }

    /// Names and links are as they are to be.
    pub(super) fn is_settled(&self, backing: &dyn Backing) -> Result<bool> {
        let linked = target(&backing.root(), LINK);
        let linked = linked.context(|| "cannot read the link to the log".to_owned())?;
        let named = self.files.iter().zip(FILES).all(|((_, name), wanted)| *name == wanted);
        Ok(named && linked == self.home().path)
    }

    /// Puts names and links in order after a change of the log that a crash has cut short.
    pub(super) fn settle(
        &self,
        backing: &dyn Backing,
        ids: (&[u8; 16], &[u8; 16]),
        keys: &MacKeys,
    ) -> Result<()> {
        if self.is_settled(backing)? {
            // Of a change that was given up.
            let removed = small_file::remove_if_there(&backing.root(), NEW_LINK);
            return removed.context(|| format!("cannot remove {}/log.new", backing.display_path()));
        }
        log::warn!("a change of the log that a crash has cut short is finished");
        finish(backing, ids, keys, &self.places, self.home())
    }
}

/// Gives a new log, which the volume header names already, its names, and removes the one before.
pub(super) fn finish(
    backing: &dyn Backing,
    (uuid, log_id): (&[u8; 16], &[u8; 16]),
    keys: &MacKeys,
    places: &[Arc<Place>],
    home: &Arc<Place>,
) -> Result<()> {
    for (stream, (new, name)) in NEW_FILES.into_iter().zip(FILES).enumerate() {
        let is_new = Log::is_at(&home.dir, new, stream, log_id, Some(keys));
        if is_new.context(|| cannot("read", home, new))? {
            let renamed = home.dir.rename(new, &*home.dir, name, RenameMode::Replace);
            renamed.context(|| cannot("rename", home, new))?;
        }
    }
    home.dir.sync().context(|| format!("cannot sync {}", home.shown))?;
    for place in places.iter().filter(|place| !place.is(home)) {
        if place.check_owner(backing, uuid).is_err() {
            continue;
        }
        let owner = place.path.as_ref().map(|_| OWNER);
        for name in FILES.into_iter().chain(NEW_FILES).chain(owner) {
            small_file::remove_if_there(&place.dir, name)
                .context(|| cannot("remove", place, name))?;
        }
        place.dir.sync().context(|| format!("cannot sync {}", place.shown))?;
    }
    let root = backing.root();
    let relink = || -> io::Result<()> {
        match &home.path {
            None => small_file::remove_if_there(&root, LINK)?,
            Some(path) if target(&root, LINK)?.as_ref() == Some(path) => {}
            Some(path) => {
                small_file::remove_if_there(&root, NEW_LINK)?;
                root.symlink(NEW_LINK, path.as_os_str().as_bytes())?;
                root.rename(NEW_LINK, &*root, LINK, RenameMode::Replace)?;
            }
        }
        small_file::remove_if_there(&root, NEW_LINK)?;
        root.sync()
    };
    relink().context(|| format!("cannot change the link {}/log", backing.display_path()))
}

/// Where a new log is to be made: `to`, or where the old one is.
pub(super) fn destination(
    backing: &dyn Backing,
    uuid: &[u8; 16],
    old: &Found,
    to: Option<&Path>,
) -> Result<Arc<Place>> {
    let root = Place::root(backing);
    let known = |wanted: &Place| old.places.iter().find(|known| known.is(wanted)).map(Arc::clone);
    let Some(to) = to else {
        let home = old.home();
        // Where the log was not found, its link may lead to a directory that has become another
        // volume's, or that does not name this one any more: that is none for a new log.
        return match home.check_owner(backing, uuid) {
            Ok(()) => Ok(Arc::clone(home)),
            Err(error) => {
                log::warn!("the new log goes to the volume itself: {error}");
                Ok(known(&root).unwrap_or_else(|| Arc::new(root)))
            }
        };
    };
    let place = Place::elsewhere(backing, to, false)?;
    if place.is(&root) {
        return Ok(known(&root).unwrap_or_else(|| Arc::new(root)));
    }
    if let Some(known) = known(&place) {
        known.check_owner(backing, uuid)?;
        return Ok(known);
    }
    if to.starts_with(backing.display_path()) {
        let message = format!("{} is in the volume itself", to.display());
        return Err(Error::usage(message));
    }
    for name in FILES.into_iter().chain([OWNER]) {
        match place.dir.lookup(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // From a move to there that was given up.
            Ok(_) if name == OWNER && place.check_owner(backing, uuid).is_ok() => {}
            Err(error) => return Err(Error::io(cannot("look for", &place, name), error)),
            Ok(_) => {
                let message = format!("{} holds the log of another volume", to.display());
                return Err(Error::new(Kind::Busy, message));
            }
        }
    }
    let place = Place::elsewhere(backing, to, true)?;
    place.write_owner(backing, uuid)?;
    Ok(Arc::new(place))
}

/// Removes what an earlier change has left, and has the link to the new log made, where it needs
/// one; durable when this returns.
pub(super) fn prepare(backing: &dyn Backing, place: &Place) -> Result<()> {
    let root = backing.root();
    let make = || -> io::Result<()> {
        for name in NEW_FILES {
            small_file::remove_if_there(&place.dir, name)?;
        }
        small_file::remove_if_there(&root, NEW_LINK)?;
        if let Some(path) = &place.path {
            root.symlink(NEW_LINK, path.as_os_str().as_bytes())?;
        }
        root.sync()
    };
    make().context(|| format!("cannot prepare a new log in {}", place.shown))
}

/// The log in the volume's root, of a new volume.
pub(super) fn of_new_volume(backing: &dyn Backing) -> [LogFile; STREAMS] {
    let place = Place::root(backing);
    FILES.map(|name| LogFile { dir: place.dir.clone(), name, shown: place.shown.clone() })
}

/// A new log there, before it has its names.
pub(super) fn of_new_log(place: &Place) -> [LogFile; STREAMS] {
    NEW_FILES.map(|name| LogFile { dir: place.dir.clone(), name, shown: place.shown.clone() })
}

fn cannot(verb: &str, place: &Place, name: &[u8]) -> String {
    format!("cannot {verb} {}/{}", place.shown, String::from_utf8_lossy(name))
}
