//! How the administrator sets and clears faults: over the identity endpoint's listener, which stays
//! when a fault takes the other one away.

use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;

use super::{FaultKind, FaultRequest, Tunables};
use crate::vault::api::{Reply, Vault};
use crate::vault::identity::{HeaderSecret, TokenRequest, header_sha256};
use crate::vault::refusal::Refusal;
use crate::vault::store::identities::{self, ADMIN};

const PATH: &str = "/byokfs/faults";

impl Vault {
    /// None: the request is not about faults.
    pub(crate) fn drill_control(&self, request: &TokenRequest, body: &[u8]) -> Option<Reply> {
        let rest = request.path.strip_prefix(PATH)?.trim_matches('/');
        let answer = self.control(request, rest, body);
        Some(answer.unwrap_or_else(|refusal| Reply::json(refusal.status, &refusal.body())))
    }

    fn control(&self, request: &TokenRequest, rest: &str, body: &[u8]) -> Result<Reply, Refusal> {
        self.require_admin(request.header.as_ref())?;
        if request.method == "GET" && rest == "kinds" {
            let kinds: Vec<Value> = FaultKind::all()
                .map(|(name, about)| json!({ "kind": name, "about": about }))
                .collect();
            return Ok(Reply::ok(&json!({ "value": kinds })));
        }
        if !self.drills.is_enabled() {
            return Err(Refusal::new(
                403,
                "Forbidden",
                "This vault runs without drills; `byokfs vault serve --drills` allows them.",
            ));
        }
        match (request.method.as_str(), rest) {
            ("GET", "") => {
                let faults: Vec<Value> =
                    self.drills.list().iter().map(|fault| fault.json()).collect();
                Ok(Reply::ok(&json!({ "value": faults })))
            }
            ("POST", "") => {
                let wanted: FaultRequest = serde_json::from_slice(body).map_err(|error| {
                    Refusal::bad_parameter(format!("The fault is not understood: {error}."))
                })?;
                let (fault, tunables) = self.drills.set(wanted).map_err(Refusal::bad_parameter)?;
                self.tune(tunables);
                log::warn!("drill: the fault {} was set", fault.kind.name());
                Ok(Reply::ok(&fault.json()))
            }
            ("DELETE", rest) => {
                let id = match rest {
                    "" => None,
                    id => Some(id.parse().map_err(|_| no_fault())?),
                };
                let (gone, tunables) = self.drills.clear(id);
                self.tune(tunables);
                if id.is_some() && gone.is_empty() {
                    return Err(no_fault());
                }
                for fault in &gone {
                    log::warn!("drill: the fault {} was cleared", fault.kind.name());
                }
                let gone: Vec<Value> = gone.iter().map(|fault| fault.json()).collect();
                Ok(Reply::ok(&json!({ "value": gone })))
            }
            _ => Err(Refusal::no_such_route()),
        }
    }

    fn tune(&self, tunables: Tunables) {
        self.access.set_delay(tunables.propagation_delay);
        self.tokens.override_lifetime(tunables.token_lifetime);
    }

    fn require_admin(&self, header: Option<&HeaderSecret>) -> Result<(), Refusal> {
        let given = header.map(|HeaderSecret(secret)| header_sha256(secret));
        let admin = self.store.read(|tx| Ok::<_, Refusal>(identities::find(tx, ADMIN)?))?;
        let own = admin.and_then(|admin| admin.header_sha256);
        match (given, own) {
            (Some(given), Some(own)) if bool::from(given.ct_eq(&own)) => Ok(()),
            _ => Err(Refusal::not_an_administrator()),
        }
    }
}

fn no_fault() -> Refusal {
    Refusal::new(404, "FaultNotFound", "There is no such fault.")
}
