//! What becomes of the time in which a sender sent nothing.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use chrono::{DateTime, TimeDelta, Utc};

use super::BufferActor;
use crate::audio::sample_clock::Verdict;
use crate::config::MuteMode;
use crate::recording::segment_file::Piece;

impl BufferActor {
    /// What the time says of the batch that is about to be recorded.
    pub(super) fn before(&mut self, verdict: Verdict, arrived: Instant, arrived_at: DateTime<Utc>) {
        match verdict {
            Verdict::OnTime | Verdict::Lacks(_) => {}
            Verdict::MayLack => self.mark_hole(),
            Verdict::LacksAgain(frames) => {
                self.fill(frames, arrived, arrived_at);
                self.mark_hole();
            }
            Verdict::Silent(frames) => {
                log::warn!(
                    "a sender has been silent for long: its next segment begins seconds={}",
                    frames / u64::from(self.params.format.sample_rate)
                );
                self.spool.begin_segment();
                let groups = self.params.grouper.skip(frames);
                self.hand_on(groups);
            }
        }
    }

    fn mark_hole(&mut self) {
        self.hole_at = self.spool.filed_bytes();
        self.hole_is_muted = self.muted && self.params.mute == MuteMode::Pause;
    }

    /// Puts silence where the sender left something out, which was found out only now.
    pub(super) fn fill(&mut self, frames: u64, arrived: Instant, arrived_at: DateTime<Utc>) {
        let bytes = frames * self.params.format.frame_bytes();
        let groups = self.params.grouper.skip(frames);
        self.hand_on(groups);
        if self.hole_is_muted {
            self.params.stats.left_out_frames.fetch_add(frames, Relaxed);
            return self.spool.push(Piece::Muted(bytes), arrived, arrived_at);
        }
        log::warn!("a sender left something out: it is filled with silence ms={}", self.params.format.frame_ms(frames));
        self.params.stats.filled_frames.fetch_add(frames, Relaxed);
        let behind = self.spool.filed_bytes() - self.hole_at;
        // A segment that begins with it began so much earlier.
        let began = arrived_at - TimeDelta::from_std(self.params.format.duration_of_frames(frames)).unwrap_or_default();
        self.spool.push(Piece::Missing { bytes, behind }, arrived, began);
    }
}
