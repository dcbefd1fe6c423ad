//! Random bytes, which a Managed HSM gives out.

use serde::Deserialize;
use serde_json::json;

use super::{Call, Reply, Vault};
use crate::crypto::secret::SecretBytes;
use crate::vault::codec;
use crate::vault::refusal::Refusal;
use crate::vault::settings::Flavor;

/// As the real service.
const MAX_COUNT: usize = 128;

#[derive(Deserialize)]
struct RandomRequest {
    count: usize,
}

impl Vault {
    pub(super) fn random(&self, call: &Call<'_>) -> Result<Reply, Refusal> {
        if self.settings.flavor != Flavor::Mhsm {
            return Err(Refusal::no_such_route());
        }
        let RandomRequest { count } = call.body()?;
        if !(1..=MAX_COUNT).contains(&count) {
            return Err(Refusal::bad_parameter(format!(
                "Property 'count' must be 1 to {MAX_COUNT}."
            )));
        }
        let mut filled = Ok(());
        let bytes =
            SecretBytes::new_with(count, |place| filled = crate::crypto::random::fill(place))?;
        filled?;
        Ok(Reply::ok(&json!({ "value": codec::to_base64url(bytes.expose()) })))
    }
}
