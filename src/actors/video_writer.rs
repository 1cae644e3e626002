//! Owns one open file of video.
//!
//! In: [`AppendVideo`] and [`FinishVideo`] from `TrackActor`. Out: the replies, and the segment's row.
//! Full: `TrackActor` keeps one append in flight and holds the rest. Dies: `TrackActor` opens the next segment; the file can be read all the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use actix::prelude::*;
use actix_rt::task::spawn_blocking;
use chrono::{DateTime, Utc};

use super::stats::WriteLag;
use super::track::segment_end::SegmentRow;
use super::wav_writer::{Counts, RecordingError, end_row};
use crate::audio::format::PcmFormat;
use crate::audio::gaps::{Gap, GapReason};
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
use crate::recording::syncer::Syncer;
use crate::recording::video_file::{SealedVideo, VideoFile};
use crate::recording::video_stream::{Picture, VideoFormat};
use crate::sealing::{Origin, session_offset_ms, sidecar_of};
use crate::video::codec::Container;

/// One append in flight, one finish behind it, and what a supervisor may ask in between.
const MAILBOX_CAPACITY: usize = 16;

/// A stretch of a track.
#[derive(Debug, Clone)]
pub enum VideoPiece {
    Picture(Picture),
    /// So many pictures that could not be kept.
    Lost(u64),
}

/// Appends pieces. The reply means "handed to the OS and counted in the header", not "synced". After an error none of them is in the file.
#[derive(Message)]
#[rtype(result = "Result<(), RecordingError>")]
pub struct AppendVideo {
    pub pieces: Arc<[VideoPiece]>,
    /// What the file is made as, if there is none yet.
    pub format: VideoFormat,
    /// Whoever waits may give it up.
    pub fence: Arc<Fence>,
}

/// Seals the file, ends its row, and ends the actor. `None` if no picture ever came.
#[derive(Message)]
#[rtype(result = "Result<Option<SealedVideo>, RecordingError>")]
pub struct FinishVideo {
    pub reason: EndReason,
}

/// What a writer is made with.
pub struct VideoWriterParams {
    pub id: SegmentId,
    pub root: Root,
    pub name: SegmentName,
    /// Of the session that the recording belongs to.
    pub session_started_at: Option<DateTime<Utc>>,
    pub rows: SegmentRow,
    pub lag: Arc<WriteLag>,
    pub clock: Clock,
    pub syncer: Syncer,
    pub append_pool: AppendPool,
    /// Whether it goes on in a file of which a sync has failed.
    pub stays_suspect: Arc<AtomicBool>,
}

pub struct VideoWriterActor {
    /// Dropped before the way to the rows: whoever hears that this died may repair the file, which nobody holds any more.
    state: State,
    params: VideoWriterParams,
    /// When the last picture of the file came.
    ended_at: Option<DateTime<Utc>>,
    gaps: Arc<Vec<Gap>>,
    notes: Option<Box<NoteTaker>>,
}

enum State {
    /// No picture has come yet: there is no file.
    Empty,
    Open(VideoFile),
    /// A thread of the pool has the file.
    Writing,
    Finished,
}

impl VideoWriterActor {
    pub fn new(params: VideoWriterParams) -> Self {
        Self { params, state: State::Empty, ended_at: None, gaps: Arc::default(), notes: None }
    }

    /// The gaps of the file once the pieces are in it; `position` is the count of pictures in front of them.
    fn gaps_with(&self, pieces: &[VideoPiece], mut position: u64) -> Arc<Vec<Gap>> {
        let mut gaps = Arc::clone(&self.gaps);
        for piece in pieces {
            match piece {
                VideoPiece::Picture(picture) => position += picture.pictures,
                VideoPiece::Lost(pictures) => match Arc::make_mut(&mut gaps).last_mut() {
                    Some(last) if last.start_frame == position => last.frames += pictures,
                    _ => Arc::make_mut(&mut gaps).push(Gap { start_frame: position, frames: *pictures, reason: GapReason::Overload }),
                },
            }
        }
        gaps
    }

    /// Has what is known of the open file told beside it.
    fn note(&mut self) {
        let State::Open(file) = &self.state else { return };
        let known = Known { gaps: Arc::clone(&self.gaps), suspect: file.is_suspect(), ..Known::default() };
        if self.notes.is_none() && known == Known::default() {
            return;
        }
        let (pool, syncer) = (&self.params.append_pool, &self.params.syncer);
        self.notes.get_or_insert_with(|| Box::new(NoteTaker::new(pool.clone(), file.notes(syncer)))).tell(known, false);
    }
}

impl Actor for VideoWriterActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_CAPACITY);
    }
}

type Done<T> = AtomicResponse<VideoWriterActor, Result<T, RecordingError>>;

impl Handler<AppendVideo> for VideoWriterActor {
    type Result = Done<()>;

    fn handle(&mut self, msg: AppendVideo, _: &mut Context<Self>) -> Self::Result {
        fail_point::pass("video-turn");
        let at_once = |outcome: Result<(), RecordingError>| AtomicResponse::new(Box::pin(actix::fut::ready(outcome)));
        let pictures: Vec<Picture> = msg.pieces.iter().filter_map(VideoPiece::picture).cloned().collect();
        let file = match std::mem::replace(&mut self.state, State::Writing) {
            State::Empty if pictures.is_empty() => {
                self.state = State::Empty;
                self.gaps = self.gaps_with(&msg.pieces, 0);
                return at_once(Ok(()));
            }
            State::Empty => None,
            State::Open(file) if file.is_suspect() && !self.params.stays_suspect.load(Relaxed) => {
                self.state = State::Open(file);
                self.note();
                return at_once(Err(RecordingError::Suspect));
            }
            State::Open(file) => Some(file),
            finished @ (State::Writing | State::Finished) => {
                self.state = finished;
                return at_once(Err(RecordingError::SegmentClosed));
            }
        };
        let oldest = pictures.first().map(|first| first.arrival);
        let (root, name, format, syncer) = (self.params.root.clone(), self.params.name.clone(), msg.format, self.params.syncer.clone());
        let started_at = oldest.map_or_else(|| self.params.clock.now(), |oldest| oldest.wall);
        let fence = Arc::clone(&msg.fence);
        let gaps = self.gaps_with(&msg.pieces, file.as_ref().map_or(0, |file| file.state().pictures));
        let write = self.params.append_pool.run(move || {
            fail_point::pass("video-queue");
            if !fence.begin() {
                return (file, Ok(Counts::Nothing));
            }
            fail_point::pass("video-append");
            match file {
                None => match VideoFile::create(&root, &name, started_at, format, &pictures, &syncer) {
                    Ok(file) if fence.finish() => (Some(file), Ok(Counts::First)),
                    Ok(file) => (None, file.discard().map(|()| Counts::Nothing)),
                    Err(error) => (None, Err(error)),
                },
                Some(mut file) => {
                    let outcome = file.append_within(&fence, &pictures).map(|counts| if counts { Counts::More } else { Counts::Nothing });
                    (Some(file), outcome)
                }
            }
        });
        AtomicResponse::new(Box::pin(write.into_actor(self).map(move |joined, this, _| {
            let Ok((file, outcome)) = joined else {
                this.state = State::Finished;
                return Err(RecordingError::WriterLost);
            };
            if let (Some(file), Ok(Counts::First)) = (&file, &outcome) {
                this.params.rows.segment_opened(OpenedSegment {
                    id: this.params.id.clone(),
                    path: file.relative_path().to_string_lossy().into_owned(),
                    format: PcmFormat::NONE,
                    started_at,
                });
            }
            let error = if file.is_some() { RecordingError::of } else { RecordingError::of_first };
            this.state = file.map_or(State::Empty, State::Open);
            if matches!(outcome.map_err(error)?, Counts::Nothing) {
                return Err(RecordingError::GivenUp);
            }
            this.gaps = gaps;
            this.note();
            this.ended_at = msg.pieces.iter().filter_map(VideoPiece::picture).last().map(|last| last.arrival.wall).or(this.ended_at);
            if let Some(oldest) = oldest {
                this.params.lag.observe(oldest.at.elapsed());
            }
            Ok(())
        })))
    }
}

impl Handler<FinishVideo> for VideoWriterActor {
    type Result = Done<Option<SealedVideo>>;

    fn handle(&mut self, msg: FinishVideo, _: &mut Context<Self>) -> Self::Result {
        let State::Open(file) = std::mem::replace(&mut self.state, State::Finished) else {
            return AtomicResponse::new(Box::pin(actix::fut::ready(Ok(None)).map(|none, _, ctx: &mut Context<Self>| {
                ctx.stop();
                none
            })));
        };
        let (written, container) = (file.state(), Container::of(file.relative_path()));
        let origin = Origin {
            name: self.params.name.clone(),
            file: file.relative_path().file_name().unwrap_or_default().to_string_lossy().into_owned(),
            format: container.into(),
            started_at: file.started_at(),
        };
        let seal = Seal {
            session_offset_ms: session_offset_ms(file.started_at(), self.params.session_started_at),
            width: written.dimensions.map(|size| size.width),
            height: written.dimensions.map(|size| size.height),
            ..Seal::default()
        };
        let closed = ClosedSegment {
            id: self.params.id.clone(),
            format: PcmFormat::NONE,
            frames: written.pictures,
            bytes: written.bytes,
            ended_at: self.ended_at.unwrap_or_else(|| self.params.clock.now()),
            reason: msg.reason,
            gaps: Arc::unwrap_or_clone(std::mem::take(&mut self.gaps)),
            seal,
        };
        let (sidecar, syncer) = (sidecar_of(&closed, origin), self.params.syncer.clone());
        let sealed = spawn_blocking(move || {
            let (sealed, finished) = file.cut()?;
            finished.seal(&syncer, sidecar).map(|()| sealed)
        });
        AtomicResponse::new(Box::pin(sealed.into_actor(self).map(move |sealed, this, ctx| {
            ctx.stop();
            end_row(&mut this.params.rows, closed, sealed)
        })))
    }
}

impl VideoPiece {
    pub fn picture(&self) -> Option<&Picture> {
        match self {
            Self::Picture(picture) => Some(picture),
            Self::Lost(_) => None,
        }
    }
}

#[cfg(test)]
impl Handler<super::wav_writer::Panic> for VideoWriterActor {
    type Result = ();

    fn handle(&mut self, _: super::wav_writer::Panic, _: &mut Context<Self>) {
        panic!("as asked");
    }
}
