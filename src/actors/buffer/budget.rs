//! The memory that all tracks share for what waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The room for what waits for the disk, shared by all tracks, or those of one kind.
#[derive(Debug)]
pub struct SpoolBudget {
    total_bytes: u64,
    used_bytes: AtomicU64,
    /// What this is a part of.
    whole: Option<Arc<Self>>,
}

impl SpoolBudget {
    pub fn new(total_bytes: u64) -> Self {
        Self { total_bytes, used_bytes: AtomicU64::new(0), whole: None }
    }

    /// A share of `whole` that some may take at most, of what the others leave.
    pub fn part_of(whole: Arc<Self>, total_bytes: u64) -> Self {
        Self { whole: Some(whole), ..Self::new(total_bytes) }
    }

    /// Takes room for `bytes`, if there is so much.
    pub fn take(&self, bytes: u64) -> bool {
        let fits = self.used_bytes.fetch_update(Relaxed, Relaxed, |used| used.checked_add(bytes).filter(|sum| *sum <= self.total_bytes)).is_ok();
        let has_room = fits && self.whole.as_ref().is_none_or(|whole| whole.take(bytes));
        if fits && !has_room {
            self.used_bytes.fetch_sub(bytes, Relaxed);
        }
        has_room
    }

    pub fn give_back(&self, bytes: u64) {
        self.used_bytes.fetch_sub(bytes, Relaxed);
        if let Some(whole) = &self.whole {
            whole.give_back(bytes);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_takes_of_the_whole_and_leaves_the_rest_of_it() {
        let whole = Arc::new(SpoolBudget::new(100));
        let part = SpoolBudget::part_of(Arc::clone(&whole), 50);
        assert!(part.take(30) && !part.take(21) && part.take(20), "no more than its share");
        assert!(!whole.take(51) && whole.take(50), "which the others do not get");
        part.give_back(20);
        assert!(whole.take(10) && !part.take(11) && part.take(10), "and of that what they leave");
        part.give_back(40);
        assert_eq!((part.used_bytes(), whole.used_bytes()), (0, 60));
    }
}
