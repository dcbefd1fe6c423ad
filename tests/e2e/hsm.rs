//! A hardware security module in software (SoftHSM), with a token below a directory of its own.
//!
//! Its library finds the token by a variable of the environment, so what changes a key is done by
//! this test program in a process of its own ([`steps`]).

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use byokfs::key::provider;
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, ObjectClass};
use cryptoki::session::{Session, UserType};
use cryptoki::types::{AuthPin, Date};
use serde::{Deserialize, Serialize};

use crate::support::process::Answer;
use crate::support::sandbox::path;
use crate::support::{has, skip, until};

pub const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
pub const TOKEN: &str = "byokfs test";
const VARIABLE: &str = "BYOKFS_TEST_HSM_STEP";
const FIRST_PIN: &str = "0000";

/// True where there is a security module in software.
pub fn has_hsm() -> bool {
    (has("softhsm2-util") && Path::new(MODULE).exists()) || skip("needs softhsm2")
}

/// Something that an officer of the token does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Step {
    Make {
        label: String,
        id: u8,
        bits: u64,
        extractable: bool,
    },
    /// Whether the private key may decrypt.
    Decrypts(u8, bool),
    /// Its last day, or its first one, as "2026-01-31".
    Ends(u8, String),
    Starts(u8, String),
    Delete(u8),
    ChangePin {
        from: String,
        to: String,
    },
}

pub struct Hsm {
    dir: PathBuf,
    pin: String,
}

impl Hsm {
    /// A token without keys in `dir`/hsm.
    pub fn new(dir: &Path) -> Hsm {
        let dir = dir.join("hsm");
        fs::create_dir(&dir).unwrap();
        let hsm = Hsm { dir, pin: FIRST_PIN.to_owned() };
        fs::create_dir(hsm.tokens()).unwrap();
        let config = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
            path(&hsm.tokens())
        );
        fs::write(hsm.config(), config).unwrap();
        Answer::of(Command::new("softhsm2-util").env("SOFTHSM2_CONF", hsm.config()).args([
            "--init-token",
            "--free",
            "--label",
            TOKEN,
            "--pin",
            FIRST_PIN,
            "--so-pin",
            "00000000",
        ]))
        .ok();
        hsm.write_pin(FIRST_PIN);
        hsm
    }

    pub fn tokens(&self) -> PathBuf {
        self.dir.join("tokens")
    }

    fn config(&self) -> PathBuf {
        self.dir.join("softhsm2.conf")
    }

    pub fn pin_file(&self) -> PathBuf {
        self.dir.join("pin")
    }

    pub fn write_pin(&self, pin: &str) {
        fs::write(self.pin_file(), pin).unwrap();
        fs::set_permissions(self.pin_file(), fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// How this program reaches it, whose own environment does not name it.
    pub fn settings(&self) -> provider::Settings {
        let program = self.dir.join("byokfs");
        // Written by another process: what this one has open to write, its children cannot run.
        let script = format!(
            "#!/bin/sh\nSOFTHSM2_CONF='{}' exec '{}' \"$@\"",
            path(&self.config()),
            env!("CARGO_BIN_EXE_byokfs")
        );
        let write = "printf '%s\\n' \"$1\" > \"$0\" && chmod 755 \"$0\"";
        Answer::of(Command::new("sh").args(["-c", write, path(&program), &script])).ok();
        let pkcs11 = provider::pkcs11::Settings {
            module: Some(MODULE.into()),
            pin_file: Some(self.pin_file()),
            program: Some(program),
        };
        provider::Settings { pkcs11, ..provider::Settings::default() }
    }

    /// Key of that label and, with an id, that version.
    pub fn uri(label: &str, id: Option<u8>) -> String {
        let id = id.map_or(String::new(), |id| format!(";id=%{id:02X}"));
        format!("pkcs11:token={};object={label}{id}", TOKEN.replace(' ', "%20"))
    }

    #[track_caller]
    pub fn make(&mut self, label: &str, id: u8) {
        self.step(&Step::Make { label: label.to_owned(), id, bits: 2048, extractable: false });
    }

    #[track_caller]
    pub fn step(&mut self, step: &Step) {
        self.try_step(step).ok();
        if let Step::ChangePin { to, .. } = step {
            self.pin.clone_from(to);
        }
    }

    fn try_step(&self, step: &Step) -> Answer {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "hsm::steps", "--nocapture"]);
        command.env("SOFTHSM2_CONF", self.config());
        let step = serde_json::to_string(&(&self.pin, step)).unwrap();
        Answer::of(command.env(VARIABLE, step))
    }
}

/// With the variable: does what it says. Without it: that it does.
#[test]
fn steps() {
    if let Ok(text) = env::var(VARIABLE) {
        let (pin, step): (String, Step) = serde_json::from_str(&text).unwrap();
        return take(&pin, &step);
    }
    if !has_hsm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut hsm = Hsm::new(dir.path());
    assert_ne!(hsm.try_step(&Step::Delete(1)).code, Some(0), "there is no such key");
    hsm.make("kek", 1);
    hsm.step(&Step::Delete(1));
    hsm.step(&Step::ChangePin { from: FIRST_PIN.into(), to: "1111".into() });
    hsm.make("kek", 2);
}

fn take(pin: &str, step: &Step) {
    // SoftHSM overlooks a token while another process changes one of its objects.
    let mut loaded = None;
    until("the token", || {
        let library = Pkcs11::new(MODULE).unwrap();
        library.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)).unwrap();
        match library.get_slots_with_initialized_token().unwrap().first().copied() {
            Some(slot) => loaded = Some((library, slot)),
            None => library.finalize().unwrap(),
        }
        loaded.is_some()
    });
    let (library, slot) = loaded.unwrap();
    let session = library.open_rw_session(slot).unwrap();
    session.login(UserType::User, Some(&AuthPin::from(pin.to_owned()))).unwrap();
    match step {
        Step::Make { label, id, bits, extractable } => {
            let common = [
                Attribute::Token(true),
                Attribute::Label(label.as_bytes().to_vec()),
                Attribute::Id(vec![*id]),
            ];
            let public = [
                Attribute::Encrypt(true),
                Attribute::ModulusBits((*bits).into()),
                Attribute::PublicExponent(vec![1, 0, 1]),
            ];
            let private = [
                Attribute::Decrypt(true),
                Attribute::Private(true),
                Attribute::Sensitive(true),
                Attribute::Extractable(*extractable),
                Attribute::Destroyable(true),
            ];
            let all = |own: &[Attribute]| [&common[..], own].concat();
            session
                .generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &all(&public), &all(&private))
                .unwrap();
        }
        Step::Decrypts(id, may) => {
            change(&session, ObjectClass::PRIVATE_KEY, *id, Attribute::Decrypt(*may));
        }
        // SoftHSM does not read back what dates a private object has been given.
        Step::Ends(id, day) => {
            change(&session, ObjectClass::PUBLIC_KEY, *id, Attribute::EndDate(date(day)));
        }
        Step::Starts(id, day) => {
            change(&session, ObjectClass::PUBLIC_KEY, *id, Attribute::StartDate(date(day)));
        }
        Step::Delete(id) => {
            let objects = session.find_objects(&[Attribute::Id(vec![*id])]).unwrap();
            assert_eq!(objects.len(), 2);
            objects.into_iter().for_each(|object| session.destroy_object(object).unwrap());
        }
        Step::ChangePin { from, to } => {
            session.set_pin(&AuthPin::from(from.clone()), &AuthPin::from(to.clone())).unwrap();
        }
    }
}

fn change(session: &Session, class: ObjectClass, id: u8, attribute: Attribute) {
    let found = session.find_objects(&[Attribute::Class(class), Attribute::Id(vec![id])]).unwrap();
    session.update_attributes(found[0], &[attribute]).unwrap();
}

fn date(day: &str) -> Date {
    let [year, month, day] = day.split('-').collect::<Vec<_>>()[..] else { panic!("{day}") };
    Date::new_from_str_slice(year, month, day).unwrap()
}
