//! Real video, made and read by ffmpeg.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

use super::machine::skip;

/// Pictures of a clip: four seconds at 25 a second, with a key frame each second.
pub const PICTURES: usize = 100;
pub const WIDTH: u64 = 320;
pub const HEIGHT: u64 = 240;

/// A clip, and the messages in which a bridge sends it.
#[derive(Clone, Debug)]
pub struct Clip {
    pub codec: &'static str,
    /// The file as ffmpeg made it.
    pub file: Vec<u8>,
    /// One picture each.
    pub messages: Vec<Vec<u8>>,
}

/// What ffprobe says of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probed {
    pub codec: String,
    pub width: u64,
    pub height: u64,
    /// Decoded.
    pub pictures: usize,
}

/// H.264, VP8 and VP9; nothing, with a line, where this machine cannot make one of them.
pub fn clips() -> &'static [Clip] {
    static CLIPS: OnceLock<Vec<Clip>> = OnceLock::new();
    CLIPS.get_or_init(|| {
        let dir = TempDir::new().expect("a directory");
        let h264 = ["-c:v", "libx264", "-profile:v", "baseline", "-x264-params", "aud=1:repeat-headers=1:scenecut=0"];
        let made: Option<Vec<Clip>> = [
            ("h264", "h264", &h264[..]),
            ("vp8", "ivf", &["-c:v", "libvpx", "-deadline", "realtime", "-b:v", "500k", "-auto-alt-ref", "0"]),
            ("vp9", "ivf", &["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v", "500k"]),
        ]
        .into_iter()
        .map(|(codec, extension, options)| clip(codec, &dir.path().join(format!("{codec}.{extension}")), options))
        .collect();
        made.unwrap_or_else(|| {
            skip("real video", "ffmpeg with libx264 and libvpx is not here");
            Vec::new()
        })
    })
}

/// One of [`clips`].
pub fn clip_of(codec: &str) -> Option<&'static Clip> {
    clips().iter().find(|clip| clip.codec == codec)
}

fn clip(codec: &'static str, path: &Path, options: &[&str]) -> Option<Clip> {
    let source = format!("testsrc=size={WIDTH}x{HEIGHT}:rate=25:duration=4,format=yuv420p");
    let mut command = Command::new("ffmpeg");
    command.args(["-v", "error", "-f", "lavfi", "-i", &source]).args(options).args(["-g", "25", "-keyint_min", "25"]).arg(path);
    if !command.status().is_ok_and(|status| status.success()) {
        return None;
    }
    let file = std::fs::read(path).expect("a clip");
    let messages = if codec == "h264" { access_units(&file) } else { pictures(&file).into_iter().map(|(_, picture)| picture).collect() };
    assert_eq!(messages.len(), PICTURES, "{codec}");
    Some(Clip { codec, file, messages })
}

/// A stream cut in front of each delimiter.
fn access_units(stream: &[u8]) -> Vec<Vec<u8>> {
    let mut starts: Vec<usize> = stream.windows(5).enumerate().filter(|(_, window)| *window == [0, 0, 0, 1, 9]).map(|(at, _)| at).collect();
    starts.push(stream.len());
    starts.windows(2).map(|unit| stream[unit[0]..unit[1]].to_vec()).collect()
}

/// The pictures of an IVF file with their times.
pub fn pictures(ivf: &[u8]) -> Vec<(u64, Vec<u8>)> {
    assert_eq!(&ivf[..8], b"DKIF\0\0\x20\0");
    let (mut at, mut pictures) = (32, Vec::new());
    while at < ivf.len() {
        let length = u32::from_le_bytes(ivf[at..at + 4].try_into().unwrap()) as usize;
        let time = u64::from_le_bytes(ivf[at + 4..at + 12].try_into().unwrap());
        pictures.push((time, ivf[at + 12..at + 12 + length].to_vec()));
        at += 12 + length;
    }
    pictures
}

/// The count in an IVF file's header.
pub fn declared_pictures(ivf: &[u8]) -> u32 {
    u32::from_le_bytes(ivf[24..28].try_into().unwrap())
}

/// Reads a file as a player would. What ffprobe has to complain about fails the test.
pub fn probe(path: &Path) -> Probed {
    let output = Command::new("ffprobe")
        .args(["-v", "error", "-count_frames", "-show_entries", "stream=codec_name,width,height,nb_read_frames", "-of", "json"])
        .arg(path)
        .output()
        .expect("ffprobe runs");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && complaints.is_empty(), "{}: {complaints}", path.display());
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let stream = &said["streams"][0];
    Probed {
        codec: stream["codec_name"].as_str().expect("a codec").to_owned(),
        width: stream["width"].as_u64().expect("a width"),
        height: stream["height"].as_u64().expect("a height"),
        pictures: stream["nb_read_frames"].as_str().expect("a count").parse().expect("a number"),
    }
}

/// What [`probe`] says of so many pictures of a clip.
pub fn expected(codec: &str, pictures: usize) -> Probed {
    Probed { codec: codec.to_owned(), width: WIDTH, height: HEIGHT, pictures }
}

/// Every recording of video, sorted by path; without sidecars.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let meetings = std::fs::read_dir(dir.join("storage/egress/video")).into_iter().flatten().flatten();
    let of_meeting = |meeting: std::fs::DirEntry| std::fs::read_dir(meeting.path()).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = meetings.flat_map(of_meeting).collect();
    files.retain(|file| file.extension().is_some_and(|kind| kind == "h264" || kind == "ivf"));
    files.sort();
    files
}
