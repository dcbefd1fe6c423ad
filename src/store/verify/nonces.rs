//! That no two blocks of a file were sealed with one nonce under one key.
//!
//! Blocks that were written one after another have counters in a row, so what is kept is runs of
//! them. A file that was written in very many pieces has more runs than are kept; then only a part
//! is compared, and that is known.

/// Runs that are kept of one file: 24 MiB.
const MAX_RUNS: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Run {
    slot: u16,
    session: u32,
    first: u64,
    past: u64,
}

#[derive(Debug, Default)]
pub(super) struct Nonces {
    runs: Vec<Run>,
    repeated: Option<(u32, u64)>,
    /// There were too many.
    pub(super) partial: bool,
}

impl Nonces {
    pub(super) fn add(&mut self, slot: u16, session: u32, counter: u64) {
        if let Some(last) = self.runs.last_mut()
            && (last.slot, last.session, last.past) == (slot, session, counter)
        {
            last.past = last.past.saturating_add(1);
            return;
        }
        self.runs.push(Run { slot, session, first: counter, past: counter.saturating_add(1) });
    }

    pub(super) fn take(&mut self, mut more: Nonces) {
        self.runs.append(&mut more.runs);
        if self.runs.len() > MAX_RUNS {
            self.settle();
            if self.runs.len() > MAX_RUNS / 2 {
                self.runs = Vec::new();
                self.partial = true;
            }
        }
    }

    /// Session and counter of a nonce that was used twice.
    pub(super) fn repeated(&mut self) -> Option<(u32, u64)> {
        self.settle();
        self.repeated
    }

    /// Sorts, compares, and takes together what touches.
    fn settle(&mut self) {
        self.runs.sort_unstable();
        let repeated = &mut self.repeated;
        self.runs.dedup_by(|next, run| {
            if (next.slot, next.session) != (run.slot, run.session) || next.first > run.past {
                return false;
            }
            if next.first < run.past && repeated.is_none() {
                *repeated = Some((next.session, next.first));
            }
            run.past = run.past.max(next.past);
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_used_twice_is_found_and_nothing_else() {
        let mut all = Nonces::default();
        for part in [&[(0, 1, 5), (0, 1, 6), (0, 1, 9)][..], &[(0, 2, 5), (1, 1, 5), (0, 1, 7)]] {
            let mut nonces = Nonces::default();
            part.iter().for_each(|&(slot, session, counter)| nonces.add(slot, session, counter));
            all.take(nonces);
        }
        assert_eq!(all.repeated(), None);
        all.add(0, 1, 6);
        assert_eq!(all.repeated(), Some((1, 6)));
        assert!(!all.partial);
    }

    #[test]
    fn counters_that_nobody_gave_out_do_no_harm() {
        let mut all = Nonces::default();
        (0..3).for_each(|_| all.add(0, 1, u64::MAX));
        all.repeated();
    }

    #[test]
    fn too_many_runs_are_let_go() {
        let mut all = Nonces::default();
        for counter in 0..=MAX_RUNS as u64 {
            all.add(0, 1, counter * 2);
        }
        all.take(Nonces::default());
        assert!(all.partial && all.repeated().is_none());
    }
}
