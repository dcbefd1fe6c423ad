//! Several users at once.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::thread;

use crate::harness::{mounted, shell, shell_as};

#[test]
fn three_users_create_in_parallel_and_own_what_they_made() {
    let mount = mounted!();
    shell(&mount.root(), "chmod 1777 .");
    let users = [2001, 2002, 2003];
    thread::scope(|scope| {
        for uid in users {
            let root = mount.root();
            scope.spawn(move || {
                let script = "i=0; while [ $i -lt 100 ]; do echo $(id -u) > f$(id -u)-$i; \
                              mkdir d$(id -u)-$i; ln -s x l$(id -u)-$i; i=$((i+1)); done";
                let output = shell_as(uid, uid + 100, &root, script);
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            });
        }
    });
    let mut count = 0;
    for entry in fs::read_dir(mount.root()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let metadata = fs::symlink_metadata(entry.path()).unwrap();
        assert_eq!(name[1..5].parse::<u32>().unwrap(), metadata.uid(), "{name}");
        assert_eq!(metadata.uid() + 100, metadata.gid());
        count += 1;
    }
    assert_eq!(count, 900);
}

#[test]
fn permissions_are_checked() {
    let mount = mounted!();
    let root = mount.root();
    shell(
        &root,
        "mkdir -m 700 d; echo x > d/f; echo y > g; chmod 600 g; mkdir -m 1777 t; touch t/r",
    );
    for denied in ["cat d/f", "cat g", "touch h", "rm g", "rm -f t/r", "chmod 777 g", "chown 5 g"] {
        assert!(!shell_as(2001, 2001, &root, denied).status.success(), "{denied}");
    }
}

#[test]
fn the_owner_s_bits_are_kept_as_they_were_given() {
    let mount = mounted!();
    let script = "umask 0; for m in 000 200 400 077 4555 1644; do touch f$m; chmod $m f$m; \
                  mkdir d$m; chmod $m d$m; done; stat -c '%n %a' f* d*";
    let there = tempfile::tempdir().unwrap();
    assert_eq!(shell(&mount.root(), script), shell(there.path(), script));
}

#[test]
fn locks_work_between_processes() {
    let mount = mounted!();
    let script = "touch f; exec 9< f; flock -n 9; flock -n f -c true && echo taken || echo held; \
                  exec 9<&-; flock -n f -c 'echo free'";
    assert_eq!(shell(&mount.root(), script), "held\nfree\n");
    let posix = "import fcntl,os,sys\n\
        f=open('f','r+'); fcntl.lockf(f, fcntl.LOCK_EX|fcntl.LOCK_NB)\n\
        if os.fork()==0:\n\
        \x20   g=open('f','r+')\n\
        \x20   try: fcntl.lockf(g, fcntl.LOCK_EX|fcntl.LOCK_NB); os._exit(1)\n\
        \x20   except OSError: os._exit(0)\n\
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\n";
    fs::write(mount.path("lock.py"), posix).unwrap();
    shell(&mount.root(), "python3 lock.py");
}
