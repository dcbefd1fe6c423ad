//! `byokfs fsck` on volumes of a real mount: exit codes, what programs read, and what it leaves
//! alone.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::process::{Answer, run};
use crate::support::sandbox::{Sandbox, path};
use crate::support::server::Site;
use crate::support::writer::{self, AckedWriters};
use crate::support::{can_mount, can_run_mariadb, has, tree};

const CORRECTED: i32 = 1;
const LEFT: i32 = 4;
const OPERATIONAL: i32 = 8;
const USAGE: i32 = 16;

const PAGE: u64 = 4096;
/// docs/FORMAT.md.
const FIRST_BLOCK: u64 = 4 * PAGE;

/// A volume with a file and a long name in a directory, unmounted, and where the file is.
fn unmounted() -> (Sandbox, PathBuf) {
    let sandbox = Sandbox::mounted();
    fs::create_dir(sandbox.mnt().join("dir")).unwrap();
    fs::write(sandbox.mnt().join("dir").join("n".repeat(250)), "long").unwrap();
    let before = tree::files(&sandbox.tree());
    fs::write(sandbox.mnt().join("file"), vec![7; 100_000]).unwrap();
    let after = tree::files(&sandbox.tree());
    let file = after.into_iter().find(|path| !before.contains(path)).unwrap();
    sandbox.umount();
    (sandbox, file)
}

fn fsck(sandbox: &Sandbox, args: &[&str]) -> Answer {
    sandbox.byokfs(&[&["fsck"], args, &[path(&sandbox.back())]].concat())
}

/// The findings and the summary.
#[track_caller]
fn lines(answer: &Answer) -> (Vec<Value>, Value) {
    let mut lines: Vec<Value> = answer
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {answer}")))
        .collect();
    let summary = lines.pop().unwrap_or_else(|| panic!("{answer}"));
    assert_eq!(summary["type"], "summary", "{answer}");
    assert!(lines.iter().all(|line| line["type"] == "finding"), "{answer}");
    (lines, summary)
}

#[track_caller]
fn code(answer: &Answer, code: i32) {
    assert_eq!(answer.code, Some(code), "{answer}");
}

fn flip(file: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// The end of the last repair, after its start; it came to its end.
#[track_caller]
fn repair_event(sandbox: &Sandbox) -> Value {
    let mut events = sandbox.audit("VolumeRepaired");
    let last = events.pop().unwrap();
    assert_eq!(last["status"], "Succeeded", "{last}");
    assert!(last["volume"].is_string() && last["error"].is_null(), "{last}");
    assert_eq!(events.pop().unwrap()["status"], "Started");
    last
}

#[test]
fn exit_codes_and_what_is_said() {
    if !can_mount() {
        return;
    }
    let (mut sandbox, file) = unmounted();
    let before = tree::fingerprint(&sandbox.back());
    let answer = fsck(&sandbox, &[]);
    code(&answer, 0);
    assert!(answer.out.contains("2 files") && answer.out.contains("clean"), "{answer}");
    assert_eq!(answer.err, "", "no bar but on a terminal");
    let (findings, summary) = lines(&fsck(&sandbox, &["--json"]));
    assert!(findings.is_empty());
    assert_eq!((&summary["exit_code"], &summary["key"]), (&0.into(), &true.into()));
    assert_eq!(summary["blocks"], 26);
    assert_eq!(fsck(&sandbox, &["--quiet"]).out, "");

    flip(&file, FIRST_BLOCK + 5);
    let answer = fsck(&sandbox, &[]);
    code(&answer, LEFT);
    assert!(answer.out.starts_with("error: block: /file, bytes 0 to 4095: "), "{answer}");
    assert!(answer.out.contains(path(&file)) && answer.out.contains("byte 16384"), "{answer}");
    let answer = fsck(&sandbox, &["--json"]);
    code(&answer, LEFT);
    let (findings, summary) = lines(&answer);
    assert_eq!(findings.len(), 1);
    let finding = &findings[0];
    assert_eq!((&finding["severity"], &finding["code"]), (&"error".into(), &"block".into()));
    assert_eq!((&finding["path"], &finding["at"]), (&"/file".into(), &FIRST_BLOCK.into()));
    assert_eq!((&finding["from"], &finding["to"]), (&0.into(), &PAGE.into()));
    assert_eq!(finding["backing_path"], path(&file));
    assert_eq!((&summary["left"], &summary["exit_code"]), (&1.into(), &LEFT.into()));
    assert!(sandbox.audit("VolumeRepaired").is_empty(), "a check changes nothing");
    let repaired = fsck(&sandbox, &["--repair"]);
    code(&repaired, LEFT);
    let last = repair_event(&sandbox);
    assert_eq!(
        (&last["repaired"], &last["errors"], &last["left"]),
        (&0.into(), &1.into(), &1.into())
    );
    flip(&file, FIRST_BLOCK + 5);
    assert_eq!(tree::fingerprint(&sandbox.back()), before, "something has changed");

    flip(&file, 60);
    code(&fsck(&sandbox, &[]), LEFT);
    let answer = fsck(&sandbox, &["--repair"]);
    code(&answer, CORRECTED);
    assert!(answer.out.contains("header-copy") && answer.out.contains("repaired"), "{answer}");
    code(&fsck(&sandbox, &[]), 0);
    flip(&file, 60);
    flip(&file, FIRST_BLOCK + 5);
    code(&fsck(&sandbox, &["--repair"]), CORRECTED + LEFT);
    let last = repair_event(&sandbox);
    assert_eq!((&last["repaired"], &last["left"]), (&1.into(), &1.into()));
    assert_eq!((&last["moves"], &last["quarantined"]), (&true.into(), &0.into()));
    flip(&file, FIRST_BLOCK + 5);
    sandbox.mount();
    assert!(fs::read(sandbox.mnt().join("file")).unwrap() == vec![7; 100_000]);
}

#[test]
fn a_repair_that_cannot_be_done_says_so_in_the_audit_trail() {
    if !can_mount() {
        return;
    }
    let (sandbox, _) = unmounted();
    fs::remove_file(sandbox.back().join("log.bulk")).unwrap();
    let before = tree::fingerprint(&sandbox.back());
    code(&fsck(&sandbox, &["--repair"]), LEFT);
    let events = sandbox.audit("VolumeRepaired");
    let last = events.last().unwrap();
    assert_eq!((&last["status"], &last["left"]), (&"Failed".into(), &1.into()));
    assert!(last["error"].as_str().unwrap().contains("log"), "{last}");
    assert_eq!(tree::fingerprint(&sandbox.back()), before, "something has changed");
}

#[test]
fn what_cannot_be_checked() {
    if !can_mount() {
        return;
    }
    let mut sandbox = Sandbox::mounted();
    for args in [&[][..], &["--no-key"], &["--repair"]] {
        for target in [sandbox.back(), sandbox.mnt()] {
            let args = [&["fsck"], args, &[path(&target)]].concat();
            let message = sandbox.byokfs(&args).fails(OPERATIONAL);
            assert!(message.contains(&format!("umount {}", sandbox.mnt().display())), "{message}");
        }
    }
    // A mount that is out of sight all the same.
    let daemon = sandbox.daemon();
    run("umount", &["--lazy", path(&sandbox.mnt())]);
    if crate::support::process::alive(daemon) {
        let answer = fsck(&sandbox, &["--no-key"]);
        assert!(matches!(answer.code, Some(0 | OPERATIONAL)), "{answer}");
    }
    crate::support::until("the daemon to end", || !crate::support::process::alive(daemon));

    fsck(&sandbox, &["--bogus"]).fails(USAGE);
    fsck(&sandbox, &["--repair", "--no-key"]).fails(USAGE);
    sandbox.byokfs(&["fsck"]).fails(USAGE);
    let empty = sandbox.path("empty");
    fs::create_dir(&empty).unwrap();
    sandbox.byokfs(&["fsck", path(&empty)]).fails(OPERATIONAL);
    sandbox.byokfs(&["fsck", path(&sandbox.path("gone"))]).fails(OPERATIONAL);

    // Both copies of the volume header: found, and the end of it.
    let header = sandbox.back().join("volume");
    [70, PAGE + 70].iter().for_each(|&at| flip(&header, at));
    let answer = fsck(&sandbox, &["--json"]);
    code(&answer, LEFT);
    assert_eq!(lines(&answer).0[0]["code"], "volume-header");
    [70, PAGE + 70].iter().for_each(|&at| flip(&header, at));
    sandbox.mount();
}

#[test]
fn a_key_that_is_not_to_be_had() {
    if !can_mount() {
        return;
    }
    let (mut sandbox, file) = unmounted();
    let before = tree::fingerprint(&sandbox.back());
    let refused = |sandbox: &Sandbox, word: &str| {
        for args in [&[][..], &["--repair"]] {
            let message = fsck(sandbox, args).fails(OPERATIONAL);
            assert!(message.contains(word) && message.contains("--no-key"), "{message}");
            let events = sandbox.audit("VolumeRepaired");
            if let Some(last) = events.last() {
                assert_eq!((&last["status"], &last["repaired"]), (&"Failed".into(), &0.into()));
                assert!(last["error"].is_string(), "{last}");
            }
            assert_eq!(tree::fingerprint(&sandbox.back()), before, "something has changed");
        }
    };
    sandbox.enable_key(false);
    refused(&sandbox, "disabled");
    sandbox.enable_key(true);
    sandbox.stop_vault();
    refused(&sandbox, "cannot reach the key service");
    assert_eq!(sandbox.audit("VolumeRepaired").len(), 4, "two repairs, each with start and end");
    // Nor is a configuration needed, or one that makes sense.
    let config = sandbox.path("config/byokfs.toml");
    let text = fs::read(&config).unwrap();
    fs::write(&config, "nonsense").unwrap();
    refused(&sandbox, "byokfs.toml");
    let answer = fsck(&sandbox, &["--no-key"]);
    code(&answer, 0);
    assert!(answer.out.contains("not checked without the key"), "{answer}");
    let (_, summary) = lines(&fsck(&sandbox, &["--no-key", "--json"]));
    assert!(summary["not_checked"].as_array().unwrap().len() > 2);
    assert_eq!((&summary["key"], &summary["blocks"]), (&false.into(), &26.into()));
    flip(&file, 20);
    let answer = fsck(&sandbox, &["--no-key", "--json"]);
    code(&answer, LEFT);
    assert_eq!(lines(&answer).0[0]["code"], "header-copy");
    flip(&file, 20);
    fs::write(&config, text).unwrap();
    assert_eq!(tree::fingerprint(&sandbox.back()), before, "something has changed");
}

#[test]
fn a_copy_that_nobody_has_confirmed() {
    if !can_mount() {
        return;
    }
    let (mut sandbox, _) = unmounted();
    let copy = sandbox.path("copy");
    run("cp", &["-a", path(&sandbox.back()), path(&copy)]);
    sandbox.set_back(copy);
    let message = fsck(&sandbox, &[]).fails(OPERATIONAL);
    assert!(message.contains("revalidate"), "{message}");
    code(&fsck(&sandbox, &["--no-key"]), 0);
}

#[test]
fn as_fsck_8_calls_it() {
    if !can_mount() {
        return;
    }
    let (sandbox, file) = unmounted();
    let bin = sandbox.path("bin");
    fs::create_dir(&bin).unwrap();
    let link = bin.join("fsck.byokfs");
    symlink(sandbox.command().get_program(), &link).unwrap();
    let command = |program: &Path| {
        let mut command = Command::new(program);
        command.env("BYOKFS_CONFIG", sandbox.path("config/byokfs.toml"));
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", bin.display()));
        command
    };
    let called = |args: &[&str]| {
        let mut helper = command(&link);
        helper.arg0("fsck.byokfs").args(args).arg(sandbox.back());
        Answer::of(&mut helper)
    };
    code(&called(&[]), 0);
    code(&called(&["-x"]), USAGE);
    flip(&file, 60);
    fs::write(sandbox.tree().join("not!ours"), "").unwrap();
    code(&called(&["-n", "-C0"]), LEFT);
    // The safe repair restores the copy and moves nothing.
    code(&called(&["-a"]), CORRECTED + LEFT);
    assert!(sandbox.tree().join("not!ours").exists());
    let last = repair_event(&sandbox);
    assert_eq!((&last["moves"], &last["repaired"]), (&false.into(), &1.into()));
    if has("fsck") {
        let mut fsck = command(Path::new("fsck"));
        fsck.args(["-t", "byokfs", path(&sandbox.back()), "--", "-y"]);
        code(&Answer::of(&mut fsck), CORRECTED);
        let mut fsck = command(Path::new("fsck"));
        code(&Answer::of(fsck.args(["-t", "byokfs", path(&sandbox.back())])), 0);
    } else {
        code(&called(&["-y"]), CORRECTED);
    }
    let manifest = fs::read_to_string(sandbox.back().join("lost/manifest.jsonl")).unwrap();
    assert!(manifest.contains("not!ours"), "{manifest}");
    let last = repair_event(&sandbox);
    assert_eq!((&last["moves"], &last["quarantined"]), (&true.into(), &1.into()));
    assert_eq!(last["paths"], json!([path(&sandbox.tree().join("not!ours"))]));
}

#[test]
fn a_database_after_everything_was_killed() {
    if !can_run_mariadb() {
        return;
    }
    let mut site = Site::running(&["--innodb-flush-method=O_DIRECT"], "");
    let writers = AckedWriters::start(&site.server, 2, 0);
    writers.until(150);
    assert!(site.sandbox.kill_everything());
    site.server.kill9();
    let acked = writers.finish();
    if site.sandbox.is_mounted() {
        run("umount", &["--lazy", path(&site.sandbox.mnt())]);
    }
    let before = tree::fingerprint(&site.sandbox.back());
    let answer = fsck(&site.sandbox, &["--json"]);
    code(&answer, 0);
    let (findings, summary) = lines(&answer);
    assert!(findings.iter().all(|finding| finding["severity"] == "note"), "{answer}");
    assert!(findings.iter().any(|finding| finding["code"] == "log-pending"), "{answer}");
    assert!(summary["files"].as_u64() > Some(50));
    code(&fsck(&site.sandbox, &["--no-key"]), 0);
    assert_eq!(tree::fingerprint(&site.sandbox.back()), before, "something has changed");
    code(&fsck(&site.sandbox, &["--repair"]), CORRECTED);
    code(&fsck(&site.sandbox, &["--quiet"]), 0);
    site.sandbox.mount();
    site.server.start();
    writer::assert_all_there(&site.server, &acked);
}
