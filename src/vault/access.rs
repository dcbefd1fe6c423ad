//! Who may do what from where: a snapshot of identities, roles and rules, replaced by every change.
//!
//! A request is judged by one snapshot from beginning to end. The real service takes minutes to
//! let a change of permissions, roles or rules hold everywhere; a drill can ask for that, and then
//! permissions are those of a while ago, while who exists is always judged by the present.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use parking_lot::RwLock;

use super::network::{NetworkDenial, NetworkRules};
use super::permission::Permission;
use super::role::RoleAssignment;
use super::settings::{self, AccessModel};
use super::store::identities::{self, Identity};
use super::store::{Store, roles};
use crate::error::{Error, Result};
use crate::sync::Mutex;

/// Snapshots kept for a propagation delay.
const MAX_HISTORY: usize = 1024;

#[derive(Debug)]
pub(crate) struct Access {
    /// The vault's; tokens of others are refused.
    pub(crate) tenant: String,
    pub(crate) model: AccessModel,
    pub(crate) network: NetworkRules,
    principals: HashMap<String, Principal>,
    tenants: BTreeSet<String>,
}

#[derive(Debug)]
struct Principal {
    identity: Arc<Identity>,
    roles: Vec<RoleAssignment>,
}

/// Why an operation is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Denial {
    Policy,
    Role,
    Network(NetworkDenial),
}

impl Access {
    pub(crate) fn load(store: &Store) -> Result<Access> {
        store.read(|tx| {
            let (tenant, model, network) = settings::load_access(tx)?;
            let mut principals = HashMap::new();
            let mut tenants = BTreeSet::from([tenant.clone()]);
            for identity in identities::list_all(tx)? {
                tenants.insert(identity.tenant.clone());
                let identity = Arc::new(identity);
                let principal = Principal { identity: Arc::clone(&identity), roles: Vec::new() };
                principals.insert(identity.object_id.clone(), principal);
            }
            for assignment in roles::list(tx)? {
                if let Some(principal) = principals.get_mut(&assignment.object_id) {
                    principal.roles.push(assignment);
                }
            }
            Ok::<_, Error>(Access { tenant, model, network, principals, tenants })
        })
    }

    /// Nobody, for when it is not known who may what.
    fn nobody(before: &Access) -> Access {
        Access {
            tenant: before.tenant.clone(),
            model: before.model,
            network: NetworkRules { public_access: false, ..NetworkRules::default() },
            principals: HashMap::new(),
            tenants: BTreeSet::new(),
        }
    }

    pub(crate) fn identity(&self, object_id: &str) -> Option<Arc<Identity>> {
        self.principals.get(object_id).map(|principal| Arc::clone(&principal.identity))
    }

    /// Is somebody deleted, with tokens kept, since before then?
    pub(crate) fn has_deleted_before(&self, then: i64) -> bool {
        self.principals
            .values()
            .any(|principal| principal.identity.deleted.is_some_and(|deleted| deleted < then))
    }

    pub(crate) fn has_tenant(&self, tenant: &str) -> bool {
        self.tenants.iter().any(|own| own.eq_ignore_ascii_case(tenant))
    }

    /// `key` as in [`RoleAssignment::allows`].
    fn judge(
        &self,
        object_id: &str,
        client: Option<IpAddr>,
        permissions: Needed,
        key: Option<&str>,
    ) -> Result<(), Denial> {
        self.network.check(client).map_err(Denial::Network)?;
        let principal = self.principals.get(object_id);
        if principal.is_some_and(|principal| principal.identity.is_admin) {
            return Ok(());
        }
        match self.model {
            AccessModel::Policies => principal
                .is_some_and(|principal| {
                    principal.identity.permissions.contains(permissions.by_policy)
                })
                .then_some(())
                .ok_or(Denial::Policy),
            AccessModel::Roles => principal
                .is_some_and(|principal| {
                    principal.roles.iter().any(|role| role.allows(permissions.by_role, key))
                })
                .then_some(())
                .ok_or(Denial::Role),
        }
    }
}

/// What an operation needs; roles tell some apart that policies do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Needed {
    pub(crate) by_policy: Permission,
    pub(crate) by_role: Permission,
}

impl From<Permission> for Needed {
    fn from(permission: Permission) -> Needed {
        Needed { by_policy: permission, by_role: permission }
    }
}

#[derive(Debug)]
pub(crate) struct AccessControl {
    current: RwLock<Arc<Access>>,
    /// Snapshots by the second they were replaced at, oldest first.
    replaced: Mutex<VecDeque<(i64, Arc<Access>)>>,
    /// Seconds until a change holds.
    delay: AtomicI64,
    /// The last change could not be read: nobody gets in until one can.
    failed: AtomicBool,
}

impl AccessControl {
    pub(crate) fn load(store: &Store) -> Result<AccessControl> {
        Ok(AccessControl {
            current: RwLock::new(Arc::new(Access::load(store)?)),
            replaced: Mutex::default(),
            delay: AtomicI64::new(0),
            failed: AtomicBool::new(false),
        })
    }

    pub(crate) fn current(&self) -> Arc<Access> {
        Arc::clone(&self.current.read())
    }

    /// After every change of what a snapshot holds, before the change is answered. If that fails,
    /// nobody gets in: what was taken away must not go on.
    pub(crate) fn reload(&self, store: &Store, now: i64) -> Result<()> {
        // One at a time, so that an older state never replaces a newer one.
        let mut replaced = self.replaced.lock();
        let next = match Access::load(store) {
            Ok(next) => next,
            Err(error) => {
                self.failed.store(true, Ordering::Relaxed);
                replaced.clear();
                let mut current = self.current.write();
                *current = Arc::new(Access::nobody(&current));
                return Err(error);
            }
        };
        let before = std::mem::replace(&mut *self.current.write(), Arc::new(next));
        if self.failed.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        // Nobody looks at them else, and each holds every identity.
        if self.delay() == 0 {
            replaced.clear();
            return Ok(());
        }
        if replaced.len() >= MAX_HISTORY {
            replaced.pop_front();
        }
        replaced.push_back((now, before));
        Ok(())
    }

    /// Tries again what failed.
    pub(crate) fn recover(&self, store: &Store, now: i64) -> Result<()> {
        if self.failed.load(Ordering::Relaxed) { self.reload(store, now) } else { Ok(()) }
    }

    /// For a drill, of changes made from now on; 0: all changes hold at once.
    pub(crate) fn set_delay(&self, seconds: i64) {
        if self.delay.swap(seconds, Ordering::Relaxed) == 0 {
            self.replaced.lock().clear();
        }
    }

    pub(crate) fn delay(&self) -> i64 {
        self.delay.load(Ordering::Relaxed)
    }

    /// The snapshot whose permissions hold at `now`.
    fn effective(&self, now: i64) -> Arc<Access> {
        let delay = self.delay();
        if delay > 0 {
            let then = now - delay;
            let replaced = self.replaced.lock();
            // The first that was still in force then.
            if let Some((_, access)) = replaced.iter().find(|(at, _)| *at > then) {
                return Arc::clone(access);
            }
        }
        self.current()
    }

    pub(crate) fn judge(
        &self,
        caller: &Identity,
        client: Option<IpAddr>,
        needed: Needed,
        key: Option<&str>,
        now: i64,
    ) -> Result<(), Denial> {
        self.effective(now).judge(&caller.object_id, client, needed, key)
    }
}

#[cfg(test)]
mod tests {
    use super::super::role::Role;
    use super::super::store::{self, identities::tests::identity};
    use super::*;

    const CLIENT: Option<IpAddr> = Some(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));

    fn control() -> (tempfile::TempDir, Store, AccessControl) {
        let (dir, store) = store::tests::store();
        store
            .write(|tx| {
                store::set_setting(tx, "tenant", "t")?;
                identities::insert(tx, &identity("db", 1))?;
                Ok::<_, Error>(())
            })
            .unwrap();
        let control = AccessControl::load(&store).unwrap();
        (dir, store, control)
    }

    fn change(store: &Store, control: &AccessControl, now: i64, permissions: &str) {
        let permissions = permissions.parse().unwrap();
        store
            .write(|tx| Ok::<_, Error>(identities::set_permissions(tx, "o-db", &permissions)?))
            .unwrap();
        control.reload(store, now).unwrap();
    }

    #[test]
    fn a_change_holds_at_once_or_after_the_delay() {
        let (_dir, store, control) = control();
        let caller = identity("db", 1);
        let may = |permission: Permission, now| {
            control.judge(&caller, CLIENT, permission.into(), Some("kek"), now).is_ok()
        };
        assert!(may(Permission::Get, 0) && !may(Permission::WrapKey, 0));
        change(&store, &control, 100, "wrapKey");
        assert!(!may(Permission::Get, 100) && may(Permission::WrapKey, 100));
        control.set_delay(30);
        change(&store, &control, 200, "list");
        assert!(may(Permission::WrapKey, 200) && may(Permission::WrapKey, 229));
        assert!(!may(Permission::WrapKey, 230) && may(Permission::List, 230));
        change(&store, &control, 300, "sign");
        change(&store, &control, 310, "verify");
        assert!(may(Permission::List, 329));
        assert!(may(Permission::Sign, 335));
        assert!(may(Permission::Verify, 340));
        // A later drill does not bring back what held before it.
        control.set_delay(0);
        control.set_delay(100_000);
        assert!(may(Permission::Verify, 340));
    }

    #[test]
    fn what_was_replaced_is_kept_for_a_delay_alone() {
        let (_dir, store, control) = control();
        let kept = || control.replaced.lock().len();
        change(&store, &control, 100, "wrapKey");
        assert_eq!(kept(), 0);
        control.set_delay(30);
        change(&store, &control, 200, "list");
        assert_eq!(kept(), 1);
        control.set_delay(0);
        change(&store, &control, 300, "sign");
        assert_eq!(kept(), 0);
    }

    #[test]
    fn policies_and_roles_do_not_mix() {
        let (_dir, store, control) = control();
        let caller = identity("db", 1);
        let judge = |key| control.judge(&caller, CLIENT, Permission::UnwrapKey.into(), key, 0);
        assert_eq!(judge(Some("kek")), Err(Denial::Policy));
        let assignment = RoleAssignment {
            id: "r".into(),
            object_id: "o-db".into(),
            role: Role::CryptoServiceEncryptionUser,
            key: Some("kek".into()),
            created: 0,
        };
        store.write(|tx| Ok::<_, Error>(roles::insert(tx, &assignment)?)).unwrap();
        control.reload(&store, 0).unwrap();
        assert_eq!(judge(Some("kek")), Err(Denial::Policy));
        let to_roles = |tx: &rusqlite::Transaction<'_>| {
            Ok::<_, Error>(store::set_setting(tx, settings::ACCESS_MODEL, "roles")?)
        };
        store.write(to_roles).unwrap();
        control.reload(&store, 0).unwrap();
        assert_eq!(judge(Some("kek")), Ok(()));
        assert_eq!(judge(Some("other")), Err(Denial::Role));
        // What the policy allows counts for nothing now.
        let get = control.judge(&caller, CLIENT, Permission::Get.into(), Some("other"), 0);
        assert_eq!(get, Err(Denial::Role));
    }

    #[test]
    fn nobody_gets_in_while_it_is_not_known_who_may() {
        let (_dir, store, control) = control();
        let rename = |from: &str, to: &str| {
            let change = format!("ALTER TABLE {from} RENAME TO {to}");
            store.write(|tx| Ok::<_, Error>(tx.execute_batch(&change)?)).unwrap();
        };
        assert!(control.current().identity("o-db").is_some());
        rename("role_assignment", "elsewhere");
        assert!(control.reload(&store, 0).is_err());
        assert!(control.current().identity("o-db").is_none());
        let caller = identity("db", 1);
        assert!(control.judge(&caller, CLIENT, Permission::Get.into(), None, 0).is_err());
        assert!(control.recover(&store, 0).is_err());
        rename("elsewhere", "role_assignment");
        control.recover(&store, 0).unwrap();
        assert!(control.judge(&caller, CLIENT, Permission::Get.into(), None, 0).is_ok());
    }
}
