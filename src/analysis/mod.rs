//! Services that listen, behind one seam.
//!
//! A service differs in its wire alone: [`WireFormat`] says how to open a conversation, how long a slice of speech it takes, what a slice looks
//! like and what a reply means. Connections, queues and time are `HumeClientActor`'s.

pub mod connection;
pub mod gate;
pub mod hume_legacy;
pub mod speech_stream;
pub mod tls;

use std::time::Duration;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WireMessage {
    Text(String),
    Binary(Vec<u8>),
}

/// A stretch of speech for a service: 16 kHz mono s16.
#[derive(Debug, Clone, PartialEq)]
pub struct SpeechSlice {
    /// Where it starts in the connection's audio, in milliseconds.
    pub start_ms: u64,
    pub samples: Vec<i16>,
}

/// The rate that every service here takes, in Hz.
pub const SPEECH_RATE: u32 = 16_000;

impl SpeechSlice {
    pub fn end_ms(&self) -> u64 {
        self.start_ms + u64::try_from(self.samples.len()).unwrap_or(0) * 1000 / u64::from(SPEECH_RATE)
    }
}

/// What a service said of a slice.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// Predictions, each with its stretch in seconds from the slice's start, and names with scores.
    Measured { payload: Option<String>, predictions: Vec<Prediction> },
    /// It found nothing, with its code and words.
    Warning { payload: Option<String>, text: String },
    /// It refused the slice.
    Refused { payload: Option<String>, text: String },
    /// It agreed to something that is no slice.
    Acknowledged,
    /// Not understood.
    Unknown,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    pub begin_s: f64,
    pub end_s: f64,
    pub scores: Vec<(String, f64)>,
}

/// The wire of one service.
pub trait WireFormat: Send + Sync {
    /// The service's name in rows and logs.
    fn service(&self) -> &'static str;

    /// What is measured, in rows.
    fn kind(&self) -> &'static str;

    /// The first message of a connection.
    fn opening(&self) -> Option<WireMessage>;

    /// The longest slice that the service takes.
    fn max_slice(&self) -> Duration;

    /// The header that carries the key.
    fn key_header(&self) -> &'static str;

    /// A slice on the wire, and the payload id that its reply will carry.
    fn encode(&self, slice: &SpeechSlice, payload: &str) -> WireMessage;

    fn decode(&self, text: &[u8]) -> Reply;
}
