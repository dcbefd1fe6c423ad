//! What decides about access beside policies: model, roles, network rules, the vault's tenant.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Call, Reply, Vault, find};
use crate::vault::audit::Event;
use crate::vault::codec;
use crate::vault::init::is_plain;
use crate::vault::network::NetworkRules;
use crate::vault::refusal::Refusal;
use crate::vault::role::{Role, RoleAssignment};
use crate::vault::settings::{self, AccessModel, Flavor};
use crate::vault::store::{self, identities, roles};
use crate::vault::wire::is_key_name;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct UpdateVault {
    enable_rbac_authorization: Option<bool>,
    tenant_id: Option<String>,
    public_network_access: Option<Switch>,
    network_acls: Option<NetworkAcls>,
}

#[derive(Deserialize)]
enum Switch {
    Enabled,
    Disabled,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NetworkAcls {
    default_action: Option<Action>,
    ip_rules: Option<Vec<IpRule>>,
}

#[derive(Clone, Copy, Deserialize)]
enum Action {
    Allow,
    Deny,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct IpRule {
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct AssignRole {
    identity: String,
    role: String,
    key: Option<String>,
}

impl Vault {
    pub(super) fn show_vault(&self) -> Reply {
        let (access, settings) = (self.access.current(), &self.settings);
        let ip_rules: Vec<Value> = access
            .network
            .allowed
            .iter()
            .map(|rule| json!({ "value": rule.to_string() }))
            .collect();
        let mut shown = json!({
            "name": settings.name,
            "flavor": settings.flavor.name(),
            "location": settings.region,
            "tenantId": access.tenant,
            "enableRbacAuthorization": access.model == AccessModel::Roles,
            "enableSoftDelete": true,
            "softDeleteRetentionInDays": settings.recovery.days,
            "publicNetworkAccess":
                if access.network.public_access { "Enabled" } else { "Disabled" },
            "networkAcls": {
                "defaultAction": if access.network.default_allow { "Allow" } else { "Deny" },
                "ipRules": ip_rules,
            },
        });
        // Absent where it is off, as at the real service.
        if settings.recovery.purge_protection {
            shown["enablePurgeProtection"] = json!(true);
        }
        Reply::ok(&shown)
    }

    pub(super) fn update_vault(&self, call: &Call<'_>) -> Result<Reply, Refusal> {
        let request: UpdateVault = call.body()?;
        if self.settings.flavor == Flavor::Mhsm && request.enable_rbac_authorization == Some(false)
        {
            return Err(Refusal::bad_parameter("A Managed HSM knows no access policies."));
        }
        if request.tenant_id.as_deref().is_some_and(|tenant| !is_plain(tenant)) {
            return Err(Refusal::bad_parameter(
                "A tenant is 1 to 64 letters, digits, dots and dashes.",
            ));
        }
        let allowed = match request.network_acls.as_ref().and_then(|acls| acls.ip_rules.as_ref()) {
            None => None,
            Some(rules) => {
                let rules: Vec<&str> = rules.iter().map(|rule| rule.value.as_str()).collect();
                let rules = NetworkRules::parse_allowed(&rules.join(","));
                Some(rules.map_err(Refusal::bad_parameter)?)
            }
        };
        self.store.write(|tx| {
            let (_, _, mut network) = settings::load_access(tx)?;
            if let Some(switch) = &request.public_network_access {
                network.public_access = matches!(switch, Switch::Enabled);
            }
            if let Some(action) = request.network_acls.as_ref().and_then(|acls| acls.default_action)
            {
                network.default_allow = matches!(action, Action::Allow);
            }
            if let Some(allowed) = allowed {
                network.allowed = allowed;
            }
            settings::save_network(tx, &network)?;
            if let Some(roles) = request.enable_rbac_authorization {
                let model = if roles { AccessModel::Roles } else { AccessModel::Policies };
                store::set_setting(tx, settings::ACCESS_MODEL, model.name())?;
            }
            if let Some(tenant) = &request.tenant_id {
                let tenant = tenant.to_ascii_lowercase();
                store::set_setting(tx, settings::TENANT, &tenant)?;
                identities::move_admin(tx, &tenant)?;
            }
            Ok::<_, Refusal>(())
        })?;
        self.access.reload(&self.store, call.now)?;
        Ok(self.show_vault())
    }

    pub(super) fn list_role_assignments(&self) -> Result<Reply, Refusal> {
        let all = self.store.read(|tx| Ok::<_, Refusal>(roles::list(tx)?))?;
        let access = self.access.current();
        let value: Vec<Value> = all
            .iter()
            .map(|assignment| {
                let name = access.identity(&assignment.object_id).map(|one| one.name.clone());
                assignment_json(assignment, name.as_deref())
            })
            .collect();
        Ok(Reply::ok(&json!({ "value": value })))
    }

    pub(super) fn assign_role(&self, call: &Call<'_>, event: &mut Event) -> Result<Reply, Refusal> {
        let request: AssignRole = call.body()?;
        event.subject = Some(request.identity.chars().take(127).collect());
        let hsm = self.settings.flavor == Flavor::Mhsm;
        let role = Role::from_name(&request.role).filter(|role| role.is_hsm() == hsm).ok_or_else(
            || {
                let names: Vec<&str> = Role::ALL
                    .iter()
                    .filter(|role| role.is_hsm() == hsm)
                    .map(|r| r.name())
                    .collect();
                Refusal::bad_parameter(format!("The roles here are: {}.", names.join(", ")))
            },
        )?;
        if request.key.as_deref().is_some_and(|key| !is_key_name(key)) {
            return Err(Refusal::bad_parameter("The scope is not the name of a key."));
        }
        let assignment = self.store.write(|tx| {
            let identity = find(tx, &request.identity)?;
            let same = |other: &RoleAssignment| {
                other.object_id == identity.object_id
                    && other.role == role
                    && match (&other.key, &request.key) {
                        (Some(own), Some(given)) => own.eq_ignore_ascii_case(given),
                        (None, None) => true,
                        _ => false,
                    }
            };
            if let Some(there) = roles::list(tx)?.into_iter().find(same) {
                return Ok(there);
            }
            let assignment = RoleAssignment {
                id: codec::new_uuid()?,
                object_id: identity.object_id,
                role,
                key: request.key.clone(),
                created: call.now,
            };
            roles::insert(tx, &assignment)?;
            Ok::<_, Refusal>(assignment)
        })?;
        self.access.reload(&self.store, call.now)?;
        Ok(Reply::ok(&assignment_json(&assignment, Some(&request.identity))))
    }

    pub(super) fn remove_role_assignment(
        &self,
        call: &Call<'_>,
        id: &str,
    ) -> Result<Reply, Refusal> {
        self.store.write(|tx| {
            if !roles::delete(tx, id)? {
                return Err(Refusal::new(
                    404,
                    "RoleAssignmentNotFound",
                    "Requested role assignment not found.",
                ));
            }
            Ok(())
        })?;
        self.access.reload(&self.store, call.now)?;
        Ok(Reply::no_content())
    }
}

fn assignment_json(assignment: &RoleAssignment, identity: Option<&str>) -> Value {
    json!({
        "id": assignment.id,
        "identity": identity,
        "principalId": assignment.object_id,
        "role": assignment.role.name(),
        "roleDefinitionId": assignment.role.id(),
        "key": assignment.key,
        "created": assignment.created,
    })
}
