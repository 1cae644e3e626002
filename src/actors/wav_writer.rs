//! Owns one open WAV segment.
//!
//! In: [`AppendAudio`] from `BufferActor`, [`CorrectFormat`] and [`FinishSegment`] from `TrackActor`. Out: the replies, and the segment's row.
//! Full: `BufferActor` keeps one append in flight and holds the rest. Dies: `TrackActor` opens the next segment; the file stays valid.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use actix::prelude::*;
use actix_rt::task::{JoinError, spawn_blocking};
use chrono::{DateTime, TimeDelta, Utc};

use super::stats::{TrackStats, WriteLag};
use super::track::segment_end::{SegmentRow, Taken};
use crate::audio::format::PcmFormat;
use crate::audio::gaps::{Gap, GapReason, frames_taken, leading_silence, leave_out, muted_in_file, put_in};
use crate::clock::Clock;
use crate::db::rows::seals::Seal;
use crate::db::rows::{ClosedSegment, EndReason};
use crate::fail_point;
use crate::ids::SegmentId;
use crate::journal::rows::OpenedSegment;
use crate::recording::append_pool::AppendPool;
use crate::recording::fence::Fence;
use crate::recording::notes::{Known, NoteTaker};
use crate::recording::path::SegmentName;
use crate::recording::root::Root;
use crate::recording::segment_file::{Piece, Sealed, SegmentFile};
use crate::recording::sidecar::MediaFormat;
use crate::recording::syncer::Syncer;
use crate::sealing::{Origin, session_offset_ms, sidecar_of};

/// One append in flight, one finish behind it, and what a supervisor may ask in between.
const MAILBOX_CAPACITY: usize = 16;

/// Why audio did not reach the file.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// The disk takes nothing now and may later: no failure of the writer, which is as it was and can be asked again.
    #[error("{what}: {cause}")]
    NotNow { what: &'static str, cause: io::Error },
    /// The file is as long as the system lets files be: the next segment goes on.
    #[error("the segment has the length of its limit: {0}")]
    TooLarge(io::Error),
    #[error("a recording cannot be written: {0}")]
    Io(#[from] io::Error),
    #[error("a sync of the file failed: what the disk holds of it is not known")]
    Suspect,
    #[error("the segment is finished")]
    SegmentClosed,
    #[error("the writing task was lost")]
    WriterLost,
    /// Nobody waits for it any more: its audio is in the next segment.
    #[error("the append was given up")]
    GivenUp,
}

impl RecordingError {
    const PASSING: [(io::ErrorKind, &'static str); 4] = [
        (io::ErrorKind::StorageFull, "no space is left for recordings"),
        (io::ErrorKind::QuotaExceeded, "the quota for recordings is used up"),
        (io::ErrorKind::ReadOnlyFilesystem, "the file system of recordings is read-only"),
        (io::ErrorKind::PermissionDenied, "recordings may not be written"),
    ];

    pub(super) fn of(error: io::Error) -> Self {
        let passing = Self::PASSING.iter().find(|(kind, _)| *kind == error.kind());
        match passing {
            Some((_, what)) => Self::NotNow { what, cause: error },
            None if error.kind() == io::ErrorKind::FileTooLarge => Self::TooLarge(error),
            None => Self::Io(error),
        }
    }

    /// There is no file yet, so whatever is in the way, nothing is lost by trying again.
    pub(super) fn of_first(error: io::Error) -> Self {
        match Self::of(error) {
            Self::TooLarge(cause) | Self::Io(cause) => Self::NotNow { what: "a segment cannot be begun", cause },
            other @ (Self::NotNow { .. } | Self::Suspect | Self::SegmentClosed | Self::WriterLost | Self::GivenUp) => other,
        }
    }
}

/// Ends the row of a segment as its file ended. A seal that fails leaves a file that can be read as far as it declares; its row says that it failed, and
/// that nobody knows what reached the disk.
pub(super) fn end_row<T>(
    rows: &mut SegmentRow,
    mut closed: ClosedSegment,
    sealed: Result<io::Result<T>, JoinError>,
) -> Result<Option<T>, RecordingError> {
    let outcome = sealed.map_err(|_| RecordingError::WriterLost).and_then(|sealed| sealed.map_err(RecordingError::of));
    if let Err(error) = &outcome {
        log::error!("a segment could not be sealed segment_id={} error={error}", closed.id);
        closed.reason = EndReason::Failed;
        closed.seal.suspect = true;
    }
    rows.segment_closed(closed);
    outcome.map(Some)
}

/// Appends pieces. The reply means "handed to the OS and declared in the header", not "synced". After an error nothing of them is in the file.
#[derive(Message)]
#[rtype(result = "Result<Appended, RecordingError>")]
pub struct AppendAudio {
    pub pieces: Arc<[Piece]>,
    /// When the oldest frame came.
    pub arrived: Instant,
    pub arrived_at: DateTime<Utc>,
    /// Whoever waits may give it up.
    pub fence: Arc<Fence>,
}

/// How far the segment is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Appended {
    pub segment_bytes: u64,
    pub gaps: usize,
}

/// The format was declared wrongly: from now on the header says this one.
#[derive(Message)]
#[rtype(result = "Result<(), RecordingError>")]
pub struct CorrectFormat(pub PcmFormat);

/// Seals the file, ends its row, and ends the actor. `None` if no sample ever came.
#[derive(Message)]
#[rtype(result = "Result<Option<Sealed>, RecordingError>")]
pub struct FinishSegment {
    pub reason: EndReason,
}

/// What a writer is made with.
pub struct WavWriterParams {
    pub id: SegmentId,
    pub root: Root,
    pub name: SegmentName,
    pub format: PcmFormat,
    /// Of the session that the recording belongs to.
    pub session_started_at: Option<DateTime<Utc>>,
    pub rows: SegmentRow,
    pub stats: Arc<TrackStats>,
    pub taken: Taken,
    pub lag: Arc<WriteLag>,
    pub clock: Clock,
    pub syncer: Syncer,
    pub append_pool: AppendPool,
    /// Whether it goes on in a file of which a sync has failed.
    pub stays_suspect: Arc<AtomicBool>,
}

pub struct WavWriterActor {
    /// Dropped before the way to the rows: whoever hears that this died may repair the file, which nobody holds any more.
    state: State,
    params: WavWriterParams,
    gaps: Arc<Vec<Gap>>,
    /// Frames of silence that the file began with. What is put in front of its audio later belongs to the time before that.
    begins_with: u64,
    notes: Option<Box<NoteTaker>>,
}

/// What came of an append.
pub(super) enum Counts {
    /// It made the file.
    First,
    More,
    /// It was given up.
    Nothing,
}

enum State {
    /// No sample has come yet: there is no file.
    Empty,
    Open(SegmentFile),
    /// A thread of the pool has the file.
    Writing,
    Finished,
}

impl WavWriterActor {
    pub fn new(params: WavWriterParams) -> Self {
        Self { params, state: State::Empty, gaps: Arc::default(), begins_with: 0, notes: None }
    }

    /// The gaps of the file once the pieces are in it; `position` is where they start.
    fn gaps_with(&self, pieces: &[Piece], mut position: u64) -> Arc<Vec<Gap>> {
        let (mut gaps, format) = (Arc::clone(&self.gaps), self.params.format);
        for piece in pieces {
            match piece {
                Piece::Audio(_) => {}
                Piece::Missing { bytes, behind } => {
                    put_in(Arc::make_mut(&mut gaps), format.frames(position.saturating_sub(*behind)), format.frames(*bytes))
                }
                Piece::Lost(bytes) => leave_out(Arc::make_mut(&mut gaps), format.frames(position), format.frames(*bytes), GapReason::Overload),
                Piece::Muted(bytes) => leave_out(Arc::make_mut(&mut gaps), format.frames(position), format.frames(*bytes), GapReason::Muted),
            }
            position += piece.file_bytes();
        }
        gaps
    }

    /// Has what is known of the open file told beside it.
    fn note(&mut self, nothing_written: bool) {
        let State::Open(file) = &self.state else { return };
        let mute_spans = self.params.stats.mutes.in_frames(self.params.stats.format());
        let known = Known {
            gaps: Arc::clone(&self.gaps),
            put_in_front: leading_silence(&self.gaps).saturating_sub(self.begins_with),
            // Where there are none, it tells nothing.
            first: if mute_spans.is_empty() { 0 } else { self.params.taken.earlier() },
            mute_spans,
            suspect: file.is_suspect(),
        };
        if self.notes.is_none() && known == Known::default() {
            return;
        }
        let (pool, syncer) = (&self.params.append_pool, &self.params.syncer);
        self.notes.get_or_insert_with(|| Box::new(NoteTaker::new(pool.clone(), file.notes(syncer)))).tell(known, nothing_written);
    }
}

impl Actor for WavWriterActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_CAPACITY);
    }
}

impl Handler<AppendAudio> for WavWriterActor {
    type Result = AtomicResponse<Self, Result<Appended, RecordingError>>;

    fn handle(&mut self, msg: AppendAudio, _: &mut Context<Self>) -> Self::Result {
        fail_point::pass("writer-turn");
        let file = match std::mem::replace(&mut self.state, State::Writing) {
            State::Empty if msg.pieces.iter().all(|piece| piece.file_bytes() == 0) => {
                // A muted track that has not made a sound: remember the gap, make no file.
                self.state = State::Empty;
                self.gaps = self.gaps_with(&msg.pieces, 0);
                self.params.taken.note(frames_taken(0, &self.gaps));
                let appended = Appended { segment_bytes: 0, gaps: self.gaps.len() };
                return AtomicResponse::new(Box::pin(async move { Ok(appended) }.into_actor(self)));
            }
            State::Empty => None,
            State::Open(file) if file.is_suspect() && !self.params.stays_suspect.load(Relaxed) => {
                self.state = State::Open(file);
                // Killed before its sidecar says it, the disk would tell nobody again.
                self.note(false);
                return AtomicResponse::new(Box::pin(async { Err(RecordingError::Suspect) }.into_actor(self)));
            }
            State::Open(file) => Some(file),
            finished @ (State::Writing | State::Finished) => {
                self.state = finished;
                return AtomicResponse::new(Box::pin(async { Err(RecordingError::SegmentClosed) }.into_actor(self)));
            }
        };
        let (root, name, format) = (self.params.root.clone(), self.params.name.clone(), self.params.format);
        let (pieces, arrived_at, syncer) = (Arc::clone(&msg.pieces), msg.arrived_at, self.params.syncer.clone());
        let fence = Arc::clone(&msg.fence);
        let was_suspect = file.as_ref().is_some_and(SegmentFile::is_suspect);
        let before = file.as_ref().map_or(0, SegmentFile::data_bytes);
        let gaps = self.gaps_with(&msg.pieces, before);
        // What is put in front of the first audio is what the file begins with.
        let held_audio = format.frames(before) > leading_silence(&self.gaps);
        let begins_with = if held_audio { self.begins_with } else { leading_silence(&gaps) };
        let pool = self.params.append_pool.clone();
        let write = async move {
            let (file, prepared) = match file {
                Some(file) => file.prepare(&pieces, &pool).await.map(|(file, prepared)| (Some(file), prepared))?,
                None => (None, Ok(())),
            };
            if let Err(error) = prepared {
                return Ok((file, Err(error)));
            }
            let append = move || {
                fail_point::pass("writer-queue");
                if !fence.begin() {
                    return (file, Ok(Counts::Nothing));
                }
                fail_point::pass("writer-append");
                match file {
                    None => match SegmentFile::create(&root, &name, arrived_at, format, &pieces, &syncer) {
                        Ok(file) if fence.finish() => (Some(file), Ok(Counts::First)),
                        Ok(file) => (None, file.discard().map(|()| Counts::Nothing)),
                        Err(error) => (None, Err(error)),
                    },
                    Some(mut file) => {
                        let outcome = file.append_within(&fence, &pieces).map(|counts| if counts { Counts::More } else { Counts::Nothing });
                        (Some(file), outcome)
                    }
                }
            };
            pool.run(append).await
        };
        AtomicResponse::new(Box::pin(write.into_actor(self).map(move |joined, this, _| {
            let Ok((file, outcome)) = joined else {
                this.state = State::Finished;
                return Err(RecordingError::WriterLost);
            };
            let bytes = file.as_ref().map_or(0, SegmentFile::data_bytes);
            if let (Some(file), Ok(Counts::First)) = (&file, &outcome) {
                this.params.rows.segment_opened(OpenedSegment {
                    id: this.params.id.clone(),
                    path: file.relative_path().to_string_lossy().into_owned(),
                    format: file.format(),
                    started_at: msg.arrived_at,
                });
            }
            let error: fn(io::Error) -> RecordingError = match &file {
                // What it needed a sync for.
                Some(file) if file.is_suspect() && !was_suspect => |_| RecordingError::Suspect,
                Some(_) => RecordingError::of,
                None => RecordingError::of_first,
            };
            this.state = file.map_or(State::Empty, State::Open);
            if matches!(outcome.map_err(error)?, Counts::Nothing) {
                return Err(RecordingError::GivenUp);
            }
            (this.gaps, this.begins_with) = (gaps, begins_with);
            this.params.taken.note(frames_taken(this.params.format.frames(bytes), &this.gaps));
            this.note(msg.pieces.iter().all(|piece| piece.file_bytes() == 0));
            this.params.lag.observe(msg.arrived.elapsed());
            Ok(Appended { segment_bytes: bytes, gaps: this.gaps.len() })
        })))
    }
}

impl Handler<CorrectFormat> for WavWriterActor {
    type Result = AtomicResponse<Self, Result<(), RecordingError>>;

    fn handle(&mut self, CorrectFormat(format): CorrectFormat, _: &mut Context<Self>) -> Self::Result {
        let was = std::mem::replace(&mut self.params.format, format);
        self.begins_with = format.frames(self.begins_with * was.frame_bytes());
        for gap in Arc::make_mut(&mut self.gaps) {
            gap.start_frame = format.frames(gap.start_frame * was.frame_bytes());
            gap.frames = format.frames(gap.frames * was.frame_bytes());
        }
        let mut file = match std::mem::replace(&mut self.state, State::Writing) {
            State::Open(file) => file,
            other @ (State::Empty | State::Writing | State::Finished) => {
                self.state = other;
                return AtomicResponse::new(Box::pin(async { Ok(()) }.into_actor(self)));
            }
        };
        let write = self.params.append_pool.run(move || {
            let outcome = file.set_format(format);
            (file, outcome)
        });
        AtomicResponse::new(Box::pin(write.into_actor(self).map(|joined, this, _| {
            let Ok((file, outcome)) = joined else {
                this.state = State::Finished;
                return Err(RecordingError::WriterLost);
            };
            this.state = State::Open(file);
            this.note(false);
            outcome.map_err(RecordingError::of)
        })))
    }
}

impl Handler<FinishSegment> for WavWriterActor {
    type Result = AtomicResponse<Self, Result<Option<Sealed>, RecordingError>>;

    fn handle(&mut self, msg: FinishSegment, _: &mut Context<Self>) -> Self::Result {
        let gaps = Arc::unwrap_or_clone(std::mem::take(&mut self.gaps));
        let State::Open(file) = std::mem::replace(&mut self.state, State::Finished) else {
            // Nothing was ever written, or the file went with a write that panicked.
            self.params.taken.add();
            return AtomicResponse::new(Box::pin(actix::fut::ready(Ok(None)).map(|none, _, ctx: &mut Context<Self>| {
                // Not before the reply: a context that is stopped answers nothing more.
                ctx.stop();
                none
            })));
        };
        let (format, syncer) = (file.format(), self.params.syncer.clone());
        let frames = format.frames(file.data_bytes());
        self.params.taken.note(frames_taken(frames, &gaps));
        let first = self.params.taken.add();
        let name = file.relative_path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let origin = Origin { name: self.params.name.clone(), file: name, format: MediaFormat::Wav, started_at: file.started_at() };
        let mute_spans = self.params.stats.mutes.in_frames(self.params.stats.format());
        let put_in_front = leading_silence(&gaps).saturating_sub(self.begins_with);
        let begins_at = file.started_at() - TimeDelta::from_std(format.duration_of_frames(put_in_front)).unwrap_or_default();
        let seal = Seal {
            session_offset_ms: session_offset_ms(begins_at, self.params.session_started_at),
            drift_ppm: self.params.stats.drift().map(|drift| drift.ppm),
            mute_spans: muted_in_file(&mute_spans, first, frames, &gaps),
            ..Seal::default()
        };
        let bytes = frames * format.frame_bytes();
        let closed =
            ClosedSegment { id: self.params.id.clone(), format, frames, bytes, ended_at: self.params.clock.now(), reason: msg.reason, gaps, seal };
        let sidecar = sidecar_of(&closed, origin);
        let sealed = spawn_blocking(move || {
            fail_point::pass("writer-seal");
            let (sealed, finished) = file.cut()?;
            finished.seal(&syncer, sidecar).map(|()| sealed)
        });
        AtomicResponse::new(Box::pin(sealed.into_actor(self).map(move |sealed, this, ctx| {
            ctx.stop();
            end_row(&mut this.params.rows, closed, sealed)
        })))
    }
}

/// Makes the actor panic, for the tests of its supervision.
#[cfg(test)]
#[derive(Message)]
#[rtype(result = "()")]
pub struct Panic;

#[cfg(test)]
impl Handler<Panic> for WavWriterActor {
    type Result = ();

    fn handle(&mut self, _: Panic, _: &mut Context<Self>) {
        panic!("as asked");
    }
}
