//! How long sockets were not read, those that are not read at this moment included.
//!
//! Two things hold a reader up: its track, which has not taken what came before, and its thread, which does something else. Of the first the socket tells
//! when it begins; the second is told by whoever expects to run at some time, and does not.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::stats::Spans;
use crate::metrics::{Histogram, HistogramSnapshot};

/// Upper bounds of the classes in milliseconds; the last class has none.
const BOUNDS_MS: [u64; 8] = [1, 5, 10, 50, 100, 500, 1_000, 3_000];

/// Of the whole process.
#[derive(Debug, Default)]
pub struct ReadStalls {
    ended: Spans<8>,
    /// When each began that has not ended, or will have begun if nothing happens before.
    open: Mutex<BTreeMap<u64, Instant>>,
    next: AtomicU64,
}

/// One that has not ended; it does when this is dropped.
#[derive(Debug)]
pub struct Stall {
    stalls: Arc<ReadStalls>,
    id: u64,
    since: Instant,
    /// What is shorter is none.
    tolerance: Duration,
}

impl ReadStalls {
    /// A socket is not read from now on.
    pub fn begin(self: &Arc<Self>) -> Stall {
        self.stall(Instant::now(), Duration::ZERO)
    }

    /// Sockets are read by somebody who is next heard of at `due`, or up to `tolerance` later.
    pub fn expect_at(self: &Arc<Self>, due: Instant, tolerance: Duration) -> Stall {
        self.stall(due, tolerance)
    }

    fn stall(self: &Arc<Self>, since: Instant, tolerance: Duration) -> Stall {
        let id = self.next.fetch_add(1, Relaxed);
        self.open().insert(id, since);
        Stall { stalls: Arc::clone(self), id, since, tolerance }
    }

    /// Of all since the start.
    pub fn longest(&self) -> Duration {
        let oldest = self.open().values().min().map(Instant::elapsed).unwrap_or_default();
        oldest.max(self.ended.longest())
    }

    /// What is behind the lock is whole at any time.
    fn open(&self) -> MutexGuard<'_, BTreeMap<u64, Instant>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        self.stalls.open().remove(&self.id);
        let lasted = self.since.elapsed();
        if lasted >= self.tolerance {
            self.stalls.ended.observe(BOUNDS_MS, lasted);
        }
    }
}

impl Histogram for ReadStalls {
    /// Of those that have ended.
    fn snapshot(&self) -> HistogramSnapshot {
        self.ended.snapshot(BOUNDS_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(stalls: &ReadStalls) -> u64 {
        stalls.snapshot().classes.iter().map(|(_, count)| count).sum()
    }

    #[test]
    fn i1_a_stall_that_goes_on_is_seen_and_counted_when_it_ends() {
        let stalls = Arc::<ReadStalls>::default();
        let minute = Duration::from_secs(60);
        let stall = stalls.stall(Instant::now() - minute, Duration::ZERO);
        drop(stalls.begin());
        assert!(stalls.longest() >= minute && count(&stalls) == 1, "{stalls:?}");
        drop(stall);
        assert!(stalls.longest() >= minute && count(&stalls) == 2, "{stalls:?}");
    }

    #[test]
    fn who_comes_when_expected_has_held_nobody_up() {
        let stalls = Arc::<ReadStalls>::default();
        let minute = Duration::from_secs(60);
        for due in [Instant::now() + minute, Instant::now()] {
            drop(stalls.expect_at(due, minute));
        }
        assert_eq!(count(&stalls), 0);
        assert!(stalls.longest() < minute);
    }
}
