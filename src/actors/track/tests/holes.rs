//! Holes that are longer than any file.

use std::os::unix::fs::FileExt;

use super::*;
use crate::actors::buffer::MAX_GAPS;
use crate::audio::gaps::Gap;
use crate::recording::wav_header;

/// Gives the buffer of a track a hole of any length.
#[derive(Message)]
#[rtype(result = "()")]
struct Lose(Piece);

impl Handler<Lose> for TrackActor {
    type Result = ();

    fn handle(&mut self, Lose(hole): Lose, _: &mut Context<Self>) {
        self.children.as_ref().expect("children").buffer.addr().try_send(crate::actors::buffer::tests::Queue(hole)).expect("it has room");
    }
}

#[actix_rt::test]
async fn d7_a_hole_of_hours_goes_on_in_segments_below_their_limit() {
    const HOLE: u64 = 5 << 30;
    for hole in [Piece::Lost(HOLE), Piece::Missing { bytes: HOLE, behind: 4_000 }] {
        let stage = Stage::set_with(Duration::from_secs(24 * 3_600)).await;
        let mut track = stage.track("TR_1").await;
        track.send(40_000).await;
        track.until_written().await;
        track.addr.send(Lose(hole.clone())).await.expect("the track lives");
        track.send(4_000).await;
        track.until("all of it is written", |stats| stats.recorded_bytes.load(Relaxed) == HOLE + 44_000).await;
        track.finish().await;
        let (_, segments) = stage.rows("TR_1", |segments| segments.len() == 3 && segments.iter().all(|s| s.end_reason.is_some())).await;
        assert_eq!(reasons(&segments), ["rotated", "rotated", "closed"], "{hole:?}");
        let (mut all, mut lost) = (0, 0);
        for segment in &segments {
            let path = stage.dir.path().join("audio").join(&segment.path);
            let mut header = [0; 44];
            std::fs::File::open(&path).expect("a file").read_exact_at(&mut header, 0).expect("a header");
            let declared = wav_header::declared(&header).expect("of ours").1;
            let length = std::fs::metadata(&path).expect("a file").len();
            assert!(length < 1 << 31, "{length}");
            assert_eq!((declared, length), (segment.bytes as u64, 44 + segment.bytes as u64), "{hole:?}: header, file and row say the same");
            let gaps: Vec<Gap> = serde_json::from_str(&segment.gaps).expect("gaps");
            assert_eq!(gaps.len(), 1, "one hole in each: {gaps:?}");
            all += segment.bytes as u64;
            lost += 4 * gaps[0].frames;
        }
        assert_eq!((all, lost), (HOLE + 44_000, HOLE), "{hole:?}");
        let seconds = |later: &SegmentRow, earlier: &SegmentRow| (later.started_at - earlier.started_at).num_seconds();
        if matches!(hole, Piece::Lost(_)) {
            // Each begins where the one before it ends.
            let played = segments[1].bytes / 192_000;
            assert!((seconds(&segments[2], &segments[1]) - played).abs() <= 1, "{segments:?}");
        }
    }
}

#[actix_rt::test]
async fn a_segment_with_as_many_gaps_as_are_told_is_followed_by_the_next_and_no_sample_is_lost() {
    let stage = Stage::set().await;
    let mut track = stage.track("TR_1").await;
    track.send(4_000).await;
    for pair in 1..=MAX_GAPS as u64 / 2 + 1 {
        for hole in [Piece::Muted(400), Piece::Lost(4)] {
            track.addr.send(Lose(hole)).await.expect("the track lives");
        }
        track.until("it is written", |stats| stats.recorded_bytes.load(Relaxed) == 4_000 + 4 * pair).await;
    }
    track.finish().await;
    let (_, segments) = stage.rows("TR_1", |segments| segments.len() == 2 && segments.iter().all(|s| s.end_reason.is_some())).await;
    assert_eq!(reasons(&segments), ["rotated", "closed"]);
    let gaps: Vec<Vec<Gap>> = segments.iter().map(|segment| serde_json::from_str(&segment.gaps).expect("gaps")).collect();
    assert_eq!(gaps.iter().map(Vec::len).collect::<Vec<_>>(), [MAX_GAPS, 2]);
    assert_eq!(gaps.iter().flatten().map(|gap| gap.frames).sum::<u64>(), 101 * (MAX_GAPS as u64 / 2 + 1));
    let holes = vec![0; 2 * MAX_GAPS + 4];
    assert!(stage.audio(&segments) == [track.sent.clone(), holes].concat());
}
