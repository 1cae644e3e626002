//! What is known of an open file that the file does not show, as lines of JSON beside it: `.<name>.notes`.
//!
//! There is none before there is something to tell, and none once the sidecar tells it. A line comes when its audio is in the file, and nobody waits for
//! it: killed between the two, silence that was put in is there without its note, and never a note of silence over audio.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::append_pool::AppendPool;
use super::root::Directory;
use super::sidecar::{Sidecar, SidecarGap, no_follow};
use super::syncer::{Syncer, Watched};
use crate::audio::gaps::{FrameSpan, Gap, GapReason, MutedFrames, muted_in_file};

/// How often it is told that only more silence is left out.
const SELDOM: Duration = Duration::from_secs(10);

/// What is to be told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    pub gaps: Arc<Vec<Gap>>,
    /// Frames of silence that were put in front of what the file began with.
    pub put_in_front: u64,
    /// Of the connection.
    pub mute_spans: Vec<FrameSpan>,
    /// Which frame of the connection is the file's first.
    pub first: u64,
    /// A sync of the file has failed.
    pub suspect: bool,
}

/// What changed: so many of the earlier ones stand, and these follow.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    kept_gaps: usize,
    gaps: Vec<Gap>,
    put_in_front: u64,
    kept_mute_spans: usize,
    mute_spans: Vec<FrameSpan>,
    first: u64,
    suspect: bool,
}

/// Tells of one file what is known, the latest only, in jobs of their own: one that hangs holds up no audio.
#[derive(Debug)]
pub struct NoteTaker {
    pool: AppendPool,
    desk: Arc<Mutex<Desk>>,
    asked: Known,
    since: Instant,
}

#[derive(Debug)]
struct Desk {
    /// None while somebody writes them.
    notes: Option<Notes>,
    /// What is to be told, or could not be.
    next: Option<Known>,
}

impl NoteTaker {
    pub fn new(pool: AppendPool, notes: Notes) -> Self {
        let desk = Arc::new(Mutex::new(Desk { notes: Some(notes), next: None }));
        Self { pool, desk, asked: Known::default(), since: Instant::now() }
    }

    /// Of a stretch in which nothing goes to the file, what is left out grows with everything that comes: it is told at times, and with the next audio.
    pub fn tell(&mut self, known: Known, nothing_written: bool) {
        let mut desk = lock(&self.desk);
        let has_failed = desk.next.is_some() && desk.notes.is_some();
        let may_wait = nothing_written && self.since.elapsed() < SELDOM && is_only_longer(&self.asked, &known);
        if !has_failed && (known == self.asked || may_wait) {
            return;
        }
        (self.asked, self.since) = (known.clone(), Instant::now());
        desk.next = Some(known);
        let Some(notes) = desk.notes.take() else { return };
        drop(desk);
        let desk = Arc::clone(&self.desk);
        drop(self.pool.run(move || work(&desk, notes)));
    }
}

/// Tells until there is nothing more.
fn work(desk: &Mutex<Desk>, mut notes: Notes) {
    loop {
        let mut at = lock(desk);
        let Some(known) = at.next.take() else {
            at.notes = Some(notes);
            return;
        };
        drop(at);
        if let Err(error) = notes.tell(&known) {
            log::debug!("what is known of a file waits to be noted file={:?} error={error}", notes.file);
            let mut at = lock(desk);
            at.next.get_or_insert(known);
            at.notes = Some(notes);
            return;
        }
    }
}

/// Whether only the silence that is left out at the end has become longer.
fn is_only_longer(told: &Known, known: &Known) -> bool {
    let (Some((last, before)), Some((now, others))) = (told.gaps.split_last(), known.gaps.split_last()) else { return false };
    let same_gap = now.reason == GapReason::Muted && (now.reason, now.start_frame) == (last.reason, last.start_frame);
    same_gap
        && before == others
        && told.mute_spans == known.mute_spans
        && (told.put_in_front, told.first, told.suspect) == (known.put_in_front, known.first, known.suspect)
}

/// The notes of one open file.
#[derive(Debug)]
pub struct Notes {
    syncer: Syncer,
    directory: Directory,
    file: String,
    written: Option<Written>,
    told: Known,
}

#[derive(Debug)]
struct Written {
    file: Arc<File>,
    watched: Watched,
    /// Of whole lines.
    bytes: u64,
}

impl Notes {
    /// Of the file of this name. It is on the disk as soon as the file's audio.
    pub fn new(syncer: Syncer, directory: Directory, file: String) -> Self {
        Self { syncer, directory, file, written: None, told: Known::default() }
    }

    /// Tells what is new.
    ///
    /// # Errors
    /// What the file system says; then it is told with what comes next.
    fn tell(&mut self, known: &Known) -> io::Result<()> {
        let Some(line) = line(&self.told, known) else { return Ok(()) };
        let written = match &mut self.written {
            Some(written) => written,
            none => none.insert(Written::begin(&self.syncer, &self.directory, &self.file)?),
        };
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        // What a write that failed has left is written over, or is a line that nobody can read.
        written.file.write_all_at(&text, written.bytes)?;
        written.bytes += u64::try_from(text.len()).unwrap_or(u64::MAX);
        written.watched.note_written();
        self.told = known.clone();
        // A file that was finished meanwhile has removed what was there of them.
        if matches!(Sidecar::read_in(&self.directory, &self.file), Ok(Some(_))) {
            remove(&self.directory, &self.file);
        }
        Ok(())
    }
}

impl Written {
    fn begin(syncer: &Syncer, directory: &Directory, file: &str) -> io::Result<Self> {
        let file = Arc::new(directory.create_over(&name_of(file))?);
        let watched = syncer.watch(Arc::clone(&file))?;
        Ok(Self { file, watched, bytes: 0 })
    }
}

fn lock(desk: &Mutex<Desk>) -> MutexGuard<'_, Desk> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The notes are in the sidecar, which is on the disk.
pub fn remove(directory: &Directory, file: &str) {
    forget(directory.remove(&name_of(file)), file);
}

/// The same of a file that only its path tells.
pub fn remove_of(media: &Path) {
    let file = media.file_name().unwrap_or_default().to_string_lossy();
    forget(std::fs::remove_file(media.with_file_name(name_of(&file))), &file);
}

fn forget(removed: io::Result<()>, file: &str) {
    // Most files have none.
    if let Err(error) = removed
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("the notes of a finished file are left file={file:?} error={error}");
    }
}

/// What was noted of a file: nothing of most.
///
/// # Errors
/// What the file system says, or [`io::ErrorKind::InvalidData`] where a whole line is none of ours.
pub fn read(media: &Path) -> io::Result<Known> {
    let file = media.file_name().unwrap_or_default().to_string_lossy();
    parsed(no_follow(OpenOptions::new().read(true)).open(media.with_file_name(name_of(&file))))
}

/// The same for a file of an opened directory.
///
/// # Errors
/// As [`read`].
pub fn read_in(directory: &Directory, file: &str) -> io::Result<Known> {
    parsed(directory.open_file(&name_of(file)))
}

fn parsed(opened: io::Result<File>) -> io::Result<Known> {
    let mut text = Vec::new();
    match opened.and_then(|mut notes| notes.read_to_end(&mut text)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Known::default()),
        read => read?,
    };
    let (mut known, mut gaps) = (Known::default(), Vec::new());
    let mut lines = text.split(|byte| *byte == b'\n').peekable();
    while let Some(line) = lines.next() {
        let line: Line = match serde_json::from_slice(line) {
            Ok(line) => line,
            // The last one may be torn.
            Err(_) if lines.peek().is_none() => break,
            Err(error) => return Err(error.into()),
        };
        gaps.truncate(line.kept_gaps);
        gaps.extend(line.gaps);
        known.mute_spans.truncate(line.kept_mute_spans);
        known.mute_spans.extend(line.mute_spans);
        (known.put_in_front, known.first) = (line.put_in_front, line.first);
        known.suspect |= line.suspect;
    }
    Ok(Known { gaps: Arc::new(gaps), ..known })
}

impl Known {
    /// The gaps and mute spans of a file that turned out to have so many frames. Pictures that are lost take no room in a file.
    pub fn in_file(&self, frames: u64, is_video: bool) -> (Vec<SidecarGap>, Vec<MutedFrames>) {
        let mut gaps = Vec::new();
        for gap in self.gaps.iter().filter(|gap| gap.start_frame <= frames) {
            let room = frames - gap.start_frame;
            let fills = !is_video && gap.reason != GapReason::Muted;
            let length = if fills { gap.frames.min(room) } else { gap.frames };
            if length > 0 {
                gaps.push(Gap { frames: length, ..gap.clone() });
            }
        }
        let muted = muted_in_file(&self.mute_spans, self.first, frames, &gaps);
        (gaps.iter().map(SidecarGap::from).collect(), muted)
    }
}

fn line(told: &Known, known: &Known) -> Option<Line> {
    fn same<T: PartialEq>(told: &[T], known: &[T]) -> usize {
        told.iter().zip(known).take_while(|(told, known)| told == known).count()
    }
    let (kept_gaps, kept_mute_spans) = (same(&told.gaps, &known.gaps), same(&told.mute_spans, &known.mute_spans));
    (told != known).then(|| Line {
        kept_gaps,
        gaps: known.gaps.get(kept_gaps..).unwrap_or_default().to_vec(),
        put_in_front: known.put_in_front,
        kept_mute_spans,
        mute_spans: known.mute_spans.get(kept_mute_spans..).unwrap_or_default().to_vec(),
        first: known.first,
        suspect: known.suspect,
    })
}

fn name_of(file: &str) -> String {
    format!(".{file}.notes")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::audio::format::PcmFormat;
    use crate::recording::repair::{Interrupted, Outcome, repair};
    use crate::recording::root::Root;
    use crate::recording::wav_header;

    fn gap(start_frame: u64, frames: u64, reason: GapReason) -> Gap {
        Gap { start_frame, frames, reason }
    }

    fn meeting(dir: &tempfile::TempDir) -> Directory {
        Root::open(dir.path()).and_then(|root| root.make_directory("RM_1".as_ref())).expect("a directory")
    }

    fn knowledge() -> impl Strategy<Value = Known> {
        let reason = prop_oneof![Just(GapReason::Overload), Just(GapReason::Missing), Just(GapReason::Muted)];
        let gaps = proptest::collection::vec((0..9u64, 0..9u64, reason).prop_map(|(start, frames, reason)| gap(start, frames, reason)), 0..5);
        let spans = proptest::collection::vec((0..9u64, proptest::option::of(0..9u64)), 0..5);
        (gaps, 0..9u64, spans, 0..9u64).prop_map(|(gaps, put_in_front, mute_spans, first)| Known {
            gaps: Arc::new(gaps),
            put_in_front,
            mute_spans,
            first,
            suspect: false,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn d4_what_was_told_last_is_read_back_whatever_came_before_and_wherever_the_last_line_was_torn(all in proptest::collection::vec(knowledge(), 1..6)) {
            let dir = tempfile::tempdir().expect("a directory");
            let (directory, media) = (meeting(&dir), dir.path().join("RM_1/x.wav"));
            let mut notes = Notes::new(Syncer::start().expect("threads"), directory.clone(), "x.wav".to_owned());
            let (mut before, mut length) = (Known::default(), 0);
            for known in all {
                notes.tell(&known).expect("told");
                prop_assert_eq!(read(&media).expect("read"), known.clone());
                let path = dir.path().join("RM_1/.x.wav.notes");
                let text = std::fs::read(&path).unwrap_or_default();
                for torn in length..text.len().saturating_sub(1) {
                    std::fs::write(&path, &text[..torn]).expect("torn");
                    prop_assert_eq!(read(&media).expect("read"), before.clone());
                }
                if !text.is_empty() {
                    // The same file: the writer goes on in it.
                    std::fs::write(&path, &text).expect("whole");
                }
                (before, length) = (known, text.len());
            }
            remove(&directory, "x.wav");
            remove(&directory, "x.wav");
            prop_assert_eq!(std::fs::read_dir(dir.path().join("RM_1")).expect("listed").count(), 0);
        }
    }

    #[test]
    fn silence_that_is_left_out_for_hours_is_told_with_the_next_audio() {
        let dir = tempfile::tempdir().expect("a directory");
        let (directory, media) = (meeting(&dir), dir.path().join("RM_1/x.wav"));
        let notes = Notes::new(Syncer::start().expect("threads"), directory, "x.wav".to_owned());
        let mut taker = NoteTaker::new(AppendPool::start().expect("threads"), notes);
        let left_out = |frames| Known { gaps: Arc::new(vec![gap(5, frames, GapReason::Muted)]), ..Known::default() };
        let is_told = |known: &Known| {
            let until = Instant::now() + Duration::from_secs(4);
            while read(&media).expect("read") != *known && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            read(&media).expect("read") == *known
        };
        for frames in 1..1_000 {
            taker.tell(left_out(frames), true);
        }
        assert!(is_told(&left_out(1)));
        taker.tell(left_out(1_000), false);
        assert!(is_told(&left_out(1_000)));
        let lines = std::fs::read_to_string(dir.path().join("RM_1/.x.wav.notes")).expect("read").lines().count();
        assert_eq!(lines, 2);
    }

    #[test]
    fn d4_d5_a_repair_knows_what_was_noted_and_its_sidecar_takes_the_notes_place() {
        let dir = tempfile::tempdir().expect("a directory");
        let (directory, media) = (meeting(&dir), dir.path().join("RM_1/x.wav"));
        let audio = [wav_header::encode(PcmFormat::LIVEKIT, 0).to_vec(), vec![1; 400]].concat();
        std::fs::write(&media, audio).expect("written");
        let known = Known { gaps: Arc::new(vec![gap(40, 30, GapReason::Missing)]), mute_spans: vec![(30, None)], suspect: true, ..Known::default() };
        Notes::new(Syncer::start().expect("threads"), directory, "x.wav".to_owned()).tell(&known).expect("told");
        let Ok(Outcome::Recovered(sidecar)) = repair(&Interrupted::file(media.clone())) else { panic!("it is repaired") };
        assert!(sidecar.suspect && sidecar.recovered);
        assert_eq!(sidecar.gaps, [SidecarGap { start_frame: 40, frames: 30, reason: "missing".to_owned() }]);
        assert_eq!(sidecar.mute_spans, [MutedFrames { start_frame: 30, frames: 70 }]);
        assert!(!media.with_file_name(".x.wav.notes").exists());
    }

    #[test]
    fn d5_notes_that_nobody_can_read_keep_no_file_from_its_repair_and_make_it_suspect_and_are_left() {
        let dir = tempfile::tempdir().expect("a directory");
        let media = dir.path().join("x.wav");
        std::fs::write(&media, [wav_header::encode(PcmFormat::LIVEKIT, 0).to_vec(), vec![1; 400]].concat()).expect("written");
        let notes = dir.path().join(".x.wav.notes");
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &notes).expect("a link, which is not followed");
        assert!(matches!(repair(&Interrupted::file(media)), Ok(Outcome::Recovered(sidecar)) if sidecar.suspect));
        assert!(notes.is_symlink());
    }

    #[test]
    fn d5_a_line_that_is_none_of_ours_may_have_said_that_a_sync_failed() {
        let dir = tempfile::tempdir().expect("a directory");
        let media = dir.path().join("x.wav");
        std::fs::write(&media, [wav_header::encode(PcmFormat::LIVEKIT, 0).to_vec(), vec![1; 400]].concat()).expect("written");
        let notes = dir.path().join(".x.wav.notes");
        std::fs::write(&notes, [&[0; 40][..], b"\n"].concat()).expect("zeros that a power cut left");
        assert_eq!(read(&media).map_err(|error| error.kind()), Err(io::ErrorKind::InvalidData));
        let Ok(Outcome::Recovered(sidecar)) = repair(&Interrupted::file(media)) else { panic!("it is repaired") };
        assert!(sidecar.suspect && notes.exists());
    }

    #[test]
    fn what_is_told_of_a_file_that_was_finished_meanwhile_leaves_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let (directory, media) = (meeting(&dir), dir.path().join("RM_1/x.wav"));
        std::fs::write(&media, [wav_header::encode(PcmFormat::LIVEKIT, 0).to_vec(), vec![1; 400]].concat()).expect("written");
        assert!(matches!(repair(&Interrupted::file(media.clone())), Ok(Outcome::Recovered(_))));
        let known = Known { suspect: true, ..Known::default() };
        Notes::new(Syncer::start().expect("threads"), directory, "x.wav".to_owned()).tell(&known).expect("told");
        assert!(!media.with_file_name(".x.wav.notes").exists());
    }

    #[test]
    fn a_file_has_no_gap_that_it_is_too_short_for() {
        let gaps =
            vec![gap(5, 10, GapReason::Missing), gap(20, 30, GapReason::Muted), gap(25, 10, GapReason::Overload), gap(40, 5, GapReason::Missing)];
        let known = Known { gaps: Arc::new(gaps), mute_spans: vec![(3, Some(12)), (50, None)], ..Known::default() };
        let told = |frames, is_video| {
            let (gaps, muted) = known.in_file(frames, is_video);
            (gaps.iter().map(|gap| (gap.start_frame, gap.frames)).collect::<Vec<_>>(), muted.iter().map(|span| span.frames).collect::<Vec<_>>())
        };
        assert_eq!(told(4, false), (vec![], vec![1]));
        assert_eq!(told(12, false), (vec![(5, 7)], vec![9]));
        assert_eq!(told(30, false), (vec![(5, 10), (20, 30), (25, 5)], vec![17]));
        assert_eq!(told(100, false).0, [(5, 10), (20, 30), (25, 10), (40, 5)]);
        assert_eq!(told(30, true).0, [(5, 10), (20, 30), (25, 10)]);
    }
}
