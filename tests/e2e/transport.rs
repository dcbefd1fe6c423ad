//! How requests come from the kernel: as asked for, as the kernel allows, and shown by status.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::support::can_mount;
use crate::support::sandbox::Sandbox;

/// Root can allow it, for every mount that is made afterwards.
fn ring_is_allowed() -> bool {
    let parameter = fs::read_to_string("/sys/module/fuse/parameters/enable_uring");
    parameter.is_ok_and(|value| value.trim() == "Y")
}

fn transport_of(sandbox: &Sandbox) -> String {
    let file = sandbox.mnt().join("file");
    fs::write(&file, vec![5; 3 << 20]).unwrap();
    assert_eq!(fs::metadata(&file).unwrap().size(), 3 << 20);
    assert!(fs::read(&file).unwrap().iter().all(|&byte| byte == 5));
    sandbox.status()["transport"].as_str().unwrap().to_owned()
}

#[test]
fn the_ring_is_taken_where_the_kernel_allows_it_and_the_device_where_it_is_asked_for() {
    if !can_mount() {
        return;
    }
    let best = if ring_is_allowed() { "uring" } else { "dev" };
    for (asked, found) in [("auto", best), ("dev", "dev")] {
        let config = format!("[mount]\ntransport = \"{asked}\"\n");
        assert_eq!(transport_of(&Sandbox::mounted_with(&config)), found, "{asked}");
    }
}

#[test]
fn who_asks_for_the_ring_gets_it_or_an_error_that_says_how() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::bare();
    sandbox.configure("[mount]\ntransport = \"uring\"\nthreads = 5\n");
    sandbox.init().ok();
    let answer = sandbox.try_mount();
    if ring_is_allowed() {
        answer.ok();
        assert_eq!(transport_of(&sandbox), "uring");
        return;
    }
    let error = answer.fails(5);
    assert!(error.contains("/sys/module/fuse/parameters/enable_uring"), "{error}");
    assert!(!sandbox.is_mounted());
}
