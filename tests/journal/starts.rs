//! Starts that a database keeps from coming to their end.

use std::time::Duration;

use diesel::Connection;
use diesel::connection::SimpleConnection;
use diesel::sqlite::SqliteConnection;

use super::databases::{Database, Fault};
use super::rows::{connect, segments, written};
use super::{Starting, builder, replayed, waiting};
use crate::support::egress_peer::counter_pcm;
use crate::support::faults::SmallDisk;
use crate::support::test_app::{self, TestApp, read_wav};

#[tokio::test]
async fn a_start_that_waits_for_the_database_ends_at_sigterm() {
    let mut database = Database::sqlite();
    builder(&database).start().await.terminate().await;
    database.take_away();
    let dir = tempfile::TempDir::new().unwrap();
    let mut starting = Starting::new(dir.path(), &database.url);
    starting.says("the start waits for it").await;
    let pid = rustix::process::Pid::from_raw(starting.child.id().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = tokio::time::timeout(Duration::from_secs(40), starting.child.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(0));
}

#[tokio::test]
async fn what_postgresql_refuses_in_words_ends_the_start_at_once() {
    let Ok(url) = std::env::var("TEST_POSTGRES_URL") else { return };
    let (user, rest) = url.strip_prefix("postgres://").and_then(|rest| rest.split_once('@')).expect("a user and an address");
    let dir = tempfile::TempDir::new().unwrap();
    for (url, word) in [(format!("postgres://{user}x@{rest}"), "password"), (format!("{url}_that_is_not_there"), "does not exist")] {
        let finished = test_app::run(dir.path(), &[("DATABASE_URL", &url), ("PORT", "0")], &["serve"]).await;
        assert!(finished.code == Some(1) && finished.stderr.contains(word), "{finished:?}");
        assert!(!finished.stderr.contains("the start waits for it"), "{finished:?}");
    }
}

#[tokio::test]
async fn d6_a_start_on_a_full_disk_waits_for_room() {
    let Some(disk) = SmallDisk::mount("storage") else { return };
    let app = TestApp::builder().open().dir(&disk.dir).start().await;
    let pcm = counter_pcm(4_800, 1);
    let mut peer = connect(&app, "ana").await;
    peer.send_pcm(&pcm).await.unwrap();
    written(&app, "ana", pcm.len()).await;
    app.eventually("its row is there", async || app.items("/api/v1/recordings").await.first().map(drop)).await;
    let stopped = app.kill().await;
    let path = disk.path.join("live-meeting.db");
    // Nothing of what is there already has room for more.
    SqliteConnection::establish(path.to_str().unwrap()).unwrap().batch_execute("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    let ballast = disk.fill(0);
    let mut starting = Starting::new(stopped.dir.path(), &format!("sqlite:{}", path.display()));
    starting.says("the start waits for it").await;
    drop(ballast);
    starting.says("listening address=").await;
    starting.child.kill().await.unwrap();
    let app = stopped.restart().await;
    assert!(segments(&app, "ana").await == [("crashed".to_owned(), pcm)]);
}

#[tokio::test]
async fn a_start_waits_until_a_standby_is_promoted() {
    let Some(database) = Database::postgres(Fault::Stopped) else { return };
    let name = database.url.rsplit_once('/').expect("a name").1.to_owned();
    database.texts(&format!("ALTER DATABASE \"{name}\" SET default_transaction_read_only = on")).await;
    let dir = tempfile::TempDir::new().unwrap();
    let mut starting = Starting::new(dir.path(), &database.url);
    starting.says("the start waits for it").await;
    database.texts(&format!("BEGIN READ WRITE; ALTER DATABASE \"{name}\" SET default_transaction_read_only = off; COMMIT")).await;
    starting.says("listening address=").await;
}

#[tokio::test]
async fn w6_a_row_that_the_database_refuses_is_set_aside_and_the_server_starts() {
    let mut database = Database::sqlite();
    let app = builder(&database).start().await;
    database.take_away();
    let pcm = counter_pcm(4_800, 1);
    for participant in ["ana", "ben"] {
        let mut peer = connect(&app, participant).await;
        peer.send_pcm(&pcm).await.unwrap();
        peer.close_and_wait().await;
    }
    let stopped = app.kill().await;
    database.give_back();
    let path = database.url.strip_prefix("sqlite:").unwrap();
    let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON segments WHEN NEW.track_sid = 'TR_ana' BEGIN SELECT RAISE(ABORT, 'not this one'); END";
    SqliteConnection::establish(path).unwrap().batch_execute(refuse).unwrap();
    let app = stopped.restart().await;
    assert!(app.log().contains("set aside: the database answers, and does not take it"), "{}", app.log());
    assert!(segments(&app, "ben").await == [("closed".to_owned(), pcm.clone())]);
    assert!(app.wav_files().iter().all(|file| read_wav(file).1 == pcm) && app.wav_files().len() == 2);
    assert!(waiting(&app).await.is_some_and(|said| said.contains("1 parts could not be used")), "{}", app.log());
    app.logged("has taken all that waited").await;
    let bad = super::webhooks::files(&app);
    assert!(bad.len() == 1 && String::from_utf8_lossy(&std::fs::read(&bad[0]).unwrap()).contains("TR_ana"), "{bad:?}");
    std::fs::remove_file(&bad[0]).unwrap();
    replayed(&app).await;
}

#[tokio::test]
async fn check_ends_where_a_database_takes_connections_and_says_nothing() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("postgres://ana:secret@{}/meetings", silent.local_addr().unwrap());
    let dir = tempfile::TempDir::new().unwrap();
    let finished = test_app::run(dir.path(), &[("DATABASE_URL", &url)], &["check"]).await;
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert!(finished.stdout.lines().any(|line| line.starts_with("FAULT  database") && line.contains("did not answer within 10s")), "{finished:?}");
}
