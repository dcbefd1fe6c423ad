use super::*;
use crate::backing::{Access, FileKind, RenameMode, SetTime, Timestamp, XattrMode};

fn scratch() -> (tempfile::TempDir, Arc<LinuxBacking>) {
    let dir = tempfile::tempdir().unwrap();
    let backing = LinuxBacking::open(dir.path()).unwrap();
    (dir, backing)
}

#[test]
fn unnamed_files_get_their_name_when_complete() {
    let (_dir, backing) = scratch();
    let root = backing.root();
    let file = root.create_unnamed().unwrap();
    file.write_parts_at(&[b"one", b"", b" two"], 5).unwrap();
    assert!(root.read_dir().unwrap().next_entry().unwrap().is_none());
    root.link_file(&*file, b"name").unwrap();
    let again = root.link_file(&*file, b"name").unwrap_err();
    assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
    let node = root.lookup(b"name").unwrap();
    assert_eq!(node.id(), file.node().unwrap().id());
    let mut buf = [1; 16];
    let count = node.open(Access::Read).unwrap().read_at(&mut buf, 3).unwrap();
    assert_eq!(&buf[..count], b"\0\0one two");
    root.link_node(&*node, b"second").unwrap();
    assert_eq!(node.metadata().unwrap().nlink, 2);
}

#[test]
fn names_never_lead_elsewhere() {
    let (_dir, backing) = scratch();
    let root = backing.root();
    for name in [&b".."[..], b".", b"", b"a/b", b"/etc", b"nul\0nul"] {
        assert!(root.lookup(name).is_err(), "{name:?}");
    }
    let link = root.symlink(b"link", b"/etc").unwrap();
    assert_eq!(root.lookup(b"link").unwrap().id(), link.id());
    assert_eq!(link.metadata().unwrap().kind, FileKind::Symlink);
    assert_eq!(link.read_link().unwrap(), b"/etc");
    assert!(link.lookup(b"passwd").is_err());
    assert!(link.open(Access::Read).is_err());
    // Times, owner and hard links are the link's own.
    let at = SetTime::At(Timestamp { sec: -5, nsec: 7 });
    link.set_times(SetTime::Keep, at).unwrap();
    assert_eq!(link.metadata().unwrap().mtime, Timestamp { sec: -5, nsec: 7 });
    root.link_node(&*link, b"hard").unwrap();
    assert_eq!(root.lookup(b"hard").unwrap().id(), link.id());
    assert!(link.set_mode(0o600).is_err());
}

#[test]
fn attributes_go_through_a_descriptor_that_is_not_open() {
    let (_dir, backing) = scratch();
    let root = backing.root();
    let dir = root.mkdir(b"dir", 0o700).unwrap();
    dir.set_mode(0o2750).unwrap();
    assert_eq!(dir.metadata().unwrap().mode, 0o2750);
    let long = vec![7; 3000];
    match dir.set_xattr(b"user.k", &long, XattrMode::Create) {
        Ok(()) => {
            assert_eq!(dir.get_xattr(b"user.k").unwrap(), long);
            assert_eq!(dir.list_xattrs().unwrap(), [b"user.k".to_vec()]);
            assert!(dir.set_xattr(b"user.k", b"", XattrMode::Create).is_err());
            dir.remove_xattr(b"user.k").unwrap();
            assert!(dir.get_xattr(b"user.k").is_err());
        }
        Err(error) => eprintln!("skipped: no user xattrs here: {error}"),
    }
    dir.sync().unwrap();
    root.rename(b"dir", &*root, b"moved", RenameMode::NoReplace).unwrap();
    root.rmdir(b"moved").unwrap();
    assert!(root.lookup(b"moved").is_err());
}

#[test]
fn directories_can_be_read_on_from_any_entry() {
    let (_dir, backing) = scratch();
    let root = backing.root();
    let mut names: Vec<Vec<u8>> = (0..2000).map(|i| format!("{i:0100}").into_bytes()).collect();
    for name in &names {
        root.mknod(name, FileKind::Regular, 0o600, 0).unwrap();
    }
    let mut stream = root.read_dir().unwrap();
    let mut seen = Vec::new();
    while let Some(entry) = stream.next_entry().unwrap() {
        seen.push(entry);
    }
    for at in [0, 700, 1999] {
        stream.seek(seen[at].next).unwrap();
        let next = stream.next_entry().unwrap().map(|entry| entry.name);
        assert_eq!(next, seen.get(at + 1).map(|entry| entry.name.clone()));
    }
    stream.seek(0).unwrap();
    assert_eq!(stream.next_entry().unwrap().unwrap().name, seen[0].name);
    let mut seen: Vec<_> = seen.into_iter().map(|entry| entry.name).collect();
    seen.sort();
    names.sort();
    assert_eq!(seen, names);
}

#[test]
fn space_and_holes() {
    let (_dir, backing) = scratch();
    let file = backing.root().create_unnamed().unwrap();
    file.allocate(0, 1 << 20, true).unwrap();
    assert_eq!(file.metadata().unwrap().size, 0);
    file.write_at(&[1; 8192], 65536).unwrap();
    file.set_len(1 << 20).unwrap();
    file.punch_hole(65536, 4096).unwrap();
    let mut byte = [9];
    assert_eq!(file.read_at(&mut byte, 65536).unwrap(), 1);
    assert_eq!(byte, [0]);
    assert_eq!(file.read_at(&mut byte, 1 << 20).unwrap(), 0);
    assert_eq!(file.seek_data(2 << 20).unwrap(), None);
    file.write_out(0, 1 << 20).unwrap();
    file.sync_data().unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_second_writer_is_kept_out() {
    let (dir, backing) = scratch();
    let other = LinuxBacking::open(dir.path()).unwrap();
    let guard = backing.lock(b"lock").unwrap();
    assert_eq!(other.lock(b"lock").unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(guard);
    other.lock(b"lock").unwrap();
}

#[test]
fn network_file_systems_are_known_by_their_numbers() {
    assert_eq!(refused(0x6969), Some("NFS"));
    assert_eq!(refused(0x6573_5546), Some("FUSE"));
    assert_eq!(refused(0xef53), None); // ext4
    let path = std::path::Path::new("/nonexistent/byokfs");
    let error = LinuxBacking::open(path).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/byokfs"), "{error}");
}
