//! Identities and their permissions, for the administrator alone.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Call, Reply, Vault};
use crate::vault::audit::Event;
use crate::vault::codec;
use crate::vault::permission::Permissions;
use crate::vault::refusal::Refusal;
use crate::vault::route::AdminRoute;
use crate::vault::store::identities::{self, Identity};
use crate::vault::wire::is_key_name;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CreateIdentity {
    name: String,
    /// SHA-256 of the header secret, base64url: the secret itself stays with whoever made it.
    header_sha256: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ChangePermissions {
    key_permissions: Vec<String>,
}

impl Vault {
    pub(super) fn administer(
        &self,
        call: &Call<'_>,
        route: AdminRoute,
        event: &mut Event,
    ) -> Result<Reply, Refusal> {
        match route {
            AdminRoute::ListIdentities => {
                let all = self.store.read(|tx| Ok::<_, Refusal>(identities::list(tx)?))?;
                let value: Vec<Value> = all.iter().map(|one| self.identity_json(one)).collect();
                Ok(Reply::ok(&json!({ "value": value })))
            }
            AdminRoute::CreateIdentity => self.create_identity(call, event),
            AdminRoute::DeleteIdentity { name } => {
                event.subject = Some(name.clone());
                let gone = self.store.write(|tx| {
                    let identity = find(tx, &name)?;
                    refuse_admin(&identity)?;
                    identities::delete(tx, &name)?;
                    Ok::<_, Refusal>(identity)
                })?;
                Ok(Reply::ok(&self.identity_json(&gone)))
            }
            AdminRoute::Grant { name } => {
                self.change_permissions(call, &name, event, Permissions::add)
            }
            AdminRoute::Revoke { name } => {
                self.change_permissions(call, &name, event, Permissions::remove)
            }
        }
    }

    fn create_identity(&self, call: &Call<'_>, event: &mut Event) -> Result<Reply, Refusal> {
        let request: CreateIdentity = call.body()?;
        if !is_key_name(&request.name) {
            return Err(Refusal::bad_parameter(
                "The name of an identity is 1 to 127 letters, digits and dashes.",
            ));
        }
        event.subject = Some(request.name.clone());
        let header_sha256: [u8; 32] = codec::from_base64url(&request.header_sha256)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| {
                Refusal::bad_parameter("Property 'headerSha256' is not a SHA-256 in base64url.")
            })?;
        let identity = Identity {
            name: request.name,
            object_id: codec::new_uuid()?,
            client_id: codec::new_uuid()?,
            header_sha256,
            permissions: Permissions::default(),
            is_admin: false,
            created: call.now,
        };
        self.store.write(|tx| {
            if identities::find(tx, &identity.name)?.is_some() {
                return Err(Refusal::already_exists("Identity", &identity.name));
            }
            if identities::find_by_header(tx, &header_sha256)?.is_some() {
                return Err(Refusal::bad_parameter("Another identity has this header secret."));
            }
            identities::insert(tx, &identity)?;
            Ok(())
        })?;
        Ok(Reply::ok(&self.identity_json(&identity)))
    }

    fn change_permissions(
        &self,
        call: &Call<'_>,
        name: &str,
        event: &mut Event,
        change: impl FnOnce(&mut Permissions, &Permissions),
    ) -> Result<Reply, Refusal> {
        let request: ChangePermissions = call.body()?;
        event.subject = Some(name.to_owned());
        let listed: Permissions =
            request.key_permissions.join(",").parse().map_err(Refusal::bad_parameter)?;
        let identity = self.store.write(|tx| {
            let mut identity = find(tx, name)?;
            refuse_admin(&identity)?;
            change(&mut identity.permissions, &listed);
            identities::set_permissions(tx, name, &identity.permissions)?;
            Ok::<_, Refusal>(identity)
        })?;
        Ok(Reply::ok(&self.identity_json(&identity)))
    }

    fn identity_json(&self, identity: &Identity) -> Value {
        json!({
            "name": identity.name,
            "principalId": identity.object_id,
            "clientId": identity.client_id,
            "tenantId": self.settings.tenant,
            "keyPermissions": identity.permissions.names(),
            "admin": identity.is_admin,
            "created": identity.created,
        })
    }
}

fn find(tx: &rusqlite::Transaction<'_>, name: &str) -> Result<Identity, Refusal> {
    identities::find(tx, name)?.ok_or_else(|| {
        Refusal::new(404, "IdentityNotFound", format!("There is no identity {name}."))
    })
}

fn refuse_admin(identity: &Identity) -> Result<(), Refusal> {
    if identity.is_admin {
        return Err(Refusal::bad_parameter(
            "The administrator's identity cannot be changed or deleted.",
        ));
    }
    Ok(())
}
