//! Credentials of identities for the token endpoint. Of a secret only the hash comes here.

use serde::Deserialize;
use serde_json::{Value, json};

use super::identities::sha256;
use super::{Call, Reply, Vault, find, refuse_admin};
use crate::vault::assertion;
use crate::vault::codec;
use crate::vault::refusal::Refusal;
use crate::vault::store::credentials::{self, Credential, Proof};

/// As the real service allows per application.
const MAX_CREDENTIALS: usize = 20;
const MAX_KEYS: usize = 64 * 1024;
/// What Microsoft Entra ID asks of federated tokens unless told otherwise.
const DEFAULT_AUDIENCE: &str = "api://AzureADTokenExchange";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AddCredential {
    secret_sha256: Option<String>,
    certificate: Option<String>,
    federated: Option<Federated>,
    expires: Option<i64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Federated {
    issuer: String,
    subject: String,
    audience: Option<String>,
    keys: String,
}

impl Vault {
    pub(super) fn list_credentials(&self, name: &str) -> Result<Reply, Refusal> {
        let all = self.store.read(|tx| {
            let identity = find(tx, name)?;
            Ok::<_, Refusal>(credentials::of(tx, &identity.object_id)?)
        })?;
        let value: Vec<Value> = all.iter().map(credential_json).collect();
        Ok(Reply::ok(&json!({ "value": value })))
    }

    pub(super) fn add_credential(&self, call: &Call<'_>, name: &str) -> Result<Reply, Refusal> {
        let request: AddCredential = call.body()?;
        let proof = match (request.secret_sha256, request.certificate, request.federated) {
            (Some(hash), None, None) => Proof::Secret { sha256: sha256(&hash)? },
            (None, Some(pem), None) => Proof::Certificate { pem },
            (None, None, Some(Federated { issuer, subject, audience, keys })) => {
                let audience = audience.unwrap_or_else(|| DEFAULT_AUDIENCE.to_owned());
                if [&issuer, &subject, &audience]
                    .iter()
                    .any(|part| !(1..=600).contains(&part.len()))
                {
                    return Err(Refusal::bad_parameter(
                        "Issuer, subject and audience have 1 to 600 characters.",
                    ));
                }
                Proof::Federated { issuer, subject, audience, keys }
            }
            _ => {
                return Err(Refusal::bad_parameter(
                    "A credential is a secret, a certificate or a federation.",
                ));
            }
        };
        let too_long = match &proof {
            Proof::Secret { .. } => false,
            Proof::Certificate { pem: text } | Proof::Federated { keys: text, .. } => {
                text.len() > MAX_KEYS
            }
        };
        if too_long || !assertion::is_usable(&proof) {
            return Err(Refusal::bad_parameter(
                "The key is no PEM certificate, PEM public key or JWKS of an RSA or P-256 key.",
            ));
        }
        let credential = self.store.write(|tx| {
            let identity = find(tx, name)?;
            refuse_admin(&identity)?;
            if credentials::of(tx, &identity.object_id)?.len() >= MAX_CREDENTIALS {
                return Err(Refusal::bad_parameter(format!(
                    "An identity has at most {MAX_CREDENTIALS} credentials."
                )));
            }
            let credential = Credential {
                id: codec::new_uuid()?,
                object_id: identity.object_id,
                proof,
                expires: request.expires,
                created: call.now,
            };
            credentials::insert(tx, &credential)?;
            Ok::<_, Refusal>(credential)
        })?;
        Ok(Reply::ok(&credential_json(&credential)))
    }

    pub(super) fn remove_credential(&self, name: &str, id: &str) -> Result<Reply, Refusal> {
        self.store.write(|tx| {
            let identity = find(tx, name)?;
            if !credentials::delete(tx, &identity.object_id, id)? {
                return Err(Refusal::new(
                    404,
                    "CredentialNotFound",
                    format!("{name} has no such credential."),
                ));
            }
            Ok(())
        })?;
        Ok(Reply::no_content())
    }
}

fn credential_json(credential: &Credential) -> Value {
    let mut value = json!({
        "id": credential.id,
        "kind": credential.proof.kind(),
        "expires": credential.expires,
        "created": credential.created,
    });
    if let Proof::Federated { issuer, subject, audience, .. } = &credential.proof {
        value["issuer"] = json!(issuer);
        value["subject"] = json!(subject);
        value["audience"] = json!(audience);
    }
    value
}
