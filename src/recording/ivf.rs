//! IVF: a header of 32 bytes, then every picture behind 12 bytes with its length and time (`docs/FACTS.md`, video).

use std::io;

use bytes::{Buf, Bytes, BytesMut};

use crate::video::codec::VideoCodec;
use crate::video::key_frame::{self, Dimensions, Sight};

/// Bytes in front of the first picture's own header.
pub const HEADER_BYTES: u64 = 32;
/// Bytes in front of each picture.
pub const FRAME_HEADER_BYTES: u64 = 12;
/// What such a stream begins with.
pub const SIGNATURE: [u8; 4] = *b"DKIF";
/// The longest picture that is taken from a stream: as long as the longest message.
pub const MAX_PICTURE_BYTES: usize = 2 << 20;

const HEADER_LENGTH: u16 = 32;
const VP8: [u8; 4] = *b"VP80";
const VP9: [u8; 4] = *b"VP90";

/// What the header says, but for the count of pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IvfFormat {
    pub fourcc: [u8; 4],
    /// Absent until a key frame tells; zeros in the file.
    pub dimensions: Option<Dimensions>,
    /// A tick of a picture's time is `seconds / ticks`.
    pub ticks: u32,
    pub seconds: u32,
}

impl IvfFormat {
    /// Of pictures whose time is that of their arrival, in milliseconds.
    pub fn by_arrival(codec: VideoCodec) -> Self {
        let fourcc = match codec {
            VideoCodec::Vp8 | VideoCodec::H264 => VP8,
            VideoCodec::Vp9 => VP9,
        };
        Self { fourcc, dimensions: None, ticks: 1_000, seconds: 1 }
    }

    /// Looks at a picture of this stream. One of a codec that is not known here tells nothing.
    pub fn look(&self, picture: &[u8]) -> Sight {
        match self.fourcc {
            VP8 => key_frame::vp8(picture),
            VP9 => key_frame::vp9(picture),
            _ => Sight::Delta,
        }
    }

    /// What the stream holds by its own word.
    pub fn codec(&self) -> Option<VideoCodec> {
        match self.fourcc {
            VP8 => Some(VideoCodec::Vp8),
            VP9 => Some(VideoCodec::Vp9),
            _ => None,
        }
    }
}

/// The header of a file with so many pictures.
pub fn encode_header(format: &IvfFormat, pictures: u64) -> [u8; 32] {
    let short = |pixels: fn(Dimensions) -> u32| format.dimensions.map_or(0, |dimensions| u16::try_from(pixels(dimensions)).unwrap_or(u16::MAX));
    let mut header = [0; 32];
    let fields: [(usize, &[u8]); 9] = [
        (0, &SIGNATURE),
        (4, &0u16.to_le_bytes()),
        (6, &HEADER_LENGTH.to_le_bytes()),
        (8, &format.fourcc),
        (12, &short(|dimensions| dimensions.width).to_le_bytes()),
        (14, &short(|dimensions| dimensions.height).to_le_bytes()),
        (16, &format.ticks.to_le_bytes()),
        (20, &format.seconds.to_le_bytes()),
        (24, &u32::try_from(pictures).unwrap_or(u32::MAX).to_le_bytes()),
    ];
    for (start, bytes) in fields {
        for (slot, byte) in header.iter_mut().skip(start).zip(bytes) {
            *slot = *byte;
        }
    }
    header
}

/// A header as it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub format: IvfFormat,
    pub pictures: u32,
    /// Where the first picture's header lies.
    pub length: u16,
}

/// `None` for what is no IVF header.
pub fn decode_header(header: &[u8; 32]) -> Option<Header> {
    let mut rest = header.get(4..)?;
    let (version, length) = (rest.get_u16_le(), rest.get_u16_le());
    let mut fourcc = [0; 4];
    rest.copy_to_slice(&mut fourcc);
    let (width, height) = (u32::from(rest.get_u16_le()), u32::from(rest.get_u16_le()));
    let (ticks, seconds, pictures) = (rest.get_u32_le(), rest.get_u32_le(), rest.get_u32_le());
    let dimensions = (width > 0 && height > 0).then_some(Dimensions { width, height });
    let sane = header.starts_with(&SIGNATURE) && version == 0 && length >= HEADER_LENGTH && ticks > 0 && seconds > 0;
    sane.then_some(Header { format: IvfFormat { fourcc, dimensions, ticks, seconds }, pictures, length })
}

/// What stands in front of a picture.
pub fn encode_frame_header(bytes: usize, time: u64) -> [u8; 12] {
    let mut header = [0; 12];
    let length = u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes();
    for (slot, byte) in header.iter_mut().zip(length.into_iter().chain(time.to_le_bytes())) {
        *slot = byte;
    }
    header
}

fn decode_frame_header(header: &[u8; 12]) -> (u32, u64) {
    let mut rest = &header[..];
    (rest.get_u32_le(), rest.get_u64_le())
}

/// A picture of a stream that is IVF already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Framed {
    pub data: Bytes,
    /// In ticks of the stream.
    pub time: u64,
}

/// Why a stream cannot be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error("its IVF header is none")]
    Header,
    #[error("it announces a picture of more than {MAX_PICTURE_BYTES} bytes")]
    PictureTooBig,
}

/// Takes the pictures out of an IVF stream that is cut anywhere.
#[derive(Debug, Default)]
pub struct Unframer {
    waiting: BytesMut,
    /// Bytes of a long header that are to be passed over.
    to_skip: usize,
    format: Option<IvfFormat>,
}

impl Unframer {
    /// # Errors
    /// When the rest of the stream means nothing.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Framed>, Unreadable> {
        self.waiting.extend_from_slice(bytes);
        if self.format.is_none() {
            let Some(header) = self.waiting.first_chunk() else { return Ok(Vec::new()) };
            let header = decode_header(header).ok_or(Unreadable::Header)?;
            self.format = Some(header.format);
            self.to_skip = header.length.into();
        }
        let mut pictures = Vec::new();
        loop {
            let passed = self.to_skip.min(self.waiting.len());
            self.waiting.advance(passed);
            self.to_skip -= passed;
            let Some(header) = self.waiting.first_chunk().filter(|_| self.to_skip == 0) else { return Ok(pictures) };
            let (length, time) = decode_frame_header(header);
            let length = usize::try_from(length).ok().filter(|length| *length <= MAX_PICTURE_BYTES).ok_or(Unreadable::PictureTooBig)?;
            let Some(data) = self.waiting.get(header.len()..header.len() + length) else { return Ok(pictures) };
            // A copy of its own: a picture that waits for the disk holds no more memory than it has bytes.
            pictures.push(Framed { data: Bytes::copy_from_slice(data), time });
            self.waiting.advance(header.len() + length);
        }
    }

    /// What the stream says of itself, once its header has come.
    pub fn format(&self) -> Option<IvfFormat> {
        self.format
    }

    /// Bytes of a picture whose rest has not come.
    pub fn torn_bytes(&self) -> usize {
        self.waiting.len()
    }
}

/// How far a file can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Walked {
    /// Where the last whole picture ends.
    pub bytes: u64,
    pub pictures: u64,
    /// With the dimensions of the first key frame, where the header has none.
    pub format: IvfFormat,
}

/// The start of a picture that is looked at: both codecs say their size within it.
const LOOKED_AT: usize = 32;
/// What is read at once of a run of zeros.
const ZEROS_AT_ONCE: usize = 64 << 10;

/// Goes from picture to picture through a file of `length` bytes, which `read` fills buffers from.
///
/// Zeros that reach the end of the file are none: a power cut leaves them where a file had grown before its pictures reached the disk. Any other picture of no
/// bytes counts: a message is never one, but a stream that is IVF already may bring them.
///
/// # Errors
/// What `read` says, or [`io::ErrorKind::InvalidData`] for a file that this program did not write.
pub fn walk(length: u64, read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> io::Result<Walked> {
    let foreign = || io::Error::new(io::ErrorKind::InvalidData, "the header is not one of ours");
    if length < HEADER_BYTES {
        return Err(foreign());
    }
    let mut header = [0; 32];
    read(&mut header, 0)?;
    let header = decode_header(&header).filter(|header| header.length == HEADER_LENGTH).ok_or_else(foreign)?;
    let mut walked = Walked { bytes: HEADER_BYTES, pictures: 0, format: header.format };
    let mut zeros_end = 0;
    while walked.bytes + FRAME_HEADER_BYTES <= length {
        let start = walked.bytes + FRAME_HEADER_BYTES;
        let mut frame_header = [0; 12];
        read(&mut frame_header, walked.bytes)?;
        // Each run is read once, however many pictures it could be.
        if frame_header == [0; 12] && zeros_end <= walked.bytes {
            zeros_end = end_of_zeros(start, length, &read)?;
        }
        if zeros_end == length {
            break;
        }
        let bytes = u64::from(decode_frame_header(&frame_header).0);
        if start + bytes > length {
            break;
        }
        if walked.format.dimensions.is_none() {
            let mut picture = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX).min(LOOKED_AT)];
            read(&mut picture, start)?;
            if let Sight::Key(dimensions) = walked.format.look(&picture) {
                walked.format.dimensions = Some(dimensions);
            }
        }
        walked.bytes = start + bytes;
        walked.pictures += 1;
    }
    Ok(walked)
}

/// Where zeros that go on from `at` end.
fn end_of_zeros(mut at: u64, length: u64, read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> io::Result<u64> {
    let mut piece = vec![0; ZEROS_AT_ONCE];
    while at < length {
        let rest = usize::try_from(length - at).unwrap_or(usize::MAX).min(piece.len());
        piece.truncate(rest);
        read(&mut piece, at)?;
        if let Some(zeros) = piece.iter().position(|byte| *byte != 0) {
            return Ok(at + u64::try_from(zeros).unwrap_or(u64::MAX));
        }
        at += u64::try_from(rest).unwrap_or(u64::MAX);
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FORMAT: IvfFormat = IvfFormat { fourcc: VP9, dimensions: Some(Dimensions { width: 640, height: 360 }), ticks: 30, seconds: 1 };

    fn stream(format: &IvfFormat, pictures: &[Vec<u8>]) -> Vec<u8> {
        let mut stream = encode_header(format, 0).to_vec();
        for (time, picture) in pictures.iter().enumerate() {
            stream.extend(encode_frame_header(picture.len(), 3 * time as u64));
            stream.extend(picture);
        }
        stream
    }

    fn walk_bytes(file: &[u8]) -> io::Result<Walked> {
        walk(file.len() as u64, |buffer, at| {
            buffer.copy_from_slice(&file[at as usize..][..buffer.len()]);
            Ok(())
        })
    }

    #[test]
    fn the_header_is_that_of_the_layout() {
        let header = encode_header(&FORMAT, 7);
        assert_eq!(header, *b"DKIF\0\0\x20\0VP90\x80\x02\x68\x01\x1e\0\0\0\x01\0\0\0\x07\0\0\0\0\0\0\0");
        assert_eq!(decode_header(&header), Some(Header { format: FORMAT, pictures: 7, length: 32 }));
        let unknown = IvfFormat { dimensions: None, ..IvfFormat::by_arrival(VideoCodec::Vp8) };
        assert_eq!(decode_header(&encode_header(&unknown, 0)).map(|header| header.format), Some(unknown));
        for (at, byte) in [(0, b'd'), (4, 1), (6, 31), (16, 0), (20, 0)] {
            let mut foreign = header;
            foreign[at] = byte;
            assert_eq!(decode_header(&foreign), None, "byte {at}");
        }
    }

    #[test]
    fn a_stream_of_nonsense_is_not_read_on() {
        assert_eq!(Unframer::default().push(b"DKIF and then something else, for so many bytes"), Err(Unreadable::Header));
        let mut big = encode_header(&FORMAT, 0).to_vec();
        big.extend(encode_frame_header(MAX_PICTURE_BYTES + 1, 0));
        assert_eq!(Unframer::default().push(&big), Err(Unreadable::PictureTooBig));
    }

    #[test]
    fn a_longer_header_is_passed_over() {
        let mut long = stream(&FORMAT, &[vec![1, 2, 3]]);
        long[6] = 40;
        long.splice(32..32, [9; 8]);
        let mut unframer = Unframer::default();
        let pictures: Vec<Framed> = long.chunks(5).flat_map(|part| unframer.push(part).expect("readable")).collect();
        assert_eq!(pictures, [Framed { data: Bytes::from_static(&[1, 2, 3]), time: 0 }]);
    }

    proptest! {
        #[test]
        fn a_stream_that_is_cut_anywhere_has_the_same_pictures(
            pictures in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..6),
            cuts in proptest::collection::vec(0usize..400, 0..12),
        ) {
            let stream = stream(&FORMAT, &pictures);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(stream.len())).chain([0, stream.len()]).collect();
            cuts.sort_unstable();
            let mut unframer = Unframer::default();
            let mut found = Vec::new();
            for cut in cuts.windows(2) {
                found.extend(unframer.push(&stream[cut[0]..cut[1]]).expect("readable"));
            }
            let expected: Vec<Framed> = pictures.iter().enumerate().map(|(time, data)| Framed { data: data.clone().into(), time: 3 * time as u64 }).collect();
            prop_assert_eq!(found, expected);
            prop_assert_eq!((unframer.format(), unframer.torn_bytes()), (Some(FORMAT), 0));
        }

        #[test]
        fn any_bytes_are_unframed_and_walked_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            Unframer::default().push(&[&encode_header(&FORMAT, 0)[..], &bytes].concat()).ok();
            Unframer::default().push(&[&SIGNATURE[..], &bytes].concat()).ok();
            walk_bytes(&[&encode_header(&FORMAT, 0)[..], &bytes].concat()).expect("a file with a header");
            walk_bytes(&bytes).ok();
        }

        #[test]
        fn d4_every_prefix_of_a_file_has_all_of_its_whole_pictures(
            pictures in proptest::collection::vec(proptest::collection::vec(1u8.., 1..60), 0..6),
            cut in 0usize..400,
        ) {
            let file = stream(&FORMAT, &pictures);
            let prefix = &file[..cut.clamp(32, file.len())];
            let mut whole = vec![HEADER_BYTES];
            for picture in &pictures {
                whole.push(whole[whole.len() - 1] + FRAME_HEADER_BYTES + picture.len() as u64);
            }
            let ends: Vec<u64> = whole.into_iter().filter(|end| *end <= prefix.len() as u64).collect();
            let walked = walk_bytes(prefix).expect("it has its header");
            prop_assert_eq!((walked.pictures + 1, walked.bytes), (ends.len() as u64, ends[ends.len() - 1]));
        }
    }

    #[test]
    fn d4_zeros_that_reach_the_end_of_a_file_are_no_pictures() {
        let file = stream(&FORMAT, &[vec![1, 2, 3], vec![4, 5]]);
        for zeros in [1, 11, 12, 13, 24, 4_096, 3 * ZEROS_AT_ONCE + 5] {
            let walked = walk_bytes(&[&file[..], &vec![0; zeros]].concat()).expect("a file");
            assert_eq!((walked.pictures, walked.bytes), (2, file.len() as u64), "{zeros}");
        }
        // The last picture's own end cannot be told from zeros.
        let torn = [&file[..file.len() - 1], &[0; 500]].concat();
        assert_eq!(walk_bytes(&torn).expect("a file").pictures, 2);
    }

    #[test]
    fn pictures_of_no_bytes_count_where_others_follow_or_their_time_is_told() {
        let counted = |pictures: &[Vec<u8>]| walk_bytes(&stream(&FORMAT, pictures)).expect("a file").pictures;
        assert_eq!(counted(&[vec![], vec![1], vec![], vec![2]]), 4);
        assert_eq!(counted(&[vec![1], vec![]]), 2);
        assert_eq!(counted(&[vec![]]), 0, "at no time, with no bytes");
        // Zeros in the middle are read as what they say, once.
        let reads = std::cell::Cell::new(0);
        let file = [stream(&FORMAT, &[vec![1]]), vec![0; 12 * 1_000], stream(&FORMAT, &[vec![2]])[32..].to_vec()].concat();
        let walked = walk(file.len() as u64, |buffer, at| {
            reads.set(reads.get() + buffer.len());
            buffer.copy_from_slice(&file[at as usize..][..buffer.len()]);
            Ok(())
        });
        assert_eq!(walked.expect("a file").pictures, 1_002);
        assert!(reads.get() < 3 * file.len(), "{} of {}", reads.get(), file.len());
    }

    #[test]
    fn the_first_key_frame_tells_the_size_that_the_header_lacks() {
        let key = [0x10, 0x02, 0x00, 0x9d, 0x01, 0x2a, 0x40, 0x01, 0xf0, 0x00, 0, 0].to_vec();
        let unknown = IvfFormat::by_arrival(VideoCodec::Vp8);
        let walked = walk_bytes(&stream(&unknown, &[vec![1, 0, 0], key, vec![1, 0, 0]])).expect("a file");
        assert_eq!(walked.format.dimensions, Some(Dimensions { width: 320, height: 240 }));
        assert_eq!(walk_bytes(&stream(&unknown, &[vec![1, 0, 0]])).expect("a file").format.dimensions, None);
    }
}
