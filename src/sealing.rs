//! What is known of a finished file, as its sidecar and as its row: the same, but for what each is for.

pub mod hasher;
pub mod recovery;

use chrono::{DateTime, Utc};

use crate::audio::format::PcmFormat;
use crate::db::rows::seals::{Seal, SegmentInContext};
use crate::db::rows::{ClosedSegment, EndReason, Gap, GapReason};
use crate::ids::SegmentId;
use crate::recording::path::SegmentName;
use crate::recording::sidecar::{self, MediaFormat, MutedFrames, Sidecar, SidecarGap};

/// Where a file comes from, which its row knows by its recording.
#[derive(Debug, Clone)]
pub struct Origin {
    pub name: SegmentName,
    /// Without a directory.
    pub file: String,
    pub format: MediaFormat,
    pub started_at: DateTime<Utc>,
    pub mute_spans: Vec<MutedFrames>,
}

/// From the start of its session to a file's first sample. Clocks may differ: LiveKit's says when a session began.
pub fn session_offset_ms(started_at: DateTime<Utc>, session_started_at: Option<DateTime<Utc>>) -> Option<i64> {
    session_started_at.map(|session| (started_at - session).num_milliseconds())
}

/// The sidecar of a segment whose row ends like this.
pub fn sidecar_of(closed: &ClosedSegment, origin: Origin) -> Sidecar {
    let is_sound = origin.format == MediaFormat::Wav;
    Sidecar {
        version: sidecar::VERSION,
        file: origin.file,
        segment_id: Some(closed.id.clone()),
        meeting_id: Some(origin.name.meeting),
        room_name: Some(origin.name.room),
        participant: origin.name.participant,
        track_sid: origin.name.track,
        format: origin.format,
        sample_rate: is_sound.then_some(closed.format.sample_rate),
        channels: is_sound.then_some(closed.format.channels),
        width: closed.seal.width,
        height: closed.seal.height,
        frames: closed.frames,
        bytes: closed.bytes,
        started_at: origin.started_at,
        ended_at: closed.ended_at,
        session_offset_ms: closed.seal.session_offset_ms,
        drift_ppm: closed.seal.drift_ppm,
        gaps: closed.gaps.iter().map(told_gap).collect(),
        mute_spans: origin.mute_spans,
        end_reason: closed.reason.as_str().to_owned(),
        recovered: closed.seal.recovered,
        suspect: closed.seal.suspect,
        tail_unverified_ms: closed.seal.tail_unverified_ms,
        sha256: closed.seal.sha256.clone(),
    }
}

/// How the row of a segment ends whose file has a sidecar.
pub fn closed_by(id: SegmentId, sidecar: &Sidecar) -> ClosedSegment {
    let word = |text: &str| serde_json::Value::String(text.to_owned());
    let gap = |gap: &SidecarGap| {
        let reason = serde_json::from_value(word(&gap.reason)).ok()?;
        Some(Gap { start_frame: gap.start_frame, frames: gap.frames, reason })
    };
    ClosedSegment {
        id,
        format: sidecar.pcm_format().unwrap_or(PcmFormat { sample_rate: 0, channels: 0 }),
        frames: sidecar.frames,
        bytes: sidecar.bytes,
        ended_at: sidecar.ended_at,
        // A later version's word is no reason to have none.
        reason: serde_json::from_value(word(&sidecar.end_reason)).unwrap_or(EndReason::Crashed),
        gaps: sidecar.gaps.iter().filter_map(gap).collect(),
        seal: Seal {
            recovered: sidecar.recovered,
            suspect: sidecar.suspect,
            tail_unverified_ms: sidecar.tail_unverified_ms,
            session_offset_ms: sidecar.session_offset_ms,
            drift_ppm: sidecar.drift_ppm,
            sha256: sidecar.sha256.clone(),
            width: sidecar.width,
            height: sidecar.height,
        },
    }
}

/// The sidecar of a finished file that has none, by its row: it was finished before there were any, or the disk was full then. Mute spans are the track's.
pub fn sidecar_by_row(row: SegmentInContext, format: MediaFormat, ended_at: DateTime<Utc>) -> Sidecar {
    let SegmentInContext { segment, meeting_id, room_name, participant, session_started_at: _, seal } = row;
    let seal = seal.as_ref();
    let count = |number: i64| u64::try_from(number).unwrap_or_default();
    let size = |number: i32| u32::try_from(number).ok();
    let closed = ClosedSegment {
        id: SegmentId::new(segment.id),
        format: PcmFormat {
            sample_rate: u32::try_from(segment.sample_rate).unwrap_or_default(),
            channels: u16::try_from(segment.channels).unwrap_or_default(),
        },
        frames: count(segment.frames),
        bytes: count(segment.bytes),
        ended_at,
        reason: segment.end_reason.and_then(|reason| serde_json::from_value(reason.into()).ok()).unwrap_or(EndReason::Crashed),
        gaps: serde_json::from_str(&segment.gaps).unwrap_or_default(),
        seal: Seal {
            recovered: seal.is_some_and(|seal| seal.recovered),
            suspect: seal.is_some_and(|seal| seal.suspect),
            tail_unverified_ms: seal.map_or(0, |seal| count(seal.tail_unverified_ms)),
            session_offset_ms: seal.and_then(|seal| seal.session_offset_ms),
            drift_ppm: seal.and_then(|seal| seal.drift_ppm),
            sha256: None,
            width: seal.and_then(|seal| seal.width).and_then(size),
            height: seal.and_then(|seal| seal.height).and_then(size),
        },
    };
    let file = segment.path.rsplit('/').next().unwrap_or_default().to_owned();
    let name = SegmentName { meeting: meeting_id, room: room_name, participant, track: segment.track_sid };
    sidecar_of(&closed, Origin { name, file, format, started_at: segment.started_at.and_utc(), mute_spans: Vec::new() })
}

fn told_gap(gap: &Gap) -> SidecarGap {
    let reason = match gap.reason {
        GapReason::Overload => "overload",
        GapReason::Missing => "missing",
        GapReason::Muted => "muted",
    };
    SidecarGap { start_frame: gap.start_frame, frames: gap.frames, reason: reason.to_owned() }
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
pub fn muted_in_file(spans: &[(u64, Option<u64>)], first: u64, file_frames: u64, gaps: &[Gap]) -> Vec<MutedFrames> {
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

    #[test]
    fn a_row_that_is_closed_by_a_sidecar_says_the_same() {
        let closed = ClosedSegment {
            id: SegmentId::new("1"),
            format: PcmFormat::LIVEKIT,
            frames: 10,
            bytes: 40,
            ended_at: DateTime::UNIX_EPOCH,
            reason: EndReason::TicketSpent,
            gaps: vec![gap(1, 2, GapReason::Overload), gap(3, 4, GapReason::Missing), gap(5, 6, GapReason::Muted)],
            seal: Seal {
                recovered: true,
                suspect: true,
                tail_unverified_ms: 7,
                session_offset_ms: Some(-8),
                drift_ppm: Some(9.5),
                sha256: Some("ab".to_owned()),
                width: None,
                height: None,
            },
        };
        let name = SegmentName { meeting: "RM".into(), room: "room".into(), participant: None, track: None };
        let origin = Origin { name, file: "x.wav".into(), format: MediaFormat::Wav, started_at: DateTime::UNIX_EPOCH, mute_spans: Vec::new() };
        let sidecar = sidecar_of(&closed, origin);
        let again = closed_by(SegmentId::new("1"), &sidecar);
        assert_eq!(format!("{closed:?}"), format!("{again:?}"));
    }
}
