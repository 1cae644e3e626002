//! Rows whose way is blocked, or whose file is.

use tempfile::TempDir;

use super::*;
use crate::audio::format::PcmFormat;
use crate::config::DatabaseUrl;
use crate::db::rows::seals::Seal;
use crate::db::rows::{EndReason, MuteSpan, SegmentRow};
use crate::journal::replay;
use crate::recording::path::SegmentName;
use crate::recording::root::Root;
use crate::recording::segment_file::{Piece, SegmentFile};
use crate::recording::sidecar::{Sidecar, draft_of};
use crate::recording::syncer::Syncer;

const PATIENCE: Duration = Duration::from_secs(20);

struct Stage {
    dir: TempDir,
    store: Store,
    journal: Journal,
    root: Root,
    rows: RowLog,
}

impl Stage {
    async fn set() -> Self {
        let dir = TempDir::new().expect("a directory");
        let store = Store::open(&DatabaseUrl::Sqlite(dir.path().join("test.db")), 1).await.expect("a store");
        let journal = Journal::open(dir.path(), 1 << 20).expect("a journal");
        let (told, _spent) = oneshot::channel();
        let root = Root::open(&dir.path().join("audio")).expect("a root");
        let rows = RowLog::start(store.clone(), journal.clone(), root.clone(), identity("TR_1"), None, told, &Watchdog::default());
        Self { dir, store, journal, root, rows }
    }

    /// The row of a segment, when `ready` likes it. What a slow disk has sent to the journal follows meanwhile.
    async fn row(&self, id: &SegmentId, ready: impl Fn(&SegmentRow) -> bool) -> SegmentRow {
        let found = async {
            loop {
                if let Some(row) = self.store.segment(id.clone()).await.expect("rows").filter(&ready) {
                    return row;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = replay::run(self.journal.clone(), self.store.clone(), Box::new(|_| Box::pin(async {}))) => unreachable!("it never ends"),
            found = tokio::time::timeout(PATIENCE, found) => found.expect("its row is ready"),
        }
    }

    /// How a segment has ended, when it has.
    async fn ended(&self, id: &SegmentId) -> SegmentRow {
        self.row(id, |row| row.ended_at.is_some()).await
    }

    /// A segment of a thousand frames whose writer died.
    fn written(&self) -> OpenedSegment {
        let name = SegmentName { meeting: "RM".into(), room: "room".into(), participant: None, track: Some("TR_1".into()) };
        let first = [Piece::Audio(vec![7; 4_000].into())];
        let file =
            SegmentFile::create(&self.root, &name, Utc::now(), PcmFormat::LIVEKIT, &first, &Syncer::start().expect("threads")).expect("a segment");
        opened(&file.relative_path().to_string_lossy())
    }
}

fn identity(sid: &str) -> TrackIdentity {
    let (meeting, room, track) = (MeetingId::new("RM"), RoomName::new("room"), Some(TrackSid::new(sid)));
    TrackIdentity { meeting, room, participant: None, track, session_started_at: None }
}

fn opened(path: &str) -> OpenedSegment {
    OpenedSegment { id: SegmentId::fresh(), path: path.to_owned(), format: PcmFormat::LIVEKIT, started_at: Utc::now() }
}

fn closed(id: &SegmentId) -> ClosedSegment {
    let (ended_at, seal) = (Utc::now(), Seal::default());
    ClosedSegment { id: id.clone(), format: PcmFormat::LIVEKIT, frames: 9, bytes: 36, ended_at, reason: EndReason::Closed, gaps: Vec::new(), seal }
}

/// Facts of another track.
fn others(spans: usize) -> Record {
    let started_at = Utc::now();
    let TrackIdentity { meeting, room, participant, track, .. } = identity("TR_2");
    let recording = NewRecording { id: RecordingId::fresh(), meeting, room, participant, track, kind: TrackKind::Audio, started_at };
    let mute_spans = (0..spans).map(|_| MuteSpan { start_ms: 1, end_ms: Some(2) }).collect();
    let op = RowOp::Facts(TrackFacts { mute_spans, format_mismatch: None });
    Record::Rows(Box::new(RowRecord { connection: "other".to_owned(), rows: ConnectionRows { recording, opened: None }, op }))
}

#[tokio::test]
async fn w6_a_row_that_finds_no_room_in_the_journal_does_not_overtake_what_is_in_it() {
    let Stage { store, journal, rows, .. } = &Stage::set().await;
    journal.keep(&others(0)).await.expect("kept");
    let segment = opened("room/1.wav");
    rows.segment_opened(segment.clone());
    rows.flushed().await;
    for spans in [10_000, 1_000, 100, 10, 0] {
        while journal.keep(&others(spans)).await.is_ok() {}
    }
    rows.segment_closed(closed(&segment.id));
    // The database takes everything; what came before waits in the journal.
    tokio::time::timeout(ROW_PATIENCE, rows.flushed()).await.expect_err("it waits");
    assert_eq!(store.segment(segment.id.clone()).await.expect("rows"), None);
    let tell: replay::Tell = Box::new(|_| Box::pin(async {}));
    let replayed = replay::run(journal.clone(), store.clone(), tell);
    let written = tokio::time::timeout(PATIENCE, rows.flushed());
    tokio::select! {
        () = replayed => unreachable!("it never ends"),
        written = written => written.expect("it follows when there is room"),
    }
    let row = store.segment(segment.id).await.expect("rows").expect("its row");
    assert_eq!((row.end_reason.as_deref(), row.frames), (Some("closed"), 9));
}

#[tokio::test]
async fn i8_the_row_of_a_segment_without_a_file_ends_with_nothing_in_it() {
    let stage = Stage::set().await;
    let segment = opened("room/gone.wav");
    stage.rows.segment_opened(segment.clone());
    stage.rows.segment_abandoned(segment.id.clone());
    let row = stage.ended(&segment.id).await;
    assert_eq!((row.end_reason.as_deref(), row.frames, row.bytes), (Some("failed"), 0, 0));
}

#[tokio::test]
async fn i8_a_segment_that_cannot_be_sealed_now_is_sealed_when_it_can_be() {
    let stage = Stage::set().await;
    let segment = stage.written();
    // As a full disk: there can be no draft of its sidecar.
    let draft = draft_of(&stage.dir.path().join("audio").join(&segment.path));
    std::fs::create_dir(&draft).expect("made");
    stage.rows.segment_opened(segment.clone());
    stage.rows.segment_abandoned(segment.id.clone());
    stage.rows.flushed().await;
    assert_eq!(stage.row(&segment.id, |_| true).await.end_reason, None);
    std::fs::remove_dir(&draft).expect("removed");
    let row = stage.ended(&segment.id).await;
    assert_eq!((row.end_reason.as_deref(), row.frames), (Some("failed"), 1_000));
}

#[tokio::test]
async fn s3_i8_a_segment_whose_storage_was_moved_away_is_sealed_where_it_is() {
    let stage = Stage::set().await;
    let segment = stage.written();
    std::fs::rename(stage.dir.path().join("audio"), stage.dir.path().join("moved")).expect("moved");
    stage.rows.segment_opened(segment.clone());
    stage.rows.segment_abandoned(segment.id.clone());
    let row = stage.ended(&segment.id).await;
    assert_eq!((row.end_reason.as_deref(), row.frames), (Some("failed"), 1_000));
    assert!(Sidecar::read(&stage.dir.path().join("moved").join(&segment.path)).expect("read").is_some());
}

#[tokio::test]
async fn s3_i8_a_segment_behind_a_directory_that_became_a_link_is_not_touched() {
    let stage = Stage::set().await;
    let segment = stage.written();
    let (room, elsewhere) = (stage.dir.path().join("audio/RM"), stage.dir.path().join("elsewhere"));
    std::fs::rename(&room, &elsewhere).expect("moved");
    std::os::unix::fs::symlink(&elsewhere, &room).expect("linked");
    stage.rows.segment_opened(segment.clone());
    stage.rows.segment_abandoned(segment.id.clone());
    let row = stage.ended(&segment.id).await;
    assert_eq!((row.end_reason.as_deref(), row.frames), (Some("failed"), 0));
    assert_eq!(std::fs::read_dir(&elsewhere).expect("listed").count(), 1, "the file alone");
}
