//! What lies in the backing directory: no row, no name.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use rustix::fs::{XattrFlags, setxattr};

use crate::support::sandbox::{Sandbox, path};
use crate::support::server::Site;
use crate::support::tree::holding;
use crate::support::{can_mount, can_run_mariadb};

/// Also in other encodings: a name that is only base64 is no secret.
fn forms(word: &str) -> Vec<Vec<u8>> {
    use base64::Engine;
    use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
    // At each of the three positions that a word can have in a base64 text, its inner part.
    let shifted = (0..3).flat_map(|shift| {
        let padded = [&vec![b'x'; shift], word.as_bytes(), b"xxx"].concat();
        [STANDARD_NO_PAD.encode(&padded), URL_SAFE_NO_PAD.encode(&padded)]
            .map(|text| text.as_bytes()[4..text.len() - 6].to_vec())
    });
    let hex: String = word.bytes().map(|byte| format!("{byte:02x}")).collect();
    [word.as_bytes().to_vec(), hex.into_bytes()].into_iter().chain(shifted).collect()
}

#[track_caller]
fn assert_hidden(sandbox: &Sandbox, word: &str) {
    for form in forms(word) {
        let found: Vec<PathBuf> = holding(&sandbox.back(), &form);
        assert!(found.is_empty(), "{:?} in {found:?}", String::from_utf8_lossy(&form));
        let found = holding(&sandbox.path("log"), &form);
        assert!(found.is_empty(), "{:?} in a log: {found:?}", String::from_utf8_lossy(&form));
    }
}

#[test]
fn no_content_and_no_name_of_any_kind_of_file() {
    if !can_mount() {
        return;
    }
    let sandbox = Sandbox::mounted();
    let mnt = sandbox.mnt();
    let word = "canary0word0of0this0test";
    let dir = mnt.join(format!("{word}.directory"));
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join(format!("{word}.file")), word.repeat(10_000)).unwrap();
    fs::write(dir.join(format!("{word}.{}", "n".repeat(200))), word).unwrap();
    symlink(format!("/{word}/target"), dir.join(format!("{word}.link"))).unwrap();
    fs::hard_link(dir.join(format!("{word}.file")), mnt.join(format!("{word}.hard"))).unwrap();
    let file = dir.join(format!("{word}.file"));
    setxattr(&file, "user.note", word.as_bytes(), XattrFlags::empty()).unwrap();
    sandbox.byokfs(&["sync", path(&mnt)]).ok();
    // The search finds what there is to find.
    assert!(holding(&mnt, word.as_bytes()).len() >= 5);
    assert_hidden(&sandbox, word);
    sandbox.umount();
    assert_hidden(&sandbox, word);
}

#[test]
fn no_row_and_no_table_name_of_a_database() {
    if !can_run_mariadb() {
        return;
    }
    let site = Site::running(&[], "");
    let word = "canary0row0of0this0test";
    site.server.sql(&[
        &format!("CREATE DATABASE {word}"),
        &format!("CREATE TABLE {word}.{word}_t (id INT PRIMARY KEY, v TEXT)"),
        &format!("INSERT INTO {word}.{word}_t SELECT seq, '{word}' FROM {word}.seq_1_to_3000"),
    ]);
    site.server.stop();
    assert!(holding(&site.sandbox.mnt(), word.as_bytes()).len() >= 3);
    assert_hidden(&site.sandbox, word);
}
