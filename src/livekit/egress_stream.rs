//! Facts about the WebSocket that LiveKit's track egress opens (livekit/egress v1.14.1, `pkg/pipeline/sink/websocket.go`).

use serde::Deserialize;

/// The only header by which the egress can be told from other senders.
pub const CONTENT_TYPE: &str = "audio/x-raw";
/// Go's default, since the egress sets none.
pub const USER_AGENT: &str = "Go-http-client/1.1";
/// Bytes of one message: 10 ms of 48 kHz stereo (`gstaudioaggregator.c`, the default output buffer).
pub const FRAME_BYTES: usize = 1_920;
/// Messages per second.
pub const FRAMES_PER_SECOND: u32 = 100;

/// What a text message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextMessage {
    Muted(bool),
    Unknown,
}

/// Reads a text message; whatever is not understood is [`TextMessage::Unknown`].
pub fn parse_text(text: &str) -> TextMessage {
    #[derive(Deserialize)]
    struct Known {
        muted: bool,
    }
    match serde_json::from_str::<Known>(text) {
        Ok(Known { muted }) => TextMessage::Muted(muted),
        Err(_) => TextMessage::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mute_texts_are_understood_and_others_are_not() {
        assert_eq!(parse_text(r#"{"muted":true}"#), TextMessage::Muted(true));
        assert_eq!(parse_text(r#"{ "muted" : false, "new": 1 }"#), TextMessage::Muted(false));
        for unknown in ["", "hello", r#"{"muted":"yes"}"#, r#"{"event":"x"}"#, "[]"] {
            assert_eq!(parse_text(unknown), TextMessage::Unknown, "{unknown}");
        }
    }
}
