//! The intent log: records of whole requests, durable before anything at home is overwritten.
//!
//! Two streams, each a ring in a file of its own, so that the flush of a small synchronous write
//! never has to wait for bulk data. The files are written whole when they are made: a commit
//! changes no metadata of the backing file system. Whoever waits for a record shares one write and
//! one flush with everyone else who waits.
//!
//! Invariants:
//! - A record is placed and gets its MAC in one go, under the caller's lease, and is then written
//!   whatever happens to the keys: [`Log::append`] never leaves a gap in a stream's sequence.
//! - A failed write or flush is final: the log is poisoned, everyone who waits and everyone after
//!   them gets EIO, and only the next mount's recovery goes on. Nothing is tried again.
//! - Who appends has reserved the room before, holding nothing that others need to make room.
//! - Space is used again only after [`Log::trim`], which the caller owes: data, tags and headers of
//!   the trimmed records are durable at home, and nobody reads their bodies any more.
//! - A record whose blocks, or some of them, were written home counts as durable only when those
//!   blocks are: the flush of the stream flushes their home file first.
//! - After recovery a stream's sequence goes on past every seq that an unread rest of the ring may
//!   hold, so that no record of an earlier life is ever taken for a new one.
//!
//! What the log does not do: it knows nothing of files, keys of files or blocks at home; it never
//! reads a body but for its caller.

mod anchor;
mod commit;
mod overlaps;
mod pending;
mod queue;
mod record;
mod ring;
mod rounds;
mod scan;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::backing::{Access, FileRef, NodeRef};
use crate::crypto::mac::MacKey;
use crate::error::{Context, Error, FsResult, Result};
use crate::store::keys::MacKeys;
use crate::sync::{Condvar, Mutex};
use anchor::ANCHORS_LEN;
pub(super) use anchor::Anchor;
use commit::Streams;
use overlaps::Overlaps;
pub(super) use overlaps::Scope;
pub use pending::PendingFlush;
pub(super) use queue::Home;
use queue::Queue;
pub(super) use record::{Draft, Entry, Kind, Place, Record, SAME_SIZE};
use ring::{Ring, Spot};
use rounds::Progress;
pub(super) use scan::Proof;
use scan::Scan;

pub(crate) const PAGE: usize = 4096;
pub(crate) const STREAMS: usize = 2;

/// The log's files in the volume's root.
pub(super) const FILES: [&[u8]; STREAMS] = [b"log.hot", b"log.bulk"];

/// Which ring a record goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(super) enum Stream {
    /// Small and synchronous.
    Hot = 0,
    Bulk = 1,
}

/// The file of a stream.
#[derive(Clone, Debug)]
pub(super) struct LogFile {
    pub(super) dir: NodeRef,
    pub(super) name: &'static [u8],
    /// The directory's path, for messages.
    pub(super) shown: String,
}

impl LogFile {
    pub(super) fn path(&self) -> String {
        format!("{}/{}", self.shown, String::from_utf8_lossy(self.name))
    }

    fn cannot(&self, verb: &str) -> String {
        format!("cannot {verb} {}", self.path())
    }
}

/// Bytes of each ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) hot: u64,
    pub(super) bulk: u64,
}

impl Size {
    /// The smallest that holds a few of the largest records.
    pub(super) const MIN: u64 = 4 << 20;

    /// `total` shared out: a quarter to the hot stream.
    pub(super) fn of_total(total: u64) -> Size {
        let hot = (total / 4).max(Size::MIN) / PAGE as u64 * PAGE as u64;
        Size { hot, bulk: total.saturating_sub(hot).max(Size::MIN) / PAGE as u64 * PAGE as u64 }
    }
}

impl Default for Size {
    fn default() -> Size {
        Size::of_total(256 << 20)
    }
}

/// A record's place in the sequence, to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) stream: Stream,
    pub(super) seq: u64,
    /// Of the record's body in its stream's file.
    pub(super) body_at: u64,
}

/// The key of one session's records.
#[derive(Clone, Debug)]
pub(super) struct SessionKey {
    pub(super) session: u32,
    pub(super) key: Arc<MacKey>,
}

/// An open log.
#[derive(Debug)]
pub(super) struct Log {
    files: [FileRef; STREAMS],
    overlaps: Overlaps,
    /// That it is poisoned, for who has no lock.
    failed: AtomicBool,
    /// For messages.
    paths: [String; STREAMS],
    /// Rises with every record of either stream.
    order: AtomicU64,
    streams: Mutex<Streams>,
    /// Those of the queues, for who needs no lock.
    progress: [Arc<Progress>; STREAMS],
    space: [Condvar; STREAMS],
    /// The newest on disk. One trim at a time.
    anchor: Mutex<Anchor>,
    /// That of the bulk stream's file, which says nothing new.
    bulk_anchor: Mutex<Anchor>,
}

/// A log as a crash, or a clean end, left it.
#[derive(Debug)]
pub(super) struct Found {
    /// What has to go home, in order.
    pub(super) records: Vec<Record>,
    /// What does not count, since it follows something that is not there.
    pub(super) cut_short: Vec<Record>,
    /// One anchor copy of a stream is damaged; the other serves.
    pub(super) damaged_copy: bool,
    /// The volume was closed, and nothing has been written since.
    pub(super) clean: bool,
    /// The last record of each stream that a later one says was durable.
    pub(super) durable: [u64; STREAMS],
    files: [FileRef; STREAMS],
    paths: [String; STREAMS],
    anchors: [Anchor; STREAMS],
    /// Every record of the rings, also those that do not go home, with its length.
    live: [Vec<(Spot, u64)>; STREAMS],
    ends: [Spot; STREAMS],
    next_order: u64,
}

impl Log {
    /// Makes the files of an empty log, durable when this returns. `clean`: nothing was ever in it.
    pub(super) fn format(
        files: &[LogFile; STREAMS],
        size: Size,
        log_id: [u8; 16],
        keys: &MacKeys,
        clean: bool,
    ) -> Result<()> {
        for (stream, len) in [size.hot, size.bulk].into_iter().enumerate() {
            if len < Size::MIN || !len.is_multiple_of(PAGE as u64) {
                return Err(Error::usage(format!(
                    "a log stream of {len} bytes is not possible: at least {} in whole pages of {PAGE}",
                    Size::MIN
                )));
            }
            let anchor = Anchor {
                log_id,
                stream: stream as u8,
                generation: 1,
                ring_len: len,
                tails: [Spot { seq: 1, at: ANCHORS_LEN }; STREAMS],
                clean,
            };
            let made = &files[stream];
            let make = || -> io::Result<()> {
                let file = made.dir.create_unnamed()?;
                // Or a full disk would be the end of it.
                file.overwrite_in_place();
                // Written, not only allocated: an unwritten extent costs a journal commit later.
                let zeros = vec![0; 1 << 20];
                let mut at = 0;
                while at < anchor.ring_end() {
                    let take = (anchor.ring_end() - at).min(zeros.len() as u64);
                    file.write_at(&zeros[..take as usize], at)?;
                    at += take;
                }
                anchor.write_first(&file, keys)?;
                file.sync_all()?;
                made.dir.link_file(&*file, made.name)?;
                made.dir.sync()
            };
            make().context(|| made.cannot("make"))?;
        }
        Ok(())
    }

    /// Whether that file is the stream of the log with that id.
    pub(super) fn is_at(
        dir: &NodeRef,
        name: &[u8],
        stream: usize,
        log_id: &[u8; 16],
        keys: Option<&MacKeys>,
    ) -> io::Result<bool> {
        let file = match dir.lookup(name).and_then(|node| node.open(Access::Read)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            opened => opened?,
        };
        let anchor = Anchor::read(&file, stream as u8, keys)?;
        Ok(anchor.is_some_and(|(anchor, _)| anchor.log_id == *log_id))
    }

    /// Reads what is there and changes nothing. Fails where a log is missing, foreign, or damaged
    /// in a part that was durable.
    pub(super) fn find(
        at: &[LogFile; STREAMS],
        log_id: &[u8; 16],
        proof: Proof<'_>,
        access: Access,
    ) -> Result<Found> {
        let (hot, hot_damaged) = open_stream(&at[0], 0, log_id, proof, access)?;
        let (bulk, bulk_damaged) = open_stream(&at[1], 1, log_id, proof, access)?;
        let files = [hot.0, bulk.0];
        let anchors = [hot.1, bulk.1];
        for (stream, tail) in anchors[0].tails.iter().enumerate() {
            let in_ring = (ANCHORS_LEN..=anchors[stream].ring_end()).contains(&tail.at);
            if !in_ring || !tail.at.is_multiple_of(PAGE as u64) {
                let path = at[0].path();
                return Err(Error::corrupt(format!("the anchor of {path} is impossible")));
            }
        }
        let scan = |stream: usize| {
            let tail = anchors[0].tails[stream];
            let scan = Scan::run(&files[stream], &anchors[stream], tail, proof)
                .context(|| at[stream].cannot("read"))?;
            if let Some(session) = scan.unknown {
                return Err(Error::corrupt(format!(
                    "the log {} has records of session {session}, which the session table does not \
                     have, or whose key cannot be made; restore sessions.a and sessions.b as they \
                     were with this log",
                    at[stream].path()
                )));
            }
            if scan.damaged {
                return Err(Error::corrupt(format!(
                    "the log {} is damaged: record {} was on stable storage and is not there; \
                     restore the volume from a backup, or give up what only the log has by `byokfs \
                     log discard`",
                    at[stream].path(),
                    scan.next_seq
                )));
            }
            Ok(scan)
        };
        let scans = [scan(0)?, scan(1)?];
        let live = [0, 1].map(|i: usize| {
            let spot = |record: &Record| Spot { seq: record.place.seq, at: record.place.at };
            let records = scans[i].records.iter();
            records.map(|record| (spot(record), record.pages() * PAGE as u64)).collect()
        });
        let ends = [0, 1].map(|i: usize| Spot { seq: scans[i].next_seq, at: scans[i].end_at });
        let last = scans.iter().flat_map(|scan| &scan.records).map(|record| record.place.order);
        let next_order = last.max().unwrap_or(0) + 1;
        let durable = [0, 1].map(|i: usize| {
            let claims = scans[i].records.iter().map(|record| record.place.durable_seq);
            claims.max().unwrap_or(0)
        });
        let (records, cut_short) = scan::merge(scans);
        let damaged_copy = hot_damaged || bulk_damaged;
        let clean = anchors[0].clean;
        let paths = [0, 1].map(|i: usize| at[i].path());
        Ok(Found {
            records,
            cut_short,
            damaged_copy,
            clean,
            durable,
            files,
            paths,
            anchors,
            live,
            ends,
            next_order,
        })
    }

    /// A record in the writers' hands. The caller holds the lease that `key` came from. `home` is
    /// the file to which the blocks past the body have been written.
    pub(super) fn append(
        &self,
        mut room: Room,
        draft: Draft,
        home: Option<Home>,
        key: &SessionKey,
    ) -> FsResult<Position> {
        let pages = draft.pages();
        if draft.check().is_err() || pages > room.pages {
            return Err(rustix::io::Errno::INVAL.into());
        }
        let index = room.stream as usize;
        let (spot, durable_seq, order) = {
            let mut streams = self.streams.lock();
            streams.check()?;
            // One of them may have told somebody else of these very blocks.
            if home.as_ref().is_some_and(|home| home.failures != streams.home_failures) {
                return Err(rustix::io::Errno::IO.into());
            }
            let queue = &mut streams.queues[index];
            let spot = queue.place(pages, home);
            // What the record does not need.
            queue.ring.unreserve(std::mem::take(&mut room.pages) - pages);
            (spot, queue.durable_seq(), self.order.fetch_add(1, Ordering::Relaxed))
        };
        self.space[index].notify_all();
        let stream = room.stream;
        let slot = commit::Slot::new(self, index, spot.seq);
        let place = Place {
            stream: stream as u8,
            session: key.session,
            seq: spot.seq,
            at: spot.at,
            durable_seq,
            order,
        };
        let head = draft.encode_head(&place, &key.key);
        let body_at = spot.at + head.len() as u64;
        slot.fill(head, draft.body);
        Ok(Position { stream, seq: spot.seq, body_at })
    }

    /// Reads ciphertext of a record that has not been trimmed.
    pub(super) fn read(&self, stream: Stream, buf: &mut [u8], at: u64) -> io::Result<()> {
        let count = self.files[stream as usize].read_at(buf, at)?;
        if count < buf.len() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    /// Gives back the space of the records of each stream before its seq in `seqs`: all of them
    /// are durable at home, and of each file, all that is older than one of them. Writes the
    /// anchor that `seal` has sealed, and flushes it, first. `clean` says that nothing will be
    /// written any more.
    pub(super) fn trim(
        &self,
        seqs: [u64; STREAMS],
        clean: bool,
        seal: impl FnOnce(&Anchor) -> FsResult<[u8; anchor::RECORD_LEN]>,
    ) -> FsResult<()> {
        let mut anchor = self.anchor.lock();
        let mut next = *anchor;
        next.generation += 1;
        next.clean = clean;
        {
            let streams = self.streams.lock();
            streams.check()?;
            for (stream, seq) in seqs.into_iter().enumerate() {
                next.tails[stream] = streams.queues[stream].ring.tail_for(seq);
            }
        }
        let sealed = seal(&next)?;
        let write = || next.write(&self.files[0], &sealed);
        let failed = |error: &io::Error| self.poison(0, "the anchor cannot be written", error);
        self.flush_of(Scope::Stream(0), write, failed)?;
        *anchor = next;
        let mut streams = self.streams.lock();
        for (stream, tail) in next.tails.iter().enumerate() {
            if streams.queues[stream].ring.trim(tail.seq) {
                self.space[stream].notify_all();
            }
        }
        Ok(())
    }

    /// Has both copies of both anchors made by the current volume key; the one is on stable storage
    /// before the other is touched.
    pub(super) fn reseal_anchors(&self, keys: &MacKeys) -> io::Result<()> {
        let mut hot = self.anchor.lock();
        let mut bulk = self.bulk_anchor.lock();
        for (anchor, file) in [&mut *hot, &mut *bulk].into_iter().zip(&self.files) {
            for _ in 0..2 {
                let next = Anchor { generation: anchor.generation + 1, ..*anchor };
                next.write(file, &next.seal(keys))?;
                *anchor = next;
            }
        }
        Ok(())
    }

    /// Bytes of both rings.
    pub(super) fn size(&self) -> u64 {
        let streams = self.streams.lock();
        streams.queues.iter().map(|queue| queue.ring.capacity()).sum()
    }

    /// Nothing is in it, and the anchor says that nothing will come.
    pub(super) fn is_closed(&self) -> bool {
        let clean = self.anchor.lock().clean;
        let streams = self.streams.lock();
        clean && streams.queues.iter().all(|queue| queue.ring.used() == 0)
    }

    /// Where a stream's file is.
    pub(super) fn path(&self, stream: Stream) -> &str {
        &self.paths[stream as usize]
    }

    pub(super) fn usage(&self, stream: Stream) -> Usage {
        self.streams.lock().queues[stream as usize].usage()
    }

    /// The seqs before which nothing is in the log any more, as far as a mount would look.
    pub(super) fn tails(&self) -> [u64; STREAMS] {
        self.anchor.lock().tails.map(|tail| tail.seq)
    }

    /// The seqs that the streams' next records will have.
    pub(super) fn next_seqs(&self) -> [u64; STREAMS] {
        let streams = self.streams.lock();
        [0, 1].map(|stream: usize| streams.queues[stream].ring.next_seq())
    }
}

/// Room for one record.
#[derive(Debug)]
pub(super) struct Room {
    log: Arc<Log>,
    stream: Stream,
    pages: u64,
    usage: Usage,
}

/// Bytes of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) used: u64,
    pub(super) capacity: u64,
}

impl Room {
    pub(super) fn stream(&self) -> Stream {
        self.stream
    }

    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Of the stream, when this was reserved, and without it.
    pub(super) fn usage(&self) -> Usage {
        self.usage
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.log.unreserve(self.stream, self.pages);
    }
}

impl Found {
    /// Everything that was read is on stable storage afterwards. What may not have been is written
    /// again: of what could not be written the kernel tells once, to whoever had the log before, and
    /// shows it from its memory all the same.
    pub(super) fn make_durable(&self) -> Result<()> {
        for (stream, file) in self.files.iter().enumerate() {
            let path = &self.paths[stream];
            let open = |(spot, _): &&(Spot, u64)| spot.seq > self.durable[stream];
            for &(spot, len) in self.live[stream].iter().filter(open) {
                let mut bytes = vec![0; len as usize];
                file.read_at(&mut bytes, spot.at)
                    .and_then(|_| file.write_at(&bytes, spot.at))
                    .context(|| format!("cannot write record {} of {path} again", spot.seq))?;
            }
            file.sync_data().context(|| format!("cannot flush {path}"))?;
        }
        Ok(())
    }

    /// Opens the log with its records in it. Before the first append the caller owes: all of
    /// [`Found::records`] durable at home, and a [`Log::trim`] of everything, twice, so that both
    /// copies of the anchor know the numbers from here on.
    pub(super) fn resume(self) -> Arc<Log> {
        let queue = |stream: usize| {
            let anchor = self.anchors[stream];
            // Past every seq that what lies behind the end may hold: a record takes a page at
            // least. The scan ends there at the latest, whatever is written before the next crash.
            let seq = self.ends[stream].seq + anchor.ring_len / PAGE as u64 + 1;
            let next = Spot { seq, at: self.ends[stream].at };
            let ring = Ring::resume(ANCHORS_LEN, anchor.ring_end(), next, &self.live[stream]);
            Queue::new(ring)
        };
        let queues = [queue(0), queue(1)];
        let progress = [0, 1].map(|stream: usize| Arc::clone(&queues[stream].progress));
        Arc::new(Log {
            files: self.files,
            overlaps: Overlaps::default(),
            failed: AtomicBool::new(false),
            paths: self.paths,
            order: AtomicU64::new(self.next_order),
            streams: Mutex::new(Streams::new(queues)),
            progress,
            space: Default::default(),
            anchor: Mutex::new(self.anchors[0]),
            bulk_anchor: Mutex::new(self.anchors[1]),
        })
    }
}

/// The generation of each of the two anchors of each stream; None for one that is damaged, or whose
/// file is missing.
pub(super) fn anchor_copies(
    at: &[LogFile; STREAMS],
    keys: Option<&MacKeys>,
) -> Result<[[Option<u64>; 2]; STREAMS]> {
    let mut all = [[None; 2]; STREAMS];
    for (stream, generations) in all.iter_mut().enumerate() {
        let at = &at[stream];
        let file = match at.dir.lookup(at.name).and_then(|node| node.open(Access::Read)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => opened.context(|| at.cannot("open"))?,
        };
        let copies = Anchor::copies(&file, stream as u8, keys);
        let copies = copies.context(|| at.cannot("read"))?;
        *generations = copies.map(|anchor| anchor.map(|anchor| anchor.generation));
    }
    Ok(all)
}

/// Writes the damaged anchor of each stream anew from the other one.
pub(super) fn restore_anchors(at: &[LogFile; STREAMS], keys: &MacKeys) -> Result<()> {
    for (copies, at) in anchor_copies(at, Some(keys))?.into_iter().zip(at) {
        let (from, to) = match copies {
            [Some(_), None] => (0, PAGE as u64),
            [None, Some(_)] => (PAGE as u64, 0),
            _ => continue,
        };
        let restore = || -> io::Result<()> {
            let file = at.dir.lookup(at.name)?.open(Access::ReadWrite)?;
            let mut page = vec![0; PAGE];
            file.read_at(&mut page, from)?;
            file.write_at(&page, to)?;
            file.sync_data()
        };
        restore().context(|| at.cannot("write"))?;
    }
    Ok(())
}

type Opened = ((FileRef, Anchor), bool);

fn open_stream(
    at: &LogFile,
    stream: usize,
    log_id: &[u8; 16],
    proof: Proof<'_>,
    access: Access,
) -> Result<Opened> {
    let foreign = |what: &str| {
        Error::corrupt(format!(
            "the log {} is {what}; put this volume's own log back, restore the volume from a \
             backup, or give up what only the log has by `byokfs log discard`",
            at.path()
        ))
    };
    let open = || at.dir.lookup(at.name)?.open(access);
    let file = match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(foreign("missing")),
        opened => opened.context(|| at.cannot("open"))?,
    };
    let keys = proof.anchor_keys();
    let read = Anchor::read(&file, stream as u8, keys).context(|| at.cannot("read"))?;
    let (anchor, damaged) = read.ok_or_else(|| foreign("damaged, or not of this volume"))?;
    if anchor.log_id != *log_id {
        return Err(foreign("not this volume's"));
    }
    let whole = file.metadata().context(|| at.cannot("read"))?.size;
    if !anchor.ring_len.is_multiple_of(PAGE as u64) || whole < anchor.ring_end() {
        return Err(foreign("shorter than it says"));
    }
    Ok(((file, anchor), damaged))
}
