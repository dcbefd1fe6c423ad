//! What the golden volumes hold, and a description of what is found in one.

use std::fmt::Write;
use std::ops::ControlFlow;

use byokfs::backing::{FileKind, SetTime, Timestamp, XattrMode};
use byokfs::store::Store;
use byokfs::vfs::types::ROOT;
use byokfs::vfs::{Caller, DirItem, DirSink, Filesystem, Plus, SetAttr, WriteRequest};

const ME: Caller = Caller { uid: 0, gid: 0, pid: 1 };
const READ_WRITE: u32 = libc::O_RDWR as u32;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u64 * 7 + (i as u64 >> 8) * 13) as u8 ^ seed).collect()
}

fn request(data: &[u8], offset: u64, flags: i32) -> WriteRequest<'_> {
    let flags = flags.cast_unsigned();
    WriteRequest { offset, data, flags, from_cache: false, drop_set_id: false }
}

fn write(fs: &Filesystem, node: u64, data: &[u8], offset: u64, flags: i32) {
    let handle = fs.open(node, READ_WRITE, false).unwrap();
    fs.write(handle, &request(data, offset, flags)).unwrap();
    fs.release(handle);
}

fn file(fs: &Filesystem, dir: u64, name: &[u8], mode: u32) -> u64 {
    let created = fs.create(ME, dir, name, mode, 0).unwrap();
    fs.release(created.handle);
    created.entry.node
}

fn node(fs: &Filesystem, name: &[u8]) -> u64 {
    fs.lookup(ROOT, name).unwrap().node
}

fn settle_time(fs: &Filesystem, node: u64) {
    let time = SetTime::At(Timestamp { sec: 1_700_000_000, nsec: 123_456_789 });
    let change = SetAttr { atime: time, mtime: time, ..SetAttr::default() };
    fs.setattr(node, &change).unwrap();
}

pub(crate) fn fill(fs: &Filesystem) {
    file(fs, ROOT, b"empty", 0o600);
    let small = file(fs, ROOT, b"small", 0o640);
    write(fs, small, b"a few bytes", 0, 0);
    let dir = fs.mkdir(ME, ROOT, b"directory", 0o750, 0).unwrap().node;
    let groups = file(fs, dir, b"three groups", 0o644);
    write(fs, groups, &pattern(20_000, 3), 485_000, 0);
    write(fs, groups, &pattern(80_000, 3), 700_000, 0);
    write(fs, groups, &pattern(10_000, 4), 1 << 20, libc::O_DSYNC);
    // Far apart: two regions, the first without anything in its middle.
    let sparse = file(fs, ROOT, b"sparse", 0o644);
    write(fs, sparse, &pattern(5000, 5), 1000, 0);
    write(fs, sparse, &pattern(5000, 6), 300 << 20, 0);
    let punched = file(fs, ROOT, b"punched", 0o644);
    write(fs, punched, &pattern(40_000, 7), 0, 0);
    let handle = fs.open(punched, READ_WRITE, false).unwrap();
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    fs.fallocate(ME, handle, 5000, 10_000, punch.cast_unsigned()).unwrap();
    fs.release(handle);
    let cut = file(fs, ROOT, b"cut", 0o644);
    write(fs, cut, &pattern(20_000, 8), 0, 0);
    fs.setattr(cut, &SetAttr { size: Some(12_345), ..SetAttr::default() }).unwrap();

    let long = [b"a name of two hundred and fifty bytes ".as_slice(), &[b'n'; 212]].concat();
    let long = file(fs, dir, &long, 0o644);
    write(fs, long, b"under a long name", 0, 0);
    file(fs, ROOT, "Öl, 油 and ' quotes".as_bytes(), 0o644);
    fs.link(groups, ROOT, b"hard link").unwrap();
    fs.symlink(ME, ROOT, b"link", b"directory/three groups").unwrap();
    fs.symlink(ME, ROOT, b"long link", &[b't'; 3000]).unwrap();
    fs.mknod(ME, ROOT, b"fifo", FileKind::Fifo, 0o600, 0, 0).unwrap();

    let set = |node, name: &[u8], value: &[u8]| {
        fs.setxattr(node, name, value, XattrMode::Create, false).unwrap();
    };
    set(small, b"user.comment", b"a value");
    set(small, b"trusted.root", &[7; 100]);
    set(small, b"security.label", b"");
    set(dir, b"user.of a directory", b"another");
    for name in [&b"small"[..], b"punched", b"cut", b"sparse"] {
        settle_time(fs, node(fs, name));
    }
}

/// Changes that stay in the log when nobody brings them home.
pub(crate) fn change(fs: &Filesystem) {
    let small = node(fs, b"small");
    write(fs, small, b" and some more", 11, libc::O_DSYNC);
    let groups = node(fs, b"hard link");
    write(fs, groups, &pattern(17_000, 13), 490_000, libc::O_DIRECT);
    write(fs, groups, &pattern(600, 14), 491_300, 0);
    let cut = node(fs, b"cut");
    fs.setattr(cut, &SetAttr { size: Some(3000), ..SetAttr::default() }).unwrap();
    fs.setattr(cut, &SetAttr { size: Some(30_000), ..SetAttr::default() }).unwrap();
    let handle = fs.open(node(fs, b"punched"), READ_WRITE, false).unwrap();
    let zero = (libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE).cast_unsigned();
    fs.fallocate(ME, handle, 25_000, 9000, zero).unwrap();
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).cast_unsigned();
    fs.fallocate(ME, handle, 0, 4096, punch).unwrap();
    fs.release(handle);
    let new = file(fs, ROOT, b"new", 0o600);
    write(fs, new, &pattern(70_000, 15), 0, 0);
    write(fs, new, &pattern(9000, 16), 120_000, libc::O_DSYNC);
    settle_time(fs, small);
    let handle = fs.open(new, READ_WRITE, false).unwrap();
    fs.fsync(handle, false).unwrap();
    fs.release(handle);
}

/// Leaves a file between two DEKs, the first of its groups sealed with the new one.
pub(crate) fn begin_rotation(store: &Store, fs: &Filesystem) {
    let tree = store.tree();
    let inode = fs.getattr(node(fs, b"hard link")).unwrap().ino;
    let mut entries = tree.read_dir().unwrap();
    while let Some(entry) = entries.next_entry().unwrap() {
        let found = tree.lookup(&entry.name).unwrap();
        if found.id().ino != inode {
            continue;
        }
        let file =
            store.open_file(found.open(byokfs::backing::Access::ReadWrite).unwrap()).unwrap();
        let mut groups = 0;
        let mut pace = |_| {
            groups += 1;
            if groups > 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        assert_eq!(store.rotate_deks(&[file], 1 << 40, &mut pace).unwrap(), None);
        return;
    }
    panic!("the file is not there");
}

#[derive(Default)]
struct Names(Vec<(Vec<u8>, FileKind)>);

impl DirSink for Names {
    fn has_room(&self, _name_len: usize) -> bool {
        true
    }

    fn push(&mut self, item: &DirItem<'_>) {
        self.0.push((item.name.to_vec(), item.kind));
    }
}

/// One line for each thing in it, in the order of names.
pub(crate) fn describe(fs: &Filesystem) -> String {
    let mut text = String::new();
    describe_directory(fs, ROOT, "", &mut text);
    text
}

fn describe_directory(fs: &Filesystem, dir: u64, path: &str, text: &mut String) {
    let mut names = Names::default();
    let handle = fs.opendir(dir).unwrap();
    fs.readdir(handle, 0, Plus::No, &mut names).unwrap();
    fs.release(handle);
    names.0.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, kind) in names.0 {
        if name == b"." || name == b".." {
            continue;
        }
        let entry = fs.lookup(dir, &name).unwrap();
        let here = format!("{path}/{}", String::from_utf8_lossy(&name));
        let attr = entry.attr;
        write!(text, "{here} {kind:?} {:o} {}", attr.mode, attr.nlink).unwrap();
        if kind != FileKind::Directory {
            write!(text, " {}", attr.size).unwrap();
        }
        if attr.mtime.sec == 1_700_000_000 {
            write!(text, " {}.{}", attr.mtime.sec, attr.mtime.nsec).unwrap();
        }
        match kind {
            FileKind::Regular => {
                write!(text, " {}", content_hash(fs, entry.node, attr.size)).unwrap();
            }
            FileKind::Symlink => {
                let target = fs.readlink(entry.node).unwrap();
                write!(text, " -> {}", String::from_utf8_lossy(&target)).unwrap();
            }
            _ => {}
        }
        let list = fs.listxattr(ME, entry.node).unwrap();
        let mut attributes: Vec<&[u8]> = list.split(|byte| *byte == 0).collect();
        attributes.sort_unstable();
        for name in attributes.into_iter().filter(|name| !name.is_empty()) {
            let value = fs.getxattr(entry.node, name).unwrap();
            write!(text, " {}={}", String::from_utf8_lossy(name), hash(&value)).unwrap();
        }
        text.push('\n');
        if kind == FileKind::Directory {
            describe_directory(fs, entry.node, &here, text);
        }
        fs.forget(entry.node, 1);
    }
}

/// Of what is not a hole, with where it is.
fn content_hash(fs: &Filesystem, node: u64, size: u64) -> String {
    let handle = fs.open(node, libc::O_RDONLY as u32, false).unwrap();
    let mut content = Vec::new();
    let mut at = 0;
    while at < size {
        let Ok(data) = fs.lseek(handle, at, libc::SEEK_DATA as u32) else { break };
        let hole = fs.lseek(handle, data, libc::SEEK_HOLE as u32).unwrap();
        content.extend_from_slice(&data.to_le_bytes());
        while at.max(data) < hole {
            let from = at.max(data);
            let mut bytes = vec![0; (hole - from).min(1 << 20) as usize];
            let count = fs.read(handle, from, &mut bytes).unwrap();
            assert_eq!(count, bytes.len());
            content.extend_from_slice(&bytes);
            at = from + count as u64;
        }
    }
    fs.release(handle);
    hash(&content)
}

fn hash(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}
