//! What a live track of video counts besides.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::Serialize;

use crate::video::codec::VideoCodec;
use crate::video::key_frame::Dimensions;

#[derive(Debug)]
pub struct VideoStats {
    /// As declared.
    pub codec: VideoCodec,
    pub pictures: AtomicU64,
    /// Those with which a decoder can start.
    pub key_frames: AtomicU64,
    pub lost_pictures: AtomicU64,
    /// Width in the upper half, height in the lower; 0 until a key frame of VP8 or VP9 tells.
    dimensions: AtomicU64,
}

/// The same at one moment, as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VideoSnapshot {
    pub pictures: u64,
    pub key_frames: u64,
    /// That the disk could not take.
    pub lost_pictures: u64,
    /// Of the last key frame; null of H.264, which is not looked into.
    pub width: Option<u64>,
    pub height: Option<u64>,
}

impl VideoStats {
    pub fn new(codec: VideoCodec) -> Self {
        let (pictures, key_frames, lost_pictures, dimensions) = Default::default();
        Self { codec, pictures, key_frames, lost_pictures, dimensions }
    }

    pub fn set_dimensions(&self, Dimensions { width, height }: Dimensions) {
        self.dimensions.store(u64::from(width) << 32 | u64::from(height), Relaxed);
    }

    pub fn snapshot(&self) -> VideoSnapshot {
        let known = Some(self.dimensions.load(Relaxed)).filter(|known| *known > 0);
        VideoSnapshot {
            pictures: self.pictures.load(Relaxed),
            key_frames: self.key_frames.load(Relaxed),
            lost_pictures: self.lost_pictures.load(Relaxed),
            width: known.map(|known| known >> 32),
            height: known.map(|known| known & u64::from(u32::MAX)),
        }
    }
}
