//! Bodies with a size limit and a deadline: actix limits the time of a request's head, but not of its body (`docs/FACTS.md`, F12).

use std::time::Duration;

use actix_web::http::header;
use actix_web::{HttpRequest, web};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use super::error::{ApiError, ErrorCode};

/// Of the admin API.
const JSON_BYTES: usize = 256 << 10;
const JSON_DEADLINE: Duration = Duration::from_secs(30);

/// Why a body was not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyError {
    TooLarge,
    TooSlow,
    /// The sender went, or broke HTTP.
    Broken,
}

/// # Errors
/// See [`BodyError`].
pub async fn read(request: &HttpRequest, payload: web::Payload, max_bytes: usize, deadline: Duration) -> Result<Bytes, BodyError> {
    // What is too large by its own word need not come, which could take longer than the deadline.
    let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if declared.is_some_and(|length| length > max_bytes) {
        return Err(BodyError::TooLarge);
    }
    tokio::time::timeout(deadline, collect(payload, max_bytes)).await.unwrap_or(Err(BodyError::TooSlow))
}

async fn collect(mut payload: web::Payload, max_bytes: usize) -> Result<Bytes, BodyError> {
    let mut body = BytesMut::new();
    while let Some(chunk) = payload.next().await {
        let chunk = chunk.map_err(|_| BodyError::Broken)?;
        if body.len() + chunk.len() > max_bytes {
            return Err(BodyError::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

/// # Errors
/// A problem for the client: too large, too slow, or not what is expected.
pub async fn read_json<T: DeserializeOwned>(request: &HttpRequest, payload: web::Payload) -> Result<T, ApiError> {
    let body = read(request, payload, JSON_BYTES, JSON_DEADLINE).await.map_err(|error| match error {
        BodyError::TooLarge => ApiError::new(ErrorCode::PayloadTooLarge, format!("a body may have at most {JSON_BYTES} bytes")),
        BodyError::TooSlow => ApiError::new(ErrorCode::RequestTimeout, format!("a body may take at most {} s", JSON_DEADLINE.as_secs())),
        BodyError::Broken => ApiError::new(ErrorCode::InvalidRequest, "the body did not arrive whole"),
    })?;
    serde_json::from_slice(&body).map_err(|error| ApiError::new(ErrorCode::InvalidRequest, format!("the body is not as expected: {error}")))
}
