//! POSIX access control lists.

use crate::harness::{mounted, shell, shell_as};

const USER: u32 = 12_345;

#[test]
fn a_list_lets_a_user_in_and_shows_in_the_mode() {
    let mount = mounted!();
    let root = mount.root();
    shell(&root, "chmod 755 .; echo secret > f; chmod 640 f");
    assert!(!shell_as(USER, USER, &root, "cat f").status.success());
    shell(&root, &format!("setfacl -m u:{USER}:r f"));
    assert_eq!(shell_as(USER, USER, &root, "cat f").stdout, b"secret\n");
    assert_eq!(shell(&root, "stat -c %a f; ls -l f | cut -c11"), "640\n+\n");
    shell(&root, "setfacl -b f");
    assert!(!shell_as(USER, USER, &root, "cat f").status.success());
}

#[test]
fn a_default_list_is_inherited_and_the_umask_does_not_apply() {
    let mount = mounted!();
    let script = format!(
        "mkdir d; setfacl -d -m u:{USER}:rwx,g::rx,o::- d; umask 077; touch d/f; mkdir d/s; \
         getfacl -cn d/f d/s 2>/dev/null"
    );
    let mut plain = shell(&mount.root(), &script);
    let there = tempfile::tempdir().unwrap();
    assert_eq!(plain, shell(there.path(), &script), "as on the plain file system");
    plain.retain(|c| c != '\n');
    assert!(plain.contains(&format!("user:{USER}:rwx")));
}

#[test]
fn a_set_group_id_directory_with_a_default_list_keeps_its_group() {
    let mount = mounted!();
    let script = "mkdir d; chgrp 1234 d; chmod 2770 d; setfacl -d -m g:77:rw d; touch d/f; \
                  mkdir d/s; stat -c '%n %g %a' d/f d/s; getfacl -cn d/f d/s";
    let there = tempfile::tempdir().unwrap();
    assert_eq!(shell(&mount.root(), script), shell(there.path(), script));
}

#[test]
fn setting_a_list_drops_the_set_group_id_bit_of_a_foreign_group() {
    let mount = mounted!();
    let root = mount.root();
    shell(&root, &format!("chmod 777 .; touch f; chown {USER}:55 f; chmod 2775 f"));
    let output = shell_as(USER, USER, &root, "setfacl -m u:1:r f; stat -c %a f");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "775\n");
}
