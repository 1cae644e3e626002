//! Turns the groups of a track into 16 kHz mono slices that a service takes, on the track's own time.

use super::{SPEECH_RATE, SpeechSlice};
use crate::audio::format::PcmFormat;
use crate::audio::resample::{Resampler, mono, to_i16};
use crate::audio::window::Group;

/// One resampler runs across the groups, so that no group starts with a click. Where groups are missing in between (silence is not sent, and
/// what the queue dropped), it starts anew at the right time; the last few milliseconds inside it are then not sent.
#[derive(Default)]
pub struct SpeechStream {
    running: Option<Running>,
}

struct Running {
    resampler: Resampler,
    format: PcmFormat,
    next_frame: u64,
    /// Where this run started, in milliseconds, and how many samples it has given.
    start_ms: u64,
    given: u64,
}

impl SpeechStream {
    /// The slices of a group, each at most `max_samples` long.
    pub fn push(&mut self, group: &Group, max_samples: usize) -> Vec<SpeechSlice> {
        let continued = self.running.take().filter(|running| running.next_frame == group.start_frame && running.format == group.format);
        let mut running = continued.unwrap_or_else(|| Running {
            resampler: Resampler::new(group.format.sample_rate, SPEECH_RATE),
            format: group.format,
            next_frame: group.start_frame,
            start_ms: group.start_ms(),
            given: 0,
        });
        running.next_frame += group.frames();
        let samples: Vec<i16> = running.resampler.push(&mono(&group.audio, group.format)).into_iter().map(to_i16).collect();
        let slices = samples
            .chunks(max_samples.max(1))
            .map(|samples| {
                let start_ms = running.start_ms + running.given * 1000 / u64::from(SPEECH_RATE);
                running.given += u64::try_from(samples.len()).unwrap_or(0);
                SpeechSlice { start_ms, samples: samples.to_vec() }
            })
            .collect();
        self.running = Some(running);
        slices
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audio::window::{GroupLimits, Grouper};

    fn groups(seconds: usize, group_seconds: f64) -> Vec<Group> {
        let pcm: Vec<u8> = (0..48_000 * seconds)
            .flat_map(|n| {
                let sample = (8_000.0 * (n as f64 * std::f64::consts::TAU * 300.0 / 48_000.0).sin()) as i16;
                [sample.to_le_bytes(), sample.to_le_bytes()].concat()
            })
            .collect();
        let limits = GroupLimits { seconds: group_seconds, bytes: 1 << 24 };
        let mut grouper = Grouper::new(PcmFormat::LIVEKIT, limits, true, false);
        let mut groups = grouper.push(&pcm);
        groups.extend(grouper.flush());
        groups
    }

    #[test]
    fn slices_follow_each_other_on_the_tracks_time() {
        let mut stream = SpeechStream::default();
        let slices: Vec<SpeechSlice> = groups(7, 2.0).iter().flat_map(|group| stream.push(group, 80_000)).collect();
        for pair in slices.windows(2) {
            assert!(pair[1].start_ms.abs_diff(pair[0].end_ms()) <= 1);
        }
        let last = slices.last().expect("slices").end_ms();
        assert!((6_900..=7_000).contains(&last), "{last}");
    }

    #[test]
    fn long_groups_are_cut_for_the_service() {
        let mut stream = SpeechStream::default();
        let slices: Vec<SpeechSlice> = groups(12, 12.0).iter().flat_map(|group| stream.push(group, 80_000)).collect();
        assert_eq!(slices.iter().map(|slice| slice.start_ms).collect::<Vec<_>>(), [0, 5_000, 10_000]);
        assert!(slices.iter().all(|slice| slice.samples.len() <= 80_000));
    }

    #[test]
    fn a_missing_group_moves_no_later_one() {
        let mut stream = SpeechStream::default();
        let groups = groups(6, 2.0);
        stream.push(&groups[0], 80_000);
        assert_eq!(stream.push(&groups[2], 80_000)[0].start_ms, 4_000);
    }

    #[test]
    fn cutting_groups_differently_changes_no_sample() {
        let all = |group_seconds| {
            let mut stream = SpeechStream::default();
            groups(4, group_seconds).iter().flat_map(|group| stream.push(group, 80_000)).flat_map(|slice| slice.samples).collect::<Vec<_>>()
        };
        let (long, short) = (all(4.0), all(0.3));
        assert_eq!(long, short);
    }
}
