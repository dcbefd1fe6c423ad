//! Reading a directory, a buffer of entries at a time.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{self, RawDir, SeekFrom};

use super::node::file_kind;
use crate::backing::{DirEntry, DirStream};

const BUFFER_LEN: usize = 32 * 1024;

#[derive(Debug)]
pub(super) struct LinuxDir {
    fd: OwnedFd,
    buffer: Vec<u8>,
    ready: VecDeque<DirEntry>,
    ended: bool,
}

impl LinuxDir {
    pub(super) fn new(fd: OwnedFd) -> LinuxDir {
        LinuxDir {
            fd,
            buffer: Vec::with_capacity(BUFFER_LEN),
            ready: VecDeque::new(),
            ended: false,
        }
    }

    fn refill(&mut self) -> io::Result<()> {
        let mut entries = RawDir::new(&self.fd, self.buffer.spare_capacity_mut());
        loop {
            let Some(entry) = entries.next() else {
                self.ended = true;
                return Ok(());
            };
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                self.ready.push_back(DirEntry {
                    name: name.to_vec(),
                    ino: entry.ino(),
                    kind: file_kind(entry.file_type()),
                    next: entry.next_entry_cookie(),
                });
            }
            if entries.is_buffer_empty() && !self.ready.is_empty() {
                return Ok(());
            }
        }
    }
}

impl DirStream for LinuxDir {
    fn next_entry(&mut self) -> io::Result<Option<DirEntry>> {
        if self.ready.is_empty() && !self.ended {
            self.refill()?;
        }
        Ok(self.ready.pop_front())
    }

    fn seek(&mut self, position: u64) -> io::Result<()> {
        fs::seek(&self.fd, SeekFrom::Start(position))?;
        self.ready.clear();
        self.ended = false;
        Ok(())
    }
}
