//! The process that has the vendor's library in it, as its session sees it.
//!
//! A secret that passes a pipe stays behind in the kernel's page of it. After each exchange a blank
//! line of the same length goes each way, into the page that the kernel kept for the pipe's next
//! use; that it is the same one is the kernel's habit, not its promise.

use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::super::{ProviderError, ProviderResult};
use super::wire::{Answer, Request};
use super::{VERB, unexpected};
use crate::key::clock::BootTime;
use crate::sync::Mutex;

/// Longer than any answer.
const LINE_LIMIT: usize = 1024 * 1024;
/// How long a process may take to close its token when it is not needed any more.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How long a killed process may take to be gone.
const KILL_LIMIT: Duration = Duration::from_millis(200);
const STEP: Duration = Duration::from_millis(5);

pub(super) struct Process {
    child: Option<Child>,
    input: Option<ChildStdin>,
    output: ChildStdout,
    received: Vec<u8>,
    deadline: BootTime,
    failed: bool,
    stuck: Arc<Mutex<Option<Child>>>,
}

impl Process {
    /// Starts `program`; all that is asked of it ends at `deadline`.
    pub(super) fn start(
        program: &Path,
        deadline: BootTime,
        stuck: Arc<Mutex<Option<Child>>>,
    ) -> ProviderResult<Process> {
        {
            let mut place = stuck.lock();
            if place.as_mut().is_some_and(|child| !has_ended(child)) {
                let why = "the process of an earlier session hangs in the token's driver";
                return Err(ProviderError::unreachable(why));
            }
            *place = None;
        }
        let cannot = |error: io::Error| {
            ProviderError::unreachable(format!("cannot start {}: {error}", program.display()))
        };
        let mut child = Command::new(program)
            .arg(VERB)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(cannot)?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let (Some(input), Some(output)) = (input, output) else {
            return Err(cannot(io::Error::other("it has no pipes")));
        };
        let received = Vec::new();
        let (child, input) = (Some(child), Some(input));
        Ok(Process { child, input, output, received, deadline, failed: false, stuck })
    }

    /// The answer to `request`, or why there is none.
    pub(super) fn ask(&mut self, request: &Request) -> ProviderResult<Answer> {
        let answer = self.exchange(request);
        match answer {
            Ok(Answer::Failed(failure)) => Err(failure.into()),
            Ok(answer) => Ok(answer),
            Err(error) => {
                self.failed = true;
                Err(error)
            }
        }
    }

    /// Whether it cannot be asked any more.
    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    fn exchange(&mut self, request: &Request) -> ProviderResult<Answer> {
        let mut line = serde_json::to_vec(request).map_err(|_| unexpected())?;
        line.push(b'\n');
        self.write(&line)?;
        let received = self.read_line()?;
        let answer = serde_json::from_slice(&received).map_err(|_| unexpected())?;
        let mut blank = vec![b' '; line.len().max(received.len() + 1) - 1];
        blank.push(b'\n');
        self.write(&blank)?;
        self.read_line()?;
        Ok(answer)
    }

    /// Never blocks: a pipe that was emptied takes a whole line.
    fn write(&mut self, line: &[u8]) -> ProviderResult<()> {
        match self.input.as_mut().map(|input| input.write_all(line)) {
            Some(Ok(())) => Ok(()),
            _ => Err(self.gone()),
        }
    }

    fn read_line(&mut self) -> ProviderResult<Vec<u8>> {
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let rest = self.received.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.received, rest);
                line.pop();
                return Ok(line);
            }
            if self.received.len() > LINE_LIMIT {
                return Err(unexpected());
            }
            self.wait()?;
            let held = self.received.len();
            self.received.resize(held + 4096, 0);
            let place = self.received.get_mut(held..).unwrap_or_default();
            let count = self.output.read(place);
            self.received.truncate(held + count.as_ref().map_or(0, |&count| count));
            match count {
                Ok(0) | Err(_) => return Err(self.gone()),
                Ok(_) => {}
            }
        }
    }

    /// Until there is something to read, or the deadline.
    fn wait(&self) -> ProviderResult<()> {
        loop {
            let left = self.deadline.remaining();
            if left.is_zero() {
                return Err(ProviderError::unreachable("the token does not answer in time"));
            }
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(&self.output, PollFlags::IN)], timeout.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(ProviderError::unreachable(error.to_string())),
            }
        }
    }

    /// The library ended its process, by a crash or on purpose.
    fn gone(&mut self) -> ProviderError {
        let child = self.child.as_mut();
        let ended = child.and_then(|child| wait_for(child, KILL_LIMIT));
        let how = ended.map_or("it hung up".to_owned(), |status| status.to_string());
        ProviderError::unreachable(format!("the PKCS#11 module ended its process: {how}"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Its sign to log out and end.
        self.input = None;
        let Some(mut child) = self.child.take() else { return };
        if !self.failed && wait_for(&mut child, END_LIMIT).is_some() {
            return;
        }
        if let Err(error) = child.kill() {
            log::debug!("the token's process: {error}");
        }
        if wait_for(&mut child, KILL_LIMIT).is_none() {
            *self.stuck.lock() = Some(child);
        }
    }
}

fn has_ended(child: &mut Child) -> bool {
    !matches!(child.try_wait(), Ok(None))
}

fn wait_for(child: &mut Child, limit: Duration) -> Option<std::process::ExitStatus> {
    let end = BootTime::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if !end.remaining().is_zero() => thread::sleep(STEP),
            Ok(None) | Err(_) => return None,
        }
    }
}
