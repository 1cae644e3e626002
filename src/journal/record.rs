//! What waits: a webhook, or a row of a track.
//!
//! Stored as JSON. The next release reads what this one wrote: a member that comes later needs `#[serde(default)]`, also in the types below these.

use serde::{Deserialize, Serialize};

use super::rows::RowRecord;
use crate::db::rows::events::Arrival;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Record {
    Webhook(Box<Arrival>),
    Rows(Box<RowRecord>),
}
