//! One connection's time: the wall clock as it stood at the start, and from then on the monotonic clock.
//!
//! A wall clock that is set while a connection lasts changes neither the order of its segments nor how long they are.

use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};

#[derive(Debug, Clone, Copy)]
pub struct Clock {
    started: Instant,
    started_at: DateTime<Utc>,
}

impl Clock {
    pub fn start() -> Self {
        Self { started: Instant::now(), started_at: Utc::now() }
    }

    /// The wall clock's reading of a moment.
    pub fn at(&self, moment: Instant) -> DateTime<Utc> {
        let delta = |span: Duration| TimeDelta::from_std(span).unwrap_or_default();
        match moment.checked_duration_since(self.started) {
            Some(after) => self.started_at + delta(after),
            None => self.started_at - delta(self.started.saturating_duration_since(moment)),
        }
    }

    /// How long after the start a moment was.
    pub fn elapsed_at(&self, moment: Instant) -> Duration {
        moment.saturating_duration_since(self.started)
    }

    pub fn now(&self) -> DateTime<Utc> {
        self.at(Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_keep_their_distance() {
        let clock = Clock::start();
        let moment = Instant::now();
        let hour = Duration::from_secs(3_600);
        assert_eq!(clock.at(moment + hour) - clock.at(moment), TimeDelta::hours(1));
        assert!(clock.at(clock.started - Duration::from_millis(5)) < clock.started_at);
        assert!(clock.now() >= clock.started_at);
    }
}
