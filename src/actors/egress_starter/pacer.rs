//! How many egress starts may be in flight: learned from what the egress nodes admit.
//!
//! A node admits a few starts in a quarter of a minute, by its cores, and LiveKit says only 503 beyond that (`docs/FACTS.md`, server API). So one more is tried
//! for each that succeeds, and half of them after a refusal, with a pause that grows while refusals go on. Pure: time is an argument.

use std::time::{Duration, Instant};

use crate::actors::child::full_jitter;

/// The first pause after a refusal, at most.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest: capacity comes back 15 s after it was taken, and is to be found soon.
const MAX_PAUSE: Duration = Duration::from_secs(8);
/// Where the search begins.
const FIRST_WINDOW: u32 = 4;

/// Marks a call with the round that it was started in: the refusals of one round are one refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round(u64);

#[derive(Debug)]
pub struct Pacer {
    min: u32,
    max: u32,
    window: u32,
    in_flight: u32,
    round: u64,
    /// Rounds in a row that ended in a refusal.
    refusals: u32,
    paused_until: Option<Instant>,
}

impl Pacer {
    pub fn new(min: u32, max: u32) -> Self {
        Self { min, max, window: FIRST_WINDOW.clamp(min, max), in_flight: 0, round: 0, refusals: 0, paused_until: None }
    }

    /// When the next start may be made: `None` while too many are in flight, else now or later.
    pub fn next(&self, now: Instant) -> Option<Instant> {
        (self.in_flight < self.window).then(|| self.paused_until.map_or(now, |until| until.max(now)))
    }

    /// Whether a track that was recorded a moment ago may be asked for at once: beside the window and the pause, which are for those that were never recorded,
    /// but not beyond the bound.
    pub fn next_replacement(&self, now: Instant) -> Option<Instant> {
        (self.in_flight < self.max).then_some(now)
    }

    pub fn started(&mut self) -> Round {
        self.in_flight += 1;
        Round(self.round)
    }

    pub fn succeeded(&mut self) {
        self.ended();
        self.window = (self.window + 1).min(self.max);
        self.refusals = 0;
        self.paused_until = None;
    }

    /// No node had room. `jitter` is from 0 to 1. `true`: the first refusal since a success.
    pub fn refused(&mut self, round: Round, now: Instant, jitter: f64) -> bool {
        self.ended();
        if round != Round(self.round) {
            return false;
        }
        self.round += 1;
        self.window = (self.window / 2).max(self.min);
        self.paused_until = Some(now + full_jitter(self.refusals, FIRST_PAUSE, MAX_PAUSE, jitter));
        self.refusals += 1;
        self.refusals == 1
    }

    /// Anything else: it says nothing about the nodes.
    pub fn ended(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_after_each_success_half_after_a_refusal_within_bounds() {
        let now = Instant::now();
        let mut pacer = Pacer::new(2, 7);
        assert_eq!(pacer.window, 4);
        for window in [5, 6, 7, 7] {
            pacer.started();
            pacer.succeeded();
            assert_eq!(pacer.window, window);
        }
        for window in [3, 2, 2] {
            let round = pacer.started();
            pacer.refused(round, now, 0.5);
            assert_eq!(pacer.window, window);
        }
    }

    #[test]
    fn a_replacement_waits_for_no_refusal_but_for_the_bound() {
        let now = Instant::now();
        let mut pacer = Pacer::new(1, 2);
        for _ in 0..3 {
            let round = pacer.started();
            pacer.refused(round, now, 1.0);
        }
        pacer.started();
        assert_eq!((pacer.next(now), pacer.next_replacement(now)), (None, Some(now)));
        pacer.started();
        assert_eq!(pacer.next_replacement(now), None);
    }

    #[test]
    fn the_refusals_of_one_round_count_once() {
        let now = Instant::now();
        let mut pacer = Pacer::new(1, 64);
        for _ in 0..60 {
            pacer.started();
            pacer.succeeded();
        }
        let rounds: Vec<Round> = (0..60).map(|_| pacer.started()).collect();
        for round in rounds {
            pacer.refused(round, now, 1.0);
        }
        assert_eq!((pacer.window, pacer.in_flight, pacer.refusals), (32, 0, 1));
    }

    #[test]
    fn pauses_grow_to_their_bound_and_end_with_a_success() {
        let now = Instant::now();
        let mut pacer = Pacer::new(1, 8);
        for pause in [1, 2, 4, 8, 8] {
            let round = pacer.started();
            pacer.refused(round, now, 1.0);
            assert_eq!(pacer.next(now), Some(now + Duration::from_secs(pause)));
        }
        pacer.started();
        assert_eq!(pacer.next(now), None, "one in flight is all that is allowed now");
        pacer.succeeded();
        assert_eq!(pacer.next(now), Some(now));
    }
}
