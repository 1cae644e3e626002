//! Changes the rate of a mono stream. Runs across calls: cutting the input differently changes no output sample.

use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Fft, FixedSync, Indexing, Resampler as _};

use super::format::PcmFormat;

/// Input frames per call of the converter. Its delay is below 40 ms for all common rates.
const CHUNK_FRAMES: usize = 1024;

/// A streaming converter whose output is aligned with its input: sample `n` of the output is the input at time `n / to`.
pub struct Resampler {
    /// `None` where both rates are the same.
    converter: Option<Fft<f32>>,
    ratio: f64,
    /// Input that does not fill a chunk yet.
    pending: Vec<f32>,
    /// The converter's own delay, still to be left out of the output.
    delay_left: usize,
    taken: u64,
    given: u64,
}

impl Resampler {
    /// Rates in Hz, both above zero.
    pub fn new(from: u32, to: u32) -> Self {
        let index = |rate: u32| usize::try_from(rate).unwrap_or(usize::MAX);
        let converter =
            (from != to).then(|| Fft::new(index(from), index(to), CHUNK_FRAMES, 1, FixedSync::Input).expect("rates above zero make a resampler"));
        let delay_left = converter.as_ref().map_or(0, |converter| converter.output_delay());
        Self { converter, ratio: f64::from(to) / f64::from(from), pending: Vec::new(), delay_left, taken: 0, given: 0 }
    }

    /// Takes samples and returns what can be computed so far.
    pub fn push(&mut self, input: &[f32]) -> Vec<f32> {
        self.taken += u64::try_from(input.len()).unwrap_or(0);
        if self.converter.is_none() {
            self.given += u64::try_from(input.len()).unwrap_or(0);
            return input.to_vec();
        }
        self.pending.extend_from_slice(input);
        let mut output = Vec::new();
        while let Some(chunk) = self.converter.as_ref().map(|converter| converter.input_frames_next()).filter(|need| *need <= self.pending.len()) {
            let input: Vec<f32> = self.pending.drain(..chunk).collect();
            self.convert(&input, &mut output);
        }
        self.given += u64::try_from(output.len()).unwrap_or(0);
        output
    }

    /// The rest: after it, the whole output is as long as the whole input.
    pub fn finish(mut self) -> Vec<f32> {
        #[expect(clippy::as_conversions, reason = "frame counts are far below 2^53")]
        let expected = ((self.taken as f64) * self.ratio).round() as u64;
        let missing = usize::try_from(expected.saturating_sub(self.given)).unwrap_or(0);
        let mut output = Vec::new();
        while output.len() < missing {
            let input = std::mem::take(&mut self.pending);
            self.convert(&input, &mut output);
        }
        output.truncate(missing);
        output
    }

    /// Runs one chunk, shorter input being filled up with silence.
    fn convert(&mut self, input: &[f32], output: &mut Vec<f32>) {
        let Some(converter) = &mut self.converter else { return };
        let indexing = Indexing { partial_len: Some(input.len()), ..Indexing::default() };
        let adapter = InterleavedSlice::new(input, 1, input.len()).expect("a mono slice is as long as its frames");
        let converted = converter.process(&adapter, Some(&indexing)).expect("a chunk of the asked length converts").take_data();
        let skip = self.delay_left.min(converted.len());
        self.delay_left -= skip;
        output.extend(converted.into_iter().skip(skip));
    }
}

/// s16le frames as mono samples from −1 to 1: the mean of the channels.
pub fn mono(pcm: &[u8], format: PcmFormat) -> Vec<f32> {
    let samples = pcm.as_chunks::<2>().0;
    let to_f32 = |pair: &[u8; 2]| f32::from(i16::from_le_bytes(*pair)) / 32_768.0;
    match format.channels {
        1 => samples.iter().map(to_f32).collect(),
        _ => samples.as_chunks::<2>().0.iter().map(|[left, right]| (to_f32(left) + to_f32(right)) / 2.0).collect(),
    }
}

/// A sample from −1 to 1 as s16, clipped.
pub fn to_i16(sample: f32) -> i16 {
    #[expect(clippy::as_conversions, reason = "a float cast saturates, which is the clipping wanted here")]
    {
        (sample * 32_768.0).round() as i16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tone(rate: u32, hz: f32, seconds: f32) -> Vec<f32> {
        (0..(rate as f32 * seconds) as u32).map(|n| (std::f32::consts::TAU * hz * n as f32 / rate as f32).sin() * 0.5).collect()
    }

    fn rms(samples: &[f32]) -> f32 {
        (samples.iter().map(|sample| sample * sample).sum::<f32>() / samples.len() as f32).sqrt()
    }

    fn resample(from: u32, to: u32, input: &[f32], piece: usize) -> Vec<f32> {
        let mut resampler = Resampler::new(from, to);
        let mut output: Vec<f32> = input.chunks(piece).flat_map(|piece| resampler.push(piece)).collect();
        output.extend(resampler.finish());
        output
    }

    #[test]
    fn a_10_khz_tone_is_60_db_down_at_16_khz() {
        for from in [44_100, 48_000, 96_000] {
            let input = tone(from, 10_000.0, 1.0);
            let output = resample(from, 16_000, &input, 1_000);
            let middle = &output[1_600..output.len() - 1_600];
            let attenuation = 20.0 * (rms(middle) / rms(&input)).log10();
            assert!(attenuation <= -60.0, "{from} Hz: {attenuation} dB");
        }
    }

    #[test]
    fn speech_frequencies_keep_their_level_and_their_time_to_the_sample() {
        for from in [8_000, 22_050, 44_100, 48_000, 192_000] {
            let output = resample(from, 16_000, &tone(from, 1_000.0, 1.0), 777);
            assert_eq!(output.len(), 16_000, "{from} Hz");
            let expected = tone(16_000, 1_000.0, 1.0);
            let gain = rms(&output[1_600..14_400]) / rms(&expected[1_600..14_400]);
            assert!((gain - 1.0).abs() < 0.03, "{from} Hz: gain {gain}");
            // A shift by half an output sample, the most that rounding the converter's delay may cost, is an error of 0.2 at 1 kHz.
            let error: Vec<f32> = output.iter().zip(&expected).map(|(a, b)| a - b).collect();
            let error = rms(&error[1_600..14_400]) / rms(&expected);
            assert!(error < 0.2, "{from} Hz: error {error}");
        }
    }

    #[test]
    fn cutting_the_input_differently_changes_nothing() {
        let input = tone(48_000, 440.0, 0.7);
        let whole = resample(48_000, 16_000, &input, input.len());
        assert_eq!(resample(48_000, 16_000, &input, 480), whole);
        assert_eq!(resample(48_000, 16_000, &input, 96_001), whole);
    }

    #[test]
    fn equal_rates_pass_through() {
        let input = tone(16_000, 440.0, 0.1);
        assert_eq!(resample(16_000, 16_000, &input, 100), input);
    }

    #[test]
    fn stereo_is_averaged_and_full_scale_is_clipped() {
        let pcm: Vec<u8> = [16_384i16, 0, -16_384, -16_384].iter().flat_map(|sample| sample.to_le_bytes()).collect();
        assert_eq!(mono(&pcm, PcmFormat::LIVEKIT), [0.25, -0.5]);
        assert_eq!([to_i16(1.5), to_i16(-1.5), to_i16(0.0)], [i16::MAX, i16::MIN, 0]);
    }
}
