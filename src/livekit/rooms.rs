//! Asks LiveKit's server API something harmless, to find out whether its address and credentials are right.

use std::time::Duration;

use livekit_api::services::ServiceError;
use livekit_api::services::room::RoomClient;

/// How long a deployment may take to answer `ListRooms`.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The number of rooms that are open now.
///
/// # Errors
/// What LiveKit or the network answered, in words.
pub async fn count(url: &str, api_key: &str, api_secret: &str) -> Result<usize, ServiceError> {
    let client = RoomClient::with_api_key(url, api_key, api_secret).with_failover(false).with_request_timeout(TIMEOUT);
    Ok(client.list_rooms(Vec::new()).await?.len())
}
