//! The queries, compiled once for each engine: `Connection`, `transaction!` and `insert_new!` are the engine's.

use super::{Backend, Connection};

pub mod changes;
pub mod egresses;
pub mod events;
pub mod measurements;
pub mod probe;
pub mod recordings;
pub mod seals;
pub mod segments;
pub mod sessions;
pub mod tracks;
