//! The messages of a connection, as pictures.
//!
//! H.264 is taken as it comes, message by message. A message of VP8 or VP9 is a picture, unless the stream begins as IVF does: then it is IVF,
//! cut anywhere. What does not look as declared is recorded all the same, and said.

use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::{DateTime, Utc};

use super::ivf::{IvfFormat, SIGNATURE, Unframer, Unreadable};
use crate::video::annex_b::{self, PictureCounter};
use crate::video::codec::{Container, VideoCodec};
use crate::video::key_frame::{Dimensions, Sight};

/// When something came: for spans, and for names.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    pub at: Instant,
    pub wall: DateTime<Utc>,
}

/// What is written as one.
#[derive(Debug, Clone)]
pub struct Picture {
    pub data: Bytes,
    /// In ticks of the format.
    pub time: u64,
    /// Of H.264, those that begin in this message; else one.
    pub pictures: u64,
    /// A decoder can start here.
    pub can_start: bool,
    /// Of a key frame of VP8 or VP9.
    pub dimensions: Option<Dimensions>,
    pub arrival: Arrival,
}

/// What a file of the stream is made as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VideoFormat {
    H264,
    Ivf {
        format: IvfFormat,
        /// Times are those of arrival: a file's begin with 0.
        by_arrival: bool,
    },
}

impl VideoFormat {
    pub fn container(&self) -> Container {
        match self {
            Self::H264 => Container::H264,
            Self::Ivf { .. } => Container::Ivf,
        }
    }
}

/// One connection's stream.
#[derive(Debug)]
pub struct VideoStream {
    codec: VideoCodec,
    framing: Framing,
    /// The newest key frame's, for files that begin without one.
    dimensions: Option<Dimensions>,
    first: Option<Instant>,
    last_time: Option<u64>,
    mismatch: Option<String>,
    /// Nothing has been looked at yet.
    fresh: bool,
}

#[derive(Debug)]
enum Framing {
    H264(PictureCounter),
    /// What came so far could be the beginning of IVF: fewer than 4 bytes.
    Undecided(Vec<(Bytes, Arrival)>),
    Messages,
    Ivf(Unframer),
}

impl VideoStream {
    pub fn new(codec: VideoCodec) -> Self {
        let framing = match codec {
            VideoCodec::H264 => Framing::H264(PictureCounter::default()),
            VideoCodec::Vp8 | VideoCodec::Vp9 => Framing::Undecided(Vec::new()),
        };
        Self { codec, framing, dimensions: None, first: None, last_time: None, mismatch: None, fresh: true }
    }

    /// The pictures that a message completes.
    ///
    /// # Errors
    /// When the rest of the stream means nothing.
    pub fn push(&mut self, message: Bytes, arrival: Arrival) -> Result<Vec<Picture>, Unreadable> {
        match &mut self.framing {
            Framing::H264(counter) => {
                let pictures = counter.push(&message);
                let can_start = annex_b::can_start(&message);
                if std::mem::take(&mut self.fresh) && !annex_b::begins_with_start_code(&message) {
                    self.mismatch = Some("declared as h264, but the stream does not begin with a start code of Annex B".to_owned());
                }
                Ok(vec![Picture { data: message, time: 0, pictures, can_start, dimensions: None, arrival }])
            }
            Framing::Undecided(held) => {
                held.push((message, arrival));
                let beginning: Vec<u8> = held.iter().flat_map(|(message, _)| message.iter().copied()).take(SIGNATURE.len()).collect();
                if beginning.len() < SIGNATURE.len() && SIGNATURE.starts_with(&beginning) {
                    return Ok(Vec::new());
                }
                let held = std::mem::take(held);
                self.framing = if beginning == SIGNATURE { Framing::Ivf(Unframer::default()) } else { Framing::Messages };
                let mut pictures = Vec::new();
                for (message, arrival) in held {
                    pictures.extend(self.push(message, arrival)?);
                }
                Ok(pictures)
            }
            Framing::Messages => {
                let time = self.arrival_time(arrival.at);
                let format = IvfFormat::by_arrival(self.codec);
                Ok(vec![self.picture(&format, message, time, arrival)])
            }
            Framing::Ivf(unframer) => {
                let framed = unframer.push(&message)?;
                let Some(format) = unframer.format() else { return Ok(Vec::new()) };
                if std::mem::take(&mut self.fresh) {
                    self.dimensions = format.dimensions;
                    if format.codec() != Some(self.codec) {
                        let fourcc = String::from_utf8_lossy(&format.fourcc).into_owned();
                        self.mismatch = Some(format!("declared as {}, but the stream says {fourcc:?} of itself", self.codec.as_str()));
                    }
                }
                Ok(framed.into_iter().map(|framed| self.picture(&format, framed.data, framed.time, arrival)).collect())
            }
        }
    }

    /// What a file that begins now is made as.
    pub fn format(&self) -> VideoFormat {
        match &self.framing {
            Framing::H264(_) => VideoFormat::H264,
            Framing::Undecided(_) | Framing::Messages => {
                VideoFormat::Ivf { format: IvfFormat { dimensions: self.dimensions, ..IvfFormat::by_arrival(self.codec) }, by_arrival: true }
            }
            Framing::Ivf(unframer) => {
                let format = unframer.format().unwrap_or_else(|| IvfFormat::by_arrival(self.codec));
                VideoFormat::Ivf { format: IvfFormat { dimensions: self.dimensions, ..format }, by_arrival: false }
            }
        }
    }

    /// What does not fit the declaration; said once.
    pub fn take_mismatch(&mut self) -> Option<String> {
        self.mismatch.take()
    }

    /// Bytes that never became a picture.
    pub fn torn_bytes(&self) -> usize {
        match &self.framing {
            Framing::H264(_) | Framing::Messages => 0,
            Framing::Undecided(held) => held.iter().map(|(message, _)| message.len()).sum(),
            Framing::Ivf(unframer) => unframer.torn_bytes(),
        }
    }

    fn picture(&mut self, format: &IvfFormat, data: Bytes, time: u64, arrival: Arrival) -> Picture {
        let sight = format.look(&data);
        if std::mem::take(&mut self.fresh) && sight == Sight::Foreign {
            self.mismatch = Some(format!("declared as {}, but the first message is no picture of it", self.codec.as_str()));
        }
        let dimensions = match sight {
            Sight::Key(dimensions) => Some(dimensions),
            Sight::Delta | Sight::Foreign => None,
        };
        self.dimensions = dimensions.or(self.dimensions);
        Picture { data, time, pictures: 1, can_start: dimensions.is_some(), dimensions, arrival }
    }

    /// Milliseconds since the first picture, each later than the one before: players want no two at once.
    fn arrival_time(&mut self, at: Instant) -> u64 {
        let since: Duration = at.saturating_duration_since(*self.first.get_or_insert(at));
        let arrived = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let time = self.last_time.map_or(arrived, |last| arrived.max(last + 1));
        self.last_time = Some(time);
        time
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::recording::ivf::{encode_frame_header, encode_header};

    const KEY: [u8; 12] = [0x10, 0x02, 0x00, 0x9d, 0x01, 0x2a, 0x40, 0x01, 0xf0, 0x00, 0, 0];
    const DELTA: [u8; 4] = [0x11, 0, 0, 0];

    fn arrivals() -> impl Iterator<Item = Arrival> {
        let (start, wall) = (Instant::now(), Utc::now());
        (0..).map(move |index| Arrival { at: start + Duration::from_millis(index / 3 * 40), wall })
    }

    fn pushed(stream: &mut VideoStream, messages: &[&[u8]]) -> Vec<Picture> {
        let messages = messages.iter().zip(arrivals());
        messages.flat_map(|(message, arrival)| stream.push(Bytes::copy_from_slice(message), arrival).expect("readable")).collect()
    }

    fn ivf(pictures: &[&[u8]]) -> Vec<u8> {
        let format = IvfFormat { dimensions: Some(Dimensions { width: 320, height: 240 }), ticks: 30, ..IvfFormat::by_arrival(VideoCodec::Vp8) };
        let pictures = pictures.iter().enumerate();
        let framed = pictures.flat_map(|(time, picture)| [&encode_frame_header(picture.len(), time as u64)[..], *picture].concat());
        encode_header(&format, 0).into_iter().chain(framed).collect()
    }

    #[test]
    fn a_message_is_a_picture_with_the_time_of_its_arrival() {
        let mut stream = VideoStream::new(VideoCodec::Vp8);
        let pictures = pushed(&mut stream, &[&DELTA, &KEY, &DELTA, &DELTA]);
        assert_eq!(pictures.iter().map(|picture| picture.time).collect::<Vec<_>>(), [0, 1, 2, 40], "three came at once");
        assert_eq!(pictures.iter().map(|picture| picture.can_start).collect::<Vec<_>>(), [false, true, false, false]);
        let VideoFormat::Ivf { format, by_arrival: true } = stream.format() else { panic!("{:?}", stream.format()) };
        assert_eq!((format.ticks, format.dimensions), (1_000, Some(Dimensions { width: 320, height: 240 })));
        assert_eq!(stream.take_mismatch(), None);
    }

    #[test]
    fn what_could_become_ivf_is_held_until_that_is_known() {
        let mut stream = VideoStream::new(VideoCodec::Vp8);
        let pictures = pushed(&mut stream, &[b"D", b"K", b"I", &DELTA]);
        assert_eq!(pictures.iter().map(|picture| picture.data.len()).collect::<Vec<_>>(), [1, 1, 1, 4], "it was not");
        let mut stream = VideoStream::new(VideoCodec::Vp8);
        assert!(pushed(&mut stream, &[b"DKI"]).is_empty());
        assert_eq!(stream.torn_bytes(), 3);
    }

    #[test]
    fn an_ivf_stream_keeps_its_own_times_at_every_cut() {
        let whole = ivf(&[&KEY, &DELTA, &DELTA]);
        for cut in 0..=whole.len() {
            let mut stream = VideoStream::new(VideoCodec::Vp8);
            let (front, back) = whole.split_at(cut);
            let messages: Vec<&[u8]> = [front, back].into_iter().filter(|part| !part.is_empty()).collect();
            let pictures = pushed(&mut stream, &messages);
            assert_eq!(pictures.iter().map(|picture| picture.time).collect::<Vec<_>>(), [0, 1, 2], "cut at {cut}");
            assert_eq!(pictures[0].data[..], KEY, "cut at {cut}");
            let VideoFormat::Ivf { format, by_arrival: false } = stream.format() else { panic!("{:?}", stream.format()) };
            assert_eq!((format.ticks, stream.torn_bytes(), stream.take_mismatch()), (30, 0, None));
        }
    }

    #[test]
    fn what_is_not_as_declared_is_taken_and_said() {
        let annex_b = [0, 0, 0, 1, 0x67, 0x42, 0, 0x1e, 0, 0, 1, 0x65, 0x88];
        let cases: [(VideoCodec, &[u8], Option<&str>); 6] = [
            (VideoCodec::Vp8, &annex_b, Some("declared as vp8, but the first message is no picture of it")),
            (VideoCodec::Vp9, &KEY, Some("declared as vp9, but the first message is no picture of it")),
            (VideoCodec::Vp9, &ivf(&[&KEY]), Some("declared as vp9, but the stream says \"VP80\" of itself")),
            (VideoCodec::H264, &KEY, Some("declared as h264, but the stream does not begin with a start code of Annex B")),
            (VideoCodec::H264, &annex_b, None),
            (VideoCodec::Vp8, &DELTA, None),
        ];
        for (codec, message, mismatch) in cases {
            let mut stream = VideoStream::new(codec);
            assert_eq!(pushed(&mut stream, &[message]).len(), 1, "{codec:?} {message:?}");
            assert_eq!(stream.take_mismatch().as_deref(), mismatch, "{codec:?} {message:?}");
            assert_eq!(stream.take_mismatch(), None);
        }
    }

    proptest! {
        #[test]
        fn any_messages_are_taken_without_harm(messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..60), 0..8)) {
            for codec in [VideoCodec::H264, VideoCodec::Vp8, VideoCodec::Vp9] {
                let mut stream = VideoStream::new(codec);
                for (message, arrival) in messages.iter().zip(arrivals()) {
                    if stream.push(message.clone().into(), arrival).is_err() {
                        break;
                    }
                }
            }
        }
    }
}
