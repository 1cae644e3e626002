//! Is the server able to do its work?

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use actix_web::http::StatusCode;
use actix_web::{HttpResponse, web};
use chrono::{SecondsFormat, Utc};
use serde_json::json;
use tokio::sync::Mutex;

use super::Doors;
use super::storage::{OneLook, Storage};
use crate::actors::totals::Totals;
use crate::db::Store;
use crate::journal::{Journal, JournalFigures};
use crate::recording::syncer::Syncer;
use crate::sealing::recovery::Unrepaired;
use crate::watchdog::Watchdog;

/// How long each part may take to answer.
const DEADLINE: Duration = Duration::from_secs(1);
/// Askers within this share one answer.
const FRESH: Duration = Duration::from_millis(250);

/// For so long a failed sync is told.
const FAILURE_IS_RECENT: Duration = Duration::from_secs(600);
/// Longer than a busy disk takes; a second is the promise, and what the sync takes itself.
const SYNC_IS_LATE: Duration = Duration::from_secs(5);

/// `GET /`
pub async fn root() -> HttpResponse {
    HttpResponse::Ok().json(json!({"message": "Live Meeting API is running", "status": "ok"}))
}

/// `GET /health`
pub async fn health(doors: web::Data<Doors>) -> HttpResponse {
    let (mut reasons, bad_files) = doors.health.look().await;
    reasons.extend(doors.health.silent(true));
    let timestamp = Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true);
    let able = reasons.is_empty();
    reasons.extend(doors.health.journal(bad_files));
    reasons.extend(doors.health.syncs());
    reasons.extend(doors.health.repairs());
    reasons.extend(doors.health.silent(false));
    let status = match (able, reasons.is_empty()) {
        (true, true) => return HttpResponse::Ok().json(json!({"status": "healthy", "timestamp": timestamp})),
        // It works, and something is to be looked at.
        (true, false) => (StatusCode::OK, "degraded"),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "unhealthy"),
    };
    HttpResponse::build(status.0).json(json!({"status": status.1, "timestamp": timestamp, "reasons": reasons}))
}

/// Reasons, and `.bad` files.
type Found = (Vec<String>, u64);

/// What is looked at.
pub struct HealthParts {
    pub store: Store,
    pub journal: Journal,
    /// Of audio and of video.
    pub storages: [Arc<Storage>; 2],
    pub totals: Arc<Totals>,
    pub syncer: Syncer,
    pub unrepaired: Unrepaired,
    pub watchdog: Watchdog,
}

/// Looks at the parts, one look at a time.
pub struct Health {
    parts: HealthParts,
    last: Mutex<Last>,
}

#[derive(Default)]
struct Last {
    known: Option<(Instant, Found)>,
    counting: OneLook<io::Result<u64>>,
}

impl Health {
    pub fn new(parts: HealthParts) -> Self {
        Self { parts, last: Mutex::default() }
    }

    /// What does not answer of the server itself: what nothing goes on without, or the rest.
    fn silent(&self, vital: bool) -> impl Iterator<Item = String> {
        self.parts.watchdog.silent().into_iter().filter(move |(_, is_vital)| *is_vital == vital).map(|(part, _)| part)
    }

    /// What keeps the server from its work, nothing when it is healthy; and how many `.bad` files lie in the journal.
    async fn look(&self) -> Found {
        let mut last = self.last.lock().await;
        if let Some((at, found)) = &last.known
            && at.elapsed() < FRESH
        {
            return found.clone();
        }
        let [audio, video] = &self.parts.storages;
        let (database, look, video_look, bad_files) = tokio::join!(self.database(), audio.look(), video.look(), self.bad_files(&mut last.counting));
        let directory = look.problem.or(look.moved).map(|problem| format!("audio directory: {problem}"));
        let video_directory = video_look.problem.or(video_look.moved).map(|problem| format!("video directory: {problem}"));
        let low = |storage: &Storage| storage.disk().space().filter(|space| space.is_low());
        let space = low(audio).map(|space| format!("space: {space}; new recordings are refused"));
        // Most have both on one file system, and are told once.
        let video_space = low(video).filter(|_| space.is_none()).map(|space| format!("space for video: {space}; new recordings of it are refused"));
        let loss = self.parts.totals.is_losing_audio().then(|| "audio or video: it is being lost, the spool is full".to_owned());
        let reasons: Vec<String> = [database, directory, video_directory, space, video_space, loss].into_iter().flatten().collect();
        let found = (reasons, bad_files);
        last.known = Some((Instant::now(), found.clone()));
        found
    }

    /// Counted anew: whoever has looked at them removes them. None where the disk does not answer, of which others tell.
    async fn bad_files(&self, counting: &mut OneLook<io::Result<u64>>) -> u64 {
        let journal = self.parts.journal.clone();
        let counted = counting.within(DEADLINE, move || journal.bad_files()).await;
        counted.and_then(Result::ok).and_then(Result::ok).unwrap_or(0)
    }

    /// A sync that failed lately: a disk that did it once does it again. And one that does not come back.
    fn syncs(&self) -> impl Iterator<Item = String> {
        let failed = self.parts.syncer.counts().since_failure().filter(|since| *since < FAILURE_IS_RECENT);
        let failed = failed.map(|since| format!("disk: a sync failed {} s ago; what was being written is marked as suspect", since.as_secs()));
        let waits = self.parts.syncer.oldest_wait().filter(|waits| *waits > SYNC_IS_LATE);
        let late = waits.map(|waits| format!("disk: a sync has waited for {} s; a power cut would take what was recorded since", waits.as_secs()));
        failed.into_iter().chain(late)
    }

    /// What an earlier run left open, and cannot be made whole yet.
    fn repairs(&self) -> Option<String> {
        let files = self.parts.unrepaired.load(Relaxed);
        (files > 0).then(|| format!("recordings: {files} files of an earlier run cannot be repaired yet; the log says why"))
    }

    /// What waits for the database, and what never reaches it.
    fn journal(&self, bad_files: u64) -> Option<String> {
        let JournalFigures { records, oldest_seconds, .. } = self.parts.journal.figures();
        let waiting = (records > 0).then(|| format!("{records} records wait for the database, the oldest for {oldest_seconds} s"));
        let bad = (bad_files > 0).then(|| format!("{bad_files} parts could not be used and are set aside as .bad files"));
        let parts: Vec<String> = [waiting, bad].into_iter().flatten().collect();
        (!parts.is_empty()).then(|| format!("journal: {}", parts.join("; ")))
    }

    async fn database(&self) -> Option<String> {
        match tokio::time::timeout(DEADLINE, self.parts.store.probe()).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("database: {error}")),
            Err(_) => Some(format!("database: it takes no writes (no answer within {} s)", DEADLINE.as_secs())),
        }
    }
}
