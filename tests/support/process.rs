//! Commands with their results, and processes that the tests started.

use std::fmt;
use std::fs;
use std::process::{Command, Stdio};

/// What a command answered.
pub struct Answer {
    pub command: String,
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Answer {
    pub fn of(command: &mut Command) -> Answer {
        let text = format!("{command:?}");
        let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| {
            panic!("{text}: {error}");
        });
        Answer {
            command: text,
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Standard output of a command that must succeed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self}");
        self.out
    }

    /// Standard error of a command that must fail with `code`, and with a message.
    #[track_caller]
    pub fn fails(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self}");
        assert!(self.err.starts_with("byokfs: "), "an error without its message: {self}");
        assert!(!self.err.contains("panicked"), "{self}");
        self.err
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\n  exit {:?}\n  out: {}\n  err: {}",
            self.command, self.code, self.out, self.err
        )
    }
}

/// Runs a helper that must succeed.
#[track_caller]
pub fn run(program: &str, args: &[&str]) -> String {
    Answer::of(Command::new(program).args(args)).ok()
}

/// True while the process exists and is no zombie.
pub fn alive(pid: i32) -> bool {
    !matches!(state(pid), None | Some('Z' | 'X'))
}

/// As in /proc/PID/stat.
pub fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold any character.
    stat[stat.rfind(')')? + 1..].trim_start().chars().next()
}

pub fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat[stat.rfind(')')? + 1..].split_whitespace().nth(1)?.parse().ok()
}

pub fn name(pid: i32) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_owned())
}

/// Sends a signal to a process that a test started.
pub fn signal(pid: i32, signal: rustix::process::Signal) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, signal);
    }
}
