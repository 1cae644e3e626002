//! How fast a sender is read.

use std::time::Duration;

use tokio::time::Instant;

/// A token bucket.
#[derive(Debug)]
pub(super) struct Bucket {
    pub rate: f64,
    pub size: f64,
    pub level: f64,
    pub at: Instant,
}

impl Bucket {
    /// How long until `amount` is there. An amount over the size waits for a full bucket.
    pub fn wait_for(&mut self, amount: f64, now: Instant) -> Duration {
        self.level = (self.level + self.rate * now.saturating_duration_since(self.at).as_secs_f64()).min(self.size);
        self.at = now;
        let missing = amount.min(self.size) - self.level;
        if missing <= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(missing / self.rate) }
    }
}
