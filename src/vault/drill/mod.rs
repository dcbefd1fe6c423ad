//! Drills: faults that the vault shows on purpose, so that whoever depends on it can practise.
//!
//! Off unless `serve --drills`: then the administrator sets and clears faults over the identity
//! endpoint's listener, which no fault ever hits on that path. They are in memory only: a restart
//! clears them. A fault hits requests that carry a token; the challenge is always answered.

mod control;
mod fault;
mod replies;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::Clock;
use crate::sync::Mutex;
pub(crate) use fault::{Endpoint, Fault, FaultKind, FaultRequest};

/// As many as anyone can oversee.
const MAX_FAULTS: usize = 100;

/// What a fault does to the way an answer goes out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub(crate) delay: Duration,
    /// Never answer.
    pub(crate) hang: bool,
    /// Close the connection instead of answering.
    pub(crate) close: bool,
    /// Close it after so many bytes of the body.
    pub(crate) truncate: Option<usize>,
    /// Time between one byte of the body and the next.
    pub(crate) trickle: Option<Duration>,
}

/// What the listener should be like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ListenerState {
    pub(crate) refuses: bool,
    pub(crate) untrusted: bool,
}

#[derive(Debug)]
pub(crate) struct Drills {
    enabled: bool,
    state: Mutex<State>,
    shift: Arc<AtomicI64>,
    listener: watch::Sender<ListenerState>,
}

#[derive(Debug, Default)]
struct State {
    faults: Vec<Fault>,
    last_id: u64,
}

/// What an endpoint is asked for, as far as faults tell requests apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    pub(crate) endpoint: Endpoint,
    /// Name of the permission that it needs.
    pub(crate) operation: Option<&'a str>,
    pub(crate) key: Option<&'a str>,
}

/// What a setting fault changes elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tunables {
    pub(crate) token_lifetime: Option<i64>,
    pub(crate) propagation_delay: i64,
}

impl Drills {
    pub(crate) fn new(enabled: bool) -> Drills {
        let (listener, _) = watch::channel(ListenerState::default());
        Drills { enabled, state: Mutex::default(), shift: Arc::default(), listener }
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// `clock`, ahead or behind as a fault says.
    pub(crate) fn shifted(&self, clock: Clock) -> Clock {
        let shift = Arc::clone(&self.shift);
        Arc::new(move || clock() + shift.load(Ordering::Relaxed))
    }

    pub(crate) fn is_shifted(&self) -> bool {
        self.shift.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn listener(&self) -> watch::Receiver<ListenerState> {
        self.listener.subscribe()
    }

    pub(crate) fn list(&self) -> Vec<Fault> {
        self.state.lock().faults.clone()
    }

    pub(crate) fn set(&self, request: FaultRequest) -> Result<(Fault, Tunables), String> {
        let mut state = self.state.lock();
        if state.faults.len() >= MAX_FAULTS {
            return Err(format!("there are {MAX_FAULTS} faults already: clear some"));
        }
        let fault = request.check(state.last_id + 1)?;
        state.last_id += 1;
        // Of settings, the last word counts.
        if fault.kind.is_setting() {
            state.faults.retain(|other| other.kind != fault.kind);
        }
        state.faults.push(fault.clone());
        Ok((fault, self.apply(&state)))
    }

    /// None: all of them. Returns those cleared.
    pub(crate) fn clear(&self, id: Option<u64>) -> (Vec<Fault>, Tunables) {
        let mut state = self.state.lock();
        let (gone, left) =
            state.faults.drain(..).partition(|fault| id.is_none_or(|id| fault.id == id));
        state.faults = left;
        (gone, self.apply(&state))
    }

    fn apply(&self, state: &State) -> Tunables {
        let seconds = |kind: FaultKind| {
            state.faults.iter().find(|fault| fault.kind == kind).map(|fault| fault.seconds)
        };
        let has = |kind: FaultKind| state.faults.iter().any(|fault| fault.kind == kind);
        self.shift.store(seconds(FaultKind::ClockShift).unwrap_or(0), Ordering::Relaxed);
        let wanted = ListenerState {
            refuses: has(FaultKind::RefuseConnections),
            untrusted: has(FaultKind::UntrustedCertificate),
        };
        // Whoever waits for a change closes connections.
        self.listener.send_if_modified(|state| std::mem::replace(state, wanted) != wanted);
        Tunables {
            token_lifetime: seconds(FaultKind::TokenLifetime),
            propagation_delay: seconds(FaultKind::PropagationDelay).unwrap_or(0),
        }
    }

    /// The faults that hit a request; each of them is counted.
    pub(crate) fn hit(&self, asked: Asked<'_>) -> Vec<Fault> {
        if !self.enabled {
            return Vec::new();
        }
        let mut state = self.state.lock();
        let mut hit = Vec::new();
        for fault in &mut state.faults {
            if fault.matches(asked) {
                fault.hits += 1;
                if let Some(left) = &mut fault.left {
                    *left -= 1;
                }
                hit.push(fault.clone());
            }
        }
        state.faults.retain(|fault| fault.left != Some(0));
        hit
    }
}

/// What `faults` together do to the way out.
pub(crate) fn delivery(faults: &[Fault]) -> Delivery {
    let mut delivery = Delivery::default();
    for fault in faults {
        match fault.kind {
            FaultKind::Latency => delivery.delay += Duration::from_millis(fault.milliseconds),
            FaultKind::Hang => delivery.hang = true,
            FaultKind::Close => delivery.close = true,
            FaultKind::Truncate => delivery.truncate = Some(fault.bytes),
            FaultKind::Trickle => {
                delivery.trickle = Some(Duration::from_millis(fault.milliseconds));
            }
            _ => {}
        }
    }
    delivery
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: &str) -> FaultRequest {
        serde_json::from_value(serde_json::json!({ "kind": kind })).unwrap()
    }

    fn asked<'a>(operation: &'a str, key: &'a str) -> Asked<'a> {
        Asked { endpoint: Endpoint::Vault, operation: Some(operation), key: Some(key) }
    }

    #[test]
    fn a_fault_hits_what_it_is_limited_to_and_as_often() {
        let drills = Drills::new(true);
        let limited = FaultRequest {
            key: Some("kek".into()),
            operations: vec!["unwrapkey".into()],
            count: Some(2),
            ..request("throttled")
        };
        drills.set(limited).unwrap();
        assert!(drills.hit(asked("get", "kek")).is_empty());
        assert!(drills.hit(asked("unwrapKey", "other")).is_empty());
        let elsewhere = Asked { endpoint: Endpoint::Identity, operation: None, key: None };
        assert!(drills.hit(elsewhere).is_empty());
        assert_eq!(drills.hit(asked("unwrapKey", "KEK")).len(), 1);
        assert_eq!(drills.list()[0].hits, 1);
        assert_eq!(drills.hit(asked("unwrapKey", "kek")).len(), 1);
        assert!(drills.hit(asked("unwrapKey", "kek")).is_empty() && drills.list().is_empty());
    }

    #[test]
    fn settings_hold_until_they_are_cleared() {
        let drills = Drills::new(true);
        let clock = drills.shifted(Arc::new(|| 1000));
        let shift = |seconds| FaultRequest { seconds: Some(seconds), ..request("clock-shift") };
        drills.set(shift(50)).unwrap();
        assert_eq!(clock(), 1050);
        let (fault, _) = drills.set(shift(-50)).unwrap();
        assert_eq!((clock(), drills.list().len()), (950, 1));
        let delay = FaultRequest { seconds: Some(30), ..request("propagation-delay") };
        assert_eq!(drills.set(delay).unwrap().1.propagation_delay, 30);
        drills.set(request("refuse-connections")).unwrap();
        assert!(drills.listener().borrow().refuses);
        assert_eq!(drills.clear(Some(fault.id)).0.len(), 1);
        assert_eq!(clock(), 1000);
        let (gone, tunables) = drills.clear(None);
        assert_eq!((gone.len(), tunables), (2, Tunables::default()));
        assert!(!drills.listener().borrow().refuses);
    }

    #[test]
    fn without_drills_nothing_is_hit_and_there_is_an_end_to_faults() {
        let off = Drills::new(false);
        off.set(request("throttled")).unwrap();
        assert!(off.hit(asked("get", "kek")).is_empty());
        let drills = Drills::new(true);
        for _ in 0..MAX_FAULTS {
            drills.set(request("close")).unwrap();
        }
        assert!(drills.set(request("close")).is_err());
    }
}
