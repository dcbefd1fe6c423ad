//! The vault's name: gone, as after the vault was deleted, not resolvable, or asked in vain. A
//! resolver of the test's own answers, in a mount namespace whose /etc/resolv.conf names it.

use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use byokfs::key::gate::{Reason, State};
use byokfs::key::provider::Settings;
use byokfs::key::watcher;
use parking_lot::Mutex;

use crate::rig::{LIMIT, Rig, Service, impatient, quick};
use crate::vault::{Vault, Who};

const INSIDE: &str = "BYOKFS_TEST_RESOLVER";
const HOST: &str = "kv1.vault.localhost";
const RESOLVER_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// 127.0.0.1.
    Address,
    NoSuchName,
    /// The name is there, without an address.
    NoAddress,
    ServerFailure,
    Silence,
}

struct Resolver(Arc<Mutex<Answer>>);

impl Resolver {
    fn start(address: &str) -> Resolver {
        let socket = UdpSocket::bind((address, 53)).unwrap();
        let answer = Arc::new(Mutex::new(Answer::Address));
        let shared = Arc::clone(&answer);
        thread::spawn(move || {
            let mut buf = [0; 512];
            while let Ok((count, from)) = socket.recv_from(&mut buf) {
                if let Some(reply) = reply(&buf[..count], *shared.lock()) {
                    let _ = socket.send_to(&reply, from);
                }
            }
        });
        Resolver(answer)
    }

    fn answer(&self, answer: Answer) {
        *self.0.lock() = answer;
    }
}

/// To a query with one question (RFC 1035, section 4).
fn reply(query: &[u8], answer: Answer) -> Option<Vec<u8>> {
    let name_end = 12 + query[12..].iter().position(|&byte| byte == 0)?;
    let question = &query[12..name_end + 5];
    let is_a = question[question.len() - 4..question.len() - 2] == [0, 1];
    let (code, records) = match answer {
        Answer::Silence => return None,
        Answer::NoSuchName => (3, 0),
        Answer::ServerFailure => (2, 0),
        Answer::NoAddress => (0, 0),
        Answer::Address => (0, u8::from(is_a)),
    };
    let mut reply = query[..2].to_vec();
    reply.extend([0x81, 0x80 | code, 0, 1, 0, records, 0, 0, 0, 0]);
    reply.extend(question);
    if records == 1 {
        // The name above, A, IN, no time to live.
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4, 127, 0, 0, 1]);
    }
    Some(reply)
}

/// A vault that is asked by its name.
struct Named(Vault);

impl Service for Named {
    fn key(&self) -> String {
        self.0.key.replace("127.0.0.1", HOST)
    }

    fn access(&self) -> Settings {
        self.0.access()
    }
}

#[test]
fn a_name_that_is_gone_is_told_from_one_that_cannot_be_resolved() {
    if let Ok(resolver) = std::env::var(INSIDE) {
        return inside(&resolver);
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: names needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // One of its own, should the tests run twice at once.
    let [high, low] = std::process::id().to_be_bytes()[2..] else { unreachable!() };
    let resolver = format!("127.53.{high}.{low}");
    let files = [
        // The resolver's own patience is far longer than a probe's.
        (
            "resolv.conf",
            format!(
                "nameserver {resolver}\noptions timeout:{} attempts:1\n",
                RESOLVER_TIMEOUT.as_secs()
            ),
        ),
        ("nsswitch.conf", "hosts: files dns\n".to_owned()),
        ("hosts", "127.0.0.1 localhost\n".to_owned()),
    ];
    for (name, content) in &files {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    let script = "for name in resolv.conf nsswitch.conf hosts; do mount --bind \"$1/$name\" \
                  \"/etc/$name\" || exit; done; exec \"$0\" --exact --nocapture \"$2\"";
    let test = "names::a_name_that_is_gone_is_told_from_one_that_cannot_be_resolved";
    let program = std::env::current_exe().unwrap();
    let dir: &Path = dir.path();
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .args([program.as_os_str(), dir.as_os_str(), test.as_ref()])
        .env(INSIDE, resolver)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    // Indented: it is a test's output too, and would be counted as one.
    let said = String::from_utf8_lossy(&said).replace('\n', "\n    ");
    assert!(output.status.success(), "    {said}");
}

fn inside(address: &str) {
    let resolver = Resolver::start(address);
    let vault = Vault::start_with(Who::Host, &["--name", "kv1"], &["--size", "2048"]);
    vault.grant(crate::vault::ALL);
    let settings = watcher::Settings { deadline: Duration::from_secs(2), ..quick() };
    let rig = Rig::serving(Named(vault), settings);
    for (answer, reason) in [
        (Answer::ServerFailure, Reason::Unreachable),
        (Answer::NoAddress, Reason::VaultGone),
        (Answer::Silence, Reason::Unreachable),
    ] {
        rig.forget();
        resolver.answer(answer);
        rig.wait_for(&format!("{answer:?}"), State::Degraded, Some(reason));
        let probe = rig.watcher.probe_now(LIMIT).last_probe.unwrap();
        // Whenever the probe began, it did not wait for that.
        assert!(probe.took < RESOLVER_TIMEOUT, "{answer:?}: {:?}", probe.took);
        assert!(rig.gate.lease().is_ok(), "{answer:?}");
        resolver.answer(Answer::Address);
        rig.wait_for(&format!("{answer:?}"), State::Available, None);
        assert_eq!(rig.gate.epoch(), 1, "{answer:?}");
    }
    // The vault is deleted, and recovered.
    let rig = Rig::serving(rig.service, impatient());
    resolver.answer(Answer::NoSuchName);
    rig.wait_for("deleted", State::Degraded, Some(Reason::VaultGone));
    rig.wait_for("deleted", State::Inaccessible, Some(Reason::Unreachable));
    assert!(rig.handler.revalidate().is_err());
    resolver.answer(Answer::Address);
    rig.wait_for("recovered", State::Available, None);
    assert!(rig.gate.epoch() >= 2);
}
