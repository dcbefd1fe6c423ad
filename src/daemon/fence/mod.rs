//! The fence: stops the database server on the mount, for a cut-off that means something. An idle
//! server with a warm cache serves its rows for as long as it lives, whatever its files answer.
//!
//! The server is the process that listens on its socket, else the one that its pid file names (also
//! in the numbers of a container's own pid namespace), else one with the name of a database server;
//! and only if it uses this mount: an innocent process behind a stale or foreign socket or pid file
//! is left alone, and only the server's own socket is asked. Stages, each with its share of `fence.timeout`: the server's own SHUTDOWN, SIGTERM,
//! SIGKILL. Every step is an audit event. All waits are bounded; the gate does not wait for the
//! fence beyond the timeout (`daemon::cutoff`).
//!
//! Other processes on the mount are not stopped: they meet the errors of the mount itself.

pub mod process;
pub mod server;

use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::mountinfo::Device;
use super::users;
use crate::config;
use crate::observe::audit::{Event, Name, Status, emit};
use process::Process;

/// Shares of the budget, in percent of it since the start: until when the polite stop is given to
/// connect and be taken, to end the server, and SIGTERM to end it.
const ASK_UNTIL: u32 = 20;
const SHUTDOWN_UNTIL: u32 = 60;
const TERM_UNTIL: u32 = 85;
/// SIGKILL is waited for, however late it is: who was killed has not survived.
const KILL_AT_LEAST: Duration = Duration::from_secs(1);

/// How often to look for a server that its supervisor has started again.
const LINGER_STEP: Duration = Duration::from_millis(200);
/// Each so-many-th time among all processes of the machine.
const LINGER_SEARCH: u32 = 10;
/// What a server's process is called where neither socket nor pid file lead to it.
const SERVERS: [&str; 2] = ["mariadbd", "mysqld"];
/// A restarted server can do nothing useful: it gets this long after SIGTERM.
const RESTARTED_TERM: Duration = Duration::from_secs(2);

/// What a fence ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// `fence.enabled` is false.
    Off,
    /// Neither the socket nor the pid file leads to a server on this mount.
    NoServer,
    /// It has ended, by this step.
    Stopped(&'static str),
    /// It was sent SIGKILL and has not ended within the budget.
    Survived,
}

impl Outcome {
    pub const fn name(self) -> &'static str {
        match self {
            Outcome::Off => "Off",
            Outcome::NoServer => "NoServer",
            Outcome::Stopped(_) => "Stopped",
            Outcome::Survived => "Survived",
        }
    }
}

/// A server that was found.
#[derive(Debug)]
struct Server {
    process: Process,
    /// It is the one that listens on `fence.socket`.
    by_socket: bool,
}

/// The server on one mount, and how to stop it.
#[derive(Clone, Debug)]
pub struct Fence {
    config: config::Fence,
    device: Device,
}

impl Fence {
    pub fn new(config: config::Fence, device: Device) -> Fence {
        Fence { config, device }
    }

    pub fn is_on(&self) -> bool {
        self.config.enabled
    }

    /// What would keep a cut-off from asking the server to stop.
    pub fn complaint(&self) -> Option<String> {
        let option_file = self.config.option_file.as_deref().filter(|_| self.is_on())?;
        server::Account::complaint(option_file)
    }

    /// Of the mount.
    pub fn device(&self) -> Device {
        self.device
    }

    pub fn timeout(&self) -> Duration {
        self.config.timeout
    }

    /// Stops the server, within `fence.timeout` from now.
    pub fn stop_server(&self) -> Outcome {
        if !self.is_on() {
            return Outcome::Off;
        }
        let start = Instant::now();
        emit(Event::new(Name::Fence).status(Status::Started));
        let (outcome, pid) = match self.server() {
            None => (Outcome::NoServer, None),
            Some(server) => (self.stop(&server, start), Some(server.process.pid())),
        };
        let status = if outcome == Outcome::Survived { Status::Failed } else { Status::Succeeded };
        let mut event = Event::new(Name::Fence)
            .status(status)
            .with("outcome", outcome.name())
            .with("milliseconds", millis(start.elapsed()));
        if let Outcome::Stopped(by) = outcome {
            event = event.with("by", by);
        }
        if let Some(pid) = pid {
            event = event.with("pid", pid);
        }
        emit(event);
        outcome
    }

    /// For a while after a stop: a supervisor may start the server again, against a mount that
    /// answers only errors. Ends when `until` has passed or `over` says so.
    pub fn linger(&self, until: Duration, over: impl Fn() -> bool) {
        let until = Instant::now() + until;
        for round in 1_u32.. {
            if !self.is_on() || Instant::now() >= until || over() {
                return;
            }
            std::thread::sleep(LINGER_STEP);
            let search = round.is_multiple_of(LINGER_SEARCH);
            let Some(server) = self.find_server(search) else { continue };
            if over() {
                return;
            }
            let server = server.process;
            log::warn!("the database server was started again, as pid {}", server.pid());
            if !self.send(&server, Signal::TERM, "SIGTERM", RESTARTED_TERM) && !over() {
                self.send(&server, Signal::KILL, "SIGKILL", RESTARTED_TERM);
            }
        }
    }

    /// The server, if it runs and uses this mount; says so in the log where it does not.
    fn server(&self) -> Option<Server> {
        let server = self.find_server(true);
        if server.is_none() {
            log::warn!("the fence found no database server on this mount");
        }
        server
    }

    /// `search`: among all processes too, which takes a while on a machine with many.
    fn find_server(&self, search: bool) -> Option<Server> {
        let by_socket = self.config.socket.as_ref().map(|path| {
            let found = Process::listening_on(path);
            ("fence.socket", path, found, true)
        });
        let by_pid_file = self.config.pid_file.as_ref().map(|path| {
            let found = Process::named_by(path);
            ("fence.pid_file", path, found, false)
        });
        for (key, path, found, by_socket) in [by_socket, by_pid_file].into_iter().flatten() {
            match found {
                Ok(process) if self.is_ours(&process) => {
                    return Some(Server { process, by_socket });
                }
                Ok(process) => log::info!(
                    "{key} {} leads to {} (pid {}), which does not use this mount: left alone",
                    path.display(),
                    users::name_of(process.pid()),
                    process.pid()
                ),
                Err(error) => log::debug!("{key} {}: {error}", path.display()),
            }
        }
        if search && self.config.search { self.search() } else { None }
    }

    /// Among those that use the mount: the one that its pid namespace has under the pid file's
    /// number, else one that is called as a server is.
    fn search(&self) -> Option<Server> {
        let inside = self.config.pid_file.as_deref().and_then(|path| process::number_in(path).ok());
        let users = users::of(self.device);
        let in_namespace = |user: &&users::User| {
            inside.is_some_and(|inside| process::inner_number(user.pid) == Some(inside))
        };
        let in_namespace = users.iter().find(in_namespace);
        let named = || users.iter().find(|user| SERVERS.contains(&user.name.as_str()));
        let found = in_namespace.or_else(named)?;
        log::warn!(
            "neither fence.socket nor fence.pid_file leads to {} (pid {}), which uses this mount",
            found.name,
            found.pid
        );
        let process = Process::open(found.pid).ok()?;
        self.is_ours(&process).then_some(Server { process, by_socket: false })
    }

    /// Whether the process uses this mount. What was read under its number was its own if it is
    /// still alive afterwards.
    fn is_ours(&self, process: &Process) -> bool {
        users::usage(process.pid(), self.device).is_some() && process.is_alive()
    }

    fn stop(&self, server: &Server, start: Instant) -> Outcome {
        let at =
            |percent: u32| (self.config.timeout * percent / 100).saturating_sub(start.elapsed());
        // A socket that leads to another server would have that one shut down.
        let asked = server.by_socket && self.ask(&server.process, at(ASK_UNTIL));
        let server = &server.process;
        if asked {
            if server.wait(at(SHUTDOWN_UNTIL)) {
                return Outcome::Stopped("SHUTDOWN");
            }
            self.step(
                "SHUTDOWN",
                server,
                Err("the server has not ended in its share of time".into()),
            );
        } else if !server.is_alive() {
            return Outcome::Stopped("SHUTDOWN");
        }
        if self.send(server, Signal::TERM, "SIGTERM", at(TERM_UNTIL)) {
            return Outcome::Stopped("SIGTERM");
        }
        if self.send(server, Signal::KILL, "SIGKILL", at(100).max(KILL_AT_LEAST)) {
            return Outcome::Stopped("SIGKILL");
        }
        Outcome::Survived
    }

    /// The polite stop; true when the server has taken the request.
    fn ask(&self, server: &Process, limit: Duration) -> bool {
        let Some(socket) = self.config.socket.clone() else { return false };
        let account = match self.config.option_file.as_deref().map(server::Account::read) {
            Some(Ok(account)) => account,
            Some(Err(error)) => {
                self.step("connect", server, Err(error.to_string()));
                return false;
            }
            None => server::Account::default(),
        };
        let (told, heard) = mpsc::channel();
        let request = Request { pid: server.pid(), socket, account, limit };
        let spawned = std::thread::Builder::new().name("fence-ask".into()).spawn(move || {
            if told.send(request.run()).is_err() {
                log::debug!("the database server answered after its share of time");
            }
        });
        if let Err(error) = spawned {
            self.step("connect", server, Err(error.to_string()));
            return false;
        }
        match heard.recv_timeout(limit) {
            Ok(taken) => taken,
            Err(_) => {
                self.step("SHUTDOWN", server, Err("the server does not answer".into()));
                false
            }
        }
    }

    /// Signals, and waits for the end; true when the process has ended.
    fn send(&self, server: &Process, signal: Signal, name: &'static str, limit: Duration) -> bool {
        let sent = server.signal(signal).map_err(|error| error.to_string());
        self.step(name, server, sent);
        server.wait(limit)
    }

    fn step(&self, name: &'static str, server: &Process, result: Result<(), String>) {
        report_step(name, server.pid(), result);
    }
}

/// What the thread of the polite stop works with: it may be left behind.
struct Request {
    pid: i32,
    socket: PathBuf,
    account: server::Account,
    limit: Duration,
}

impl Request {
    fn run(self) -> bool {
        let done = |name, result| report_step(name, self.pid, result);
        match server::shut_down(&self.socket, &self.account, self.limit, done) {
            Ok(()) => true,
            Err(error) => {
                report_step("SHUTDOWN", self.pid, Err(error.to_string()));
                false
            }
        }
    }
}

fn report_step(name: &'static str, pid: i32, result: Result<(), String>) {
    let event = Event::new(Name::FenceStep).with("step", name).with("pid", pid);
    emit(match result {
        Ok(()) => event.status(Status::Succeeded),
        Err(error) => event.status(Status::Failed).with("error", error),
    });
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
