//! A file of video as the messages that a bridge would send.

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;

use crate::recording::ivf::Unframer;
use crate::video::annex_b::access_units;
use crate::video::codec::{Container, VideoCodec};

/// H.264 without a container has no times.
const PICTURES_PER_SECOND: u32 = 30;

/// What is played.
#[derive(Debug)]
pub struct VideoClip {
    pub codec: VideoCodec,
    /// Each picture, with its time from the first one.
    pub messages: Vec<(Duration, Bytes)>,
}

impl VideoClip {
    /// # Errors
    /// When the file is not what its name says, or of a codec that is not taken.
    pub fn read(container: Container, file: Vec<u8>) -> anyhow::Result<Self> {
        match container {
            Container::Wav => bail!("no file of video"),
            Container::H264 => {
                let units = (0..).zip(access_units(&file));
                let messages =
                    units.map(|(index, unit)| (Duration::from_secs(1) * index / PICTURES_PER_SECOND, Bytes::copy_from_slice(unit))).collect();
                Ok(Self { codec: VideoCodec::H264, messages })
            }
            Container::Ivf => {
                let mut unframer = Unframer::default();
                let pictures = unframer.push(&file)?;
                let format = unframer.format().context("an IVF file has a header")?;
                let codec = format.codec().context("an IVF file of VP8 or VP9 is wanted")?;
                let first = pictures.first().map_or(0, |first| first.time);
                let due = |time: u64| {
                    let nanos = u128::from(time.saturating_sub(first)) * u128::from(format.seconds) * 1_000_000_000 / u128::from(format.ticks);
                    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
                };
                Ok(Self { codec, messages: pictures.into_iter().map(|picture| (due(picture.time), picture.data)).collect() })
            }
        }
    }

    pub fn bytes(&self) -> usize {
        self.messages.iter().map(|(_, message)| message.len()).sum()
    }

    /// From the first picture to the last.
    pub fn length(&self) -> Duration {
        self.messages.last().map_or(Duration::ZERO, |(due, _)| *due)
    }
}
