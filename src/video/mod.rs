//! Compressed pictures: what can be said of them without decoding. No clock, no I/O.

pub mod annex_b;
pub mod codec;
pub mod key_frame;
