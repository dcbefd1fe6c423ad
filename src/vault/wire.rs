//! JSON of the protocol: requests as they come, bundles and items as they go out.

use std::collections::BTreeMap;

use serde::de::Deserializer;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::codec;
use super::refusal::Refusal;
use super::store::keys::{Attributes, DeletedState, VersionRecord};

/// What this vault's own command line asks for.
pub const API_VERSION: &str = "7.4";

/// Limits of the real service.
const MAX_TAGS: usize = 15;
const MAX_TAG_LEN: usize = 256;

/// `[0-9a-zA-Z-]{1,127}`.
pub fn is_key_name(name: &str) -> bool {
    (1..=127).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// 3 to 24 letters, digits and single dashes; begins with a letter, does not end with a dash.
pub fn is_vault_name(name: &str) -> bool {
    (3..=24).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        && name.starts_with(|first: char| first.is_ascii_alphabetic())
        && !name.ends_with('-')
        && !name.contains("--")
}

/// Is this a version the service could have issued: 32 lower-case hex digits?
pub(crate) fn is_version(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyType {
    Rsa,
    /// Answers as an HSM key does; its material is as much software as the other's.
    RsaHsm,
    /// A symmetric key of a Managed HSM.
    OctHsm,
}

impl KeyType {
    pub(crate) const fn is_rsa(self) -> bool {
        matches!(self, KeyType::Rsa | KeyType::RsaHsm)
    }

    pub(crate) fn from_name(name: &str) -> Option<KeyType> {
        match name {
            "RSA" => Some(KeyType::Rsa),
            "RSA-HSM" => Some(KeyType::RsaHsm),
            "oct-HSM" => Some(KeyType::OctHsm),
            _ => None,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            KeyType::Rsa => "RSA",
            KeyType::RsaHsm => "RSA-HSM",
            KeyType::OctHsm => "oct-HSM",
        }
    }
}

/// An operation a key may be limited to (`key_ops`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyOperation {
    Encrypt,
    Decrypt,
    Sign,
    Verify,
    WrapKey,
    UnwrapKey,
    /// Of a key exchange key: other keys come in under it. No route of its own.
    Import,
}

impl KeyOperation {
    /// What has a route, and what a new RSA key may be used for unless it is told.
    pub(crate) const USES: [KeyOperation; 6] = [
        KeyOperation::Encrypt,
        KeyOperation::Decrypt,
        KeyOperation::Sign,
        KeyOperation::Verify,
        KeyOperation::WrapKey,
        KeyOperation::UnwrapKey,
    ];

    pub(crate) fn from_name(name: &str) -> Option<KeyOperation> {
        KeyOperation::USES
            .into_iter()
            .chain([KeyOperation::Import])
            .find(|operation| operation.name().eq_ignore_ascii_case(name))
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            KeyOperation::Encrypt => "encrypt",
            KeyOperation::Decrypt => "decrypt",
            KeyOperation::Sign => "sign",
            KeyOperation::Verify => "verify",
            KeyOperation::WrapKey => "wrapKey",
            KeyOperation::UnwrapKey => "unwrapKey",
            KeyOperation::Import => "import",
        }
    }

    /// Refused on an expired or not yet valid key; what undoes them goes on working, so that
    /// nothing protected by the key is lost.
    pub(crate) const fn is_date_controlled(self) -> bool {
        matches!(self, KeyOperation::Encrypt | KeyOperation::Sign | KeyOperation::WrapKey)
    }
}

pub(crate) fn key_operations(names: &[String]) -> Result<Vec<KeyOperation>, Refusal> {
    let mut operations = Vec::new();
    for name in names {
        let operation = KeyOperation::from_name(name)
            .ok_or_else(|| Refusal::bad_parameter(format!("Invalid key operation '{name}'.")))?;
        if !operations.contains(&operation) {
            operations.push(operation);
        }
    }
    Ok(operations)
}

#[derive(Debug, Deserialize)]
pub(crate) struct CreateRequest {
    pub(crate) kty: Option<String>,
    pub(crate) key_size: Option<u64>,
    pub(crate) public_exponent: Option<u64>,
    pub(crate) key_ops: Option<Vec<String>>,
    #[serde(default)]
    pub(crate) attributes: AttributesPatch,
    pub(crate) tags: Option<BTreeMap<String, String>>,
    pub(crate) release_policy: Option<Value>,
}

#[derive(Deserialize)]
pub(crate) struct ImportRequest {
    #[serde(rename = "Hsm", alias = "hsm")]
    pub(crate) hsm: Option<bool>,
    pub(crate) key: PrivateJwk,
    #[serde(default)]
    pub(crate) attributes: AttributesPatch,
    pub(crate) tags: Option<BTreeMap<String, String>>,
    pub(crate) release_policy: Option<Value>,
}

/// A private RSA key; the allocator overwrites these strings when they go.
#[derive(Deserialize)]
pub(crate) struct PrivateJwk {
    pub(crate) kty: Option<String>,
    pub(crate) key_ops: Option<Vec<String>>,
    pub(crate) n: Option<String>,
    pub(crate) e: Option<String>,
    pub(crate) d: Option<String>,
    pub(crate) p: Option<String>,
    pub(crate) q: Option<String>,
    pub(crate) dp: Option<String>,
    pub(crate) dq: Option<String>,
    pub(crate) qi: Option<String>,
    /// A key transfer blob in base64, instead of the numbers.
    pub(crate) key_hsm: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct UpdateRequest {
    pub(crate) key_ops: Option<Vec<String>>,
    #[serde(default)]
    pub(crate) attributes: AttributesPatch,
    pub(crate) tags: Option<BTreeMap<String, String>>,
    pub(crate) release_policy: Option<Value>,
}

/// Absent: left as it is. `null`: unset.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct AttributesPatch {
    pub(crate) enabled: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    pub(crate) nbf: Option<Option<i64>>,
    #[serde(default, deserialize_with = "present")]
    pub(crate) exp: Option<Option<i64>>,
    pub(crate) exportable: Option<bool>,
}

/// Tells `null` from absent.
fn present<'de, D, T>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::deserialize(deserializer).map(Some)
}

impl AttributesPatch {
    pub(crate) fn apply(&self, to: &mut Attributes) -> Result<(), Refusal> {
        if self.exportable == Some(true) {
            return Err(Refusal::bad_parameter("Exportable keys are not supported by this vault."));
        }
        if let Some(enabled) = self.enabled {
            to.enabled = enabled;
        }
        if let Some(nbf) = self.nbf {
            to.nbf = nbf;
        }
        if let Some(exp) = self.exp {
            to.exp = exp;
        }
        for (name, value) in [("nbf", to.nbf), ("exp", to.exp)] {
            if value.is_some_and(|seconds| seconds < 0) {
                return Err(Refusal::bad_parameter(format!("Attribute '{name}' is out of range.")));
            }
        }
        match (to.nbf, to.exp) {
            (Some(nbf), Some(exp)) if exp <= nbf => {
                Err(Refusal::bad_parameter("Attribute 'exp' must be later than 'nbf'."))
            }
            _ => Ok(()),
        }
    }
}

pub(crate) fn check_tags(tags: &BTreeMap<String, String>) -> Result<(), Refusal> {
    let is_short = |text: &String| text.chars().count() <= MAX_TAG_LEN;
    let fits = tags.len() <= MAX_TAGS
        && tags.iter().all(|(name, value)| is_short(name) && is_short(value));
    if fits {
        Ok(())
    } else {
        Err(Refusal::bad_parameter(format!(
            "At most {MAX_TAGS} tags of at most {MAX_TAG_LEN} characters are allowed."
        )))
    }
}

#[derive(Deserialize)]
pub(crate) struct CryptoRequest {
    pub(crate) alg: Option<String>,
    pub(crate) value: Option<String>,
    pub(crate) digest: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ValueRequest {
    pub(crate) value: String,
}

/// What bundles say beside the key itself.
#[derive(Debug, Clone)]
pub(crate) struct Recovery {
    pub(crate) days: u16,
    pub(crate) purge_protection: bool,
}

/// The longest retention, and the only one that is not "customized".
pub(crate) const FULL_RETENTION_DAYS: u16 = 90;

impl Recovery {
    pub(crate) fn level(&self) -> &'static str {
        match (self.days == FULL_RETENTION_DAYS, self.purge_protection) {
            (true, true) => "Recoverable",
            (true, false) => "Recoverable+Purgeable",
            (false, true) => "CustomizedRecoverable",
            (false, false) => "CustomizedRecoverable+Purgeable",
        }
    }
}

/// Builds replies for one origin of the vault.
#[derive(Debug)]
pub(crate) struct Wire<'a> {
    pub(crate) origin: &'a str,
    pub(crate) recovery: &'a Recovery,
}

impl Wire<'_> {
    pub(crate) fn key_url(&self, name: &str) -> String {
        format!("{}/keys/{name}", self.origin)
    }

    pub(crate) fn kid(&self, name: &str, version: &str) -> String {
        format!("{}/keys/{name}/{version}", self.origin)
    }

    pub(crate) fn bundle(&self, name: &str, version: &VersionRecord) -> Value {
        let mut bundle = json!({
            "key": {
                "kid": self.kid(name, &version.version),
                "kty": version.kty.name(),
                "key_ops": version.operations.iter().map(|op| op.name()).collect::<Vec<_>>(),
            },
            "attributes": self.attributes(version),
        });
        if let Some(public) = &version.public {
            bundle["key"]["n"] = json!(codec::to_base64url(&public.modulus));
            bundle["key"]["e"] = json!(codec::to_base64url(&public.exponent));
        }
        if !version.tags.is_empty() {
            bundle["tags"] = json!(version.tags);
        }
        bundle
    }

    pub(crate) fn deleted_bundle(
        &self,
        name: &str,
        version: &VersionRecord,
        deleted: DeletedState,
    ) -> Value {
        let mut bundle = self.bundle(name, version);
        self.add_deletion(&mut bundle, name, deleted);
        bundle
    }

    /// `version` given: an item of a list of versions; else of a list of keys.
    pub(crate) fn item(&self, name: &str, record: &VersionRecord, with_version: bool) -> Value {
        let kid = if with_version { self.kid(name, &record.version) } else { self.key_url(name) };
        let mut item = json!({ "kid": kid, "attributes": self.attributes(record) });
        if !record.tags.is_empty() {
            item["tags"] = json!(record.tags);
        }
        item
    }

    pub(crate) fn deleted_item(
        &self,
        name: &str,
        record: &VersionRecord,
        deleted: DeletedState,
    ) -> Value {
        let mut item = self.item(name, record, false);
        self.add_deletion(&mut item, name, deleted);
        item
    }

    fn add_deletion(&self, value: &mut Value, name: &str, deleted: DeletedState) {
        value["recoveryId"] = json!(format!("{}/deletedkeys/{name}", self.origin));
        value["deletedDate"] = json!(deleted.date);
        value["scheduledPurgeDate"] = json!(deleted.scheduled_purge);
    }

    fn attributes(&self, version: &VersionRecord) -> Value {
        let mut attributes = Map::new();
        attributes.insert("enabled".into(), json!(version.attributes.enabled));
        if let Some(nbf) = version.attributes.nbf {
            attributes.insert("nbf".into(), json!(nbf));
        }
        if let Some(exp) = version.attributes.exp {
            attributes.insert("exp".into(), json!(exp));
        }
        attributes.insert("created".into(), json!(version.created));
        attributes.insert("updated".into(), json!(version.updated));
        attributes.insert("recoveryLevel".into(), json!(self.recovery.level()));
        attributes.insert("recoverableDays".into(), json!(self.recovery.days));
        attributes.insert("exportable".into(), json!(false));
        Value::Object(attributes)
    }
}

/// What the identity endpoint answers.
#[derive(Serialize)]
pub(crate) struct TokenReply<'a> {
    pub(crate) access_token: &'a str,
    /// A string of Unix seconds, as the App Service endpoint sends it.
    pub(crate) expires_on: String,
    /// As IMDS sends it.
    pub(crate) expires_in: String,
    pub(crate) resource: &'a str,
    pub(crate) token_type: &'a str,
    pub(crate) client_id: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert!(is_key_name("kek-1") && is_key_name(&"a".repeat(127)));
        for bad in ["", "a_b", "a/b", "a.b", "é", &"a".repeat(128)] {
            assert!(!is_key_name(bad), "{bad}");
        }
        assert!(is_vault_name("kv1"));
        for bad in ["kv", "1kv", "kv-", "k--v", "kv_1", &"k".repeat(25)] {
            assert!(!is_vault_name(bad), "{bad}");
        }
        assert!(is_version("0123456789abcdef0123456789abcdef"));
        assert!(!is_version("0123456789ABCDEF0123456789abcdef"));
    }

    #[test]
    fn the_length_of_a_tag_is_counted_in_characters() {
        let tags = |len| BTreeMap::from([("é".repeat(len), "é".repeat(len))]);
        check_tags(&tags(MAX_TAG_LEN)).unwrap();
        assert_eq!(check_tags(&tags(MAX_TAG_LEN + 1)).unwrap_err().status, 400);
    }

    #[test]
    fn null_unsets_and_absent_keeps() {
        let mut attributes = Attributes { enabled: true, nbf: Some(5), exp: Some(10) };
        let patch: AttributesPatch = serde_json::from_str(r#"{"exp":null}"#).unwrap();
        patch.apply(&mut attributes).unwrap();
        assert_eq!(attributes, Attributes { enabled: true, nbf: Some(5), exp: None });
        let patch: AttributesPatch = serde_json::from_str(r#"{"exp":5}"#).unwrap();
        assert_eq!(patch.apply(&mut attributes).unwrap_err().status, 400);
        assert!(serde_json::from_str::<AttributesPatch>(r#"{"exp":"soon"}"#).is_err());
    }

    #[test]
    fn recovery_levels_follow_the_table() {
        let level = |days, purge_protection| Recovery { days, purge_protection }.level();
        assert_eq!(level(90, true), "Recoverable");
        assert_eq!(level(90, false), "Recoverable+Purgeable");
        assert_eq!(level(7, true), "CustomizedRecoverable");
        assert_eq!(level(7, false), "CustomizedRecoverable+Purgeable");
    }
}
