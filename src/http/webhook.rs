//! `POST /livekit/webhook`: verify, commit or keep in the journal, acknowledge.
//!
//! LiveKit takes every 4xx as final and drops the event (`docs/FACTS.md`, webhooks). So only what is not LiveKit's gets one, and whatever may pass later gets 503.

use std::time::{Duration, SystemTime};

use actix_web::http::{StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use chrono::Utc;

use super::Doors;
use super::body::{self, BodyError};
use super::error::{ApiError, ErrorCode};
use crate::actors::session_registry::ApplyEvent;
use crate::db::rows::events::{Arrival, StoredBody};
use crate::livekit::scrub::storable;
use crate::livekit::webhook::{Rejection, parse};

const MAX_BYTES: usize = 1 << 20;
const BODY_DEADLINE: Duration = Duration::from_secs(5);
const COMMIT_DEADLINE: Duration = Duration::from_secs(4);

pub async fn receive(request: HttpRequest, payload: web::Payload, doors: web::Data<Doors>) -> Result<HttpResponse, ApiError> {
    let answer = keep(request, payload, &doors).await;
    doors.counts.webhooks.of(answer.as_ref().map_or_else(|error| error.code().as_str(), |_| "kept")).inc();
    answer
}

async fn keep(request: HttpRequest, payload: web::Payload, doors: &Doors) -> Result<HttpResponse, ApiError> {
    let body = body::read(&request, payload, MAX_BYTES, BODY_DEADLINE).await.map_err(|error| match error {
        BodyError::TooLarge => ApiError::new(ErrorCode::PayloadTooLarge, format!("a webhook may have at most {MAX_BYTES} bytes")),
        BodyError::TooSlow | BodyError::Broken => ApiError::new(ErrorCode::BodyIncomplete, "the body did not arrive whole in time"),
    })?;
    let authorization = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let verified = match &doors.webhook_verifier {
        _ if request.headers().get(header::CONTENT_ENCODING).is_some_and(|coding| coding != "identity") => Err(Rejection::Encoded),
        Some(verifier) => verifier.verify(authorization, &body),
        None => Err(Rejection::NoCredentials),
    };
    if let Err(rejection) = verified {
        match rejection {
            // The sender is LiveKit, and what it says is lost: somebody must set a clock.
            Rejection::BadTimes => log::error!("a webhook is refused problem={rejection}"),
            Rejection::NoCredentials | Rejection::Unsigned | Rejection::Forged | Rejection::OtherBody | Rejection::Encoded => {
                log::warn!("a webhook is refused problem={rejection}");
            }
        }
        return Err(ApiError::unauthorized());
    }
    let parsed = parse(&body, SystemTime::now());
    if !parsed.understood {
        log::warn!("a webhook is kept that is not understood event_id={}", parsed.event.id);
    }
    let stored = StoredBody { text: storable(&body), understood: parsed.understood, received_at: Utc::now() };
    let applied = doors.registry.send(ApplyEvent(Arrival { event: parsed.event, body: stored }));
    match tokio::time::timeout(COMMIT_DEADLINE, applied).await {
        Ok(Ok(Ok(_))) => Ok(HttpResponse::build(StatusCode::NO_CONTENT).finish()),
        // The registry has logged what it was. Not even a broken event may be lost by a final answer.
        Ok(Ok(Err(_)) | Err(_)) | Err(_) => Err(ApiError::new(ErrorCode::DatabaseUnavailable, "the event could not be kept now")),
    }
}
