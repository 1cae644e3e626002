//! What a writer leaves to those behind it, whatever it ends by: the end of its row, and how much of the connection its file took in.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::rows::RowLog;
use crate::db::rows::ClosedSegment;
use crate::ids::SegmentId;
use crate::journal::rows::OpenedSegment;

/// The row of one segment. Dropped while it is open, it is ended by what the file says.
///
/// Contract: whoever holds it drops the file first.
pub struct SegmentRow {
    rows: RowLog,
    open: Option<SegmentId>,
}

impl SegmentRow {
    pub fn new(rows: RowLog) -> Self {
        Self { rows, open: None }
    }

    pub fn segment_opened(&mut self, segment: OpenedSegment) {
        self.open = Some(segment.id.clone());
        self.rows.segment_opened(segment);
    }

    pub fn segment_closed(&mut self, segment: ClosedSegment) {
        self.open = None;
        self.rows.segment_closed(segment);
    }
}

impl Drop for SegmentRow {
    fn drop(&mut self) {
        if let Some(id) = self.open.take() {
            self.rows.segment_abandoned(id);
        }
    }
}

/// The frames of a connection that its segments took in. Each adds its own when it ends.
pub struct Taken {
    by_earlier: Arc<AtomicU64>,
    by_this: u64,
}

impl Taken {
    pub fn new(by_earlier: Arc<AtomicU64>) -> Self {
        Self { by_earlier, by_this: 0 }
    }

    /// How much this segment has taken in by now.
    pub fn note(&mut self, frames: u64) {
        self.by_this = frames;
    }

    /// How much the earlier ones took in, as far as they have ended.
    pub fn earlier(&self) -> u64 {
        self.by_earlier.load(Relaxed)
    }

    /// Adds this segment's, once. Returns what the earlier ones took in.
    pub fn add(&mut self) -> u64 {
        self.by_earlier.fetch_add(std::mem::take(&mut self.by_this), Relaxed)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.add();
    }
}
