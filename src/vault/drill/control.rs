//! How the administrator sets and clears faults: over the identity endpoint's listener, which stays
//! when a fault takes the other one away.

use std::time::Instant;

use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;

use super::{FaultKind, FaultRequest, Tunables};
use crate::vault::api::{Reply, Vault};
use crate::vault::audit::{Event, Outcome};
use crate::vault::codec;
use crate::vault::identity::{HeaderSecret, TokenRequest, header_sha256};
use crate::vault::refusal::Refusal;
use crate::vault::store::identities::{self, ADMIN, Identity};

const PATH: &str = "/byokfs/faults";

impl Vault {
    /// None: the request is not about faults.
    pub(crate) fn drill_control(&self, request: &TokenRequest, body: &[u8]) -> Option<Reply> {
        let rest = request.path.strip_prefix(PATH)?.trim_matches('/');
        let start = Instant::now();
        let operation = match request.method.as_str() {
            "POST" => "FaultSet",
            "DELETE" => "FaultClear",
            _ => "FaultList",
        };
        let mut event = Event { operation, ..Event::default() };
        let answer = self.control(request, rest, body, &mut event);
        let refusal = answer.as_ref().err().cloned();
        let reply = answer.unwrap_or_else(|refusal| Reply::json(refusal.status, &refusal.body()));
        let request_id = codec::new_uuid().unwrap_or_default();
        let outcome = Outcome {
            status: reply.status,
            reason: refusal.as_ref().map(Refusal::reason),
            description: refusal.as_ref().map_or("", |refusal| &refusal.message),
            request_id: &request_id,
            client: Some(request.client),
            duration: start.elapsed(),
            ..Outcome::default()
        };
        self.audit.record(&event, &outcome, (self.clock)());
        Some(reply)
    }

    fn control(
        &self,
        request: &TokenRequest,
        rest: &str,
        body: &[u8],
        event: &mut Event,
    ) -> Result<Reply, Refusal> {
        event.caller = Some(self.require_admin(request.header.as_ref())?.into());
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
                event.drill = Some(vec![fault.kind.name()]);
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
                event.drill = Some(gone.iter().map(|fault| fault.kind.name()).collect());
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

    fn require_admin(&self, header: Option<&HeaderSecret>) -> Result<Identity, Refusal> {
        let given = header.map(|HeaderSecret(secret)| header_sha256(secret));
        let admin = self.store.read(|tx| Ok::<_, Refusal>(identities::find(tx, ADMIN)?))?;
        let is_given = |admin: &Identity| {
            let (given, own) = (given.as_ref(), admin.header_sha256.as_ref());
            given.zip(own).is_some_and(|(given, own)| bool::from(given.ct_eq(own)))
        };
        admin.filter(is_given).ok_or_else(Refusal::not_an_administrator)
    }
}

fn no_fault() -> Refusal {
    Refusal::new(404, "FaultNotFound", "There is no such fault.")
}
