//! Between a write and whoever waits for it: when the waiting is given up, exactly one of them has the audio.

use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

const WAITING: u8 = 0;
const WRITING: u8 = 1;
const DONE: u8 = 2;
const GIVEN_UP: u8 = 3;

/// Of one append. Whoever moves it first decides.
#[derive(Debug, Default)]
pub struct Fence(AtomicU8);

impl Fence {
    /// Whether the write may begin. One that was given up before must not.
    pub fn begin(&self) -> bool {
        self.0.compare_exchange(WAITING, WRITING, SeqCst, SeqCst).is_ok()
    }

    /// Whether what was written counts. Of a write that was given up meanwhile it does not, and is taken back.
    pub fn finish(&self) -> bool {
        self.0.compare_exchange(WRITING, DONE, SeqCst, SeqCst).is_ok()
    }

    /// Whether the audio is free to go elsewhere. It is not when it counts already: then its answer is on the way.
    pub fn give_up(&self) -> bool {
        self.0.fetch_update(SeqCst, SeqCst, |state| (state != DONE).then_some(GIVEN_UP)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_the_write_counts_or_it_is_given_up() {
        let fence = Fence::default();
        assert!(fence.begin() && fence.finish());
        assert!(!fence.give_up(), "it counts");
        let fence = Fence::default();
        assert!(fence.give_up() && !fence.begin(), "it never begins");
        let fence = Fence::default();
        assert!(fence.begin() && fence.give_up() && !fence.finish(), "it is taken back");
    }
}
