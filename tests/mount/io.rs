//! Reading and writing: O_DIRECT, O_DSYNC, O_APPEND, O_TRUNC, many threads.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use crate::harness::{errno, mounted, shell};

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 7 + seed * 13) % 253) as u8).collect()
}

#[test]
fn direct_requests_of_any_alignment_succeed() {
    let mount = mounted!();
    let path = mount.path("f");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .unwrap();
    let mut expected = vec![0; 200_000];
    for (index, (offset, len)) in
        [(0, 512), (1, 1), (511, 4097), (4095, 2), (16_384, 16_384), (99_999, 100_001), (123, 0)]
            .into_iter()
            .enumerate()
    {
        let data = pattern(len, index);
        file.write_all_at(&data, offset as u64).unwrap();
        expected[offset..offset + len].copy_from_slice(&data);
    }
    let mut read = vec![0; 200_000];
    file.read_exact_at(&mut read, 0).unwrap();
    assert!(read == expected);
    let mut part = vec![0; 4097];
    file.read_exact_at(&mut part, 511).unwrap();
    assert!(part == expected[511..511 + 4097]);
    assert!(fs::read(&path).unwrap() == expected, "and through a handle without the flag");
}

#[test]
fn direct_io_can_be_switched_on_after_the_open() {
    let mount = mounted!();
    let file =
        OpenOptions::new().read(true).write(true).create_new(true).open(mount.path("f")).unwrap();
    file.write_all_at(&pattern(1024, 1), 0).unwrap();
    rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::DIRECT).unwrap();
    file.write_all_at(&pattern(16_384, 2), 16_384).unwrap();
    let mut page = vec![0; 16_384];
    file.read_exact_at(&mut page, 16_384).unwrap();
    assert!(page == pattern(16_384, 2));
    file.sync_data().unwrap();
}

#[test]
fn synchronous_writes_are_accepted() {
    let mount = mounted!();
    for flag in [libc::O_DSYNC, libc::O_SYNC, libc::O_DSYNC | libc::O_DIRECT] {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(flag)
            .open(mount.path("f"))
            .unwrap();
        for index in 0..20 {
            file.write_all_at(&pattern(512, index), index as u64 * 512).unwrap();
        }
        assert_eq!(file.metadata().unwrap().len(), 20 * 512);
    }
}

#[test]
fn several_writers_append_without_losing_a_line() {
    let mount = mounted!();
    let path = mount.path("log");
    let (writers, lines) = (8, 300);
    std::thread::scope(|scope| {
        for writer in 0..writers {
            let path = &path;
            scope.spawn(move || {
                let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
                for line in 0..lines {
                    let text = format!("{writer}:{line}:{}\n", "x".repeat(line % 100));
                    file.write_all(text.as_bytes()).unwrap();
                }
            });
        }
    });
    let text = fs::read_to_string(&path).unwrap();
    let mut next = vec![0; writers];
    for line in text.lines() {
        let mut parts = line.split(':');
        let writer: usize = parts.next().unwrap().parse().unwrap();
        let number: usize = parts.next().unwrap().parse().unwrap();
        assert_eq!(number, next[writer], "lines of one writer keep their order");
        assert_eq!(parts.next().unwrap().len(), number % 100);
        next[writer] += 1;
    }
    assert_eq!(next, vec![lines; writers]);
}

#[test]
fn processes_append_too() {
    let mount = mounted!();
    let script = "for w in 1 2 3 4; do (i=0; while [ $i -lt 100 ]; do echo $w >> log; \
                  i=$((i+1)); done) & done; wait; sort log | uniq -c | awk '{print $1}'";
    assert_eq!(shell(&mount.root(), script), "100\n100\n100\n100\n");
}

/// The kernel sends the pieces of such a write side by side.
#[test]
fn an_asynchronous_append_of_many_requests_keeps_its_order() {
    let mount = mounted!();
    let script = "import ctypes,os,struct; c=ctypes.CDLL(None); MB=1<<20; at=0\n\
        fd=os.open('log',os.O_RDWR|os.O_CREAT|os.O_APPEND)\n\
        data=b''.join(bytes([1+i])*MB for i in range(8)); buf=ctypes.create_string_buffer(data)\n\
        setup,submit,events=(206,209,208) if os.uname().machine=='x86_64' else (0,2,4)\n\
        ctx=ctypes.c_ulong(0); assert c.syscall(setup,8,ctypes.byref(ctx))==0\n\
        one=ctypes.c_long(1)\n\
        for _ in range(10):\n\
        \x20cb=ctypes.create_string_buffer(struct.pack('<QIiHhIQQqQII',0,0,0,1,0,fd,\
        ctypes.addressof(buf),len(data),0,0,0,0),64)\n\
        \x20cbs=ctypes.c_void_p(ctypes.addressof(cb))\n\
        \x20assert c.syscall(submit,ctx,one,ctypes.byref(cbs))==1\n\
        \x20done=ctypes.create_string_buffer(32)\n\
        \x20assert c.syscall(events,ctx,one,one,done,None)==1\n\
        \x20assert struct.unpack('<QQqq',done.raw)[2]==len(data)\n\
        \x20got=os.pread(fd,len(data)+1,at); at+=len(data)\n\
        \x20assert got==data,[got[i] for i in range(0,len(got),MB)]\n";
    fs::write(mount.path("aio.py"), script).unwrap();
    shell(&mount.root(), "python3 aio.py");
}

#[test]
fn opening_with_truncation_empties_the_file_for_all() {
    let mount = mounted!();
    let path = mount.path("f");
    fs::write(&path, pattern(50_000, 1)).unwrap();
    let other = File::open(&path).unwrap();
    let truncating = File::create(&path).unwrap();
    assert_eq!(other.metadata().unwrap().len(), 0);
    assert_eq!(other.read_at(&mut [0; 10], 0).unwrap(), 0);
    truncating.write_all_at(b"new", 0).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
}

#[test]
fn blocks_written_by_many_threads_are_all_there() {
    let mount = mounted!();
    let path = mount.path("f");
    let file = File::create(&path).unwrap();
    let (threads, blocks, size) = (16, 40, 5000);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let file = &file;
            scope.spawn(move || {
                for block in (thread..threads * blocks).step_by(threads) {
                    file.write_all_at(&pattern(size, block), (block * size) as u64).unwrap();
                }
            });
        }
    });
    let read = fs::read(&path).unwrap();
    for (block, bytes) in read.chunks(size).enumerate() {
        assert!(bytes == pattern(size, block), "block {block}");
    }
    assert_eq!(read.len(), threads * blocks * size);
}

#[test]
fn a_write_by_someone_else_drops_the_set_id_bits() {
    let mount = mounted!();
    let root = mount.root();
    shell(&root, "chmod 777 .; echo x > f; chmod 6777 f; echo y > g; chmod 6777 g; stat -c %a f");
    let script = "echo more >> f; : > g; stat -c %a f g";
    let output = crate::harness::shell_as(4242, 4242, &root, script);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "777\n777\n");
}

#[test]
fn what_is_not_served_says_so() {
    let mount = mounted!();
    let file = File::create(mount.path("f")).unwrap();
    file.write_all_at(&[1; 8192], 0).unwrap();
    let collapse = rustix::fs::FallocateFlags::COLLAPSE_RANGE;
    let refused = rustix::fs::fallocate(&file, collapse, 0, 4096);
    assert_eq!(refused.unwrap_err().raw_os_error(), libc::EOPNOTSUPP);
    assert_eq!(errno(fs::read_link(mount.path("f"))), libc::EINVAL);
}

#[test]
fn a_read_only_mount_refuses_changes_and_serves_the_rest() {
    let mut mount = mounted!();
    fs::write(mount.path("f"), "text").unwrap();
    mount.remount("ro");
    assert_eq!(fs::read(mount.path("f")).unwrap(), b"text");
    assert_eq!(errno(fs::write(mount.path("g"), "x")), libc::EROFS);
    assert_eq!(errno(fs::remove_file(mount.path("f"))), libc::EROFS);
    assert_eq!(errno(OpenOptions::new().write(true).open(mount.path("f"))), libc::EROFS);
}
