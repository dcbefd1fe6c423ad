//! No nonce seals two things under one key: over all crash states, what goes on after them, and copies
//! of the volume. `crypto::aead` notes every block that the tests of this crate seal, and fails the
//! test in which a nonce is used again; here is what could bring that about.

use std::sync::Arc;

use super::super::support::{mount, pattern, revalidate};
use super::workloads::random_workload;
use super::{Run, run, second_life, seeds};
use crate::backing::memory::{MemoryBacking, Options};
use crate::crypto::aead::seals;
use crate::crypto::nonce::Counter;
use crate::store::tests::support::Mounted;
use crate::store::{Durability, Session};

/// Mounts a copy and writes to it, something else each time.
fn write_to(backing: Arc<MemoryBacking>, seed: u8) -> Mounted {
    let mounted = mount(backing).unwrap();
    write(&mounted, seed);
    mounted
}

fn write(mounted: &Mounted, seed: u8) {
    let file = mounted.try_open("f").map_or_else(|| mounted.create("f"), Result::unwrap);
    let before = seals::count();
    for (offset, len) in [(0, 9000), (0, 512), (20_000, 140_000)] {
        file.write_at(&pattern(len, seed), offset, Durability::default()).unwrap();
    }
    assert!(seals::count() > before + 30);
}

fn whole(run: &Run) -> Arc<MemoryBacking> {
    run.trace.at(run.trace.len())
}

#[test]
fn whatever_goes_on_after_a_power_cut_takes_new_ones() {
    for seed in 0..seeds(5).div_ceil(5) {
        let run = run(&random_workload(seed));
        let options = Options { budget: 2, seed, ..Options::default() };
        let mut life = 0_u8;
        for cut in (run.steps[0].position..=run.trace.len()).step_by(2) {
            for crash in run.trace.crashes(cut, &options) {
                let backing = run.trace.materialise(&crash);
                let mounted = mount(backing.clone()).unwrap();
                let contents = super::contents(&mounted).unwrap();
                life = life.wrapping_add(1);
                drop(second_life(backing, mounted, contents, life));
            }
        }
    }
}

#[test]
fn copies_of_a_volume_part_ways() {
    let run = run(&random_workload(3));
    let (one, other) = (whole(&run), whole(&run));
    let one = write_to(one, 1);
    let other = write_to(other, 2);
    write(&one, 3);
    // And one that is restored while those are in use.
    let restored = write_to(whole(&run), 4);
    [&one, &other, &restored].into_iter().zip(5..).for_each(|(mounted, seed)| write(mounted, seed));
}

#[test]
fn revalidations_go_on_with_new_ones() {
    let run = run(&random_workload(4));
    let mounted = write_to(whole(&run), 1);
    for seed in 2..6 {
        revalidate(&mounted.store, &mounted.gate);
        write(&mounted, seed);
    }
}

/// Puts a session in force as no code of the product would.
fn force_session(mounted: &Mounted, session: &Session) {
    let counter = Counter::new(session.counter.session());
    let session = Session { counter, entry: session.entry };
    *mounted.store.shared.session.write() = Some(Arc::new(session));
}

#[test]
fn a_counter_that_starts_again_is_found() {
    let run = run(&random_workload(5));
    let mounted = write_to(whole(&run), 1);
    let session = mounted.store.shared.session().unwrap();
    let found = seals::reused(|| {
        force_session(&mounted, &session);
        write(&mounted, 2);
    });
    assert!(found > 0);
}

#[test]
fn a_session_that_is_used_again_is_found() {
    let run = run(&random_workload(6));
    let backing = whole(&run);
    let mounted = write_to(backing.clone(), 1);
    let session = mounted.store.shared.session().unwrap();
    drop(mounted);
    // As if the next mount had not drawn a salt.
    let trace = backing.trace();
    let mounted = mount(trace.at(trace.len())).unwrap();
    let found = seals::reused(|| {
        force_session(&mounted, &session);
        write(&mounted, 2);
    });
    assert!(found > 0);
}
