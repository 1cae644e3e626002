//! The one error envelope: RFC 9457 problem details with a closed set of codes.

use std::fmt;

use actix_web::http::{StatusCode, header};
use actix_web::{HttpResponse, ResponseError};
use serde_json::{Map, Value, json};

use crate::db::DbError;

/// What can be wrong. Status and wire name follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorCode {
    InvalidRequest,
    Unauthorized,
    NotFound,
    MethodNotAllowed,
    RequestTimeout,
    BodyIncomplete,
    TrackIsLive,
    ManySegments,
    /// What cannot be recorded by its nature.
    NotRecordable,
    /// No egress is started here.
    AutopilotOff,
    NotUnderstood,
    PayloadTooLarge,
    PreconditionFailed,
    RangeNotSatisfiable,
    StorageUnavailable,
    /// Less is free than `storage.min_free` asks for.
    StorageLow,
    DatabaseUnavailable,
    ShuttingDown,
    Internal,
}

impl ErrorCode {
    pub fn status(self) -> StatusCode {
        match self {
            Self::InvalidRequest => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::TrackIsLive | Self::ManySegments | Self::NotRecordable | Self::AutopilotOff | Self::NotUnderstood => StatusCode::CONFLICT,
            Self::PayloadTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::PreconditionFailed => StatusCode::PRECONDITION_FAILED,
            Self::RangeNotSatisfiable => StatusCode::RANGE_NOT_SATISFIABLE,
            Self::StorageLow => StatusCode::INSUFFICIENT_STORAGE,
            // The response adds Retry-After.
            Self::BodyIncomplete | Self::StorageUnavailable | Self::DatabaseUnavailable | Self::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalidRequest",
            Self::Unauthorized => "unauthorized",
            Self::NotFound => "notFound",
            Self::MethodNotAllowed => "methodNotAllowed",
            Self::RequestTimeout => "requestTimeout",
            Self::BodyIncomplete => "bodyIncomplete",
            Self::TrackIsLive => "trackIsLive",
            Self::ManySegments => "manySegments",
            Self::NotRecordable => "notRecordable",
            Self::AutopilotOff => "autopilotOff",
            Self::NotUnderstood => "notUnderstood",
            Self::PayloadTooLarge => "payloadTooLarge",
            Self::PreconditionFailed => "preconditionFailed",
            Self::RangeNotSatisfiable => "rangeNotSatisfiable",
            Self::StorageUnavailable => "storageUnavailable",
            Self::StorageLow => "storageLow",
            Self::DatabaseUnavailable => "databaseUnavailable",
            Self::ShuttingDown => "shuttingDown",
            Self::Internal => "internal",
        }
    }
}

/// A problem as the client sees it.
#[derive(Debug)]
pub struct ApiError {
    code: ErrorCode,
    detail: String,
    /// Further members of the document.
    more: Map<String, Value>,
}

impl ApiError {
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), more: Map::new() }
    }

    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// Adds a member to the document.
    #[must_use]
    pub fn with(mut self, name: &str, value: Value) -> Self {
        self.more.insert(name.to_owned(), value);
        self
    }

    /// The same text for every reason, so that nobody learns which.
    pub fn unauthorized() -> Self {
        Self::new(ErrorCode::Unauthorized, "valid credentials are required")
    }

    pub fn not_found(what: &str) -> Self {
        Self::new(ErrorCode::NotFound, format!("there is no such {what}"))
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.as_str(), self.detail)
    }
}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.code.status()
    }

    fn error_response(&self) -> HttpResponse {
        let status = self.status_code();
        let mut document = json!({
            "type": "about:blank",
            "title": status.canonical_reason().unwrap_or("Error"),
            "status": status.as_u16(),
            "code": self.code.as_str(),
            "detail": self.detail,
        });
        if let Some(members) = document.as_object_mut() {
            members.extend(self.more.clone());
        }
        let mut response = HttpResponse::build(status);
        response.content_type("application/problem+json");
        match status {
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::INSUFFICIENT_STORAGE => response.insert_header((header::RETRY_AFTER, "2")),
            StatusCode::UNAUTHORIZED => response.insert_header((header::WWW_AUTHENTICATE, "Bearer")),
            _ => &mut response,
        };
        response.body(document.to_string())
    }
}

impl From<DbError> for ApiError {
    fn from(error: DbError) -> Self {
        if error.is_retryable() {
            log::warn!("a request found no database error={error}");
            return Self::new(ErrorCode::DatabaseUnavailable, "the database does not answer now");
        }
        log::error!("a request failed error={error}");
        Self::new(ErrorCode::Internal, "an internal error, which the log explains")
    }
}

impl From<actix::MailboxError> for ApiError {
    fn from(error: actix::MailboxError) -> Self {
        log::error!("a request found no registry error={error}");
        Self::new(ErrorCode::Internal, "an internal error, which the log explains")
    }
}
