//! When the sender of a track called itself muted: from a mute text to the next unmute text.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::audio::format::PcmFormat;
use crate::audio::gaps::FrameSpan;
use crate::db::rows::MuteSpan;

/// Spans that are kept of one connection: an hour of one every few seconds.
const MAX_SPANS: usize = 1_000;

/// A place in what a connection brings, in bytes of the arriving format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// What came, and what a muted track left out: what its segments count as taken in.
    pub taken_bytes: u64,
    /// What had been filled in by then.
    pub filled_bytes: u64,
}

/// The mute spans of a connection. Written by its track, read by whoever writes its files.
#[derive(Debug, Default)]
pub struct Mutes(Mutex<Vec<(Position, Option<Position>)>>);

impl Mutes {
    /// A text came with the audio at this place. Returns whether it changes anything: LiveKit's values alternate.
    pub fn note(&self, muted: bool, position: Position) -> bool {
        let mut spans = self.spans();
        let is_full = spans.len() >= MAX_SPANS;
        match (muted, spans.last_mut()) {
            // A flood of texts costs no memory: past the bound the last span goes on to the next end.
            (true, Some((_, end @ Some(_)))) if is_full => *end = None,
            (true, None | Some((_, Some(_)))) => spans.push((position, None)),
            (false, Some((_, end @ None))) => *end = Some(position),
            (true, Some((_, None))) | (false, None | Some((_, Some(_)))) => return false,
        }
        true
    }

    /// In frames of the connection. Each file knows by its gaps where they lie in it: a hole may be found only after the text behind it.
    pub fn in_frames(&self, format: PcmFormat) -> Vec<FrameSpan> {
        let frame = |at: Position| format.frames(at.taken_bytes);
        self.spans().iter().map(|(start, end)| (frame(*start), end.map(frame))).collect()
    }

    /// In milliseconds of the recording.
    pub fn in_ms(&self, format: PcmFormat) -> Vec<MuteSpan> {
        let ms = |at: Position| format.frame_ms(format.frames(at.taken_bytes + at.filled_bytes));
        self.spans().iter().map(|(start, end)| MuteSpan { start_ms: ms(*start), end_ms: end.map(ms) }).collect()
    }

    fn spans(&self) -> MutexGuard<'_, Vec<(Position, Option<Position>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
