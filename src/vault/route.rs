//! From method and path to what is asked for, with the quirks of the real paths: an empty version
//! (`/keys/kek/`, `/keys/kek//wrapkey`) means the newest, names of operations come in any case.

use super::access::Needed;
use super::permission::Permission;
use super::refusal::Refusal;
use super::wire::{KeyOperation, is_key_name, is_version};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    ListKeys,
    ListVersions {
        name: String,
    },
    GetKey {
        name: String,
        version: Option<String>,
    },
    UpdateKey {
        name: String,
        version: Option<String>,
    },
    CreateKey {
        name: String,
    },
    ImportKey {
        name: String,
    },
    DeleteKey {
        name: String,
    },
    RotateKey {
        name: String,
    },
    GetRotationPolicy {
        name: String,
    },
    SetRotationPolicy {
        name: String,
    },
    BackupKey {
        name: String,
    },
    RestoreKey,
    Use {
        name: String,
        version: Option<String>,
        operation: KeyOperation,
    },
    ListDeleted,
    GetDeleted {
        name: String,
    },
    RecoverDeleted {
        name: String,
    },
    PurgeDeleted {
        name: String,
    },
    /// Random bytes, of a Managed HSM alone.
    Random,
    Admin(AdminRoute),
}

/// What the real service keeps in its management plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AdminRoute {
    ShowVault,
    UpdateVault,
    ListIdentities,
    CreateIdentity,
    UpdateIdentity { name: String },
    DeleteIdentity { name: String },
    Grant { name: String },
    Revoke { name: String },
    Assign { name: String },
    Unassign { name: String },
    ListCredentials { name: String },
    AddCredential { name: String },
    RemoveCredential { name: String, id: String },
    ListRoleAssignments,
    AssignRole,
    RemoveRoleAssignment { id: String },
}

impl AdminRoute {
    const fn operation_name(&self) -> &'static str {
        match self {
            AdminRoute::ShowVault => "VaultGet",
            AdminRoute::UpdateVault => "VaultPatch",
            AdminRoute::ListIdentities => "IdentityList",
            AdminRoute::CreateIdentity => "IdentityCreate",
            AdminRoute::UpdateIdentity { .. } => "IdentityUpdate",
            AdminRoute::DeleteIdentity { .. } => "IdentityDelete",
            AdminRoute::Grant { .. } => "PermissionsGrant",
            AdminRoute::Revoke { .. } => "PermissionsRevoke",
            AdminRoute::Assign { .. } => "IdentityAssign",
            AdminRoute::Unassign { .. } => "IdentityUnassign",
            AdminRoute::ListCredentials { .. } => "CredentialList",
            AdminRoute::AddCredential { .. } => "CredentialAdd",
            AdminRoute::RemoveCredential { .. } => "CredentialRemove",
            AdminRoute::ListRoleAssignments => "RoleAssignmentList",
            AdminRoute::AssignRole => "RoleAssignmentCreate",
            AdminRoute::RemoveRoleAssignment { .. } => "RoleAssignmentDelete",
        }
    }

    /// The identity that it is about, as far as the path tells.
    pub(crate) fn subject(&self) -> Option<&str> {
        match self {
            AdminRoute::UpdateIdentity { name }
            | AdminRoute::DeleteIdentity { name }
            | AdminRoute::Grant { name }
            | AdminRoute::Revoke { name }
            | AdminRoute::Assign { name }
            | AdminRoute::Unassign { name }
            | AdminRoute::ListCredentials { name }
            | AdminRoute::AddCredential { name }
            | AdminRoute::RemoveCredential { name, .. } => Some(name),
            _ => None,
        }
    }
}

impl Route {
    pub(crate) fn parse(method: &str, path: &str) -> Result<Route, Refusal> {
        let segments: Vec<&str> =
            path.strip_prefix('/').ok_or_else(Refusal::no_such_route)?.split('/').collect();
        let (&root, rest) = segments.split_first().ok_or_else(Refusal::no_such_route)?;
        // One slash at the end says nothing.
        let rest = match rest {
            [rest @ .., ""] if !rest.is_empty() => rest,
            _ => rest,
        };
        match root.to_ascii_lowercase().as_str() {
            "keys" => key_route(method, rest),
            "deletedkeys" => deleted_route(method, rest),
            "rng" if matches!(rest, [] | [""]) => match method {
                "POST" => Ok(Route::Random),
                _ => Err(Refusal::method_not_allowed(method)),
            },
            "byokfs" => admin_route(method, rest).map(Route::Admin),
            _ => Err(Refusal::no_such_route()),
        }
    }

    /// What an identity must be allowed; None for the administrator's own routes.
    pub(crate) fn needs(&self) -> Option<Needed> {
        Some(match self {
            Route::ListKeys | Route::ListVersions { .. } => Permission::List.into(),
            Route::GetKey { .. } => Permission::Get.into(),
            // Roles tell deleted keys from others, policies do not.
            Route::ListDeleted => {
                Needed { by_policy: Permission::List, by_role: Permission::GetDeleted }
            }
            Route::GetDeleted { .. } => {
                Needed { by_policy: Permission::Get, by_role: Permission::GetDeleted }
            }
            Route::UpdateKey { .. } => Permission::Update.into(),
            Route::CreateKey { .. } => Permission::Create.into(),
            Route::ImportKey { .. } => Permission::Import.into(),
            Route::DeleteKey { .. } => Permission::Delete.into(),
            Route::RotateKey { .. } => Permission::Rotate.into(),
            Route::GetRotationPolicy { .. } => Permission::GetRotationPolicy.into(),
            Route::SetRotationPolicy { .. } => Permission::SetRotationPolicy.into(),
            Route::BackupKey { .. } => Permission::Backup.into(),
            Route::RestoreKey => Permission::Restore.into(),
            Route::RecoverDeleted { .. } => Permission::Recover.into(),
            Route::PurgeDeleted { .. } => Permission::Purge.into(),
            Route::Random => Permission::Random.into(),
            Route::Use { operation, .. } => match operation {
                KeyOperation::Encrypt => Permission::Encrypt,
                KeyOperation::Decrypt => Permission::Decrypt,
                KeyOperation::Sign => Permission::Sign,
                KeyOperation::Verify => Permission::Verify,
                KeyOperation::WrapKey => Permission::WrapKey,
                KeyOperation::UnwrapKey => Permission::UnwrapKey,
                KeyOperation::Import => Permission::Import,
            }
            .into(),
            Route::Admin(_) => return None,
        })
    }

    /// As the real service's audit log names it.
    pub(crate) fn operation_name(&self) -> &'static str {
        match self {
            Route::ListKeys => "KeyList",
            Route::ListVersions { .. } => "KeyListVersions",
            Route::GetKey { .. } => "KeyGet",
            Route::UpdateKey { .. } => "KeyUpdate",
            Route::CreateKey { .. } => "KeyCreate",
            Route::ImportKey { .. } => "KeyImport",
            Route::DeleteKey { .. } => "KeyDelete",
            Route::RotateKey { .. } => "KeyRotate",
            Route::GetRotationPolicy { .. } => "KeyRotationPolicyGet",
            Route::SetRotationPolicy { .. } => "KeyRotationPolicySet",
            Route::BackupKey { .. } => "KeyBackup",
            Route::RestoreKey => "KeyRestore",
            Route::ListDeleted => "KeyListDeleted",
            Route::GetDeleted { .. } => "KeyGetDeleted",
            Route::RecoverDeleted { .. } => "KeyRecover",
            Route::PurgeDeleted { .. } => "KeyPurge",
            Route::Use { operation, .. } => match operation {
                KeyOperation::Encrypt => "KeyEncrypt",
                KeyOperation::Decrypt => "KeyDecrypt",
                KeyOperation::Sign => "KeySign",
                KeyOperation::Verify => "KeyVerify",
                KeyOperation::WrapKey => "KeyWrap",
                KeyOperation::UnwrapKey => "KeyUnwrap",
                KeyOperation::Import => "KeyImport",
            },
            Route::Random => "RandomBytesGet",
            Route::Admin(route) => route.operation_name(),
        }
    }

    pub(crate) fn key(&self) -> (Option<&str>, Option<&str>) {
        match self {
            Route::GetKey { name, version }
            | Route::UpdateKey { name, version }
            | Route::Use { name, version, .. } => (Some(name), version.as_deref()),
            Route::ListVersions { name }
            | Route::CreateKey { name }
            | Route::ImportKey { name }
            | Route::DeleteKey { name }
            | Route::RotateKey { name }
            | Route::GetRotationPolicy { name }
            | Route::SetRotationPolicy { name }
            | Route::BackupKey { name }
            | Route::GetDeleted { name }
            | Route::RecoverDeleted { name }
            | Route::PurgeDeleted { name } => (Some(name), None),
            Route::ListKeys
            | Route::RestoreKey
            | Route::ListDeleted
            | Route::Random
            | Route::Admin(_) => (None, None),
        }
    }
}

fn key_route(method: &str, rest: &[&str]) -> Result<Route, Refusal> {
    let lower: Vec<String> = rest.iter().map(|segment| segment.to_ascii_lowercase()).collect();
    let lower: Vec<&str> = lower.iter().map(String::as_str).collect();
    match (method, rest, lower.as_slice()) {
        ("GET", [] | [""], _) => Ok(Route::ListKeys),
        (_, [] | [""], _) => Err(Refusal::method_not_allowed(method)),
        ("POST", [_], ["restore"]) => Ok(Route::RestoreKey),
        ("GET", [name, _], [_, "versions"]) => Ok(Route::ListVersions { name: key_name(name)? }),
        ("GET", [name, _], [_, "rotationpolicy"]) => {
            Ok(Route::GetRotationPolicy { name: key_name(name)? })
        }
        ("PUT", [name, _], [_, "rotationpolicy"]) => {
            Ok(Route::SetRotationPolicy { name: key_name(name)? })
        }
        ("POST", [name, _], [_, action]) => {
            let name = key_name(name)?;
            match *action {
                "create" => Ok(Route::CreateKey { name }),
                "rotate" => Ok(Route::RotateKey { name }),
                "backup" => Ok(Route::BackupKey { name }),
                _ => use_route(name, None, action),
            }
        }
        ("POST", [name, version, _], [_, _, action]) => {
            use_route(key_name(name)?, key_version(name, version)?, action)
        }
        ("GET", [name], _) => Ok(Route::GetKey { name: key_name(name)?, version: None }),
        ("GET", [name, version], _) => {
            Ok(Route::GetKey { name: key_name(name)?, version: key_version(name, version)? })
        }
        ("PATCH", [name], _) => Ok(Route::UpdateKey { name: key_name(name)?, version: None }),
        ("PATCH", [name, version], _) => {
            Ok(Route::UpdateKey { name: key_name(name)?, version: key_version(name, version)? })
        }
        ("PUT", [name], _) => Ok(Route::ImportKey { name: key_name(name)? }),
        ("DELETE", [name], _) => Ok(Route::DeleteKey { name: key_name(name)? }),
        (_, [name] | [name, _] | [name, _, _], _) => {
            key_name(name)?;
            Err(Refusal::method_not_allowed(method))
        }
        _ => Err(Refusal::no_such_route()),
    }
}

fn use_route(name: String, version: Option<String>, action: &str) -> Result<Route, Refusal> {
    let operation = KeyOperation::USES
        .into_iter()
        .find(|operation| operation.name().eq_ignore_ascii_case(action))
        .ok_or_else(Refusal::no_such_route)?;
    Ok(Route::Use { name, version, operation })
}

fn deleted_route(method: &str, rest: &[&str]) -> Result<Route, Refusal> {
    match (method, rest) {
        ("GET", [] | [""]) => Ok(Route::ListDeleted),
        ("GET", [name]) => Ok(Route::GetDeleted { name: key_name(name)? }),
        ("DELETE", [name]) => Ok(Route::PurgeDeleted { name: key_name(name)? }),
        ("POST", [name, action]) if action.eq_ignore_ascii_case("recover") => {
            Ok(Route::RecoverDeleted { name: key_name(name)? })
        }
        (_, [] | [_]) => Err(Refusal::method_not_allowed(method)),
        _ => Err(Refusal::no_such_route()),
    }
}

fn admin_route(method: &str, rest: &[&str]) -> Result<AdminRoute, Refusal> {
    match rest {
        ["vault"] => match method {
            "GET" => Ok(AdminRoute::ShowVault),
            "PATCH" => Ok(AdminRoute::UpdateVault),
            _ => Err(Refusal::method_not_allowed(method)),
        },
        ["identities"] => match method {
            "GET" => Ok(AdminRoute::ListIdentities),
            "POST" => Ok(AdminRoute::CreateIdentity),
            _ => Err(Refusal::method_not_allowed(method)),
        },
        ["identities", name] => {
            let name = key_name(name)?;
            match method {
                "PATCH" => Ok(AdminRoute::UpdateIdentity { name }),
                "DELETE" => Ok(AdminRoute::DeleteIdentity { name }),
                _ => Err(Refusal::method_not_allowed(method)),
            }
        }
        ["identities", name, "credentials"] => {
            let name = key_name(name)?;
            match method {
                "GET" => Ok(AdminRoute::ListCredentials { name }),
                "POST" => Ok(AdminRoute::AddCredential { name }),
                _ => Err(Refusal::method_not_allowed(method)),
            }
        }
        ["identities", name, "credentials", id] if method == "DELETE" => {
            Ok(AdminRoute::RemoveCredential { name: key_name(name)?, id: (*id).to_owned() })
        }
        ["identities", name, action @ ("grant" | "revoke" | "assign" | "unassign")] => {
            let name = key_name(name)?;
            match (method, *action) {
                ("POST", "grant") => Ok(AdminRoute::Grant { name }),
                ("POST", "revoke") => Ok(AdminRoute::Revoke { name }),
                ("POST", "assign") => Ok(AdminRoute::Assign { name }),
                ("POST", _) => Ok(AdminRoute::Unassign { name }),
                _ => Err(Refusal::method_not_allowed(method)),
            }
        }
        ["roleassignments"] => match method {
            "GET" => Ok(AdminRoute::ListRoleAssignments),
            "POST" => Ok(AdminRoute::AssignRole),
            _ => Err(Refusal::method_not_allowed(method)),
        },
        ["roleassignments", id] if method == "DELETE" => {
            Ok(AdminRoute::RemoveRoleAssignment { id: (*id).to_owned() })
        }
        _ => Err(Refusal::no_such_route()),
    }
}

fn key_name(text: &str) -> Result<String, Refusal> {
    if is_key_name(text) {
        Ok(text.to_owned())
    } else {
        Err(Refusal::bad_parameter(
            "The request URI contains an invalid name: 1 to 127 letters, digits and dashes are \
             allowed.",
        ))
    }
}

fn key_version(name: &str, text: &str) -> Result<Option<String>, Refusal> {
    let lower = text.to_ascii_lowercase();
    if text.is_empty() {
        Ok(None)
    } else if is_version(&lower) {
        Ok(Some(lower))
    } else {
        Err(Refusal::key_not_found(&format!("{name}/{}", printable(text))))
    }
}

/// Path segments end up in messages and logs.
fn printable(text: &str) -> String {
    text.chars().filter(char::is_ascii_graphic).take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: &str = "0123456789abcdef0123456789abcdef";

    fn parse(method: &str, path: &str) -> Result<Route, u16> {
        Route::parse(method, path).map_err(|refusal| refusal.status)
    }

    #[test]
    fn the_quirks_of_the_real_paths() {
        let get = |version: Option<&str>| {
            Ok(Route::GetKey { name: "kek".into(), version: version.map(Into::into) })
        };
        assert_eq!(parse("GET", "/keys/kek"), get(None));
        assert_eq!(parse("GET", "/keys/kek/"), get(None));
        assert_eq!(parse("GET", "/Keys/kek/"), get(None));
        assert_eq!(parse("GET", &format!("/keys/kek/{V}")), get(Some(V)));
        assert_eq!(parse("GET", &format!("/keys/kek/{V}/")), get(Some(V)));
        let versions = Ok(Route::ListVersions { name: "kek".into() });
        assert_eq!(parse("GET", "/keys/kek/versions/"), versions);
        assert_eq!(parse("PUT", "/keys/kek/"), Ok(Route::ImportKey { name: "kek".into() }));
        assert_eq!(parse("DELETE", "/keys/kek/"), Ok(Route::DeleteKey { name: "kek".into() }));
        assert_eq!(parse("GET", &format!("/keys/kek/{}", V.to_uppercase())), get(Some(V)));
        let wrap = |version: Option<&str>| {
            Ok(Route::Use {
                name: "kek".into(),
                version: version.map(Into::into),
                operation: KeyOperation::WrapKey,
            })
        };
        for path in
            ["/keys/kek/wrapkey", "/keys/kek/wrapKey/", "/keys/kek//wrapkey", "/KEYS/kek//WRAPKEY"]
        {
            assert_eq!(parse("POST", path), wrap(None), "{path}");
        }
        assert_eq!(parse("POST", &format!("/keys/kek/{V}/wrapKey")), wrap(Some(V)));
        assert_eq!(parse("POST", "/keys/restore"), Ok(Route::RestoreKey));
        assert_eq!(parse("GET", "/keys/"), Ok(Route::ListKeys));
        assert_eq!(
            parse("PATCH", "/keys/kek/"),
            Ok(Route::UpdateKey { name: "kek".into(), version: None })
        );
        assert_eq!(
            parse("GET", "/keys/restore"),
            Ok(Route::GetKey { name: "restore".into(), version: None })
        );
    }

    #[test]
    fn what_is_not_there() {
        assert_eq!(parse("GET", "/"), Err(404));
        assert_eq!(parse("GET", "/secrets/x"), Err(404));
        assert_eq!(parse("GET", "/keys/kek/nonsense"), Err(404));
        assert_eq!(parse("GET", "/keys/k_k"), Err(400));
        assert_eq!(parse("GET", "/keys/%2e%2e"), Err(400));
        assert_eq!(parse("POST", "/keys/kek/fly"), Err(404));
        assert_eq!(parse("POST", "/keys/kek"), Err(405));
        assert_eq!(parse("DELETE", &format!("/keys/kek/{V}")), Err(405));
        assert_eq!(parse("POST", "/deletedkeys/kek/fly"), Err(404));
        assert_eq!(parse("PUT", "/byokfs/identities"), Err(405));
        assert_eq!(parse("GET", "keys"), Err(404));
        assert_eq!(parse("GET", "/keys/a/b/c/d/e"), Err(404));
    }

    #[test]
    fn only_the_administrators_routes_have_no_key_permission() {
        assert_eq!(parse("GET", "/byokfs/identities").unwrap().needs(), None);
        for (method, path, permission) in [
            ("GET", "/keys", Permission::List),
            ("GET", "/keys/k", Permission::Get),
            ("POST", "/keys/k/create", Permission::Create),
            ("PUT", "/keys/k", Permission::Import),
            ("GET", "/keys/k/rotationPolicy", Permission::GetRotationPolicy),
            ("PUT", "/keys/k/rotationpolicy", Permission::SetRotationPolicy),
            ("POST", "/keys/k/unwrapkey", Permission::UnwrapKey),
            ("DELETE", "/deletedkeys/k", Permission::Purge),
            ("POST", "/deletedkeys/k/recover", Permission::Recover),
            ("GET", "/deletedkeys/k", Permission::Get),
        ] {
            let needed = parse(method, path).unwrap().needs().map(|needed| needed.by_policy);
            assert_eq!(needed, Some(permission), "{path}");
        }
    }
}
