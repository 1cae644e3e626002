//! How much faster a sender's clock runs than ours.
//!
//! The delay of its audio grows and falls with its drift, and with what it leaves out or is late with. So where the delay jumps and stays, another stretch
//! begins, and the slope is that within all stretches, at whatever level each of them lies.

/// How far the delay may be off its level, in seconds: LiveKit's messages come in bunches.
pub(super) const STEADY: f64 = 0.06;
/// How long it must stay at another level for a new stretch to begin.
const SETTLED_AFTER: f64 = 1.0;
/// How much of the way to the last delay the level goes with each batch.
const FOLLOWED: f64 = 0.02;
/// Drift is told once it has been watched for so many seconds.
const TOLD_AFTER: f64 = 60.0;
/// Before so many, 60 ms that were left out once would look like more than [`ALARMING_PPM`].
const SURE_AFTER: f64 = 600.0;
/// More is no clock in order.
const ALARMING_PPM: f64 = 200.0;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drift {
    /// In millionths; below zero where the sender's clock is slow.
    pub ppm: f64,
    /// So much that something is wrong with a clock, and watched for long enough to be sure.
    pub is_alarming: bool,
}

#[derive(Debug, Default)]
pub struct DriftWatch {
    /// Of the stretches before.
    earlier: Slope,
    stretch: Option<Stretch>,
    /// Time and delay at which another stretch may have begun.
    away: Option<(f64, f64)>,
}

/// What a slope is made of: how many delays, how far their times lie apart, and how they go together.
#[derive(Debug, Clone, Copy, Default)]
struct Slope {
    count: f64,
    time_time: f64,
    time_delay: f64,
}

/// Sums over delays of one level, all of them against the first.
#[derive(Debug)]
struct Stretch {
    first: (f64, f64),
    level: f64,
    count: f64,
    time: f64,
    delay: f64,
    time_time: f64,
    time_delay: f64,
}

impl DriftWatch {
    /// A batch came at `time` with so much delay, both in seconds.
    pub fn on_audio(&mut self, time: f64, delay: f64) {
        let stretch = self.stretch.get_or_insert_with(|| Stretch::begin(time, delay));
        if (delay - stretch.level).abs() < STEADY {
            stretch.add(time, delay);
            self.away = None;
            return;
        }
        match self.away {
            Some((since, level)) if (delay - level).abs() < STEADY => {
                if time - since >= SETTLED_AFTER {
                    self.earlier = self.earlier.and(stretch.slope());
                    *stretch = Stretch::begin(time, delay);
                    self.away = None;
                }
            }
            Some(_) | None => self.away = Some((time, delay)),
        }
    }

    /// `None` while it cannot be told.
    pub fn told(&self) -> Option<Drift> {
        let all = self.earlier.and(self.stretch.as_ref()?.slope());
        let ppm = -all.time_delay / all.time_time * 1e6;
        all.is_watched_for(TOLD_AFTER).then(|| Drift { ppm, is_alarming: ppm.abs() > ALARMING_PPM && all.is_watched_for(SURE_AFTER) })
    }
}

impl Slope {
    fn and(self, other: Self) -> Self {
        Self { count: self.count + other.count, time_time: self.time_time + other.time_time, time_delay: self.time_delay + other.time_delay }
    }

    /// Whether the times lie as far apart as those of so many seconds in one piece.
    fn is_watched_for(&self, seconds: f64) -> bool {
        self.count > 1.0 && self.time_time >= self.count * seconds * seconds / 12.0
    }
}

impl Stretch {
    fn begin(time: f64, delay: f64) -> Self {
        Self { first: (time, delay), level: delay, count: 1.0, time: 0.0, delay: 0.0, time_time: 0.0, time_delay: 0.0 }
    }

    fn add(&mut self, time: f64, delay: f64) {
        self.level += FOLLOWED * (delay - self.level);
        let (time, delay) = (time - self.first.0, delay - self.first.1);
        self.count += 1.0;
        self.time += time;
        self.delay += delay;
        self.time_time += time * time;
        self.time_delay += time * delay;
    }

    fn slope(&self) -> Slope {
        Slope {
            count: self.count,
            time_time: self.time_time - self.time * self.time / self.count,
            time_delay: self.time_delay - self.time * self.delay / self.count,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BATCH: f64 = 0.15;

    /// A sender with a clock of its own, whose batches come up to 12 ms late.
    struct Sender {
        watch: DriftWatch,
        ppm: f64,
        batches: u32,
        left_out: f64,
    }

    impl Sender {
        fn new(ppm: f64) -> Self {
            Self { watch: DriftWatch::default(), ppm, batches: 0, left_out: 0.0 }
        }

        fn flows(mut self, seconds: f64) -> Self {
            for _ in 0..(seconds / BATCH) as u32 {
                self.batches += 1;
                let audio = f64::from(self.batches) * BATCH;
                // What it thinks to be 150 ms lasts a little less of our time if its clock is fast.
                let time = audio / (1.0 + self.ppm / 1e6) + self.left_out + f64::from(self.batches * 7 % 13) / 1_000.0;
                self.watch.on_audio(time, time - audio);
            }
            self
        }

        fn pauses(mut self, seconds: f64) -> Self {
            self.left_out += seconds;
            self
        }

        fn ppm(&self) -> Option<f64> {
            self.watch.told().map(|drift| drift.ppm)
        }
    }

    #[test]
    fn drift_is_told_after_a_minute() {
        assert_eq!(Sender::new(0.0).flows(59.0).ppm(), None, "too early to tell");
        for ppm in [-5_000.0, -150.0, -20.0, 0.0, 40.0, 300.0, 5_000.0] {
            let told = Sender::new(ppm).flows(3_600.0).ppm().expect("after an hour");
            assert!((told - ppm).abs() < 2.0 + ppm.abs() / 100.0, "{told} instead of {ppm}");
        }
    }

    #[test]
    fn what_was_left_out_is_no_drift() {
        for pause in [-2.0, -0.3, 0.1, 0.3, 2.0, 60.0] {
            let told = Sender::new(30.0).flows(300.0).pauses(pause).flows(300.0).ppm().expect("after ten minutes");
            assert!((told - 30.0).abs() < 3.0, "{told} after a pause of {pause} s");
        }
    }

    #[test]
    fn drift_is_alarming_beyond_200_ppm_and_once_it_is_sure() {
        let is_alarming = |sender: Sender| sender.watch.told().expect("it is told").is_alarming;
        for ppm in [-190.0, 0.0, 190.0] {
            assert!(!is_alarming(Sender::new(ppm).flows(700.0)), "{ppm}");
        }
        for ppm in [-210.0, 210.0, 5_000.0] {
            assert!(!is_alarming(Sender::new(ppm).flows(500.0)), "{ppm}, too early");
            assert!(is_alarming(Sender::new(ppm).flows(700.0)), "{ppm}");
        }
        assert!(!is_alarming(Sender::new(0.0).flows(350.0).pauses(0.055).flows(350.0)), "what may have been left out");
    }

    #[test]
    fn a_sender_that_never_flows_for_long_has_no_drift() {
        let mut sender = Sender::new(0.0);
        for _ in 0..200 {
            sender = sender.flows(10.0).pauses(0.3);
        }
        assert_eq!(sender.ppm(), None);
    }

    proptest! {
        #[test]
        fn drift_is_found_among_any_pauses(ppm in -400.0f64..400.0, parts in proptest::collection::vec((61.0f64..400.0, 0.1f64..70.0), 3..20)) {
            let sender = parts.iter().fold(Sender::new(ppm), |sender, (flow, pause)| sender.flows(*flow).pauses(*pause));
            let told = sender.ppm().expect("after three minutes");
            prop_assert!((told - ppm).abs() < 20.0, "{} instead of {}", told, ppm);
        }
    }
}
