//! Names of keys in tokens: PKCS#11 URIs (RFC 7512), as far as they name a private key.
//!
//! `pkcs11:token=TOKEN;object=LABEL;id=%01`. An object's label is the key's name, its id (CKA_ID)
//! the key's version. A query (`module-path`, `pin-value`) is refused: the name is in an envelope
//! that anyone may have written.

use std::fmt;

use crate::error::{Error, Result};

pub const SCHEME: &str = "pkcs11:";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeyUri {
    pub(super) token: String,
    pub(super) serial: Option<String>,
    pub(super) object: Option<String>,
    pub(super) id: Option<Vec<u8>>,
}

/// What a URI of this scheme says, of a key or of less.
#[derive(Debug, Default)]
struct Attributes {
    token: Option<String>,
    serial: Option<String>,
    object: Option<String>,
    id: Option<Vec<u8>>,
}

impl Attributes {
    fn parse(text: &str) -> std::result::Result<Attributes, String> {
        let path = text.strip_prefix(SCHEME).ok_or("not pkcs11:")?;
        if path.contains('?') {
            return Err("it has a query; the module and the PIN are configured".into());
        }
        let mut found = Attributes::default();
        for part in path.split(';').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').ok_or("no value")?;
            let bytes = decode(value).ok_or("a wrong escape")?;
            if bytes.is_empty() {
                return Err("an empty value".into());
            }
            if name == "id" {
                if found.id.replace(bytes).is_some() {
                    return Err("an attribute twice".into());
                }
                continue;
            }
            let value = String::from_utf8(bytes).map_err(|_| "not UTF-8")?;
            let place = match name {
                "token" => &mut found.token,
                "serial" => &mut found.serial,
                "object" => &mut found.object,
                "type" if value == "private" => continue,
                _ => return Err(format!("the attribute {name}")),
            };
            if place.replace(value).is_some() {
                return Err("an attribute twice".into());
            }
        }
        Ok(found)
    }
}

/// Every token, those of one label, or one of them: what a configuration section may be for. The
/// library and the PIN are a token's, so there is none for a single key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TokenScope {
    token: Option<String>,
    serial: Option<String>,
}

impl TokenScope {
    pub(crate) fn parse(text: &str) -> std::result::Result<TokenScope, String> {
        let Attributes { token, serial, object, id } = Attributes::parse(text)?;
        if object.is_some() || id.is_some() {
            return Err("name the token alone: all its keys have one PIN".into());
        }
        if serial.is_some() && token.is_none() {
            return Err("a serial without its token".into());
        }
        Ok(TokenScope { token, serial })
    }

    /// How closely it fits the key; None: not at all.
    pub(crate) fn fit(&self, kid: &str) -> Option<usize> {
        let key = KeyUri::parse(kid).ok()?;
        let token = self.token.as_ref().is_none_or(|token| *token == key.token);
        let serial = self.serial.is_none() || self.serial == key.serial;
        let fit = usize::from(self.token.is_some()) + usize::from(self.serial.is_some());
        (token && serial).then_some(fit)
    }
}

impl KeyUri {
    pub(super) fn parse(text: &str) -> Result<KeyUri> {
        let refuse = |why: &str| {
            Error::usage(format!(
                "{text} is not the URI of a key ({why}): expected \
                 pkcs11:token=TOKEN;object=LABEL or pkcs11:token=TOKEN;object=LABEL;id=%01"
            ))
        };
        let found = Attributes::parse(text).map_err(|why| refuse(&why))?;
        let Attributes { token, serial, object, id } = found;
        let token = token.ok_or_else(|| refuse("no token"))?;
        if object.is_none() && id.is_none() {
            return Err(refuse("neither object nor id"));
        }
        Ok(KeyUri { token, serial, object, id })
    }

    pub(super) fn same_token(&self, other: &KeyUri) -> bool {
        self.token == other.token && self.serial == other.serial
    }

    /// The name of its key; None where a key has only its id.
    pub(super) fn without_version(self) -> Option<KeyUri> {
        self.object.is_some().then_some(KeyUri { id: None, ..self })
    }

    /// Whether `kid`, as the token's process names a key, is this one.
    pub(super) fn is(&self, kid: &str) -> bool {
        KeyUri::parse(kid).is_ok_and(|other| {
            self.same_token(&other)
                && other.id.is_some()
                && (self.id.is_none() || self.id == other.id)
                && (self.object.is_none() || self.object == other.object)
        })
    }
}

impl fmt::Display for KeyUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}token={}", encode(self.token.as_bytes()))?;
        if let Some(serial) = &self.serial {
            write!(f, ";serial={}", encode(serial.as_bytes()))?;
        }
        if let Some(object) = &self.object {
            write!(f, ";object={}", encode(object.as_bytes()))?;
        }
        if let Some(id) = &self.id {
            let id: String = id.iter().map(|byte| format!("%{byte:02X}")).collect();
            write!(f, ";id={id}")?;
        }
        Ok(())
    }
}

fn encode(bytes: &[u8]) -> String {
    let one = |&byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(byte).to_string()
        }
        other => format!("%{other:02X}"),
    };
    bytes.iter().map(one).collect()
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let (high, low) = (digit(bytes.next()?)?, digit(bytes.next()?)?);
        decoded.push(u8::try_from(high * 16 + low).ok()?);
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn uris_are_read_and_written() {
        let key = KeyUri::parse("pkcs11:token=My%20HSM;object=kek;id=%0a%FF;type=private").unwrap();
        assert_eq!(key.token, "My HSM");
        assert_eq!(key.id.as_deref(), Some(&[0x0a, 0xff][..]));
        assert_eq!(key.to_string(), "pkcs11:token=My%20HSM;object=kek;id=%0A%FF");
        assert_eq!(KeyUri::parse(&key.to_string()).unwrap(), key);
        let bare = KeyUri::parse("pkcs11:object=kek;token=My%20HSM").unwrap();
        assert!(bare.is(&key.to_string()) && !key.is(&bare.to_string()));
        assert!(!bare.is("pkcs11:token=My%20HSM;object=other;id=%0A"));
        assert!(!bare.is("pkcs11:token=other;object=kek;id=%0A"));
        let serial = KeyUri::parse("pkcs11:token=a%3bb;serial=7;id=%01").unwrap();
        assert_eq!(serial.to_string(), "pkcs11:token=a%3Bb;serial=7;id=%01");
        assert!(!serial.same_token(&bare));
    }

    #[test]
    fn what_names_no_key_of_a_token_is_refused() {
        for bad in [
            "pkcs11:",
            "pkcs11:token=x",
            "pkcs11:object=kek",
            "pkcs11:token=x;object=",
            "pkcs11:token=x;object=a;object=b",
            "pkcs11:token=x;id=%0",
            "pkcs11:token=x;id=%zz",
            "pkcs11:token=x;object=%ff",
            "pkcs11:token=x;object=kek;type=cert",
            "pkcs11:token=x;object=kek;slot-id=3",
            "pkcs11:token=x;object=kek?module-path=/tmp/evil.so",
            "pkcs11:token=x;object=kek?pin-value=1234",
            "pkcs11:token",
        ] {
            assert_eq!(KeyUri::parse(bad).unwrap_err().kind, Kind::Usage, "{bad}");
        }
    }
}
