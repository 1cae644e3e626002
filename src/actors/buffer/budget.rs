//! The memory that all tracks share for audio that waits.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The room for audio that waits for the disk, shared by all tracks.
#[derive(Debug)]
pub struct SpoolBudget {
    total_bytes: u64,
    used_bytes: AtomicU64,
}

impl SpoolBudget {
    pub fn new(total_bytes: u64) -> Self {
        Self { total_bytes, used_bytes: AtomicU64::new(0) }
    }

    /// Takes room for `bytes`, if there is so much.
    pub fn take(&self, bytes: u64) -> bool {
        self.used_bytes.fetch_update(Relaxed, Relaxed, |used| used.checked_add(bytes).filter(|sum| *sum <= self.total_bytes)).is_ok()
    }

    pub fn give_back(&self, bytes: u64) {
        self.used_bytes.fetch_sub(bytes, Relaxed);
    }

    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// What is taken now.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Relaxed)
    }
}
