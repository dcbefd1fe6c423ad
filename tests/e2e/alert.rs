//! The alert hook on a real volume: every change of state reaches it, and it delays none.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::process::{alive, signal};
use crate::support::sandbox::{KEY, Sandbox, path};
use crate::support::{can_mount, has, until};

fn install(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
}

/// Mounted, with a hook of this text.
fn with_hook(text: impl Fn(&Sandbox) -> String, more: &str) -> Sandbox {
    let sandbox = Sandbox::bare();
    let hook = sandbox.path("config/hook");
    install(&hook, &text(&sandbox));
    let config = format!("{more}[alert]\ncommand = \"{}\"\n", path(&hook));
    sandbox.and_mounted(&config)
}

/// The events that a hook which appends them has got.
fn events(file: &Path) -> Vec<(String, String)> {
    let text = |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
    fs::read_to_string(file)
        .unwrap_or_default()
        .lines()
        .map(|line| serde_json::from_str(line).expect("an event that is not JSON"))
        .map(|event: Value| {
            // That of a daemon that died is its exit status.
            let stage = text(&event, "status");
            let stage = if stage.starts_with("signal") { String::new() } else { stage };
            (text(&event, "event"), stage)
        })
        .collect()
}

fn collected(sandbox: &Sandbox) -> PathBuf {
    sandbox.path("log/alerts")
}

#[test]
fn each_change_of_state_reaches_it_in_order() {
    if !can_mount() {
        return;
    }
    let hook = |sandbox: &Sandbox| format!("#!/bin/sh\ncat >>'{}'\n", path(&collected(sandbox)));
    let mut sandbox = with_hook(hook, "");
    let soon = time::OffsetDateTime::now_utc() + time::Duration::days(5);
    let soon = soon.replace_nanosecond(0).unwrap();
    let soon = soon.format(&time::format_description::well_known::Rfc3339).unwrap();
    sandbox.vault(&["key", "set-attributes", "--name", KEY, "--expires", &soon]);
    until("the warning", || !sandbox.audit("KeyExpiryWarning").is_empty());
    assert_eq!(sandbox.audit("KeyExpiryWarning")[0]["days"], 7);
    assert!(sandbox.status()["kek_expires"].as_str().unwrap().starts_with(&soon[..10]));
    sandbox.revoke();
    sandbox.recover();
    let file = collected(&sandbox);
    // What waits in the daemon's queue dies with it.
    until("the recovery's end", || {
        events(&file).contains(&("MakeAccessible".into(), "Succeeded".into()))
    });
    let daemon = sandbox.daemon();
    signal(daemon, Signal::KILL);
    until("the end of the mount", || !alive(daemon) && !sandbox.is_mounted());
    sandbox.mount();
    sandbox.umount();
    let expected = [
        ("VolumeMounted", ""),
        ("KeyExpiryWarning", ""),
        ("MakeInaccessible", "Started"),
        ("MakeInaccessible", "Succeeded"),
        ("MakeAccessible", "Started"),
        ("MakeAccessible", "Succeeded"),
        ("DaemonDied", ""),
        ("VolumeUnmounted", ""),
        ("VolumeMounted", ""),
        ("KeyExpiryWarning", ""),
        ("VolumeUnmounted", ""),
    ];
    let expected = expected.map(|(event, status)| (event.to_owned(), status.to_owned()));
    until("every event", || events(&file).len() >= expected.len());
    // The warning comes with the first probe after a start, before or after the mount is told.
    let sorted = |mut events: Vec<_>| {
        events.sort();
        events
    };
    assert_eq!(sorted(events(&file)), sorted(expected.to_vec()));
    let changes = |events: &[(String, String)]| -> Vec<_> {
        let change = |event: &&(String, String)| event.0.starts_with("Make");
        events.iter().filter(change).cloned().collect()
    };
    assert_eq!(changes(&events(&file)), changes(&expected));
}

#[test]
fn one_that_hangs_delays_neither_cut_off_nor_recovery_nor_unmount() {
    if !can_mount() {
        return;
    }
    let hook = |sandbox: &Sandbox| {
        let pids = sandbox.path("log/pids");
        format!("#!/bin/sh\necho $$ >>'{}'\ntrap '' TERM\nsleep 600\n", path(&pids))
    };
    let sandbox = with_hook(hook, "");
    let pids = || fs::read_to_string(sandbox.path("log/pids")).unwrap_or_default();
    until("the hook to hang", || !pids().is_empty());
    for round in 1..=3 {
        sandbox.revoke();
        let done = || {
            let events = sandbox.audit("MakeInaccessible");
            let done = events.iter().filter(|event| event["status"] == "Succeeded");
            done.cloned().collect::<Vec<_>>()
        };
        until("the end of the cut-off", || done().len() == round);
        let took = done()[round - 1]["gate_shut_after_milliseconds"].as_u64().unwrap();
        assert!(took < 5000, "{took} ms");
        sandbox.recover();
    }
    sandbox.umount();
    for pid in pids().lines() {
        signal(pid.parse().unwrap(), Signal::KILL);
    }
}

#[test]
fn the_example_posts_to_a_webhook() {
    if !can_mount() || !has("curl") {
        return;
    }
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let heard = std::thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let (mut request, mut chunk) = (Vec::new(), [0; 4096]);
        // The event's line ends the body.
        while !request.ends_with(b"}\n") {
            let count = stream.read(&mut chunk).unwrap();
            assert!(count > 0, "{}", String::from_utf8_lossy(&request));
            request.extend_from_slice(&chunk[..count]);
        }
        stream.write_all(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n").unwrap();
        String::from_utf8(request).unwrap()
    });
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/config/alert-webhook");
    let example = fs::read_to_string(example).unwrap();
    let hook = |sandbox: &Sandbox| {
        let conf = sandbox.path("config/webhook.conf");
        fs::write(&conf, format!("url = \"http://{address}/hook\"\n")).unwrap();
        assert!(example.contains("/etc/byokfs/webhook.conf"));
        example.replace("/etc/byokfs/webhook.conf", path(&conf))
    };
    let sandbox = with_hook(hook, "");
    let request = heard.join().unwrap();
    assert!(request.starts_with("POST /hook HTTP/1.1\r\n"), "{request}");
    assert!(request.contains("Content-Type: application/json"), "{request}");
    let (_, body) = request.split_once("\r\n\r\n").unwrap();
    let event: Value = serde_json::from_str(body).unwrap();
    assert_eq!(
        (&event["event"], &event["mount"]),
        (&"VolumeMounted".into(), &path(&sandbox.mnt()).into())
    );
}
