//! A process held by its pidfd: a signal or a wait can never reach a later process that was given
//! the same number.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::sys;

#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Process {
    pub fn open(pid: i32) -> io::Result<Process> {
        let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Process { pid, pidfd: pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// The process that listens on a unix socket. Never waits: a server that does not accept
    /// with a full backlog is `WouldBlock`.
    pub fn listening_on(path: &Path) -> io::Result<Process> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        let cred = sockopt::socket_peercred(&socket)?;
        match sys::peer::peer_pidfd(&socket) {
            Ok(pidfd) => Ok(Process { pid: cred.pid, pidfd }),
            // Before Linux 6.5.
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                Ok(Process { pid: cred.pid, pidfd: pidfd_open(cred.pid, PidfdFlags::empty())? })
            }
            Err(error) => Err(error),
        }
    }

    /// The process that a pid file names, whoever that is by now.
    pub fn named_by(pid_file: &Path) -> io::Result<Process> {
        Process::open(number_in(pid_file)?)
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    pub fn is_alive(&self) -> bool {
        !self.wait(Duration::ZERO)
    }

    /// Waits for the process to end; true when it has.
    pub fn wait(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 });
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(Errno::INTR) => {}
                Err(error) => {
                    log::error!("cannot wait for process {}: {error}", self.pid());
                    return false;
                }
            }
        }
    }

    /// A process that has already ended is no error.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The number in a pid file, as whoever wrote it counts processes.
pub fn number_in(pid_file: &Path) -> io::Result<i32> {
    let text = std::fs::read_to_string(pid_file)?;
    text.trim()
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the pid file holds no process id"))
}

/// The number of a process in its own pid namespace; None where that is this process's namespace
/// too, or cannot be told.
pub fn inner_number(pid: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    let mut numbers = numbers.split_whitespace();
    // The first is ours.
    numbers.next()?;
    numbers.next_back()?.parse().ok()
}

impl AsFd for Process {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl AsRawFd for Process {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.pidfd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    #[test]
    fn a_listener_is_known_by_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let process = Process::listening_on(&path).unwrap();
        assert_eq!(process.pid(), i32::try_from(std::process::id()).unwrap());
        assert!(process.is_alive());
    }

    #[test]
    fn a_process_is_waited_for_and_signalled_once_it_is_gone_without_error() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(!process.wait(Duration::from_millis(20)));
        process.signal(Signal::TERM).unwrap();
        assert!(process.wait(Duration::from_secs(5)));
        child.wait().unwrap();
        process.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn a_pid_file_without_a_pid_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        std::fs::write(&path, "nonsense\n").unwrap();
        assert_eq!(Process::named_by(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
        std::fs::write(&path, "0\n").unwrap();
        assert!(Process::named_by(&path).is_err());
    }
}
