//! The integration tests: the real server as a process, over real sockets.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::as_conversions,
    clippy::wildcard_enum_match_arm,
    reason = "a test that is wrong panics, which is what it is for"
)]

mod analysis;
mod api;
mod autopilot;
mod commands;
mod configuration;
mod crashloop;
mod disk;
mod e2e;
mod fake_livekit_speaks;
mod faults;
mod health;
mod ingest_errors;
mod journal;
mod metrics;
mod recording;
mod sealing;
mod session_lifecycle;
mod shutdown;
mod storage_engines;
mod storage_root;
#[cfg(feature = "fail-points")]
mod supervision;
mod support;
mod tidy;
mod video;
