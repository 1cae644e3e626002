//! The doors: the only code that sees requests. This is the route table, grouped by caller.

mod admission;
pub mod api;
mod auth;
mod body;
pub mod egress_socket;
pub mod error;
pub mod health;
mod ingest_query;
mod intake;
pub mod low_water;
pub mod metrics;
pub mod storage;
mod video_socket;
mod webhook;
pub mod ws_guard;

/// For `crate::fuzzing`, which no server has.
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed {
    pub(crate) use super::egress_socket::guard_limits as audio_limits;
    pub(crate) use super::ingest_query::IngestQuery;
    pub(crate) use super::intake::Intake;
    pub(crate) use super::video_socket::guard_limits as video_limits;
}

use std::sync::Arc;
use std::time::Duration;

use actix::Addr;
use actix_cors::Cors;
use actix_web::http::header;
use actix_web::middleware::from_fn;
use actix_web::{Resource, web};

use self::error::{ApiError, ErrorCode};
use self::health::Health;
use self::metrics::DoorCounts;
use self::storage::Storage;
use crate::actors::egress_starter::EgressStarter;
use crate::actors::reconciler::Reconciler;
use crate::actors::session_registry::SessionRegistry;
use crate::actors::track::TrackResources;
use crate::config::{HttpConfig, Secret};
use crate::db::Store;
use crate::livekit::webhook::WebhookVerifier;
use crate::metrics::Metrics;
use crate::ticket::TicketMint;

/// How long an operator waits for the database, at each call; then it is 503 with `Retry-After`, within 2 s.
pub const DATABASE_PATIENCE: Duration = Duration::from_millis(1_500);

/// What the handlers share.
pub struct Doors {
    pub registry: Addr<SessionRegistry>,
    /// `None` without LiveKit's address and key.
    pub reconciler: Option<Addr<Reconciler>>,
    /// `None` where nothing is started by itself.
    pub starter: Option<Addr<EgressStarter>>,
    pub tracks: Arc<TrackResources>,
    /// For whoever would rather be told to come again than wait.
    pub store: Store,
    pub webhook_verifier: Option<WebhookVerifier>,
    pub admin_key: Secret,
    pub mint: TicketMint,
    /// What LiveKit's egress reaches this server by, such as `ws://10.0.0.5:3001`.
    pub ws_base: Option<String>,
    pub health: Health,
    pub storage: Arc<Storage>,
    /// The same for video.
    pub video_storage: Arc<Storage>,
    pub metrics: Metrics,
    pub counts: DoorCounts,
}

/// Every route.
pub fn routes(config: &mut web::ServiceConfig, http: &HttpConfig) {
    config
        .app_data(web::QueryConfig::default().error_handler(|error, _| ApiError::new(ErrorCode::InvalidRequest, error.to_string()).into()))
        // anybody
        .service(resource("/").route(web::get().to(health::root)).route(web::head().to(health::root)))
        .service(resource("/health").route(web::get().to(health::health)).route(web::head().to(health::health)))
        // LiveKit
        .service(resource("/livekit/webhook").route(web::post().to(webhook::receive)))
        .service(resource("/egress-audio").route(web::get().to(egress_socket::egress_audio)))
        // bridges
        .service(resource("/egress-video").route(web::get().to(video_socket::egress_video)))
        // operators
        .service(resource("/metrics").route(web::get().to(metrics::show)).wrap(from_fn(auth::require_admin)))
        .service(
            web::scope("/api/v1").configure(api::routes).default_service(web::to(no_such_page)).wrap(from_fn(auth::require_admin)).wrap(cors(http)),
        )
        .default_service(web::to(no_such_page));
}

/// A path that answers other methods with a problem document.
fn resource(path: &str) -> Resource {
    web::resource(path).default_service(web::to(no_such_method))
}

async fn no_such_page() -> Result<web::Bytes, ApiError> {
    Err(ApiError::not_found("page"))
}

async fn no_such_method() -> Result<web::Bytes, ApiError> {
    Err(ApiError::new(ErrorCode::MethodNotAllowed, "this path does not answer that method"))
}

/// Exactly the configured origins, none by default.
fn cors(http: &HttpConfig) -> Cors {
    let cors = Cors::default()
        .allowed_methods(["GET", "HEAD", "POST"])
        .allowed_headers([header::AUTHORIZATION, header::CONTENT_TYPE, header::RANGE])
        .max_age(600);
    http.cors_origins.iter().fold(cors, |cors, origin| cors.allowed_origin(origin))
}
