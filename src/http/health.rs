//! Is the server able to do its work?

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use actix_rt::task::spawn_blocking;
use actix_web::http::StatusCode;
use actix_web::{HttpResponse, web};
use chrono::{SecondsFormat, Utc};
use serde_json::json;
use tokio::sync::Mutex;

use super::Doors;
use crate::db::Store;

/// How long each part may take to answer.
const DEADLINE: Duration = Duration::from_secs(1);
/// Askers within this share one answer.
const FRESH: Duration = Duration::from_millis(250);

/// `GET /`
pub async fn root() -> HttpResponse {
    HttpResponse::Ok().json(json!({"message": "Live Meeting API is running", "status": "ok"}))
}

/// `GET /health`
pub async fn health(doors: web::Data<Doors>) -> HttpResponse {
    let reasons = doors.health.reasons().await;
    let timestamp = Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true);
    if reasons.is_empty() {
        HttpResponse::Ok().json(json!({"status": "healthy", "timestamp": timestamp}))
    } else {
        let unhealthy = json!({"status": "unhealthy", "timestamp": timestamp, "reasons": reasons});
        HttpResponse::build(StatusCode::SERVICE_UNAVAILABLE).json(unhealthy)
    }
}

/// Looks at the parts, one look at a time.
pub struct Health {
    store: Store,
    audio_dir: PathBuf,
    last: Mutex<Option<(Instant, Vec<String>)>>,
}

impl Health {
    pub fn new(store: Store, audio_dir: PathBuf) -> Self {
        Self { store, audio_dir, last: Mutex::default() }
    }

    /// What keeps the server from its work; nothing when it is healthy.
    pub async fn reasons(&self) -> Vec<String> {
        let mut last = self.last.lock().await;
        if let Some((at, reasons)) = last.as_ref()
            && at.elapsed() < FRESH
        {
            return reasons.clone();
        }
        let (database, directory) = tokio::join!(self.database(), self.directory());
        let reasons: Vec<String> = [database, directory].into_iter().flatten().collect();
        *last = Some((Instant::now(), reasons.clone()));
        reasons
    }

    async fn database(&self) -> Option<String> {
        match tokio::time::timeout(DEADLINE, self.store.probe()).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("database: {error}")),
            Err(_) => Some(format!("database: it takes no writes (no answer within {} s)", DEADLINE.as_secs())),
        }
    }

    async fn directory(&self) -> Option<String> {
        let directory = self.audio_dir.clone();
        match tokio::time::timeout(DEADLINE, spawn_blocking(move || probe_directory(&directory))).await {
            Ok(Ok(Ok(()))) => None,
            Ok(Ok(Err(error))) => Some(format!("audio directory: {error}")),
            Ok(Err(error)) => Some(format!("audio directory: {error}")),
            Err(_) => Some(format!("audio directory: no answer within {} s", DEADLINE.as_secs())),
        }
    }
}

/// Finds out whether a file can be made in a directory, which is made too if need be.
///
/// # Errors
/// What the file system says.
pub fn probe_directory(directory: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let probe = directory.join(format!(".probe-{}", uuid::Uuid::new_v4().simple()));
    std::fs::write(&probe, b"")?;
    std::fs::remove_file(&probe)
}
