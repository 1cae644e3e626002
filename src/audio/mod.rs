//! Arithmetic on audio: no clock, no I/O.
//!
//! A *sample* is one `i16`, a *frame* one sample per channel, a *group* what analysis gets at once.

pub mod drift;
pub mod format;
pub mod gaps;
pub mod level;
pub mod mixdown;
pub mod rate_judge;
pub mod resample;
pub mod sample_clock;
pub mod window;
