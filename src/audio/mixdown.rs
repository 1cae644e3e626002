//! Makes one channel of two.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes of a frame of two 16-bit samples.
const FRAME_BYTES: usize = 4;

/// What a recording's channels are made into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Mix {
    /// One channel, the mean of two.
    Mono,
}

impl Mix {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mono => "mono",
        }
    }
}

/// A word that names no [`Mix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("mix must be mono")]
pub struct UnknownMix;

impl FromStr for Mix {
    type Err = UnknownMix;

    fn from_str(text: &str) -> Result<Self, UnknownMix> {
        if text == Self::Mono.as_str() { Ok(Self::Mono) } else { Err(UnknownMix) }
    }
}

/// Mixes a stream of interleaved stereo that is cut anywhere.
#[derive(Debug, Default)]
pub struct Mixdown {
    /// The start of a frame whose rest has not come: 3 bytes at most.
    torn: Vec<u8>,
}

impl Mixdown {
    /// The mono samples of the frames that are whole by now.
    pub fn push(&mut self, stereo: &[u8]) -> Vec<u8> {
        let missing = (FRAME_BYTES - self.torn.len()) % FRAME_BYTES;
        let (end_of_torn, others) = stereo.split_at(missing.min(stereo.len()));
        self.torn.extend_from_slice(end_of_torn);
        let (first, still_torn) = self.torn.as_chunks();
        let (frames, rest) = others.as_chunks();
        let mono = first.iter().chain(frames).flat_map(|frame| mean(*frame)).collect();
        if still_torn.is_empty() {
            self.torn.clear();
        }
        self.torn.extend_from_slice(rest);
        mono
    }

    /// Bytes of a frame whose rest has not come.
    pub fn torn_bytes(&self) -> usize {
        self.torn.len()
    }
}

/// The mean of left and right, rounded towards zero: exact where they are equal, and never out of range.
fn mean([left_low, left_high, right_low, right_high]: [u8; FRAME_BYTES]) -> [u8; 2] {
    let (left, right) = (i16::from_le_bytes([left_low, left_high]), i16::from_le_bytes([right_low, right_high]));
    left.midpoint(right).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn interleaved(frames: &[(i16, i16)]) -> Vec<u8> {
        frames.iter().flat_map(|(left, right)| [left.to_le_bytes(), right.to_le_bytes()].concat()).collect()
    }

    #[test]
    fn a_frame_becomes_its_mean_also_at_the_extremes() {
        let table = [
            ((0, 0), 0),
            ((100, 200), 150),
            ((100, -100), 0),
            ((1, 0), 0),
            ((-1, 0), 0),
            ((3, 4), 3),
            ((-3, -4), -3),
            ((i16::MAX, i16::MAX), i16::MAX),
            ((i16::MIN, i16::MIN), i16::MIN),
            ((i16::MAX, i16::MAX - 1), i16::MAX - 1),
            ((i16::MIN, i16::MIN + 1), i16::MIN + 1),
            ((i16::MAX, i16::MIN), 0),
        ];
        for (frame, mean) in table {
            assert_eq!(Mixdown::default().push(&interleaved(&[frame])), i16::to_le_bytes(mean), "{frame:?}");
        }
    }

    #[test]
    fn equal_channels_give_every_sample_exactly() {
        let samples: Vec<i16> = (i16::MIN..=i16::MAX).collect();
        let frames: Vec<(i16, i16)> = samples.iter().map(|sample| (*sample, *sample)).collect();
        let mono: Vec<u8> = samples.iter().flat_map(|sample| sample.to_le_bytes()).collect();
        assert!(Mixdown::default().push(&interleaved(&frames)) == mono);
    }

    #[test]
    fn a_torn_frame_waits_for_its_rest() {
        let mut mixdown = Mixdown::default();
        let stereo = interleaved(&[(10, 20)]);
        for (byte, torn) in stereo[..3].iter().zip(1..) {
            assert_eq!((mixdown.push(&[*byte]), mixdown.torn_bytes()), (vec![], torn));
        }
        assert_eq!((mixdown.push(&[]), mixdown.torn_bytes()), (vec![], 3));
        assert_eq!((mixdown.push(&stereo[3..]), mixdown.torn_bytes()), (vec![15, 0], 0));
    }

    #[test]
    fn mono_is_the_only_word() {
        assert_eq!("mono".parse(), Ok(Mix::Mono));
        assert_eq!(serde_json::to_string(&Mix::Mono).expect("plain data"), r#""mono""#);
        for other in ["", "Mono", "stereo", "mono "] {
            assert_eq!(other.parse::<Mix>(), Err(UnknownMix), "{other:?}");
        }
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_samples(frames: Vec<(i16, i16)>, tail in 0..FRAME_BYTES, cuts in prop::collection::vec(0..9_usize, 1..50)) {
            let mut stereo = interleaved(&frames);
            stereo.extend(std::iter::repeat_n(7, tail));
            let expected: Vec<u8> = frames
                .iter()
                .flat_map(|(left, right)| ((i32::from(*left) + i32::from(*right)) / 2).to_le_bytes()[..2].to_vec())
                .collect();
            let (mut mixdown, mut mono, mut rest) = (Mixdown::default(), Vec::new(), &stereo[..]);
            for cut in cuts {
                let (chunk, others) = rest.split_at(cut.min(rest.len()));
                mono.extend(mixdown.push(chunk));
                rest = others;
            }
            mono.extend(mixdown.push(rest));
            prop_assert_eq!((mono, mixdown.torn_bytes()), (expected, tail));
        }
    }
}
