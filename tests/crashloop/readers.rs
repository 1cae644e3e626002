//! What other people's programs read in our files: SoX, ffprobe, libsndfile and Python's `wave`. Each is run once for many files.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::machine::{has_tools, output};
use crate::support::test_app::sidecar;

/// What one file holds by its own header: whole frames of 48 kHz stereo, and the samples.
#[derive(Debug)]
pub struct Held {
    pub path: PathBuf,
    pub frames: u64,
    pub pcm: Vec<u8>,
    /// How it ended, where its sidecar says so.
    pub ended: Option<String>,
    /// What moves in it is written down beside it: some of that may be there twice, or not yet.
    pub is_moving: bool,
}

/// Silence of less is never put in for a sender that pauses, or is held up as other work holds it up.
pub const LEAST_HOLE: usize = 24_000;

impl Held {
    /// Reads a file as its header declares it, which must not be more than there is.
    pub fn read(path: PathBuf) -> Self {
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.len() >= 44 && bytes.starts_with(b"RIFF") && &bytes[8..16] == b"WAVEfmt ", "{}: {} bytes", path.display(), bytes.len());
        let size = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let declared = size(40);
        assert_eq!(size(4), declared + 36, "{}: both sizes are of one write", path.display());
        assert!(44 + declared <= bytes.len(), "{}: {declared} bytes are declared, {} are there", path.display(), bytes.len() - 44);
        assert_eq!(declared % 4, 0, "{}: a torn frame is declared", path.display());
        let ended = sidecar(&path).map(|told| told["endReason"].as_str().unwrap().to_owned());
        let is_moving = moving_at(&path).is_some_and(|end| declared as u64 <= end);
        Self { frames: declared as u64 / 4, pcm: bytes[44..44 + declared].to_vec(), ended, is_moving, path }
    }

    /// The counters in its frames.
    pub fn counters(&self) -> impl Iterator<Item = u32> {
        self.pcm.chunks_exact(4).map(|frame| u32::from_le_bytes(frame.try_into().unwrap()))
    }

    /// Asserts that the counters go up one by one, but for silence that was put in, and hands over the first and the last.
    #[track_caller]
    pub fn contiguous(&self) -> Option<(u32, u32)> {
        let spoken = || self.counters().filter(|counter| *counter != 0);
        let first = spoken().next()?;
        let broken = (first..).zip(spoken()).find(|(expected, counter)| counter != expected);
        assert_eq!(broken, None, "{}: the counters break, of {} frames", self.path.display(), self.frames);
        let silent = self.frames as usize - spoken().count();
        assert!(silent == 0 || silent >= LEAST_HOLE, "{}: {silent} frames of silence are nobody's", self.path.display());
        Some((first, spoken().last()?))
    }
}

/// What a file declared when audio was last about to move in it, if that was written down whole.
fn moving_at(path: &Path) -> Option<u64> {
    let record = std::fs::read(path.with_file_name(format!(".{}.move", path.file_name()?.to_str()?))).ok()?;
    let head: serde_json::Value = serde_json::from_slice(record.split(|byte| *byte == b'\n').next()?).ok()?;
    head["end"].as_u64()
}

/// Reads all files, or says what is wrong.
type Reader = fn(&[Held]) -> Result<(), String>;

/// Asserts that every reader on this machine opens all files without a complaint, and reads of each what its header says.
#[track_caller]
pub fn assert_all_read(files: &[Held]) {
    if files.is_empty() {
        return;
    }
    let readers: [(&[&str], Reader); 4] = [(&["sox", "soxi"], sox), (&["ffprobe"], ffprobe), (&["sndfile-info"], libsndfile), (&["python3"], python)];
    for (tools, read) in readers {
        if has_tools("reading with one of four readers", tools) {
            read(files).unwrap_or_else(|complaint| panic!("{}: {complaint}", tools[0]));
        }
    }
}

fn paths(files: &[Held]) -> impl Iterator<Item = &PathBuf> {
    files.iter().map(|file| &file.path)
}

/// The numbers that a reader told, in the order of the files.
fn compare(files: &[Held], told: impl IntoIterator<Item = u64>) -> Result<(), String> {
    let told: Vec<u64> = told.into_iter().collect();
    let expected: Vec<u64> = files.iter().map(|file| file.frames).collect();
    if told == expected { Ok(()) } else { Err(format!("it reads {told:?} frames, expected {expected:?}, of {:?}", paths(files).collect::<Vec<_>>())) }
}

/// The length of each, and the samples of all in a row.
fn sox(files: &[Held]) -> Result<(), String> {
    let lengths = String::from_utf8(output(Command::new("soxi").arg("-s").args(paths(files)))?).map_err(|error| error.to_string())?;
    compare(files, lengths.split_whitespace().filter_map(|line| line.parse().ok()))?;
    let run = Command::new("sox").arg("-V2").args(paths(files)).args(["-t", "s16", "-"]).output().map_err(|error| error.to_string())?;
    if !run.stderr.is_empty() {
        return Err(String::from_utf8_lossy(&run.stderr).into_owned());
    }
    if run.stdout == files.iter().flat_map(|file| file.pcm.clone()).collect::<Vec<u8>>() { Ok(()) } else { Err("other samples".to_owned()) }
}

/// Its list of files reads them one behind the other, each as a WAV file of its own.
fn ffprobe(files: &[Held]) -> Result<(), String> {
    // A WAV file without a sample is one that ffprobe opens, but that has no place in a list.
    let audible: Vec<&Held> = files.iter().filter(|file| file.frames > 0).collect();
    let mut list = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
    for file in &audible {
        writeln!(list, "file '{}'", file.path.display()).map_err(|error| error.to_string())?;
    }
    let mut command = Command::new("ffprobe");
    command.args(["-v", "error", "-f", "concat", "-safe", "0", "-show_entries", "packet=size", "-of", "csv=p=0"]).arg(list.path());
    let run = command.output().map_err(|error| error.to_string())?;
    if !run.status.success() || !run.stderr.is_empty() {
        return Err(String::from_utf8_lossy(&run.stderr).into_owned());
    }
    let read: u64 = String::from_utf8_lossy(&run.stdout).lines().filter_map(|line| line.trim_end_matches(',').parse::<u64>().ok()).sum();
    let expected: u64 = audible.iter().map(|file| file.frames * 4).sum();
    if read == expected { Ok(()) } else { Err(format!("it reads {read} bytes of {expected}")) }
}

fn libsndfile(files: &[Held]) -> Result<(), String> {
    let said = output(Command::new("sndfile-info").args(paths(files)))?;
    let said = String::from_utf8_lossy(&said);
    compare(files, said.lines().filter_map(|line| line.strip_prefix("Frames")?.split_once(':')?.1.trim().parse().ok()))
}

const PYTHON: &str = "
import sys, wave
for path in sys.argv[1:]:
    with wave.open(path) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 48000), path
        frames = file.getnframes()
        assert len(file.readframes(frames)) == 4 * frames, path
        print(frames)
";

fn python(files: &[Held]) -> Result<(), String> {
    let said = output(Command::new("python3").args(["-c", PYTHON]).args(paths(files)))?;
    compare(files, String::from_utf8_lossy(&said).lines().filter_map(|line| line.parse().ok()))
}

/// The rows of all segments by their file's path below the audio directory, as the API tells them.
pub fn segments(recordings: &[serde_json::Value]) -> BTreeMap<String, serde_json::Value> {
    let segments = recordings.iter().flat_map(|recording| recording["segments"].as_array().unwrap());
    segments.map(|segment| (segment["path"].as_str().unwrap().to_owned(), segment.clone())).collect()
}
