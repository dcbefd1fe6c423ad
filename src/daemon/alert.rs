//! The alert hook: a program of the operator's, run for each event that he should hear of, with
//! the event as one line of JSON on its standard input.
//!
//! It can delay nothing: events wait in a queue of their own with an end (what does not fit is
//! counted and told with the next one), a thread of its own runs the programs one after another,
//! and one that takes longer than `alert.timeout` is killed with everything it has started.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal, kill_process_group};

use super::fence::process::Process;
use crate::config;
use crate::error::{Context, Error, Kind, Result};
use crate::observe::audit::{self, Name};

/// Events that wait while a program runs.
const QUEUE: usize = 64;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What an operator should hear of: each change of state, and what will change it.
fn is_alert(name: Name) -> bool {
    match name {
        Name::VolumeMounted
        | Name::VolumeUnmounted
        | Name::MakeInaccessible
        | Name::MakeAccessible
        | Name::DaemonDied
        | Name::GuardDied
        | Name::KeyDegraded
        | Name::KeyRecovered
        | Name::KeyAlert
        | Name::KeyExpiryWarning
        | Name::ReasonChanged
        | Name::HealFailed
        | Name::KekRotated
        | Name::VolumeKeyRotated
        | Name::KeyForgotten
        | Name::IntegrityFailure
        | Name::LogFailed
        | Name::UnmountRefused => true,
        Name::VolumeCreated
        | Name::Recovered
        | Name::Fence
        | Name::FenceStep
        | Name::LogChanged
        | Name::VolumeRepaired
        | Name::DekRotated
        | Name::DekDestroyed => false,
    }
}

/// The running hook.
#[derive(Debug)]
pub struct Alerts {
    waiting: Arc<AtomicUsize>,
}

impl Alerts {
    /// Has every alert of this process run the configured program, if there is one.
    pub fn start(config: &config::Alert) -> Result<Option<Alerts>> {
        let Some(program) = config.command.clone() else { return Ok(None) };
        let (queue, events) = sync_channel(QUEUE);
        let (waiting, dropped) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
        let runner = Runner {
            program,
            timeout: config.timeout,
            waiting: Arc::clone(&waiting),
            dropped: Arc::clone(&dropped),
        };
        std::thread::Builder::new()
            .name("alerts".into())
            .spawn(move || runner.run(&events))
            .context(|| "cannot start a thread".to_owned())?;
        let alerts = Alerts { waiting: Arc::clone(&waiting) };
        audit::forward(Box::new(move |name, line| offer(&queue, &waiting, &dropped, name, line)));
        Ok(Some(alerts))
    }

    /// Waits for the programs of what has happened so far, before the process ends. One that is
    /// running then goes on by itself.
    pub fn finish(&self, limit: Duration) {
        let until = Instant::now() + limit;
        while self.waiting.load(Ordering::Acquire) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn offer(
    queue: &SyncSender<String>,
    waiting: &AtomicUsize,
    dropped: &AtomicU64,
    name: Name,
    line: &str,
) {
    if !is_alert(name) {
        return;
    }
    waiting.fetch_add(1, Ordering::AcqRel);
    if queue.try_send(line.to_owned()).is_err() {
        waiting.fetch_sub(1, Ordering::AcqRel);
        dropped.fetch_add(1, Ordering::AcqRel);
    }
}

struct Runner {
    program: PathBuf,
    timeout: Duration,
    waiting: Arc<AtomicUsize>,
    dropped: Arc<AtomicU64>,
}

impl Runner {
    fn run(&self, events: &Receiver<String>) {
        for line in events {
            let dropped = self.dropped.swap(0, Ordering::AcqRel);
            if dropped > 0 {
                log::error!("{dropped} events were not handed to alert.command: it takes too long");
            }
            if let Err(error) = run_one(&self.program, &line, dropped, self.timeout) {
                log::error!("alert.command {}: {error}", self.program.display());
            }
            self.waiting.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn run_one(program: &Path, line: &str, dropped: u64, timeout: Duration) -> Result<()> {
    // By way of a shell for the umask alone, which is empty here: what the program makes is its
    // user's. (A hook of our own between fork and exec would copy this process's memory.)
    let mut child = Command::new("/bin/sh")
        .args(["-c", "umask 077; exec \"$0\""])
        .arg(program)
        .env_clear()
        .env("PATH", PATH)
        .env("BYOKFS_ALERTS_DROPPED", dropped.to_string())
        .current_dir("/")
        .stdin(input(line)?)
        .stdout(Stdio::null())
        // A group of its own, so that it can be ended with all that it has started.
        .process_group(0)
        .spawn()
        .context(|| "cannot be run".to_owned())?;
    let ended = wait(&child, timeout);
    // Also what a program that has ended left behind. It is not reaped yet, so the number of its
    // group is still its own.
    end_group(&child);
    let status = child.wait().context(|| "cannot be waited for".to_owned())?;
    match ended? {
        true if status.success() => Ok(()),
        true => Err(Error::new(Kind::Io, format!("failed with {status}"))),
        false => Err(Error::new(Kind::Io, "has not ended within alert.timeout: killed")),
    }
}

/// In memory, so that a program that does not read blocks nobody.
fn input(line: &str) -> Result<Stdio> {
    let failed = || "cannot make its input".to_owned();
    let memory = rustix::fs::memfd_create(c"byokfs event", MemfdFlags::CLOEXEC).context(failed)?;
    let mut file = File::from(memory);
    file.write_all(line.as_bytes()).context(failed)?;
    file.seek(SeekFrom::Start(0)).context(failed)?;
    Ok(Stdio::from(file))
}

fn wait(child: &Child, timeout: Duration) -> Result<bool> {
    let pid = i32::try_from(child.id()).unwrap_or_default();
    let process = Process::open(pid).context(|| "cannot be watched".to_owned())?;
    Ok(process.wait(timeout))
}

fn end_group(child: &Child) {
    let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else { return };
    match kill_process_group(group, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => log::error!("cannot end the alert program's group: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    const LIMIT: Duration = Duration::from_secs(20);

    fn script(dir: &Path, body: &str) -> PathBuf {
        let path = dir.join("hook");
        fs::write(&path, format!("#!/bin/sh\ncd '{}'\n{body}\n", dir.display())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn a_program_gets_the_event_and_makes_private_files() {
        let dir = tempfile::tempdir().unwrap();
        let hook = script(dir.path(), "cat >event; echo \"$BYOKFS_ALERTS_DROPPED\" >dropped");
        run_one(&hook, "{\"event\":\"X\"}\n", 3, LIMIT).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("event")).unwrap(), "{\"event\":\"X\"}\n");
        assert_eq!(fs::read_to_string(dir.path().join("dropped")).unwrap(), "3\n");
        let mode = fs::metadata(dir.path().join("event")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn one_that_hangs_is_ended_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let hook = script(dir.path(), "trap '' TERM; sleep 600 & echo $! >child; wait; sleep 600");
        let start = Instant::now();
        let error = run_one(&hook, "{}", 0, Duration::from_millis(500)).unwrap_err();
        assert!(error.to_string().contains("killed"), "{error}");
        assert!(start.elapsed() < LIMIT);
        let child: i32 =
            fs::read_to_string(dir.path().join("child")).unwrap().trim().parse().unwrap();
        let ended = Process::open(child).map_or(true, |process| process.wait(LIMIT));
        assert!(ended, "its child lives on");
    }

    #[test]
    fn what_cannot_run_is_an_error_and_no_more() {
        assert!(run_one(Path::new("/nonexistent/hook"), "{}", 0, LIMIT).is_err());
        // It reads nothing of a long event, and fails.
        let dir = tempfile::tempdir().unwrap();
        let hook = script(dir.path(), "exit 3");
        let error = run_one(&hook, &"x".repeat(1 << 20), 0, LIMIT).unwrap_err();
        assert!(error.to_string().contains('3'), "{error}");
    }

    #[test]
    fn a_full_queue_drops_and_never_waits() {
        let (queue, events) = sync_channel(2);
        let (waiting, dropped) = (AtomicUsize::new(0), AtomicU64::new(0));
        for _ in 0..5 {
            offer(&queue, &waiting, &dropped, Name::KeyDegraded, "{}");
            offer(&queue, &waiting, &dropped, Name::FenceStep, "{}");
        }
        assert_eq!((waiting.into_inner(), dropped.into_inner()), (2, 3));
        drop(queue);
        assert_eq!(events.iter().count(), 2);
    }
}
