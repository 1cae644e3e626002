//! Compares what a sender has sent with what the time says it should have.
//!
//! A sender that stops for a while leaves a hole in time, which must be filled for everything behind it to stay in its place; one that was only held up
//! catches up, and then nothing is missing. Which of the two it was shows when audio flows at its own pace again. A sender whose clock runs slower or
//! faster than ours leaves no hole: that is drift, and is told but never corrected.

use std::time::Duration;

use super::drift::{Drift, DriftWatch, STEADY};

/// What is less than this is not filled.
const LEAST_HOLE: f64 = 0.5;
/// How long audio must flow at its own pace before a hole counts.
const SETTLED_AFTER: f64 = 1.0;
/// How long it must have between two pauses for the first to count by itself.
const SETTLED_BETWEEN: f64 = 0.5;
/// How much more delay at once is a pause and no slow pace: a batch lasts less.
const PAUSE: f64 = 0.25;
/// After so long without a pause and without a steady pace there will be none.
const GIVE_UP_AFTER: f64 = 10.0;
/// How fast the usual delay may grow: by what a sender's clock may lag behind ours without anything missing.
const FOLLOWED: f64 = 250e-6;

/// What to do about the time between two batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    OnTime,
    /// In front of this batch something may be missing, more than where that was said before.
    MayLack,
    /// So many frames were missing where it was last said that something may be.
    Lacks(u64),
    /// The same, and in front of this batch something may be missing again.
    LacksAgain(u64),
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
    /// Those that were filled in.
    filled: u64,
    /// The delay when nothing is late or missing, with the time it was seen.
    usual: Option<(f64, f64)>,
    /// Time and delay of the batch before.
    last: Option<(f64, f64)>,
    hole: Option<Hole>,
    drift: DriftWatch,
}

/// A hole that may be none.
#[derive(Debug, Clone, Copy)]
struct Hole {
    usual: f64,
    /// The last pause, or when it last caught up with some of it.
    since: f64,
    /// The delays since then.
    lowest: f64,
    highest: f64,
    /// It began with a pause. Else the pace may be another than was declared.
    paused: bool,
    /// From when on the pace has been steady, and the delay then.
    steady_since: f64,
    delay: f64,
}

impl SampleClock {
    /// `sample_rate` in frames per second.
    pub fn new(sample_rate: u32, longest_hole: Duration) -> Self {
        Self {
            rate: f64::from(sample_rate.max(1)),
            longest_hole: longest_hole.as_secs_f64(),
            frames: 0,
            filled: 0,
            usual: None,
            last: None,
            hole: None,
            drift: DriftWatch::default(),
        }
    }

    /// `frames` have come, the last of them at `time` after some fixed moment.
    pub fn on_audio(&mut self, time: Duration, frames: u64) -> Verdict {
        let time = time.as_secs_f64();
        self.frames = self.frames.saturating_add(frames);
        let delay = self.delay(time);
        self.drift.on_audio(time, delay + self.seconds(self.filled));
        let (last_time, last) = self.last.replace((time, delay)).unwrap_or((time, delay));
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
            self.hole = Some(Hole::begin(usual, time, delay, delay - last > PAUSE));
            return Verdict::MayLack;
        };
        if delay - hole.usual > LEAST_HOLE && delay - hole.highest > PAUSE {
            return self.on_pause(hole, time, last_time - hole.steady_since, last);
        }
        self.on_hole(hole, time, delay)
    }

    /// The sender has paused again, after `steady` seconds at its own pace and with a delay of `before`.
    fn on_pause(&mut self, hole: Hole, time: f64, steady: f64, before: f64) -> Verdict {
        let delay = self.delay(time);
        let (earlier, more) = (before - hole.usual, delay - before);
        if earlier + more > self.longest_hole {
            self.hole = None;
            return Verdict::Silent(self.fill(earlier + more, time));
        }
        if steady < SETTLED_BETWEEN {
            self.hole = Some(Hole::begin(hole.usual, time, delay, true));
            return if more > earlier { Verdict::MayLack } else { Verdict::OnTime };
        }
        let missing = self.fill(earlier, time);
        self.usual = Some((time, hole.usual));
        let delay = self.delay(time);
        let again = delay - hole.usual > LEAST_HOLE;
        self.hole = again.then(|| Hole::begin(hole.usual, time, delay, true));
        if again { Verdict::LacksAgain(missing) } else { Verdict::Lacks(missing) }
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
            self.hole = None;
            let sure = hole.lowest - hole.usual;
            if hole.paused && sure > LEAST_HOLE {
                // Its batches come too unevenly to be called steady, but none as early as before the pause.
                return Verdict::Lacks(self.fill(sure, time));
            }
            // Its pace is another than was declared.
            self.usual = None;
            self.on_usual(time, delay);
            return Verdict::OnTime;
        }
        let hole = hole.seen(time, delay);
        self.hole = Some(hole);
        if time - hole.steady_since < SETTLED_AFTER {
            return Verdict::OnTime;
        }
        self.hole = None;
        Verdict::Lacks(self.fill(lack, time))
    }

    /// Whether something may be missing, which is found out by what comes.
    pub fn is_undecided(&self) -> bool {
        self.hole.is_some()
    }

    /// How much faster the sender's clock runs than ours, once that can be told.
    pub fn drift(&self) -> Option<Drift> {
        self.drift.told()
    }

    /// How late the last frame is against one that had come at time 0, at the declared rate.
    fn delay(&self, time: f64) -> f64 {
        time - self.seconds(self.frames)
    }

    #[expect(clippy::as_conversions, reason = "exact up to 2^53 frames, which are six thousand years")]
    fn seconds(&self, frames: u64) -> f64 {
        frames as f64 / self.rate
    }

    fn on_usual(&mut self, time: f64, delay: f64) {
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
        self.filled = self.filled.saturating_add(missing);
        self.usual = Some((time, self.delay(time)));
        self.last = self.usual;
        missing
    }
}

impl Hole {
    fn begin(usual: f64, time: f64, delay: f64, paused: bool) -> Self {
        Self { usual, since: time, lowest: delay, highest: delay, paused, steady_since: time, delay }
    }

    /// One more batch behind it.
    fn seen(mut self, time: f64, delay: f64) -> Self {
        if (delay - self.delay).abs() > STEADY {
            (self.steady_since, self.delay) = (time, delay);
        }
        if delay < self.lowest - STEADY {
            (self.since, self.lowest, self.highest) = (time, delay, delay);
        }
        self.highest = self.highest.max(delay);
        self
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

        fn flows(mut self, ms: u64) -> Self {
            for _ in 0..ms / BATCH_MS {
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
                Verdict::Lacks(frames) | Verdict::LacksAgain(frames) | Verdict::Silent(frames) => *frames,
                Verdict::OnTime | Verdict::MayLack => 0,
            };
            self.verdicts.iter().map(|(_, verdict)| frames(verdict)).sum::<u64>() * 1_000 / u64::from(RATE)
        }
    }

    #[test]
    fn a_pause_is_filled_once_the_flow_is_steady_again() {
        let sender = Sender::new().flows(20_000).pauses(2_000).flows(5_000);
        assert!(sender.filled_ms().abs_diff(2_000) <= 1, "{} ms", sender.filled_ms());
        let [(doubt, Verdict::MayLack), (told, Verdict::Lacks(_))] = sender.verdicts[..] else { panic!("{:?}", sender.verdicts) };
        assert!((1_000..1_300).contains(&(told - doubt)), "{:?}", sender.verdicts);
    }

    #[test]
    fn what_is_late_is_not_lost() {
        for speed in [2, 3, 5] {
            let late = 3_000;
            // While the sender catches up, its own time goes on.
            let sender = Sender::new().flows(20_000).pauses(late).catches_up(late * speed / (speed - 1), speed).flows(10_000);
            assert_eq!(sender.filled_ms(), 0, "at {speed} times the pace: {:?}", sender.verdicts);
        }
    }

    #[test]
    fn a_burst_at_the_start_is_no_debt() {
        let sender = Sender::new().catches_up(3_000, 50).flows(60_000);
        assert_eq!(sender.verdicts, [], "it is ahead, and stays so");
    }

    #[test]
    fn short_pauses_are_left_alone_and_long_ones_told_at_once() {
        assert_eq!(Sender::new().flows(20_000).pauses(400).flows(20_000).verdicts, []);
        let sender = Sender::new().flows(20_000).pauses(301_000).flows(20_000);
        assert!(
            matches!(sender.verdicts[..], [(_, Verdict::Silent(frames))] if frames.abs_diff(301 * u64::from(RATE)) < 48),
            "{:?}",
            sender.verdicts
        );
    }

    #[test]
    fn another_pace_than_declared_is_not_filled() {
        for part in [2, 6] {
            let mut slow = Sender::new();
            for _ in 0..400 {
                slow.ms += BATCH_MS;
                slow.batch(u64::from(RATE) * BATCH_MS / 1_000 / part);
            }
            assert_eq!(slow.filled_ms(), 0, "a {part}th of it: {:?}", slow.verdicts);
        }
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
            let told = clock.drift().expect("after four hours").ppm;
            assert!((told - ppm).abs() < 2.0, "{told} instead of {ppm}");
            assert_eq!(worst, Verdict::OnTime, "at {ppm} ppm");
        }
        assert_eq!(Sender::new().flows(30_000).clock.drift(), None, "too early to tell");
    }

    #[test]
    fn pauses_are_no_drift_be_they_filled_or_not() {
        for pause in [100, 300, 2_000, 400_000] {
            let sender = Sender::new().flows(300_000).pauses(pause).flows(300_000);
            let told = sender.clock.drift().expect("after ten minutes").ppm;
            assert!(told.abs() < 1.0, "{told} after a pause of {pause} ms");
        }
    }

    #[test]
    fn t1_a_second_pause_within_the_doubt_is_no_pace() {
        let sender = Sender::new().flows(20_000).pauses(600).flows(150).pauses(60_000).flows(20_000);
        assert!(sender.filled_ms().abs_diff(60_600) <= 1, "{} ms", sender.filled_ms());
        let [(first, Verdict::MayLack), (second, Verdict::MayLack), (_, Verdict::Lacks(_))] = sender.verdicts[..] else {
            panic!("{:?}", sender.verdicts)
        };
        assert_eq!(second - first, 60_150, "the greater of them is where it is filled");
        let sender = Sender::new().flows(20_000).pauses(600).flows(150).pauses(300_000).flows(20_000);
        assert!(matches!(sender.verdicts[..], [(_, Verdict::MayLack), (_, Verdict::Silent(_))]), "{:?}", sender.verdicts);
        assert!(sender.filled_ms().abs_diff(300_600) <= 1, "{} ms", sender.filled_ms());
    }

    #[test]
    fn t1_each_pause_of_a_sender_that_comes_and_goes_is_filled_in_its_place() {
        let sender = (0..60).fold(Sender::new().flows(20_000), |sender, _| sender.pauses(2_000).flows(900)).flows(5_000);
        assert!(sender.filled_ms().abs_diff(120_000) <= 60, "{} ms", sender.filled_ms());
        let again = sender.verdicts.iter().filter(|(_, verdict)| matches!(verdict, Verdict::LacksAgain(_))).count();
        assert_eq!(again, 59, "{:?}", sender.verdicts);
        // Between those there is too little to say which it was, but not too little to count.
        for (pause, flow) in [(2_000, 300), (300, 150), (300, 450)] {
            let sender = (0..60).fold(Sender::new().flows(20_000), |sender, _| sender.pauses(pause).flows(flow)).flows(5_000);
            let missing = 60 * pause;
            assert!(sender.filled_ms().abs_diff(missing) <= 500, "{} ms instead of {missing}", sender.filled_ms());
        }
    }

    #[test]
    fn t1_a_pause_of_an_uneven_sender_is_filled_after_a_while() {
        let mut clock = SampleClock::new(RATE, Duration::from_secs(300));
        let mut filled = 0;
        for batch in 1..=1_000u64 {
            let (late, pause) = (batch * 7 % 13 * 20, if batch > 400 { 20_000 } else { 0 });
            if let Verdict::Lacks(frames) = clock.on_audio(Duration::from_millis(batch * BATCH_MS + late + pause), 7_200) {
                filled += frames * 1_000 / u64::from(RATE);
            }
        }
        assert!(filled.abs_diff(20_000) <= 200, "{filled} ms");
    }

    #[test]
    fn what_is_late_is_not_lost_where_catching_up_takes_long() {
        let mut sender = Sender::new().flows(20_000).pauses(12_000);
        for _ in 0..36_000 / BATCH_MS {
            sender.ms += BATCH_MS - 50;
            sender.batch(u64::from(RATE) * BATCH_MS / 1_000);
        }
        assert_eq!(sender.flows(10_000).filled_ms(), 0, "at one and a half times its pace");
    }

    proptest! {
        /// T1: after any pauses, what is in the file is as long as the time says, to half a second.
        #[test]
        fn t1_any_pauses_leave_less_than_half_a_second(pauses in proptest::collection::vec((100u64..60_000, 2_000u64..20_000), 1..40)) {
            let mut sender = Sender::new().flows(12_000);
            let mut missing = 0;
            for (pause, flow) in pauses {
                sender = sender.pauses(pause).flows(flow);
                missing += pause;
                let error = missing.abs_diff(sender.filled_ms());
                prop_assert!(error <= 520, "{error} ms after a pause of {pause}");
            }
        }

        /// T1: the same however little comes between them, once it flows again.
        #[test]
        fn t1_any_pauses_leave_less_than_half_a_second_whatever_came_between(
            pauses in proptest::collection::vec((prop_oneof![260u64..600, 600u64..5_000, 5_000u64..60_000], 200u64..3_000), 1..40)
        ) {
            let missing: u64 = pauses.iter().map(|(pause, _)| pause).sum();
            let sender = pauses.iter().fold(Sender::new().flows(12_000), |sender, (pause, flow)| sender.pauses(*pause).flows(*flow)).flows(15_000);
            let error = missing.abs_diff(sender.filled_ms());
            prop_assert!(error <= 520, "{error} ms of {missing}");
        }
    }
}
