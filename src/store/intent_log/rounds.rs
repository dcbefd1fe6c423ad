//! Who does what for all who wait, and where the others sleep meanwhile.
//!
//! A stream has three roles: writing, flushing, and writing out. One thread at a time has a role, and
//! does one round of it, for every record that is there by then. Who comes meanwhile waits for that
//! round if it reaches far enough, and otherwise for the next one, which one of those begins who wait
//! for it. So those who sleep are in one of two groups, and all of one are woken together, by one
//! system call, without a lock that they would have to take in turn.
//!
//! Wakes are made without the lock, so one for a round may come when its group's places are taken by
//! those of the round after the next. Nothing is lost by that: who is woken looks at the mark and at
//! the role again, and where a sleeper of an older round took the call that was for one of the next,
//! the wake of all of his own group is still to come, and reaches the others too.
//!
//! Invariant: whenever a role is free, and there is something for it to do, either nobody waits for
//! it, or somebody who does has been called and has not looked yet.
//!
//! No I/O here, and no lock: [`super::commit`] has both.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::sync::Signal;

/// What one thread does for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Role {
    Write = 0,
    Flush = 1,
    WriteOut = 2,
}

impl Role {
    const ALL: [Role; 3] = [Role::Write, Role::Flush, Role::WriteOut];
}

/// Those who wait for the same round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group(usize);

/// The rounds of one role. Under the log's lock.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    /// Of the last that was begun.
    number: u64,
    /// One is under way, for the records before this.
    reaches: Option<u64>,
}

impl Rounds {
    pub(super) fn is_free(&self) -> bool {
        self.reaches.is_none()
    }

    /// To be followed by [`Rounds::end`], whatever comes of it.
    pub(super) fn begin(&mut self, reaches: u64) {
        self.number += 1;
        self.reaches = Some(reaches);
    }

    /// Those whose round this was.
    pub(super) fn end(&mut self) -> Group {
        self.reaches = None;
        Group(self.number as usize % 2)
    }

    /// Those who will wait for the round that is not begun yet.
    pub(super) fn next(&self) -> Group {
        Group((self.number + 1) as usize % 2)
    }

    /// Where to wait for the records before `before`.
    pub(super) fn group(&self, before: u64) -> Group {
        match self.reaches {
            Some(reaches) if before <= reaches => Group(self.number as usize % 2),
            _ => self.next(),
        }
    }
}

/// How far a stream has come, and the places to sleep until it has come further. Changed under the
/// log's lock, and read without.
#[derive(Debug)]
pub(super) struct Progress {
    /// The records before this have come as far as that role brings them: into the kernel's hands;
    /// to stable storage, with what they say is home; to the device, perhaps into its cache.
    marks: [AtomicU64; 3],
    sleep: [[Signal; 2]; 3],
}

impl Progress {
    pub(super) fn new(next: u64) -> Progress {
        Progress { marks: [next, next, next].map(AtomicU64::new), sleep: Default::default() }
    }

    pub(super) fn mark(&self, role: Role) -> u64 {
        let mark = |role: Role| self.marks[role as usize].load(Ordering::Acquire);
        match role {
            Role::Write | Role::Flush => mark(role),
            Role::WriteOut => mark(role).max(mark(Role::Flush)),
        }
    }

    pub(super) fn has(&self, role: Role, before: u64) -> bool {
        before <= self.mark(role)
    }

    pub(super) fn raise(&self, role: Role, to: u64) {
        self.marks[role as usize].fetch_max(to, Ordering::AcqRel);
    }

    pub(super) fn signal(&self, role: Role, group: Group) -> &Signal {
        &self.sleep[role as usize][group.0]
    }

    pub(super) fn wake_all_of(&self, role: Role) {
        self.sleep[role as usize].iter().for_each(Signal::wake_all);
    }

    pub(super) fn wake_all(&self) {
        Role::ALL.into_iter().for_each(|role| self.wake_all_of(role));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_covered_waits_for_this_round_and_who_is_not_for_the_next() {
        let mut rounds = Rounds::default();
        let before_any = rounds.group(5);
        assert_eq!(before_any, rounds.next());
        rounds.begin(5);
        assert!(!rounds.is_free());
        assert_eq!(rounds.group(5), before_any, "the round that was to come is this one");
        assert_eq!(rounds.group(6), rounds.next());
        assert_ne!(rounds.group(5), rounds.group(6));
        let next = rounds.next();
        assert_eq!(rounds.end(), before_any);
        assert!(rounds.is_free());
        assert_eq!(rounds.group(6), next);
        rounds.begin(9);
        assert_eq!(rounds.end(), next);
    }

    #[test]
    fn what_is_on_stable_storage_is_on_the_device() {
        let progress = Progress::new(3);
        assert!(progress.has(Role::WriteOut, 3) && !progress.has(Role::WriteOut, 4));
        progress.raise(Role::Flush, 7);
        progress.raise(Role::Flush, 6);
        assert_eq!(progress.mark(Role::Flush), 7);
        assert!(progress.has(Role::WriteOut, 7));
        progress.raise(Role::WriteOut, 9);
        assert!(progress.has(Role::WriteOut, 9) && !progress.has(Role::Flush, 9));
        assert_eq!(progress.mark(Role::Write), 3);
    }
}
