//! The tracks that are open now.

use actix_web::web::{self, Json};
use serde::Serialize;

use crate::actors::session_registry::{GetLiveTracks, LiveTrack};
use crate::actors::stats::LagClass;
use crate::http::Doors;
use crate::http::error::ApiError;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LiveTracks {
    items: Vec<LiveTrack>,
    /// Always null: all of them are here.
    next_cursor: Option<String>,
    /// Since the server started: how many appends had their oldest frame written within so many milliseconds of its arrival.
    write_lag: Vec<LagClass>,
    /// Lines of the pipeline log that its queue had no room for, since the server started.
    pipeline_log_lost: u64,
}

/// `GET /api/v1/tracks/live`
pub async fn list(doors: web::Data<Doors>) -> Result<Json<LiveTracks>, ApiError> {
    let items = doors.registry.send(GetLiveTracks).await?;
    let (write_lag, pipeline_log_lost) = (doors.tracks.lag.snapshot(), doors.tracks.pipeline_log.lost());
    Ok(Json(LiveTracks { items, next_cursor: None, write_lag, pipeline_log_lost }))
}
