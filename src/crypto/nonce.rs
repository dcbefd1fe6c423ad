//! Nonces by the deterministic construction of SP 800-38D, 8.2.1: session (32 bits) || counter
//! (64 bits), both little-endian.
//!
//! Invariant: one counter per session, and every number of it is handed out once. Keys are
//! derived from the session's random salt, so a counter that starts again in another session, or
//! in a copy of the volume, meets other keys. The counter is never stored.

use std::sync::atomic::{AtomicU64, Ordering};

use super::aead::NONCE_LEN;

/// The counter of one session.
#[derive(Debug)]
pub struct Counter {
    session: u32,
    next: AtomicU64,
}

/// A run of nonces that nobody else has.
#[derive(Debug)]
pub struct Range {
    session: u32,
    next: u64,
    end: u64,
}

impl Counter {
    pub fn new(session: u32) -> Counter {
        Counter { session, next: AtomicU64::new(1) }
    }

    pub fn session(&self) -> u32 {
        self.session
    }

    /// `count` nonces. The counter cannot wrap: at a billion a second it lasts 500 years.
    pub fn take(&self, count: u64) -> Range {
        let next = self.next.fetch_add(count, Ordering::Relaxed);
        Range { session: self.session, next, end: next + count }
    }
}

impl Range {
    /// The next counter value and its nonce; None when the range is used up.
    pub fn next_nonce(&mut self) -> Option<(u64, [u8; NONCE_LEN])> {
        if self.next == self.end {
            return None;
        }
        let counter = self.next;
        self.next += 1;
        Some((counter, nonce(self.session, counter)))
    }
}

/// The nonce that a stored session and counter stand for.
pub fn nonce(session: u32, counter: u64) -> [u8; NONCE_LEN] {
    let mut nonce = [0; NONCE_LEN];
    nonce[..4].copy_from_slice(&session.to_le_bytes());
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    nonce
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn threads_never_share_a_nonce() {
        let counter = Counter::new(7);
        let mut seen = HashSet::new();
        let taken: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|i| {
                    let counter = &counter;
                    scope.spawn(move || {
                        let mut all = Vec::new();
                        for _ in 0..1000 {
                            let mut range = counter.take(i + 1);
                            while let Some(nonce) = range.next_nonce() {
                                all.push(nonce);
                            }
                        }
                        all
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(taken.len(), 10_000);
        for (value, bytes) in taken {
            assert_eq!(bytes, nonce(7, value));
            assert!(value > 0 && seen.insert(bytes));
        }
    }
}
