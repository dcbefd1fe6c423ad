//! `[[service]]`: another key service, with its own identity, beside that of `[key]`.
//!
//! Each is for the keys whose ids begin as its `keys` says; the one that fits closest decides, and
//! `[key]` where none does. Nothing is inherited: a section says all of how its service is reached,
//! so that no secret meant for one service is ever shown to another.

use std::fmt;

use serde::de::{DeserializeSeed, Error as _, IntoDeserializer, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Key;
use crate::key::provider::Scope;

const KEYS: &str = "keys";

/// Deserialised and serialised as the fields of [`Key`] with `keys` among them.
#[derive(Clone, Debug, PartialEq)]
pub struct Service {
    /// As it was written.
    pub keys: String,
    pub scope: Scope,
    pub key: Key,
}

impl<'de> Deserialize<'de> for Service {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Service, D::Error> {
        from.deserialize_map(ServiceVisitor)
    }
}

struct ServiceVisitor;

impl<'de> Visitor<'de> for ServiceVisitor {
    type Value = Service;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a section with keys, and what [key] has")
    }

    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<Service, A::Error> {
        let mut rest = WithoutKeys { entries, found: None };
        let key = Key::deserialize(serde::de::value::MapAccessDeserializer::new(&mut rest))?;
        let Some((keys, scope)) = rest.found else { return Err(A::Error::missing_field(KEYS)) };
        Ok(Service { keys, scope, key })
    }
}

/// The entries for [`Key`]; `keys` is taken out on the way.
struct WithoutKeys<A> {
    entries: A,
    found: Option<(String, Scope)>,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for &mut WithoutKeys<A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        mut seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        loop {
            match self.entries.next_key_seed(Name(seed))? {
                None => return Ok(None),
                Some(Ok(name)) => return Ok(Some(name)),
                Some(Err(again)) => {
                    self.found = Some(self.entries.next_value::<Keys>()?.0);
                    seed = again;
                }
            }
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.entries.next_value_seed(seed)
    }
}

/// A field's name for the inner seed, which comes back unused where the name is `keys`. Read here, so
/// that an unknown name is refused with its own line.
struct Name<K>(K);

impl<'de, K: DeserializeSeed<'de>> DeserializeSeed<'de> for Name<K> {
    type Value = Result<K::Value, K>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        let name = String::deserialize(from)?;
        if name == KEYS {
            return Ok(Err(self.0));
        }
        self.0.deserialize(name.into_deserializer()).map(Ok)
    }
}

struct Keys((String, Scope));

impl<'de> Deserialize<'de> for Keys {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Keys, D::Error> {
        let text = String::deserialize(from)?;
        let scope = Scope::parse(&text).map_err(D::Error::custom)?;
        Ok(Keys((text, scope)))
    }
}

impl Serialize for Service {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let fields = toml::Table::try_from(&self.key).map_err(serde::ser::Error::custom)?;
        let mut map = to.serialize_map(Some(fields.len() + 1))?;
        map.serialize_entry(KEYS, &self.keys)?;
        for (name, value) in &fields {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}
