//! What the real service keeps in its management plane, for the administrator alone.

mod credentials;
mod identities;
mod rules;

use rusqlite::Transaction;

use super::{Call, Reply, Vault};
use crate::vault::audit::Event;
use crate::vault::refusal::Refusal;
use crate::vault::route::AdminRoute;
use crate::vault::store::identities::{self as store, Identity};

impl Vault {
    pub(super) fn administer(
        &self,
        call: &Call<'_>,
        route: AdminRoute,
        event: &mut Event,
    ) -> Result<Reply, Refusal> {
        event.subject = route.subject().map(str::to_owned);
        match route {
            AdminRoute::ShowVault => Ok(self.show_vault()),
            AdminRoute::UpdateVault => self.update_vault(call),
            AdminRoute::ListIdentities => self.list_identities(),
            AdminRoute::CreateIdentity => self.create_identity(call, event),
            AdminRoute::UpdateIdentity { name } => self.update_identity(call, &name),
            AdminRoute::DeleteIdentity { name } => self.delete_identity(call, &name),
            AdminRoute::Grant { name } => self.change_permissions(call, &name, |own, listed| {
                own.add(listed);
            }),
            AdminRoute::Revoke { name } => self.change_permissions(call, &name, |own, listed| {
                own.remove(listed);
            }),
            AdminRoute::Assign { name } => self.assign_identity(call, &name, true),
            AdminRoute::Unassign { name } => self.assign_identity(call, &name, false),
            AdminRoute::ListCredentials { name } => self.list_credentials(&name),
            AdminRoute::AddCredential { name } => self.add_credential(call, &name),
            AdminRoute::RemoveCredential { name, id } => self.remove_credential(&name, &id),
            AdminRoute::ListRoleAssignments => self.list_role_assignments(),
            AdminRoute::AssignRole => self.assign_role(call, event),
            AdminRoute::RemoveRoleAssignment { id } => self.remove_role_assignment(call, &id),
        }
    }
}

fn find(tx: &Transaction<'_>, name: &str) -> Result<Identity, Refusal> {
    store::find(tx, name)?.ok_or_else(|| {
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
