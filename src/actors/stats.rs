//! What every live track counts. Written by its actors, read without asking them: a track that hangs still shows.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::mutes::{Mutes, Position};
use super::totals::{Totals, count};
use super::video_stats::{VideoSnapshot, VideoStats};
use crate::audio::drift::Drift;
use crate::audio::format::PcmFormat;
use crate::audio::level::{Level, peak_dbfs};
use crate::metrics::{Histogram, HistogramSnapshot};
use crate::video::codec::VideoCodec;

/// The counters of one connection.
#[derive(Debug)]
pub struct TrackStats {
    opened: Instant,
    totals: Arc<Totals>,
    /// What arrives.
    format: Mutex<PcmFormat>,
    /// Two channels arrive, and one is recorded.
    mixed_down: bool,
    format_mismatch: Mutex<Option<String>>,
    /// Milliseconds after `opened` at which the last byte came, and the last audio.
    last_arrival_ms: AtomicU64,
    last_audio_ms: AtomicU64,
    pub received_bytes: AtomicU64,
    pub recorded_bytes: AtomicU64,
    /// Frames that the sender left out and that were filled with silence.
    pub filled_frames: AtomicU64,
    /// Frames that the sender left out while it was muted, and that were not filled since its silence is left out too.
    pub left_out_frames: AtomicU64,
    pub lost_bytes: AtomicU64,
    pub muted: AtomicBool,
    pub mutes: Mutes,
    /// The connection is over and its file is being sealed.
    pub draining: AtomicBool,
    pub unknown_texts: AtomicU64,
    level_peak: AtomicU16,
    level_mean_square: AtomicU64,
    /// The loudest sample since the connection opened.
    pub peak: AtomicU16,
    pub spooled_bytes: AtomicU64,
    drift: Mutex<Option<Drift>>,
    pub groups: AtomicU64,
    pub silent_groups: AtomicU64,
    pub analysis_queued_groups: AtomicU64,
    pub analysis_sent_groups: AtomicU64,
    pub analysis_dropped_groups: AtomicU64,
    pub analysis_connections: AtomicU64,
    pub measurements: AtomicU64,
    pub writer_restarts: AtomicU32,
    pub analysis_restarts: AtomicU32,
    /// Of a track of video, of which `frames` are pictures.
    pub video: Option<VideoStats>,
}

/// The counters at one moment, as the API shows them.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TrackSnapshot {
    pub kind: &'static str,
    /// Of video, as declared.
    pub codec: Option<VideoCodec>,
    pub video: Option<VideoSnapshot>,
    /// 0 of video.
    pub sample_rate: u32,
    /// That arrive, as `bytes` and `frames`.
    pub channels: u16,
    pub recorded_channels: u16,
    pub format_mismatch: Option<String>,
    /// Bytes of audio that arrived.
    pub bytes: u64,
    /// Whole frames in them.
    pub frames: u64,
    pub seconds: f64,
    /// Bytes of audio in files, of `recorded_channels`, as those in queues and drops.
    pub recorded_bytes: u64,
    /// What the sender left out, filled with silence.
    pub filled_frames: u64,
    /// How much faster the sender's clock runs than ours, in millionths; absent until that can be told.
    pub drift_ppm: Option<f64>,
    pub muted: bool,
    /// Nothing came for `ingest.stall_after`.
    pub stalled: bool,
    pub idle_ms: u64,
    /// Of the last 100 ms or so; absent for digital silence.
    pub level: Option<LevelSnapshot>,
    /// Of the whole connection, in dBFS; absent for digital silence.
    pub peak_dbfs: Option<f64>,
    pub queues: QueueSnapshot,
    pub drops: DropSnapshot,
    pub restarts: RestartSnapshot,
    pub groups: u64,
    pub silent_groups: u64,
    pub analysed_groups: u64,
    pub analysis_connections: u64,
    pub measurements: u64,
    pub unknown_texts: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LevelSnapshot {
    pub peak_dbfs: f64,
    pub rms_dbfs: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct QueueSnapshot {
    /// Audio that waits for the disk.
    pub spooled_bytes: u64,
    /// Groups that wait for the analysis service.
    pub analysis_groups: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DropSnapshot {
    /// Audio that the disk could not take; its length is kept as a hole.
    pub recording_bytes: u64,
    pub analysis_groups: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RestartSnapshot {
    pub wav_writer: u32,
    pub analysis: u32,
}

impl TrackStats {
    /// What is counted here is counted in `totals` too.
    pub fn new(format: PcmFormat, totals: Arc<Totals>) -> Self {
        Self {
            opened: Instant::now(),
            totals,
            format: Mutex::new(format),
            mixed_down: false,
            format_mismatch: Mutex::default(),
            last_arrival_ms: AtomicU64::default(),
            last_audio_ms: AtomicU64::default(),
            received_bytes: AtomicU64::default(),
            recorded_bytes: AtomicU64::default(),
            filled_frames: AtomicU64::default(),
            left_out_frames: AtomicU64::default(),
            lost_bytes: AtomicU64::default(),
            muted: AtomicBool::default(),
            mutes: Mutes::default(),
            draining: AtomicBool::default(),
            unknown_texts: AtomicU64::default(),
            level_peak: AtomicU16::default(),
            level_mean_square: AtomicU64::default(),
            peak: AtomicU16::default(),
            spooled_bytes: AtomicU64::default(),
            drift: Mutex::default(),
            groups: AtomicU64::default(),
            silent_groups: AtomicU64::default(),
            analysis_queued_groups: AtomicU64::default(),
            analysis_sent_groups: AtomicU64::default(),
            analysis_dropped_groups: AtomicU64::default(),
            analysis_connections: AtomicU64::default(),
            measurements: AtomicU64::default(),
            writer_restarts: AtomicU32::default(),
            analysis_restarts: AtomicU32::default(),
            video: None,
        }
    }

    pub fn of_video(codec: VideoCodec, totals: Arc<Totals>) -> Self {
        Self { video: Some(VideoStats::new(codec)), ..Self::new(PcmFormat::NONE, totals) }
    }

    /// Of a track whose two channels are recorded as one.
    pub fn mixed_down(self) -> Self {
        Self { mixed_down: true, ..self }
    }

    /// What arrives.
    pub fn format(&self) -> PcmFormat {
        *lock(&self.format)
    }

    /// What is recorded and analysed.
    pub fn recorded_format(&self) -> PcmFormat {
        let format = self.format();
        if self.mixed_down { PcmFormat { channels: 1, ..format } } else { format }
    }

    pub fn set_format(&self, format: PcmFormat) {
        *lock(&self.format) = format;
    }

    pub fn format_mismatch(&self) -> Option<String> {
        lock(&self.format_mismatch).clone()
    }

    pub fn set_format_mismatch(&self, mismatch: String) {
        *lock(&self.format_mismatch) = Some(mismatch);
    }

    /// Where the audio that comes next lies.
    pub fn position(&self) -> Position {
        let bytes = |frames: &AtomicU64| frames.load(Relaxed) * self.format().frame_bytes();
        Position { taken_bytes: self.received_bytes.load(Relaxed) + bytes(&self.left_out_frames), filled_bytes: bytes(&self.filled_frames) }
    }

    /// Audio arrived at the track.
    pub fn note_received(&self, bytes: u64) {
        count(&self.received_bytes, &self.totals.received_bytes, bytes);
    }

    /// Audio is in a file.
    pub fn note_recorded(&self, bytes: u64) {
        count(&self.recorded_bytes, &self.totals.recorded_bytes, bytes);
    }

    /// Audio found no room. Returns whether this is the track's first.
    pub fn note_lost(&self, bytes: u64) -> bool {
        self.totals.lost(bytes);
        self.lost_bytes.fetch_add(bytes, Relaxed) == 0
    }

    /// A track ended with so much that the disk had not taken.
    pub fn note_left_behind(&self, bytes: u64) {
        if bytes > 0 {
            log::error!("a track ended before the disk took all of it, what waited is lost bytes={bytes}");
            self.totals.left_behind(bytes);
            self.lost_bytes.fetch_add(bytes, Relaxed);
        }
    }

    /// A segment failed, and another follows.
    pub fn note_writer_restart(&self) {
        self.writer_restarts.fetch_add(1, Relaxed);
        self.totals.writer_restarts.inc();
    }

    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Anything came: audio, text, a ping or a pong.
    pub fn note_arrival(&self) {
        self.last_arrival_ms.store(millis(self.opened.elapsed()), Relaxed);
    }

    /// Audio came, were it zeros.
    pub fn note_audio(&self) {
        self.last_audio_ms.store(millis(self.opened.elapsed()), Relaxed);
    }

    /// How long nothing has come.
    pub fn idle(&self) -> Duration {
        self.opened.elapsed().saturating_sub(Duration::from_millis(self.last_arrival_ms.load(Relaxed)))
    }

    /// How long no audio has come. LiveKit's pings go on while its pipeline hangs.
    pub fn without_audio(&self) -> Duration {
        self.opened.elapsed().saturating_sub(Duration::from_millis(self.last_audio_ms.load(Relaxed)))
    }

    /// How much faster the sender's clock runs than ours, once that is known.
    pub fn drift(&self) -> Option<Drift> {
        *lock(&self.drift)
    }

    pub fn set_drift(&self, drift: Drift) {
        *lock(&self.drift) = Some(drift);
    }

    pub fn set_level(&self, level: Level) {
        self.level_peak.store(level.peak, Relaxed);
        self.level_mean_square.store(level.mean_square, Relaxed);
        self.peak.fetch_max(level.peak, Relaxed);
    }

    pub fn snapshot(&self, stall_after: Duration) -> TrackSnapshot {
        let format = self.format();
        let bytes = self.received_bytes.load(Relaxed);
        let level = Level { peak: self.level_peak.load(Relaxed), mean_square: self.level_mean_square.load(Relaxed) };
        let level = level.peak_dbfs().zip(level.rms_dbfs()).map(|(peak_dbfs, rms_dbfs)| LevelSnapshot { peak_dbfs, rms_dbfs });
        let idle = self.idle();
        let video = self.video.as_ref().map(VideoStats::snapshot);
        // Of video, the time from the connection's opening to the last picture.
        let played = if video.is_some() { Duration::from_millis(self.last_audio_ms.load(Relaxed)) } else { format.duration(bytes) };
        TrackSnapshot {
            kind: if video.is_some() { "video" } else { "audio" },
            codec: self.video.as_ref().map(|video| video.codec),
            sample_rate: format.sample_rate,
            channels: format.channels,
            recorded_channels: self.recorded_format().channels,
            format_mismatch: self.format_mismatch(),
            bytes,
            frames: video.as_ref().map_or_else(|| format.frames(bytes), |video| video.pictures),
            seconds: played.as_secs_f64(),
            recorded_bytes: self.recorded_bytes.load(Relaxed),
            filled_frames: self.filled_frames.load(Relaxed),
            drift_ppm: self.drift().map(|drift| drift.ppm),
            muted: self.muted.load(Relaxed),
            stalled: idle > stall_after,
            idle_ms: millis(idle),
            level,
            peak_dbfs: peak_dbfs(self.peak.load(Relaxed)),
            queues: QueueSnapshot { spooled_bytes: self.spooled_bytes.load(Relaxed), analysis_groups: self.analysis_queued_groups.load(Relaxed) },
            drops: DropSnapshot { recording_bytes: self.lost_bytes.load(Relaxed), analysis_groups: self.analysis_dropped_groups.load(Relaxed) },
            restarts: RestartSnapshot { wav_writer: self.writer_restarts.load(Relaxed), analysis: self.analysis_restarts.load(Relaxed) },
            groups: self.groups.load(Relaxed),
            silent_groups: self.silent_groups.load(Relaxed),
            analysed_groups: self.analysis_sent_groups.load(Relaxed),
            analysis_connections: self.analysis_connections.load(Relaxed),
            measurements: self.measurements.load(Relaxed),
            unknown_texts: self.unknown_texts.load(Relaxed),
            video,
        }
    }
}

/// Upper bounds of the classes of [`WriteLag`] in milliseconds; the last class has none.
const LAG_BOUNDS_MS: [u64; 12] = [10, 25, 50, 75, 100, 125, 150, 200, 250, 500, 1_000, 5_000];

/// How long audio took from its arrival to its place in a file: one observation per append, of its oldest frame. Of the whole process.
#[derive(Debug, Default)]
pub struct WriteLag(Spans<12>);

/// Spans of time, counted by classes.
#[derive(Debug, Default)]
pub(super) struct Spans<const N: usize>
where
    [AtomicU64; N]: Default,
{
    classes: [AtomicU64; N],
    beyond: AtomicU64,
    sum_us: AtomicU64,
    longest_us: AtomicU64,
}

/// A class of the histogram: how many appends took at most so long, and longer than the class before allows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LagClass {
    /// Absent for the last class.
    pub at_most_ms: Option<u64>,
    pub count: u64,
}

impl<const N: usize> Spans<N>
where
    [AtomicU64; N]: Default,
{
    pub fn observe(&self, bounds: [u64; N], span: Duration) {
        let class = bounds.iter().zip(&self.classes).find(|(bound, _)| span <= Duration::from_millis(**bound));
        class.map_or(&self.beyond, |(_, class)| class).fetch_add(1, Relaxed);
        let micros = u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
        self.sum_us.fetch_add(micros, Relaxed);
        self.longest_us.fetch_max(micros, Relaxed);
    }

    /// Of all since the start.
    pub fn longest(&self) -> Duration {
        Duration::from_micros(self.longest_us.load(Relaxed))
    }

    pub fn snapshot(&self, bounds: [u64; N]) -> HistogramSnapshot {
        let bounded = bounds.iter().zip(&self.classes).map(|(bound, class)| (Duration::from_millis(*bound).as_secs_f64(), class.load(Relaxed)));
        let classes = bounded.chain([(f64::INFINITY, self.beyond.load(Relaxed))]).collect();
        HistogramSnapshot { sum: Duration::from_micros(self.sum_us.load(Relaxed)).as_secs_f64(), classes }
    }
}

impl WriteLag {
    pub fn observe(&self, lag: Duration) {
        self.0.observe(LAG_BOUNDS_MS, lag);
    }

    pub fn snapshot(&self) -> Vec<LagClass> {
        let bounded = LAG_BOUNDS_MS.iter().zip(&self.0.classes).map(|(bound, class)| (Some(*bound), class));
        let all = bounded.chain([(None, &self.0.beyond)]);
        all.map(|(at_most_ms, class)| LagClass { at_most_ms, count: class.load(Relaxed) }).collect()
    }
}

impl Histogram for WriteLag {
    fn snapshot(&self) -> HistogramSnapshot {
        self.0.snapshot(LAG_BOUNDS_MS)
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// The value behind a lock; a panic elsewhere leaves it whole, since every change is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lag_falls_in_one_class() {
        let lag = WriteLag::default();
        for ms in [0, 10, 11, 150, 6_000] {
            lag.observe(Duration::from_millis(ms));
        }
        let counts: Vec<(Option<u64>, u64)> =
            lag.snapshot().into_iter().map(|class| (class.at_most_ms, class.count)).filter(|(_, count)| *count > 0).collect();
        assert_eq!(counts, [(Some(10), 2), (Some(25), 1), (Some(150), 1), (None, 1)]);
    }
}
