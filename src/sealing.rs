//! What is known of a finished file, as its sidecar and as its row: the same, but for what each is for.

pub mod hasher;
pub mod recovery;

use chrono::{DateTime, Utc};

use crate::audio::format::PcmFormat;
use crate::audio::gaps::Gap;
use crate::db::rows::seals::{Seal, SegmentInContext};
use crate::db::rows::{ClosedSegment, EndReason};
use crate::ids::SegmentId;
use crate::recording::path::SegmentName;
use crate::recording::sidecar::{self, MediaFormat, Sidecar, SidecarGap};

/// Where a file comes from, which its row knows by its recording.
#[derive(Debug, Clone)]
pub struct Origin {
    pub name: SegmentName,
    /// Without a directory.
    pub file: String,
    pub format: MediaFormat,
    pub started_at: DateTime<Utc>,
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
        gaps: closed.gaps.iter().map(SidecarGap::from).collect(),
        mute_spans: closed.seal.mute_spans.clone(),
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
            mute_spans: sidecar.mute_spans.clone(),
        },
    }
}

/// The sidecar of a finished file that has none, by its row: it was finished before there were any, or the disk was full then.
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
            mute_spans: seal.and_then(|seal| serde_json::from_str(&seal.mute_spans).ok()).unwrap_or_default(),
        },
    };
    let file = segment.path.rsplit('/').next().unwrap_or_default().to_owned();
    let name = SegmentName { meeting: meeting_id, room: room_name, participant, track: segment.track_sid };
    sidecar_of(&closed, Origin { name, file, format, started_at: segment.started_at.and_utc() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audio::gaps::{GapReason, MutedFrames};

    fn gap(start_frame: u64, frames: u64, reason: GapReason) -> Gap {
        Gap { start_frame, frames, reason }
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
                mute_spans: vec![MutedFrames { start_frame: 1, frames: 5 }],
            },
        };
        let name = SegmentName { meeting: "RM".into(), room: "room".into(), participant: None, track: None };
        let origin = Origin { name, file: "x.wav".into(), format: MediaFormat::Wav, started_at: DateTime::UNIX_EPOCH };
        let sidecar = sidecar_of(&closed, origin);
        let again = closed_by(SegmentId::new("1"), &sidecar);
        assert_eq!(format!("{closed:?}"), format!("{again:?}"));
    }
}
