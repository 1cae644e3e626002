//! Finished files with their sidecars, and interrupted ones that become finished.

mod by_hand;
mod finishing;
mod repairing;
mod timeline;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use diesel::connection::SimpleConnection;
use diesel::sqlite::SqliteConnection;
use diesel::{Connection, QueryableByName, RunQueryDsl, sql_query};
use live_meeting::audio::format::PcmFormat;
use live_meeting::recording::wav_header;
use tempfile::TempDir;

use crate::support::test_app::TestApp;

/// When the files of these tests began, as their names say it.
const TIME: &str = "20261120T105312.345Z";

fn audio_dir(dir: &Path) -> PathBuf {
    dir.join("storage/egress/audio")
}

fn database(dir: &Path) -> SqliteConnection {
    SqliteConnection::establish(dir.join("storage/live-meeting.db").to_str().unwrap()).unwrap()
}

/// A file of so many bytes of PCM under a header that declares others, with a torn end.
fn interrupted_wav(pcm: usize, declared: u64, torn: usize) -> Vec<u8> {
    let mut file = wav_header::encode(PcmFormat::LIVEKIT, declared).to_vec();
    file.extend((0..pcm + torn).map(|at| (at * 31 % 251) as u8 | 1));
    file
}

/// The directory of a server that was killed while it wrote files: tables and keys, and for each name a file and an open row. Of each a recording of its own.
async fn killed_while_writing(files: &[(String, Vec<u8>)]) -> Arc<TempDir> {
    let (_, _, stopped) = TestApp::builder().open().start().await.terminate().await;
    let dir = stopped.dir;
    let server = std::fs::read_to_string(dir.path().join("storage/server-id")).unwrap()[..12].to_owned();
    let mut sql = "BEGIN;".to_owned();
    std::fs::create_dir_all(audio_dir(dir.path()).join("room")).unwrap();
    for (number, (name, content)) in files.iter().enumerate() {
        std::fs::write(audio_dir(dir.path()).join("room").join(name), content).unwrap();
        sql.push_str(&format!(
            "INSERT INTO tracks (id, room_name, kind, source, name, mime_type, mute_spans, encryption) VALUES ('t{number}', 'room', 'AUDIO', '', '', '', '[]', '');
             INSERT INTO recordings (id, track_id, meeting_id, room_name, participant, track_sid, started_at, server_id)
                 VALUES ('r{number:04}', 't{number}', 'room', 'room', 'ana', 'TR_{number}', '2026-11-20 10:53:12.345', '{server}');
             INSERT INTO segments (id, recording_id, path, format, sample_rate, channels, frames, bytes, started_at, gaps, server_id, track_sid)
                 VALUES ('s{number:04}', 'r{number:04}', 'room/{name}', 'wav', 48000, 2, 0, 0, '2026-11-20 10:53:12.345', '[]', '{server}', 'TR_{number}');"
        ));
    }
    sql.push_str("COMMIT");
    database(dir.path()).batch_execute(&sql).unwrap();
    dir
}

#[derive(Debug, Clone, PartialEq, QueryableByName)]
struct Ended {
    #[diesel(sql_type = diesel::sql_types::Text)]
    row: String,
}

/// Every segment as its row, its recording and its seal say how it ended.
fn ended_rows(dir: &Path) -> Vec<String> {
    let rows: Vec<Ended> = sql_query(
        "SELECT s.id || '|' || s.path || '|' || s.frames || '|' || s.bytes || '|' || coalesce(s.end_reason, 'open') || '|' || coalesce(s.ended_at, '-')
             || '|' || coalesce(r.ended_at, 'open') || '|' || coalesce(e.recovered, '-') || '|' || coalesce(e.suspect, '-')
             || '|' || coalesce(e.tail_unverified_ms, '-') || '|' || coalesce(e.sha256, '-') AS row
         FROM segments s JOIN recordings r ON r.id = s.recording_id LEFT JOIN seals e ON e.segment_id = s.id ORDER BY s.path",
    )
    .load(&mut database(dir))
    .unwrap();
    rows.into_iter().map(|ended| ended.row).collect()
}
