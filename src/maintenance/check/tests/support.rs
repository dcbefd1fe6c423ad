//! A small volume in a scratch directory, unmounted, with something of everything in it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::backing::linux::LinuxBacking;
use crate::backing::{Backing, XattrMode};
use crate::crypto::secret::Secret;
use crate::error::Result;
use crate::key::envelope::{Canary, Envelope};
use crate::key::gate::{BootTime, Gate, Keyring};
use crate::key::provider::Algorithm;
use crate::maintenance::check::{Check, Finding, Options, Repair, Report, Severity, Summary};
use crate::store::{FormatOptions, Store};
use crate::sync::Mutex;
use crate::vfs::types::ROOT;
use crate::vfs::{AuditSink, Caller, Filesystem, FilesystemOptions, IntegrityEvent, WriteRequest};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const SECTOR: u64 = 512;
pub(crate) const GROUP: u64 = 121 * PAGE;
/// Of [`Volume::big`]: more than two groups.
pub(crate) const BLOCKS: u64 = 300;
pub(crate) const SIZE: u64 = BLOCKS * PAGE - 1000;

/// docs/FORMAT.md: two header pages, a generation page, then groups of a tag page and 120 blocks.
pub(crate) fn tag_page(group: u64) -> u64 {
    3 * PAGE + group * GROUP
}

pub(crate) fn block(index: u64) -> u64 {
    tag_page(index / 120) + PAGE + index % 120 * PAGE
}

const ME: Caller = Caller { uid: 0, gid: 0, pid: 1 };

#[derive(Debug)]
struct Nobody;

impl AuditSink for Nobody {
    fn integrity_failure(&self, _: &IntegrityEvent) {}
}

pub(crate) fn keyring(byte: u8) -> Keyring {
    Keyring::new(1, Secret::new_with(|key| key.fill(byte)).unwrap())
}

pub(crate) const KEY: u8 = 3;

pub(crate) fn open_gate(byte: u8) -> Arc<Gate> {
    let gate = Gate::new();
    assert!(gate.open(keyring(byte), BootTime::now() + Duration::from_secs(3600)));
    gate
}

/// One that nobody could unwrap, but a check can read.
pub(crate) fn put_envelope(backing: &dyn Backing) {
    let envelope = Envelope {
        volume: Store::inspect(backing).unwrap().uuid,
        provider: "azure".into(),
        kid: "k/1".into(),
        algorithm: Algorithm::RsaOaep256,
        follow_versions: false,
        volume_key_id: 1,
        wrapped_volume_key: vec![1],
        fingerprint: [1; 32],
        retiring: None,
        canary: Canary { wrapped: vec![1], sha256: [1; 32] },
        created: "2026-03-01T00:00:00Z".into(),
        earlier: Vec::new(),
    };
    envelope.save(&backing.root()).unwrap();
}

#[derive(Default)]
pub(crate) struct Collected(Mutex<Vec<Finding>>, Mutex<Vec<String>>);

impl Report for Collected {
    fn finding(&self, finding: &Finding) -> Result<()> {
        self.0.lock().push(finding.clone());
        Ok(())
    }

    fn trouble(&self, message: &str) {
        self.1.lock().push(message.to_owned());
    }
}

pub(crate) struct Checked {
    pub findings: Vec<Finding>,
    pub troubles: Vec<String>,
    pub summary: Summary,
}

impl Checked {
    pub(crate) fn codes(&self) -> Vec<&'static str> {
        self.findings.iter().map(|finding| finding.code.name()).collect()
    }

    /// Those that are no notes.
    pub(crate) fn serious(&self) -> Vec<&Finding> {
        self.findings.iter().filter(|finding| finding.severity > Severity::Note).collect()
    }
}

/// `key` None for a check without one.
pub(crate) fn check_backing(
    backing: Arc<dyn Backing>,
    key: Option<u8>,
    repair: Repair,
) -> Result<Checked> {
    let collected = Collected::default();
    let options = Options { repair, threads: 2, progress: false };
    let summary = Check::new(backing, options)?.run(key.map(open_gate), &collected)?;
    let mut findings = collected.0.into_inner();
    findings.sort_by_key(|finding| (finding.backing_path.clone(), finding.at));
    Ok(Checked { findings, troubles: collected.1.into_inner(), summary })
}

/// Names of what is in it, and where that is on the disk.
pub(crate) struct Volume {
    dir: tempfile::TempDir,
    pub big: PathBuf,
    pub small: PathBuf,
    pub directory: PathBuf,
    pub inner: PathBuf,
    pub long: PathBuf,
    pub side: PathBuf,
    pub link: PathBuf,
    pub long_link: PathBuf,
    pub target: PathBuf,
}

pub(crate) fn pattern(len: u64, seed: u64) -> Vec<u8> {
    (0..len).map(|at| (at / PAGE * 31 + at + seed) as u8 | 1).collect()
}

fn listed(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

impl Volume {
    /// Closed, as an unmount leaves it.
    pub(crate) fn new() -> Volume {
        Volume::with(true, |_| {})
    }

    /// As a killed daemon leaves it, after `last`.
    pub(crate) fn killed(last: impl FnOnce(&Filesystem)) -> Volume {
        Volume::with(false, last)
    }

    fn with(close: bool, last: impl FnOnce(&Filesystem)) -> Volume {
        let dir = tempfile::tempdir().unwrap();
        let backing: Arc<dyn Backing> = LinuxBacking::open(dir.path()).unwrap();
        let options = FormatOptions { log_size: Some(8 << 20), ..FormatOptions::default() };
        Store::format(&*backing, &keyring(KEY), options).unwrap();
        put_envelope(&*backing);
        let gate = open_gate(KEY);
        let store = Store::open(backing.clone(), gate.clone(), false).unwrap();
        store.start_session(&keyring(KEY)).unwrap();
        store.recover().unwrap();
        let fs = Filesystem::new(
            store.clone(),
            backing,
            gate,
            Arc::new(Nobody),
            FilesystemOptions::default(),
        );
        let tree = dir.path().join("tree");
        let made = |parent: &Path, make: &mut dyn FnMut()| {
            let before = listed(parent);
            make();
            let new: Vec<_> =
                listed(parent).into_iter().filter(|path| !before.contains(path)).collect();
            new
        };
        let one = |parent: &Path, make: &mut dyn FnMut()| {
            let new = made(parent, make);
            assert_eq!(new.len(), 1);
            new[0].clone()
        };
        let write = |parent: u64, name: &str, data: &[u8]| {
            let created = fs.create(ME, parent, name.as_bytes(), 0o644, 0).unwrap();
            for (i, data) in data.chunks(1 << 20).enumerate() {
                write_at(&fs, created.handle, (i as u64) << 20, data);
            }
            fs.release(created.handle);
            created.entry.node
        };
        let big = one(&tree, &mut || {
            write(ROOT, "big", &pattern(SIZE, 1));
        });
        let small = one(&tree, &mut || {
            let node = write(ROOT, "small", b"text");
            fs.setxattr(node, b"user.a", b"value", XattrMode::Create, false).unwrap();
        });
        let mut dir_node = 0;
        let directory = one(&tree, &mut || {
            dir_node = fs.mkdir(ME, ROOT, b"dir", 0o755, 0).unwrap().node;
        });
        let inner = one(&directory, &mut || {
            write(dir_node, "inner", b"inner");
        });
        let pair = made(&tree, &mut || {
            write(ROOT, &"n".repeat(200), b"long");
        });
        let is_side =
            |path: &&PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("%N");
        let side = pair.iter().find(is_side).unwrap().clone();
        let long = pair.iter().find(|path| !is_side(path)).unwrap().clone();
        let link = one(&tree, &mut || {
            fs.symlink(ME, ROOT, b"link", b"dir/inner").unwrap();
        });
        let long_link = one(&tree, &mut || {
            fs.symlink(ME, ROOT, b"long-link", "t/".repeat(500).as_bytes()).unwrap();
        });
        let target = listed(&dir.path().join("links")).remove(0);
        if close {
            store.close().unwrap();
        } else {
            store.checkpoint().unwrap();
            last(&fs);
        }
        let volume =
            Volume { dir, big, small, directory, inner, long, side, link, long_link, target };
        drop((fs, store));
        volume
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn backing(&self) -> Arc<dyn Backing> {
        LinuxBacking::open_noatime(self.dir.path()).unwrap()
    }

    /// Mounted as it were, `work`ed on and closed.
    pub(crate) fn opened(&self, work: impl FnOnce(&Arc<Store>)) {
        let store = Store::open(self.backing(), open_gate(KEY), false).unwrap();
        store.start_session(&keyring(KEY)).unwrap();
        store.recover().unwrap();
        work(&store);
        store.close().unwrap();
    }

    pub(crate) fn check(&self) -> Checked {
        check_backing(self.backing(), Some(KEY), Repair::No).unwrap()
    }

    pub(crate) fn check_without_key(&self) -> Checked {
        check_backing(self.backing(), None, Repair::No).unwrap()
    }

    pub(crate) fn repair(&self, repair: Repair) -> Checked {
        check_backing(self.backing(), Some(KEY), repair).unwrap()
    }

    /// Everything there is, with times but the access times of links, which no flag of the kernel
    /// keeps. Not the blocks of files: the kernel still moves those when it writes them out.
    pub(crate) fn fingerprint(&self) -> String {
        let mut lines = Vec::new();
        fingerprint(self.dir.path(), &mut lines);
        lines.sort();
        lines.join("\n")
    }
}

fn fingerprint(path: &Path, lines: &mut Vec<String>) {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::symlink_metadata(path).unwrap();
    let mut line = format!(
        "{} {:o} {} {} {}.{} {}.{}",
        path.display(),
        meta.mode(),
        meta.size(),
        meta.nlink(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec(),
    );
    if meta.is_symlink() {
        line += &format!(" {:?}", fs::read_link(path).unwrap());
    } else {
        line += &format!(" {}.{}", meta.atime(), meta.atime_nsec());
    }
    if meta.is_file() {
        // Without moving the time of access.
        let file = rustix::fs::open(
            path,
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NOATIME,
            rustix::fs::Mode::empty(),
        );
        let file = File::from(file.unwrap());
        let mut bytes = vec![0; meta.size() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let digest = ring::digest::digest(&ring::digest::SHA256, &bytes);
        line += &format!(" {digest:?}");
    }
    lines.push(line);
    if meta.is_dir() {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NOATIME;
        let dir = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap();
        let names: Vec<_> = rustix::fs::Dir::read_from(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name != "." && name != "..")
            .collect();
        names.iter().for_each(|name| fingerprint(&path.join(name), lines));
    }
}

pub(crate) fn with_filesystem(store: &Arc<Store>, work: impl FnOnce(&Filesystem)) {
    let (backing, gate) = (store.backing().clone(), store.gate().clone());
    let options = FilesystemOptions::default();
    work(&Filesystem::new(store.clone(), backing, gate, Arc::new(Nobody), options));
}

pub(crate) fn write_at(fs: &Filesystem, handle: u64, offset: u64, data: &[u8]) {
    let request = WriteRequest { offset, data, flags: 0, from_cache: false, drop_set_id: false };
    fs.write(handle, &request).unwrap();
}

/// Opens a file of the root by its name.
pub(crate) fn open(fs: &Filesystem, name: &str) -> u64 {
    let node = fs.lookup(ROOT, name.as_bytes()).unwrap().node;
    fs.open(node, libc::O_RDWR as u32, false).unwrap()
}

pub(crate) fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

pub(crate) fn put(path: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

pub(crate) fn get(path: &Path, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}
