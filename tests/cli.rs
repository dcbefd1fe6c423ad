//! The command line's messages and exit codes for wrong input: none of it needs a mount or a key.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

const IO: i32 = 1;
const USAGE: i32 = 2;
const CONFIG: i32 = 3;
const NOT_A_VOLUME: i32 = 4;
const UNREACHABLE: i32 = 8;
const BUSY: i32 = 9;
const NOT_MOUNTED: i32 = 10;

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    /// Directories `back` and `mnt`, and a configuration that keeps everything below one directory.
    fn new() -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        for name in ["back", "mnt", "config"] {
            fs::create_dir(place.dir.path().join(name)).unwrap();
        }
        place.configure("");
        place
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn configure(&self, more: &str) {
        let config = format!(
            "[audit]\nfile = \"{}\"\n[log]\nfile = \"{}\"\n[run]\ndir = \"{}\"\n{more}",
            self.path("log/audit.jsonl"),
            self.path("log/byokfs.log"),
            self.path("run"),
        );
        fs::write(self.path("config/byokfs.toml"), config).unwrap();
    }

    fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(args)
            .env_remove("IDENTITY_ENDPOINT")
            .env("IDENTITY_HEADER", "of nobody")
            .env("BYOKFS_CONFIG", self.path("config/byokfs.toml"));
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(env!("CARGO_BIN_EXE_byokfs"), args).output().unwrap()
    }

    /// Fails with the code, and one message that begins with the program's name.
    #[track_caller]
    fn fails(&self, args: &[&str], code: i32) -> String {
        let output = self.run(args);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
        let message = message.strip_prefix("byokfs: ").unwrap_or_else(|| panic!("{message}"));
        message.trim_end().replace(self.dir.path().to_str().unwrap(), "DIR")
    }
}

#[test]
fn wrong_arguments() {
    let place = Place::new();
    let (back, mnt) = (place.path("back"), place.path("mnt"));
    for (args, part) in [
        (&["frobnicate"][..], "unrecognized subcommand 'frobnicate'"),
        (&["mount", &back], "<MNT>"),
        (&["init", &back], "--kek <URL>"),
        (&["status"], "<MNT|BACK>"),
        (&["mount", &back, &mnt, "-o", "bogus"], "mount option \"bogus\" is not one"),
        (&["mount", &back, &mnt, "-o", "config=x"], "config needs an absolute path"),
        (&["init", &back, "--kek", "not a url"], "not a url"),
        (&["init", &back, "--kek", "http://h/keys/k"], "https"),
        (&["init", &back, "--kek", "https://h/keys/k", "--log-size", "7MiB"], "at least 8MiB"),
        (&["log", "resize", &back, "8191KiB"], "at least 8MiB"),
        (&["log", "discard", &back, "--size", "4096B"], "at least 8MiB"),
        (&["__daemon", "/x"], ""),
    ] {
        if part.is_empty() {
            // Internal, and silent: it reports to whoever started it.
            assert_eq!(place.run(args).status.code(), Some(USAGE));
            continue;
        }
        let message = place.fails(args, USAGE);
        assert!(message.contains(part), "{args:?}: {message}");
    }
    assert_eq!(fs::read_dir(&back).unwrap().count(), 0);
}

#[test]
fn help_lists_the_exit_codes_and_hides_internal_verbs() {
    let output = Place::new().run(&["--help"]);
    assert!(output.status.success());
    let help = String::from_utf8(output.stdout).unwrap();
    for code in 0..=11 {
        assert!(help.lines().any(|line| line.starts_with(&format!("  {code:>2}  "))), "{code}");
    }
    assert!(!help.contains("__"), "{help}");
}

#[test]
fn not_a_volume() {
    let place = Place::new();
    let (back, mnt) = (place.path("back"), place.path("mnt"));
    for args in [&["info", &back][..], &["mount", &back, &mnt]] {
        let message = place.fails(args, NOT_A_VOLUME);
        assert_eq!(
            message,
            "DIR/back is not a byokfs volume; `byokfs init` makes one in an empty directory"
        );
    }
    let gone = place.path("gone");
    assert!(place.fails(&["info", &gone], IO).contains("DIR/gone"));
    assert!(place.fails(&["mount", &gone, &mnt], IO).contains("backing directory DIR/gone"));
}

#[test]
fn mount_points_that_are_refused_before_anything_else() {
    let place = Place::new();
    let (back, mnt) = (place.path("back"), place.path("mnt"));
    fs::write(Path::new(&mnt).join("file"), "").unwrap();
    let message = place.fails(&["mount", &back, &mnt], BUSY);
    assert_eq!(message, "the mount point DIR/mnt is not empty");
    let message = place.fails(&["mount", &back, &back], BUSY);
    assert!(message.contains("lie within each other"), "{message}");
    let missing = place.path("missing");
    assert!(place.fails(&["mount", &back, &missing], IO).contains("mount point DIR/missing"));
}

#[test]
fn paths_on_the_mount_itself_are_refused() {
    let place = Place::new();
    let (back, mnt) = (place.path("back"), place.path("mnt"));
    let socket = format!("{mnt}/mysql.sock");
    let message = place.fails(&["mount", &back, &mnt, "--fence-socket", &socket], CONFIG);
    assert_eq!(
        message,
        "fence.socket DIR/mnt/mysql.sock lies on the mount DIR/mnt itself: put it elsewhere"
    );
}

#[test]
fn configuration_mistakes_are_named_with_their_line() {
    let place = Place::new();
    let (back, mnt) = (place.path("back"), place.path("mnt"));
    for (more, part) in [
        ("speed = 3\n", "DIR/config/byokfs.toml:7: speed: unknown field `speed`"),
        ("[watcher]\ninterval = \"30\"\n", ":8: interval: \"30\" is not a duration"),
        ("[fence]\nenabled = true\n", "fence.enabled needs fence.socket or fence.pid_file"),
    ] {
        place.configure(more);
        let message = place.fails(&["mount", &back, &mnt], CONFIG);
        assert!(message.contains(part), "{message}");
    }
    let message = place.fails(&["status", &mnt, "--config", "/nonexistent.toml"], CONFIG);
    assert!(message.contains("cannot read the configuration /nonexistent.toml"), "{message}");
}

#[test]
fn an_empty_variable_names_no_configuration() {
    let place = Place::new();
    let mnt = place.path("mnt");
    let link = place.path("mount.byokfs");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_byokfs"), &link).unwrap();
    for args in [&["status", &mnt][..], &["umount", &mnt]] {
        let output =
            place.command(env!("CARGO_BIN_EXE_byokfs"), args).env("BYOKFS_CONFIG", "").output();
        assert_eq!(output.unwrap().status.code(), Some(NOT_MOUNTED), "{args:?}");
    }
    let remount = [&place.path("back"), &mnt, "-o", "remount,ro"];
    let output = place.command(&link, &remount).env("BYOKFS_CONFIG", "").output();
    assert_eq!(output.unwrap().status.code(), Some(NOT_MOUNTED));
}

#[test]
fn a_log_that_takes_nothing_is_named_and_not_waited_for() {
    let place = Place::new();
    let (back, mnt, log) = (place.path("back"), place.path("mnt"), place.path("log"));
    fs::create_dir(&log).unwrap();
    let log = format!("{log}/byokfs.log");
    rustix::fs::mkfifoat(rustix::fs::CWD, &log, rustix::fs::Mode::from(0o600)).unwrap();
    let message = place.fails(&["mount", &back, &mnt], IO);
    assert!(message.contains("cannot open the log DIR/log/byokfs.log"), "{message}");
}

#[test]
fn nothing_is_mounted() {
    let place = Place::new();
    for verb in ["status", "revalidate", "sync", "umount"] {
        for name in ["mnt", "back", "missing"] {
            let message = place.fails(&[verb, &place.path(name)], NOT_MOUNTED);
            assert_eq!(message, format!("no volume is mounted at DIR/{name}"));
        }
    }
}

#[test]
fn init_leaves_nothing_behind() {
    let place = Place::new();
    let back = place.path("back");
    place.configure("[key]\nidentity_endpoint = \"http://127.0.0.1:9/msi/token\"\n");
    let kek = "https://127.0.0.1:9/keys/kek";
    let new = place.path("new");
    for target in [&back, &new] {
        let message = place.fails(&["init", target, "--kek", kek], UNREACHABLE);
        assert!(message.contains("127.0.0.1:9"), "{message}");
    }
    assert_eq!(fs::read_dir(&back).unwrap().count(), 0);
    assert!(!Path::new(&new).exists());
    assert!(!Path::new(&place.path("config/volumes.d")).exists());
    fs::write(Path::new(&back).join("file"), "of somebody").unwrap();
    let message = place.fails(&["init", &back, "--kek", kek], BUSY);
    assert_eq!(message, "DIR/back is not empty; a volume needs an empty directory");
    assert!(Path::new(&back).join("file").exists());
}
