//! Does what arrives fit what was declared? Bytes against a clock that the caller passes in.

use std::time::{Duration, Instant};

use super::format::PcmFormat;

/// Length of one window; three in a row decide.
const WINDOW: Duration = Duration::from_secs(1);
const WINDOWS: usize = 3;
/// A stream that was never steady for three seconds within this is not judged.
const GIVE_UP: Duration = Duration::from_secs(60);
/// How far windows may lie from each other, and from a rate, to count as that rate.
const TOLERANCE: f64 = 0.1;

/// What the arriving rate says of the declared format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The rate fits, or the sender is faster than real time, which is not judged.
    AsDeclared,
    /// A mono declaration from LiveKit that carries LiveKit's stereo.
    IsStereo,
    /// A steady rate below the declared one, in bytes per second.
    Mismatch { arriving_byte_rate: u64 },
}

/// Judges one connection once.
///
/// LiveKit's egress always sends 48 kHz stereo (`docs/FACTS.md`, egress socket), yet the predecessor's own example declares `channels=1`. So a handshake
/// with LiveKit's content type that declares 48 kHz mono, and then delivers a steady 192 kB/s, is stereo.
#[derive(Debug)]
pub struct RateJudge {
    declared: PcmFormat,
    from_livekit: bool,
    first: Option<Instant>,
    window_start: Option<Instant>,
    window_bytes: u64,
    /// Bytes per second of the last windows, oldest first.
    rates: Vec<f64>,
    done: bool,
}

impl RateJudge {
    pub fn new(declared: PcmFormat, from_livekit: bool) -> Self {
        Self { declared, from_livekit, first: None, window_start: None, window_bytes: 0, rates: Vec::new(), done: false }
    }

    /// Whether the verdict may yet turn mono into stereo within the first three windows, so that nothing should be cut by the declared format.
    pub fn may_be_stereo(&self) -> bool {
        !self.done && self.rates.len() < WINDOWS && self.from_livekit && self.declared == (PcmFormat { channels: 1, ..PcmFormat::LIVEKIT })
    }

    /// Takes note of `bytes` that came by `now`; says a verdict once.
    pub fn on_audio(&mut self, now: Instant, bytes: u64) -> Option<Verdict> {
        if self.done {
            return None;
        }
        // The first bytes only start the clock: how long they took to come is not known.
        let first = *self.first.get_or_insert(now);
        let Some(window_start) = self.window_start else {
            self.window_start = Some(now);
            return None;
        };
        self.window_bytes += bytes;
        let elapsed = now.saturating_duration_since(window_start);
        if elapsed < WINDOW {
            return None;
        }
        #[expect(clippy::as_conversions, reason = "a few megabytes at most: exact in an f64")]
        let rate = self.window_bytes as f64 / elapsed.as_secs_f64();
        self.window_start = Some(now);
        self.window_bytes = 0;
        if self.rates.len() == WINDOWS {
            self.rates.remove(0);
        }
        self.rates.push(rate);
        let verdict = self.verdict();
        self.done = verdict.is_some() || now.saturating_duration_since(first) > GIVE_UP;
        verdict
    }

    fn verdict(&self) -> Option<Verdict> {
        if self.rates.len() < WINDOWS {
            return None;
        }
        let near = |target: f64| self.rates.iter().all(|rate| (rate / target - 1.0).abs() <= TOLERANCE);
        #[expect(clippy::as_conversions, reason = "byte rates are below 1 MB/s: exact in an f64")]
        let declared = self.declared.byte_rate() as f64;
        let livekit_mono = self.from_livekit && self.declared == (PcmFormat { channels: 1, ..PcmFormat::LIVEKIT });
        if livekit_mono && near(2.0 * declared) {
            return Some(Verdict::IsStereo);
        }
        let mean = self.rates.iter().sum::<f64>() / 3.0;
        let faster = self.rates.iter().all(|rate| *rate > declared);
        // LiveKit is steady once it runs; a rough start only delays what its rate says.
        if near(declared) || (faster && (near(mean) || !livekit_mono)) {
            return Some(Verdict::AsDeclared);
        }
        #[expect(clippy::as_conversions, reason = "a positive rate below the declared one")]
        (near(mean) && mean < declared * (1.0 - TOLERANCE) && mean > 0.0).then_some(Verdict::Mismatch { arriving_byte_rate: mean.round() as u64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MONO: PcmFormat = PcmFormat { sample_rate: 48_000, channels: 1 };

    /// Feeds `rate(second)` bytes per second in 100 ms steps for `seconds`, and returns the verdict with the time it came.
    fn judge(declared: PcmFormat, from_livekit: bool, seconds: u64, rate: impl Fn(u64) -> u64) -> Option<(Verdict, Duration)> {
        let start = Instant::now();
        let mut judge = RateJudge::new(declared, from_livekit);
        (0..seconds * 10).find_map(|step| {
            let now = start + Duration::from_millis(100 * step);
            judge.on_audio(now, rate(step / 10) / 10).map(|verdict| (verdict, now - start))
        })
    }

    #[test]
    fn livekit_stereo_declared_as_mono_is_found_in_three_seconds() {
        assert_eq!(judge(MONO, true, 10, |_| 192_000), Some((Verdict::IsStereo, Duration::from_secs(3))));
    }

    #[test]
    fn verdict_by_declaration_and_rate() {
        let verdict = |declared, livekit, rate: u64| judge(declared, livekit, 10, |_| rate).map(|(verdict, _)| verdict);
        assert_eq!(verdict(MONO, false, 192_000), Some(Verdict::AsDeclared), "another sender at twice the speed is not judged");
        assert_eq!(verdict(MONO, true, 96_000), Some(Verdict::AsDeclared));
        assert_eq!(verdict(MONO, true, 400_000), Some(Verdict::AsDeclared), "faster than any real time");
        assert_eq!(verdict(PcmFormat::LIVEKIT, true, 192_000), Some(Verdict::AsDeclared));
        assert_eq!(verdict(PcmFormat::LIVEKIT, true, 96_000), Some(Verdict::Mismatch { arriving_byte_rate: 96_000 }));
        assert_eq!(verdict(PcmFormat { sample_rate: 16_000, channels: 1 }, true, 192_000), Some(Verdict::AsDeclared));
    }

    #[test]
    fn an_unsteady_sender_is_not_judged() {
        assert_eq!(judge(PcmFormat::LIVEKIT, true, 100, |second| if second % 2 == 0 { 0 } else { 150_000 }), None);
    }

    #[test]
    fn a_rough_start_only_delays_the_verdict() {
        let verdict = judge(MONO, true, 20, |second| if second == 0 { 900_000 } else { 192_000 });
        assert_eq!(verdict.map(|(verdict, _)| verdict), Some(Verdict::IsStereo));
    }

    #[test]
    fn groups_wait_for_the_judge_no_longer_than_three_windows() {
        let start = Instant::now();
        let mut judge = RateJudge::new(MONO, true);
        assert!(judge.may_be_stereo());
        for step in 0..=40 {
            judge.on_audio(start + Duration::from_millis(100 * step), if step % 7 == 0 { 40_000 } else { 1_000 });
        }
        assert!(!judge.may_be_stereo());
    }
}
