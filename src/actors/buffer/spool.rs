//! What waits for the file, in order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use chrono::{DateTime, Utc};

use super::len;
use crate::recording::segment_file::Piece;

/// The most that one append takes: more waits for the next.
pub const MAX_APPEND_BYTES: u64 = 4 << 20;

/// The queue of one track. Bounded by whoever fills it.
#[derive(Default)]
pub struct Spool {
    waiting: VecDeque<Waiting>,
    /// Bytes that it was given for files, ever.
    filed_bytes: u64,
    /// What comes next begins a new segment.
    begins_segment: bool,
}

struct Waiting {
    piece: Piece,
    begins_segment: bool,
    arrived: Instant,
    arrived_at: DateTime<Utc>,
}

/// What one append takes. Kept until it is acknowledged.
#[derive(Clone)]
pub struct Batch {
    pub pieces: Arc<[Piece]>,
    pub arrived: Instant,
    pub arrived_at: DateTime<Utc>,
    /// Bytes of audio, which hold memory.
    pub memory_bytes: u64,
}

impl Spool {
    /// What is only a length grows where it stands: a disk that is full for a day costs no memory.
    pub fn push(&mut self, piece: Piece, arrived: Instant, arrived_at: DateTime<Utc>) {
        self.filed_bytes += piece.file_bytes();
        let begins_segment = std::mem::take(&mut self.begins_segment);
        match (self.waiting.back_mut().map(|last| &mut last.piece), &piece) {
            (Some(Piece::Lost(last)), Piece::Lost(more)) | (Some(Piece::Muted(last)), Piece::Muted(more)) if !begins_segment => *last += more,
            _ => self.waiting.push_back(Waiting { piece, begins_segment, arrived, arrived_at }),
        }
    }

    /// What is pushed next begins a new segment.
    pub fn begin_segment(&mut self) {
        self.begins_segment = true;
    }

    pub fn filed_bytes(&self) -> u64 {
        self.filed_bytes
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether a new segment is to begin before the next batch. Says so once.
    pub fn takes_new_segment(&mut self) -> bool {
        self.waiting.front_mut().is_some_and(|first| std::mem::take(&mut first.begins_segment))
    }

    /// As much as one append takes.
    pub fn next_batch(&mut self) -> Option<Batch> {
        let first = self.waiting.front()?;
        let (arrived, arrived_at) = (first.arrived, first.arrived_at);
        let (mut pieces, mut bytes, mut memory_bytes) = (Vec::new(), 0, 0);
        while bytes < MAX_APPEND_BYTES
            && self.waiting.front().is_some_and(|next| pieces.is_empty() || !next.begins_append())
            && let Some(waiting) = self.waiting.pop_front()
        {
            bytes += waiting.piece.file_bytes();
            if let Piece::Audio(audio) = &waiting.piece {
                memory_bytes += len(audio);
            }
            pieces.push(waiting.piece);
        }
        Some(Batch { pieces: pieces.into(), arrived, arrived_at, memory_bytes })
    }
}

impl Waiting {
    /// Whether it may only be the first of an append.
    fn begins_append(&self) -> bool {
        self.begins_segment || matches!(self.piece, Piece::Missing { .. })
    }
}
