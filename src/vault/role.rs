//! Roles and the operations they allow, as the real service defines its built-in ones.
//!
//! A vault with the RBAC model goes by role assignments alone, one with access policies by those
//! alone; a Managed HSM has its own roles and no policies.

use super::permission::{Permission, Permissions};

/// Of a role assignment: the whole vault, or one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RoleAssignment {
    pub(crate) id: String,
    pub(crate) object_id: String,
    pub(crate) role: Role,
    /// None: the whole vault.
    pub(crate) key: Option<String>,
    pub(crate) created: i64,
}

impl RoleAssignment {
    /// `key` is the one that is asked for; None for what concerns the whole vault.
    pub(crate) fn allows(&self, permission: Permission, key: Option<&str>) -> bool {
        let in_scope = match (&self.key, key) {
            (None, _) => true,
            (Some(scope), Some(key)) => scope.eq_ignore_ascii_case(key),
            (Some(_), None) => false,
        };
        in_scope && self.role.permissions().contains(permission)
    }
}

macro_rules! roles {
    ($($variant:ident = $hsm:literal, $name:literal, $id:literal, [$($permission:ident),* $(,)?]);+ $(;)?) => {
        /// A built-in role.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Role { $($variant),+ }

        impl Role {
            pub const ALL: &'static [Role] = &[$(Role::$variant),+];

            pub const fn name(self) -> &'static str {
                match self { $(Role::$variant => $name),+ }
            }

            /// Of its definition at the real service.
            pub const fn id(self) -> &'static str {
                match self { $(Role::$variant => $id),+ }
            }

            /// A Managed HSM's own role, not one of a vault.
            pub const fn is_hsm(self) -> bool {
                match self { $(Role::$variant => $hsm),+ }
            }

            pub(crate) fn permissions(self) -> Permissions {
                match self { $(Role::$variant => [$(Permission::$permission),*].into_iter().collect()),+ }
            }
        }
    };
}

roles! {
    Administrator = false, "Key Vault Administrator", "00482a5a-887f-4fb3-b363-3b7fe8e74483",
        [Get, List, GetDeleted, Create, Update, Import, Delete, Recover, Purge, Backup, Restore, Rotate,
         GetRotationPolicy, SetRotationPolicy, Encrypt, Decrypt, WrapKey, UnwrapKey, Sign, Verify];
    CryptoOfficer = false, "Key Vault Crypto Officer", "14b46e9e-c2b7-41b4-b07b-48a6ebf60603",
        [Get, List, GetDeleted, Create, Update, Import, Delete, Recover, Purge, Backup, Restore, Rotate,
         GetRotationPolicy, SetRotationPolicy, Encrypt, Decrypt, WrapKey, UnwrapKey, Sign, Verify];
    CryptoUser = false, "Key Vault Crypto User", "12338af0-0e69-4776-bea7-57ae8d297424",
        [Get, List, GetDeleted, Update, Backup, Encrypt, Decrypt, WrapKey, UnwrapKey, Sign, Verify];
    CryptoServiceEncryptionUser = false, "Key Vault Crypto Service Encryption User",
        "e147488a-f6f5-4113-8e2d-b22465e65bf6", [Get, List, GetDeleted, WrapKey, UnwrapKey];
    Reader = false, "Key Vault Reader", "21090545-7ca7-4776-b22c-e363652d74d2",
        [Get, List, GetDeleted, GetRotationPolicy];
    HsmAdministrator = true, "Managed HSM Administrator", "a290e904-7015-4bba-90c8-60543313cdb4", [];
    HsmCryptoOfficer = true, "Managed HSM Crypto Officer", "515eb02d-2335-4d2d-92f2-b1cbdf9c3778",
        [GetDeleted, Recover, Purge];
    HsmCryptoUser = true, "Managed HSM Crypto User", "21dbd100-6940-42c2-9190-5d6cb909625b",
        [Get, List, Create, Update, Import, Delete, Backup, Restore, Rotate, GetRotationPolicy,
         SetRotationPolicy, Encrypt, Decrypt, WrapKey, UnwrapKey, Sign, Verify, Random];
    HsmCryptoServiceEncryptionUser = true, "Managed HSM Crypto Service Encryption User",
        "33413926-3206-4cdd-b39a-83574fe37a17", [Get, List, WrapKey, UnwrapKey];
    HsmCryptoAuditor = true, "Managed HSM Crypto Auditor", "2c18b078-7c48-4d3a-af88-5a3a1b3f82b3",
        [Get, List, GetDeleted];
    HsmBackup = true, "Managed HSM Backup", "7b127d3c-77bd-4e3e-bbe0-dbb8971fa7f8", [Backup];
}

impl Role {
    /// By name or id, in any case.
    pub fn from_name(text: &str) -> Option<Role> {
        Role::ALL.iter().copied().find(|role| {
            role.name().eq_ignore_ascii_case(text) || role.id().eq_ignore_ascii_case(text)
        })
    }
}

/// The data action that an operation needs, as refusals name it.
pub(crate) fn data_action(permission: Permission, hsm: bool) -> String {
    let (vault, managed_hsm) = match permission {
        Permission::Get | Permission::List => ("keys/read", "keys/read/action"),
        Permission::GetDeleted => ("keys/read", "keys/deletedKeys/read/action"),
        Permission::Create => ("keys/create/action", "keys/create"),
        Permission::Update => ("keys/update/action", "keys/write/action"),
        Permission::Import => ("keys/import/action", "keys/import/action"),
        Permission::Delete => ("keys/delete", "keys/delete"),
        Permission::Recover => ("keys/recover/action", "keys/deletedKeys/recover/action"),
        Permission::Purge => ("keys/purge/action", "keys/deletedKeys/delete"),
        Permission::Backup => ("keys/backup/action", "keys/backup/action"),
        Permission::Restore => ("keys/restore/action", "keys/restore/action"),
        Permission::Rotate => ("keys/rotate/action", "keys/rotate/action"),
        Permission::GetRotationPolicy => ("keyrotationpolicies/read", "keys/read/action"),
        Permission::SetRotationPolicy => ("keyrotationpolicies/write", "keys/write/action"),
        Permission::Encrypt => ("keys/encrypt/action", "keys/encrypt/action"),
        Permission::Decrypt => ("keys/decrypt/action", "keys/decrypt/action"),
        Permission::WrapKey => ("keys/wrap/action", "keys/wrap/action"),
        Permission::UnwrapKey => ("keys/unwrap/action", "keys/unwrap/action"),
        Permission::Sign => ("keys/sign/action", "keys/sign/action"),
        Permission::Verify => ("keys/verify/action", "keys/verify/action"),
        Permission::Random => ("rng/action", "rng/action"),
    };
    if hsm {
        format!("Microsoft.KeyVault/managedHsm/{managed_hsm}")
    } else {
        format!("Microsoft.KeyVault/vaults/{vault}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_are_distinct_and_found_in_any_case() {
        for role in Role::ALL {
            assert_eq!(Role::from_name(&role.name().to_uppercase()), Some(*role));
            assert_eq!(Role::from_name(&role.id().to_uppercase()), Some(*role));
        }
        assert_eq!(Role::from_name("Key Vault Crypto"), None);
    }

    #[test]
    fn a_service_encryption_user_reads_wraps_and_unwraps_and_no_more() {
        let allowed = Role::CryptoServiceEncryptionUser.permissions();
        for permission in Permission::ALL {
            let wanted = matches!(
                permission,
                Permission::Get
                    | Permission::List
                    | Permission::GetDeleted
                    | Permission::WrapKey
                    | Permission::UnwrapKey
            );
            assert_eq!(allowed.contains(*permission), wanted, "{}", permission.name());
        }
    }

    #[test]
    fn an_assignment_to_a_key_is_none_to_the_vault() {
        let on = |key: Option<&str>| RoleAssignment {
            id: "i".into(),
            object_id: "o".into(),
            role: Role::CryptoUser,
            key: key.map(Into::into),
            created: 0,
        };
        assert!(on(None).allows(Permission::List, None));
        assert!(on(None).allows(Permission::Get, Some("kek")));
        assert!(on(Some("kek")).allows(Permission::Get, Some("KEK")));
        assert!(!on(Some("kek")).allows(Permission::Get, Some("other")));
        assert!(!on(Some("kek")).allows(Permission::List, None));
        assert!(!on(None).allows(Permission::Delete, Some("kek")));
    }
}
