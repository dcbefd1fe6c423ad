//! The gate: every use of a key goes through a [`Lease`] of it.
//!
//! Invariants:
//! - It starts shut, and opens only with a keyring and a `valid_until`.
//! - It fails closed: a lease compares `valid_until` with CLOCK_BOOTTIME, and only a full success
//!   of the watcher moves it. A dead watcher, a stuck one or a suspended machine shuts the gate.
//!   Once passed, only [`Gate::open`] opens it again.
//! - After [`Gate::shut`] returns, no new lease is granted. After [`Gate::drain`] returned true,
//!   none is held. [`Gate::wipe`] then leaves no copy of the keyring, nor of what was derived
//!   from it by those who registered.
//! - A lease that outlives a cut-off is noticed: [`Lease::still_open`] and the epoch.
//!
//! A lease covers cipher work only, never backing I/O, so that a slow disk cannot hold up a
//! cut-off. The gate decides nothing: when to open or shut is for the watcher and its policy.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use parking_lot::{MappedRwLockReadGuard, Mutex, RwLock, RwLockReadGuard};

pub use super::clock::BootTime;
pub use super::keyring::Keyring;
pub use super::reason::Reason;
use crate::error::CutOff;

/// Enough that threads on different cores rarely share one; each costs 128 bytes.
const SHARDS: usize = 32;

/// How long [`Gate::open`] waits for a lease of an earlier epoch to end.
const OPEN_LIMIT: Duration = Duration::from_secs(5);

/// Something that holds keys derived from the keyring.
pub trait Wipe: Send + Sync {
    /// Drop every key derived from the keyring. Must not wait for I/O, nor take a lease.
    fn wipe(&self);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The key was checked not long ago.
    Available,
    /// Serving, but the last checks did not get through or are waiting to be confirmed.
    Degraded,
    /// No key in memory; every operation is refused.
    Inaccessible,
}

impl State {
    /// Stable name, as in status, audit events and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            State::Available => "Available",
            State::Degraded => "Degraded",
            State::Inaccessible => "Inaccessible",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A snapshot for `byokfs status`.
#[derive(Clone, Debug)]
pub struct GateStatus {
    pub state: State,
    /// None while Available.
    pub reason: Option<Reason>,
    /// When the state (or the reason of an Inaccessible volume) last changed.
    pub since: SystemTime,
    /// How many times the gate has been opened.
    pub epoch: u64,
    /// How long the gate stays open without another successful check.
    pub valid_for: Duration,
}

/// Grants leases on the keyring while the key is known to be good.
pub struct Gate {
    /// Epoch and mode in one word, so that a lease sees both at once: see [`Word`].
    word: AtomicU64,
    /// A [`BootTime`] in nanoseconds; meaningful while the word says open.
    valid_until: AtomicU64,
    shards: Box<[Shard]>,
    /// Set when a wipe found a lease still held; the lease's end finishes the wipe.
    wipe_owed: AtomicBool,
    details: Mutex<Details>,
    derived: Mutex<Vec<Weak<dyn Wipe>>>,
}

/// A lease is a read lock on one shard: the lock counts the leases, and a writer knows that none
/// is left. Aligned so that two shards never share a cache line.
#[repr(align(128))]
struct Shard {
    keyring: RwLock<Option<Held>>,
}

struct Held {
    keyring: Arc<Keyring>,
    /// The opening that it came with.
    epoch: u64,
}

struct Details {
    reason: Option<Reason>,
    since: SystemTime,
}

/// `epoch << 2 | mode`.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word(u64);

impl Word {
    const OPEN: u64 = 0;

    fn open(epoch: u64) -> Word {
        Word(epoch << 2 | Word::OPEN)
    }

    fn shut(epoch: u64, why: CutOff) -> Word {
        let mode = match why {
            CutOff::Revoked => 1,
            CutOff::Expired => 2,
            CutOff::Unreachable => 3,
        };
        Word(epoch << 2 | mode)
    }

    fn epoch(self) -> u64 {
        self.0 >> 2
    }

    fn is_open(self) -> bool {
        self.check().is_ok()
    }

    fn check(self) -> Result<(), CutOff> {
        match self.0 & 3 {
            Word::OPEN => Ok(()),
            1 => Err(CutOff::Revoked),
            2 => Err(CutOff::Expired),
            _ => Err(CutOff::Unreachable),
        }
    }
}

impl Gate {
    pub fn new() -> Arc<Gate> {
        let reason = Reason::NotOpened;
        let shards = (0..SHARDS).map(|_| Shard { keyring: RwLock::new(None) }).collect();
        Arc::new(Gate {
            word: AtomicU64::new(Word::shut(0, reason.cut_off()).0),
            valid_until: AtomicU64::new(BootTime::ZERO.as_nanos()),
            shards,
            wipe_owed: AtomicBool::new(false),
            details: Mutex::new(Details { reason: Some(reason), since: SystemTime::now() }),
            derived: Mutex::new(Vec::new()),
        })
    }

    /// The right to use the keyring, for as long as the cipher work takes.
    pub fn lease(&self) -> Result<Lease<'_>, CutOff> {
        let word = self.current()?;
        // Before the shard is taken, and so after it is free again, whatever comes between: a wipe
        // that finds the shard held by a lease that is then refused is owed too.
        let after = AfterLease { gate: self, epoch: word.epoch() };
        let shard = &self.shards[shard_of_this_thread()];
        // Recursive: a waiting drain must not make a thread that holds a lease wait for itself.
        // A failed try means that a wipe or an opening is at work on this shard.
        let Some(guard) = shard.keyring.try_read_recursive() else {
            return Err(self.refusal());
        };
        // Now that the shard is held a drain waits for it; but one may have passed just before.
        if self.word() != word {
            return Err(self.refusal());
        }
        let keyring = RwLockReadGuard::try_map(guard, |held| Some(&*held.as_ref()?.keyring));
        let keyring = keyring.map_err(|_| CutOff::Unreachable)?;
        Ok(Lease { keyring, word, after })
    }

    /// Whether the gate is open now: for a last look before a reply is committed.
    pub fn check(&self) -> Result<(), CutOff> {
        self.current().map(drop)
    }

    /// Counts openings; 0 before the first.
    pub fn epoch(&self) -> u64 {
        self.word().epoch()
    }

    /// Opens a new epoch. False, and the gate stays shut, when a lease of an earlier epoch has
    /// not ended for seconds: the new keyring must not meet what the old one is still used for.
    pub fn open(&self, keyring: Keyring, valid_until: BootTime) -> bool {
        let keyring = Arc::new(keyring);
        let mut details = self.details.lock();
        let epoch = self.epoch();
        // An opening over an open gate is a new epoch too, and as strict.
        self.store(Word::shut(epoch, CutOff::Unreachable));
        let limit = BootTime::now() + OPEN_LIMIT;
        for shard in &self.shards {
            let Some(mut slot) = shard.keyring.try_write_for(limit.remaining()) else {
                let reason = Reason::Unreachable;
                *details = Details { reason: Some(reason), since: SystemTime::now() };
                drop(details);
                log::error!("the gate stays shut: an operation of its last epoch does not end");
                self.wipe();
                return false;
            };
            *slot = Some(Held { keyring: Arc::clone(&keyring), epoch: epoch + 1 });
        }
        self.wipe_owed.store(false, Ordering::SeqCst);
        self.valid_until.store(valid_until.as_nanos(), Ordering::SeqCst);
        self.store(Word::open(epoch + 1));
        *details = Details { reason: None, since: SystemTime::now() };
        true
    }

    /// Moves `valid_until` forward and ends a Degraded state; only a full success of the watcher
    /// may. False when the gate is shut, or shut itself because this came too late.
    pub fn extend(&self, valid_until: BootTime) -> bool {
        let mut details = self.details.lock();
        if self.current().is_err() {
            self.latch(&mut details);
            return false;
        }
        self.valid_until.fetch_max(valid_until.as_nanos(), Ordering::SeqCst);
        if details.reason.is_some() {
            *details = Details { reason: None, since: SystemTime::now() };
        }
        true
    }

    /// Records that the gate serves on without a fresh check, and why. No effect when shut.
    pub fn degrade(&self, reason: Reason) {
        let mut details = self.details.lock();
        if self.current().is_ok() && details.reason != Some(reason) {
            let since = if details.reason.is_some() { details.since } else { SystemTime::now() };
            *details = Details { reason: Some(reason), since };
        }
    }

    /// Refuses every lease from now on; those held go on until [`Gate::drain`]. On a gate that is
    /// shut already it replaces the reason, and `since` only if the reason is another.
    pub fn shut(&self, reason: Reason) {
        let mut details = self.details.lock();
        self.latch(&mut details);
        let word = self.word();
        self.store(Word::shut(word.epoch(), reason.cut_off()));
        if word.is_open() || details.reason != Some(reason) {
            *details = Details { reason: Some(reason), since: SystemTime::now() };
        }
    }

    /// Waits until no lease is held; false if some still are after `limit`. Shut the gate first.
    pub fn drain(&self, limit: Duration) -> bool {
        let limit = BootTime::now() + limit;
        self.shards.iter().all(|shard| shard.keyring.try_write_for(limit.remaining()).is_some())
    }

    /// Drops the keyring and calls every registered [`Wipe`]. Shuts an open gate. A lease that a
    /// failed drain left behind keeps its copy until it ends; the copy goes at that moment.
    pub fn wipe(&self) {
        if self.check().is_ok() {
            self.shut(Reason::Unreachable);
        }
        self.sweep(u64::MAX);
        let derived: Vec<_> = {
            let mut derived = self.derived.lock();
            derived.retain(|weak| weak.strong_count() > 0);
            derived.iter().filter_map(Weak::upgrade).collect()
        };
        for holder in derived {
            holder.wipe();
        }
    }

    /// Has `holder` wiped with the gate, for as long as it lives.
    pub fn register(&self, holder: Weak<dyn Wipe>) {
        let mut derived = self.derived.lock();
        derived.retain(|weak| weak.strong_count() > 0);
        derived.push(holder);
    }

    pub fn status(&self) -> GateStatus {
        let details = self.details.lock();
        let word = self.word();
        let valid_for = match word.check() {
            Ok(()) => self.valid_until().remaining(),
            Err(_) => Duration::ZERO,
        };
        let (state, reason, since) = if !word.is_open() {
            (State::Inaccessible, details.reason, details.since)
        } else if valid_for.is_zero() {
            (State::Inaccessible, Some(Reason::Unreachable), self.lapsed_at())
        } else if details.reason.is_some() {
            (State::Degraded, details.reason, details.since)
        } else {
            (State::Available, None, details.since)
        };
        GateStatus { state, reason, since, epoch: word.epoch(), valid_for }
    }

    /// When the gate shuts unless [`Gate::extend`]ed; [`BootTime::ZERO`] when it is shut.
    pub fn valid_until(&self) -> BootTime {
        if !self.word().is_open() {
            return BootTime::ZERO;
        }
        BootTime::from_nanos(self.valid_until.load(Ordering::SeqCst))
    }

    /// Whether it was shut, by somebody or because it was asked after `valid_until` had passed.
    pub fn is_shut(&self) -> bool {
        !self.word().is_open()
    }

    fn word(&self) -> Word {
        Word(self.word.load(Ordering::SeqCst))
    }

    fn store(&self, word: Word) {
        self.word.store(word.0, Ordering::SeqCst);
    }

    /// The word, if it says open and `valid_until` has not passed.
    fn current(&self) -> Result<Word, CutOff> {
        let word = self.word();
        word.check()?;
        if BootTime::now().as_nanos() >= self.valid_until.load(Ordering::SeqCst) {
            return Err(CutOff::Unreachable);
        }
        Ok(word)
    }

    fn refusal(&self) -> CutOff {
        self.current().err().unwrap_or(CutOff::Unreachable)
    }

    /// Makes a passed `valid_until` permanent, with the time it passed as the time of the change.
    fn latch(&self, details: &mut Details) {
        let word = self.word();
        if word.is_open() && self.current().is_err() {
            let since = self.lapsed_at();
            self.store(Word::shut(word.epoch(), CutOff::Unreachable));
            *details = Details { reason: Some(Reason::Unreachable), since };
        }
    }

    fn lapsed_at(&self) -> SystemTime {
        let lapsed = BootTime::from_nanos(self.valid_until.load(Ordering::SeqCst));
        let now = SystemTime::now();
        now.checked_sub(BootTime::now().since(lapsed)).unwrap_or(now)
    }

    /// Drops the keyring of every opening up to `through` from every shard that no lease holds, and
    /// notes if one was left.
    fn sweep(&self, through: u64) {
        // Set first: a lease that ends while this runs either is seen by it or sweeps itself.
        self.wipe_owed.store(true, Ordering::SeqCst);
        let mut left = false;
        for shard in &self.shards {
            match shard.keyring.try_write() {
                Some(mut slot) => {
                    slot.take_if(|held| held.epoch <= through);
                    // What is left of a later opening may be owed too.
                    left |= slot.is_some();
                }
                None => left = true,
            }
        }
        if !left {
            self.wipe_owed.store(false, Ordering::SeqCst);
        }
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("status", &self.status()).finish_non_exhaustive()
    }
}

/// The right to use the keyring. Not `Send`: it ends on the thread that took it.
pub struct Lease<'a> {
    // Dropped in this order: the shard is free when `after` looks at it.
    keyring: MappedRwLockReadGuard<'a, Keyring>,
    word: Word,
    after: AfterLease<'a>,
}

impl Lease<'_> {
    pub fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    /// The opening this lease belongs to: keys derived under another epoch are not its keys.
    pub fn epoch(&self) -> u64 {
        self.word.epoch()
    }

    /// Whether the gate has been open without a break since the lease was granted. Ask after the
    /// cipher work, before its result is written or replied.
    pub fn still_open(&self) -> Result<(), CutOff> {
        let gate = self.after.gate;
        if gate.current()? == self.word { Ok(()) } else { Err(CutOff::Unreachable) }
    }
}

impl fmt::Debug for Lease<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("epoch", &self.epoch()).finish_non_exhaustive()
    }
}

/// Finishes a wipe that a lease held up.
struct AfterLease<'a> {
    gate: &'a Gate,
    epoch: u64,
}

impl Drop for AfterLease<'_> {
    fn drop(&mut self) {
        if self.gate.wipe_owed.load(Ordering::SeqCst) && !self.gate.word().is_open() {
            // Not what an opening that goes on meanwhile puts in its place.
            self.gate.sweep(self.epoch);
        }
    }
}

/// Threads take turns, so that as many as there are shards never share one.
fn shard_of_this_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
    }
    MINE.with(|mine| *mine)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;
    use std::thread;

    use super::*;
    use crate::crypto::secret::Secret;

    const LONG: Duration = Duration::from_secs(600);
    const SHORT: Duration = Duration::from_millis(20);

    fn keyring(byte: u8) -> Keyring {
        Keyring::new(1, Secret::new_with(|key| key.fill(byte)).unwrap())
    }

    fn in_(time: Duration) -> BootTime {
        BootTime::now() + time
    }

    fn opened() -> Arc<Gate> {
        let gate = Gate::new();
        assert!(gate.open(keyring(1), in_(LONG)));
        gate
    }

    fn copies_left(gate: &Gate) -> usize {
        gate.shards.iter().filter(|shard| shard.keyring.read().is_some()).count()
    }

    #[test]
    fn starts_shut() {
        let gate = Gate::new();
        assert_eq!(gate.lease().err(), Some(CutOff::Unreachable));
        assert_eq!(gate.check(), Err(CutOff::Unreachable));
        assert_eq!(gate.epoch(), 0);
        assert_eq!(gate.valid_until(), BootTime::ZERO);
        assert!(!gate.extend(in_(LONG)));
        let status = gate.status();
        assert_eq!(status.state, State::Inaccessible);
        assert_eq!(status.reason, Some(Reason::NotOpened));
    }

    #[test]
    fn opens_with_the_keyring_it_was_given() {
        let gate = opened();
        let lease = gate.lease().unwrap();
        assert_eq!(lease.keyring().fingerprint().unwrap(), keyring(1).fingerprint().unwrap());
        assert_eq!(lease.epoch(), 1);
        assert_eq!(lease.still_open(), Ok(()));
        assert_eq!(gate.status().state, State::Available);
        assert_eq!(gate.status().reason, None);
        assert!(gate.status().valid_for > LONG / 2);
    }

    #[test]
    fn an_opening_without_a_future_does_not_open() {
        let gate = Gate::new();
        gate.open(keyring(1), BootTime::now());
        assert_eq!(gate.lease().err(), Some(CutOff::Unreachable));
    }

    #[test]
    fn each_reason_is_refused_with_its_class() {
        for reason in Reason::ALL {
            let gate = opened();
            gate.shut(reason);
            assert_eq!(gate.lease().err(), Some(reason.cut_off()));
            assert_eq!(gate.status().reason, Some(reason));
        }
    }

    #[test]
    fn a_passed_valid_until_shuts_by_itself_and_for_good() {
        let gate = Gate::new();
        gate.open(keyring(1), in_(SHORT));
        let lease = gate.lease().unwrap();
        thread::sleep(SHORT * 2);
        assert_eq!(lease.still_open(), Err(CutOff::Unreachable));
        assert_eq!(gate.lease().err(), Some(CutOff::Unreachable));
        let status = gate.status();
        assert_eq!(status.state, State::Inaccessible);
        assert_eq!(status.reason, Some(Reason::Unreachable));
        assert!(status.since.elapsed().unwrap() >= SHORT / 2);
        assert!(!gate.extend(in_(LONG)), "a success that comes too late opens nothing");
        assert_eq!(gate.lease().err(), Some(CutOff::Unreachable));
        assert_eq!(gate.status().reason, Some(Reason::Unreachable));
    }

    #[test]
    fn extend_moves_forward_only() {
        let gate = opened();
        let until = gate.valid_until();
        assert!(gate.extend(until - Duration::from_secs(60)));
        assert_eq!(gate.valid_until(), until);
        assert!(gate.extend(until + Duration::from_secs(60)));
        assert_eq!(gate.valid_until(), until + Duration::from_secs(60));
    }

    #[test]
    fn degraded_serves_until_the_next_success() {
        let gate = opened();
        gate.degrade(Reason::Unreachable);
        let first = gate.status();
        assert_eq!(first.state, State::Degraded);
        gate.degrade(Reason::PermissionRevoked);
        let second = gate.status();
        assert_eq!(second.reason, Some(Reason::PermissionRevoked));
        assert_eq!(second.since, first.since);
        assert!(gate.lease().is_ok());
        gate.extend(in_(LONG));
        assert_eq!(gate.status().state, State::Available);
        gate.shut(Reason::KeyDisabled);
        gate.degrade(Reason::Unreachable);
        assert_eq!(gate.status().reason, Some(Reason::KeyDisabled));
    }

    #[test]
    fn a_lease_notices_a_cut_off_and_a_reopening() {
        let gate = opened();
        let lease = gate.lease().unwrap();
        gate.shut(Reason::KeyDisabled);
        assert_eq!(lease.still_open(), Err(CutOff::Revoked));
        assert!(!gate.drain(SHORT));
        gate.wipe();
        assert_eq!(copies_left(&gate), 1, "the lease still holds its own");
        drop(lease);
        assert_eq!(copies_left(&gate), 0, "the end of the lease finished the wipe");
        assert!(gate.drain(SHORT));
        assert!(gate.open(keyring(2), in_(LONG)));
        let lease = gate.lease().unwrap();
        assert_eq!(lease.epoch(), 2);
        assert_eq!(lease.keyring().fingerprint().unwrap(), keyring(2).fingerprint().unwrap());
    }

    /// A lease that was left behind ends while the gate is being opened again.
    #[test]
    fn a_late_wipe_takes_no_later_keyring() {
        let gate = opened();
        let after = AfterLease { gate: &gate, epoch: gate.epoch() };
        gate.shut(Reason::KeyDisabled);
        gate.wipe_owed.store(true, Ordering::SeqCst);
        // As `Gate::open` does, up to where it opens.
        for shard in &gate.shards {
            let keyring = Arc::new(keyring(2));
            *shard.keyring.write() = Some(Held { keyring, epoch: gate.epoch() + 1 });
        }
        drop(after);
        assert_eq!(copies_left(&gate), SHARDS);
        gate.wipe();
        assert_eq!(copies_left(&gate), 0);
    }

    /// A thread that saw the gate open, and takes its shard when a drain has passed, is refused; but
    /// the wipe found the shard held.
    #[test]
    fn a_lease_that_is_refused_finishes_a_wipe_too() {
        let gate = opened();
        let after = AfterLease { gate: &gate, epoch: gate.epoch() };
        let guard = gate.shards[0].keyring.try_read_recursive().unwrap();
        gate.shut(Reason::KeyDisabled);
        gate.wipe();
        assert_eq!(copies_left(&gate), 1);
        drop(guard);
        drop(after);
        assert_eq!(copies_left(&gate), 0);
    }

    #[test]
    fn an_opening_over_an_open_gate_is_a_new_epoch() {
        let gate = opened();
        assert!(gate.open(keyring(2), in_(LONG)));
        assert_eq!(gate.epoch(), 2);
        let lease = gate.lease().unwrap();
        assert_eq!(lease.keyring().fingerprint().unwrap(), keyring(2).fingerprint().unwrap());
    }

    #[test]
    fn wipe_shuts_and_tells_everyone_who_registered() {
        struct Holder(AtomicUsize);
        impl Wipe for Holder {
            fn wipe(&self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let gate = opened();
        let holder = Arc::new(Holder(AtomicUsize::new(0)));
        let gone = Arc::new(Holder(AtomicUsize::new(0)));
        let weak: Weak<dyn Wipe> = Arc::downgrade(&(Arc::clone(&holder) as Arc<dyn Wipe>));
        gate.register(weak);
        gate.register(Arc::downgrade(&(Arc::clone(&gone) as Arc<dyn Wipe>)));
        drop(gone);
        gate.wipe();
        assert_eq!(holder.0.load(Ordering::SeqCst), 1);
        assert_eq!(copies_left(&gate), 0);
        assert!(gate.lease().is_err());
    }

    #[test]
    fn a_later_reason_replaces_an_earlier_one() {
        let gate = opened();
        gate.shut(Reason::Unreachable);
        let since = gate.status().since;
        gate.shut(Reason::Unreachable);
        assert_eq!(gate.status().since, since);
        gate.shut(Reason::KeyDeleted);
        assert_eq!(gate.status().reason, Some(Reason::KeyDeleted));
        assert_eq!(gate.lease().err(), Some(CutOff::Revoked));
    }

    #[test]
    fn drain_waits_for_the_leases_of_other_threads() {
        let gate = opened();
        let (held, is_held) = mpsc::channel();
        let (go_on, may_go_on) = mpsc::channel();
        let worker = {
            let gate = Arc::clone(&gate);
            thread::spawn(move || {
                let lease = gate.lease().unwrap();
                held.send(()).unwrap();
                may_go_on.recv().unwrap();
                thread::sleep(SHORT);
                lease.still_open()
            })
        };
        is_held.recv().unwrap();
        gate.shut(Reason::KeyDisabled);
        assert!(!gate.drain(Duration::ZERO));
        go_on.send(()).unwrap();
        assert!(gate.drain(LONG));
        gate.wipe();
        assert_eq!(copies_left(&gate), 0);
        assert_eq!(worker.join().unwrap(), Err(CutOff::Revoked));
    }

    #[test]
    fn a_waiting_drain_neither_blocks_nor_admits_new_leases() {
        let gate = opened();
        let lease = gate.lease().unwrap();
        gate.shut(Reason::KeyDisabled);
        let drain = {
            let gate = Arc::clone(&gate);
            thread::spawn(move || gate.drain(LONG))
        };
        thread::sleep(SHORT);
        // Same thread, hence the shard that the drain waits for.
        assert_eq!(gate.lease().err(), Some(CutOff::Revoked));
        drop(lease);
        assert!(drain.join().unwrap());
    }

    /// Threads take leases as fast as they can while the gate opens and shuts: no lease is held
    /// after a drain, none shows a keyring of another epoch, none is granted while it is shut.
    #[test]
    fn many_threads_never_hold_a_lease_across_a_drained_cut_off() {
        let gate = Gate::new();
        let stop = Arc::new(AtomicBool::new(false));
        let held = Arc::new(AtomicUsize::new(0));
        let granted = Arc::new(AtomicUsize::new(0));
        let prints: Arc<Vec<[u8; 32]>> =
            Arc::new((0..=20).map(|n| keyring(n).fingerprint().unwrap()).collect());
        let workers: Vec<_> = (0..8)
            .map(|_| {
                let (gate, stop, held, granted, prints) = (
                    Arc::clone(&gate),
                    Arc::clone(&stop),
                    Arc::clone(&held),
                    Arc::clone(&granted),
                    Arc::clone(&prints),
                );
                thread::spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        if let Ok(lease) = gate.lease() {
                            held.fetch_add(1, Ordering::SeqCst);
                            granted.fetch_add(1, Ordering::SeqCst);
                            assert_eq!(
                                lease.keyring().fingerprint().unwrap(),
                                prints[lease.epoch() as usize]
                            );
                            held.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                })
            })
            .collect();
        for epoch in 1..=20u8 {
            assert!(gate.open(keyring(epoch), in_(LONG)));
            assert_eq!(gate.epoch(), u64::from(epoch));
            let before = granted.load(Ordering::SeqCst);
            while granted.load(Ordering::SeqCst) < before + 50 {
                thread::yield_now();
            }
            gate.shut(Reason::KeyDisabled);
            assert!(gate.drain(LONG));
            assert_eq!(held.load(Ordering::SeqCst), 0);
            gate.wipe();
            assert_eq!(copies_left(&gate), 0);
        }
        stop.store(true, Ordering::SeqCst);
        for worker in workers {
            worker.join().unwrap();
        }
    }
}
