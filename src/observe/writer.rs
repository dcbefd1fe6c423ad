//! Lines to a file that may hang: a disk that is gone, a pipe that nobody reads.
//!
//! A thread of its own writes them. Whoever has a line waits until it is written, so that what was
//! told is there after a crash; but not for long, and no longer at all while an earlier line is
//! late. A cut-off must not wait for a log.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Context, Result};
use crate::sync::{Condvar, Mutex};

/// How long a line is waited for, when the ones before it were in time.
const PATIENCE: Duration = Duration::from_secs(1);
/// Lines that wait behind one that is late; those beyond are lost, and counted.
const QUEUE: usize = 4096;

/// Told of what went wrong, by the thread that writes.
type Complaint = Box<dyn Fn(&str) + Send>;

/// Whether what is written to ends within a line by now, whoever has left that there.
pub(super) type Torn = Box<dyn Fn() -> bool + Send>;

/// Clones write to the same file, in the order of their calls.
#[derive(Clone)]
pub(super) struct Lines(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    patience: Duration,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Vec<u8>>,
    /// Lines that came in and were not lost, and those of them that were written.
    taken: u64,
    done: u64,
    lost: u64,
    /// A line was not written in time, and none since.
    late: bool,
    ended: bool,
}

impl Lines {
    /// Each line becomes one write of `target`.
    pub(super) fn start(
        name: &str,
        target: impl Write + Send + 'static,
        found_torn: Torn,
        complaint: Complaint,
    ) -> Result<Lines> {
        Lines::start_with(PATIENCE, name, target, found_torn, complaint)
    }

    fn start_with(
        patience: Duration,
        name: &str,
        target: impl Write + Send + 'static,
        found_torn: Torn,
        complaint: Complaint,
    ) -> Result<Lines> {
        let (state, changed) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { state, changed, patience });
        let lines = Lines(Arc::clone(&shared));
        std::thread::Builder::new()
            .name(name.into())
            .spawn(move || shared.run(target, &found_torn, &complaint))
            .context(|| format!("cannot start the thread {name}"))?;
        Ok(lines)
    }

    /// Has the line written, and waits for that as long as it may.
    pub(super) fn put(&self, line: Vec<u8>) {
        let mut state = self.0.state.lock();
        if state.queue.len() >= QUEUE {
            state.lost += 1;
            return;
        }
        state.queue.push_back(line);
        state.taken += 1;
        let own = state.taken;
        self.0.changed.notify_all();
        let until = Instant::now() + self.0.patience;
        while state.done < own && !state.late {
            state.late = self.0.changed.wait_until(&mut state, until).timed_out();
        }
    }
}

impl Shared {
    fn run(&self, mut target: impl Write, found_torn: &Torn, complaint: &Complaint) {
        let mut torn = false;
        loop {
            let (mut line, lost) = {
                let mut state = self.state.lock();
                while state.queue.is_empty() && !state.ended {
                    self.changed.wait(&mut state);
                }
                let Some(line) = state.queue.pop_front() else { return };
                (line, std::mem::take(&mut state.lost))
            };
            if lost > 0 {
                complaint(&format!("{lost} lines were lost while it took none"));
            }
            // One write, so that lines of several processes never mix; a short one is a failure.
            if torn || found_torn() {
                // What is there of an earlier line must not spoil this one.
                line.insert(0, b'\n');
            }
            match target.write(&line) {
                Ok(written) if written == line.len() => torn = false,
                Ok(written) => {
                    torn |= written > 0;
                    complaint("it took only part of a line");
                }
                Err(error) => complaint(&error.to_string()),
            }
            let mut state = self.state.lock();
            state.done += 1;
            state.late &= !state.queue.is_empty();
            self.changed.notify_all();
        }
    }
}

/// For a logger: each write is a line.
impl Write for Lines {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.put(buf.to_vec());
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        // The thread has the other one, and ends when all is written.
        if Arc::strong_count(&self.0) <= 2 {
            self.0.state.lock().ended = true;
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes nothing while it is held.
    #[derive(Clone, Default)]
    struct Slow {
        held: Arc<Mutex<()>>,
        written: Arc<Mutex<Vec<String>>>,
    }

    impl Write for Slow {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let _turn = self.held.lock();
            self.written.lock().push(String::from_utf8(buf.to_vec()).unwrap());
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn by_nobody() -> Torn {
        Box::new(|| false)
    }

    fn started(patience: Duration) -> (Lines, Slow, Arc<Mutex<Vec<String>>>) {
        let (target, complaints) = (Slow::default(), Arc::new(Mutex::new(Vec::new())));
        let heard = Arc::clone(&complaints);
        let complaint = Box::new(move |what: &str| heard.lock().push(what.to_owned()));
        let lines =
            Lines::start_with(patience, "test-lines", target.clone(), by_nobody(), complaint);
        let lines = lines.unwrap();
        (lines, target, complaints)
    }

    #[test]
    fn a_line_is_written_when_put_returns() {
        let (lines, target, complaints) = started(Duration::from_secs(600));
        for number in 0..100 {
            lines.put(format!("{number}").into_bytes());
            assert_eq!(target.written.lock().last(), Some(&number.to_string()));
        }
        assert!(complaints.lock().is_empty());
    }

    /// A disk that was full when half a line was there.
    #[derive(Clone, Default)]
    struct Full {
        taken: Arc<Mutex<Vec<u8>>>,
        room: Arc<Mutex<usize>>,
    }

    impl Write for Full {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let mut room = self.room.lock();
            if *room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let length = buf.len().min(*room);
            *room -= length;
            self.taken.lock().extend_from_slice(&buf[..length]);
            Ok(length)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_part_of_a_line_does_not_spoil_the_next() {
        let target = Full::default();
        *target.room.lock() = 15;
        let patience = Duration::from_secs(600);
        let lines = Lines::start_with(
            patience,
            "test-lines",
            target.clone(),
            by_nobody(),
            Box::new(|_| ()),
        )
        .unwrap();
        for line in ["first...\n", "second...\n", "third...\n"] {
            lines.put(line.into());
        }
        *target.room.lock() = 1000;
        for line in ["fourth...\n", "fifth...\n"] {
            lines.put(line.into());
        }
        let text = String::from_utf8(target.taken.lock().clone()).unwrap();
        assert_eq!(text, "first...\nsecond\nfourth...\nfifth...\n");
    }

    #[test]
    fn a_file_that_hangs_holds_nobody_up_and_gets_what_fits_later() {
        let patience = Duration::from_millis(100);
        let (lines, target, complaints) = started(patience);
        let held = target.held.lock();
        let start = Instant::now();
        for number in 0..QUEUE + 11 {
            lines.put(format!("{number}").into_bytes());
        }
        // The first one is waited for, the others are not.
        assert!(start.elapsed() > patience, "{:?}", start.elapsed());
        assert!(start.elapsed() < 300 * patience, "{:?}", start.elapsed());
        assert!(target.written.lock().is_empty());
        drop(held);
        let limit = Instant::now() + Duration::from_secs(20);
        while target.written.lock().len() <= QUEUE && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(5));
        }
        // One was on its way already.
        let numbers: Vec<String> = (0..=QUEUE).map(|number| number.to_string()).collect();
        assert_eq!(*target.written.lock(), numbers);
        assert_eq!(*complaints.lock(), ["10 lines were lost while it took none"]);
    }
}
