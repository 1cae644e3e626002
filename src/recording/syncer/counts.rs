//! What the syncer tells of itself.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What the syncer did, of the whole process.
#[derive(Debug, Default)]
pub struct SyncCounts {
    /// Files synced one by one.
    pub files: AtomicU64,
    /// File systems synced as a whole.
    pub file_systems: AtomicU64,
    pub failures: AtomicU64,
    last_failure: Mutex<Option<Instant>>,
    /// The longest that one call took, in microseconds.
    pub slowest_us: AtomicU64,
}

impl SyncCounts {
    pub(super) fn note_failure(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        *self.last_failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// How long ago a sync failed last.
    pub fn since_failure(&self) -> Option<Duration> {
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner).map(|last| last.elapsed())
    }
}
