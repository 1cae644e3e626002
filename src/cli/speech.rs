//! WAV files as the audio that LiveKit's egress would make of them.

use std::io::Read;

use anyhow::{Context, bail};

use crate::audio::format::PcmFormat;
use crate::audio::resample::{Resampler, to_i16};

/// Reads a WAV file of any rate, channel count and sample width, and gives 48 kHz stereo s16le. 48 kHz stereo 16-bit files come out bit for bit.
///
/// # Errors
/// When it is no WAV file, or one of a kind that cannot be played.
pub fn livekit_pcm(file: impl Read) -> anyhow::Result<Vec<u8>> {
    let mut reader = hound::WavReader::new(file).context("not a WAV file that can be read")?;
    let spec = reader.spec();
    if spec.channels == 0 || spec.sample_rate == 0 {
        bail!("the file declares no channels or no sample rate");
    }
    let is_livekit = spec.sample_rate == PcmFormat::LIVEKIT.sample_rate && spec.channels == PcmFormat::LIVEKIT.channels;
    if is_livekit && spec.bits_per_sample == 16 && spec.sample_format == hound::SampleFormat::Int {
        let samples = reader.samples::<i16>().map(|sample| sample.map(i16::to_le_bytes));
        return Ok(samples.collect::<Result<Vec<_>, _>>().context("the file is damaged")?.concat());
    }
    let samples: Vec<f32> = match spec.sample_format {
        hound::SampleFormat::Float => reader.samples::<f32>().collect::<Result<_, _>>(),
        hound::SampleFormat::Int => {
            let full_scale = 2f32.powi(i32::from(spec.bits_per_sample) - 1);
            #[expect(clippy::as_conversions, reason = "24 bits are exact in an f32, and 32 bits are more than is heard")]
            let samples = reader.samples::<i32>().map(|sample| sample.map(|sample| sample as f32 / full_scale)).collect::<Result<_, _>>();
            samples
        }
    }
    .context("the file is damaged")?;
    let channels = usize::from(spec.channels);
    let channel = |index: usize| samples.iter().skip(index).step_by(channels).copied().collect::<Vec<f32>>();
    let (left, right) = match channels {
        1 => (channel(0), None),
        2 => (channel(0), Some(channel(1))),
        // LiveKit mixes whatever was published; here every channel weighs the same.
        _ => {
            let weight = f32::from(spec.channels);
            (samples.chunks_exact(channels).map(|frame| frame.iter().sum::<f32>() / weight).collect(), None)
        }
    };
    let resampled = |channel: &[f32]| {
        let mut resampler = Resampler::new(spec.sample_rate, PcmFormat::LIVEKIT.sample_rate);
        let mut output = resampler.push(channel);
        output.extend(resampler.finish());
        output
    };
    let left = resampled(&left);
    let right = right.map_or_else(|| left.clone(), |right| resampled(&right));
    Ok(left.iter().zip(&right).flat_map(|(left, right)| [to_i16(*left).to_le_bytes(), to_i16(*right).to_le_bytes()]).flatten().collect())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn wav(channels: u16, sample_rate: u32, bits_per_sample: u16, frames: usize) -> Vec<u8> {
        let spec = hound::WavSpec { channels, sample_rate, bits_per_sample, sample_format: hound::SampleFormat::Int };
        let mut file = Cursor::new(Vec::new());
        let mut writer = hound::WavWriter::new(&mut file, spec).expect("a writer");
        let full = 2f64.powi(i32::from(bits_per_sample) - 1) * 0.5;
        for n in 0..frames * usize::from(channels) {
            let time = (n / usize::from(channels)) as f64 / f64::from(sample_rate);
            writer.write_sample((full * (time * 440.0 * std::f64::consts::TAU).sin()) as i32).expect("written");
        }
        writer.finalize().expect("finalized");
        file.into_inner()
    }

    #[test]
    fn every_kind_becomes_livekits_and_keeps_its_length_and_level() {
        for (channels, rate, bits) in [(1, 8_000, 8), (1, 16_000, 16), (2, 44_100, 24), (2, 48_000, 32), (6, 96_000, 16), (1, 22_050, 16)] {
            let pcm = livekit_pcm(wav(channels, rate, bits, rate as usize).as_slice()).expect("readable");
            assert_eq!(pcm.len(), 192_000, "{channels} channels at {rate} Hz, {bits} bits");
            let level = crate::audio::level::Level::of(&pcm[19_200..172_800]).rms_dbfs().expect("sounds");
            assert!((level + 9.03).abs() < 0.3, "{channels} channels at {rate} Hz, {bits} bits: {level} dBFS");
        }
    }

    #[test]
    fn livekits_own_format_passes_bit_for_bit() {
        let file = wav(2, 48_000, 16, 480);
        assert_eq!(livekit_pcm(file.as_slice()).expect("readable"), file[44..]);
    }

    #[test]
    fn what_is_no_wav_is_refused() {
        livekit_pcm(&b"hello"[..]).expect_err("refused");
    }
}
