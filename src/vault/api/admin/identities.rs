//! Identities: who there is, what an access policy lets them do, whose tokens a host may ask for.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Call, Reply, Vault, find, refuse_admin};
use crate::vault::audit::Event;
use crate::vault::codec;
use crate::vault::init::is_plain;
use crate::vault::permission::Permissions;
use crate::vault::refusal::Refusal;
use crate::vault::store::identities::{self, Identity};
use crate::vault::wire::is_key_name;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CreateIdentity {
    name: String,
    /// SHA-256 of the header secret, base64url: the secret itself stays with whoever made it.
    /// Absent: the identity has no host of its own.
    header_sha256: Option<String>,
    /// Absent: the vault's.
    tenant: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct UpdateIdentity {
    enabled: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ChangePermissions {
    key_permissions: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Assign {
    /// Name of the host's own identity.
    host: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct DeleteIdentity {
    /// Tokens that were issued stay good until they expire, as at the real service.
    #[serde(default)]
    keep_tokens: bool,
}

impl Vault {
    pub(super) fn list_identities(&self) -> Result<Reply, Refusal> {
        let all = self.store.read(|tx| {
            let mut all = Vec::new();
            for identity in identities::list(tx)? {
                let assigned = identities::assigned_to(tx, &identity.object_id)?;
                all.push(identity_json(&identity, &assigned));
            }
            Ok::<_, Refusal>(all)
        })?;
        Ok(Reply::ok(&json!({ "value": all })))
    }

    pub(super) fn create_identity(
        &self,
        call: &Call<'_>,
        event: &mut Event,
    ) -> Result<Reply, Refusal> {
        let request: CreateIdentity = call.body()?;
        if !is_key_name(&request.name) {
            return Err(Refusal::bad_parameter(
                "The name of an identity is 1 to 127 letters, digits and dashes.",
            ));
        }
        event.subject = Some(request.name.clone());
        let header_sha256 = request.header_sha256.as_deref().map(sha256).transpose()?;
        let tenant = match request.tenant {
            Some(tenant) if is_plain(&tenant) => tenant.to_ascii_lowercase(),
            Some(_) => {
                return Err(Refusal::bad_parameter(
                    "A tenant is 1 to 64 letters, digits, dots and dashes.",
                ));
            }
            None => self.access.current().tenant.clone(),
        };
        let identity = Identity {
            name: request.name,
            object_id: codec::new_uuid()?,
            client_id: codec::new_uuid()?,
            header_sha256,
            tenant,
            permissions: Permissions::default(),
            is_admin: false,
            enabled: true,
            deleted: None,
            created: call.now,
        };
        self.store.write(|tx| {
            if identities::find(tx, &identity.name)?.is_some() {
                return Err(Refusal::already_exists("Identity", &identity.name));
            }
            if let Some(header) = &header_sha256
                && identities::find_by_header(tx, header)?.is_some()
            {
                return Err(Refusal::bad_parameter("Another identity has this header secret."));
            }
            identities::insert(tx, &identity)?;
            Ok(())
        })?;
        self.access.reload(&self.store, call.now)?;
        Ok(Reply::ok(&identity_json(&identity, &[])))
    }

    pub(super) fn update_identity(&self, call: &Call<'_>, name: &str) -> Result<Reply, Refusal> {
        let request: UpdateIdentity = call.body()?;
        self.change(call, name, |tx, identity| {
            identity.enabled = request.enabled;
            Ok(identities::set_enabled(tx, &identity.object_id, request.enabled)?)
        })
    }

    pub(super) fn delete_identity(&self, call: &Call<'_>, name: &str) -> Result<Reply, Refusal> {
        let request: DeleteIdentity =
            if call.request.body.is_empty() { DeleteIdentity::default() } else { call.body()? };
        self.change(call, name, |tx, identity| {
            if request.keep_tokens {
                identities::delete_keeping_tokens(tx, &identity.object_id, call.now)?;
            } else {
                identities::delete(tx, &identity.object_id)?;
            }
            Ok(())
        })
    }

    pub(super) fn change_permissions(
        &self,
        call: &Call<'_>,
        name: &str,
        change: impl FnOnce(&mut Permissions, &Permissions),
    ) -> Result<Reply, Refusal> {
        let request: ChangePermissions = call.body()?;
        let listed: Permissions =
            request.key_permissions.join(",").parse().map_err(Refusal::bad_parameter)?;
        self.change(call, name, |tx, identity| {
            change(&mut identity.permissions, &listed);
            Ok(identities::set_permissions(tx, &identity.object_id, &identity.permissions)?)
        })
    }

    pub(super) fn assign_identity(
        &self,
        call: &Call<'_>,
        name: &str,
        assigned: bool,
    ) -> Result<Reply, Refusal> {
        let request: Assign = call.body()?;
        self.change(call, name, |tx, identity| {
            let host = find(tx, &request.host)?;
            if host.object_id == identity.object_id {
                return Err(Refusal::bad_parameter("An identity is not assigned to itself."));
            }
            if assigned {
                identities::assign(tx, &host.object_id, &identity.object_id)?;
            } else if !identities::unassign(tx, &host.object_id, &identity.object_id)? {
                return Err(Refusal::new(
                    404,
                    "IdentityNotFound",
                    format!("{name} is not assigned to {}.", request.host),
                ));
            }
            Ok(())
        })
    }

    /// Changes an identity other than the administrator's.
    fn change(
        &self,
        call: &Call<'_>,
        name: &str,
        change: impl FnOnce(&rusqlite::Transaction<'_>, &mut Identity) -> Result<(), Refusal>,
    ) -> Result<Reply, Refusal> {
        let reply = self.store.write(|tx| {
            let mut identity = find(tx, name)?;
            refuse_admin(&identity)?;
            change(tx, &mut identity)?;
            let assigned = identities::assigned_to(tx, &identity.object_id)?;
            Ok::<_, Refusal>(identity_json(&identity, &assigned))
        })?;
        self.access.reload(&self.store, call.now)?;
        Ok(Reply::ok(&reply))
    }
}

pub(super) fn sha256(text: &str) -> Result<[u8; 32], Refusal> {
    codec::from_base64url(text)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| Refusal::bad_parameter("A hash of a secret is a SHA-256 in base64url."))
}

fn identity_json(identity: &Identity, assigned: &[Identity]) -> Value {
    json!({
        "name": identity.name,
        "principalId": identity.object_id,
        "clientId": identity.client_id,
        "tenantId": identity.tenant,
        "keyPermissions": identity.permissions.names(),
        "assigned": assigned.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(),
        "enabled": identity.enabled,
        "admin": identity.is_admin,
        "created": identity.created,
    })
}
