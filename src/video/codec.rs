//! Which video a sender declares, and which kinds of files there are.

use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What a sender of video says it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VideoCodec {
    /// A byte stream with start codes: Annex B.
    H264,
    Vp8,
    Vp9,
}

impl VideoCodec {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::H264 => "h264",
            Self::Vp8 => "vp8",
            Self::Vp9 => "vp9",
        }
    }

    /// What its files are.
    pub fn container(self) -> Container {
        match self {
            Self::H264 => Container::H264,
            Self::Vp8 | Self::Vp9 => Container::Ivf,
        }
    }
}

/// A word that names no [`VideoCodec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("codec must be h264, vp8 or vp9")]
pub struct UnknownCodec;

impl FromStr for VideoCodec {
    type Err = UnknownCodec;

    fn from_str(text: &str) -> Result<Self, UnknownCodec> {
        [Self::H264, Self::Vp8, Self::Vp9].into_iter().find(|codec| codec.as_str() == text).ok_or(UnknownCodec)
    }
}

/// What a segment's file is; its extension says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    Wav,
    /// Annex B as it came.
    H264,
    /// Pictures of VP8 or VP9, each with its length and time.
    Ivf,
}

impl Container {
    /// By a file's name. Files without one of our extensions are from before there was another than WAV.
    pub fn of(path: impl AsRef<Path>) -> Self {
        Self::by_extension(path).unwrap_or(Self::Wav)
    }

    /// By one of our extensions alone.
    pub fn by_extension(path: impl AsRef<Path>) -> Option<Self> {
        let extension = path.as_ref().extension()?;
        [Self::Wav, Self::H264, Self::Ivf].into_iter().find(|container| extension == container.as_str())
    }

    /// The extension, and the name in rows.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Wav => "wav",
            Self::H264 => "h264",
            Self::Ivf => "ivf",
        }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Self::Wav => "audio/wav",
            Self::H264 => "video/h264",
            Self::Ivf => "video/x-ivf",
        }
    }

    pub fn is_video(self) -> bool {
        self != Self::Wav
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codecs_are_named_as_the_predecessor_named_them() {
        for (text, codec, container) in
            [("h264", VideoCodec::H264, Container::H264), ("vp8", VideoCodec::Vp8, Container::Ivf), ("vp9", VideoCodec::Vp9, Container::Ivf)]
        {
            assert_eq!((text.parse(), codec.container()), (Ok(codec), container));
            assert_eq!(serde_json::to_string(&codec).expect("plain data"), format!("\"{text}\""));
        }
        for unknown in ["", "H264", "av1", "h265", "vp8 "] {
            assert_eq!(unknown.parse::<VideoCodec>(), Err(UnknownCodec), "{unknown}");
        }
    }

    #[test]
    fn a_file_says_what_it_is_by_its_extension() {
        let cases = [("RM/x.wav", Container::Wav), ("RM/x.h264", Container::H264), ("RM/x.ivf", Container::Ivf), ("x.h264.wav", Container::Wav)];
        for (path, container) in cases {
            assert_eq!(Container::of(path), container, "{path}");
        }
    }
}
