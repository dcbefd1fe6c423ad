//! The guard: the daemon's parent, which never holds a key.
//!
//! It starts the daemon, hands reports up and termination requests down, and ends with the
//! daemon's own outcome. When the daemon ends and its mount is still there (it was killed), nobody
//! watches the key any more while a warm server serves on: the guard then fences the server,
//! unmounts lazily, and says so in the audit trail.
//!
//! A guard that ends is replaced by one that the daemon starts itself (`daemon::keeper`); that one
//! watches the daemon without being its parent.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::Signal;

use super::alert::Alerts;
use super::fence::process::Process;
use super::fence::{Fence, Outcome};
use super::mountinfo::{self, Device};
use super::plan::Plan;
use super::report::{self, Report};
use super::{check, control, harden, notify, start};
use crate::error::{Context, Error, Kind, Result};
use crate::observe::append_to;
use crate::observe::audit::{self, Event, Name};
use crate::sys;

/// For the alerts of a daemon's death to be sent.
const ALERTS_LIMIT: Duration = Duration::from_secs(60);
/// For the first lookup on a new mount.
const LOOKUP_LIMIT: Duration = Duration::from_secs(20);

/// Guards one mount from start to end; returns the daemon's own outcome. There is one thread yet, and
/// no log.
pub fn run(plan: &Plan) -> Result<()> {
    harden::process("byokfs-guard")?;
    let signals = sys::signals::open(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])
        .context(|| "cannot take signals".to_owned())?;
    // The log has a thread, to which a signal would come that is not blocked in it.
    start::install_log(plan)?;
    match plan.watch {
        Some(watch) => {
            let daemon = Process::open(watch.pid)
                .context(|| format!("cannot watch process {}", watch.pid))?;
            wait_for(&daemon, &signals)?;
            aftermath(plan, watch.pid, watch.device, "unknown")
        }
        None => parent(plan, &signals),
    }
}

/// The internal verb: a guard in the background, or one that takes over. Its errors go to the verb
/// that waits for the mount, and to the log.
pub fn main() -> Result<()> {
    let result = Plan::from_stdin().and_then(|(plan, _)| {
        rustix::process::setsid().context(|| "cannot start a session".to_owned())?;
        run(&plan)
    });
    if let Err(error) = &result {
        log::error!("{error}");
        Report::Failed(error.into()).send();
    }
    result
}

/// Starts a guard in the background and returns when its mount serves; or, of a mount that is there
/// and shut, why it is.
pub fn start_in_background(plan: &Plan) -> Result<Option<String>> {
    let stderr = match &plan.config.log.file {
        Some(file) => {
            check::parent_dir(file)?;
            let opened = append_to(file);
            Stdio::from(opened.context(|| format!("cannot open the log {}", file.display()))?)
        }
        None => Stdio::null(),
    };
    let mut guard = spawn("__guard", plan, Stdio::piped(), stderr)?;
    drop(send_plan(&mut guard, plan)?);
    let reports = guard.stdout.take().ok_or_else(|| Error::usage("the guard has no output"))?;
    report::wait(BufReader::new(reports))
}

fn parent(plan: &Plan, signals: &OwnedFd) -> Result<()> {
    let mut child = spawn("__daemon", plan, Stdio::piped(), Stdio::inherit())?;
    // Held open for as long as the guard lives: its end tells the daemon that the guard is gone.
    let life = send_plan(&mut child, plan)?;
    let pid = i32::try_from(child.id()).unwrap_or_default();
    let daemon = Process::open(pid).context(|| "cannot watch the daemon".to_owned())?;
    let daemon = Arc::new(daemon);
    let watched = Arc::clone(&daemon);
    let (told, heard) = mpsc::channel();
    let stdout = child.stdout.take();
    let foreground = plan.foreground;
    let mnt = plan.mnt.clone();
    let relay = std::thread::Builder::new()
        .name("reports".into())
        .spawn(move || relay(stdout, &watched, &mnt, foreground, &told))
        .context(|| "cannot start a thread".to_owned())?;
    wait_for(&daemon, signals)?;
    let status = child.wait().context(|| "cannot wait for the daemon".to_owned())?;
    drop(life);
    if relay.join().is_err() {
        log::error!("the thread that relays the daemon's reports panicked");
    }
    let mut device = None;
    let mut failure = None;
    for report in heard {
        match report {
            Report::Mounted(number) => device = Some(number),
            Report::Ready | Report::Shut(_) => {}
            Report::Failed(failed) => failure = Some(Error::from(failed)),
        }
    }
    // One that ends well has seen that its mount is gone, while it still kept others from mounting the
    // volume: from then on there may be another mount of it, with the same number.
    if let Some(device) = device
        && !status.success()
    {
        aftermath(plan, pid, device, &status.to_string())?;
    }
    if let Some(failure) = failure {
        return Err(failure);
    }
    if status.success() {
        return Ok(());
    }
    let kind = Kind::ALL.into_iter().find(|kind| status.code() == Some(kind.exit_code().into()));
    Err(Error::new(kind.unwrap_or(Kind::Io), format!("the daemon ended with {status}")))
}

/// Hands the daemon's reports up and keeps them. In the foreground nobody above reads them.
fn relay(
    stdout: Option<impl io::Read>,
    daemon: &Process,
    mnt: &Path,
    foreground: bool,
    told: &mpsc::Sender<Report>,
) {
    let Some(stdout) = stdout else { return };
    for line in BufReader::new(stdout).lines() {
        let report = line
            .context(|| "cannot read the daemon's reports".to_owned())
            .and_then(|line| Report::parse(&line));
        match report {
            Ok(report) => {
                let report = match report {
                    Report::Ready => ready(daemon, mnt),
                    Report::Shut(why) => {
                        notify::ready(&format!("Inaccessible: {why}"));
                        Report::Shut(why)
                    }
                    report => report,
                };
                if !foreground {
                    report.send();
                }
                if told.send(report).is_err() {
                    return;
                }
            }
            Err(error) => log::error!("{error}"),
        }
    }
    if !foreground && let Err(error) = report::close() {
        log::warn!("{error}");
    }
}

/// The daemon says that it serves; the guard may touch the mount, and tries.
fn ready(daemon: &Process, mnt: &Path) -> Report {
    let (told, heard) = mpsc::channel();
    let path = mnt.to_owned();
    let spawned = std::thread::Builder::new().name("lookup".into()).spawn(move || {
        // Nobody listens any more when it took too long.
        let _ = told.send(std::fs::metadata(path));
    });
    let looked = match spawned {
        Ok(_) => heard.recv_timeout(LOOKUP_LIMIT).unwrap_or(Err(io::ErrorKind::TimedOut.into())),
        Err(error) => Err(error),
    };
    match looked {
        Ok(_) => {
            notify::ready("Available");
            Report::Ready
        }
        Err(error) => {
            let error =
                Error::io(format!("{} is mounted and does not serve", mnt.display()), error);
            log::error!("{error}");
            if let Err(error) = daemon.signal(Signal::TERM) {
                log::error!("cannot signal the daemon: {error}");
            }
            Report::Failed((&error).into())
        }
    }
}

/// Until the daemon ends. Requests to terminate go to the daemon, which decides.
fn wait_for(daemon: &Process, signals: &OwnedFd) -> Result<()> {
    loop {
        let daemon_fd = daemon.as_fd();
        let mut fds = [PollFd::new(&daemon_fd, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Error::io("cannot wait for the daemon", error.into())),
        }
        while let Some(signal) =
            sys::signals::next(signals).context(|| "cannot take signals".to_owned())?
        {
            if signal != libc::SIGHUP {
                log::info!("asking the daemon to unmount");
                daemon.signal(Signal::TERM).context(|| "cannot signal the daemon".to_owned())?;
            }
        }
        if !daemon.is_alive() {
            return Ok(());
        }
    }
}

/// After the daemon's end. A mount that is still there means that it was killed.
fn aftermath(plan: &Plan, daemon: i32, device: Device, status: &str) -> Result<()> {
    if !mountinfo::is_mounted(device, &plan.back)? {
        return Ok(());
    }
    log::error!("the daemon died ({status}) and left its mount {}", plan.mnt.display());
    install_audit(plan);
    let alerts = Alerts::start(&plan.config.alert).unwrap_or_else(|error| {
        log::error!("{error}");
        None
    });
    audit::emit(Event::new(Name::DaemonDied).with("status", status));
    // Open files of the server answer ENOTCONN now, but its cache does not.
    let outcome = Fence::new(plan.config.fence.clone(), device).stop_server();
    let unmounted = unmount_lazily(plan, device);
    control::forget(&plan.config.run.dir, &plan.mnt, daemon.unsigned_abs());
    let mut event = Event::new(Name::VolumeUnmounted)
        .with("reason", "DaemonDied")
        .with("fence", outcome.name());
    if let Err(error) = &unmounted {
        event = event.with("error", error.to_string());
    }
    audit::emit(event);
    if let Some(alerts) = alerts {
        alerts.finish(ALERTS_LIMIT);
    }
    unmounted?;
    let fence = match outcome {
        Outcome::Off => {
            "; no fence is configured: a database server on it may still serve \
                         what it has cached"
        }
        Outcome::Survived => "; the database server could not be stopped",
        Outcome::NoServer | Outcome::Stopped(_) => "",
    };
    Err(Error::new(
        Kind::Io,
        format!("the daemon of {} died ({status}){fence}", plan.mnt.display()),
    ))
}

fn unmount_lazily(plan: &Plan, device: Device) -> Result<()> {
    // One mount may lie over another: only ours is taken.
    while mountinfo::at(&plan.mnt)?.is_some_and(|mount| mount.is(device, &plan.back)) {
        mountinfo::unmount(&plan.mnt, true)?;
    }
    Ok(())
}

fn install_audit(plan: &Plan) {
    let Some(path) = &plan.config.audit.file else { return };
    let context =
        [("mount", plan.mnt.display().to_string()), ("back", plan.back.display().to_string())];
    if let Err(error) = audit::install(path, &context) {
        log::error!("{error}");
    }
}

/// Starts this program again, with an internal verb. The mount point is only for `ps`.
pub(super) fn spawn(verb: &str, plan: &Plan, stdout: Stdio, stderr: Stdio) -> Result<Child> {
    Command::new("/proc/self/exe")
        .arg0("byokfs")
        .arg(verb)
        .arg(&plan.mnt)
        .stdin(Stdio::piped())
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .context(|| "cannot start byokfs again".to_owned())
}

/// Returns the open end of the child's standard input.
pub(super) fn send_plan(child: &mut Child, plan: &Plan) -> Result<File> {
    let stdin = child.stdin.take().ok_or_else(|| Error::usage("the child has no input"))?;
    let mut stdin = File::from(OwnedFd::from(stdin));
    stdin
        .write_all(plan.to_line()?.as_bytes())
        .context(|| "cannot tell the child what to mount".to_owned())?;
    Ok(stdin)
}
