//! The control socket: one request and one answer per line of JSON, for root alone.
//!
//! Each mount has a socket and a description beside it in `run.dir`, both named after the mount
//! point, so that a client finds them without touching the mount.

use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::hex;
use super::report::Failure;
use crate::error::{Context, Error, Kind, Result};
use crate::sys;

/// A request is one line.
const MAX_REQUEST: u64 = 64 * 1024;
const READ_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_CLIENTS: usize = 32;
/// From the end of the connection to the end of the process.
const LAST_MOMENTS: Duration = Duration::from_secs(10);

/// A request, `{"verb":"status"}`; some have further fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Verb {
    Status,
    /// Check the key now, as the watcher would.
    Probe,
    Revalidate {
        /// The key version of an envelope that was restored from an older copy.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        accept_key: Option<String>,
    },
    RotateKek {
        /// Absent: the current version of the same key.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        to: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        algorithm: Option<String>,
        /// The volume is a copy that gets a key of its own.
        #[serde(default)]
        rekey: bool,
    },
    RotateDek {
        /// Backing inodes of files and directories; absent: everything, or what is unfinished.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        inodes: Option<Vec<u64>>,
        /// Bytes a second, 0 for as many as go; absent: as before, or the default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rate: Option<u64>,
    },
    PauseRotation,
    ForgetKey {
        kid: String,
        #[serde(default)]
        no_copies: bool,
    },
    Sync,
    Umount,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Response {
    Ok(Value),
    Error(Failure),
}

/// What a client finds a mount's daemon by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    pub back: PathBuf,
    pub mnt: PathBuf,
    pub pid: u32,
}

/// The files of one mount in the run directory.
struct Place {
    socket: PathBuf,
    description: PathBuf,
}

impl Place {
    fn of(run_dir: &Path, mnt: &Path) -> Place {
        // A path can be longer than the name of a socket.
        let digest =
            ring::digest::digest(&ring::digest::SHA256, mnt.as_os_str().as_encoded_bytes());
        let name = hex::encode(&digest.as_ref()[..8]);
        Place {
            socket: run_dir.join(format!("{name}.sock")),
            description: run_dir.join(format!("{name}.json")),
        }
    }
}

/// A bound socket; dropping it removes its files.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    run_dir: PathBuf,
    mnt: PathBuf,
    pid: u32,
}

impl Server {
    pub fn bind(run_dir: &Path, description: &Description) -> Result<Server> {
        let failed = || format!("cannot make a control socket in {}", run_dir.display());
        DirBuilder::new().recursive(true).mode(0o700).create(run_dir).context(failed)?;
        fs::set_permissions(run_dir, Permissions::from_mode(0o700)).context(failed)?;
        let place = Place::of(run_dir, &description.mnt);
        let text = serde_json::to_vec(description)
            .map_err(|error| Error::new(Kind::Io, failed()).with_source(error))?;
        let temporary = place.description.with_extension("new");
        remove(&temporary);
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| fs::rename(&temporary, &place.description))
            .context(failed)?;
        // After the description, by which a daemon that ends now sees that they are not its own.
        // What is there is of one that was killed together with its guard, or whose mount is detached.
        remove(&place.socket);
        let listener = UnixListener::bind(&place.socket)
            .and_then(|listener| {
                fs::set_permissions(&place.socket, Permissions::from_mode(0o600))?;
                Ok(listener)
            })
            .inspect_err(|_| forget(run_dir, &description.mnt, description.pid))
            .context(failed)?;
        let Description { mnt, pid, .. } = description.clone();
        Ok(Server { listener, run_dir: run_dir.to_owned(), mnt, pid })
    }

    /// Answers requests until the process ends, each client on a thread of its own.
    pub fn serve(
        &self,
        answer: impl Fn(Verb) -> Result<Value> + Send + Sync + 'static,
    ) -> Result<()> {
        let listener =
            self.listener.try_clone().context(|| "cannot share the control socket".to_owned())?;
        let answer = Arc::new(answer);
        let clients = Arc::new(AtomicUsize::new(0));
        let accept = move || {
            for stream in listener.incoming() {
                let stream = match stream {
                    Ok(stream) => stream,
                    Err(error) => {
                        log::warn!("control socket: {error}");
                        // Out of descriptors, most likely: not in a tight loop.
                        std::thread::sleep(Duration::from_millis(100));
                        continue;
                    }
                };
                let seat = Seat::take(&clients);
                let answer = Arc::clone(&answer);
                let spawned = std::thread::Builder::new().name("control".into()).spawn(move || {
                    let Some(_seat) = seat else {
                        return log::warn!("control socket: too many clients");
                    };
                    if let Err(error) = converse(&stream, &*answer) {
                        log::debug!("control socket: {error}");
                    }
                });
                if let Err(error) = spawned {
                    log::warn!("control socket: {error}");
                }
            }
        };
        std::thread::Builder::new()
            .name("control-accept".into())
            .spawn(accept)
            .map(drop)
            .context(|| "cannot start a thread".to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        forget(&self.run_dir, &self.mnt, self.pid);
    }
}

/// Removes what the daemon `pid` left in the run directory. Another one may serve the same mount point
/// by now: a mount that was detached ends when its last file is closed.
pub fn forget(run_dir: &Path, mnt: &Path, pid: u32) {
    let place = Place::of(run_dir, mnt);
    if read_description(&place.description).is_some_and(|description| description.pid != pid) {
        return;
    }
    remove(&place.socket);
    remove(&place.description);
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::warn!("cannot remove {}: {error}", path.display());
        }
        _ => {}
    }
}

/// One of [`MAX_CLIENTS`].
struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(count: &Arc<AtomicUsize>) -> Option<Seat> {
        let seat = Seat(Arc::clone(count));
        (count.fetch_add(1, Ordering::AcqRel) < MAX_CLIENTS).then_some(seat)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn converse(stream: &UnixStream, answer: &impl Fn(Verb) -> Result<Value>) -> io::Result<()> {
    stream.set_read_timeout(Some(READ_TIMEOUT))?;
    stream.set_write_timeout(Some(READ_TIMEOUT))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.by_ref().take(MAX_REQUEST).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let verb = serde_json::from_str::<Verb>(&line);
        // Who has asked for that waits for the daemon to end, however long that takes.
        let waits = matches!(verb, Ok(Verb::Umount));
        let response = match verb {
            Ok(verb) => match answer(verb) {
                Ok(value) => Response::Ok(value),
                Err(error) => Response::Error((&error).into()),
            },
            Err(error) => {
                let error = Error::usage("not a request").with_source(error);
                Response::Error((&error).into())
            }
        };
        let mut text = serde_json::to_string(&response)?;
        text.push('\n');
        let mut stream = stream;
        stream.write_all(text.as_bytes())?;
        if waits && matches!(response, Response::Ok(_)) {
            stream.set_read_timeout(None)?;
        }
    }
}

/// A client's side.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// The daemon itself; None where the kernel does not tell (before Linux 6.5).
    daemon: Option<OwnedFd>,
}

impl Client {
    /// None when no daemon listens for this mount point.
    pub fn connect(run_dir: &Path, mnt: &Path) -> Result<Option<Client>> {
        let socket = Place::of(run_dir, mnt).socket;
        match UnixStream::connect(&socket) {
            Ok(stream) => {
                let daemon = sys::peer::peer_pidfd(&stream).ok();
                Ok(Some(Client { stream, daemon }))
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(Error::io(format!("cannot connect to {}", socket.display()), error)),
        }
    }

    pub fn call(&mut self, verb: Verb, timeout: Duration) -> Result<Value> {
        let failed = || "the daemon does not answer".to_owned();
        self.stream.set_read_timeout(Some(timeout)).context(failed)?;
        let mut line = serde_json::to_string(&verb)
            .map_err(|error| Error::new(Kind::Io, failed()).with_source(error))?;
        line.push('\n');
        // The daemon would take a part of it for the whole.
        if line.len() as u64 > MAX_REQUEST {
            let message = "that is too much for one request: name directories in the place of \
                           their files";
            return Err(Error::usage(message));
        }
        self.stream.write_all(line.as_bytes()).context(failed)?;
        let mut answer = String::new();
        BufReader::new(&self.stream).read_line(&mut answer).context(failed)?;
        match serde_json::from_str(&answer) {
            Ok(Response::Ok(value)) => Ok(value),
            Ok(Response::Error(failure)) => Err(failure.into()),
            Err(error) => Err(Error::new(Kind::Io, failed()).with_source(error)),
        }
    }

    /// Until the daemon has gone, and with it all that it held: it never closes the connection
    /// before.
    pub fn wait_for_end(&mut self, timeout: Duration) -> Result<()> {
        let failed = || "the daemon has not ended".to_owned();
        self.stream.set_read_timeout(Some(timeout)).context(failed)?;
        let mut rest = [0; 256];
        loop {
            match self.stream.read(&mut rest) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
                Err(error) => return Err(Error::io(failed(), error)),
            }
        }
        // Of its descriptors that of the connection may be the first to be closed, and the volume's
        // lock the last.
        if let Some(daemon) = &self.daemon {
            let limit = Timespec { tv_sec: LAST_MOMENTS.as_secs() as i64, tv_nsec: 0 };
            let ended =
                retry_on_intr(|| poll(&mut [PollFd::new(daemon, PollFlags::IN)], Some(&limit)));
            ended.context(failed)?;
        }
        Ok(())
    }
}

/// Every description in the run directory, stale ones included.
pub fn descriptions(run_dir: &Path) -> Vec<Description> {
    let Ok(entries) = fs::read_dir(run_dir) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "json"))
        .filter_map(|entry| read_description(&entry.path()))
        .collect()
}

fn read_description(path: &Path) -> Option<Description> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn requests_are_answered_and_nonsense_refused() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let mnt = PathBuf::from("/m");
        let description = Description { back: "/b".into(), mnt: mnt.clone(), pid: 1 };
        assert!(Client::connect(&run, &mnt).unwrap().is_none());
        let server = Server::bind(&run, &description).unwrap();
        server
            .serve(|verb| match verb {
                Verb::Status => Ok(json!({"state": "Available"})),
                _ => Err(Error::new(Kind::Busy, "no")),
            })
            .unwrap();
        assert_eq!(descriptions(&run), [description]);
        assert_eq!(fs::metadata(&run).unwrap().permissions().mode() & 0o777, 0o700);
        let socket = Place::of(&run, &mnt).socket;
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);

        let mut client = Client::connect(&run, &mnt).unwrap().unwrap();
        let limit = Duration::from_secs(5);
        assert_eq!(client.call(Verb::Status, limit).unwrap()["state"], "Available");
        let many =
            Verb::RotateDek { inodes: Some((1 << 20..(1 << 20) + 9000).collect()), rate: None };
        let error = client.call(many, limit).unwrap_err();
        assert_eq!(error.kind, Kind::Usage);
        assert!(error.to_string().contains("directories"), "{error}");
        let error = client.call(Verb::Sync, limit).unwrap_err();
        assert_eq!((error.kind, error.to_string()), (Kind::Busy, "no".to_owned()));

        let mut raw = UnixStream::connect(&socket).unwrap();
        raw.write_all(b"{\"verb\":\"format\"}\n").unwrap();
        let mut answer = String::new();
        BufReader::new(&raw).read_line(&mut answer).unwrap();
        assert!(answer.contains("\"kind\":\"Usage\""), "{answer}");

        drop(server);
        assert!(!socket.exists() && descriptions(&run).is_empty());
    }

    /// Of a mount that was detached while files were open, after another one was made in its place.
    #[test]
    fn the_end_of_an_earlier_daemon_takes_nothing_of_a_later_one() {
        let dir = tempfile::tempdir().unwrap();
        let (run, mnt) = (dir.path().join("run"), PathBuf::from("/m"));
        let of = |pid| Description { back: format!("/{pid}").into(), mnt: mnt.clone(), pid };
        let earlier = Server::bind(&run, &of(1)).unwrap();
        let later = Server::bind(&run, &of(2)).unwrap();
        drop(earlier);
        assert_eq!(descriptions(&run), [of(2)]);
        assert!(Client::connect(&run, &mnt).unwrap().is_some());
        drop(later);
        assert!(descriptions(&run).is_empty());
        assert!(Client::connect(&run, &mnt).unwrap().is_none());
    }
}
