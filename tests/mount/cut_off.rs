//! What callers get while the volume is cut off, and that everything works again afterwards.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use crate::harness::{Mount, errno, mounted};
use crate::kernel;

fn every_operation_fails(mount: &Mount, file: &File, dir: &File, expected: i32) {
    let path = mount.path("f");
    assert_eq!(errno(file.read_at(&mut [0; 10], 0)), expected);
    assert_eq!(errno(file.write_at(b"x", 0)), expected);
    assert_eq!(errno(file.sync_all()), expected);
    assert_eq!(errno(file.sync_data()), expected);
    assert_eq!(errno(file.metadata()), expected);
    assert_eq!(errno(file.set_len(1)), expected);
    assert_eq!(errno(dir.sync_all()), expected);
    assert_eq!(errno(fs::metadata(&path)), expected);
    assert_eq!(errno(fs::metadata(mount.path("no such file"))), expected);
    assert_eq!(errno(File::open(&path)), expected);
    assert_eq!(errno(fs::write(mount.path("new"), "x")), expected);
    assert_eq!(errno(fs::remove_file(&path)), expected);
    assert_eq!(errno(fs::rename(&path, mount.path("g"))), expected);
    assert_eq!(errno(fs::read_link(mount.path("l"))), expected);
    assert_eq!(errno(fs::read_dir(mount.root()).map(|_| ())), expected);
    let statfs = rustix::fs::statvfs(mount.root()).map(|_| ());
    assert_eq!(statfs.unwrap_err().raw_os_error(), expected);
    let xattr = rustix::fs::getxattr(&path, "user.a", &mut [0; 10]);
    assert_eq!(xattr.unwrap_err().raw_os_error(), expected);
}

fn cut_off_and_back(options: &str, expected: i32) {
    let mut mount = mounted!(options);
    let path = mount.path("f");
    fs::write(&path, "before").unwrap();
    std::os::unix::fs::symlink("target", mount.path("l")).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let dir = File::open(mount.root()).unwrap();
    // Have the kernel cache what it can.
    fs::metadata(&path).unwrap();
    fs::read_link(mount.path("l")).unwrap();
    assert!(fs::metadata(mount.path("no such file")).is_err());
    for _ in 0..3 {
        mount.cut_off();
        every_operation_fails(&mount, &file, &dir, expected);
        mount.revalidate();
        file.write_all_at(b"after ", 0).unwrap();
        let mut read = [0; 6];
        file.read_exact_at(&mut read, 0).unwrap();
        assert_eq!(&read, b"after ");
        file.sync_all().unwrap();
        assert_eq!(fs::read_dir(mount.root()).unwrap().count(), 2);
        assert_eq!(fs::read_link(mount.path("l")).unwrap().as_os_str(), "target");
        assert_eq!(errno(fs::metadata(mount.path("no such file"))), libc::ENOENT);
    }
}

#[test]
fn every_operation_answers_eio() {
    cut_off_and_back("", libc::EIO);
}

#[test]
fn or_the_key_s_errno() {
    cut_off_and_back("key", libc::EKEYREVOKED);
}

#[test]
fn a_shared_mapping_keeps_what_was_written_and_then_answers_sigbus() {
    if !kernel::maps_shared() {
        return;
    }
    let mut mount = mounted!();
    // The mapping stays open over the cut-off; each line asks for one thing.
    let script = "import mmap,os,sys,signal\n\
        f=open('f','w+b'); f.truncate(40960); m=mmap.mmap(f.fileno(),40960)\n\
        m[0:5]=b'dirty'\n\
        for line in sys.stdin:\n\
        \x20   if line=='touch\\n':\n\
        \x20       pid=os.fork()\n\
        \x20       if pid==0:\n\
        \x20           m[0:1]; os._exit(0)\n\
        \x20       s=os.waitpid(pid,0)[1]\n\
        \x20       print('signal', os.WTERMSIG(s) if os.WIFSIGNALED(s) else 0, flush=True)\n\
        \x20   else: print(m[0:5].decode(), flush=True)\n";
    fs::write("/tmp/byokfs-map.py", script).unwrap();
    let mut child = Command::new("python3")
        .arg("/tmp/byokfs-map.py")
        .current_dir(mount.root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ask = child.stdin.take().unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut asked = |what: &str| {
        writeln!(ask, "{what}").unwrap();
        answers.next().unwrap().unwrap()
    };
    assert_eq!(asked("touch"), "signal 0");
    mount.cut_off();
    assert_eq!(asked("touch"), format!("signal {}", libc::SIGBUS));
    mount.revalidate();
    assert_eq!(asked("show"), "dirty");
    drop(ask);
    child.wait().unwrap();
    assert_eq!(&fs::read(mount.path("f")).unwrap()[..5], b"dirty");
}

#[test]
fn an_inaccessible_volume_can_be_unmounted() {
    let mut mount = mounted!();
    fs::write(mount.path("f"), "kept").unwrap();
    mount.cut_off();
    mount.remount("");
    assert_eq!(fs::read(mount.path("f")).unwrap(), b"kept");
}

#[test]
fn closing_works_while_cut_off() {
    let mut mount = mounted!();
    let file = File::create(mount.path("f")).unwrap();
    mount.cut_off();
    rustix::io::dup(&file).unwrap();
    drop(file);
    mount.revalidate();
    assert_eq!(fs::metadata(mount.path("f")).unwrap().len(), 0);
}
