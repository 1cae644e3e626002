//! A media server that stands beside LiveKit: it records every track, remembers every meeting, and streams the audio to analysis.
//!
//! ```text
//! AUDIO                                             SESSION
//! LiveKit egress (WebSocket, PCM)                   LiveKit server (signed webhook)
//!   │                                                 │
//!   ▼ http::egress_socket     protocol adapter        ▼ http::webhook          verify, commit, acknowledge
//!   │  http::ws_guard         bounded framing         │  livekit::webhook      raw body -> SessionEvent
//!   ▼ actors::track           TrackActor              ▼ actors::session_registry   SessionRegistry
//!   │  actors::track::phase   pure state              │  session::lifecycle    pure: SessionEvent -> Change
//!   ▼ actors::buffer          BufferActor             └──▶ db                  event and effects in one transaction
//!   │  audio::window          pure slicing
//!   ├──▶ actors::wav_writer   ─▶ recording::segment_file ─▶ storage/   a bounded spool; past it, a recorded gap
//!   │     actors::track::rows ─▶ db                       rows follow
//!   └──▶ actors::hume_client  ─▶ analysis::hume_legacy ─▶ db           drops and counts: never slows audio
//! ```
//!
//! `docs/ARCHITECTURE.md` walks through it.

#![expect(clippy::duplicate_mod, reason = "db/queries is compiled once for each engine")]
#![cfg_attr(test, allow(clippy::as_conversions, reason = "tests make their samples by arithmetic that they know the bounds of"))]

pub mod app;
pub mod cli;
pub mod config;

pub mod http;

pub mod actors;
pub mod audio;
pub mod session;
pub mod video;

pub mod recording;
pub mod sealing;

pub mod analysis;
pub mod livekit;

pub mod db;
pub mod journal;

pub mod clock;
pub mod fail_point;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod ids;
pub mod keys;
pub mod metrics;
pub mod ticket;
pub mod watchdog;
