//! Use of a key: wrap, unwrap, encrypt, decrypt, sign, verify.

use std::sync::Arc;

use serde_json::json;

use super::keys::live_version;
use super::{Call, Reply, Vault};
use crate::vault::audit::Event;
use crate::vault::codec;
use crate::vault::material::{EncryptionAlgorithm, KeyMaterial, SignatureAlgorithm};
use crate::vault::refusal::Refusal;
use crate::vault::store::keys::{self, KeyRecord, VersionRecord};
use crate::vault::wire::{CryptoRequest, KeyOperation};

impl Vault {
    pub(super) fn use_key(
        &self,
        call: &Call<'_>,
        name: &str,
        version: Option<&str>,
        operation: KeyOperation,
        event: &mut Event,
    ) -> Result<Reply, Refusal> {
        let request: CryptoRequest = call.body()?;
        let (key, record) = self.store.read(|tx| live_version(tx, name, version))?;
        event.version = Some(record.version.clone());
        event.algorithm = request.alg.as_ref().map(|name| name.chars().take(32).collect());
        allow(&record, operation, call.now)?;
        let private = self.material(&key, &record)?;
        let result = match operation {
            KeyOperation::WrapKey | KeyOperation::Encrypt => {
                let plaintext = binary("value", request.value.as_deref())?;
                let sealed = private.encrypt(encryption(request.alg.as_deref())?, &plaintext)?;
                json!(codec::to_base64url(&sealed))
            }
            KeyOperation::UnwrapKey | KeyOperation::Decrypt => {
                let sealed = binary("value", request.value.as_deref())?;
                let opened = private.decrypt(encryption(request.alg.as_deref())?, &sealed)?;
                json!(codec::to_base64url(opened.expose()))
            }
            KeyOperation::Sign => {
                let digest = binary("value", request.value.as_deref())?;
                let signature = private.rsa()?.sign(signature(request.alg.as_deref())?, &digest)?;
                json!(codec::to_base64url(&signature))
            }
            // There is no such route.
            KeyOperation::Import => return Err(Refusal::no_such_route()),
            KeyOperation::Verify => {
                let digest = binary("digest", request.digest.as_deref())?;
                let signed = binary("value", request.value.as_deref())?;
                let algorithm = signature(request.alg.as_deref())?;
                let good = private.rsa()?.verify(algorithm, &digest, &signed)?;
                return Ok(Reply::ok(&json!({ "value": good })));
            }
        };
        let kid = self.wire(call).kid(&key.name, &record.version);
        Ok(Reply::ok(&json!({ "kid": kid, "value": result })))
    }

    pub(super) fn material(
        &self,
        key: &KeyRecord,
        version: &VersionRecord,
    ) -> Result<Arc<KeyMaterial>, Refusal> {
        if let Some(private) = self.materials.lock().get(&version.id) {
            return Ok(Arc::clone(private));
        }
        let sealed = self.store.read(|tx| Ok::<_, Refusal>(keys::private(tx, version.id)?))?;
        let bytes = self.sealer.open_private(&key.name, &version.version, &sealed)?;
        let private = KeyMaterial::from_sealed(version.kty, bytes)?;
        // The two halves are stored apart: they must still belong together.
        if private.public_numbers() != version.public || private.bits() != version.bits {
            log::error!("the two halves of {}/{} differ", key.name, version.version);
            return Err(Refusal::internal());
        }
        let private = Arc::new(private);
        self.remember_material(version.id, Arc::clone(&private));
        Ok(private)
    }
}

/// May this version be used so, now?
pub(super) fn allow(
    version: &VersionRecord,
    operation: KeyOperation,
    now: i64,
) -> Result<(), Refusal> {
    let attributes = version.attributes;
    if !attributes.enabled {
        return Err(Refusal::key_disabled(operation.name()));
    }
    if !version.operations.contains(&operation) {
        return Err(Refusal::operation_not_permitted(operation.name()));
    }
    if operation.is_date_controlled() {
        if attributes.exp.is_some_and(|exp| exp <= now) {
            return Err(Refusal::key_expired(operation.name()));
        }
        if attributes.nbf.is_some_and(|nbf| nbf > now) {
            return Err(Refusal::key_not_yet_valid(operation.name()));
        }
    }
    Ok(())
}

fn binary(property: &str, text: Option<&str>) -> Result<Vec<u8>, Refusal> {
    text.and_then(codec::from_base64url).filter(|bytes| !bytes.is_empty()).ok_or_else(|| {
        Refusal::bad_parameter(format!("Property '{property}' is missing or not base64url."))
    })
}

fn encryption(name: Option<&str>) -> Result<EncryptionAlgorithm, Refusal> {
    name.and_then(EncryptionAlgorithm::from_name).ok_or_else(unknown_algorithm)
}

fn signature(name: Option<&str>) -> Result<SignatureAlgorithm, Refusal> {
    name.and_then(SignatureAlgorithm::from_name).ok_or_else(unknown_algorithm)
}

fn unknown_algorithm() -> Refusal {
    Refusal::bad_parameter("Property 'alg' is missing or not an algorithm for this key.")
}
