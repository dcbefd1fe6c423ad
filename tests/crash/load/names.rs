//! Files that replace one another, appear and go, as servers handle their logs and tables: written
//! under another name, flushed, renamed, and then the directory flushed, or some other file.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use byokfs::backing::memory::Random;

use super::{Crash, Load};

/// Each thread has a directory with so many names.
const NAMES: u64 = 12;
const THREADS: u64 = 4;

/// A file of one generation, or none.
type State = Option<u64>;

/// What each name may hold: the state that was acknowledged, and one that was on its way.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    durable: State,
    issued: Option<State>,
}

#[derive(Default)]
struct Ledger {
    names: BTreeMap<u64, Held>,
    generation: u64,
    failure: Option<String>,
}

pub struct Names {
    seed: u64,
    rounds: u64,
    ledgers: Vec<Arc<Mutex<Ledger>>>,
    acknowledged: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
    /// The power is gone: what is acknowledged from then on does not count.
    gone: Arc<AtomicBool>,
}

impl Names {
    pub fn new(seed: u64) -> Names {
        let ledgers = (0..THREADS).map(|_| Arc::default()).collect();
        let (acknowledged, gone) = (Arc::default(), Arc::default());
        Names { seed, rounds: 0, ledgers, acknowledged, threads: Vec::new(), gone }
    }
}

fn dir_of(mnt: &Path, thread: usize) -> PathBuf {
    mnt.join(format!("names-{thread}"))
}

/// A few sizes around the block's; told from the generation alone.
fn content(generation: u64) -> Vec<u8> {
    let mut random = Random::new(generation);
    let most = if random.chance(1) { 300_000 } else { 9000 };
    let len = 1 + random.below(most) as usize;
    random.bytes(len)
}

impl Load for Names {
    fn prepare(&mut self, mnt: &Path) {
        for thread in 0..self.ledgers.len() {
            fs::create_dir(dir_of(mnt, thread)).unwrap();
        }
        File::open(mnt).unwrap().sync_all().unwrap();
    }

    fn ignore_after(&mut self, gone: Arc<AtomicBool>) {
        self.gone = gone;
    }

    fn start(&mut self, mnt: &Path, _crashed: &dyn Fn() -> bool) {
        self.rounds += 1;
        for (number, ledger) in self.ledgers.iter().enumerate() {
            let (ledger, count) = (Arc::clone(ledger), Arc::clone(&self.acknowledged));
            let gone = Arc::clone(&self.gone);
            let dir = dir_of(mnt, number);
            let random = Random::new(self.seed ^ self.rounds << 32 ^ (number as u64) << 48);
            self.threads.push(std::thread::spawn(move || {
                let error = change(&ledger, &dir, (&count, &gone), random);
                // The guard may have unmounted the volume already.
                let unmounted = || error.kind() == io::ErrorKind::NotFound && !dir.exists();
                if !super::is_of_a_crash(&error) && !unmounted() {
                    ledger.lock().unwrap().failure = Some(error.to_string());
                }
            }));
        }
    }

    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    fn end(&mut self) {
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }

    fn verify(&mut self, mnt: &Path, _crash: Crash) {
        let mut wrong = Vec::new();
        for (number, ledger) in self.ledgers.iter().enumerate() {
            let ledger = &mut *ledger.lock().unwrap();
            wrong.extend(ledger.failure.take());
            let dir = dir_of(mnt, number);
            if let Err(error) = list(&dir) {
                wrong.push(format!("{}: {error}", dir.display()));
            }
            for (name, held) in &mut ledger.names {
                let path = dir.join(name.to_string());
                let found = match fs::read(&path) {
                    Ok(found) => Some(found),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                    Err(error) => {
                        wrong.push(format!("{}: {error}", path.display()));
                        continue;
                    }
                };
                let may: Vec<State> =
                    [Some(held.durable), held.issued].into_iter().flatten().collect();
                let is = may.iter().find(|state| state.map(content) == found);
                match is {
                    Some(state) => *held = Held { durable: *state, issued: None },
                    None => wrong.push(format!(
                        "{}: {:?} bytes, of none of the generations {may:?} (of {:?} bytes)",
                        path.display(),
                        found.map(|found| found.len()),
                        may.iter().map(|state| state.map(|g| content(g).len())).collect::<Vec<_>>(),
                    )),
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

/// Every entry can be looked at and read, also those that no ledger knows of.
fn list(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        fs::read(&path).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
    }
    Ok(())
}

/// Until the error, or the end of the power.
fn change(
    ledger: &Mutex<Ledger>,
    dir: &Path,
    (count, gone): (&AtomicU64, &AtomicBool),
    mut random: Random,
) -> io::Error {
    loop {
        let name = random.below(NAMES);
        let state = {
            let mut ledger = ledger.lock().unwrap();
            ledger.generation += 1;
            let generation = ledger.generation;
            let held = ledger.names.entry(name).or_default();
            let state = (held.durable.is_none() || random.chance(5)).then_some(generation);
            held.issued = Some(state);
            state
        };
        if let Err(error) = put(dir, name, state, &mut random) {
            return error;
        }
        if gone.load(Ordering::SeqCst) {
            return io::Error::from_raw_os_error(libc::EIO);
        }
        let mut ledger = ledger.lock().unwrap();
        ledger.names.insert(name, Held { durable: state, issued: None });
        count.fetch_add(1, Ordering::Relaxed);
    }
}

fn put(dir: &Path, name: u64, state: State, random: &mut Random) -> io::Result<()> {
    let path = dir.join(name.to_string());
    match state {
        None => fs::remove_file(&path)?,
        Some(generation) => {
            // Long names are kept another way than short ones.
            let other = match random.chance(2) {
                true => dir.join(format!("{name}-{}", "x".repeat(230))),
                false => dir.join(format!("{name}.tmp")),
            };
            let mut file = File::create(&other)?;
            file.write_all(&content(generation))?;
            file.sync_all()?;
            fs::rename(&other, &path)?;
        }
    }
    if random.chance(5) {
        return File::open(dir)?.sync_all();
    }
    // What a journal makes durable of a log, it does of every name before: servers that rename a
    // file and then flush only what they write elsewhere are used to that.
    let mut log = File::options().create(true).append(true).open(dir.join("log"))?;
    log.write_all(&content(random.next_u64()))?;
    log.sync_data()
}
