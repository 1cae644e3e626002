//! What LiveKit really sends and does. The only user of `livekit-api`.

pub mod api;
pub mod egress_stream;
pub mod scrub;
pub mod webhook;
