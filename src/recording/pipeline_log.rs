//! `<pipeline log dir>/<meetingId>.log`: a line per group of audio, for whoever wants to know what became of it.
//!
//! One thread writes for all tracks, so lines never mix. Its queue is bounded: a disk that stands still costs lines, never audio.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use chrono::{SecondsFormat, Utc};

use super::path::safe_part;
use super::root::Root;
use crate::audio::window::Group;

/// Lines that wait for the disk.
const QUEUE: usize = 10_000;
/// Files that are kept open.
const OPEN_FILES: usize = 64;

/// What became of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// All of it is zero: there is nothing to analyse.
    Silent,
    /// Handed to the analysis service.
    Sent,
    /// Nobody wants it, and why.
    Skipped(&'static str),
    /// The queue for the service was full, or the track ended before the service could be reached.
    Dropped,
}

/// The log of all meetings. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PipelineLog {
    lines: SyncSender<Line>,
    lost: Arc<AtomicU64>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

#[derive(Debug)]
enum Line {
    Write(String, String),
    End,
}

/// The log of one track.
#[derive(Debug, Clone)]
pub struct TrackLog {
    log: PipelineLog,
    meeting: String,
    track: String,
}

impl PipelineLog {
    /// Starts the writing thread.
    ///
    /// # Errors
    /// When the machine has no thread left.
    pub fn start(directory: Root) -> std::io::Result<Self> {
        let (lines, received) = sync_channel(QUEUE);
        let thread = std::thread::Builder::new().name("pipeline-log".to_owned()).spawn(move || write_all(&directory, &received))?;
        Ok(Self { lines, lost: Arc::default(), thread: Arc::new(Mutex::new(Some(thread))) })
    }

    /// The log of a track. Names may be anything: they are written as JSON strings.
    pub fn of_track(&self, meeting: &str, participant: Option<&str>, track: Option<&str>) -> TrackLog {
        let quoted = |text: Option<&str>| serde_json::Value::from(text.unwrap_or("unknown")).to_string();
        let track = format!("meeting={} participant={} track={}", quoted(Some(meeting)), quoted(participant), quoted(track));
        TrackLog { log: self.clone(), meeting: safe_part(Some(meeting)), track }
    }

    /// Lines that the queue had no room for.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Writes what waits and ends the thread. Blocks.
    pub fn finish(&self) {
        let thread = self.thread.lock().ok().and_then(|mut thread| thread.take());
        if let Some(thread) = thread
            && self.lines.send(Line::End).is_ok()
            && thread.join().is_err()
        {
            log::error!("the pipeline log's thread panicked");
        }
    }
}

impl TrackLog {
    pub fn append(&self, group: &Group, fate: &Fate) {
        let fate = match fate {
            Fate::Silent => "outcome=silent".to_owned(),
            Fate::Sent => "outcome=sent".to_owned(),
            Fate::Skipped(reason) => format!("outcome=skipped reason={reason:?}"),
            Fate::Dropped => "outcome=dropped".to_owned(),
        };
        let line = format!(
            "{} {} sequence={} duration_ms={} bytes={} {fate}\n",
            Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true),
            self.track,
            group.sequence,
            group.duration_ms(),
            group.bytes,
        );
        match self.log.lines.try_send(Line::Write(self.meeting.clone(), line)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.log.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

fn write_all(directory: &Root, lines: &Receiver<Line>) {
    let mut files: HashMap<String, File> = HashMap::new();
    let mut failing = false;
    while let Ok(Line::Write(meeting, line)) = lines.recv() {
        let written = file(directory, &mut files, &meeting).and_then(|mut file| file.write_all(line.as_bytes()));
        match (written, failing) {
            (Err(error), false) => {
                log::warn!("cannot write the pipeline log directory={:?} error={error}", directory.path());
                failing = true;
            }
            (Err(_), true) => {}
            (Ok(()), _) => failing = false,
        }
    }
}

fn file<'a>(directory: &Root, files: &'a mut HashMap<String, File>, meeting: &str) -> std::io::Result<&'a File> {
    if files.len() >= OPEN_FILES && !files.contains_key(meeting) {
        files.clear();
    }
    match files.entry(meeting.to_owned()) {
        std::collections::hash_map::Entry::Occupied(open) => Ok(open.into_mut()),
        std::collections::hash_map::Entry::Vacant(vacant) => {
            let opened = directory.open_to_append(Path::new(&format!("{meeting}.log")))?;
            Ok(vacant.insert(opened))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audio::format::PcmFormat;

    fn group(sequence: u64) -> Group {
        Group { sequence, start_frame: 0, format: PcmFormat::LIVEKIT, bytes: 384_000, peak: 1, audio: Vec::new() }
    }

    #[test]
    fn every_group_has_its_line_in_its_meetings_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = PipelineLog::start(Root::open(dir.path()).expect("a root")).expect("a thread");
        let track = log.of_track("RM_1", Some("ana \"x\"\n"), None);
        track.append(&group(1), &Fate::Sent);
        track.append(&group(2), &Fate::Skipped("HUME_API_KEY is missing"));
        log.of_track("../RM_2", None, Some("TR_1")).append(&group(1), &Fate::Silent);
        log.finish();
        let text = std::fs::read_to_string(dir.path().join("RM_1.log")).expect("a log");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "a name with a line break stays in its line: {text}");
        assert!(
            lines[0].ends_with(r#" meeting="RM_1" participant="ana \"x\"\n" track="unknown" sequence=1 duration_ms=2000 bytes=384000 outcome=sent"#)
        );
        assert!(lines[1].ends_with(r#"outcome=skipped reason="HUME_API_KEY is missing""#));
        chrono::DateTime::parse_from_rfc3339(lines[0].split(' ').next().expect("a time")).expect("RFC 3339");
        assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 2);
        assert_eq!(log.lost(), 0);
    }
}
