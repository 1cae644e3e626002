//! What a file leaves out of its track, and what it holds in the place of that.

use serde::{Deserialize, Serialize};

/// A stretch of a segment that holds no audio of the sender, or a place where some was left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gap {
    pub start_frame: u64,
    /// The length: of the hole in the file, or for `muted`, of what the file leaves out.
    pub frames: u64,
    pub reason: GapReason,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum GapReason {
    /// The disk was too slow for too long: the audio is lost, its length is kept.
    Overload,
    /// The sender sent less than the clock says: what it left out is filled with silence.
    Missing,
    /// All-zero audio of a muted track that `recording.mute = "pause"` left out.
    Muted,
}

impl GapReason {
    /// As sidecars name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Overload => "overload",
            Self::Missing => "missing",
            Self::Muted => "muted",
        }
    }
}

/// A stretch of the file during which the sender called itself muted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MutedFrames {
    pub start_frame: u64,
    pub frames: u64,
}

/// A mute span of a connection, in its frames. One without an end goes on.
pub type FrameSpan = (u64, Option<u64>);

/// A hole was made in front of what had been written since: gaps in there move back with it.
pub fn put_in(gaps: &mut Vec<Gap>, start_frame: u64, frames: u64) {
    for gap in gaps.iter_mut().filter(|gap| gap.start_frame >= start_frame) {
        gap.start_frame += frames;
    }
    let index = gaps.partition_point(|gap| gap.start_frame < start_frame);
    // The next part of a hole that is longer than an append, some of which an earlier segment may have.
    let before = index.checked_sub(1).and_then(|before| gaps.get_mut(before));
    if let Some(before) = before.filter(|gap| gap.reason == GapReason::Missing && gap.start_frame + gap.frames >= start_frame) {
        before.frames += frames;
        return;
    }
    gaps.insert(index, Gap { start_frame, frames, reason: GapReason::Missing });
}

/// Frames were left out at the end of what is written, which go on what was left out before.
pub fn leave_out(gaps: &mut Vec<Gap>, start_frame: u64, frames: u64, reason: GapReason) {
    match gaps.last_mut() {
        Some(last) if last.reason == reason && start_frame == last.start_frame + file_frames(last) => last.frames += frames,
        _ => gaps.push(Gap { start_frame, frames, reason }),
    }
}

/// The frames that a gap takes in the file.
fn file_frames(gap: &Gap) -> u64 {
    match gap.reason {
        GapReason::Overload | GapReason::Missing => gap.frames,
        GapReason::Muted => 0,
    }
}

/// The frames of the connection that a file of so many frames took in.
pub fn frames_taken(file_frames: u64, gaps: &[Gap]) -> u64 {
    let of = |reason| gaps.iter().filter(|gap| gap.reason == reason).map(|gap| gap.frames).sum::<u64>();
    (file_frames + of(GapReason::Muted)).saturating_sub(of(GapReason::Missing))
}

/// The silence in front of a file's first frame that came, in frames: a pause right before it, or one that was found only when the file it fell into was full.
pub fn leading_silence(gaps: &[Gap]) -> u64 {
    let missing = gaps.iter().filter(|gap| gap.reason == GapReason::Missing);
    missing.fold(0, |silence, gap| if gap.start_frame == silence { silence + gap.frames } else { silence })
}

/// The mute spans of a connection as far as they lie in a file. Spans count in the connection's frames, of which the file's first is `first`; one without an
/// end goes on.
pub fn muted_in_file(spans: &[FrameSpan], first: u64, file_frames: u64, gaps: &[Gap]) -> Vec<MutedFrames> {
    let in_file = |frame: u64| file_frame(frame.saturating_sub(first), gaps).min(file_frames);
    let clipped = spans.iter().map(|(start, end)| (in_file(*start), end.map_or(file_frames, in_file)));
    clipped.filter(|(start, end)| start < end).map(|(start, end)| MutedFrames { start_frame: start, frames: end - start }).collect()
}

/// Where a frame of the connection, counted from the file's first, lies in the file: silence that was left out moves it forward, silence that was filled in
/// moves it back.
fn file_frame(frame: u64, gaps: &[Gap]) -> u64 {
    let (mut left_out, mut filled) = (0, 0);
    for gap in gaps {
        let begins = (gap.start_frame + left_out).saturating_sub(filled);
        if frame <= begins {
            break;
        }
        match gap.reason {
            GapReason::Overload => {}
            GapReason::Missing => filled += gap.frames,
            GapReason::Muted => left_out += gap.frames.min(frame - begins),
        }
    }
    (frame + filled).saturating_sub(left_out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(start_frame: u64, frames: u64, reason: GapReason) -> Gap {
        Gap { start_frame, frames, reason }
    }

    fn muted(start_frame: u64, frames: u64) -> MutedFrames {
        MutedFrames { start_frame, frames }
    }

    #[test]
    fn mute_spans_are_cut_to_the_file() {
        let spans = [(10, Some(20)), (90, Some(110)), (150, Some(160)), (190, None)];
        assert_eq!(muted_in_file(&spans, 0, 100, &[]), [muted(10, 10), muted(90, 10)]);
        assert_eq!(muted_in_file(&spans, 100, 100, &[]), [muted(0, 10), muted(50, 10), muted(90, 10)]);
        assert_eq!(muted_in_file(&spans, 200, 5, &[]), [muted(0, 5)]);
    }

    #[test]
    fn what_is_left_out_or_filled_in_moves_what_comes_behind_it() {
        // 30 frames are left out behind 15, 50 filled in at 60 of the file.
        let gaps = [gap(5, 3, GapReason::Overload), gap(15, 30, GapReason::Muted), gap(60, 50, GapReason::Missing)];
        assert_eq!((frames_taken(200, &gaps), leading_silence(&gaps)), (180, 0));
        let spans = [(10, Some(45)), (20, Some(40)), (80, Some(95))];
        assert_eq!(muted_in_file(&spans, 0, 200, &gaps), [muted(10, 5), muted(50, 65)]);
    }

    #[test]
    fn a_file_that_begins_with_what_was_missing_begins_before_its_audio() {
        let gaps = [gap(0, 30, GapReason::Missing), gap(30, 5, GapReason::Muted), gap(30, 20, GapReason::Missing), gap(90, 7, GapReason::Missing)];
        assert_eq!((leading_silence(&gaps), frames_taken(100, &gaps)), (50, 48));
        assert_eq!(muted_in_file(&[(10, None)], 0, 100, &gaps), [muted(55, 45)]);
    }
}
