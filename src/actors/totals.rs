//! What all tracks together have counted since the server started. It does not fall when one of them ends.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::read_stalls::ReadStalls;
use crate::metrics::{Counter, Gauge, Metrics};

/// For so long after audio was lost, the server says that it loses audio.
const LOSS_IS_RECENT: Duration = Duration::from_secs(10);

/// Counters of the process beside those of each track, which feed them.
#[derive(Debug, Default)]
pub struct Totals {
    pub live_tracks: Gauge,
    pub received_bytes: Counter,
    pub recorded_bytes: Counter,
    pub lost_bytes: Counter,
    pub writer_restarts: Counter,
    /// Tracks whose segments failed too often.
    pub given_up: Counter,
    /// Tracks whose sender's clock is out of order.
    pub drifting: Counter,
    /// How long a socket's reader was held up by its own track, or by its thread.
    pub read_stalls: Arc<ReadStalls>,
    last_loss: Mutex<Option<Instant>>,
}

impl Totals {
    /// Shown under their names.
    pub fn registered(metrics: &Metrics) -> Self {
        let read_stalls = Arc::<ReadStalls>::default();
        metrics.histogram_of(
            "ingest_read_stall_seconds",
            "How long a socket was not read because its track had not taken what came before, or its thread did something else",
            Arc::clone(&read_stalls),
        );
        let longest = Arc::clone(&read_stalls);
        metrics.gauge_of("ingest_read_stall_max_seconds", "The longest of them since the start, those that go on included", move || {
            longest.longest().as_secs_f64()
        });
        Self {
            live_tracks: metrics.gauge("live_tracks", "Connections that record"),
            received_bytes: metrics.counter("received_bytes", "Bytes of audio and video that arrived"),
            recorded_bytes: metrics.counter("recorded_bytes", "Bytes of audio and video in files, holes of audio included"),
            lost_bytes: metrics
                .counter("lost_bytes", "Bytes of audio and video that found no room in the spool, where the length of audio is kept as a hole, or waited when their track ended"),
            writer_restarts: metrics.counter("writer_restarts", "Segments that failed and were followed by another"),
            given_up: metrics.counter("tracks_given_up", "Tracks that were ended because their segments failed again and again"),
            drifting: metrics.counter("tracks_drifting", "Tracks whose sender's clock was found more than 200 ppm off this server's"),
            read_stalls,
            last_loss: Mutex::default(),
        }
    }

    pub(super) fn lost(&self, bytes: u64) {
        self.lost_bytes.inc_by(bytes);
        *self.last_loss.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Lost with its track, which says nothing of the spool.
    pub(super) fn left_behind(&self, bytes: u64) {
        self.lost_bytes.inc_by(bytes);
    }

    /// Whether audio was lost in the last 10 s for want of room.
    pub fn is_losing_audio(&self) -> bool {
        let last = *self.last_loss.lock().unwrap_or_else(PoisonError::into_inner);
        last.is_some_and(|last| last.elapsed() < LOSS_IS_RECENT)
    }
}

/// A number of one track that counts for all of them too.
pub(super) fn count(track: &AtomicU64, all: &Counter, more: u64) {
    track.fetch_add(more, Relaxed);
    all.inc_by(more);
}
