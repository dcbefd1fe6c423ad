//! Pages kept in memory, bounded in bytes, and the buffers that requests work in.
//!
//! A cached page is what the disk has: it is replaced only after its write succeeded. Pages hold
//! no secrets. Buffers do hold plaintext: they are reused, not freed, and overwritten when the
//! gate is wiped.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use zeroize::Zeroize;

use super::layout::BLOCK_LEN;
use super::page::{Page, PageId};
use crate::sync::Mutex;

const SHARDS: usize = 16;

/// Which page of which opened file.
pub(super) type PageKey = (u64, PageId);

#[derive(Debug)]
struct Slot {
    key: PageKey,
    page: Arc<Page>,
    referenced: bool,
}

/// Second chance: the hand passes over a page that was used since it last came by.
#[derive(Debug, Default)]
struct Shard {
    index: HashMap<PageKey, usize>,
    slots: Vec<Slot>,
    hand: usize,
}

#[derive(Debug)]
pub(super) struct PageCache {
    shards: [Mutex<Shard>; SHARDS],
    slots_per_shard: usize,
}

impl PageCache {
    pub(super) fn new(bytes: usize) -> PageCache {
        let slots = (bytes / BLOCK_LEN / SHARDS).max(4);
        PageCache { shards: Default::default(), slots_per_shard: slots }
    }

    fn shard(&self, key: &PageKey) -> &Mutex<Shard> {
        let (kind, index) = match key.1 {
            PageId::Tags(index) => (0, index),
            PageId::Generations(index) => (7, index),
        };
        let mixed = (key.0.wrapping_mul(31) ^ index).wrapping_add(kind);
        &self.shards[mixed as usize % SHARDS]
    }

    pub(super) fn get(&self, key: &PageKey) -> Option<Arc<Page>> {
        let mut shard = self.shard(key).lock();
        let at = *shard.index.get(key)?;
        let slot = &mut shard.slots[at];
        slot.referenced = true;
        Some(slot.page.clone())
    }

    pub(super) fn insert(&self, key: PageKey, page: Arc<Page>) {
        let mut shard = self.shard(&key).lock();
        let shard = &mut *shard;
        if let Some(&at) = shard.index.get(&key) {
            shard.slots[at].page = page;
            return;
        }
        let slot = Slot { key, page, referenced: false };
        if shard.slots.len() < self.slots_per_shard {
            shard.index.insert(key, shard.slots.len());
            shard.slots.push(slot);
            return;
        }
        let at = loop {
            let at = shard.hand;
            shard.hand = (at + 1) % shard.slots.len();
            if !std::mem::take(&mut shard.slots[at].referenced) {
                break at;
            }
        };
        shard.index.remove(&shard.slots[at].key);
        shard.index.insert(key, at);
        shard.slots[at] = slot;
    }

    pub(super) fn remove(&self, key: &PageKey) {
        let mut shard = self.shard(key).lock();
        let shard = &mut *shard;
        let Some(at) = shard.index.remove(key) else { return };
        shard.slots.swap_remove(at);
        if let Some(moved) = shard.slots.get(at) {
            shard.index.insert(moved.key, at);
        }
        if shard.hand >= shard.slots.len() {
            shard.hand = 0;
        }
    }
}

/// Holds the blocks of the largest request.
pub(super) const BUFFER_LEN: usize = (1 << 20) + 2 * BLOCK_LEN;
/// Buffers kept when nobody uses them.
const MAX_IDLE: usize = 16;

#[derive(Debug, Default)]
pub(super) struct BufferPool(Mutex<Idle>);

#[derive(Debug, Default)]
struct Idle {
    buffers: Vec<Box<[u8]>>,
    wipes: u64,
}

/// A buffer on loan.
pub(super) struct Buffer<'a> {
    bytes: Box<[u8]>,
    pool: &'a BufferPool,
    wipes: u64,
}

impl BufferPool {
    pub(super) fn take(&self) -> Buffer<'_> {
        let (bytes, wipes) = {
            let mut idle = self.0.lock();
            (idle.buffers.pop(), idle.wipes)
        };
        let bytes = bytes.unwrap_or_else(|| vec![0; BUFFER_LEN].into_boxed_slice());
        Buffer { bytes, pool: self, wipes }
    }

    /// Overwrites what is idle now, and what is in use when it comes back.
    pub(super) fn wipe(&self) {
        let mut idle = self.0.lock();
        idle.wipes += 1;
        for buffer in &mut idle.buffers {
            buffer.zeroize();
        }
    }
}

impl Deref for Buffer<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        let mut idle = self.pool.0.lock();
        if idle.wipes != self.wipes {
            bytes.zeroize();
        }
        if idle.buffers.len() < MAX_IDLE {
            idle.buffers.push(bytes);
        } else {
            bytes.zeroize();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_stays_within_its_bytes_and_keeps_what_is_used() {
        let cache = PageCache::new(64 * BLOCK_LEN);
        let page = |i| Arc::new(Page::empty(PageId::Tags(i)));
        let hot = (1, PageId::Generations(3));
        cache.insert(hot, page(3));
        for i in 0..1000 {
            let key = (2, PageId::Tags(i));
            cache.insert(key, page(i));
            assert!(cache.get(&hot).is_some());
            if i % 3 == 0 {
                assert_eq!(cache.get(&key).unwrap().id(), PageId::Tags(i));
                cache.remove(&key);
                assert!(cache.get(&key).is_none());
            }
        }
        let held: usize = cache.shards.iter().map(|shard| shard.lock().slots.len()).sum();
        assert!(held <= 64);
        for shard in &cache.shards {
            let shard = shard.lock();
            assert_eq!(shard.index.len(), shard.slots.len());
            assert!(shard.index.iter().all(|(key, &at)| shard.slots[at].key == *key));
        }
    }

    #[test]
    fn buffers_are_reused_and_wiped() {
        let pool = BufferPool::default();
        let mut buffer = pool.take();
        buffer[5] = 1;
        drop(buffer);
        let buffer = pool.take();
        assert_eq!(buffer[5], 1);
        pool.wipe();
        drop(buffer);
        assert_eq!(pool.take()[5], 0);
        let mut buffer = pool.take();
        buffer[5] = 1;
        drop(buffer);
        pool.wipe();
        assert!(pool.0.lock().buffers.iter().all(|buffer| buffer[5] == 0));
    }
}
