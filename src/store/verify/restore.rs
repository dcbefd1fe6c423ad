//! Writing a redundant copy anew from the good one, which is not touched: a power cut leaves at
//! worst what there was. The caller has the volume to itself.

use std::sync::Arc;

use crate::backing::{Access, Backing, FileRef, NodeRef, SetTime};
use crate::error::{Context, Error, FsError, FsResult, Kind, Result};
use crate::key::gate::Gate;
use crate::store::header::Header;
use crate::store::intent_log;
use crate::store::keys::{self, KeySource};
use crate::store::layout::{BLOCK, BLOCK_LEN, HEADERS_LEN};
use crate::store::session::SessionTable;
use crate::store::{Store, log_place, volume};

/// Before anything is replayed: volume header, session table and anchors.
pub fn volume_copies(backing: &dyn Backing, gate: &Gate) -> Result<()> {
    let (root, shown) = (backing.root(), backing.display_path());
    let source = KeySource::Gate(gate);
    let (header, _) = volume::read(&root, &shown)?;
    if !header.is_authentic(&source.with(keys::volume_macs)?) {
        // Another volume's key restores nothing.
        return Ok(());
    }
    if let Some((from, to)) = stale(volume::copies(&root, &shown)?) {
        let cannot = || format!("cannot write {shown}/volume");
        let file = root.lookup(volume::FILE).and_then(|node| node.open(Access::ReadWrite));
        copy_page(&file.context(cannot)?, from, to).context(cannot)?;
    }
    let key = source.with(keys::sessions_macs)?;
    let copies = SessionTable::copies(&root, &header.uuid, Some(&key), &shown)?;
    let generations = [0, 1].map(|i: usize| copies[i].as_ref().map(SessionTable::generation));
    if let Some((from, to)) = stale(generations)
        && let Some(table) = &copies[from]
    {
        let mut damaged = [false; 2];
        damaged[to] = true;
        table.store(&root, &header.uuid, &key, damaged, &shown)?;
    }
    let macs = source.with(keys::anchor_macs)?;
    let (uuid, log_id) = (&header.uuid, &header.log_id);
    let place = log_place::Found::look(backing, uuid, log_id, Some(&macs), false, false)?;
    intent_log::restore_anchors(&place.log_files(), &macs)
}

/// Brings home what the log holds, as a mount does, and closes the volume.
pub fn bring_home(backing: &Arc<dyn Backing>, gate: &Arc<Gate>) -> Result<()> {
    let header = volume::read(&backing.root(), &backing.display_path())?;
    let store = Store::assemble(backing.clone(), gate.clone(), false, header, None)?;
    store.start_session_by_gate()?;
    store.recover()?;
    store.close().map_err(|error| {
        Error::new(Kind::Io, format!("the log could not be brought home: {error}"))
    })
}

/// From which of two copies to which, by their generations.
fn stale(generations: [Option<u64>; 2]) -> Option<(usize, usize)> {
    match generations {
        [Some(a), Some(b)] if a == b => None,
        // None is less than any.
        [a, b] if a > b => Some((0, 1)),
        [None, None] => None,
        _ => Some((1, 0)),
    }
}

fn copy_page(file: &FileRef, from: usize, to: usize) -> std::io::Result<()> {
    let mut page = vec![0; BLOCK_LEN];
    file.read_at(&mut page, from as u64 * BLOCK)?;
    file.write_at(&page, to as u64 * BLOCK)?;
    file.sync_data()
}

impl super::Volume {
    /// The worse copy of a file's header from the better one. The time of modification, which is
    /// that of the content, stays.
    pub fn restore_header(&self, node: &NodeRef) -> FsResult<()> {
        let file = node.open(Access::ReadWrite)?;
        let mut pages = [0; HEADERS_LEN as usize];
        file.read_at(&mut pages, 0)?;
        let shared = &self.store.shared;
        let copies = {
            let lease = shared.gate.lease()?;
            let keys = shared.keys.header_macs(&lease)?;
            let copies = Header::copies(&pages, &shared.volume, Some(&keys));
            lease.still_open()?;
            copies
        };
        let [a, b] = copies.map(|copy| copy.ok().map(|header| header.generation));
        let Some((from, to)) = stale([a, b]) else { return Ok(()) };
        let mtime = node.metadata()?.mtime;
        copy_page(&file, from, to)?;
        node.set_times(SetTime::Keep, SetTime::At(mtime))?;
        file.sync_all().map_err(FsError::from)
    }
}
