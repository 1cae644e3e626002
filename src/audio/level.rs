//! How loud a stretch of s16le PCM is.

/// The loudest sample and the energy of a stretch of audio.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Level {
    /// The largest magnitude, 0 to 32,768.
    pub peak: u16,
    /// The mean of the squared samples.
    pub mean_square: u64,
}

impl Level {
    /// Measures whole samples; a last odd byte is ignored.
    pub fn of(pcm: &[u8]) -> Self {
        let (mut peak, mut sum, mut count) = (0u16, 0u64, 0u64);
        for pair in pcm.as_chunks::<2>().0 {
            let magnitude = i16::from_le_bytes(*pair).unsigned_abs();
            peak = peak.max(magnitude);
            sum += u64::from(magnitude) * u64::from(magnitude);
            count += 1;
        }
        Self { peak, mean_square: sum.checked_div(count).unwrap_or(0) }
    }

    /// The peak relative to full scale, in dBFS; `None` for digital silence.
    pub fn peak_dbfs(self) -> Option<f64> {
        peak_dbfs(self.peak)
    }

    /// The root mean square relative to full scale, in dBFS; `None` for digital silence.
    pub fn rms_dbfs(self) -> Option<f64> {
        // Exact: a mean square of s16 is at most 2^30, far below 2^53.
        let mean_square = f64::from(u32::try_from(self.mean_square).unwrap_or(u32::MAX));
        (self.mean_square > 0).then(|| 10.0 * (mean_square / (32_768.0 * 32_768.0)).log10())
    }
}

/// A peak magnitude (0 to 32,768) in dBFS; `None` for digital silence.
pub fn peak_dbfs(peak: u16) -> Option<f64> {
    (peak > 0).then(|| 20.0 * (f64::from(peak) / 32_768.0).log10())
}

/// Whether every byte is zero: the exact zeros that LiveKit sends for a muted track.
pub fn is_digital_silence(pcm: &[u8]) -> bool {
    pcm.chunks(64).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Scales s16le samples so that the loudest reaches −1 dBFS; silence stays as it is.
pub fn normalize_peak(pcm: &mut [u8]) {
    const TARGET: f64 = 29_204.0; // 32,768 × 10^(−1/20)
    let peak = Level::of(pcm).peak;
    if peak == 0 {
        return;
    }
    let gain = TARGET / f64::from(peak);
    for pair in pcm.as_chunks_mut::<2>().0 {
        let scaled = (f64::from(i16::from_le_bytes(*pair)) * gain).round();
        #[expect(clippy::as_conversions, reason = "bounded by TARGET, which fits an i16")]
        {
            *pair = (scaled as i16).to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pcm(samples: &[i16]) -> Vec<u8> {
        samples.iter().flat_map(|sample| sample.to_le_bytes()).collect()
    }

    #[test]
    fn the_most_negative_sample_is_full_scale() {
        let level = Level::of(&pcm(&[0, i16::MIN, 5]));
        assert_eq!(level.peak, 32_768);
        assert_eq!(level.peak_dbfs(), Some(0.0));
    }

    #[test]
    fn a_square_wave_at_half_scale_is_minus_six_decibels() {
        let level = Level::of(&pcm(&[16_384, -16_384, 16_384, -16_384]));
        assert!((level.rms_dbfs().expect("sounds") + 6.02).abs() < 0.01);
    }

    #[test]
    fn digital_silence_has_no_level() {
        assert_eq!(Level::of(&[0; 10]).rms_dbfs(), None);
        assert!(is_digital_silence(&[0; 1000]));
        let mut nearly = [0u8; 1000];
        nearly[999] = 1;
        assert!(!is_digital_silence(&nearly));
    }

    #[test]
    fn normalizing_brings_the_peak_to_minus_one_decibel_and_keeps_signs() {
        let mut audio = pcm(&[100, -1000, 0]);
        normalize_peak(&mut audio);
        assert_eq!(audio, pcm(&[2920, -29_204, 0]));
        let mut silence = vec![0; 4];
        normalize_peak(&mut silence);
        assert_eq!(silence, vec![0; 4]);
    }
}
