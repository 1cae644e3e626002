//! Who may call what.

use actix_web::body::{EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header;
use actix_web::middleware::Next;
use actix_web::{Error, ResponseError, web};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::Doors;
use super::error::ApiError;

/// Lets through what carries the admin key as a bearer token.
///
/// # Errors
/// What the inner service says.
pub async fn require_admin(request: ServiceRequest, next: Next<impl MessageBody>) -> Result<ServiceResponse<EitherBody<impl MessageBody>>, Error> {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).map(str::trim);
    let expected = request.app_data::<web::Data<Doors>>().map(|doors| doors.admin_key.clone());
    let allowed = given.zip(expected.as_ref()).is_some_and(|(given, expected)| same(given, expected.expose()));
    if allowed {
        next.call(request).await.map(ServiceResponse::map_into_left_body)
    } else {
        let response = ApiError::unauthorized().error_response();
        Ok(request.into_response(response).map_into_right_body())
    }
}

/// Compares digests, so that neither content nor length shows in the time it takes.
fn same(given: &str, expected: &str) -> bool {
    bool::from(Sha256::digest(given).as_slice().ct_eq(Sha256::digest(expected).as_slice()))
}
