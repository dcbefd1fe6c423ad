//! Who uses a mount: processes with a working directory, an open file or a mapping on it.
//!
//! Nothing here sends a request to the file system it asks about, so the daemon may look at its
//! own mount, cut off or not: descriptors are compared by device number from `statx(2)` with
//! AT_STATX_DONT_SYNC, which FUSE answers from what the kernel knows, and mappings from
//! `/proc/PID/maps`.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::mountinfo::Device;

/// A process that uses the mount, and by what.
#[derive(Clone, Debug, PartialEq)]
pub struct User {
    pub pid: i32,
    pub name: String,
    /// "working directory", "root directory", "program", "open file" or "mapping".
    pub by: &'static str,
}

/// All of them, by process id; this process is left out. A process that ends meanwhile is skipped.
pub fn of(device: Device) -> Vec<User> {
    let own = std::process::id();
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let mut users: Vec<User> = processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| u32::try_from(*pid).is_ok_and(|pid| pid != own))
        .filter_map(|pid| Some(User { pid, name: name_of(pid), by: usage(pid, device)? }))
        .collect();
    users.sort_by_key(|user| user.pid);
    users
}

/// By what the process uses the mount; None when it does not, or cannot be looked at.
pub fn usage(pid: i32, device: Device) -> Option<&'static str> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    for (link, by) in [("cwd", "working directory"), ("root", "root directory"), ("exe", "program")]
    {
        if is_on(&process.join(link), device) {
            return Some(by);
        }
    }
    if let Ok(descriptors) = fs::read_dir(process.join("fd"))
        && descriptors.flatten().any(|entry| is_on(&entry.path(), device))
    {
        return Some("open file");
    }
    let maps = fs::read_to_string(process.join("maps")).unwrap_or_default();
    let number = format!("{:02x}:{:02x}", device.major, device.minor);
    maps.lines().any(|line| line.split(' ').nth(3) == Some(&number)).then_some("mapping")
}

/// The process's short name, for messages.
pub fn name_of(pid: i32) -> String {
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => name.trim_end().to_owned(),
        Err(_) => "?".to_owned(),
    }
}

/// For messages: `mariadbd (pid 12, open file), bash (pid 13, working directory)`.
pub fn list(users: &[User]) -> String {
    const SHOWN: usize = 8;
    let mut parts: Vec<String> = users
        .iter()
        .take(SHOWN)
        .map(|user| format!("{} (pid {}, {})", user.name, user.pid, user.by))
        .collect();
    if users.len() > SHOWN {
        parts.push(format!("and {} more", users.len() - SHOWN));
    }
    parts.join(", ")
}

/// Whether what a link under /proc leads to lies on the device. The link is followed by the
/// kernel itself, without a lookup.
fn is_on(link: &Path, device: Device) -> bool {
    statx(CWD, link, AtFlags::STATX_DONT_SYNC, StatxFlags::empty())
        .is_ok_and(|stat| stat.stx_dev_major == device.major && stat.stx_dev_minor == device.minor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::process::{Command, Stdio};

    fn device_of(path: &Path) -> Device {
        let dev = fs::metadata(path).unwrap().dev();
        Device { major: rustix::fs::major(dev), minor: rustix::fs::minor(dev) }
    }

    #[test]
    fn finds_a_working_directory_and_an_open_file() {
        let proc_device = device_of(Path::new("/proc/self"));
        let mut sleeper = Command::new("sleep").arg("60").current_dir("/proc").spawn().unwrap();
        let pid = i32::try_from(sleeper.id()).unwrap();
        assert_eq!(usage(pid, proc_device), Some("working directory"));
        assert!(of(proc_device).iter().any(|user| user.pid == pid && user.name == "sleep"));
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();

        let open = fs::File::open("/proc/meminfo").unwrap();
        let mut sleeper = Command::new("sleep")
            .arg("60")
            .current_dir("/")
            .stdin(Stdio::from(open))
            .spawn()
            .unwrap();
        let pid = i32::try_from(sleeper.id()).unwrap();
        assert_eq!(usage(pid, proc_device), Some("open file"));
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert_eq!(usage(pid, proc_device), None);
    }

    #[test]
    fn finds_a_mapping() {
        let exe = std::env::current_exe().unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(usage(own, device_of(&exe)).is_some());
    }
}
