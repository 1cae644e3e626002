//! The segments of a recording as one WAV file that is written nowhere: where each segment lies, and which byte comes from where.
//!
//! Pure: no clock, no I/O. The file has the header of a segment while RIFF's 32-bit sizes suffice; past that it is RF64 (`docs/FACTS.md`,
//! WAV readers), which is the same with 64-bit sizes.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;

use crate::audio::format::PcmFormat;

/// The most PCM that RIFF can declare: 36 bytes behind its own size count too.
const MAX_RIFF_DATA_BYTES: u64 = 0xffff_ffff - 36;

/// A segment as its row and its file tell of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    pub format: PcmFormat,
    pub frames: u64,
    /// From the start of the recording's first segment, by the clock.
    pub after: Duration,
    /// It goes on where a full file ended, with the very next frame, whatever the clock says.
    pub goes_on: bool,
}

/// Where a segment lies in its recording, in frames of its own rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub start: u64,
    pub end: u64,
    /// How much of what is in front of it belongs to no segment.
    pub gap: u64,
}

/// Lays segments on one time line, in their order: each where the clock says, but never before the end of the one before it.
pub fn timeline(segments: &[Taken]) -> Vec<Span> {
    let mut before = None;
    let span = |segment: &Taken| {
        let rate = segment.format.sample_rate;
        let free = before.map_or(0, |(end, its_rate)| in_rate(end, its_rate, rate));
        let by_clock = segment.format.frames(segment.format.bytes_in(segment.after));
        let start = if segment.goes_on { free } else { free.max(by_clock) };
        let end = start.saturating_add(segment.frames);
        before = Some((end, rate));
        Span { start, end, gap: start - free }
    };
    segments.iter().map(span).collect()
}

/// The first frame of one rate that is not before a frame of another.
fn in_rate(frame: u64, from: u32, to: u32) -> u64 {
    let frame = (u128::from(frame) * u128::from(to)).div_ceil(u128::from(from));
    u64::try_from(frame).unwrap_or(u64::MAX)
}

/// Where bytes of the joined file come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Header(Bytes),
    /// PCM of a segment; `offset` counts from its first sample.
    Segment {
        index: usize,
        offset: u64,
        bytes: u64,
    },
    /// A gap between segments: so many zeros.
    Silence {
        bytes: u64,
    },
}

impl Source {
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Header(header) => u64::try_from(header.len()).unwrap_or(u64::MAX),
            Self::Segment { bytes, .. } | Self::Silence { bytes } => *bytes,
        }
    }
}

/// The layout of the joined file.
#[derive(Debug, Clone)]
pub struct Joined {
    format: PcmFormat,
    spans: Vec<Span>,
    header: Bytes,
    data_bytes: u64,
}

impl Joined {
    /// Contract: the spans are those of [`timeline`] for segments of this one format.
    pub fn new(format: PcmFormat, spans: Vec<Span>) -> Self {
        let frames = spans.last().map_or(0, |span| span.end);
        let data_bytes = frames.saturating_mul(format.frame_bytes());
        Self { format, spans, header: header(format, data_bytes), data_bytes }
    }

    /// The size of the file.
    pub fn total_bytes(&self) -> u64 {
        self.header_bytes().saturating_add(self.data_bytes)
    }

    /// Whether RIFF's sizes do not suffice.
    pub fn is_rf64(&self) -> bool {
        self.data_bytes > MAX_RIFF_DATA_BYTES
    }

    /// Where the first bytes of a range come from, as many as have one source; `None` for an empty range and behind the end.
    pub fn source(&self, range: Range<u64>) -> Option<Source> {
        let end = range.end.min(self.total_bytes());
        let bytes = end.checked_sub(range.start).filter(|bytes| *bytes > 0)?;
        let Some(position) = range.start.checked_sub(self.header_bytes()) else {
            let start = usize::try_from(range.start).unwrap_or(usize::MAX);
            let end = usize::try_from(end).unwrap_or(usize::MAX).min(self.header.len());
            return Some(Source::Header(self.header.slice(start..end)));
        };
        let frame_bytes = self.format.frame_bytes();
        let index = self.spans.partition_point(|span| span.end.saturating_mul(frame_bytes) <= position);
        let span = self.spans.get(index)?;
        let (start, end) = (span.start.saturating_mul(frame_bytes), span.end.saturating_mul(frame_bytes));
        Some(match position.checked_sub(start) {
            Some(offset) => Source::Segment { index, offset, bytes: bytes.min(end - position) },
            None => Source::Silence { bytes: bytes.min(start - position) },
        })
    }

    fn header_bytes(&self) -> u64 {
        u64::try_from(self.header.len()).unwrap_or(u64::MAX)
    }
}

/// The header of RIFF in 44 bytes, or of RF64 in 80, where the 32-bit sizes are all ones and those of `ds64` count.
fn header(format: PcmFormat, data_bytes: u64) -> Bytes {
    let mut header = Vec::with_capacity(80);
    let data_size = if data_bytes > MAX_RIFF_DATA_BYTES {
        header.extend(b"RF64");
        header.extend(u32::MAX.to_le_bytes());
        header.extend(b"WAVEds64");
        header.extend(28u32.to_le_bytes());
        header.extend((data_bytes + 72).to_le_bytes());
        header.extend(data_bytes.to_le_bytes());
        header.extend(format.frames(data_bytes).to_le_bytes());
        // The table of further large chunks is empty.
        header.extend(0u32.to_le_bytes());
        u32::MAX
    } else {
        let data_size = u32::try_from(data_bytes).expect("bounded by MAX_RIFF_DATA_BYTES");
        header.extend(b"RIFF");
        header.extend((data_size + 36).to_le_bytes());
        header.extend(b"WAVE");
        data_size
    };
    header.extend(b"fmt ");
    header.extend(16u32.to_le_bytes());
    header.extend(1u16.to_le_bytes());
    header.extend(format.channels.to_le_bytes());
    header.extend(format.sample_rate.to_le_bytes());
    header.extend(u32::try_from(format.byte_rate()).expect("192 kHz stereo is below 2^32").to_le_bytes());
    header.extend(u16::try_from(format.frame_bytes()).expect("a frame is 2 or 4 bytes").to_le_bytes());
    header.extend(16u16.to_le_bytes());
    header.extend(b"data");
    header.extend(data_size.to_le_bytes());
    header.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::recording::wav_header;

    const MONO: PcmFormat = PcmFormat { sample_rate: 8_000, channels: 1 };

    fn taken(frames: u64, after_ms: u64, goes_on: bool) -> Taken {
        Taken { format: MONO, frames, after: Duration::from_millis(after_ms), goes_on }
    }

    fn sources(joined: &Joined, range: Range<u64>) -> Vec<Source> {
        let mut position = range.start;
        let next = || {
            let source = joined.source(position..range.end)?;
            position += source.bytes();
            Some(source)
        };
        std::iter::from_fn(next).collect()
    }

    /// The PCM of a segment: no zero, so that silence shows.
    fn pcm(index: usize, bytes: u64) -> Vec<u8> {
        (0..bytes).map(|at| (at * 7 + index as u64 * 31) as u8 | 1).collect()
    }

    /// The bytes of a range as its sources say.
    fn gathered(joined: &Joined, segments: &[Vec<u8>], range: Range<u64>) -> Vec<u8> {
        let bytes = |source| match source {
            Source::Header(header) => header.to_vec(),
            Source::Segment { index, offset, bytes } => segments[index][offset as usize..][..bytes as usize].to_vec(),
            Source::Silence { bytes } => vec![0; bytes as usize],
        };
        sources(joined, range).into_iter().flat_map(bytes).collect()
    }

    #[test]
    fn segments_lie_where_the_clock_says_but_never_on_each_other() {
        let cases = [
            ("nothing", vec![], vec![]),
            ("one", vec![taken(80, 0, false)], vec![(0, 80, 0)]),
            ("a gap of 10 ms", vec![taken(80, 0, false), taken(8, 20, false)], vec![(0, 80, 0), (160, 168, 80)]),
            ("one right behind the other", vec![taken(80, 0, false), taken(8, 10, false)], vec![(0, 80, 0), (80, 88, 0)]),
            ("an overlap is laid behind", vec![taken(80, 0, false), taken(8, 3, false)], vec![(0, 80, 0), (80, 88, 0)]),
            ("a full file goes on, the clock is late", vec![taken(80, 0, false), taken(8, 13, true)], vec![(0, 80, 0), (80, 88, 0)]),
            (
                "and what follows goes by the clock",
                vec![taken(80, 0, false), taken(8, 13, true), taken(8, 21, false)],
                vec![(0, 80, 0), (80, 88, 0), (168, 176, 80)],
            ),
            ("an empty one", vec![taken(80, 0, false), taken(0, 20, false), taken(8, 20, false)], vec![(0, 80, 0), (160, 160, 80), (160, 168, 0)]),
        ];
        for (name, segments, expected) in cases {
            let spans: Vec<_> = timeline(&segments).into_iter().map(|span| (span.start, span.end, span.gap)).collect();
            assert_eq!(spans, expected, "{name}");
        }
    }

    #[test]
    fn segments_of_different_rates_lie_on_one_time_line() {
        let wide = PcmFormat { sample_rate: 44_100, channels: 2 };
        let second = Taken { format: wide, frames: 441, after: Duration::from_millis(1_500), goes_on: false };
        let behind = Taken { goes_on: true, ..second };
        let spans = timeline(&[taken(8_001, 0, false), second]);
        assert_eq!((spans[1].start, spans[1].end), (66_150, 66_591));
        // 44,105.5 of its frames are taken: the half one too.
        assert_eq!(timeline(&[taken(8_001, 0, false), behind])[1], Span { start: 44_106, end: 44_547, gap: 0 });
        assert_eq!(spans[1].gap, 66_150 - 44_106);
    }

    #[test]
    fn a_small_joined_file_has_the_header_of_a_segment() {
        for data_bytes in [0, 4, 192_000, wav_header::MAX_DATA_BYTES / 4 * 4] {
            assert_eq!(header(PcmFormat::LIVEKIT, data_bytes), wav_header::encode(PcmFormat::LIVEKIT, data_bytes)[..], "{data_bytes}");
        }
    }

    #[test]
    fn what_riff_cannot_declare_is_rf64() {
        let most = MAX_RIFF_DATA_BYTES / 4;
        let joined = |frames| Joined::new(PcmFormat::LIVEKIT, vec![Span { start: 0, end: frames, gap: 0 }]);
        let (riff, rf64) = (joined(most), joined(most + 1));
        assert_eq!((riff.is_rf64(), riff.total_bytes()), (false, 44 + 4 * most));
        assert_eq!((&riff.header[..4], &riff.header[4..8]), (&b"RIFF"[..], &u32::try_from(36 + 4 * most).expect("32 bits").to_le_bytes()[..]));
        let bytes = 4 * (most + 1);
        assert_eq!((rf64.is_rf64(), rf64.total_bytes(), rf64.header.len()), (true, 80 + bytes, 80));
        let fields: [(usize, &[u8]); 12] = [
            (0, b"RF64"),
            (4, &[0xff; 4]),
            (8, b"WAVEds64"),
            (16, &28u32.to_le_bytes()),
            (20, &(rf64.total_bytes() - 8).to_le_bytes()),
            (28, &bytes.to_le_bytes()),
            (36, &(most + 1).to_le_bytes()),
            (44, &[0; 4]),
            (48, b"fmt "),
            (52, &wav_header::encode(PcmFormat::LIVEKIT, 0)[16..36]),
            (72, b"data"),
            (76, &[0xff; 4]),
        ];
        for (start, expected) in fields {
            assert_eq!(&rf64.header[start..start + expected.len()], expected, "at {start}");
        }
    }

    #[test]
    fn the_bytes_past_four_gibibytes_are_found() {
        let hours = |hours: u64| Duration::from_secs(3_600 * hours);
        let livekit = |after| Taken { format: PcmFormat::LIVEKIT, frames: 48_000, after, goes_on: false };
        let joined = Joined::new(PcmFormat::LIVEKIT, timeline(&[livekit(hours(0)), livekit(hours(7)), livekit(hours(1_000_000))]));
        assert!(joined.is_rf64());
        let at = |hours: u64| 80 + 192_000 * 3_600 * hours;
        let expected = [
            Source::Silence { bytes: 10 },
            Source::Segment { index: 1, offset: 0, bytes: 192_000 },
            Source::Silence { bytes: at(1_000_000) - at(7) - 192_000 },
            Source::Segment { index: 2, offset: 0, bytes: 192_000 },
        ];
        assert_eq!(sources(&joined, at(7) - 10..u64::MAX), expected);
        assert_eq!(joined.source(joined.total_bytes()..u64::MAX), None);
    }

    proptest! {
        #[test]
        fn any_range_is_that_slice_of_the_file_built_naively(
            shapes in proptest::collection::vec((0u64..40, 0u64..12, any::<bool>()), 1..8),
            channels in 1u16..=2,
            cuts in proptest::collection::vec(0u64..2_000, 2..6),
        ) {
            let format = PcmFormat { channels, ..MONO };
            let mut after = 0;
            let taken: Vec<Taken> = shapes.iter().enumerate().map(|(index, &(frames, step, goes_on))| {
                after += if index == 0 { 0 } else { step };
                Taken { format, frames, after: Duration::from_millis(after), goes_on }
            }).collect();
            let spans = timeline(&taken);
            let segments: Vec<Vec<u8>> = taken.iter().enumerate().map(|(index, taken)| pcm(index, taken.frames * format.frame_bytes())).collect();
            let mut naive = Vec::new();
            for (span, segment) in spans.iter().zip(&segments) {
                naive.resize((span.start * format.frame_bytes()) as usize, 0);
                naive.extend(segment);
            }
            let whole = [&wav_header::encode(format, naive.len() as u64)[..], &naive[..]].concat();
            let joined = Joined::new(format, spans);
            let total = joined.total_bytes();
            prop_assert_eq!(total, whole.len() as u64);

            let mut cuts: Vec<u64> = cuts.into_iter().map(|cut| cut.min(total)).chain([0, total]).collect();
            cuts.sort_unstable();
            let mut concatenated = Vec::new();
            for cut in cuts.windows(2) {
                let part = gathered(&joined, &segments, cut[0]..cut[1]);
                prop_assert_eq!(&part[..], &whole[cut[0] as usize..cut[1] as usize]);
                concatenated.extend(part);
            }
            prop_assert_eq!(concatenated, whole);
        }
    }
}
