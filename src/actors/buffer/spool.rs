//! What waits for the file, in order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use chrono::{DateTime, TimeDelta, Utc};

use super::len;
use crate::audio::format::PcmFormat;
use crate::recording::segment_file::Piece;

/// The most that one append takes, but for the audio at its end: more waits for the next.
pub const MAX_APPEND_BYTES: u64 = 4 << 20;

/// The queue of one track. Bounded by whoever fills it.
#[derive(Default)]
pub struct Spool {
    waiting: VecDeque<Waiting>,
    /// Bytes that it was given for files, ever.
    filed_bytes: u64,
    /// Those of them that an append took.
    taken_bytes: u64,
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

    pub fn taken_bytes(&self) -> u64 {
        self.taken_bytes
    }

    /// Whether silence waits that goes in front of audio.
    pub fn moves_audio(&self) -> bool {
        self.waiting.iter().any(|waiting| matches!(waiting.piece, Piece::Missing { behind, .. } if behind > 0))
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether a new segment is to begin before the next batch. Says so once.
    pub fn takes_new_segment(&mut self) -> bool {
        self.waiting.front_mut().is_some_and(|first| std::mem::take(&mut first.begins_segment))
    }

    /// As much as one append takes. A hole that is longer goes there in parts, so that no segment outgrows its limit by one.
    pub fn next_batch(&mut self, format: PcmFormat) -> Option<Batch> {
        let first = self.waiting.front()?;
        let (arrived, arrived_at) = (first.arrived, first.arrived_at);
        let (mut pieces, mut bytes, mut memory_bytes) = (Vec::new(), 0, 0);
        while bytes < MAX_APPEND_BYTES
            && let Some(next) = self.waiting.front_mut()
            && (pieces.is_empty() || !next.begins_append())
            && let Some(piece) = next.split_off(MAX_APPEND_BYTES - bytes, format).or_else(|| self.waiting.pop_front().map(|next| next.piece))
        {
            bytes += piece.file_bytes();
            if let Piece::Audio(audio) = &piece {
                memory_bytes += len(audio);
            }
            pieces.push(piece);
        }
        self.taken_bytes += bytes;
        Some(Batch { pieces: pieces.into(), arrived, arrived_at, memory_bytes })
    }
}

impl Waiting {
    /// Whether it may only be the first of an append.
    fn begins_append(&self) -> bool {
        self.begins_segment || matches!(self.piece, Piece::Missing { .. })
    }

    /// The beginning of a hole that is longer than `most`; its rest stays, and begins later.
    fn split_off(&mut self, most: u64, format: PcmFormat) -> Option<Piece> {
        let part = format.frames(most).max(1) * format.frame_bytes();
        let first = match &mut self.piece {
            Piece::Lost(bytes) if *bytes > part => {
                *bytes -= part;
                Piece::Lost(part)
            }
            Piece::Missing { bytes, behind } if *bytes > part => {
                *bytes -= part;
                Piece::Missing { bytes: part, behind: *behind }
            }
            Piece::Audio(_) | Piece::Lost(_) | Piece::Missing { .. } | Piece::Muted(_) => return None,
        };
        let time = format.duration(part);
        self.arrived += time;
        self.arrived_at += TimeDelta::from_std(time).unwrap_or_default();
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const FORMAT: PcmFormat = PcmFormat::LIVEKIT;

    fn spool(pieces: impl IntoIterator<Item = Piece>) -> (Spool, DateTime<Utc>) {
        let (mut spool, arrived, arrived_at) = (Spool::default(), Instant::now(), Utc::now());
        for piece in pieces {
            spool.push(piece, arrived, arrived_at);
        }
        (spool, arrived_at)
    }

    #[test]
    fn d7_a_hole_of_hours_goes_to_the_file_in_parts_that_each_say_when_they_began() {
        const EIGHT_HOURS: u64 = 8 * 3_600 * 192_000;
        let missing = |bytes| Piece::Missing { bytes, behind: 192_000 };
        for hole in [Piece::Lost as fn(u64) -> Piece, missing] {
            let (mut spool, began) = spool([hole(EIGHT_HOURS), Piece::Audio(vec![1; 400].into())]);
            let mut before = 0;
            while before < EIGHT_HOURS {
                let batch = spool.next_batch(FORMAT).expect("more");
                let bytes: u64 = batch.pieces.iter().map(Piece::file_bytes).sum();
                assert!((1..=MAX_APPEND_BYTES + 400).contains(&bytes), "{:?}", batch.pieces);
                assert!(
                    batch.pieces.iter().all(|piece| *piece == hole(piece.file_bytes()) || matches!(piece, Piece::Audio(_))),
                    "{:?}",
                    batch.pieces
                );
                // Each part's time is rounded to a nanosecond.
                let late = batch.arrived_at - began - TimeDelta::from_std(FORMAT.duration(before)).expect("hours");
                assert!(late.abs() < TimeDelta::milliseconds(1), "{late} after {before} bytes");
                before += bytes;
            }
            let rest = spool.next_batch(FORMAT).map_or(0, |batch| batch.memory_bytes);
            assert_eq!((before + rest, spool.is_empty()), (EIGHT_HOURS + 400, true));
        }
    }

    #[test]
    fn a_hole_behind_audio_fills_an_append_to_its_most() {
        let (mut spool, _) = spool([Piece::Audio(vec![1; 400].into()), Piece::Lost(MAX_APPEND_BYTES), Piece::Muted(1 << 40)]);
        let shapes = [(); 2].map(|()| spool.next_batch(FORMAT).expect("more").pieces.to_vec());
        assert_eq!(shapes[0][1..], [Piece::Lost(MAX_APPEND_BYTES - 400)]);
        assert_eq!(shapes[1], [Piece::Lost(400), Piece::Muted(1 << 40)], "what takes no room in the file is left whole");
        assert!(spool.next_batch(FORMAT).is_none());
    }

    #[test]
    fn parts_are_whole_frames() {
        let (mut spool, _) = spool([Piece::Audio(vec![1; 2].into()), Piece::Lost(2 * MAX_APPEND_BYTES)]);
        let part = spool.next_batch(FORMAT).expect("a batch").pieces[1].file_bytes();
        assert_eq!((part % 4, part), (0, MAX_APPEND_BYTES - 4));
        assert!(Duration::from_secs(10) < FORMAT.duration(part));
    }
}
