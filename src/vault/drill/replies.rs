//! What faults make of a request to the keys: a refusal instead of an answer, or another answer.

use serde_json::{Value, json};

use super::{Asked, Endpoint, Fault, FaultKind};
use crate::vault::api::{Call, Reply, Vault};
use crate::vault::codec;
use crate::vault::login::LoginRefusal;
use crate::vault::permission::Permission;
use crate::vault::refusal::Refusal;
use crate::vault::role;
use crate::vault::store::identities::Identity;

/// Dates that a fault shows are this far from now.
const DAY: i64 = 86400;

fn uses_key(permission: Permission) -> bool {
    seals(permission) || opens(permission)
}

fn seals(permission: Permission) -> bool {
    matches!(permission, Permission::WrapKey | Permission::Encrypt | Permission::Sign)
}

fn opens(permission: Permission) -> bool {
    matches!(permission, Permission::UnwrapKey | Permission::Decrypt | Permission::Verify)
}

impl Vault {
    /// The first of `faults` that refuses, if one does.
    pub(crate) fn drill_refusal(
        &self,
        faults: &[Fault],
        call: &Call<'_>,
        caller: &Identity,
        permission: Permission,
        key: Option<&str>,
    ) -> Option<Refusal> {
        faults.iter().find_map(|fault| self.refusal_of(fault, call, caller, permission, key))
    }

    fn refusal_of(
        &self,
        fault: &Fault,
        call: &Call<'_>,
        caller: &Identity,
        permission: Permission,
        key: Option<&str>,
    ) -> Option<Refusal> {
        let (vault, location) = (self.settings.name.as_str(), self.settings.region.as_str());
        let principal = self.principal(caller);
        let operation = permission.name();
        Some(match fault.kind {
            FaultKind::KeyDisabled if uses_key(permission) => Refusal::key_disabled(operation),
            FaultKind::KeyExpired if seals(permission) => Refusal::key_expired(operation),
            FaultKind::KeyNotYetValid if seals(permission) => Refusal::key_not_yet_valid(operation),
            FaultKind::KeyDeleted => Refusal::key_not_found(key?),
            FaultKind::BeingDeleted => Refusal::being(key?, "deleted"),
            FaultKind::BeingRecovered => Refusal::being(key?, "recovered"),
            FaultKind::ForbiddenByPolicy => {
                Refusal::by_policy(&principal, operation, vault, location)
            }
            FaultKind::AccessDenied => Refusal::by_policy(&principal, operation, vault, location)
                .with_inner("AccessDenied"),
            FaultKind::ForbiddenByRbac => Refusal::by_role(
                &principal,
                &role::data_action(permission, false),
                &self.resource_id(key),
                vault,
                location,
            ),
            FaultKind::ForbiddenByFirewall => {
                let client = call.request.client.map(|client| client.to_string());
                Refusal::by_firewall(&client.unwrap_or_default(), &principal, vault, location)
            }
            FaultKind::ForbiddenByConnection => Refusal::by_connection(&principal, vault, location),
            FaultKind::HsmAccessDenied => {
                let scope = key.map_or_else(|| "/keys".to_owned(), |key| format!("/keys/{key}"));
                let activity = codec::new_uuid().unwrap_or_default();
                Refusal::by_hsm_role(&role::data_action(permission, true), &scope, &activity)
            }
            FaultKind::OtherTenant => Refusal::unauthorized("AKV10032: Invalid issuer."),
            FaultKind::WrongAudience => Refusal::unauthorized(format!(
                "AKV10022: Invalid audience. Expected {}.",
                call.origin.resource
            )),
            FaultKind::TokenExpired => {
                Refusal::unauthorized("Error validating token: the token has expired.")
            }
            FaultKind::Throttled => Refusal::throttled(),
            FaultKind::Status => {
                let code = match fault.status {
                    500 => "InternalServerError",
                    503 => "ServiceUnavailable",
                    504 => "GatewayTimeout",
                    _ => "Drill",
                };
                Refusal::new(fault.status, code, "This is a drill.")
            }
            FaultKind::BadParameter if opens(permission) => {
                Refusal::bad_parameter("The parameter is incorrect.")
            }
            _ => return None,
        })
    }

    /// Another answer than the true one.
    pub(crate) fn drill_answer(
        &self,
        faults: &[Fault],
        permission: Option<Permission>,
        now: i64,
        reply: &mut Reply,
    ) {
        for fault in faults {
            match fault.kind {
                FaultKind::KeyDisabled => edit_attributes(reply, "enabled", &json!(false)),
                FaultKind::KeyExpired => edit_attributes(reply, "exp", &json!(now - DAY)),
                FaultKind::KeyNotYetValid => edit_attributes(reply, "nbf", &json!(now + DAY)),
                FaultKind::OtherKey if permission.is_some_and(opens) && reply.status == 200 => {
                    edit(reply, |value| {
                        let Some(result) = value.get_mut("value") else { return };
                        if let Some(bytes) = result.as_str().and_then(codec::from_base64url) {
                            let other: Vec<u8> = bytes.iter().map(|byte| byte ^ 0x55).collect();
                            *result = json!(codec::to_base64url(&other));
                        }
                    });
                }
                FaultKind::WrongBody => {
                    reply.status = 200;
                    reply.headers = vec![("content-type", "text/html".into())];
                    reply.body = Some(b"<html><body>It works!</body></html>".to_vec());
                }
                FaultKind::ProxyForbidden => {
                    reply.status = 403;
                    reply.headers = vec![("content-type", "text/html".into())];
                    reply.body = Some(b"<html><body><h1>403 Forbidden</h1></body></html>".to_vec());
                }
                FaultKind::Throttled => {
                    reply.headers.retain(|(name, _)| *name != "retry-after");
                    if let Some(seconds) = fault.retry_after {
                        reply.headers.push(("retry-after", seconds.to_string()));
                    }
                }
                FaultKind::OtherTenant => {
                    for (name, value) in &mut reply.headers {
                        if *name == "www-authenticate" {
                            let tenant = &self.access.current().tenant;
                            *value = value.replace(tenant.as_str(), OTHER_TENANT);
                        }
                    }
                }
                _ => {}
            }
        }
    }

    /// At the identity endpoint and the token endpoint.
    pub(crate) fn drill_token(&self, endpoint: Endpoint) -> Vec<Fault> {
        self.drills.hit(Asked { endpoint, operation: None, key: None })
    }

    pub(crate) fn login_refusal(
        faults: &[Fault],
        tenant: &str,
        client_id: &str,
    ) -> Option<LoginRefusal> {
        faults.iter().find_map(|fault| {
            Some(match fault.kind {
                FaultKind::TenantNotFound => LoginRefusal::tenant_not_found(tenant),
                FaultKind::AppNotFound => LoginRefusal::application_not_found(client_id, tenant),
                FaultKind::AppDisabled => LoginRefusal::application_disabled(client_id),
                FaultKind::SecretWrong => LoginRefusal::wrong_secret(client_id),
                FaultKind::SecretExpired => LoginRefusal::secret_expired(client_id),
                _ => return None,
            })
        })
    }

    /// What both token endpoints have in common.
    pub(crate) fn drill_token_answer(faults: &[Fault], reply: &mut Reply) {
        let mut error = |status: u16, error: &str, description: &str| {
            reply.status = status;
            let body = json!({ "error": error, "error_description": description });
            reply.body = Some(body.to_string().into_bytes());
        };
        for fault in faults {
            match fault.kind {
                FaultKind::IdentityNotFound => error(400, "invalid_request", "Identity not found"),
                FaultKind::Status => error(fault.status, "server_error", "This is a drill"),
                FaultKind::Throttled => {
                    error(429, "too_many_requests", "Too many requests");
                }
                _ => {}
            }
        }
        for fault in faults {
            match fault.kind {
                FaultKind::Throttled => {
                    if let Some(seconds) = fault.retry_after {
                        reply.headers.push(("retry-after", seconds.to_string()));
                    }
                }
                FaultKind::WrongBody | FaultKind::ProxyForbidden => {
                    reply.status = if fault.kind == FaultKind::WrongBody { 200 } else { 403 };
                    reply.headers = vec![("content-type", "text/html".into())];
                    reply.body = Some(b"<html><body>This is a drill</body></html>".to_vec());
                }
                _ => {}
            }
        }
    }
}

const OTHER_TENANT: &str = "00000000-0000-0000-0000-00000000d411";

fn edit(reply: &mut Reply, change: impl FnOnce(&mut Value)) {
    let Some(body) = &reply.body else { return };
    let Ok(mut value) = serde_json::from_slice::<Value>(body) else { return };
    change(&mut value);
    reply.body = Some(value.to_string().into_bytes());
}

/// In a bundle, or in each item of a list.
fn edit_attributes(reply: &mut Reply, name: &str, to: &Value) {
    if reply.status != 200 {
        return;
    }
    edit(reply, |value| {
        let set = |bundle: &mut Value| {
            if let Some(Value::Object(attributes)) = bundle.get_mut("attributes") {
                attributes.insert(name.to_owned(), to.clone());
            }
        };
        set(value);
        value.get_mut("value").and_then(Value::as_array_mut).into_iter().flatten().for_each(set);
    });
}
