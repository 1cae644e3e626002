//! Pictures that wait for the disk: never cut, bounded in time and memory, and cut into files at key frames.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::actors::buffer::budget::SpoolBudget;
use crate::actors::video_writer::VideoPiece;
use crate::recording::video_stream::Picture;

/// The most that one append takes, but for its last picture.
pub const MAX_APPEND_BYTES: u64 = 1 << 20;
/// The most of a segment: below 2 GiB by more than an append, whose last picture may have 2 MiB.
const MAX_SEGMENT_BYTES: u64 = (1 << 31) - (8 << 20);
/// What a picture takes besides its bytes, in memory and in the file.
const PICTURE_BYTES: u64 = 160;
/// How much of the memory of all tracks those of video may take together: audio has room beside them.
const VIDEO_SHARE: u64 = 2;
/// How much of that one of them may take.
const TRACK_SHARE: u64 = 2;

/// What tracks of video may take of the memory of all tracks.
pub fn video_budget(all: Arc<SpoolBudget>) -> SpoolBudget {
    let bytes = all.total_bytes() / VIDEO_SHARE;
    SpoolBudget::part_of(all, bytes)
}

/// What waits, and what of it is in flight.
pub struct VideoQueue {
    pieces: VecDeque<VideoPiece>,
    budget: Arc<SpoolBudget>,
    /// How long a picture may wait.
    spool: Duration,
    segment_duration: Duration,
    /// Of the budget.
    taken_bytes: u64,
    held: Held,
    /// Of the segment that is written: when its first picture came, and how long it is about.
    segment_since: Option<Instant>,
    segment_bytes: u64,
}

/// How much has been taken in and is in no file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    pub pictures: u64,
    pub bytes: u64,
}

impl Held {
    fn of(picture: &Picture) -> Self {
        Self { pictures: picture.pictures, bytes: u64::try_from(picture.data.len()).unwrap_or(u64::MAX) }
    }
}

/// What one append takes.
#[derive(Clone)]
pub struct Batch {
    pub pieces: Arc<[VideoPiece]>,
    /// Of the budget, which gets them back by [`VideoQueue::settle`].
    pub bytes: u64,
}

impl Drop for VideoQueue {
    fn drop(&mut self) {
        self.budget.give_back(self.taken_bytes);
    }
}

impl VideoQueue {
    pub fn new(budget: Arc<SpoolBudget>, spool: Duration, segment_duration: Duration) -> Self {
        Self {
            pieces: VecDeque::new(),
            budget,
            spool,
            segment_duration,
            taken_bytes: 0,
            held: Held::default(),
            segment_since: None,
            segment_bytes: 0,
        }
    }

    /// Queues a picture, if there is room for it; else notes that it is lost and returns false.
    pub fn push(&mut self, picture: Picture) -> bool {
        let bytes = memory_bytes(&picture);
        let oldest = self.pieces.iter().find_map(VideoPiece::picture).map(|oldest| oldest.arrival.at);
        let in_time = oldest.is_none_or(|oldest| picture.arrival.at.saturating_duration_since(oldest) <= self.spool);
        if in_time && self.taken_bytes + bytes <= self.budget.total_bytes() / TRACK_SHARE && self.budget.take(bytes) {
            self.taken_bytes += bytes;
            let own = Held::of(&picture);
            self.held = Held { pictures: self.held.pictures + own.pictures, bytes: self.held.bytes + own.bytes };
            self.pieces.push_back(VideoPiece::Picture(picture));
            return true;
        }
        match self.pieces.back_mut() {
            // What is only a count grows where it stands: a disk that is full for a day costs no memory.
            Some(VideoPiece::Lost(pictures)) => *pictures += picture.pictures,
            Some(VideoPiece::Picture(_)) | None => self.pieces.push_back(VideoPiece::Lost(picture.pictures)),
        }
        false
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Memory that is held, what is in flight included.
    pub fn taken_bytes(&self) -> u64 {
        self.taken_bytes
    }

    /// Pictures that no file has, and their bytes, what is in flight included.
    pub fn held(&self) -> Held {
        self.held
    }

    /// Takes what the next append writes. Nothing of a queue that is not empty means that the next file is to begin first, by [`Self::begin_segment`].
    pub fn take_batch(&mut self) -> Batch {
        let (mut pieces, mut bytes) = (Vec::new(), 0);
        while bytes < MAX_APPEND_BYTES
            && let Some(piece) = self.pieces.front()
        {
            if let VideoPiece::Picture(picture) = piece {
                if self.segment_ends_before(picture) {
                    break;
                }
                self.segment_since.get_or_insert(picture.arrival.at);
                self.segment_bytes += memory_bytes(picture);
                bytes += memory_bytes(picture);
            }
            pieces.extend(self.pieces.pop_front());
        }
        Batch { pieces: pieces.into(), bytes }
    }

    /// What is taken from now on goes into the next file.
    pub fn begin_segment(&mut self) {
        (self.segment_since, self.segment_bytes) = (None, 0);
    }

    /// A batch that the last file did not take begins the next one.
    pub fn begin_segment_with(&mut self, batch: &Batch) {
        self.segment_since = batch.pieces.iter().find_map(VideoPiece::picture).map(|first| first.arrival.at);
        self.segment_bytes = batch.bytes;
    }

    /// A batch has reached the file.
    pub fn settle(&mut self, batch: &Batch) {
        self.taken_bytes -= batch.bytes;
        for own in batch.pieces.iter().filter_map(VideoPiece::picture).map(Held::of) {
            self.held = Held { pictures: self.held.pictures - own.pictures, bytes: self.held.bytes - own.bytes };
        }
        self.budget.give_back(batch.bytes);
    }

    /// A file that has its length ends at the next key frame; one that would grow too large ends anywhere.
    fn segment_ends_before(&self, picture: &Picture) -> bool {
        let Some(since) = self.segment_since else { return false };
        let is_due = picture.arrival.at.saturating_duration_since(since) >= self.segment_duration;
        (is_due && picture.can_start) || self.segment_bytes >= MAX_SEGMENT_BYTES
    }
}

fn memory_bytes(picture: &Picture) -> u64 {
    u64::try_from(picture.data.len()).unwrap_or(u64::MAX).saturating_add(PICTURE_BYTES)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use chrono::Utc;

    use super::*;
    use crate::recording::video_stream::Arrival;

    const MIB: usize = 1 << 20;

    fn queue(total_bytes: u64) -> VideoQueue {
        VideoQueue::new(Arc::new(video_budget(Arc::new(SpoolBudget::new(total_bytes)))), Duration::from_secs(30), Duration::from_secs(10))
    }

    fn at(start: Instant, second: u64, bytes: usize, can_start: bool) -> Picture {
        let arrival = Arrival { at: start + Duration::from_secs(second), wall: Utc::now() };
        Picture { data: Bytes::from(vec![0; bytes]), time: 0, pictures: 1, can_start, dimensions: None, arrival }
    }

    fn shape(batch: &Batch) -> Vec<(usize, u64)> {
        let of = |piece: &VideoPiece| match piece {
            VideoPiece::Picture(picture) => (picture.data.len(), 0),
            VideoPiece::Lost(pictures) => (0, *pictures),
        };
        batch.pieces.iter().map(of).collect()
    }

    #[test]
    fn what_does_not_fit_is_lost_whole_and_counted_where_it_was() {
        let (mut queue, start) = (queue(4 * 1_000), Instant::now());
        let taken: Vec<bool> = [400, 500, 10, 200].map(|bytes| queue.push(at(start, 0, bytes, false))).into();
        assert_eq!(taken, [true, false, true, false], "a quarter of the budget, 160 bytes besides each");
        assert!(!queue.push(at(start, 0, 900, false)));
        let batch = queue.take_batch();
        assert_eq!(shape(&batch), [(400, 0), (0, 1), (10, 0), (0, 2)]);
        assert!(!queue.push(at(start, 0, 500, false)), "what is in flight holds its room");
        assert_eq!(queue.held(), Held { pictures: 2, bytes: 410 });
        queue.settle(&batch);
        assert!(queue.push(at(start, 0, 500, false)));
        assert_eq!(queue.held(), Held { pictures: 1, bytes: 500 });
        let budget = Arc::clone(&queue.budget);
        drop(queue);
        assert_eq!(budget.used_bytes(), 0);
    }

    #[test]
    fn tracks_of_video_leave_audio_its_half() {
        let all = Arc::new(SpoolBudget::new(4 * 1_000));
        let (budget, start) = (Arc::new(video_budget(Arc::clone(&all))), Instant::now());
        let queues = [(); 4].map(|()| VideoQueue::new(Arc::clone(&budget), Duration::from_secs(30), Duration::from_secs(10)));
        let taken = queues.map(|mut queue| (queue.push(at(start, 0, 840, true)), queue));
        assert_eq!(taken.each_ref().map(|(taken, _)| *taken), [true, true, false, false]);
        assert_eq!(all.used_bytes(), 2_000);
        drop(taken);
        assert_eq!(all.used_bytes(), 0);
    }

    #[test]
    fn no_picture_waits_longer_than_the_spool() {
        let (mut queue, start) = (queue(1 << 30), Instant::now());
        assert!(queue.push(at(start, 0, 10, true)) && queue.push(at(start, 30, 10, true)));
        assert!(!queue.push(at(start, 31, 10, true)));
    }

    #[test]
    fn an_append_takes_about_a_mebibyte() {
        let (mut queue, start) = (queue(1 << 30), Instant::now());
        for _ in 0..3 {
            queue.push(at(start, 0, MIB / 2, false));
        }
        let taken = [queue.take_batch(), queue.take_batch(), queue.take_batch()].map(|batch| batch.pieces.len());
        assert_eq!(taken, [2, 1, 0]);
    }

    #[test]
    fn d7_a_file_ends_before_the_first_key_frame_that_comes_late_enough() {
        let (mut queue, start) = (queue(1 << 30), Instant::now());
        for (second, can_start) in [(0, true), (9, true), (10, false), (12, true), (13, false)] {
            queue.push(at(start, second, second as usize, can_start));
        }
        assert_eq!(shape(&queue.take_batch()), [(0, 0), (9, 0), (10, 0)]);
        assert!(queue.take_batch().pieces.is_empty() && !queue.is_empty(), "the next file is to begin");
        queue.begin_segment();
        assert_eq!(shape(&queue.take_batch()), [(12, 0), (13, 0)]);
    }

    #[test]
    fn d7_a_file_without_key_frames_ends_below_two_gibibytes() {
        let (mut queue, start) = (queue(1 << 34), Instant::now());
        let most = at(start, 0, 2 * MIB, false);
        let mut bytes = 0;
        loop {
            queue.push(most.clone());
            let batch = queue.take_batch();
            if batch.pieces.is_empty() {
                break;
            }
            bytes += 32 + batch.pieces.iter().filter_map(VideoPiece::picture).map(|picture| picture.data.len() as u64 + 12).sum::<u64>();
            queue.settle(&batch);
        }
        assert!((2_000_000_000..1 << 31).contains(&bytes), "{bytes}");
    }
}
