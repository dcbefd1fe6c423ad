//! One life after another, each ended by a kill: whatever the daemon has done up to a call is there.

use super::workloads::random_workload;
use super::{Content, Driver, FILES, Op, Run, contents, nothing_past_the_end, seeds};
use crate::backing::memory::Random;
use crate::store::layout::BLOCK;
use crate::store::tests::support::mount;

const LIVES: usize = 8;
const OPS: usize = 10;

impl Run {
    /// The content after the last operation that returned, or with the one that was under way.
    fn judge_killed(&self, cut: usize, found: &[Content; FILES]) -> Result<(), String> {
        let returned = self.steps.iter().rposition(|step| step.position <= cut).unwrap_or(0);
        let under_way = self.steps.get(returned + 1).unwrap_or(&self.steps[returned]);
        for (which, content) in found.iter().enumerate() {
            let of = [&self.steps[returned].contents[which], &under_way.contents[which]];
            if !of.contains(&content) {
                let len = content.as_ref().map(|content| content.len());
                return Err(format!("file {which} has {len:?} bytes of something else"));
            }
        }
        Ok(())
    }
}

/// Writes anywhere, and sizes that take them away again.
fn shaping(random: &mut Random) -> Op {
    const BLOCKS: u64 = 400;
    let offset = random.below(BLOCKS) * BLOCK + random.below(2) * 700;
    match random.below(9) {
        0 | 1 => Op::Truncate(offset),
        2 => Op::Punch { offset, len: 1 + random.below(60 * BLOCK) },
        3 => Op::Zero { offset, len: 1 + random.below(60 * BLOCK) },
        4 => Op::Checkpoint,
        5 => {
            let keep_size = random.chance(4);
            Op::Allocate { offset, len: 1 + random.below(60 * BLOCK), keep_size }
        }
        _ => {
            let len = [600, 9000, 100_000][random.below(3) as usize];
            super::write(offset, len, random.below(256) as u8)
        }
    }
}

fn live_and_die(seed: u64) -> Result<(), String> {
    let mut random = Random::new(seed);
    let mut driver = Driver::new();
    for life in 0..LIVES {
        let mut ops: Vec<Op> = match seed % 4 {
            0 => random_workload(random.next_u64()),
            _ => (0..OPS).map(|_| shaping(&mut random)).collect(),
        };
        // Half of them in a checkpoint, when the log is older than what is home.
        let in_checkpoint = random.chance(4);
        if in_checkpoint {
            ops.push(Op::Checkpoint);
        }
        ops.iter().for_each(|op| driver.run(op));
        let run = driver.end();
        let from = match life {
            _ if in_checkpoint => run.steps[run.steps.len() - 2].position,
            // There is no file before the first operation.
            0 => run.steps[1].position,
            // Recovery is cut too.
            _ => 0,
        };
        let cut = from + random.below((run.trace.len() - from) as u64 + 1) as usize;
        let failed = |error: String| {
            format!("life {life}, cut at {cut}: {}{error}\n{ops:#?}", run.trace.describe(cut))
        };
        nothing_past_the_end(run.trace.at(cut)).map_err(failed)?;
        let backing = run.trace.at(cut);
        let mounted = mount(backing.clone()).map_err(|error| failed(error.to_string()))?;
        let found = contents(&mounted).map_err(failed)?;
        run.judge_killed(cut, &found).map_err(failed)?;
        driver = Driver::after(backing, mounted, found);
    }
    Ok(())
}

#[test]
fn whatever_was_acknowledged_survives_kills() {
    for seed in 0..seeds(5) * 12 {
        live_and_die(seed).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}
