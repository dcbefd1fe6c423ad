//! A token: what it says of its keys, and what it does with them. Runs in the process of
//! [`super::serve()`] alone.
//!
//! A key's name is the label of its private key, its version the id. The public key is needed as
//! an object too, because wrapping is the token's work: done here it would prove nothing.
//! PKCS#11's start and end dates are told as they are, the narrower ones of the two objects; a
//! token does not enforce them, the policy does. The end date is the last day on which the key is
//! good.

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::types::{AuthPin, Date};
use time::{Month, OffsetDateTime};

use super::super::{Algorithm, Class, ProviderError, ProviderResult, significant_bits};
use super::error::{classify, is_unsupported, is_vague};
use super::uri::KeyUri;
use super::wire::{Key, Version};
use crate::crypto::random;
use crate::key::reason::Reason;

const DAY: i64 = 24 * 60 * 60;

/// A token that is open and logged in to.
pub(super) struct Token {
    session: Session,
    label: String,
    serial: Option<String>,
}

/// A key: its two objects and what they say.
struct Found {
    private: ObjectHandle,
    public: Option<ObjectHandle>,
    key: Key,
    rsa: bool,
}

impl Token {
    pub(super) fn open(
        module: &str,
        label: &str,
        serial: Option<&str>,
        pin: Option<String>,
    ) -> ProviderResult<Token> {
        let library = Pkcs11::new(module)
            .map_err(|error| ProviderError::unreachable(format!("{module}: {error}")))?;
        let threads = CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK);
        library.initialize(threads).map_err(|error| classify(&error))?;
        let mut slot = None;
        for candidate in library.get_slots_with_token().map_err(|error| classify(&error))? {
            // A slot that is empty by now, or broken, is not this token's.
            let Ok(info) = library.get_token_info(candidate) else { continue };
            let same_serial = serial.is_none_or(|serial| info.serial_number().trim() == serial);
            let ours = info.label().trim_end() == label && same_serial;
            if ours && slot.replace((candidate, info)).is_some() {
                return Err(ProviderError::new(
                    Class::Denied(Reason::WrongKeyOrCorruptEnvelope),
                    format!("several tokens are called {label}: name one by its serial"),
                ));
            }
        }
        let Some((slot, info)) = slot else {
            let message = format!("{module} shows no token called {label}");
            return Err(ProviderError::new(Class::Transient(Reason::VaultGone), message));
        };
        let session = library.open_ro_session(slot).map_err(|error| classify(&error))?;
        if info.login_required() {
            let denied = |why| ProviderError::new(Class::Denied(Reason::CredentialInvalid), why);
            if info.user_pin_locked() {
                return Err(denied("the PIN is locked; the security officer can unlock it"));
            }
            if info.user_pin_final_try() {
                let why = "one more wrong PIN would lock the token: log in by hand once";
                return Err(denied(why));
            }
            let pin = pin.ok_or_else(|| denied("the token asks for a PIN: set pkcs11_pin_file"))?;
            let pin = AuthPin::from(pin);
            session.login(UserType::User, Some(&pin)).map_err(|error| classify(&error))?;
        }
        Ok(Token { session, label: label.to_owned(), serial: serial.map(str::to_owned) })
    }

    pub(super) fn key(&self, kid: &str) -> ProviderResult<Key> {
        Ok(self.find(kid)?.key)
    }

    /// The key itself, and those of its name with a later start date.
    pub(super) fn versions(&self, kid: &str) -> ProviderResult<Vec<Version>> {
        let own = self.find(kid)?.key;
        let uri = self.parse(&own.kid)?;
        let mut keys = match uri.object {
            Some(_) => self.find_all(&KeyUri { id: None, ..uri })?,
            None => Vec::new(),
        };
        keys.retain(|found| found.rsa && found.key.not_before > own.not_before);
        keys.sort_by(|a, b| (a.key.not_before, &a.key.kid).cmp(&(b.key.not_before, &b.key.kid)));
        let later = keys.into_iter().map(|found| found.key);
        let version = |key: Key| {
            let Key { kid, not_before, expires, .. } = key;
            Version { kid, not_before, expires }
        };
        Ok([own].into_iter().chain(later).map(version).collect())
    }

    /// The best algorithm that works with this key, tried with a random value; `wish` first.
    pub(super) fn best(&self, kid: &str, wish: Option<Algorithm>) -> ProviderResult<Algorithm> {
        let wish = wish.filter(|algorithm| mechanism(*algorithm).is_ok());
        for algorithm in wish.into_iter().chain([Algorithm::RsaOaep256]) {
            match self.round_trip(kid, algorithm) {
                Ok(()) => return Ok(algorithm),
                Err(error) if is_unsupported(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Algorithm::RsaOaep)
    }

    pub(super) fn wrap(
        &self,
        kid: &str,
        algorithm: Algorithm,
        plain: &[u8],
    ) -> ProviderResult<Vec<u8>> {
        let found = self.find(kid)?;
        let public = found.public.ok_or_else(|| {
            ProviderError::new(
                Class::Denied(Reason::PermissionRevoked),
                format!("the token has no public key object for {}", found.key.kid),
            )
        })?;
        let mechanism = mechanism(algorithm)?;
        self.session.encrypt(&mechanism, public, plain).map_err(|error| classify(&error))
    }

    pub(super) fn unwrap(
        &self,
        kid: &str,
        algorithm: Algorithm,
        wrapped: &[u8],
    ) -> ProviderResult<Vec<u8>> {
        let error = match self.decrypt(kid, algorithm, wrapped) {
            Err(error) if is_vague(&error) => error,
            result => return result,
        };
        // Either the token is broken, or this is not the key's: what it wraps itself tells.
        self.round_trip(kid, algorithm).map_err(|_| error.clone())?;
        let class = Class::Denied(Reason::WrongKeyOrCorruptEnvelope);
        let mut wrong = ProviderError::new(class, "this was not wrapped with this key");
        wrong.code = error.code;
        Err(wrong)
    }

    fn decrypt(&self, kid: &str, algorithm: Algorithm, data: &[u8]) -> ProviderResult<Vec<u8>> {
        let found = self.find(kid)?;
        let mechanism = mechanism(algorithm)?;
        self.session.decrypt(&mechanism, found.private, data).map_err(|error| classify(&error))
    }

    fn round_trip(&self, kid: &str, algorithm: Algorithm) -> ProviderResult<()> {
        let value =
            random::bytes::<16>().map_err(|error| ProviderError::unreachable(error.to_string()))?;
        let wrapped = self.wrap(kid, algorithm, &value)?;
        if self.decrypt(kid, algorithm, &wrapped)? == value {
            return Ok(());
        }
        let class = Class::Denied(Reason::KeyMaterialMismatch);
        Err(ProviderError::new(class, format!("{kid} does not unwrap what it has wrapped")))
    }

    fn parse(&self, kid: &str) -> ProviderResult<KeyUri> {
        KeyUri::parse(kid).map_err(|error| {
            ProviderError::new(Class::Denied(Reason::WrongKeyOrCorruptEnvelope), error.to_string())
        })
    }

    /// The one key of this name, or of this name and id; of several the one that starts last.
    fn find(&self, kid: &str) -> ProviderResult<Found> {
        let uri = self.parse(kid)?;
        let mut keys = self.find_all(&uri)?;
        keys.sort_by_key(|found| found.key.not_before);
        let Some(newest) = keys.pop() else {
            let message = format!("the token {} has no private key {kid}", self.label);
            return Err(ProviderError::new(Class::Denied(Reason::KeyNotFound), message));
        };
        match keys.last() {
            Some(other) if other.key.not_before == newest.key.not_before => {
                Err(ProviderError::new(
                    Class::Denied(Reason::WrongKeyOrCorruptEnvelope),
                    format!(
                        "several keys are called {kid}: name one by its id, as {}",
                        newest.key.kid
                    ),
                ))
            }
            _ => Ok(newest),
        }
    }

    fn find_all(&self, uri: &KeyUri) -> ProviderResult<Vec<Found>> {
        let handles = self.objects(ObjectClass::PRIVATE_KEY, uri)?;
        handles.into_iter().map(|handle| self.describe(handle)).collect()
    }

    fn objects(&self, class: ObjectClass, uri: &KeyUri) -> ProviderResult<Vec<ObjectHandle>> {
        let mut template = vec![Attribute::Class(class), Attribute::Token(true)];
        if let Some(object) = &uri.object {
            template.push(Attribute::Label(object.as_bytes().to_vec()));
        }
        if let Some(id) = &uri.id {
            template.push(Attribute::Id(id.clone()));
        }
        self.session.find_objects(&template).map_err(|error| classify(&error))
    }

    fn attributes(
        &self,
        object: ObjectHandle,
        wanted: &[AttributeType],
    ) -> ProviderResult<Vec<Attribute>> {
        self.session.get_attributes(object, wanted).map_err(|error| classify(&error))
    }

    fn describe(&self, private: ObjectHandle) -> ProviderResult<Found> {
        const WANTED: [AttributeType; 10] = [
            AttributeType::Label,
            AttributeType::Id,
            AttributeType::KeyType,
            AttributeType::Modulus,
            AttributeType::Decrypt,
            AttributeType::Extractable,
            AttributeType::NeverExtractable,
            AttributeType::Destroyable,
            AttributeType::StartDate,
            AttributeType::EndDate,
        ];
        let mut uri = KeyUri {
            token: self.label.clone(),
            serial: self.serial.clone(),
            object: None,
            id: None,
        };
        let mut key = Key {
            kid: String::new(),
            key_type: "unknown".to_owned(),
            bits: None,
            operations: Vec::new(),
            not_before: None,
            expires: None,
            exportable: None,
            // A token that does not know the attribute destroys what it is told to.
            destroyable: Some(true),
        };
        let (mut rsa, mut never_left) = (false, false);
        for attribute in self.attributes(private, &WANTED)? {
            match attribute {
                Attribute::Label(label) => {
                    uri.object = String::from_utf8(label).ok().filter(|label| !label.is_empty());
                }
                Attribute::Id(id) if !id.is_empty() => uri.id = Some(id),
                Attribute::KeyType(KeyType::RSA) => rsa = true,
                Attribute::KeyType(other) => key.key_type = other.to_string(),
                Attribute::Modulus(modulus) => key.bits = significant_bits(&modulus),
                Attribute::Decrypt(true) => key.operations.push("unwrapKey".to_owned()),
                Attribute::Extractable(extractable) => key.exportable = Some(extractable),
                Attribute::NeverExtractable(never) => never_left = never,
                Attribute::Destroyable(destroyable) => key.destroyable = Some(destroyable),
                other => narrow(&mut key, &other),
            }
        }
        if rsa {
            // One that was brought in, or could leave, is as good as one outside a token.
            key.key_type = if never_left { "RSA-HSM" } else { "RSA" }.to_owned();
        }
        if uri.id.is_none() {
            let message = format!("a key called {} has no id", uri.object.unwrap_or_default());
            let class = Class::Denied(Reason::WrongKeyOrCorruptEnvelope);
            return Err(ProviderError::new(class, message));
        }
        key.kid = uri.to_string();
        // Its label may be another one; the id ties the two together.
        let by_id = KeyUri { object: None, ..uri };
        let public = self.objects(ObjectClass::PUBLIC_KEY, &by_id)?.into_iter().next();
        if let Some(public) = public {
            const WANTED: [AttributeType; 3] =
                [AttributeType::Encrypt, AttributeType::StartDate, AttributeType::EndDate];
            for attribute in self.attributes(public, &WANTED)? {
                match attribute {
                    Attribute::Encrypt(true) => key.operations.push("wrapKey".to_owned()),
                    other => narrow(&mut key, &other),
                }
            }
        }
        Ok(Found { private, public, key, rsa })
    }
}

/// Takes over a date that makes the key's time shorter.
fn narrow(key: &mut Key, attribute: &Attribute) {
    match attribute {
        Attribute::StartDate(date) => key.not_before = key.not_before.max(midnight(date)),
        Attribute::EndDate(date) => {
            let end = midnight(date).map(|at| at + DAY);
            key.expires = [key.expires, end].into_iter().flatten().min();
        }
        _ => {}
    }
}

fn mechanism(algorithm: Algorithm) -> ProviderResult<Mechanism<'static>> {
    let (hash, mask) = match algorithm {
        Algorithm::RsaOaep256 => (MechanismType::SHA256, PkcsMgfType::MGF1_SHA256),
        Algorithm::RsaOaep => (MechanismType::SHA1, PkcsMgfType::MGF1_SHA1),
        Algorithm::A256Kw => {
            let class = Class::Denied(Reason::WrongKeyOrCorruptEnvelope);
            return Err(ProviderError::new(class, "a token wraps with RSA keys only"));
        }
    };
    let parameters = PkcsOaepParams::new(hash, mask, PkcsOaepSource::empty());
    Ok(Mechanism::RsaPkcsOaep(parameters))
}

/// The start of a day, UTC, in seconds since the epoch. None: not set, or not a date.
fn midnight(date: &Date) -> Option<i64> {
    let number = |digits: &[u8]| std::str::from_utf8(digits).ok()?.parse::<u16>().ok();
    let month = Month::try_from(u8::try_from(number(&date.month)?).ok()?).ok()?;
    let day = u8::try_from(number(&date.day)?).ok()?;
    let date = time::Date::from_calendar_date(number(&date.year)?.into(), month, day).ok()?;
    Some(OffsetDateTime::new_utc(date, time::Time::MIDNIGHT).unix_timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_whole_days() {
        let date = |year: &str, month: &str, day: &str| {
            midnight(&Date::new_from_str_slice(year, month, day).unwrap())
        };
        assert_eq!(date("1970", "01", "02"), Some(DAY));
        assert_eq!(date("2026", "02", "29"), None);
        assert_eq!(date("    ", "  ", "  "), None);
        assert_eq!(midnight(&Date::new_empty()), None);
    }

    #[test]
    fn only_rsa_algorithms_are_a_tokens() {
        assert!(mechanism(Algorithm::RsaOaep).is_ok() && mechanism(Algorithm::RsaOaep256).is_ok());
        assert!(mechanism(Algorithm::A256Kw).is_err());
    }
}
