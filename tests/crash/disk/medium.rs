//! What a disk with a volatile cache holds, and what is left of it when the power goes.
//!
//! A write is applied to the image at once, and remembered with what it replaced until a flush
//! makes it permanent. A cut takes back all that was not flushed and then applies again what the
//! disk, by chance, had got to: nothing, all of it, whole writes, or sectors of them. After the cut
//! every request fails; the image holds what the next machine will find.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use byokfs::backing::memory::Random;

/// The least that a disk writes in one piece, whatever else happens.
pub const SECTOR: u64 = 512;
/// What of a write falls into the start of the disk comes whole or not at all: ext4 keeps its
/// superblock there, with a checksum, and does not mount, journal or not, where that is torn.
const WHOLE: u64 = 4096;
/// Beyond that the cache writes its oldest contents out by itself, as any cache does.
const CACHE: usize = 512 << 20;

/// The disk has no power.
#[derive(Debug)]
pub struct PowerLost;

#[derive(Debug)]
struct Write {
    offset: u64,
    old: Vec<u8>,
    new: Vec<u8>,
}

/// What becomes of the writes that were not flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// None of them arrived.
    Dropped,
    /// All of them did.
    Kept,
    /// The oldest did, and of the next one some of its sectors.
    Prefix,
    /// Some did, whole, in any order.
    Reordered,
    /// Each sector by itself: any set of them.
    Torn,
}

const FATES: [Fate; 5] = [Fate::Dropped, Fate::Kept, Fate::Prefix, Fate::Reordered, Fate::Torn];

/// When the power goes, and how.
#[derive(Debug)]
pub struct Plan {
    /// So many more writes and flushes are answered.
    pub after: u64,
    /// And then when so much is in the cache, if that happens soon: servers flush all the time,
    /// and what a cut can do grows with what it can choose from.
    pub unsynced: usize,
    pub fate: Fate,
    pub random: Random,
}

/// Requests for which a cut waits for a fuller cache.
const PATIENCE: u64 = 400;

impl Plan {
    /// Any fate, within `most` requests.
    pub fn random(random: &mut Random, most: u64) -> Plan {
        // Tearing is what finds most.
        let fate = match random.chance(4) {
            true => Fate::Torn,
            false => FATES[random.below(FATES.len() as u64) as usize],
        };
        let after = random.below(most);
        let unsynced = if random.chance(4) { 2 + random.below(20) as usize } else { 0 };
        Plan { after, unsynced, fate, random: Random::new(random.next_u64()) }
    }
}

/// What a cut did.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    pub unsynced: usize,
    pub sectors: usize,
    pub sectors_kept: usize,
}

#[derive(Debug)]
pub struct Medium {
    image: File,
    len: u64,
    /// Bytes that this one writes in one piece.
    sector: u64,
    unsynced: Vec<Write>,
    cached: usize,
    plan: Option<Plan>,
    /// Requests since the plan's time came.
    waited: u64,
    cut: Option<Cut>,
    told: Option<Arc<AtomicBool>>,
    /// A disk that says it has flushed, and has not: what the tests must find out.
    lies: bool,
}

impl Medium {
    pub fn open(image: &Path, sector: u64) -> io::Result<Medium> {
        let image = File::options().read(true).write(true).open(image)?;
        let len = image.metadata()?.len();
        Ok(Medium {
            image,
            len,
            sector,
            unsynced: Vec::new(),
            cached: 0,
            plan: None,
            waited: 0,
            cut: None,
            told: None,
            lies: false,
        })
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn lie(&mut self) {
        self.lies = true;
    }

    pub fn plan(&mut self, plan: Plan) {
        self.plan = Some(plan);
        self.waited = 0;
    }

    /// Is set when the power goes, before any request fails by it.
    pub fn tell(&mut self, flag: Arc<AtomicBool>) {
        self.told = Some(flag);
    }

    /// Between two requests.
    pub fn cut_now(&mut self, plan: Plan) {
        if let Some(told) = &self.told {
            told.store(true, Ordering::SeqCst);
        }
        self.cut = Some(self.lose(plan).expect("the image below the test's disk fails"));
    }

    pub fn forget_plan(&mut self) {
        self.plan = None;
    }

    pub fn cut(&self) -> Option<Cut> {
        self.cut
    }

    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<io::Result<()>, PowerLost> {
        match self.cut {
            Some(_) => Err(PowerLost),
            None => Ok(self.image.read_exact_at(buf, offset)),
        }
    }

    /// The write that the cut falls on may be among those that arrive; it is never acknowledged.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<io::Result<()>, PowerLost> {
        if self.cut.is_some() {
            return Err(PowerLost);
        }
        if let Err(error) = self.apply(offset, data) {
            return Ok(Err(error));
        }
        self.tick()?;
        Ok(Ok(()))
    }

    pub fn flush(&mut self) -> Result<(), PowerLost> {
        if self.cut.is_some() {
            return Err(PowerLost);
        }
        self.tick()?;
        if !self.lies {
            self.unsynced.clear();
            self.cached = 0;
        }
        Ok(())
    }

    fn apply(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut old = vec![0; data.len()];
        self.image.read_exact_at(&mut old, offset)?;
        self.image.write_all_at(data, offset)?;
        self.unsynced.push(Write { offset, old, new: data.to_vec() });
        self.cached += data.len();
        let mut oldest = 0;
        while self.cached > CACHE {
            self.cached -= self.unsynced[oldest].new.len();
            oldest += 1;
        }
        self.unsynced.drain(..oldest);
        Ok(())
    }

    /// Counts a request; the power goes when its time has come.
    fn tick(&mut self) -> Result<(), PowerLost> {
        let Some(plan) = &mut self.plan else { return Ok(()) };
        if plan.after == 0 && (self.waited >= PATIENCE || self.unsynced.len() >= plan.unsynced) {
            if let Some(plan) = self.plan.take() {
                self.cut_now(plan);
            }
            return Err(PowerLost);
        }
        match plan.after {
            0 => self.waited += 1,
            _ => plan.after -= 1,
        }
        Ok(())
    }

    fn lose(&mut self, mut plan: Plan) -> io::Result<Cut> {
        let unsynced = std::mem::take(&mut self.unsynced);
        for write in unsynced.iter().rev() {
            self.image.write_all_at(&write.old, write.offset)?;
        }
        let random = &mut plan.random;
        let whole = random.below(unsynced.len() as u64 + 1) as usize;
        // From almost nothing to almost all.
        let odds = 1 + random.below(7);
        let mut cut = Cut { unsynced: unsynced.len(), sectors: 0, sectors_kept: 0 };
        for (number, write) in unsynced.iter().enumerate() {
            let arrives = match plan.fate {
                Fate::Dropped => Some(false),
                Fate::Kept => Some(true),
                Fate::Prefix if number == whole => None,
                Fate::Prefix => Some(number < whole),
                Fate::Reordered => Some(random.chance(odds)),
                Fate::Torn => None,
            };
            let head = random.chance(odds);
            for (at, sector) in sectors(write, self.sector) {
                cut.sectors += 1;
                let by_chance = || if at < WHOLE { head } else { random.chance(odds) };
                if arrives.unwrap_or_else(by_chance) {
                    self.image.write_all_at(sector, at)?;
                    cut.sectors_kept += 1;
                }
            }
        }
        Ok(cut)
    }
}

/// The pieces of a write that arrive or do not, each for itself.
fn sectors(write: &Write, sector: u64) -> impl Iterator<Item = (u64, &[u8])> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let at = write.offset + from as u64;
        let rest = &write.new[from..];
        let len = rest.len().min((sector - at % sector) as usize);
        from += len;
        (len > 0).then(|| (at, &rest[..len]))
    })
}

/// Run by `cargo test` with the rest of this binary.
pub mod checks {
    use super::*;

    const LEN: u64 = 64 * SECTOR;

    fn medium(dir: &Path) -> Medium {
        let path = dir.join("medium");
        std::fs::write(&path, vec![0; LEN as usize]).unwrap();
        Medium::open(&path, SECTOR).unwrap()
    }

    fn content(medium: &Medium) -> Vec<u8> {
        let mut bytes = vec![0; LEN as usize];
        medium.image.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn put(medium: &mut Medium, sector: u64, count: usize, byte: u8) {
        medium.write(sector * SECTOR, &vec![byte; count * SECTOR as usize]).unwrap().unwrap();
    }

    fn cut(medium: &mut Medium, fate: Fate, seed: u64) {
        medium.plan(Plan { after: 0, unsynced: 0, fate, random: Random::new(seed) });
        assert!(medium.flush().is_err(), "the flush on which the power goes was answered");
    }

    pub fn what_was_flushed_stays_and_the_rest_meets_its_fate(dir: &Path) {
        for fate in FATES {
            for seed in 0..200 {
                let mut medium = medium(dir);
                put(&mut medium, 0, 8, 1);
                medium.flush().unwrap();
                // Over a flushed one, over itself, and elsewhere.
                put(&mut medium, 4, 8, 2);
                put(&mut medium, 8, 2, 3);
                put(&mut medium, 40, 1, 4);
                cut(&mut medium, fate, seed);
                let found = content(&medium);
                let sector = |number: u64| {
                    let bytes = &found[(number * SECTOR) as usize..][..SECTOR as usize];
                    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a sector is torn");
                    bytes[0]
                };
                for number in 0..64 {
                    let (stable, versions): (u8, &[u8]) = match number {
                        0..4 => (1, &[]),
                        4..8 => (1, &[2]),
                        8..10 => (0, &[2, 3]),
                        10..12 => (0, &[2]),
                        40 => (0, &[4]),
                        _ => (0, &[]),
                    };
                    let found = sector(number);
                    let last = *versions.last().unwrap_or(&stable);
                    match fate {
                        Fate::Dropped => assert_eq!(found, stable),
                        Fate::Kept => assert_eq!(found, last),
                        _ => assert!(found == stable || versions.contains(&found)),
                    }
                }
                if fate == Fate::Reordered {
                    assert_eq!(sector(4), if sector(10) == 2 { 2 } else { 1 });
                }
                if fate == Fate::Prefix && sector(40) == 4 {
                    assert_eq!((sector(4), sector(8)), (2, 3));
                }
            }
        }
    }

    pub fn a_seed_repeats(dir: &Path) {
        let run = |seed| {
            let mut medium = medium(dir);
            (0..60).for_each(|at| put(&mut medium, at, 4, at as u8 + 1));
            cut(&mut medium, Fate::Torn, seed);
            content(&medium)
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    pub fn without_power_nothing_is_answered(dir: &Path) {
        let mut medium = medium(dir);
        medium.plan(Plan { after: 2, unsynced: 0, fate: Fate::Dropped, random: Random::new(1) });
        put(&mut medium, 0, 1, 1);
        medium.flush().unwrap();
        assert!(medium.write(SECTOR, &[2; 512]).is_err());
        assert!(medium.write(0, &[3; 512]).is_err());
        assert!(medium.flush().is_err());
        assert!(medium.read(0, &mut [0; 512]).is_err());
        let found = content(&medium);
        assert_eq!((found[0], found[SECTOR as usize]), (1, 0));
    }
}
