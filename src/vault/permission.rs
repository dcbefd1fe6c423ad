//! Key permissions of an access policy: which operations an identity may ask for.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

macro_rules! permissions {
    ($($variant:ident = $name:literal),+ $(,)?) => {
        /// One key permission, named as in an access policy of the real service.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Permission { $($variant),+ }

        impl Permission {
            pub const ALL: &'static [Permission] = &[$(Permission::$variant),+];

            pub const fn name(self) -> &'static str {
                match self { $(Permission::$variant => $name),+ }
            }
        }
    };
}

permissions! {
    Get = "get",
    List = "list",
    Create = "create",
    Update = "update",
    Import = "import",
    Delete = "delete",
    Recover = "recover",
    Purge = "purge",
    Backup = "backup",
    Restore = "restore",
    Rotate = "rotate",
    GetRotationPolicy = "getRotationPolicy",
    SetRotationPolicy = "setRotationPolicy",
    Encrypt = "encrypt",
    Decrypt = "decrypt",
    WrapKey = "wrapKey",
    UnwrapKey = "unwrapKey",
    Sign = "sign",
    Verify = "verify",
    GetDeleted = "getDeleted",
    Random = "random",
}

impl Permission {
    /// The others are what roles tell apart and an access policy cannot name.
    pub const fn is_of_policies(self) -> bool {
        !matches!(self, Permission::GetDeleted | Permission::Random)
    }
}

impl FromStr for Permission {
    type Err = String;

    /// Case-insensitive, as the real service takes them.
    fn from_str(text: &str) -> Result<Permission, String> {
        Permission::ALL
            .iter()
            .copied()
            .filter(|permission| permission.is_of_policies())
            .find(|permission| permission.name().eq_ignore_ascii_case(text))
            .ok_or_else(|| format!("unknown key permission '{text}'"))
    }
}

/// A set of permissions; written as a comma-separated list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permissions(BTreeSet<Permission>);

impl Permissions {
    pub fn all() -> Permissions {
        Permission::ALL.iter().copied().filter(|permission| permission.is_of_policies()).collect()
    }

    pub fn contains(&self, permission: Permission) -> bool {
        self.0.contains(&permission)
    }

    pub fn add(&mut self, other: &Permissions) {
        self.0.extend(other.0.iter().copied());
    }

    pub fn remove(&mut self, other: &Permissions) {
        self.0.retain(|permission| !other.0.contains(permission));
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn names(&self) -> Vec<&'static str> {
        self.0.iter().map(|permission| permission.name()).collect()
    }

    pub fn from_names<S: AsRef<str>>(names: &[S]) -> Result<Permissions, String> {
        let parsed: Result<BTreeSet<_>, _> =
            names.iter().map(|name| name.as_ref().parse()).collect();
        parsed.map(Permissions)
    }
}

impl FromIterator<Permission> for Permissions {
    fn from_iter<I: IntoIterator<Item = Permission>>(permissions: I) -> Permissions {
        Permissions(permissions.into_iter().collect())
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().join(","))
    }
}

impl FromStr for Permissions {
    type Err = String;

    /// `all` stands for every permission; the empty string for none.
    fn from_str(text: &str) -> Result<Permissions, String> {
        if text.trim().eq_ignore_ascii_case("all") {
            return Ok(Permissions::all());
        }
        let names: Vec<&str> =
            text.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
        Permissions::from_names(&names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_round_trip_and_unknown_names_are_refused() {
        let set: Permissions = "get, LIST,wrapkey,unwrapKey".parse().unwrap();
        assert_eq!(set.to_string(), "get,list,wrapKey,unwrapKey");
        assert_eq!(set.to_string().parse::<Permissions>().unwrap(), set);
        assert!("get,fly".parse::<Permissions>().unwrap_err().contains("'fly'"));
        assert_eq!("all".parse::<Permissions>().unwrap(), Permissions::all());
    }

    #[test]
    fn revoking_leaves_the_others() {
        let mut set = Permissions::all();
        set.remove(&"get,list".parse().unwrap());
        assert!(!set.contains(Permission::Get));
        assert!(set.contains(Permission::WrapKey));
    }
}
