//! Workers of the ring that have something for each other to do.
//!
//! Whoever answers a request gets the next one of its entry. So one worker may have many entries, and
//! serves their requests one after the other without any switch between them, as long as none of them
//! waits for something: those it hands to a worker that has no entry. There is one: of the workers
//! there are more than of the entries, and who has many leaves others without.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::reply::Errno;
use crate::sync::{Condvar, Mutex};
use crate::sys::uring::Entry;
use crate::vfs::Attendance;

/// An entry whose request is to be answered: without a body.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) entry: Entry,
    pub(super) done: Result<(), Errno>,
}

#[derive(Debug)]
pub(super) enum Job {
    /// The request in that entry.
    Serve(Entry),
    Attend(Attendance),
    /// What [`Crew::take_told`] gives.
    Answer,
}

/// What the workers of a session's ring share.
#[derive(Debug)]
pub(super) struct Crew {
    board: Mutex<Board>,
    /// For each of them.
    posted: Vec<Condvar>,
    told: Mutex<Vec<Told>>,
    /// Entries that have not ended with the mount.
    live: AtomicUsize,
}

#[derive(Debug, Default)]
struct Board {
    /// Who has nothing to do, the last one first to get something: caches may remember him.
    idle: Vec<usize>,
    /// What each of them has got.
    jobs: Vec<Option<Job>>,
    /// One of those is [`Job::Answer`].
    answer_is_posted: bool,
    ended: bool,
}

impl Crew {
    pub(super) fn new(workers: usize, entries: usize) -> Crew {
        let jobs = (0..workers).map(|_| None).collect();
        Crew {
            board: Mutex::new(Board { jobs, ..Board::default() }),
            posted: (0..workers).map(|_| Condvar::new()).collect(),
            told: Mutex::default(),
            live: AtomicUsize::new(entries),
        }
    }

    /// Gives a job to a worker who has nothing to do; it comes back where there is none. One answers
    /// for all.
    pub(super) fn hand(&self, job: Job) -> Result<(), Job> {
        let worker = {
            let mut board = self.board.lock();
            let answer = matches!(job, Job::Answer);
            if answer && board.answer_is_posted {
                return Ok(());
            }
            let Some(worker) = board.idle.pop() else { return Err(job) };
            board.answer_is_posted |= answer;
            board.jobs[worker] = Some(job);
            worker
        };
        self.posted[worker].notify_one();
        Ok(())
    }

    /// Waits for a job; None when the mount is gone. For a worker who has no entry.
    pub(super) fn wait_for_job(&self, worker: usize) -> Option<Job> {
        let mut board = self.board.lock();
        // Nobody was idle when they were told.
        if !self.told.lock().is_empty() {
            return Some(Job::Answer);
        }
        board.idle.push(worker);
        loop {
            if let Some(job) = board.jobs[worker].take() {
                if matches!(job, Job::Answer) {
                    board.answer_is_posted = false;
                }
                return Some(job);
            }
            if board.ended {
                return None;
            }
            self.posted[worker].wait(&mut board);
        }
    }

    /// Notes that an entry can be answered. Whoever has it told sees to that it is.
    pub(super) fn tell(&self, told: Told) {
        self.told.lock().push(told);
    }

    /// At most that many. If others are left, somebody else will come for them.
    pub(super) fn take_told(&self, most: usize) -> Vec<Told> {
        let (taken, left) = {
            let mut told = self.told.lock();
            let count = told.len().min(most);
            let taken = told.drain(..count).collect();
            (taken, !told.is_empty())
        };
        if left {
            // If nobody is idle, who comes to be will find them.
            let _ = self.hand(Job::Answer);
        }
        taken
    }

    /// So many entries have ended with the mount.
    pub(super) fn have_gone(&self, entries: usize) {
        if entries > 0 && self.live.fetch_sub(entries, Ordering::SeqCst) == entries {
            self.board.lock().ended = true;
            self.posted.iter().for_each(Condvar::notify_one);
        }
    }
}

/// A request that waits to be told of. If nobody tells it, its answer is EIO.
#[derive(Debug)]
pub(super) struct Waiting {
    crew: Arc<Crew>,
    entry: Option<Entry>,
}

impl Waiting {
    pub(super) fn new(crew: &Arc<Crew>, entry: Entry) -> Waiting {
        Waiting { crew: Arc::clone(crew), entry: Some(entry) }
    }

    /// The caller sees to it that the crew's told are answered.
    pub(super) fn tell(mut self, done: Result<(), Errno>) {
        if let Some(entry) = self.entry.take() {
            self.crew.tell(Told { entry, done });
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            self.crew.tell(Told { entry, done: Err(Errno::IO) });
            // As in `take_told`.
            let _ = self.crew.hand(Job::Answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn entry() -> Entry {
        Entry::new(4096).unwrap()
    }

    fn idle(crew: &Crew) -> usize {
        crew.board.lock().idle.len()
    }

    fn wait_until_idle(crew: &Crew, workers: usize) {
        while idle(crew) < workers {
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_job_goes_to_who_came_last_and_comes_back_where_nobody_is_idle() {
        let crew = Crew::new(2, 2);
        assert!(matches!(crew.hand(Job::Answer), Err(Job::Answer)));
        thread::scope(|scope| {
            let first = scope.spawn(|| crew.wait_for_job(0));
            wait_until_idle(&crew, 1);
            let last = scope.spawn(|| crew.wait_for_job(1));
            wait_until_idle(&crew, 2);
            crew.hand(Job::Serve(entry())).unwrap();
            assert!(matches!(last.join().unwrap(), Some(Job::Serve(_))));
            crew.hand(Job::Answer).unwrap();
            assert!(matches!(first.join().unwrap(), Some(Job::Answer)));
        });
        assert!(crew.hand(Job::Answer).is_err());
    }

    #[test]
    fn who_was_told_while_nobody_was_idle_is_found_by_who_comes() {
        let crew = Arc::new(Crew::new(1, 3));
        for _ in 0..2 {
            Waiting::new(&crew, entry()).tell(Ok(()));
        }
        drop(Waiting::new(&crew, entry()));
        assert!(matches!(crew.wait_for_job(0), Some(Job::Answer)));
        let first = crew.take_told(1);
        assert_eq!(first.iter().map(|told| told.done).collect::<Vec<_>>(), [Ok(())]);
        assert!(matches!(crew.wait_for_job(0), Some(Job::Answer)), "others are left");
        let told = crew.take_told(16);
        assert_eq!(told.iter().map(|told| told.done).collect::<Vec<_>>(), [Ok(()), Err(Errno::IO)]);
        assert!(crew.take_told(16).is_empty());
        assert_eq!(idle(&crew), 0);
    }

    #[test]
    fn who_is_idle_hears_of_the_rest_and_of_what_nobody_tells() {
        let crew = Arc::new(Crew::new(2, 3));
        for _ in 0..2 {
            crew.tell(Told { entry: entry(), done: Ok(()) });
        }
        thread::scope(|scope| {
            // Both of these find the two.
            for worker in 0..2 {
                assert!(matches!(crew.wait_for_job(worker), Some(Job::Answer)));
            }
            let told = crew.take_told(2);
            let idle = scope.spawn(|| crew.wait_for_job(0));
            wait_until_idle(&crew, 1);
            told.into_iter().for_each(|told| crew.tell(told));
            assert_eq!(crew.take_told(1).len(), 1);
            assert!(matches!(idle.join().unwrap(), Some(Job::Answer)));
            assert_eq!(crew.take_told(1).len(), 1);
            let idle = scope.spawn(|| crew.wait_for_job(1));
            wait_until_idle(&crew, 1);
            drop(Waiting::new(&crew, entry()));
            assert!(matches!(idle.join().unwrap(), Some(Job::Answer)));
        });
    }

    #[test]
    fn all_go_home_when_the_last_entry_has_ended() {
        let crew = &Crew::new(3, 5);
        thread::scope(|scope| {
            let workers: Vec<_> =
                (0..3).map(|worker| scope.spawn(move || crew.wait_for_job(worker))).collect();
            crew.have_gone(0);
            crew.have_gone(2);
            wait_until_idle(crew, 3);
            crew.have_gone(3);
            workers.into_iter().for_each(|worker| assert!(worker.join().unwrap().is_none()));
        });
        assert!(crew.wait_for_job(0).is_none(), "and who comes later");
    }
}
