//! Compares what a sender has sent with what the time says it should have.
//!
//! A sender that stops for a while leaves a hole in time, which must be filled for everything behind it to stay in its place; one that was only held up
//! catches up, and then nothing is missing. Which of the two it was shows when audio flows at its own pace again. A sender whose clock runs slower or
//! faster than ours leaves no hole: that is drift, and is told but never corrected.

use std::time::Duration;

/// What is less than this is not filled.
const LEAST_HOLE: f64 = 0.5;
/// How long audio must flow at its own pace before a hole counts.
const SETTLED_AFTER: f64 = 1.0;
/// How far its pace may be off meanwhile, in seconds: LiveKit's messages come in bunches.
const STEADY: f64 = 0.06;
/// After so long without a steady pace there is no telling, and nothing is filled.
const GIVE_UP_AFTER: f64 = 10.0;
/// How fast the usual delay may grow: by what a sender's clock may lag behind ours without anything missing.
const FOLLOWED: f64 = 250e-6;
/// Drift is told once it has been watched for so long.
const DRIFT_AFTER: f64 = 60.0;

/// What to do about the time between two batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    OnTime,
    /// In front of this batch something may be missing.
    MayLack,
    /// So many frames were missing where it was first said that something may be.
    Lacks(u64),
    /// So many frames are missing in front of this batch, and they are too many to be late.
    Silent(u64),
}

#[derive(Debug)]
pub struct SampleClock {
    rate: f64,
    /// Longer holes are told at once.
    longest_hole: f64,
    /// Frames that came or were filled in.
    frames: u64,
    /// The delay when nothing is late or missing, with the time it was seen.
    usual: Option<(f64, f64)>,
    hole: Option<Hole>,
    drift: Drift,
}

/// A hole that may be none.
#[derive(Debug, Clone, Copy)]
struct Hole {
    usual: f64,
    since: f64,
    /// From when on the pace has been steady, and the delay then.
    steady_since: f64,
    delay: f64,
}

/// The sums of a straight line through delays.
#[derive(Debug, Default)]
struct Drift {
    first: Option<f64>,
    last: f64,
    count: f64,
    time: f64,
    delay: f64,
    time_time: f64,
    time_delay: f64,
}

impl SampleClock {
    /// `sample_rate` in frames per second.
    pub fn new(sample_rate: u32, longest_hole: Duration) -> Self {
        Self {
            rate: f64::from(sample_rate.max(1)),
            longest_hole: longest_hole.as_secs_f64(),
            frames: 0,
            usual: None,
            hole: None,
            drift: Drift::default(),
        }
    }

    /// `frames` have come, the last of them at `time` after some fixed moment.
    pub fn on_audio(&mut self, time: Duration, frames: u64) -> Verdict {
        let time = time.as_secs_f64();
        self.frames = self.frames.saturating_add(frames);
        let delay = self.delay(time);
        let Some(hole) = self.hole else {
            let usual = self.usual.map_or(delay, |(_, usual)| usual);
            let lack = delay - usual;
            if lack <= LEAST_HOLE {
                self.on_usual(time, delay);
                return Verdict::OnTime;
            }
            if lack > self.longest_hole {
                return Verdict::Silent(self.fill(lack, time));
            }
            self.hole = Some(Hole { usual, since: time, steady_since: time, delay });
            return Verdict::MayLack;
        };
        self.on_hole(hole, time, delay)
    }

    /// Audio keeps on coming behind what may be a hole.
    fn on_hole(&mut self, hole: Hole, time: f64, delay: f64) -> Verdict {
        let lack = delay - hole.usual;
        if lack <= LEAST_HOLE {
            // It has caught up; what it may still lack counts with the next.
            self.hole = None;
            self.usual = Some((time, delay.min(hole.usual)));
            return Verdict::OnTime;
        }
        if time - hole.since > GIVE_UP_AFTER {
            // Its pace is another than was declared.
            self.hole = None;
            self.usual = None;
            self.on_usual(time, delay);
            return Verdict::OnTime;
        }
        if (delay - hole.delay).abs() > STEADY {
            self.hole = Some(Hole { steady_since: time, delay, ..hole });
            return Verdict::OnTime;
        }
        if time - hole.steady_since < SETTLED_AFTER {
            return Verdict::OnTime;
        }
        self.hole = None;
        Verdict::Lacks(self.fill(lack, time))
    }

    /// How much faster the sender's clock runs than ours, in millionths. `None` while that cannot be told.
    pub fn drift_ppm(&self) -> Option<f64> {
        self.drift.ppm()
    }

    /// How late the last frame is against one that had come at time 0, at the declared rate.
    fn delay(&self, time: f64) -> f64 {
        #[expect(clippy::as_conversions, reason = "exact up to 2^53 frames, which are six thousand years")]
        let frames = self.frames as f64;
        time - frames / self.rate
    }

    fn on_usual(&mut self, time: f64, delay: f64) {
        self.drift.add(time, delay);
        let usual = self.usual.map_or(delay, |(then, usual)| {
            // A pause that is too short to be filled is no drift: it counts with the next.
            let grows = if delay - usual < STEADY { FOLLOWED * (time - then).min(1.0) } else { 0.0 };
            delay.min(usual + grows)
        });
        self.usual = Some((time, usual));
    }

    #[expect(clippy::as_conversions, reason = "positive, and bounded by the connection's time")]
    fn fill(&mut self, seconds: f64, time: f64) -> u64 {
        let missing = (seconds * self.rate).round() as u64;
        self.frames = self.frames.saturating_add(missing);
        self.usual = Some((time, self.delay(time)));
        missing
    }
}

impl Drift {
    fn add(&mut self, time: f64, delay: f64) {
        let time = time - *self.first.get_or_insert(time);
        self.last = time;
        self.count += 1.0;
        self.time += time;
        self.delay += delay;
        self.time_time += time * time;
        self.time_delay += time * delay;
    }

    fn ppm(&self) -> Option<f64> {
        let spread = self.count * self.time_time - self.time * self.time;
        let slope = (self.count * self.time_delay - self.time * self.delay) / spread;
        (self.last >= DRIFT_AFTER && spread > 0.0).then_some(-slope * 1e6)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RATE: u32 = 48_000;
    const BATCH_MS: u64 = 150;

    /// A sender that is played to the clock, in batches of 150 ms.
    struct Sender {
        clock: SampleClock,
        ms: u64,
        verdicts: Vec<(u64, Verdict)>,
    }

    impl Sender {
        fn new() -> Self {
            Self { clock: SampleClock::new(RATE, Duration::from_secs(300)), ms: 0, verdicts: Vec::new() }
        }

        fn batch(&mut self, frames: u64) {
            let verdict = self.clock.on_audio(Duration::from_millis(self.ms), frames);
            if verdict != Verdict::OnTime {
                self.verdicts.push((self.ms, verdict));
            }
        }

        fn flows(mut self, seconds: u64) -> Self {
            for _ in 0..seconds * 1_000 / BATCH_MS {
                self.ms += BATCH_MS;
                self.batch(u64::from(RATE) * BATCH_MS / 1_000);
            }
            self
        }

        fn pauses(mut self, ms: u64) -> Self {
            self.ms += ms;
            self
        }

        /// So much audio at `speed` times its pace.
        fn catches_up(mut self, ms: u64, speed: u64) -> Self {
            for _ in 0..ms / BATCH_MS {
                self.ms += BATCH_MS / speed;
                self.batch(u64::from(RATE) * BATCH_MS / 1_000);
            }
            self
        }

        fn filled_ms(&self) -> u64 {
            let frames = |verdict: &Verdict| match verdict {
                Verdict::Lacks(frames) | Verdict::Silent(frames) => *frames,
                Verdict::OnTime | Verdict::MayLack => 0,
            };
            self.verdicts.iter().map(|(_, verdict)| frames(verdict)).sum::<u64>() * 1_000 / u64::from(RATE)
        }
    }

    #[test]
    fn a_pause_is_filled_once_the_flow_is_steady_again() {
        let sender = Sender::new().flows(20).pauses(2_000).flows(5);
        assert!(sender.filled_ms().abs_diff(2_000) <= 1, "{} ms", sender.filled_ms());
        let [(doubt, Verdict::MayLack), (told, Verdict::Lacks(_))] = sender.verdicts[..] else { panic!("{:?}", sender.verdicts) };
        assert!((1_000..1_300).contains(&(told - doubt)), "{:?}", sender.verdicts);
    }

    #[test]
    fn what_is_late_is_not_lost() {
        for speed in [2, 3, 5] {
            let late = 3_000;
            // While the sender catches up, its own time goes on.
            let sender = Sender::new().flows(20).pauses(late).catches_up(late * speed / (speed - 1), speed).flows(10);
            assert_eq!(sender.filled_ms(), 0, "at {speed} times the pace: {:?}", sender.verdicts);
        }
    }

    #[test]
    fn a_burst_at_the_start_is_no_debt() {
        let sender = Sender::new().catches_up(3_000, 50).flows(60);
        assert_eq!(sender.verdicts, [], "it is ahead, and stays so");
    }

    #[test]
    fn short_pauses_are_left_alone_and_long_ones_told_at_once() {
        assert_eq!(Sender::new().flows(20).pauses(400).flows(20).verdicts, []);
        let sender = Sender::new().flows(20).pauses(301_000).flows(20);
        assert!(
            matches!(sender.verdicts[..], [(_, Verdict::Silent(frames))] if frames.abs_diff(301 * u64::from(RATE)) < 48),
            "{:?}",
            sender.verdicts
        );
    }

    #[test]
    fn another_pace_than_declared_is_not_filled() {
        let mut half = Sender::new();
        for _ in 0..400 {
            half.ms += BATCH_MS;
            half.batch(u64::from(RATE) * BATCH_MS / 2_000);
        }
        assert_eq!(half.filled_ms(), 0, "{:?}", half.verdicts);
    }

    #[test]
    fn drift_is_told_and_not_filled() {
        for ppm in [-150.0f64, -20.0, 40.0, 300.0] {
            let mut clock = SampleClock::new(RATE, Duration::from_secs(300));
            let mut worst = Verdict::OnTime;
            for batch in 1..=100_000u64 {
                // The sender's 150 ms last a little less of our time if its clock is fast; its batches come up to 12 ms late.
                let seconds = batch as f64 * 0.15 / (1.0 + ppm / 1e6) + (batch * 7 % 13) as f64 / 1_000.0;
                let verdict = clock.on_audio(Duration::from_secs_f64(seconds), 7_200);
                worst = if verdict == Verdict::OnTime { worst } else { verdict };
            }
            let told = clock.drift_ppm().expect("after four hours");
            assert!((told - ppm).abs() < 2.0, "{told} instead of {ppm}");
            assert_eq!(worst, Verdict::OnTime, "at {ppm} ppm");
        }
        assert_eq!(Sender::new().flows(30).clock.drift_ppm(), None, "too early to tell");
    }

    proptest! {
        /// T1: after any pauses, what is in the file is as long as the time says, to half a second.
        #[test]
        fn t1_any_pauses_leave_less_than_half_a_second(pauses in proptest::collection::vec((100u64..5_000, 2u64..20), 1..40)) {
            let mut sender = Sender::new().flows(12);
            let mut missing = 0;
            for (pause, flow) in pauses {
                sender = sender.pauses(pause).flows(flow);
                missing += pause;
                let error = missing.abs_diff(sender.filled_ms());
                prop_assert!(error <= 520, "{error} ms after a pause of {pause}");
            }
        }
    }
}
