//! What is known of a finished file, as JSON beside it: `<name>.wav.json`.
//!
//! It is there only after the file and its name have reached the disk, so it is also the mark of a finished file: a name that has one is never
//! written or repaired again. It appears whole, by a rename. Its SHA-256 follows later, by another.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use chrono::{DateTime, Utc};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::root::Directory;
use super::wav_header::HEADER_BYTES;
use crate::audio::format::PcmFormat;
use crate::audio::gaps::{Gap, MutedFrames};
use crate::ids::SegmentId;
use crate::video::codec::Container;

/// Of the members' meaning. A member may come without it changing.
pub const VERSION: u32 = 1;

/// What kind of file it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MediaFormat {
    Wav,
    H264,
    Ivf,
}

impl From<Container> for MediaFormat {
    fn from(container: Container) -> Self {
        match container {
            Container::Wav => Self::Wav,
            Container::H264 => Self::H264,
            Container::Ivf => Self::Ivf,
        }
    }
}

/// What is known of a finished file. What nobody knows is null.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sidecar {
    pub version: u32,
    /// The file's name, without a directory.
    pub file: String,
    /// Its row.
    pub segment_id: Option<SegmentId>,
    pub meeting_id: Option<String>,
    pub room_name: Option<String>,
    pub participant: Option<String>,
    pub track_sid: Option<String>,
    pub format: MediaFormat,
    /// Of sound.
    pub sample_rate: Option<u32>,
    pub channels: Option<u16>,
    /// Of pictures.
    pub width: Option<u32>,
    pub height: Option<u32>,
    /// Samples per channel, or pictures.
    pub frames: u64,
    /// Of PCM behind a WAV file's header; else of the whole file.
    pub bytes: u64,
    /// When the first frame came, by the wall clock.
    pub started_at: DateTime<Utc>,
    pub ended_at: DateTime<Utc>,
    /// Where the file begins, from the start of its session.
    pub session_offset_ms: Option<i64>,
    /// How much faster the sender's clock runs than ours, in millionths.
    pub drift_ppm: Option<f64>,
    pub gaps: Vec<SidecarGap>,
    pub mute_spans: Vec<MutedFrames>,
    pub end_reason: String,
    /// The writer died, and the length was found out from the file.
    pub recovered: bool,
    /// A sync failed: what the disk holds may differ from what was written.
    pub suspect: bool,
    /// The end that a power cut may have spoilt.
    pub tail_unverified_ms: u64,
    /// Of the whole file, in hexadecimal. Follows later.
    pub sha256: Option<String>,
}

/// A stretch of the file that holds no audio of the sender, or a place where some was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SidecarGap {
    pub start_frame: u64,
    pub frames: u64,
    pub reason: String,
}

impl From<&Gap> for SidecarGap {
    fn from(gap: &Gap) -> Self {
        Self { start_frame: gap.start_frame, frames: gap.frames, reason: gap.reason.as_str().to_owned() }
    }
}

impl Sidecar {
    /// The sample format of a WAV file.
    pub fn pcm_format(&self) -> Option<PcmFormat> {
        let (sample_rate, channels) = self.sample_rate.zip(self.channels)?;
        (sample_rate > 0 && channels > 0).then_some(PcmFormat { sample_rate, channels })
    }

    /// How long the file is by its word.
    pub fn file_bytes(&self) -> u64 {
        match self.format {
            MediaFormat::Wav => HEADER_BYTES + self.bytes,
            MediaFormat::H264 | MediaFormat::Ivf => self.bytes,
        }
    }

    /// The sidecar of a file, if it has one.
    ///
    /// # Errors
    /// What the file system says, or [`io::ErrorKind::InvalidData`] for one that cannot be read: its file counts as finished all the same.
    pub fn read(media: &Path) -> io::Result<Option<Self>> {
        let path = path_of(media);
        parsed(no_follow(OpenOptions::new().read(true)).open(&path), &path)
    }

    /// The same for a file of an opened directory, whatever its path means by now.
    ///
    /// # Errors
    /// As [`Sidecar::read`].
    pub fn read_in(directory: &Directory, file: &str) -> io::Result<Option<Self>> {
        let name = format!("{file}.json");
        parsed(directory.open_file(&name), Path::new(&name))
    }

    /// Makes the sidecar of a file that has reached the disk with its name, or replaces it. It is on the disk itself when this returns.
    ///
    /// # Errors
    /// What the file system says; then there is none, or the one that was there.
    pub fn write_in(&self, directory: &Directory, file: &str) -> io::Result<()> {
        self.draft_in(directory, file)?.sync_all()?;
        Self::publish_in(directory, file)?;
        directory.sync()
    }

    /// Its text under a temporary name, which is not synced.
    pub(super) fn draft_in(&self, directory: &Directory, file: &str) -> io::Result<File> {
        let mut draft = directory.create_over(&draft_name(file))?;
        draft.write_all(&self.text()?)?;
        Ok(draft)
    }

    /// Gives a draft its name.
    pub(super) fn publish_in(directory: &Directory, file: &str) -> io::Result<()> {
        directory.rename_over(&draft_name(file), &format!("{file}.json"))
    }

    fn text(&self) -> io::Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        Ok(text)
    }

    /// The same beside a file that only its path tells.
    ///
    /// # Errors
    /// What the file system says.
    pub fn draft(&self, media: &Path) -> io::Result<File> {
        let mut options = OpenOptions::new();
        let file = no_follow(options.write(true).create(true).truncate(false).mode(0o640)).open(draft_of(media))?;
        let text = self.text()?;
        // In place: the same again spoils nothing when it is killed, wants no room on a full disk, and is synced anew where that failed.
        file.write_all_at(&text, 0)?;
        file.set_len(u64::try_from(text.len()).unwrap_or(u64::MAX))?;
        Ok(file)
    }

    /// What [`Sidecar::draft`] left, if it is whole.
    pub fn read_draft(media: &Path) -> Option<Self> {
        let path = draft_of(media);
        parsed(no_follow(OpenOptions::new().read(true)).open(&path), &path).ok().flatten()
    }
}

/// Gives a draft its name, on the disk too.
///
/// # Errors
/// What the file system says.
pub fn publish(media: &Path) -> io::Result<()> {
    std::fs::rename(draft_of(media), path_of(media))?;
    File::open(media.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// Where the sidecar of a file is.
pub fn path_of(media: &Path) -> PathBuf {
    let mut path = media.as_os_str().to_owned();
    path.push(".json");
    path.into()
}

fn draft_name(file: &str) -> String {
    format!(".{file}.json.new")
}

/// Where it waits for its name.
pub fn draft_of(media: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(media.file_name().unwrap_or_default());
    name.push(".json.new");
    media.with_file_name(name)
}

/// A name in a directory that others write to may be a link to anywhere, or a pipe that nobody writes to.
pub(super) fn no_follow(options: &mut OpenOptions) -> &mut OpenOptions {
    options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
}

fn parsed(opened: io::Result<File>, path: &Path) -> io::Result<Option<Sidecar>> {
    let mut text = Vec::new();
    match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?.read_to_end(&mut text)?,
    };
    serde_json::from_slice(&text).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::recording::root::Root;

    fn sidecar() -> Sidecar {
        Sidecar {
            version: VERSION,
            file: "x.wav".to_owned(),
            segment_id: Some(SegmentId::new("1")),
            meeting_id: Some("RM_1".to_owned()),
            room_name: Some("room".to_owned()),
            participant: None,
            track_sid: Some("TR_1".to_owned()),
            format: MediaFormat::Wav,
            sample_rate: Some(48_000),
            channels: Some(2),
            width: None,
            height: None,
            frames: 10,
            bytes: 40,
            started_at: DateTime::UNIX_EPOCH,
            ended_at: DateTime::UNIX_EPOCH,
            session_offset_ms: Some(-3),
            drift_ppm: Some(12.5),
            gaps: vec![SidecarGap { start_frame: 1, frames: 2, reason: "overload".to_owned() }],
            mute_spans: vec![MutedFrames { start_frame: 3, frames: 4 }],
            end_reason: "closed".to_owned(),
            recovered: false,
            suspect: false,
            tail_unverified_ms: 0,
            sha256: None,
        }
    }

    /// A meeting's directory, and where a file of it is.
    fn meeting(dir: &tempfile::TempDir) -> (Directory, PathBuf) {
        let directory = Root::open(dir.path()).and_then(|root| root.make_directory("RM_1".as_ref()));
        (directory.expect("a directory"), dir.path().join("RM_1/x.wav"))
    }

    #[test]
    fn what_is_written_is_read_back_and_replaced_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let (directory, media) = meeting(&dir);
        assert_eq!(Sidecar::read(&media).expect("no fault"), None);
        sidecar().write_in(&directory, "x.wav").expect("written");
        assert_eq!(Sidecar::read(&media).expect("read"), Some(sidecar()));
        let hashed = Sidecar { sha256: Some("00".to_owned()), ..sidecar() };
        hashed.write_in(&directory, "x.wav").expect("written");
        assert_eq!(Sidecar::read(&media).expect("read"), Some(hashed));
        let names: Vec<_> = std::fs::read_dir(dir.path().join("RM_1")).expect("listed").map(|entry| entry.expect("an entry").file_name()).collect();
        assert_eq!(names, ["x.wav.json"]);
        let mode = std::fs::metadata(path_of(&media)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777 & !0o640, 0, "{mode:o}");
    }

    #[test]
    fn a_later_versions_members_do_no_harm_and_half_a_sidecar_is_an_error() {
        let dir = tempfile::tempdir().expect("a directory");
        let media = dir.path().join("x.wav");
        let text = serde_json::to_string(&sidecar()).expect("JSON");
        std::fs::write(path_of(&media), text.replacen('{', r#"{"later":1,"#, 1)).expect("written");
        assert_eq!(Sidecar::read(&media).expect("read"), Some(sidecar()));
        std::fs::write(path_of(&media), &text[..40]).expect("written");
        assert_eq!(Sidecar::read(&media).expect_err("half").kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_link_in_the_place_of_a_sidecar_or_its_draft_is_not_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let ((directory, media), canary) = (meeting(&dir), dir.path().join("canary"));
        let text = serde_json::to_string(&sidecar()).expect("JSON");
        std::fs::write(&canary, &text).expect("written");
        for name in [draft_of(&media), path_of(&media)] {
            std::os::unix::fs::symlink(&canary, name).expect("linked");
        }
        assert!(sidecar().write_in(&directory, "x.wav").is_err() && sidecar().draft(&media).is_err());
        assert!(Sidecar::read(&media).is_err() && Sidecar::read_in(&directory, "x.wav").is_err() && Sidecar::read_draft(&media).is_none());
        assert_eq!(std::fs::read_to_string(&canary).expect("read"), text);
    }

    #[test]
    fn a_pipe_in_the_place_of_a_sidecar_holds_nobody_up() {
        let dir = tempfile::tempdir().expect("a directory");
        let (directory, media) = meeting(&dir);
        rustix::fs::mkfifoat(&*directory.handle(), "x.wav.json", rustix::fs::Mode::from_raw_mode(0o600)).expect("made");
        assert!(Sidecar::read(&media).is_err() && Sidecar::read_in(&directory, "x.wav").is_err());
    }
}
