//! One file: its header, and its content in pieces that may be looked at in any order, by several
//! threads.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::nonces::Nonces;
use super::{Flaw, Sink, Volume, What, name, plain};
use crate::backing::{Access, FileRef, NodeRef};
use crate::error::{FsError, FsResult};
use crate::store::file::File;
use crate::store::header::{Header, HeaderError};
use crate::store::keys::hex;
use crate::store::layout::{
    BLOCK, BLOCK_LEN, BLOCKS_PER_GROUP, GROUPS_PER_REGION, HEADERS_LEN, MAX_SIZE, backing_len,
    generation_page_at, group_of, region_of_group,
};
use crate::store::session::SessionTable;
use crate::sync::Mutex;

/// Groups of a piece: 15 MiB of plaintext. A region is a whole number of pieces.
const GROUPS_PER_PIECE: u64 = 32;
const PIECES_PER_REGION: u64 = GROUPS_PER_REGION as u64 / GROUPS_PER_PIECE;

/// What a thread works in; it may hold plaintext, and is overwritten in the end.
pub struct Scratch {
    pub(in crate::store) blocks: Zeroizing<Vec<u8>>,
    pub(super) nonces: Nonces,
}

impl Default for Scratch {
    fn default() -> Scratch {
        let blocks = Zeroizing::new(vec![0; BLOCKS_PER_GROUP * BLOCK_LEN]);
        Scratch { blocks, nonces: Nonces::default() }
    }
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scratch")
    }
}

impl Scratch {
    pub(in crate::store) fn note_nonce(&mut self, slot: u16, session: u32, counter: u64) {
        self.nonces.add(slot, session, counter);
    }
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Sealed blocks.
    pub blocks: u64,
    /// Bytes of the disk that were read.
    pub bytes: u64,
}

/// What there is of a file.
#[derive(Debug)]
pub enum Opened {
    File(FileCheck),
    /// Neither header serves, so nothing of it can be read.
    Unreadable,
    /// A name without a file, after a crash.
    NeverFlushed,
}

/// A file whose header was looked at.
#[derive(Debug)]
pub struct FileCheck {
    content: Content,
    file_id: [u8; 16],
    size: u64,
    home: FileRef,
    /// The regions to be looked at.
    regions: Vec<Range<u64>>,
    /// The log holds something of it.
    named: bool,
    /// A copy of the header that a repair could write anew.
    pub copy_to_restore: bool,
    /// Without a key, what the sessions are.
    sessions: Arc<SessionTable>,
    nonces: Mutex<Nonces>,
}

#[derive(Debug)]
enum Content {
    Keyed(Arc<File>),
    Plain(Box<Header>),
}

impl Volume {
    /// Looks at a regular file's header.
    pub fn begin(&self, node: &NodeRef, sink: &mut Sink<'_>) -> FsResult<Opened> {
        let home = node.open(Access::Peek)?;
        let mut pages = [0; HEADERS_LEN as usize];
        home.read_at(&mut pages, 0)?;
        let shared = &self.store.shared;
        let keys = match self.keyed {
            true => Some(shared.keys.header_macs(&shared.gate.lease()?)?),
            false => None,
        };
        let copies = Header::copies(&pages, &shared.volume, keys.as_deref());
        let blank = |copy: usize| pages[copy * BLOCK_LEN..][..BLOCK_LEN].iter().all(|&b| b == 0);
        let newest = match &keys {
            // What a reader goes by: an authentic copy that is not understood may be the newer one.
            Some(keys) => {
                Header::decode(&pages, &shared.volume, keys).map(|decoded| decoded.header)
            }
            None => believed(&copies),
        };
        let header = match newest {
            Ok(header) => header,
            Err(_) if blank(0) && blank(1) && !self.log.closed => {
                let detail = "there is nothing where the header should be, as after a crash \
                              before the first flush";
                sink(Flaw::new(What::NeverFlushed, detail).at(0));
                return Ok(Opened::NeverFlushed);
            }
            Err(error) => {
                let (what, detail) = match error {
                    HeaderError::Unsupported => (
                        What::HeaderUnsupported,
                        "the file's header is of a format that is not known here",
                    ),
                    HeaderError::Damaged if blank(0) && blank(1) => {
                        (What::Header, "there is nothing where the file's header should be")
                    }
                    HeaderError::Damaged => {
                        (What::Header, "neither copy of the file's header is authentic")
                    }
                };
                sink(Flaw::new(what, detail).at(0));
                return Ok(Opened::Unreadable);
            }
        };
        let mut restore = false;
        for (copy, read) in copies.iter().enumerate() {
            let flaw = |what, detail: &str| {
                let detail = format!("copy {} of the file's header {detail}", name(copy));
                Flaw::new(what, detail).at(copy as u64 * BLOCK)
            };
            match (read, &copies[1 - copy]) {
                (Err(HeaderError::Damaged), Ok(_)) if blank(copy) && !self.log.closed => {
                    restore = true;
                    sink(flaw(What::HeaderCopyUnwritten, "was never written"));
                }
                (Err(_), Ok(_)) => {
                    restore = true;
                    sink(flaw(What::HeaderCopy, "is damaged"));
                }
                // Which is the file's own, no generation tells, and it has the only keys.
                (Ok(this), Ok(other)) if copy == 1 && this.file_id != other.file_id => {
                    sink(flaw(What::HeaderCopy, "is of another file than copy A"));
                }
                (Ok(this), Ok(other))
                    if this.file_id == other.file_id && this.generation < other.generation =>
                {
                    restore = true;
                    sink(flaw(What::HeaderCopyOlder, "is older"));
                }
                (Ok(this), Ok(other))
                    if copy == 1 && this.generation == other.generation && this != other =>
                {
                    sink(flaw(What::HeaderCopy, "differs from copy A"));
                }
                _ => {}
            }
        }
        self.check_content(&header, sink);
        let named = self.log.named.contains(&header.file_id);
        let mut check = FileCheck {
            file_id: header.file_id,
            size: header.size,
            regions: Vec::new(),
            named,
            copy_to_restore: restore,
            sessions: self.sessions.clone(),
            nonces: Mutex::default(),
            home: home.clone(),
            content: Content::Plain(Box::new(header)),
        };
        if self.keyed {
            let file = self.store.open_home(home)?;
            let proves_pages = self.check_keys(&file, sink)?;
            check.size = file.size();
            // Without the key of their MACs, there is nothing to be told of pages.
            let runs = if proves_pages { file.runs() } else { Vec::new() };
            check.content = Content::Keyed(file);
            check.regions = check.regions_there(runs, sink)?;
        } else if let Content::Plain(header) = &check.content {
            let runs: Vec<_> = header.runs().collect();
            check.regions = check.regions_there(runs, sink)?;
        }
        Ok(Opened::File(check))
    }

    /// Whether the fields fit each other and the volume.
    fn check_content(&self, header: &Header, sink: &mut Sink<'_>) {
        let mut wrong = |detail: String| sink(Flaw::new(What::HeaderContent, detail).at(0));
        if header.size > MAX_SIZE {
            wrong(format!("the size {} is more than a file can have", header.size));
        }
        let last = match header.size {
            0 => 0,
            size => region_of_group(group_of(size - 1)) + 1,
        };
        let mut end = None;
        for run in header.runs() {
            if run.is_empty() || end.is_some_and(|end| run.start <= end) {
                wrong(format!("its regions are not in order at {}", run.start));
            } else if run.end > last && !self.log.named.contains(&header.file_id) {
                wrong(format!("it has regions up to {}, and is {last} long", run.end));
            }
            end = Some(run.end);
        }
        if !header.deks.iter().any(|slot| slot.id == header.active_dek) {
            wrong(format!("new blocks go to DEK slot {}, which it has not", header.active_dek));
        }
        for (i, slot) in header.deks.iter().enumerate() {
            if header.deks[..i].iter().any(|other| other.id == slot.id) {
                wrong(format!("it has DEK slot {} twice", slot.id));
            }
        }
        // With the key, a volume key that is not here proves nothing.
        let newest = self.store.header.volume_key_id.saturating_add(1);
        if !(1..=newest).contains(&header.volume_key_id) {
            wrong(format!("it names volume key {}, which there is not", header.volume_key_id));
        }
    }

    /// False where the pages of the file cannot be proved.
    fn check_keys(&self, file: &File, sink: &mut Sink<'_>) -> FsResult<bool> {
        let shared = &self.store.shared;
        let lease = shared.gate.lease()?;
        let keys = file.keys();
        for detail in shared.keys.unusable(&lease, &keys)? {
            sink(Flaw::new(What::FileKey, detail).at(0));
        }
        let proves_pages = match shared.keys.file_mac(&lease, &keys) {
            Ok(_) => true,
            Err(FsError::Integrity(_)) => false,
            Err(error) => return Err(error),
        };
        lease.still_open()?;
        Ok(proves_pages)
    }
}

/// Of copies that nobody can prove, what there is to go by.
fn believed(copies: &[Result<Header, HeaderError>; 2]) -> Result<Header, HeaderError> {
    let newest = copies.iter().flatten().max_by_key(|header| header.generation);
    match newest {
        Some(header) => Ok(header.clone()),
        None if copies.contains(&Err(HeaderError::Unsupported)) => Err(HeaderError::Unsupported),
        None => Err(HeaderError::Damaged),
    }
}

impl FileCheck {
    pub fn file_id(&self) -> [u8; 16] {
        self.file_id
    }

    /// Bytes of plaintext.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn pieces(&self) -> u64 {
        let regions: u64 = self.regions.iter().map(|run| run.end - run.start).sum();
        regions * PIECES_PER_REGION
    }

    /// Of the listed regions, those whose pages can be there at all: what a damaged header, or a
    /// file cut short, leaves is one flaw and not millions.
    fn regions_there(
        &self,
        runs: Vec<Range<u64>>,
        sink: &mut Sink<'_>,
    ) -> FsResult<Vec<Range<u64>>> {
        // Those that the log adds have no pages yet; what is read without a key names no such.
        if self.named && matches!(self.content, Content::Keyed(_)) {
            return Ok(runs);
        }
        let length = self.home.metadata()?.size;
        // The first region whose page lies past the end.
        let there = |region: u64| generation_page_at(region) < length;
        let mut kept = Vec::new();
        for run in runs {
            let end = run.end.min(u64::from(u32::MAX));
            let past = (run.start..end).find_past(there);
            if past < end && !self.named {
                let first = past.saturating_mul(GROUPS_PER_REGION as u64 * BLOCKS_PER_GROUP as u64);
                let flaw = Flaw::new(
                    What::GenerationSector,
                    "the backing file ends before the generation page",
                );
                let content = first.saturating_mul(BLOCK)..self.size;
                sink(flaw.at(generation_page_at(past)).content(content, self.size));
            }
            if run.start < past {
                kept.push(run.start..past);
            }
        }
        Ok(kept)
    }

    /// Looks at one of the pieces.
    pub fn check(&self, piece: u64, scratch: &mut Scratch, sink: &mut Sink<'_>) -> FsResult<Tally> {
        let (region, part) = (piece / PIECES_PER_REGION, piece % PIECES_PER_REGION);
        let mut left = region;
        let region = self.regions.iter().find_map(|run| {
            let len = run.end - run.start;
            let found = (left < len).then_some(run.start + left);
            left = left.saturating_sub(len);
            found
        });
        let Some(region) = region else { return Ok(Tally::default()) };
        let first = region * GROUPS_PER_REGION as u64 + part * GROUPS_PER_PIECE;
        let groups = first..first + GROUPS_PER_PIECE;
        scratch.nonces = Nonces::default();
        let tally = match &self.content {
            Content::Keyed(file) => file.verify(region, groups, scratch, sink)?,
            Content::Plain(header) => {
                let sessions = &self.sessions;
                let plain = plain::Plain { home: &self.home, header, sessions, exact: !self.named };
                plain.check(region, groups, scratch, sink)?
            }
        };
        self.nonces.lock().take(std::mem::take(&mut scratch.nonces));
        Ok(tally)
    }

    /// When all pieces were looked at.
    pub fn finish(&self, sink: &mut Sink<'_>) -> FsResult<()> {
        let mut nonces = self.nonces.lock();
        if let Some((session, counter)) = nonces.repeated() {
            let detail = format!(
                "two of its blocks were sealed with the nonce of session {session}, counter \
                 {counter}"
            );
            sink(Flaw::new(What::Nonce, detail));
        }
        if nonces.partial {
            log::info!(
                "file {}: written in too many pieces to compare all of its nonces",
                hex(&self.file_id)
            );
        }
        // A size that no file has is another flaw, and no number to reckon with.
        let needed = backing_len(self.size.min(MAX_SIZE));
        let length = self.home.metadata()?.size;
        if length > needed && !self.named {
            let detail = format!("{} bytes more than its content needs", length - needed);
            sink(Flaw::new(What::Length, detail).at(needed));
        }
        Ok(())
    }
}

trait FindPast {
    /// The first number of the range for which `there`, true up to some number, is false; the end
    /// if there is none.
    fn find_past(self, there: impl Fn(u64) -> bool) -> u64;
}

impl FindPast for Range<u64> {
    fn find_past(self, there: impl Fn(u64) -> bool) -> u64 {
        let (mut low, mut high) = (self.start, self.end);
        while low < high {
            let middle = low + (high - low) / 2;
            if there(middle) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

/// What keeps a check from going on; anything else is a flaw of what was to be read.
pub(in crate::store) fn read_flaw(error: FsError) -> FsResult<String> {
    match error {
        FsError::Os(errno) if errno != rustix::io::Errno::NOMEM => {
            Ok(format!("the disk does not give it out: {errno}"))
        }
        error => Err(error),
    }
}
