//! Makes a file that a crash left behind say its true length.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::segment_file::Sealed;
use super::wav_header::{self, HEADER_BYTES};
use crate::audio::format::PcmFormat;

/// What a file of an earlier run holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repaired {
    pub format: PcmFormat,
    pub sealed: Sealed,
}

/// Declares every whole frame that the file holds and cuts off a torn one. Running it twice changes nothing.
///
/// # Errors
/// What the file system says, or [`io::ErrorKind::InvalidData`] for a file that this program did not write.
pub fn repair(path: &Path) -> io::Result<Repaired> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut header = [0; 44];
    file.read_exact_at(&mut header, 0)?;
    let format = wav_header::decode(&header).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the header is not one of ours"))?;
    let data = (file.metadata()?.len() - HEADER_BYTES).min(wav_header::MAX_DATA_BYTES);
    let frames = format.frames(data);
    let bytes = frames * format.frame_bytes();
    file.set_len(HEADER_BYTES + bytes)?;
    file.write_all_at(&wav_header::encode(format, bytes), 0)?;
    file.sync_all()?;
    Ok(Repaired { format, sealed: Sealed { frames, bytes } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lagging_header_and_a_torn_frame_are_mended_once_and_for_all() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x.wav");
        let mut file = wav_header::encode(PcmFormat::LIVEKIT, 8).to_vec();
        file.extend([7; 4 * 10 + 3]);
        std::fs::write(&path, &file).expect("written");
        for _ in 0..2 {
            let repaired = repair(&path).expect("repaired");
            assert_eq!(repaired, Repaired { format: PcmFormat::LIVEKIT, sealed: Sealed { frames: 10, bytes: 40 } });
            assert_eq!(hound::WavReader::open(&path).expect("a WAV file").duration(), 10);
        }
    }

    #[test]
    fn foreign_and_short_files_are_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        for (name, content) in [("short.wav", vec![1; 20]), ("foreign.wav", vec![1; 200])] {
            let path = dir.path().join(name);
            std::fs::write(&path, &content).expect("written");
            assert!(repair(&path).is_err());
            assert_eq!(std::fs::read(&path).expect("read"), content);
        }
    }
}
