//! The life of a meeting, as LiveKit's events tell it, and which of its tracks are recorded: no clock, no I/O.

pub mod event;
mod glob;
pub mod lifecycle;
pub mod plan;
pub mod reconcile;
pub mod rules;
