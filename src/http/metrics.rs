//! `GET /metrics`: what the process has counted, for Prometheus, behind the admin key.
//!
//! What is told here of the parts that this file does not count itself, they registered: see [`crate::metrics`].

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use actix_web::http::header;
use actix_web::{HttpResponse, web};

use super::Doors;
use super::error::ApiError;
use crate::actors::buffer::budget::SpoolBudget;
use crate::actors::stats::WriteLag;
use crate::journal::{Journal, JournalFigures};
use crate::metrics::{CountersBy, Metrics};
use crate::recording::disk::{Disk, Space};
use crate::recording::pipeline_log::PipelineLog;
use crate::recording::syncer::{SyncCounts, Syncer};
use crate::sealing::recovery::Unrepaired;

/// Of OpenMetrics, which Prometheus reads as its own.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the doors count.
#[derive(Debug)]
pub struct DoorCounts {
    pub refused_connections: CountersBy,
    pub webhooks: CountersBy,
}

impl DoorCounts {
    pub fn registered(metrics: &Metrics) -> Self {
        Self {
            refused_connections: metrics.counters_by("refused_connections", "reason", "Connections that were refused, by the code of the problem"),
            webhooks: metrics.counters_by("webhooks", "outcome", "Webhooks that were answered, by what was answered"),
        }
    }
}

/// `GET /metrics`
pub async fn show(doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    let metrics = doors.metrics.clone();
    // Off the workers: it reads of the process in /proc.
    let text = super::api::blocking(move || metrics.text().unwrap_or_default()).await?;
    Ok(HttpResponse::Ok().insert_header((header::CONTENT_TYPE, CONTENT_TYPE)).body(text))
}

/// Registers what others keep, to be read when it is asked for.
pub fn register_kept(metrics: &Metrics, budget: &Arc<SpoolBudget>, lag: &Arc<WriteLag>, disk: &Arc<Disk>, log: &PipelineLog) {
    let spool = Arc::clone(budget);
    metrics.gauge_of("spool_used_bytes", "Memory taken by audio that waits for the disk", move || float(spool.used_bytes()));
    let spool = Arc::clone(budget);
    metrics.gauge_of("spool_size_bytes", "Memory that such audio may take (ingest.spool)", move || float(spool.total_bytes()));
    metrics.histogram_of("write_lag_seconds", "From the arrival of a frame to its place in a file, of the oldest in each append", Arc::clone(lag));
    let log = log.clone();
    metrics.counter_of("pipeline_log_lost_lines", "Lines of the pipeline log that its queue had no room for", move || float(log.lost()));
    let of_space = |name, help, read: fn(Space) -> f64| {
        let disk = Arc::clone(disk);
        metrics.gauge_of(name, help, move || disk.space().map_or(f64::NAN, read));
    };
    of_space("disk_size_bytes", "Size of the file system that recordings go to", |space| float(space.total_bytes));
    of_space("disk_free_bytes", "What is free there for this server", |space| float(space.free_bytes));
    of_space("disk_min_free_bytes", "What must be free there for new recordings (storage.min_free)", |space| float(space.min_free_bytes));
    of_space("recordings_refused", "1 while new recordings are refused for want of space, else 0", |space| f64::from(u8::from(space.is_low())));
    metrics.process_gauge_of("process_resident_memory_bytes", "Memory of the process", || resident_bytes().map_or(f64::NAN, float));
    metrics.process_gauge_of("process_open_fds", "Files and sockets that the process has open", || open_files().map_or(f64::NAN, float));
    metrics.process_gauge_of("process_max_fds", "Files and sockets that it may have open", || max_files().map_or(f64::NAN, float));
}

/// What became of syncs, and how the journal is.
pub fn register_durable(metrics: &Metrics, syncer: &Syncer, journal: &Journal, unrepaired: &Unrepaired) {
    let of_syncs = |name, help, read: fn(&SyncCounts) -> u64| {
        let syncer = syncer.clone();
        metrics.counter_of(name, help, move || float(read(syncer.counts())));
    };
    of_syncs("sync_files", "Files of recordings that were synced one by one", |counts| counts.files.load(Relaxed));
    of_syncs("sync_file_systems", "Times that a whole file system was synced, for many files", |counts| counts.file_systems.load(Relaxed));
    of_syncs("sync_failures", "Syncs that failed: what they were for is suspect", |counts| counts.failures.load(Relaxed));
    let slowest = syncer.clone();
    metrics.gauge_of("sync_max_seconds", "The longest sync since the start", move || float(slowest.counts().slowest_us.load(Relaxed)) / 1e6);
    let oldest = syncer.clone();
    let waits = move || oldest.oldest_wait().map_or(0.0, |wait| wait.as_secs_f64());
    metrics.gauge_of("sync_oldest_seconds", "How long the oldest sync that is due has waited for the disk", waits);
    let files = Arc::clone(unrepaired);
    metrics.gauge_of("unrepaired_files", "Files of an earlier run that cannot be repaired yet", move || float(files.load(Relaxed)));
    let gauge = |name, help, read: fn(JournalFigures) -> u64| {
        let journal = journal.clone();
        metrics.gauge_of(name, help, move || float(read(journal.figures())));
    };
    gauge("journal_records", "Webhooks and rows that wait on the disk for the database", |figures| figures.records);
    gauge("journal_bytes", "What the journal takes on the disk", |figures| figures.bytes);
    gauge("journal_oldest_seconds", "How long the oldest of them has waited", |figures| figures.oldest_seconds);
    let counter = |name, help, read: fn(JournalFigures) -> u64| {
        let journal = journal.clone();
        metrics.counter_of(name, help, move || float(read(journal.figures())));
    };
    counter("journal_appended", "Records that the journal took", |figures| figures.appended);
    counter("journal_replayed", "Records that the database has taken from it", |figures| figures.replayed);
    counter("journal_refused", "Records that found no room or no disk", |figures| figures.refused);
    counter("journal_set_aside", "Records that can never be applied, and corrupt parts: each is a .bad file", |figures| figures.set_aside);
}

/// The room for video, which may be on another disk.
pub fn register_video_disk(metrics: &Metrics, disk: &Arc<Disk>) {
    let of_space = |name, help, read: fn(Space) -> f64| {
        let disk = Arc::clone(disk);
        metrics.gauge_of(name, help, move || disk.space().map_or(f64::NAN, read));
    };
    of_space("video_disk_free_bytes", "What is free for this server where video goes", |space| float(space.free_bytes));
    of_space("video_recordings_refused", "1 while new recordings of video are refused for want of space, else 0", |space| {
        f64::from(u8::from(space.is_low()))
    });
}

fn resident_bytes() -> Option<u64> {
    let pages = std::fs::read_to_string("/proc/self/statm").ok()?.split(' ').nth(1)?.parse::<u64>().ok()?;
    pages.checked_mul(u64::try_from(rustix::param::page_size()).ok()?)
}

fn open_files() -> Option<u64> {
    // Without the one that lists them.
    u64::try_from(std::fs::read_dir(Path::new("/proc/self/fd")).ok()?.count()).ok()?.checked_sub(1)
}

fn max_files() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current
}

/// Exact up to 2⁵³, which no size here reaches.
#[expect(clippy::as_conversions, reason = "the loss of precision beyond 2^53 is meant")]
fn float(number: u64) -> f64 {
    number as f64
}
