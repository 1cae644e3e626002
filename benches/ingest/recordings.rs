//! The audio that the load streams, and whether a sink's files hold exactly that.
//!
//! Each frame of a track (one left and one right sample) is a 32-bit counter, low half left, from a start of the track's own. So no
//! frame is zero, none occurs twice, and a foreign one shows by its high bits.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::Context;

pub const HEADER_BYTES: usize = 44;
/// One message of LiveKit's egress: 10 ms of 48 kHz stereo, 16 bits (docs/FACTS.md, egress socket).
pub const BYTES_PER_CHUNK: usize = 1920;
const FRAMES_PER_CHUNK: u32 = 480;
/// Room between the counters of two tracks, in bits: 21 s of audio before one runs into its neighbour's range.
const SEED_SHIFT: u32 = 20;

/// The counter in a track's first frame.
pub fn seed(track: u16) -> u32 {
    (u32::from(track) + 1) << SEED_SHIFT
}

/// The canonical header of a 48 kHz stereo file of 16-bit PCM.
pub fn wav_header(data_bytes: u32) -> [u8; HEADER_BYTES] {
    let fields: [&[u8]; 13] = [
        b"RIFF",
        &(data_bytes + 36).to_le_bytes(),
        b"WAVE",
        b"fmt ",
        &16_u32.to_le_bytes(),
        &1_u16.to_le_bytes(), // PCM
        &2_u16.to_le_bytes(), // channels
        &48_000_u32.to_le_bytes(),
        &192_000_u32.to_le_bytes(),
        &4_u16.to_le_bytes(),
        &16_u16.to_le_bytes(),
        b"data",
        &data_bytes.to_le_bytes(),
    ];
    fields.concat().try_into().expect("the fields of a canonical header add up to 44 bytes")
}

pub struct Verdict {
    pub exact: usize,
    pub expected: usize,
    pub first_difference: Option<String>,
}

/// Reads every track's file below `directory`, which is found by the end of its name: `_TR<track>.wav`.
pub fn check(directory: &Path, tracks: u16, chunks: u32) -> anyhow::Result<Verdict> {
    let mut files = HashMap::new();
    collect(directory, &mut files)?;
    let mut verdict = Verdict { exact: 0, expected: tracks.into(), first_difference: None };
    for track in 0..tracks {
        let found = files.remove(&format!("TR{track}")).unwrap_or_default();
        let difference = match found.as_slice() {
            [file] => compare(file, track, chunks).with_context(|| format!("cannot read {}", file.display()))?,
            [] => Some("no file".to_owned()),
            several => Some(format!("{} files instead of one", several.len())),
        };
        match difference {
            None => verdict.exact += 1,
            Some(difference) => {
                verdict.first_difference.get_or_insert_with(|| format!("track {track}: {difference}"));
            }
        }
    }
    Ok(verdict)
}

/// The sidecars below `directory` that have their hash.
pub fn hashed(directory: &Path) -> anyhow::Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            count += hashed(&path)?;
        } else if path.extension().is_some_and(|extension| extension == "json") {
            // One that is just being replaced is there under its own name.
            let sidecar: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
            count += usize::from(sidecar.get("sha256").is_some_and(serde_json::Value::is_string));
        }
    }
    Ok(count)
}

/// The sidecars below `directory`.
pub fn sealed(directory: &Path) -> anyhow::Result<usize> {
    let mut files = HashMap::new();
    collect(directory, &mut files)?;
    Ok(files.values().flatten().filter(|file| file.with_extension("wav.json").exists()).count())
}

/// What a track's file holds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kept {
    /// Frames of what was streamed, from the first one on, up to the first that is not in its place.
    pub in_place: u64,
    /// Frames of silence between them.
    pub silent: u64,
}

/// # Errors
/// When there is something that cannot be read.
pub fn kept(directory: &Path, track: u16) -> anyhow::Result<Kept> {
    let mut files = HashMap::new();
    collect(directory, &mut files)?;
    let Some(file) = files.remove(&format!("TR{track}")).and_then(|files| files.into_iter().next()) else { return Ok(Kept::default()) };
    let bytes = fs::read(&file)?;
    let (frames, _) = bytes.get(HEADER_BYTES..).unwrap_or_default().as_chunks();
    let mut wanted = seed(track);
    let mut kept = Kept::default();
    for frame in frames {
        match u32::from_le_bytes(*frame) {
            0 => kept.silent += 1,
            frame if frame == wanted => (kept.in_place, wanted) = (kept.in_place + 1, wanted + 1),
            _ => break,
        }
    }
    Ok(kept)
}

/// Maps the last part of each WAV file's name to the files that end so.
fn collect(directory: &Path, files: &mut HashMap<String, Vec<PathBuf>>) -> anyhow::Result<()> {
    let context = || format!("cannot list {}", directory.display());
    for entry in fs::read_dir(directory).with_context(context)? {
        let entry = entry.with_context(context)?;
        let path = entry.path();
        if entry.file_type().with_context(context)?.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "wav")
            && let Some((_, track)) = path.file_stem().and_then(|stem| stem.to_str()?.rsplit_once('_'))
        {
            files.entry(track.to_owned()).or_default().push(path);
        }
    }
    Ok(())
}

/// Says where the file first differs from what was streamed; `None`: nowhere.
fn compare(path: &Path, track: u16, chunks: u32) -> std::io::Result<Option<String>> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut reader = BufReader::with_capacity(256 * 1024, file);

    let mut header = [0; HEADER_BYTES];
    if length < 44 {
        return Ok(Some(format!("{length} bytes, not even a header")));
    }
    reader.read_exact(&mut header)?;
    let mut chunk = [0; BYTES_PER_CHUNK];
    let mut expected = seed(track);
    for number in 0..chunks {
        let arrived = read_up_to(&mut reader, &mut chunk)?;
        let (samples, _) = chunk.get(..arrived).unwrap_or_default().as_chunks();
        for (frame, sample) in (number * FRAMES_PER_CHUNK..).zip(samples) {
            let sample = u32::from_le_bytes(*sample);
            if sample != expected {
                return Ok(Some(format!("frame {frame} is {sample:#010x} instead of {expected:#010x}")));
            }
            expected += 1;
        }
        if arrived < chunk.len() {
            break;
        }
    }
    let wanted_bytes = chunks * FRAMES_PER_CHUNK * 4;
    if length != u64::from(wanted_bytes + 44) {
        return Ok(Some(format!("{length} bytes instead of {}", wanted_bytes + 44)));
    }
    let wanted = wav_header(wanted_bytes);
    let differs = header.iter().zip(wanted).position(|(actual, wanted)| *actual != wanted);
    Ok(differs.map(|offset| format!("header differs at byte {offset}: {header:02x?}")))
}

/// Fills the buffer unless the file ends before; returns what was read.
fn read_up_to(reader: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while let Some(room) = buffer.get_mut(filled..).filter(|room| !room.is_empty()) {
        match reader.read(room)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}
