//! Keys in a hardware security module, over PKCS#11.
//!
//! A vendor's library is foreign code that blocks, crashes and keeps what it likes in memory, so
//! it is never loaded into a process that holds a volume. Each session has a process of its own
//! ([`serve`]), with the library in it, and talks to it over two pipes; it is killed when it does
//! not answer by the deadline. Which library that is the configuration says, never the envelope.
//!
//! A token may lock itself after a few wrong PINs. One that was refused is not tried again by the
//! same provider until its file holds another one.
//!
//! What the token says and means is in [`token`] and [`error`].

mod error;
mod process;
mod serve;
mod token;
mod uri;
mod wire;

use std::fmt;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;

use ring::digest::{SHA256, digest};

pub use serve::serve;
pub use uri::SCHEME;
pub(super) use uri::TokenScope;

use self::process::Process;
use self::uri::KeyUri;
use self::wire::{Answer, Request};
use super::secret_file::SecretFile;
use super::{
    Algorithm, Class, KeyInfo, Provider, ProviderError, ProviderResult, Session, VersionInfo,
    base64url,
};
use crate::crypto::secret::SecretBytes;
use crate::error::{Error, Kind, Result};
use crate::key::clock::BootTime;
use crate::key::reason::Reason;
use crate::sync::Mutex;

/// The verb of this program that loads the library.
pub const VERB: &str = "__pkcs11";

/// The name of the key that `kid` is a version of.
pub(super) fn without_version(kid: &str) -> Result<String> {
    let key = KeyUri::parse(kid)?.without_version();
    let message = || Error::usage(format!("{kid} has no label: name the new key with --to"));
    key.map(|key| key.to_string()).ok_or_else(message)
}

#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// The vendor's shared library.
    pub module: Option<PathBuf>,
    /// None: the token asks for no PIN.
    pub pin_file: Option<PathBuf>,
    /// Whose [`VERB`] loads the library. None: this program's.
    pub program: Option<PathBuf>,
}

/// One token.
pub struct Pkcs11 {
    token: KeyUri,
    module: PathBuf,
    program: PathBuf,
    pin: Option<SecretFile>,
    /// SHA-256 of the PIN that the token refused, and how.
    refused: Mutex<Option<([u8; 32], ProviderError)>>,
    /// A process that not even a kill has ended.
    stuck: Arc<Mutex<Option<Child>>>,
}

impl Pkcs11 {
    /// For the token that `kid` lies in.
    pub fn new(kid: &str, settings: &Settings) -> Result<Pkcs11> {
        let token = KeyUri::parse(kid)?;
        let module = settings.module.clone().ok_or_else(|| {
            Error::new(Kind::Config, "pkcs11_module is not set: the vendor's shared library")
        })?;
        if let Err(error) = std::fs::metadata(&module) {
            let message = format!("pkcs11_module {}", module.display());
            return Err(Error::new(Kind::Config, message).with_source(error));
        }
        let pin = settings.pin_file.as_deref();
        Ok(Pkcs11 {
            token,
            module,
            program: settings.program.clone().unwrap_or_else(|| "/proc/self/exe".into()),
            pin: pin.map(|path| SecretFile::private("pkcs11_pin_file", path)).transpose()?,
            refused: Mutex::new(None),
            stuck: Arc::default(),
        })
    }
}

impl fmt::Debug for Pkcs11 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pkcs11").field("token", &self.token.token).finish_non_exhaustive()
    }
}

impl Provider for Pkcs11 {
    fn name(&self) -> &'static str {
        "pkcs11"
    }

    fn names_version(&self, url: &str) -> bool {
        KeyUri::parse(url).is_ok_and(|key| key.id.is_some())
    }

    fn session(&self, deadline: BootTime) -> ProviderResult<Box<dyn Session + '_>> {
        Ok(Box::new(TokenSession { provider: self, deadline, process: None }))
    }
}

struct TokenSession<'a> {
    provider: &'a Pkcs11,
    deadline: BootTime,
    process: Option<Process>,
}

impl Session for TokenSession<'_> {
    fn get_key(&mut self, kid: &str) -> ProviderResult<KeyInfo> {
        let key = self.key(kid)?;
        match self.ask("get", &Request::Key { kid: kid.to_owned() })? {
            Answer::Key(found) if key.is(&found.kid) => Ok(found.into_info()),
            Answer::Key(found) => Err(other_key(kid, &found.kid)),
            _ => Err(unexpected()),
        }
    }

    fn list_versions(&mut self, kid: &str) -> ProviderResult<Vec<VersionInfo>> {
        self.key(kid)?;
        match self.ask("list", &Request::Versions { kid: kid.to_owned() })? {
            Answer::Versions(versions) => Ok(versions.into_iter().map(Into::into).collect()),
            _ => Err(unexpected()),
        }
    }

    fn wrap(
        &mut self,
        kid: &str,
        algorithm: Algorithm,
        plain: &SecretBytes,
    ) -> ProviderResult<Vec<u8>> {
        self.key(kid)?;
        let request = Request::Wrap {
            kid: kid.to_owned(),
            algorithm: algorithm.name().to_owned(),
            value: base64url::encode(plain.expose()),
        };
        match self.ask("wrap", &request)? {
            Answer::Bytes(value) => base64url::decode(&value).ok_or_else(unexpected),
            _ => Err(unexpected()),
        }
    }

    fn unwrap(
        &mut self,
        kid: &str,
        algorithm: Algorithm,
        wrapped: &[u8],
    ) -> ProviderResult<SecretBytes> {
        self.key(kid)?;
        let request = Request::Unwrap {
            kid: kid.to_owned(),
            algorithm: algorithm.name().to_owned(),
            value: base64url::encode(wrapped),
        };
        match self.ask("unwrap", &request)? {
            Answer::Bytes(value) => base64url::decode_secret(&value)?.ok_or_else(unexpected),
            _ => Err(unexpected()),
        }
    }

    /// OAEP with SHA-256 where the token can, with SHA-1 where it cannot: tokens do not say.
    fn algorithm(&mut self, info: &KeyInfo, wish: Option<Algorithm>) -> ProviderResult<Algorithm> {
        let wish = wish.map(|algorithm| algorithm.name().to_owned());
        match self.ask("algorithm", &Request::Algorithm { kid: info.kid.clone(), wish })? {
            Answer::Algorithm(name) => Algorithm::from_name(&name).ok_or_else(unexpected),
            _ => Err(unexpected()),
        }
    }
}

impl TokenSession<'_> {
    /// `kid` comes from an envelope that anyone may have written: no other token is asked.
    fn key(&self, kid: &str) -> ProviderResult<KeyUri> {
        match KeyUri::parse(kid) {
            Ok(key) if key.same_token(&self.provider.token) => Ok(key),
            _ => Err(ProviderError::new(
                Class::Denied(Reason::WrongKeyOrCorruptEnvelope),
                format!("{kid} is not a key of the token {}", self.provider.token.token),
            )),
        }
    }

    fn ask(&mut self, what: &str, request: &Request) -> ProviderResult<Answer> {
        let mut process = match self.process.take() {
            Some(process) => process,
            None => self.open()?,
        };
        let answer = process.ask(request);
        // One that did not answer in time is not asked again.
        if !process.has_failed() {
            self.process = Some(process);
        }
        answer.map_err(|error| error.during(what))
    }

    /// A process with the library loaded, logged in to the token.
    fn open(&self) -> ProviderResult<Process> {
        let Pkcs11 { token, module, program, pin, refused, stuck } = self.provider;
        let pin = pin.as_ref().map(SecretFile::get);
        let hash = pin.as_ref().map(|pin| sha256(pin.expose().as_bytes()));
        if let (Some(hash), Some((of, error))) = (hash, &*refused.lock())
            && hash == *of
        {
            return Err(error.clone());
        }
        let mut process = Process::start(program, self.deadline, Arc::clone(stuck))?;
        let opened = process.ask(&Request::Open {
            module: module.to_string_lossy().into_owned(),
            token: token.token.clone(),
            serial: token.serial.clone(),
            pin: pin.as_ref().map(|pin| pin.expose().to_owned()),
        });
        match opened {
            Ok(Answer::Opened) => {
                *refused.lock() = None;
                Ok(process)
            }
            Ok(_) => Err(unexpected()),
            Err(error) => {
                let error = error.during("opening the token");
                if let Some(hash) = hash
                    && error.code.as_deref() == Some(error::PIN_INCORRECT)
                {
                    *refused.lock() = Some((hash, error.clone()));
                }
                Err(error)
            }
        }
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

fn other_key(asked: &str, answered: &str) -> ProviderError {
    let message = format!("the token answered for another key than {asked}: {answered}");
    ProviderError::new(Class::Denied(Reason::WrongKeyOrCorruptEnvelope), message)
}

fn unexpected() -> ProviderError {
    ProviderError::unreachable("the process that has the token sent a malformed answer")
}

#[cfg(test)]
mod tests;
