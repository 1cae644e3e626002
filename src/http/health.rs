//! Is the server able to do its work?

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::http::StatusCode;
use actix_web::{HttpResponse, web};
use chrono::{SecondsFormat, Utc};
use serde_json::json;
use tokio::sync::Mutex;

use super::Doors;
use super::storage::Storage;
use crate::actors::totals::Totals;
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
    storage: Arc<Storage>,
    totals: Arc<Totals>,
    last: Mutex<Option<(Instant, Vec<String>)>>,
}

impl Health {
    pub fn new(store: Store, storage: Arc<Storage>, totals: Arc<Totals>) -> Self {
        Self { store, storage, totals, last: Mutex::default() }
    }

    /// What keeps the server from its work; nothing when it is healthy.
    pub async fn reasons(&self) -> Vec<String> {
        let mut last = self.last.lock().await;
        if let Some((at, reasons)) = last.as_ref()
            && at.elapsed() < FRESH
        {
            return reasons.clone();
        }
        let (database, look) = tokio::join!(self.database(), self.storage.look());
        let directory = look.problem.or(look.moved).map(|problem| format!("audio directory: {problem}"));
        let space = self.storage.disk().space().filter(|space| space.is_low());
        let space = space.map(|space| format!("space: {space}; new recordings are refused"));
        let loss = self.totals.is_losing_audio().then(|| "audio: it is being lost, the spool is full".to_owned());
        let reasons: Vec<String> = [database, directory, space, loss].into_iter().flatten().collect();
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
}
