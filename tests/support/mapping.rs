//! Shared mappings, for tests that touch one whose file may answer errors.
//!
//! The only unsafe code of the tests. A mapping that may fault is read in a child process: see
//! [`in_child`].
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

pub struct Mapping {
    at: *mut std::ffi::c_void,
    len: usize,
}

impl Mapping {
    /// Shared, readable and writable.
    pub fn new(file: &File, len: usize) -> std::io::Result<Mapping> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
        let at = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, file, 0) }?;
        Ok(Mapping { at, len })
    }

    pub fn get(&self, index: usize) -> u8 {
        assert!(index < self.len);
        // SAFETY: inside the mapping; volatile, since the file's other users change it.
        unsafe { self.at.cast::<u8>().add(index).read_volatile() }
    }

    pub fn set(&mut self, index: usize, value: u8) {
        assert!(index < self.len);
        // SAFETY: inside the mapping, which is writable.
        unsafe { self.at.cast::<u8>().add(index).write_volatile(value) }
    }

    pub fn sync(&self) -> std::io::Result<()> {
        // SAFETY: exactly the mapping.
        unsafe { msync(self.at, self.len, MsyncFlags::SYNC) }.map_err(Into::into)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping; no reference into it is ever handed out.
        let _ = unsafe { munmap(self.at, self.len) };
    }
}

/// A child that maps a file and reads a byte of each page when told; what it reads it says.
pub struct Reader {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

/// What touching every page came to.
#[derive(Debug, PartialEq)]
pub enum Touch {
    Bytes(Vec<u8>),
    Signal(i32),
}

const CHILD_OF: &str = "BYOKFS_E2E_MAPPING";

impl Reader {
    /// Starts it and waits until it has mapped, and read, every page once.
    pub fn start(file: &Path) -> Reader {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "--quiet", "support::mapping::child"])
            .env(CHILD_OF, file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut reader = Reader { child, lines };
        assert!(matches!(reader.touch(), Touch::Bytes(_)));
        reader
    }

    pub fn touch(&mut self) -> Touch {
        let stdin = self.child.stdin.as_mut().unwrap();
        // A child that is gone has left its exit status.
        let _ = writeln!(stdin, "touch");
        let mut line = String::new();
        loop {
            line.clear();
            if self.lines.read_line(&mut line).unwrap() == 0 {
                let status = self.child.wait().unwrap();
                return Touch::Signal(status.signal().unwrap_or(0));
            }
            // The test runner talks on the same standard output.
            if let Some(bytes) = line.trim().strip_prefix("bytes ") {
                return Touch::Bytes(bytes.split(' ').map(|byte| byte.parse().unwrap()).collect());
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test: what [`Reader`] runs in a process of its own.
#[test]
fn child() {
    let Some(path) = std::env::var_os(CHILD_OF) else { return };
    let file = File::options().read(true).write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len() as usize;
    let mapping = Mapping::new(&file, len).unwrap();
    for line in std::io::stdin().lines() {
        line.unwrap();
        let bytes: Vec<String> =
            (0..len).step_by(4096).map(|at| mapping.get(at).to_string()).collect();
        println!("bytes {}", bytes.join(" "));
    }
}
