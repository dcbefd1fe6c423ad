//! Wrong input of every kind: a clear error, the documented exit code, nothing on disk changed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::support::process::Answer;
use crate::support::sandbox::{IDENTITY, KEY, Sandbox, path};
use crate::support::{can_mount, tree};

const IO: i32 = 1;
const USAGE: i32 = 2;
const CONFIG: i32 = 3;
const NOT_A_VOLUME: i32 = 4;
const UNSUPPORTED: i32 = 5;
const CORRUPT: i32 = 6;
const DENIED: i32 = 7;
const UNREACHABLE: i32 = 8;
const BUSY: i32 = 9;
const NOT_MOUNTED: i32 = 10;

/// A sandbox with a volume that holds one file and is not mounted.
fn unmounted() -> Sandbox {
    let sandbox = Sandbox::mounted();
    fs::write(sandbox.mnt().join("file"), "content").unwrap();
    sandbox.umount();
    sandbox
}

fn mount(sandbox: &Sandbox, back: &Path) -> Answer {
    sandbox.byokfs(&["mount", path(back), path(&sandbox.mnt())])
}

/// The mount is refused with `code` and a message that holds each of `words`.
#[track_caller]
fn refused(sandbox: &Sandbox, code: i32, words: &[&str]) {
    let before = tree::fingerprint(&sandbox.back());
    let message = mount(sandbox, &sandbox.back()).fails(code);
    for word in words {
        assert!(message.contains(word), "\"{word}\" is not in: {message}");
    }
    assert!(!sandbox.is_mounted(), "refused, and mounted: {message}");
    assert_eq!(
        tree::fingerprint(&sandbox.back()),
        before,
        "the refusal changed the backing directory"
    );
}

#[track_caller]
fn mounts_again(sandbox: &mut Sandbox) {
    sandbox.mount();
    assert_eq!(fs::read_to_string(sandbox.mnt().join("file")).unwrap(), "content");
    sandbox.umount();
}

fn flip(file: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn not_a_volume() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::bare();
    refused(&sandbox, NOT_A_VOLUME, &[path(&sandbox.back())]);
    sandbox.byokfs(&["info", path(&sandbox.back())]).fails(NOT_A_VOLUME);
    sandbox.byokfs(&["check-key", path(&sandbox.back())]).fails(NOT_A_VOLUME);
    fs::write(sandbox.back().join("a file"), "of somebody").unwrap();
    refused(&sandbox, NOT_A_VOLUME, &[path(&sandbox.back())]);
    let before = tree::fingerprint(&sandbox.back());
    let message = sandbox.init().fails(BUSY);
    assert!(message.contains("empty"), "{message}");
    assert_eq!(tree::fingerprint(&sandbox.back()), before);
}

#[test]
fn damaged_volume_header() {
    if !can_mount() {
        return;
    }
    let mut sandbox = unmounted();
    let header = sandbox.back().join("volume");
    let pristine = fs::read(&header).unwrap();
    for copy in 0..2 {
        fs::write(&header, &pristine).unwrap();
        flip(&header, copy * 4096 + 60);
        let info = sandbox.byokfs(&["info", path(&sandbox.back())]);
        assert_eq!(info.code, Some(0), "{info}");
        assert!((info.out.clone() + &info.err).contains("damaged"), "{info}");
        mounts_again(&mut sandbox);
    }
    fs::write(&header, &pristine).unwrap();
    flip(&header, 60);
    flip(&header, 4096 + 60);
    refused(&sandbox, CORRUPT, &["volume"]);
    fs::write(&header, b"").unwrap();
    refused(&sandbox, NOT_A_VOLUME, &[]);
    fs::write(&header, &pristine).unwrap();
    mounts_again(&mut sandbox);
}

/// Both header copies with other bytes in them and the checksum that belongs to these: what a later
/// version would write, since anybody can make the checksum.
fn rewrite_header(volume: &Path, at: usize, bytes: &[u8]) {
    let mut pages = fs::read(volume).unwrap();
    for copy in [0, 4096] {
        let record = &mut pages[copy..copy + 512];
        record[at..at + bytes.len()].copy_from_slice(bytes);
        let sum = ring::digest::digest(&ring::digest::SHA256, &record[32..]);
        record[..32].copy_from_slice(sum.as_ref());
    }
    fs::write(volume, pages).unwrap();
}

#[test]
fn a_newer_format_and_unknown_features() {
    if !can_mount() {
        return;
    }
    let mut sandbox = unmounted();
    let volume = sandbox.back().join("volume");
    let pristine = fs::read(&volume).unwrap();
    const VERSION: usize = 40;
    const FEATURES: usize = 48;
    for (at, bytes, word) in
        [(VERSION, &99u32.to_le_bytes()[..], "99"), (FEATURES, &[0, 0, 0, 0x80], "feature")]
    {
        rewrite_header(&volume, at, bytes);
        refused(&sandbox, UNSUPPORTED, &[word]);
        sandbox.byokfs(&["info", path(&sandbox.back())]).fails(UNSUPPORTED);
        fs::write(&volume, &pristine).unwrap();
    }
    // The checksum is right, and the volume key says that init did not write this.
    const CREATED: usize = 80;
    rewrite_header(&volume, CREATED, &[1]);
    refused(&sandbox, CORRUPT, &["volume"]);
    fs::write(&volume, &pristine).unwrap();
    mounts_again(&mut sandbox);
}

#[test]
fn another_volume_s_envelope() {
    if !can_mount() {
        return;
    }
    let mut sandbox = unmounted();
    // Anybody can wrap a key of his own with the public half of the KEK.
    let other = sandbox.path("other");
    sandbox.byokfs(&["init", path(&other), "--kek", &sandbox.kek()]).ok();
    let envelope = sandbox.back().join("envelope.json");
    let pristine = fs::read(&envelope).unwrap();
    fs::copy(other.join("envelope.json"), &envelope).unwrap();
    refused(&sandbox, CORRUPT, &["envelope"]);
    for broken in [&b"{}"[..], b"not json", b""] {
        fs::write(&envelope, broken).unwrap();
        refused(&sandbox, CORRUPT, &["envelope"]);
    }
    fs::write(&envelope, pristine).unwrap();
    mounts_again(&mut sandbox);
}

#[test]
fn the_key_is_another_one() {
    if !can_mount() {
        return;
    }
    let mut sandbox = unmounted();
    // The envelope made to name a key that never wrapped it.
    sandbox.create_key("second", &["--kty", "RSA", "--size", "3072"]);
    let envelope = sandbox.back().join("envelope.json");
    let pristine = fs::read_to_string(&envelope).unwrap();
    let version = sandbox.vault(&["key", "show", "--name", "second", "--json"]);
    let version = between(&version, "/keys/second/", "\"");
    let own = between(&pristine, &format!("/keys/{KEY}/"), "\"");
    let renamed = pristine.replace(&format!("/keys/{KEY}"), "/keys/second").replace(own, version);
    fs::write(&envelope, renamed).unwrap();
    let before = tree::fingerprint(&sandbox.back());
    // This host knows the volume with another key version: mounted, it stays shut.
    sandbox.mount();
    assert_eq!(sandbox.status()["reason"], "NotConfirmed");
    assert!(fs::read_dir(sandbox.mnt()).is_err());
    // Nor does it open when a person accepts that version: its key is not this volume's.
    let mnt = sandbox.mnt();
    let accepted = format!("{}/{version}", sandbox.key_url("second"));
    for more in [&[][..], &["--accept-key", &accepted]] {
        let answer = sandbox.byokfs(&[&["revalidate", path(&mnt)], more].concat());
        assert!(matches!(answer.code, Some(CORRUPT | DENIED)), "{answer}");
        assert_eq!(sandbox.state(), "Inaccessible");
    }
    sandbox.umount();
    assert_eq!(tree::fingerprint(&sandbox.back()), before);
    fs::write(&envelope, pristine).unwrap();
    mounts_again(&mut sandbox);
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
    let from = text.find(before).unwrap_or_else(|| panic!("{before} in {text}")) + before.len();
    &text[from..from + text[from..].find(after).unwrap()]
}

#[test]
fn a_key_that_init_cannot_use() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::bare();
    let empty = tree::fingerprint(&sandbox.back());
    let init = |url: &str, code: i32, word: &str| {
        let message = sandbox.byokfs(&["init", path(&sandbox.back()), "--kek", url]).fails(code);
        assert!(message.contains(word), "\"{word}\" is not in: {message}");
        assert_eq!(tree::fingerprint(&sandbox.back()), empty, "{message}");
    };
    sandbox.create_key("for-signing", &["--ops", "sign,verify"]);
    init(&sandbox.key_url("for-signing"), DENIED, "wrapKey");
    init(&sandbox.key_url("no-such-key"), DENIED, "no-such-key");
    init("not a url", USAGE, "not a url");
    init("http://127.0.0.1:9/keys/plain", USAGE, "https");
    sandbox.enable_key(false);
    init(&sandbox.kek(), DENIED, "disabled");
    sandbox.enable_key(true);
    sandbox.vault(&["revoke", "--identity", IDENTITY, "--key-permissions", "unwrapKey"]);
    init(&sandbox.kek(), DENIED, "unwrap");
    sandbox.vault(&["grant", "--identity", IDENTITY, "--key-permissions", "unwrapKey"]);
    sandbox.init().ok();
}

#[test]
fn the_vault_is_down() {
    if !can_mount() {
        return;
    }
    let mut sandbox = unmounted();
    let url = sandbox.url();
    sandbox.stop_vault();
    refused(&sandbox, UNREACHABLE, &[url.trim_start_matches("https://")]);
    let message = sandbox.byokfs(&["vault", "key", "show", "--name", KEY]).fails(UNREACHABLE);
    assert!(message.contains("vault serve"), "{message}");
    sandbox.start_vault();
    mounts_again(&mut sandbox);
}

#[test]
fn untrusted_tls() {
    if !can_mount() {
        return;
    }
    let sandbox = unmounted();
    let config = sandbox.path("config/byokfs.toml");
    let text = fs::read_to_string(&config).unwrap();
    let without: Vec<&str> = text.lines().filter(|line| !line.starts_with("ca_file")).collect();
    fs::write(&config, without.join("\n")).unwrap();
    refused(&sandbox, UNREACHABLE, &["certificate"]);
    fs::write(sandbox.path("config/empty.pem"), "").unwrap();
    let other = text.replace("vault/ca.pem", "config/empty.pem");
    fs::write(&config, other).unwrap();
    refused(&sandbox, CONFIG, &["empty.pem"]);
}

#[test]
fn the_token_is_refused() {
    if !can_mount() {
        return;
    }
    let mut sandbox = unmounted();
    let header = sandbox.path("config/identity.header");
    let pristine = fs::read(&header).unwrap();
    fs::write(&header, "not the secret").unwrap();
    refused(&sandbox, DENIED, &["identity"]);
    let text = mount(&sandbox, &sandbox.back()).err;
    assert!(!text.contains("not the secret"), "a secret in a message: {text}");
    fs::write(&header, &pristine).unwrap();
    sandbox.vault(&["identity", "delete", IDENTITY]);
    refused(&sandbox, DENIED, &[]);
    // Another identity's right secret, without a grant.
    sandbox.create_identity(IDENTITY);
    sandbox.configure("");
    refused(&sandbox, DENIED, &[]);
    sandbox.vault(&[
        "grant",
        "--identity",
        IDENTITY,
        "--key-permissions",
        "get,list,wrapKey,unwrapKey",
    ]);
    mounts_again(&mut sandbox);
}

#[test]
fn mount_points_that_cannot_be_used() {
    if !can_mount() {
        return;
    }
    let mut sandbox = unmounted();
    let mnt = sandbox.mnt();
    fs::write(mnt.join("something"), "").unwrap();
    refused(&sandbox, BUSY, &["not empty", path(&mnt)]);
    fs::remove_file(mnt.join("something")).unwrap();
    let back = sandbox.back();
    let at = |mnt: &Path, code| sandbox.byokfs(&["mount", path(&back), path(mnt)]).fails(code);
    at(&sandbox.path("missing"), IO);
    at(&sandbox.path("config/byokfs.toml"), IO);
    at(&back, BUSY);

    sandbox.mount();
    let second = sandbox.path("second");
    fs::create_dir(&second).unwrap();
    let before = tree::fingerprint(&sandbox.back());
    // The volume is mounted, here and for a second mount elsewhere.
    let message = mount(&sandbox, &sandbox.back()).fails(BUSY);
    assert!(message.contains(path(&mnt)), "{message}");
    let message = sandbox.byokfs(&["mount", path(&sandbox.back()), path(&second)]).fails(BUSY);
    assert!(message.contains(path(&sandbox.back())), "{message}");
    // Another volume does not go on top.
    let other = sandbox.path("other");
    sandbox.byokfs(&["init", path(&other), "--kek", &sandbox.kek()]).ok();
    mount(&sandbox, &other).fails(BUSY);
    assert_eq!(tree::fingerprint(&sandbox.back()), before);
    assert_eq!(sandbox.state(), "Available");
    sandbox.byokfs(&["mount", path(&other), path(&second)]).ok();
    assert_eq!(fs::read_to_string(mnt.join("file")).unwrap(), "content");
    assert_eq!(fs::read_dir(&second).unwrap().count(), 0);
    sandbox.byokfs(&["umount", path(&second)]).ok();
    sandbox.umount();
}

#[test]
fn a_busy_mount_point() {
    if !can_mount() {
        return;
    }
    let sandbox = unmounted();
    let _inside = std::process::Command::new("sleep").arg("60").current_dir(sandbox.mnt()).spawn();
    let mut inside = _inside.unwrap();
    // A process that stands in the directory below keeps the mount from nothing: it goes on top.
    let answer = mount(&sandbox, &sandbox.back());
    inside.kill().unwrap();
    inside.wait().unwrap();
    assert_eq!(answer.code, Some(0), "{answer}");
    sandbox.umount();
}

#[test]
fn nothing_is_mounted_there() {
    if !can_mount() {
        return;
    }
    let sandbox = unmounted();
    for verb in ["status", "revalidate", "sync", "umount"] {
        for target in [sandbox.mnt(), sandbox.back(), sandbox.path("missing")] {
            sandbox.byokfs(&[verb, path(&target)]).fails(NOT_MOUNTED);
        }
    }
}

#[test]
fn a_configuration_with_mistakes() {
    if !can_mount() {
        return;
    }
    let sandbox = unmounted();
    for (more, words) in [
        ("speed = 3", &["speed"][..]),
        ("interval = \"30 parsecs\"", &["interval", "30 parsecs"]),
        ("interval = 30", &["interval"]),
        ("interval = \"0s\"", &["interval"]),
        ("interval = \"1h\"\nmax_staleness = \"1m\"", &["max_staleness"]),
        ("[fence]\nenabled = true", &["fence"]),
        ("[mount]\nerrno = \"enoent\"", &["errno"]),
        ("[nonsense]\na = 1", &["nonsense"]),
        ("not toml", &["byokfs.toml"]),
    ] {
        sandbox.configure(more);
        refused(&sandbox, CONFIG, words);
    }
    sandbox.configure("");
    let missing = sandbox.path("config/missing.toml");
    let answer = sandbox.byokfs(&[
        "mount",
        path(&sandbox.back()),
        path(&sandbox.mnt()),
        "--config",
        path(&missing),
    ]);
    assert!(matches!(answer.code, Some(CONFIG | IO)), "{answer}");
}

#[test]
fn wrong_arguments() {
    if !can_mount() {
        return;
    }
    let sandbox = unmounted();
    for arguments in [
        &["mount"][..],
        &["mount", "a", "b", "c"],
        &["frobnicate"],
        &["mount", path(&sandbox.back()), path(&sandbox.mnt()), "-o", "bogus"],
        &["init", path(&sandbox.back())],
    ] {
        sandbox.byokfs(arguments).fails(USAGE);
    }
    let help = sandbox.byokfs(&["--help"]).ok();
    for code in 0..12 {
        assert!(help.contains(&format!("{code}  ")), "exit code {code} is not in --help");
    }
}
