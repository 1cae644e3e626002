//! What a replay does with records that are refused, and with calls that come late.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use chrono::Utc;
use diesel::Connection;
use diesel::connection::SimpleConnection;
use diesel::sqlite::SqliteConnection;
use tempfile::TempDir;

use super::*;
use crate::config::DatabaseUrl;
use crate::db::rows::{MuteSpan, Page, TrackFacts, TrackKind};
use crate::ids::{MeetingId, RecordingId, TrackSid};

const PATIENCE: Duration = Duration::from_secs(20);

struct Stage {
    dir: TempDir,
    store: Store,
    journal: Journal,
}

impl Stage {
    async fn set() -> Self {
        let dir = TempDir::new().expect("a directory");
        let store = Store::open(&DatabaseUrl::Sqlite(dir.path().join("test.db")), 1).await.expect("a store");
        let journal = Journal::open(dir.path(), 1 << 24).expect("a journal");
        Self { dir, store, journal }
    }

    fn replayer(&self) -> Replayer {
        Replayer::new(self.journal.clone(), self.store.clone(), Box::new(|_| Box::pin(async {})))
    }

    /// The first mute span of a track, by the way of the API.
    async fn first_span(&self) -> Option<String> {
        let tracks = self.store.tracks(MeetingId::new("RM"), Page { limit: 10, after: None }).await.expect("rows");
        tracks.into_iter().next().map(|track| track.mute_spans)
    }
}

fn rows() -> ConnectionRows {
    let (room, track, kind) = (RoomName::new("room"), Some(TrackSid::new("TR_1")), TrackKind::Audio);
    let recording =
        NewRecording { id: RecordingId::fresh(), meeting: MeetingId::new("RM"), room, participant: None, track, kind, started_at: Utc::now() };
    ConnectionRows { recording, opened: None }
}

fn facts(end_ms: u64, spans: usize) -> TrackFacts {
    TrackFacts { format_mismatch: None, mute_spans: vec![MuteSpan { start_ms: 0, end_ms: Some(end_ms) }; spans] }
}

fn record(rows: &ConnectionRows, op: RowOp) -> Record {
    Record::Rows(Box::new(RowRecord { connection: "one".to_owned(), rows: rows.clone(), op }))
}

#[tokio::test]
async fn w6_a_record_that_is_refused_twenty_times_in_a_minute_is_set_aside() {
    let stage = Stage::set().await;
    let path = stage.dir.path().join("test.db");
    let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON recordings BEGIN SELECT RAISE(ABORT, 'not this one'); END";
    SqliteConnection::establish(&path.to_string_lossy()).expect("SQLite opens").batch_execute(refuse).expect("a trigger");
    stage.journal.keep(&record(&rows(), RowOp::End)).await.expect("kept");
    let mut replayer = stage.replayer();
    let refused = async |replayer: &mut Replayer| match replayer.drain().await {
        Err((Some(position), Halt::Database(error))) => {
            replayer.note_refusal(Some(position), &error, MAX_STUCK).await;
            position
        }
        other => panic!("it is refused: {other:?}"),
    };
    let position = refused(&mut replayer).await;
    for attempt in 2..=MAX_ATTEMPTS {
        assert_eq!((refused(&mut replayer).await, replayer.stuck.map(|(_, _, attempts)| attempts)), (position, Some(attempt)));
    }
    // Often enough, but not for long enough.
    assert_eq!(stage.journal.bad_files().expect("listed"), 0);
    let Some(minute_ago) = Instant::now().checked_sub(MAX_STUCK) else { return };
    replayer.stuck = Some((position, minute_ago, MAX_ATTEMPTS - 1));
    replayer.note_refusal(Some(position), &DbError::Late(Duration::from_secs(5)), MAX_STUCK).await;
    assert_eq!(stage.journal.bad_files().expect("listed"), 0, "a lock is no refusal");
    assert_eq!(refused(&mut replayer).await, position);
    replayer.drain().await.expect("nothing is in the way");
    assert_eq!((stage.journal.bad_files().expect("listed"), stage.journal.figures().records), (1, 0));
}

#[tokio::test]
async fn w6_a_call_that_was_given_up_during_a_replay_does_not_come_behind_what_follows_it() {
    let stage = Stage::set().await;
    let rows = rows();
    let opened = stage.store.open_recording(rows.recording.clone()).await.expect("a recording");
    // More than one batch.
    let long = facts(1, 20_000);
    stage.journal.keep(&record(&rows, RowOp::Facts(long))).await.expect("kept");
    stage.journal.keep(&record(&rows, RowOp::Facts(facts(3, 1)))).await.expect("kept");
    let mut replayer = stage.replayer();
    let first = stage.journal.read(None).await.expect("read");
    assert_eq!(first.len(), 1);
    replayer.apply(first).await.expect("applied");
    // Older than what is left.
    let (store, is_done) = (stage.store.clone(), Arc::new(AtomicBool::new(false)));
    let done = Arc::clone(&is_done);
    stage.journal.wait_for(tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(200)).await;
        store.set_track_facts(opened.id, facts(2, 1)).await.expect("set");
        done.store(true, Relaxed);
    }));
    replayer.drain().await.expect("drained");
    let late = async {
        while !is_done.load(Relaxed) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, late).await.expect("it ends");
    let told = stage.first_span().await.expect("a track");
    assert!(told.contains('3'), "{told}");
}

#[tokio::test]
async fn w6_newcomers_are_held_for_the_last_records_only_and_nothing_of_theirs_is_dropped() {
    let stage = Stage::set().await;
    let rows = rows();
    for _ in 0..2 * LAST_RECORDS {
        stage.journal.keep(&record(&rows, RowOp::Facts(facts(1, 1)))).await.expect("kept");
    }
    let lock = stage.dir.path().join("test.db");
    let mut lock = SqliteConnection::establish(&lock.to_string_lossy()).expect("SQLite opens");
    let mut replayer = stage.replayer();
    let entries = stage.journal.read(None).await.expect("read");
    replayer.apply(entries.into_iter().take(100).collect()).await.expect("applied");
    assert!(stage.journal.figures().records <= LAST_RECORDS);
    // The database goes while the last are applied: whoever comes then waits for a second, and not for the database.
    lock.batch_execute("BEGIN IMMEDIATE").expect("locked");
    let newcomer = async {
        tokio::task::yield_now().await;
        stage.journal.keep(&record(&rows, RowOp::End)).await.expect("kept");
        lock.batch_execute("COMMIT").expect("given back");
    };
    let last = async { tokio::time::timeout(PATIENCE, replayer.last_records()).await.expect("in time").expect("applied") };
    let (is_empty, ()) = tokio::join!(last, newcomer);
    assert!(!is_empty, "somebody came meanwhile");
    replayer.drain().await.expect("drained");
    assert_eq!((stage.journal.figures().records, stage.journal.is_in_use()), (0, false));
}
