//! What an interrupted file turns out to hold, and what makes it say so.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::invalid;
use crate::audio::format::PcmFormat;
use crate::recording::ivf::{self, FRAME_HEADER_BYTES, MAX_PICTURE_BYTES};
use crate::recording::sidecar::MediaFormat;
use crate::recording::video_file;
use crate::recording::wav_header::{self, HEADER_BYTES};
use crate::video::codec::Container;
use crate::video::key_frame::Dimensions;

/// The whole frames of a file.
pub(super) struct Measured {
    pub format: MediaFormat,
    pub pcm: Option<PcmFormat>,
    pub dimensions: Option<Dimensions>,
    pub frames: u64,
    /// As a sidecar counts them.
    pub bytes: u64,
    /// How long it lasts, where that is known without reading all of it.
    pub length: Option<Duration>,
    /// What the file begins with, and what it should begin with.
    pub header: Option<(Vec<u8>, Vec<u8>)>,
    /// Where a torn frame is cut off.
    pub cut: Option<u64>,
}

impl Measured {
    /// The least that a file holds that is one.
    pub fn least_bytes(container: Container) -> u64 {
        match container {
            Container::Wav => HEADER_BYTES,
            Container::Ivf => ivf::HEADER_BYTES,
            Container::H264 => 1,
        }
    }

    /// Measures the first `length` bytes of a file, which are not fewer than that. `known` is for a WAV file whose header never reached the disk.
    ///
    /// # Errors
    /// What the file system says, or [`io::ErrorKind::InvalidData`] for a file that this program did not write.
    pub fn of(file: &File, length: u64, container: Container, known: Option<PcmFormat>) -> io::Result<Self> {
        match container {
            Container::Wav => Self::of_sound(file, length, known),
            Container::H264 | Container::Ivf => Self::of_video(file, length, container),
        }
    }

    fn of_sound(file: &File, length: u64, known: Option<PcmFormat>) -> io::Result<Self> {
        let mut header = [0; 44];
        file.read_exact_at(&mut header, 0)?;
        let known = known.filter(|_| header == [0; 44]);
        let format = wav_header::format_of(&header).or(known).ok_or_else(|| invalid("the header is not one of ours"))?;
        let data = length.saturating_sub(HEADER_BYTES);
        let frames = format.frames(data.min(wav_header::MAX_DATA_BYTES));
        let bytes = frames * format.frame_bytes();
        Ok(Self {
            format: MediaFormat::Wav,
            pcm: Some(format),
            dimensions: None,
            frames,
            bytes,
            length: Some(format.duration_of_frames(frames)),
            header: Some((header.to_vec(), wav_header::encode(format, bytes).to_vec())),
            // What lies past the longest file that a header can declare is audio too, and stays.
            cut: (data < bytes + format.frame_bytes()).then_some(HEADER_BYTES + bytes),
        })
    }

    fn of_video(file: &File, length: u64, container: Container) -> io::Result<Self> {
        let (video, whole) = video_file::measure(file, container)?;
        let header = whole.map(|whole| {
            let mut header = vec![0; whole.len()];
            file.read_exact_at(&mut header, 0).map(|()| (header, whole.to_vec()))
        });
        // More than a picture behind the last whole one is no torn picture, but something spoilt: it stays.
        let torn = FRAME_HEADER_BYTES + u64::try_from(MAX_PICTURE_BYTES).unwrap_or(u64::MAX);
        Ok(Self {
            format: container.into(),
            pcm: None,
            dimensions: video.dimensions,
            frames: video.pictures,
            bytes: video.bytes,
            length: None,
            header: header.transpose()?,
            cut: (length - video.bytes < torn).then_some(video.bytes),
        })
    }

    /// Cuts a torn frame off, and declares the rest.
    ///
    /// # Errors
    /// What the file system says.
    pub fn mend(&self, file: &File) -> io::Result<()> {
        if let Some(cut) = self.cut {
            file.set_len(cut)?;
        }
        match &self.header {
            Some((is, should)) if is != should => file.write_all_at(should, 0),
            Some(_) | None => Ok(()),
        }
    }
}
