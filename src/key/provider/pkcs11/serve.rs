//! The other end: a process of its own that loads the library and does what its session asks.
//! It ends when the session does, or is killed with it.

use std::fs::File;
use std::io::{self, BufRead, Write};
use std::os::fd::AsFd;

use rustix::process::{Signal, set_parent_process_death_signal};

use super::super::{Algorithm, Class, ProviderError, ProviderResult, base64url};
use super::token::Token;
use super::unexpected;
use super::wire::{Answer, Request};
use crate::error::{Context, Result};
use crate::key::reason::Reason;
use crate::sys::stdio;

/// Answers requests on standard input until it ends. Nobody calls this in a process that does
/// anything else.
pub fn serve() -> Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .context(|| "cannot tie this process to its parent".to_owned())?;
    // What a library prints must not be taken for an answer.
    let failed = || "cannot take standard output".to_owned();
    let mut output = File::from(io::stdout().as_fd().try_clone_to_owned().context(failed)?);
    stdio::replace_stdout(File::options().write(true).open("/dev/null").context(failed)?)
        .context(failed)?;
    let mut token = None;
    for line in io::stdin().lock().lines() {
        let line = line.context(|| "cannot read a request".to_owned())?;
        let answer = if line.trim().is_empty() {
            line
        } else {
            let answer = serde_json::from_str(&line)
                .map_err(|_| unexpected())
                .and_then(|request| answer(&mut token, request))
                .unwrap_or_else(|error| Answer::Failed((&error).into()));
            serde_json::to_string(&answer)
                .map_err(|error| io::Error::other(error.to_string()))
                .context(|| "cannot write an answer".to_owned())?
        };
        let answer = answer + "\n";
        output.write_all(answer.as_bytes()).context(|| "nobody takes the answer".to_owned())?;
    }
    Ok(())
}

fn answer(token: &mut Option<Token>, request: Request) -> ProviderResult<Answer> {
    if let Request::Open { module, token: label, serial, pin } = request {
        *token = Some(Token::open(&module, &label, serial.as_deref(), pin)?);
        return Ok(Answer::Opened);
    }
    let token = token.as_ref().ok_or_else(unexpected)?;
    Ok(match request {
        Request::Open { .. } => return Err(unexpected()),
        Request::Key { kid } => Answer::Key(token.key(&kid)?),
        Request::Versions { kid } => Answer::Versions(token.versions(&kid)?),
        Request::Algorithm { kid, wish } => {
            let wish = wish.as_deref().and_then(Algorithm::from_name);
            Answer::Algorithm(token.best(&kid, wish)?.name().to_owned())
        }
        Request::Wrap { kid, algorithm, value } => {
            let value = base64url::decode(&value).ok_or_else(unexpected)?;
            Answer::Bytes(base64url::encode(&token.wrap(&kid, named(&algorithm)?, &value)?))
        }
        Request::Unwrap { kid, algorithm, value } => {
            let value = base64url::decode(&value).ok_or_else(unexpected)?;
            Answer::Bytes(base64url::encode(&token.unwrap(&kid, named(&algorithm)?, &value)?))
        }
    })
}

fn named(algorithm: &str) -> ProviderResult<Algorithm> {
    Algorithm::from_name(algorithm).ok_or_else(|| {
        let class = Class::Denied(Reason::WrongKeyOrCorruptEnvelope);
        ProviderError::new(class, format!("unknown algorithm {algorithm}"))
    })
}
