//! The life of a meeting, as LiveKit's events tell it: no clock, no I/O.

pub mod event;
pub mod lifecycle;
