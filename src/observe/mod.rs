//! What byokfs tells its operator: the log for people, the audit trail for programs.

pub mod audit;
pub mod log;
mod writer;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use writer::Torn;

const LOOKS: u32 = 20;
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// To append to, created with mode 0600. A pipe that nobody reads is an error, not a wait.
pub fn append_to(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

/// Of a file at `path` that is appended to. Another process may have been killed, or have filled
/// the disk, in the midst of a line; of a pipe nobody can tell.
fn ends_within_a_line(path: &Path) -> Torn {
    let regular = std::fs::metadata(path).is_ok_and(|meta| meta.is_file());
    let file = if regular { File::open(path).ok() } else { None };
    let within = move || {
        let last = file.as_ref().and_then(|file| {
            let end = file.metadata().ok()?.len().checked_sub(1)?;
            let mut byte = [0];
            file.read_exact_at(&mut byte, end).ok()?;
            Some(byte)
        });
        last.is_some_and(|byte| byte != *b"\n")
    };
    // The kernel shows the pages of a line that is being written one by one; such a line has its end
    // in a moment, and an empty line after it would be none of the trail's.
    Box::new(move || {
        (0..LOOKS).all(|look| {
            if look > 0 {
                std::thread::sleep(LOOK_AGAIN);
            }
            within()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_line_after_one_that_another_process_left_torn_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let started = || {
            let (file, found_torn) = (append_to(&path).unwrap(), ends_within_a_line(&path));
            writer::Lines::start("test-lines", file, found_torn, Box::new(|_| ())).unwrap()
        };
        let mut other = append_to(&path).unwrap();
        let lines = started();
        for line in ["1\n", "2\n"] {
            lines.clone().write_all(line.as_bytes()).unwrap();
        }
        other.write_all(b"to").unwrap();
        started().write_all(b"3\n").unwrap();
        other.write_all(b"to").unwrap();
        lines.clone().write_all(b"4\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n2\nto\n3\nto\n4\n");
    }
}
