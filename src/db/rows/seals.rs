//! What is known of finished files.

use chrono::NaiveDateTime;
use diesel::prelude::{Queryable, Selectable};
use serde::{Deserialize, Serialize};

use super::SegmentRow;
use crate::audio::gaps::MutedFrames;
use crate::db::schema::seals;

/// What a sidecar says beside what its segment's row has.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Seal {
    /// The writer died, and the length was found out from the file.
    pub recovered: bool,
    /// A sync failed: what the disk holds may differ from what was written.
    pub suspect: bool,
    /// The end that a power cut may have spoilt.
    pub tail_unverified_ms: u64,
    /// From the start of the session, as far as one is known.
    pub session_offset_ms: Option<i64>,
    /// How much faster the sender's clock runs than ours, in millionths.
    pub drift_ppm: Option<f64>,
    /// In hexadecimal; follows later.
    pub sha256: Option<String>,
    /// Of video.
    pub width: Option<u32>,
    pub height: Option<u32>,
    /// While the sender called itself muted.
    pub mute_spans: Vec<MutedFrames>,
}

#[derive(Debug, Clone, PartialEq, Queryable, Selectable)]
#[diesel(table_name = seals)]
pub struct SealRow {
    pub segment_id: String,
    pub recovered: bool,
    pub suspect: bool,
    pub tail_unverified_ms: i64,
    pub session_offset_ms: Option<i64>,
    pub drift_ppm: Option<f64>,
    pub sha256: Option<String>,
    pub width: Option<i32>,
    pub height: Option<i32>,
    /// JSON: `[{"startFrame", "frames"}]`.
    pub mute_spans: String,
}

/// A segment with all that its sidecar says of where it comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct SegmentInContext {
    pub segment: SegmentRow,
    pub meeting_id: String,
    pub room_name: String,
    pub participant: Option<String>,
    pub session_started_at: Option<NaiveDateTime>,
    /// Of one that has ended.
    pub seal: Option<SealRow>,
}
