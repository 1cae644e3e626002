//! Makes files that a crash left behind say their true length, and seals them.
//!
//! A file without a sidecar was interrupted. Header first, then the disk, then the sidecar: killed at any point, the next repair comes to the same end. What was
//! found out before anything changed is kept in the sidecar's draft, since the file's own time is the repair's afterwards. Nothing is deleted.

mod batch;
mod measured;
mod walk;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};

use self::measured::Measured;
use super::lock;
use super::moving::{self, Begun};
use super::notes::{self, Known};
use super::root::rename_without_replacing;
use super::sidecar::{self, Sidecar, no_follow};
use crate::audio::format::PcmFormat;
use crate::ids::SegmentId;
use crate::video::codec::Container;

pub use batch::{repair_all, repair_each};
pub use walk::{Adopted, Found, adopt, look};

/// What a power cut may take: a second of audio that waits for its sync, and a sync that takes as long.
const UNSYNCED: Duration = Duration::from_secs(2);
/// Behind the name of a file that is too short to hold anything.
const BAD: &str = "bad";

/// A file that may have been interrupted, and what is known of it elsewhere.
#[derive(Debug, Clone, Default)]
pub struct Interrupted {
    pub path: PathBuf,
    pub segment_id: Option<SegmentId>,
    pub meeting_id: Option<String>,
    pub room_name: Option<String>,
    pub participant: Option<String>,
    pub track_sid: Option<String>,
    /// For a header that never reached the disk.
    pub format: Option<PcmFormat>,
    pub started_at: Option<DateTime<Utc>>,
    pub session_started_at: Option<DateTime<Utc>>,
    /// How it ended; else it `crashed`.
    pub end_reason: Option<&'static str>,
}

impl Interrupted {
    /// Of which only the file is known.
    pub fn file(path: PathBuf) -> Self {
        Self { path, ..Self::default() }
    }
}

/// What became of a file.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It is sealed now.
    Recovered(Box<Sidecar>),
    /// It was already.
    Sealed(Box<Sidecar>),
    /// It is shorter than a header. Kept under this name.
    Bad(PathBuf),
    /// Another process writes it.
    InUse,
}

/// Whether anything is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Repair,
    DryRun,
}

/// Repairs one file.
///
/// # Errors
/// What the file system says, or [`io::ErrorKind::InvalidData`] for a file that this program did not write, which is left as it is.
pub fn repair(interrupted: &Interrupted) -> io::Result<Outcome> {
    repair_since(interrupted, Mode::Repair, booted_at())
}

fn repair_since(interrupted: &Interrupted, mode: Mode, booted_at: Option<SystemTime>) -> io::Result<Outcome> {
    match mend(interrupted, mode, booted_at)? {
        Mended::Ready(outcome) => Ok(outcome),
        Mended::Unsynced(mut unsynced) => {
            // A sync that fails is not tried again: the next one would succeed without having written anything.
            if let Err(error) = unsynced.file.sync_all() {
                log::error!("a repaired file could not be synced, and is suspect path={:?} error={error}", interrupted.path);
                unsynced.sidecar.suspect = true;
                unsynced.draft = unsynced.sidecar.draft(&interrupted.path)?;
            }
            unsynced.draft.sync_all()?;
            moving::remove_of(&interrupted.path);
            sidecar::publish(&interrupted.path)?;
            if unsynced.is_all_told {
                notes::remove_of(&interrupted.path);
            }
            Ok(Outcome::Recovered(unsynced.sidecar))
        }
    }
}

/// How far a file is.
enum Mended {
    Ready(Outcome),
    /// Nothing of it has reached the disk.
    Unsynced(Unsynced),
}

/// The file stays locked for as long as it is open.
struct Unsynced {
    file: File,
    draft: File,
    sidecar: Box<Sidecar>,
    /// The notes could be read.
    is_all_told: bool,
}

/// Declares every whole frame, or picture, that the file holds and cuts off a torn one.
fn mend(interrupted: &Interrupted, mode: Mode, booted_at: Option<SystemTime>) -> io::Result<Mended> {
    let path = &interrupted.path;
    let file = no_follow(OpenOptions::new().read(true).write(mode == Mode::Repair)).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(invalid("it is no file"));
    }
    if !lock::hold(&file)? {
        return Ok(Mended::Ready(Outcome::InUse));
    }
    // Asked under the lock, which a writer holds until its sidecar is there.
    if let Some(sealed) = Sidecar::read(path)? {
        return Ok(Mended::Ready(Outcome::Sealed(Box::new(sealed))));
    }
    let container = Container::of(path);
    if metadata.len() < Measured::least_bytes(container) {
        return Ok(Mended::Ready(Outcome::Bad(set_aside(path, mode)?)));
    }
    // Where it cannot be read, nobody knows what the file should hold: it is tried again.
    let moving = if container == Container::Wav { Begun::of(&file, path)? } else { None };
    let length = moving.as_ref().map_or(metadata.len(), Begun::file_bytes);
    let measured = Measured::of(&file, length, container, interrupted.format)?;
    // What cannot be read is left, for somebody to look at.
    let noted = notes::read(path)
        .inspect_err(|error| log::error!("what was noted of an interrupted file cannot be read and is left path={path:?} error={error}"));
    let is_all_told = noted.is_ok();
    // It may be that a sync had failed.
    let noted = noted.unwrap_or_else(|_| Known { suspect: true, ..Known::default() });
    let sidecar = Box::new(describe(interrupted, &measured, &noted, metadata.modified()?, booted_at));
    if mode == Mode::DryRun {
        return Ok(Mended::Ready(Outcome::Recovered(sidecar)));
    }
    let draft = sidecar.draft(path)?;
    if let Some(moving) = moving {
        moving.undo(&file)?;
    }
    measured.mend(&file)?;
    Ok(Mended::Unsynced(Unsynced { file, draft, sidecar, is_all_told }))
}

fn describe(interrupted: &Interrupted, measured: &Measured, noted: &Known, modified: SystemTime, booted_at: Option<SystemTime>) -> Sidecar {
    let path = &interrupted.path;
    let (frames, pcm, size) = (measured.frames, measured.pcm, measured.dimensions);
    let draft = Sidecar::read_draft(path);
    // What the writer, or a repair, was told of once is told to nobody else.
    let suspect = noted.suspect || draft.as_ref().is_some_and(|draft| draft.suspect);
    // An earlier repair that was killed may have written to the file: what it had found out counts.
    let earlier = draft.filter(|earlier| earlier.recovered && earlier.frames == frames);
    let survived = booted_at.is_some_and(|booted_at| modified >= booted_at);
    let tail = if survived { Duration::ZERO } else { UNSYNCED.min(measured.length.unwrap_or(UNSYNCED)) };
    let ended_at = earlier.as_ref().map_or_else(|| DateTime::from(modified), |earlier| earlier.ended_at);
    let started_at = interrupted.started_at.or_else(|| named_time(path));
    let started_at = started_at.unwrap_or_else(|| ended_at - TimeDelta::from_std(measured.length.unwrap_or_default()).unwrap_or_default());
    let (gaps, mute_spans) = noted.in_file(frames, measured.pcm.is_none());
    let in_front = pcm.map(|format| format.duration_of_frames(noted.put_in_front)).unwrap_or_default();
    let begins_at = started_at - TimeDelta::from_std(in_front).unwrap_or_default();
    let session_offset = interrupted.session_started_at.map(|session| (begins_at - session).num_milliseconds());
    Sidecar {
        version: sidecar::VERSION,
        file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        segment_id: interrupted.segment_id.clone(),
        meeting_id: interrupted.meeting_id.clone(),
        room_name: interrupted.room_name.clone(),
        participant: interrupted.participant.clone(),
        track_sid: interrupted.track_sid.clone(),
        format: measured.format,
        sample_rate: pcm.map(|format| format.sample_rate),
        channels: pcm.map(|format| format.channels),
        width: size.map(|size| size.width),
        height: size.map(|size| size.height),
        frames,
        bytes: measured.bytes,
        started_at,
        ended_at,
        session_offset_ms: session_offset,
        drift_ppm: None,
        gaps,
        mute_spans,
        end_reason: interrupted.end_reason.unwrap_or("crashed").to_owned(),
        recovered: true,
        suspect,
        tail_unverified_ms: earlier.map_or_else(|| u64::try_from(tail.as_millis()).unwrap_or(u64::MAX), |earlier| earlier.tail_unverified_ms),
        sha256: None,
    }
}

/// The time in a name of ours.
fn named_time(path: &Path) -> Option<DateTime<Utc>> {
    let name = path.file_name()?.to_str()?;
    NaiveDateTime::parse_from_str(name.get(..20)?, "%Y%m%dT%H%M%S%.3fZ").ok().map(|time| time.and_utc())
}

/// Gives a file that holds nothing another name, behind which nobody looks for a recording.
fn set_aside(path: &Path, mode: Mode) -> io::Result<PathBuf> {
    for number in 0..1_000 {
        let mut name = path.as_os_str().to_owned();
        name.push(if number == 0 { format!(".{BAD}") } else { format!(".{number}.{BAD}") });
        let aside = PathBuf::from(name);
        if mode == Mode::DryRun {
            return Ok(aside);
        }
        match rename_without_replacing(path, &aside) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            renamed => return renamed.map(|()| aside),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// When this machine was started. What was written since then is in the page cache, were it not on the disk.
fn booted_at() -> Option<SystemTime> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

fn invalid(problem: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

#[cfg(test)]
mod tests;
