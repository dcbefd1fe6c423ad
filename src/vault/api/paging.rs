//! Lists in pages: `maxresults`, `$skiptoken`, `nextLink`.

use serde_json::{Value, json};

use super::{Call, Query, Reply};
use crate::vault::codec;
use crate::vault::refusal::Refusal;

const MAX_RESULTS: usize = 25;

/// Where a page begins and how long it may be.
pub(super) struct Page {
    pub(super) size: usize,
    /// What the last page ended with; empty at the start.
    pub(super) after: String,
}

impl Page {
    pub(super) fn of(query: &Query) -> Result<Page, Refusal> {
        let size = match &query.max_results {
            None => MAX_RESULTS,
            Some(text) => {
                text.parse().ok().filter(|size| (1..=MAX_RESULTS).contains(size)).ok_or_else(
                    || Refusal::bad_parameter(format!("maxresults must be 1 to {MAX_RESULTS}.")),
                )?
            }
        };
        let after = match &query.skip_token {
            None => String::new(),
            Some(token) => codec::from_base64url(token)
                .and_then(|bytes| String::from_utf8(bytes).ok())
                .ok_or_else(|| Refusal::bad_parameter("$skiptoken is invalid."))?,
        };
        Ok(Page { size, after })
    }

    /// `items` may hold one more than the page: then there is a next page, after the last item
    /// shown. Each item comes with what a page ends with.
    pub(super) fn reply(&self, call: &Call<'_>, mut items: Vec<(Value, String)>) -> Reply {
        let more = items.len() > self.size;
        items.truncate(self.size);
        let next = items.last().filter(|_| more).map(|(_, end)| {
            format!(
                "{}{}?api-version={}&$skiptoken={}&maxresults={}",
                call.origin.url,
                call.request.path,
                call.query.api_version.as_deref().unwrap_or_default(),
                codec::to_base64url(end.as_bytes()),
                self.size,
            )
        });
        let value: Vec<Value> = items.into_iter().map(|(item, _)| item).collect();
        Reply::ok(&json!({ "value": value, "nextLink": next }))
    }
}
