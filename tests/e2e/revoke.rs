//! What open descriptors, mappings and waiting readers answer after a cut-off, and after the key
//! is back.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::Signal;

use crate::support::kernel;
use crate::support::mapping::{Mapping, Reader, Touch};
use crate::support::process::{alive, run, signal, state};
use crate::support::sandbox::{IDENTITY, KEY, Sandbox, path};
use crate::support::{can_mount, until};

const EIO: i32 = 5;
const SIGBUS: i32 = 7;

#[track_caller]
fn answers<T: std::fmt::Debug>(errno: i32, what: &str, result: io::Result<T>) {
    match result {
        Err(error) if error.raw_os_error() == Some(errno) => {}
        other => panic!("{what}: {other:?} instead of errno {errno}"),
    }
}

fn direct(path: &Path) -> File {
    let flags = OFlags::DIRECT.bits() as i32;
    File::options().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

#[test]
fn open_descriptors_and_mappings_answer_errors_and_work_again() {
    if !can_mount() || !kernel::maps_shared() {
        return;
    }
    let sandbox = Sandbox::mounted();
    let file = sandbox.mnt().join("file");
    let content: Vec<u8> = (0..65536u32).map(|at| (at / 4096) as u8 + 1).collect();
    fs::write(&file, &content).unwrap();
    let open = File::options().read(true).write(true).open(&file).unwrap();
    let unaligned = direct(&file);
    let dir = File::open(sandbox.mnt()).unwrap();
    let mut mapped = Reader::start(&file);
    let firsts: Vec<u8> = (1..=16).collect();
    assert_eq!(mapped.touch(), Touch::Bytes(firsts.clone()));
    // A page dirtied through a mapping before the cut-off is there after it.
    let mut dirty = Mapping::new(&open, content.len()).unwrap();
    dirty.set(100, 0xaa);

    sandbox.revoke();
    let mut bytes = [0; 4096];
    answers(EIO, "read", open.read_at(&mut bytes, 0));
    answers(EIO, "write", open.write_at(&bytes, 0));
    answers(EIO, "direct read", unaligned.read_at(&mut bytes, 4096));
    answers(EIO, "fsync", open.sync_all());
    answers(EIO, "fstat", open.metadata());
    answers(EIO, "ftruncate", open.set_len(1));
    answers(EIO, "fsync of a directory", dir.sync_all());
    answers(EIO, "open", File::open(&file));
    answers(EIO, "create", File::create(sandbox.mnt().join("new")));
    answers(
        EIO,
        "list",
        fs::read_dir(sandbox.mnt()).and_then(Iterator::collect::<io::Result<Vec<_>>>),
    );
    answers(EIO, "rename", fs::rename(&file, sandbox.mnt().join("other")));
    answers(EIO, "unlink", fs::remove_file(&file));
    answers(EIO, "mkdir", fs::create_dir(sandbox.mnt().join("dir")));
    assert_eq!(mapped.touch(), Touch::Signal(SIGBUS));

    sandbox.recover();
    let mut expected = content.clone();
    expected[100] = 0xaa;
    let mut back = vec![0; content.len()];
    open.read_exact_at(&mut back, 0).unwrap();
    assert!(back == expected, "the content changed over the cut-off");
    open.write_all_at(b"again", 5000).unwrap();
    open.sync_all().unwrap();
    dir.sync_all().unwrap();
    unaligned.read_exact_at(&mut bytes, 4096).unwrap();
    assert_eq!(&bytes[904..909], b"again");
    // The very mapping that was there all along.
    assert_eq!(dirty.get(100), 0xaa);
    assert_eq!(dirty.get(5000), b'a');
    dirty.set(101, 0xbb);
    dirty.sync().unwrap();
    assert_eq!(fs::read(&file).unwrap()[101], 0xbb);
    assert!(!sandbox.mnt().join("new").exists() && !sandbox.mnt().join("dir").exists());
    drop(dirty);
}

#[test]
fn the_errno_can_be_the_key_s_own() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted_with("[mount]\nerrno = \"key\"\n");
    let file = File::create(sandbox.mnt().join("file")).unwrap();
    sandbox.revoke();
    const EKEYREVOKED: i32 = 128;
    answers(EKEYREVOKED, "write", file.write_at(b"x", 0));
    sandbox.recover();
    file.write_all_at(b"x", 0).unwrap();
}

/// Readers and writers run right into the cut-off: each call succeeds or answers EIO, none hangs.
#[test]
fn calls_under_way_end() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted();
    let file = sandbox.mnt().join("file");
    fs::write(&file, vec![7; 8 << 20]).unwrap();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..6u64)
            .map(|worker| {
                let file = direct(&file);
                scope.spawn(move || {
                    let mut bytes = vec![0; 1 << 20];
                    for round in 0.. {
                        let offset = ((round * 7 + worker) % 8) << 20;
                        let done = match worker % 2 {
                            0 => file.read_exact_at(&mut bytes, offset).map(|()| {
                                assert!(bytes.iter().all(|byte| *byte == 7), "wrong data");
                            }),
                            _ => file.write_all_at(&vec![7; 1 << 20], offset),
                        };
                        if let Err(error) = done {
                            return error.raw_os_error();
                        }
                    }
                    None
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(500));
        sandbox.revoke();
        for worker in workers {
            assert_eq!(worker.join().unwrap(), Some(EIO));
        }
    });
    sandbox.recover();
    assert!(fs::read(&file).unwrap() == vec![7; 8 << 20]);
}

/// The daemon stands still for longer than a probe's answer is good for, with a reader waiting in
/// the kernel. When it goes on, that reader gets an error, though no probe has failed yet.
#[test]
fn a_reader_that_waits_in_the_kernel_gets_no_data_from_a_stale_gate() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted_with(
        "interval = \"1s\"\ndeadline = \"1s\"\nmax_staleness = \"6s\"\nconfirm_after = \"1s\"\nconfirm_within = \"3s\"\n",
    );
    let file = sandbox.mnt().join("file");
    fs::write(&file, vec![7; 1 << 16]).unwrap();
    let open = direct(&file);
    let daemon = sandbox.daemon();
    signal(daemon, Signal::STOP);
    until("the daemon to stop", || state(daemon) == Some('T'));
    let answer = std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        let reader = scope.spawn(move || {
            tell.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            let mut bytes = vec![0; 1 << 16];
            open.read_at(&mut bytes, 0)
        });
        let reader_id = told.recv().unwrap();
        until("the reader to wait in the kernel", || {
            let stack = fs::read_to_string(format!("/proc/{reader_id}/wchan")).unwrap_or_default();
            matches!(state(reader_id), Some('D' | 'S'))
                && (stack == "0" || stack.contains("request_wait") || stack.contains("fuse"))
        });
        sandbox.enable_key(false);
        // On the clock that the gate goes by.
        std::thread::sleep(Duration::from_secs(8));
        signal(daemon, Signal::CONT);
        reader.join().unwrap()
    });
    answers(EIO, "the waiting read", answer);
    sandbox.until_inaccessible();
    sandbox.recover();
    assert_eq!(fs::read(&file).unwrap().len(), 1 << 16);
}

#[test]
fn each_way_to_lose_the_key_and_to_get_it_back() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted();
    let file = sandbox.mnt().join("file");
    fs::write(&file, "content").unwrap();
    let mut seen = Vec::new();
    let permissions = "get,list,wrapKey,unwrapKey";
    let grant = ["grant", "--identity", IDENTITY, "--key-permissions", permissions];
    let revoke = ["revoke", "--identity", IDENTITY, "--key-permissions", "unwrapKey"];
    for (lose, regain) in [
        (
            &["key", "set-attributes", "--name", KEY, "--enabled", "false"][..],
            &["key", "set-attributes", "--name", KEY, "--enabled", "true"][..],
        ),
        (&["key", "delete", "--name", KEY], &["key", "recover", "--name", KEY]),
        (&revoke, &grant),
    ] {
        sandbox.vault(lose);
        sandbox.until_inaccessible();
        answers(EIO, "read", fs::read(&file));
        let status = sandbox.status();
        seen.push(status["reason"].as_str().unwrap_or_default().to_owned());
        // Without the key, revalidate says no and changes nothing.
        sandbox.byokfs(&["revalidate", path(&sandbox.mnt())]).fails(7);
        assert_eq!(sandbox.state(), "Inaccessible");
        sandbox.vault(regain);
        // It does not come back by itself.
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(sandbox.state(), "Inaccessible");
        sandbox.revalidate();
        assert_eq!(fs::read_to_string(&file).unwrap(), "content");
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 3, "reasons must tell the causes apart: {seen:?}");
}

#[test]
fn an_expiry_cuts_off_by_the_clock() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted();
    let soon = time::OffsetDateTime::now_utc() + Duration::from_secs(4);
    let soon = soon.replace_nanosecond(0).unwrap();
    let soon = soon.format(&time::format_description::well_known::Rfc3339).unwrap();
    sandbox.vault(&["key", "set-attributes", "--name", KEY, "--expires", &soon]);
    sandbox.until_inaccessible();
    let events = sandbox.audit("MakeInaccessible");
    assert!(!events.is_empty());
    sandbox.byokfs(&["revalidate", path(&sandbox.mnt())]).fails(7);
}

/// Unreachable is not denied: the volume serves on, says Degraded, and heals by itself, before the
/// limit and after it.
#[test]
fn an_unreachable_vault_degrades_first_and_heals_by_itself() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted_with(
        "interval = \"1s\"\ndeadline = \"1s\"\nmax_staleness = \"15s\"\nconfirm_after = \"1s\"\nconfirm_within = \"3s\"\n",
    );
    let file = sandbox.mnt().join("file");
    fs::write(&file, "content").unwrap();
    sandbox.stop_vault();
    until("the state Degraded", || sandbox.state() == "Degraded");
    assert_eq!(fs::read_to_string(&file).unwrap(), "content");
    sandbox.start_vault();
    until("the state Available", || sandbox.state() == "Available");
    sandbox.stop_vault();
    sandbox.until_inaccessible();
    answers(EIO, "read", fs::read(&file));
    sandbox.start_vault();
    until("the state Available again", || sandbox.state() == "Available");
    assert_eq!(fs::read_to_string(&file).unwrap(), "content");
}

#[test]
fn umount_works_while_inaccessible() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted();
    fs::write(sandbox.mnt().join("file"), "content").unwrap();
    sandbox.revoke();
    let daemon = sandbox.daemon();
    sandbox.umount();
    assert!(!alive(daemon), "umount returned before the daemon had ended");
    sandbox.enable_key(true);
    sandbox.mount();
    assert_eq!(fs::read_to_string(sandbox.mnt().join("file")).unwrap(), "content");
}

#[test]
fn busy_is_refused_with_the_pids() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted();
    let open = File::create(sandbox.mnt().join("file")).unwrap();
    let message = sandbox.byokfs(&["umount", path(&sandbox.mnt())]).fails(9);
    assert!(message.contains(&std::process::id().to_string()), "{message}");
    // SIGTERM is refused for the same reason, and said in the audit trail.
    signal(sandbox.daemon(), Signal::TERM);
    until("the refusal", || !sandbox.audit("UnmountRefused").is_empty());
    open.write_all_at(b"still there", 0).unwrap();
    drop(open);
    sandbox.umount();
}

/// systemd asks whom it started, which is the guard.
#[test]
fn the_guard_hands_down_that_it_shall_end() {
    if !can_mount() {
        return;
    }
    for foreground in [false, true] {
        let mut sandbox = Sandbox::mounted();
        let mut service = None;
        if foreground {
            sandbox.umount();
            let (back, mnt) = (sandbox.back(), sandbox.mnt());
            let mut command = sandbox.command();
            command.args(["mount", path(&back), path(&mnt), "--foreground"]);
            service = Some(command.stderr(Stdio::null()).spawn().unwrap());
            until("the mount", || sandbox.byokfs(&["status", path(&mnt)]).code == Some(0));
        }
        let (daemon, guard) = (sandbox.daemon(), sandbox.guard().unwrap());
        let open = File::create(sandbox.mnt().join("file")).unwrap();
        signal(guard, Signal::TERM);
        until("the refusal", || !sandbox.audit("UnmountRefused").is_empty());
        assert!(alive(guard) && sandbox.guard() == Some(guard), "in the foreground: {foreground}");
        open.write_all_at(b"still there", 0).unwrap();
        drop(open);
        signal(guard, Signal::TERM);
        if let Some(mut service) = service {
            assert!(service.wait().unwrap().success());
        }
        until("the end", || !alive(daemon) && !alive(guard));
        assert!(!sandbox.is_mounted() && sandbox.audit("GuardDied").is_empty());
        sandbox.mount();
        assert_eq!(fs::read(sandbox.mnt().join("file")).unwrap(), b"still there");
    }
}

/// `umount -f` of a mount that is in use leaves it behind, without a connection.
#[test]
fn an_end_by_force_is_told_as_the_death_that_it_is_and_as_no_unmount() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted();
    let (daemon, guard) = (sandbox.daemon(), sandbox.guard().unwrap());
    let open = File::create(sandbox.mnt().join("file")).unwrap();
    assert!(!Command::new("umount").arg("-f").arg(sandbox.mnt()).status().unwrap().success());
    until("the end", || !alive(daemon) && !alive(guard));
    drop(open);
    assert!(!sandbox.is_mounted());
    assert_eq!(sandbox.audit("DaemonDied").len(), 1);
    let ends = sandbox.audit("VolumeUnmounted");
    let reasons: Vec<_> = ends.iter().map(|end| end["reason"].as_str().unwrap()).collect();
    assert_eq!(reasons, ["DaemonDied"]);
    sandbox.mount();
    sandbox.umount();
    assert_eq!(sandbox.audit("VolumeUnmounted")[1]["reason"], "Unmounted");
}

/// The kernel gives the number of a mount that is gone to the next one, of whatever type: that is no
/// mount of a killed daemon, and who uses it is no server to be stopped.
#[test]
fn a_guard_that_looks_late_takes_no_other_mount_for_its_own() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted();
    let (daemon, guard) = (sandbox.daemon(), sandbox.guard().unwrap());
    let number = sandbox.status()["device"].as_str().unwrap().to_owned();
    signal(guard, Signal::STOP);
    run("umount", &[path(&sandbox.mnt())]);
    until("the daemon's end", || !alive(daemon));
    let given_away = || {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().any(|line| line.split(' ').nth(2) == Some(&number))
    };
    // The kernel gives the lowest number that is free; other tests mount too.
    let mut others = Vec::new();
    while !given_away() {
        let other = sandbox.path(&format!("other-{}", others.len()));
        fs::create_dir(&other).unwrap();
        run("mount", &["-t", "tmpfs", "other", path(&other)]);
        others.push(other);
        assert!(others.len() < 100, "nobody takes the number {number}");
    }
    signal(guard, Signal::CONT);
    until("the guard's end", || !alive(guard));
    for other in &others {
        run("umount", &[path(other)]);
    }
    assert!(sandbox.audit("DaemonDied").is_empty());
}

/// The mount is in its place then, and its daemon has ended.
#[test]
fn a_connection_that_was_ended_by_force_is_a_daemon_that_died() {
    let connections = Path::new("/sys/fs/fuse/connections");
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted();
    let number = sandbox.status()["device"].as_str().unwrap().to_owned();
    let abort = connections.join(number.rsplit(':').next().unwrap()).join("abort");
    let bare = !abort.exists();
    if bare {
        run("mount", &["-t", "fusectl", "fusectl", path(connections)]);
    }
    fs::write(abort, "1").unwrap();
    if bare {
        run("umount", &[path(connections)]);
    }
    until("the guard to take the mount away", || !sandbox.is_mounted());
    until("the audit trail", || !sandbox.audit("DaemonDied").is_empty());
}

/// A process that the daemon waits for must not be able to stop a cut-off: it holds locks and
/// descriptors, and does nothing.
#[test]
fn an_idle_holder_of_locks_does_not_delay_the_cut_off() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted();
    let file = File::create(sandbox.mnt().join("file")).unwrap();
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let start = Instant::now();
    sandbox.revoke();
    println!("Inaccessible {:?} after the key was disabled", start.elapsed());
    answers(EIO, "write", file.write_at(b"x", 0));
    sandbox.recover();
    file.write_all_at(b"x", 0).unwrap();
}
