//! The shape of s16le PCM, and the conversions between bytes, frames and time.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Bytes of one sample: every stream here is signed 16-bit little-endian.
pub const SAMPLE_BYTES: u64 = 2;

/// Signed 16-bit little-endian interleaved PCM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PcmFormat {
    /// Frames per second, 8,000 to 192,000.
    pub sample_rate: u32,
    /// Samples per frame, 1 or 2.
    pub channels: u16,
}

impl PcmFormat {
    /// What LiveKit's track egress sends, whatever was published (livekit/egress v1.14.1, `pkg/pipeline/builder/audio.go`).
    pub const LIVEKIT: Self = Self { sample_rate: 48_000, channels: 2 };

    /// Of a file that holds no PCM, but video.
    pub const NONE: Self = Self { sample_rate: 0, channels: 0 };

    /// Bytes of one frame, 2 or 4.
    pub fn frame_bytes(self) -> u64 {
        SAMPLE_BYTES * u64::from(self.channels)
    }

    /// Bytes per second of audio.
    pub fn byte_rate(self) -> u64 {
        u64::from(self.sample_rate) * self.frame_bytes()
    }

    /// The whole frames in `bytes`.
    pub fn frames(self, bytes: u64) -> u64 {
        bytes.checked_div(self.frame_bytes()).unwrap_or(0)
    }

    /// The bytes of the whole frames that fit in `span`.
    pub fn bytes_in(self, span: Duration) -> u64 {
        let frames = span.as_nanos() * u128::from(self.sample_rate) / 1_000_000_000;
        u64::try_from(frames).unwrap_or(u64::MAX / 4).saturating_mul(self.frame_bytes())
    }

    /// How long `bytes` play, rounded down to whole frames.
    pub fn duration(self, bytes: u64) -> Duration {
        self.duration_of_frames(self.frames(bytes))
    }

    pub fn duration_of_frames(self, frames: u64) -> Duration {
        let nanos = u128::from(frames) * 1_000_000_000 / u128::from(self.sample_rate);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// The position of a frame in milliseconds, rounded down.
    pub fn frame_ms(self, frame: u64) -> u64 {
        frame.saturating_mul(1000) / u64::from(self.sample_rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn livekit_sends_192_kilobytes_a_second_in_1920_byte_frames() {
        assert_eq!(PcmFormat::LIVEKIT.byte_rate(), 192_000);
        assert_eq!(PcmFormat::LIVEKIT.bytes_in(Duration::from_millis(10)), 1_920);
    }

    #[test]
    fn a_torn_frame_counts_for_nothing() {
        let format = PcmFormat::LIVEKIT;
        assert_eq!(format.frames(7), 1);
        assert_eq!(format.duration(192_003), Duration::from_secs(1));
    }

    #[test]
    fn odd_rates_lose_no_frame() {
        let format = PcmFormat { sample_rate: 44_100, channels: 1 };
        assert_eq!(format.bytes_in(Duration::from_millis(10)), 882);
        assert_eq!(format.frame_ms(44_100 * 3600), 3_600_000);
    }
}
