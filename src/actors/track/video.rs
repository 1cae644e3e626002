//! A track of video: its pictures wait here for the disk, in messages that are never cut, and go to one writer after the other.
//!
//! Full: a picture that `VideoQueue` has no room for is dropped whole, counted, and a gap is recorded.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use actix::prelude::*;
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::sync::oneshot;

use super::children::{ChildKind, WRITER_RESTARTS};
use super::phase::{Phase, TrackEvent};
use super::segment_end::SegmentRow;
use super::video_queue::{Batch, MAX_APPEND_BYTES, VideoQueue};
use super::{TrackActor, TrackParams};
use crate::actors::buffer::NOT_NOW_RETRY;
use crate::actors::child::{Child, Verdict, jitter};
use crate::actors::in_flight::{Appends, InFlight, look_after};
use crate::actors::stats::TrackStats;
use crate::actors::video_stats::VideoStats;
use crate::actors::video_writer::{AppendVideo, FinishVideo, VideoPiece, VideoWriterActor, VideoWriterParams};
use crate::actors::wav_writer::RecordingError;
use crate::db::rows::EndReason;
use crate::fail_point;
use crate::ids::SegmentId;
use crate::recording::pulse::DiskPulse;
use crate::recording::video_stream::{Arrival, Picture, VideoFormat, VideoStream};
use crate::video::codec::VideoCodec;

/// Pictures that are collected into one append. With the write behind it, data is in the file 200 ms after it came.
const BATCH: Duration = Duration::from_millis(100);

/// One binary message.
#[derive(Message)]
#[rtype(result = "()")]
pub struct VideoArrived {
    pub message: Bytes,
    pub arrival: Arrival,
}

/// What a track of video has instead of audio's children.
pub(super) struct Video {
    pub(super) writer: Child<VideoWriterActor>,
    stream: VideoStream,
    queue: VideoQueue,
    edge: Edge,
    in_flight: InFlight<Append>,
    /// A timer will start the next append.
    collecting: bool,
    /// A disk that takes nothing now has been told of.
    waiting: bool,
    drained: Vec<oneshot::Sender<()>>,
    stats: Arc<TrackStats>,
}

impl Drop for Video {
    fn drop(&mut self) {
        let left = self.queue.held();
        if let Some(counts) = &self.stats.video {
            counts.lost_pictures.fetch_add(left.pictures, Relaxed);
        }
        self.stats.note_left_behind(left.bytes);
    }
}

/// The way to the file.
enum Edge {
    Ready,
    /// An append is in flight, or waits to be tried again.
    Busy,
    /// The track has failed: nothing goes there any more.
    Closed,
}

/// What one append takes, for a file that is made as `format` if there is none yet. Kept until it is acknowledged.
pub struct Append {
    batch: Batch,
    format: VideoFormat,
}

impl Video {
    fn take(&mut self) -> Append {
        Append { batch: self.queue.take_batch(), format: self.stream.format() }
    }
}

impl TrackActor {
    pub(super) fn start_video(&mut self, codec: VideoCodec, ctx: &mut Context<Self>) {
        let name = self.segment_name();
        let (rows, shared) = (self.rows.clone(), Arc::clone(&self.params.resources));
        let (session_started_at, clock) = (self.params.identity.session_started_at, self.params.clock);
        let stays_suspect = Arc::clone(&self.stays_suspect);
        let (writer, runs) = Child::start(WRITER_RESTARTS, move || {
            VideoWriterActor::new(VideoWriterParams {
                id: SegmentId::fresh(),
                root: shared.video_root.clone(),
                name: name.clone(),
                session_started_at,
                rows: SegmentRow::new(rows.clone()),
                lag: Arc::clone(&shared.lag),
                clock,
                syncer: shared.syncer.clone(),
                append_pool: shared.append_pool.clone(),
                stays_suspect: Arc::clone(&stays_suspect),
            })
        });
        Self::watch(ChildKind::VideoWriter, 0, runs, ctx);
        let resources = &self.params.resources;
        self.video = Some(Video {
            writer,
            stream: VideoStream::new(codec),
            queue: VideoQueue::new(Arc::clone(&resources.video_budget), resources.recording.spool_per_track, resources.recording.segment_duration),
            edge: Edge::Ready,
            in_flight: InFlight::default(),
            collecting: false,
            waiting: false,
            drained: Vec::new(),
            stats: Arc::clone(&self.params.stats),
        });
    }

    /// Takes in the pictures of a message; returns whether the stream can be read on.
    fn take_video(&mut self, msg: VideoArrived) -> bool {
        let TrackParams { stats, connection, .. } = &self.params;
        let (Some(video), Some(counts)) = (&mut self.video, &stats.video) else { return true };
        let pushed = video.stream.push(msg.message, msg.arrival);
        if let Some(mismatch) = video.stream.take_mismatch() {
            log::warn!("the codec of a track is not as declared connection={connection} mismatch={mismatch:?}");
            stats.set_format_mismatch(mismatch);
            self.facts_changed = true;
        }
        let pictures = match pushed {
            Ok(pictures) => pictures,
            Err(error) => {
                log::warn!("a stream cannot be read on connection={connection} problem={error}");
                return false;
            }
        };
        for picture in pictures {
            count(counts, &picture);
            let (pictures, bytes) = (picture.pictures, u64::try_from(picture.data.len()).unwrap_or(u64::MAX));
            if !video.queue.push(picture) {
                counts.lost_pictures.fetch_add(pictures, Relaxed);
                if stats.note_lost(bytes) {
                    log::error!("video is lost: the disk is too slow for too long connection={connection}");
                }
            }
        }
        stats.spooled_bytes.store(video.queue.taken_bytes(), Relaxed);
        true
    }

    /// Starts the next append, if the way is free and anything waits: at once at the end and when there is much, else when a batch has been collected.
    fn append_video_next(&mut self, ctx: &mut Context<Self>) {
        let is_ending = self.phase != Phase::Streaming;
        let Some(video) = self.video.as_mut().filter(|video| matches!(video.edge, Edge::Ready)) else { return };
        if video.queue.is_empty() {
            for waiting in video.drained.drain(..) {
                // The one who waited may have given up.
                waiting.send(()).ok();
            }
        } else if is_ending || video.queue.taken_bytes() >= MAX_APPEND_BYTES {
            self.append_video_now(ctx);
        } else if !std::mem::replace(&mut video.collecting, true) {
            ctx.run_later(BATCH, |track, ctx| {
                let Some(video) = &mut track.video else { return };
                video.collecting = false;
                if matches!(video.edge, Edge::Ready) && !video.queue.is_empty() {
                    track.append_video_now(ctx);
                }
            });
        }
    }

    fn append_video_now(&mut self, ctx: &mut Context<Self>) {
        let Some(video) = &mut self.video else { return };
        let mut append = video.take();
        if append.batch.pieces.is_empty() {
            // Only now that there is more: a track that ends here ends in this segment.
            self.next_video_segment(EndReason::Rotated, ctx);
            let Some(video) = &mut self.video else { return };
            append = video.take();
        }
        self.append_video(append, ctx);
    }

    fn append_video(&mut self, append: Append, ctx: &mut Context<Self>) {
        let Some(video) = &mut self.video else { return };
        video.edge = Edge::Busy;
        let generation = video.writer.generation();
        let (pieces, format) = (Arc::clone(&append.batch.pieces), append.format);
        let (number, fence) = video.in_flight.begin(append, generation);
        let sent = video.writer.addr().send(AppendVideo { pieces, format, fence }).into_actor(self);
        ctx.spawn(sent.map(move |reply, track, ctx| {
            if let Some(append) = track.video.as_mut().and_then(|video| video.in_flight.answered(number)) {
                track.on_video_appended(reply, append, generation, ctx);
            }
        }));
        look_after(self, ctx);
    }

    fn on_video_appended(
        &mut self,
        reply: Result<Result<(), RecordingError>, MailboxError>,
        append: Append,
        generation: u32,
        ctx: &mut Context<Self>,
    ) {
        let Some(video) = &mut self.video else { return };
        let is_suspect = matches!(reply, Ok(Err(RecordingError::Suspect)));
        let error = match reply {
            Ok(Ok(())) => {
                video.edge = Edge::Ready;
                if std::mem::take(&mut video.waiting) {
                    log::warn!("recordings can be written again");
                }
                video.queue.settle(&append.batch);
                self.params.stats.spooled_bytes.store(video.queue.taken_bytes(), Relaxed);
                let pictures = append.batch.pieces.iter().filter_map(VideoPiece::picture);
                let written: usize = pictures.map(|picture| picture.data.len()).sum();
                self.params.stats.note_recorded(u64::try_from(written).unwrap_or(u64::MAX));
                return self.append_video_next(ctx);
            }
            Ok(Err(RecordingError::NotNow { what, cause })) => {
                // No failure of the writer: it stays, and the queue takes what comes.
                if !std::mem::replace(&mut video.waiting, true) {
                    log::error!("{what}, trying again every second error={cause}");
                }
                ctx.run_later(NOT_NOW_RETRY, move |track, ctx| track.append_video(append, ctx));
                return;
            }
            Ok(Err(RecordingError::TooLarge(_))) if video.writer.generation() == generation => {
                // Nothing of the batch counts in the old file, so the next one begins with it.
                self.next_video_segment(EndReason::Rotated, ctx);
                if let Some(video) = &mut self.video {
                    video.queue.begin_segment_with(&append.batch);
                }
                return self.append_video(append, ctx);
            }
            Ok(Err(error)) => error.to_string(),
            // It died; whichever is heard of first, this or its end.
            Err(error) => error.to_string(),
        };
        self.go_on(append, generation, &error, is_suspect, ctx);
    }

    /// What the last writer did not take begins the next file.
    fn go_on(&mut self, append: Append, generation: u32, error: &str, is_suspect: bool, ctx: &mut Context<Self>) {
        if self.replace_failed_video_writer(generation, error, is_suspect, ctx) {
            if let Some(video) = &mut self.video {
                video.queue.begin_segment_with(&append.batch);
            }
            self.append_video(append, ctx);
        }
    }

    pub(super) fn video_writer_panicked(&mut self, generation: u32, ctx: &mut Context<Self>) {
        let in_flight = self.video.as_ref().is_some_and(|video| matches!(video.edge, Edge::Busy));
        // The append that it died of fails too, and finds the next writer there or asks for it.
        if !in_flight {
            self.replace_failed_video_writer(generation, "it panicked", false, ctx);
        }
    }

    /// Returns whether a writer is there to go on with.
    fn replace_failed_video_writer(&mut self, generation: u32, error: &str, is_suspect: bool, ctx: &mut Context<Self>) -> bool {
        let Some(video) = &mut self.video else { return false };
        if video.writer.generation() != generation {
            return true;
        }
        match video.writer.budget.on_failure(Instant::now(), jitter()) {
            Verdict::RestartIn(_) => {
                log::error!("a segment failed, the next one goes on connection={} error={error}", self.params.connection);
                self.params.stats.note_writer_restart();
                self.next_video_segment(EndReason::Failed, ctx);
                true
            }
            Verdict::GiveUp if is_suspect => {
                self.stay_suspect(error);
                self.next_video_segment(EndReason::Failed, ctx);
                true
            }
            Verdict::GiveUp => {
                log::error!("a track's segments fail again and again, it is given up connection={} error={error}", self.params.connection);
                self.params.stats.totals().given_up.inc();
                video.edge = Edge::Closed;
                self.make_haste();
                self.on(TrackEvent::End(EndReason::Failed), ctx);
                false
            }
        }
    }

    /// Finishes the segment in the background and goes on with the next.
    fn next_video_segment(&mut self, reason: EndReason, ctx: &mut Context<Self>) {
        let Some(video) = &mut self.video else { return };
        let old = video.writer.addr().clone();
        let runs = video.writer.restart();
        video.queue.begin_segment();
        Self::watch(ChildKind::VideoWriter, video.writer.generation(), runs, ctx);
        let (done, sealed) = oneshot::channel();
        self.sealing.push(sealed);
        let finished = self.look_after_seal(async move { old.send(FinishVideo { reason }).await });
        ctx.spawn(finished.into_actor(self).map(move |finished, track, _| {
            if let Ok(Err(error)) = finished {
                // A dead writer cannot finish: its row ends by what the file says.
                log::warn!("a segment was not finished by its writer connection={} error={error}", track.params.connection);
            }
            done.send(()).ok();
        }));
    }

    /// Queue, then segment, then rows, as with audio.
    pub(super) fn drain_video(&mut self, reason: EndReason, ctx: &mut Context<Self>) {
        let (done, drained) = oneshot::channel();
        if let Some(video) = &mut self.video {
            if video.stream.torn_bytes() > 0 {
                log::warn!("the last picture of a track was torn and is left out bytes={}", video.stream.torn_bytes());
            }
            if !matches!(video.edge, Edge::Closed) {
                video.drained.push(done);
            }
        }
        self.append_video_next(ctx);
        let emptied = self.in_time(drained);
        let sealed = emptied.into_actor(self).then(move |emptied, track, ctx| {
            if !matches!(emptied, Some(Ok(()))) {
                log::error!("a track ended before all of its video was written connection={}", track.params.connection);
            }
            track.finish_analysis(reason, ctx);
            let writer = track.video.as_ref().map(|video| video.writer.addr().clone());
            let earlier = join_all(std::mem::take(&mut track.sealing));
            let last = track.look_after_seal(async move {
                if let Some(writer) = writer
                    && let Err(error) = writer.send(FinishVideo { reason }).await
                {
                    log::warn!("a segment was not finished by its writer error={error}");
                }
            });
            let sealed = async move { tokio::join!(earlier, last) };
            track.in_time(sealed).into_actor(track)
        });
        ctx.spawn(sealed.map(|sealed, track, ctx| track.settle_rows(sealed.is_some(), ctx)));
    }
}

impl Appends for TrackActor {
    type Batch = Append;

    fn in_flight(&mut self) -> Option<&mut InFlight<Append>> {
        self.video.as_mut().map(|video| &mut video.in_flight)
    }

    fn pulse(&self) -> DiskPulse {
        self.params.resources.video_pulse.clone()
    }

    fn on_given_up(&mut self, append: Append, generation: u32, error: String, ctx: &mut Context<Self>) {
        self.go_on(append, generation, &error, false, ctx);
    }
}

fn count(counts: &VideoStats, picture: &Picture) {
    counts.pictures.fetch_add(picture.pictures, Relaxed);
    counts.key_frames.fetch_add(u64::from(picture.can_start), Relaxed);
    if let Some(dimensions) = picture.dimensions {
        counts.set_dimensions(dimensions);
    }
}

impl Handler<VideoArrived> for TrackActor {
    type Result = ();

    fn handle(&mut self, msg: VideoArrived, ctx: &mut Context<Self>) {
        fail_point::pass("track-video");
        self.on(TrackEvent::Audio, ctx);
        if self.phase != Phase::Streaming {
            return;
        }
        let bytes = u64::try_from(msg.message.len()).unwrap_or(u64::MAX);
        self.params.stats.note_received(bytes);
        if self.take_video(msg) {
            self.append_video_next(ctx);
        } else {
            self.on(TrackEvent::End(EndReason::Violation), ctx);
        }
    }
}
