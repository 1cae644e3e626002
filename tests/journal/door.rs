//! What operators see of the journal, and what becomes of webhooks where it takes nothing.

use futures_util::stream::{FuturesUnordered, StreamExt};
use serde_json::json;

use super::databases::Database;
use super::webhooks::files;
use super::{builder, replayed, waiting};
use crate::support::faults::Strace;
use crate::support::test_app::{self, TestApp};

fn started(sid: &str) -> serde_json::Value {
    json!({"event": "room_started", "id": format!("EV_{sid}"), "room": {"sid": sid, "name": "room"}})
}

/// Where the journal was, nothing can be written any more, not even by root.
fn break_journal(app: &TestApp) {
    let dir = app.dir.path().join("storage/journal");
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::write(&dir, b"no directory").unwrap();
}

#[tokio::test]
async fn w2_what_neither_database_nor_journal_takes_is_503_and_is_taken_when_it_comes_again() {
    let mut database = Database::sqlite();
    let app = builder(&database).start().await;
    database.take_away();
    break_journal(&app);
    let answer = app.webhook_once(started("RM_1")).await;
    answer.assert_problem(503, "databaseUnavailable");
    assert!(answer.header("retry-after").is_some());
    app.logged("a webhook could not be kept").await;
    database.give_back();
    assert_eq!(app.webhook(started("RM_1")).await.status, 204);
    assert_eq!(app.get_json("/api/v1/sessions/RM_1").await["status"], "ACTIVE");
}

#[tokio::test]
async fn w6_a_journal_whose_file_could_not_be_begun_begins_another() {
    let mut database = Database::sqlite();
    let app = builder(&database).start().await;
    database.take_away();
    let dir = app.dir.path().join("storage/journal");
    let Some(failing) = Strace::inject(&app, Some("fsync"), "error=EIO:when=1", Some(&dir)) else { return };
    app.webhook_once(started("RM_1")).await.assert_problem(503, "databaseUnavailable");
    drop(failing);
    assert_eq!(app.webhook(started("RM_1")).await.status, 204);
    database.give_back();
    replayed(&app).await;
    assert_eq!(database.texts("SELECT id AS text FROM webhook_events").await, ["EV_RM_1"]);
}

#[tokio::test]
async fn w6_a_full_journal_refuses_webhooks_and_takes_them_again_when_the_database_is_back() {
    let mut database = Database::sqlite();
    let app = builder(&database).env("LIVE_MEETING__STORAGE__JOURNAL_MAX", "1MiB").start().await;
    database.take_away();
    let mut large = started("RM_0");
    large["room"]["metadata"] = json!("x".repeat(300_000));
    let mut taken = Vec::new();
    for number in 0.. {
        large["id"] = json!(format!("EV_{number}"));
        match app.webhook_once(large.clone()).await {
            answer if answer.status == 204 => taken.push(format!("EV_{number}")),
            answer => {
                answer.assert_problem(503, "databaseUnavailable");
                break;
            }
        }
    }
    assert_eq!(metric(&app, "refused_total").await, 1.0);
    assert_eq!(taken.len(), 3, "of 300 kB each in a MiB, of which an eighth is not for webhooks");
    database.give_back();
    replayed(&app).await;
    assert_eq!(database.texts("SELECT id AS text FROM webhook_events ORDER BY id").await, taken);
    assert_eq!(app.webhook(large).await.status, 204);
}

#[tokio::test]
async fn check_says_what_waits_and_the_files_are_the_owners() {
    let mut database = Database::sqlite();
    let app = builder(&database).start().await;
    database.take_away();
    assert_eq!(app.webhook(started("RM_1")).await.status, 204);
    assert_eq!(app.webhook(started("RM_2")).await.status, 204);
    let said = waiting(&app).await.expect("something waits");
    assert!(said.starts_with("journal: 2 records wait for the database, the oldest for "), "{said}");
    let modes: Vec<u32> = [app.dir.path().join("storage/journal")].into_iter().chain(files(&app)).map(|path| mode(&path)).collect();
    assert_eq!((modes[0], modes.len() > 1 && modes[1..].iter().all(|mode| *mode == 0o640)), (0o750, true), "{modes:?}");
    for (name, value) in [("records", 2.0), ("appended_total", 2.0), ("replayed_total", 0.0), ("refused_total", 0.0), ("set_aside_total", 0.0)] {
        assert_eq!(metric(&app, name).await, value, "{name}");
    }
    let stopped = app.kill().await;
    let check = async || test_app::run(stopped.dir.path(), &[("DATABASE_URL", &database.url)], &["check"]).await.stdout;
    let said = check().await;
    assert!(said.lines().any(|line| line.starts_with("note   journal") && line.contains("2 records (")), "{said}");
    // Looking changes nothing.
    assert_eq!(check().await.lines().find(|line| line.contains("journal")), said.lines().find(|line| line.contains("journal")));
    database.give_back();
    let app = stopped.restart().await;
    replayed(&app).await;
    assert_eq!(app.items("/api/v1/sessions").await.len(), 2);
    for (name, value) in [("records", 0.0), ("bytes", 0.0), ("oldest_seconds", 0.0), ("appended_total", 0.0), ("replayed_total", 2.0)] {
        assert_eq!(metric(&app, name).await, value, "{name}");
    }
    let check = test_app::run(app.dir.path(), &[("DATABASE_URL", &database.url)], &["check"]).await.stdout;
    assert!(check.contains("nothing waits for the database"), "{check}");
}

/// What `/metrics` says of the journal.
async fn metric(app: &TestApp, name: &str) -> f64 {
    let page = String::from_utf8(app.get("/metrics").await.body).unwrap();
    let value = page.lines().find_map(|line| line.strip_prefix(&format!("live_meeting_journal_{name} ")));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name}: {page}"))
}

fn mode(path: &std::path::Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn w6_a_corrupt_record_is_set_aside_and_said_and_the_others_are_applied() {
    let mut database = Database::sqlite();
    let app = builder(&database).start().await;
    database.take_away();
    for sid in ["RM_1", "RM_2", "RM_3"] {
        assert_eq!(app.webhook(started(sid)).await.status, 204);
    }
    let stopped = app.kill().await;
    let dir = stopped.dir.path().join("storage/journal");
    let file =
        std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.extension().is_some_and(|kind| kind == "journal"));
    let mut content = std::fs::read(file.as_ref().unwrap()).unwrap();
    let middle = content.len() / 2;
    content[middle] ^= 0x20;
    std::fs::write(file.unwrap(), content).unwrap();
    let check = test_app::run(stopped.dir.path(), &[("DATABASE_URL", &database.url)], &["check"]).await.stdout;
    assert!(check.lines().any(|line| line.starts_with("FAULT  journal") && line.contains("1 parts that are no records")), "{check}");
    database.give_back();
    let app = stopped.restart().await;
    app.logged("has taken all that waited").await;
    let ids = database.texts("SELECT id AS text FROM webhook_events ORDER BY id").await;
    assert_eq!(ids, ["EV_RM_1", "EV_RM_3"]);
    assert!(app.log().contains("a part of the journal is set aside: it is corrupt"), "{}", app.log());
    let bad = files(&app);
    assert!(bad.len() == 1 && bad[0].extension().unwrap() == "bad", "{bad:?}");
    assert!(String::from_utf8_lossy(&std::fs::read(&bad[0]).unwrap()).contains("RM_2"));
    assert_eq!(metric(&app, "set_aside_total").await, 1.0);
    // Until somebody has looked at it, also after another start.
    let app = app.kill().await.restart().await;
    assert!(waiting(&app).await.is_some_and(|said| said.contains("1 parts could not be used")));
    let check = test_app::run(app.dir.path(), &[("DATABASE_URL", &database.url)], &["check"]).await.stdout;
    assert!(check.lines().any(|line| line.starts_with("FAULT  journal") && line.contains(".bad")), "{check}");
    std::fs::remove_file(&bad[0]).unwrap();
    replayed(&app).await;
}

#[tokio::test]
async fn w6_a_second_server_in_the_same_directory_is_refused_and_changes_nothing() {
    let mut database = Database::sqlite();
    let app = builder(&database).start().await;
    database.take_away();
    assert_eq!(app.webhook(started("RM_1")).await.status, 204);
    let file = files(&app).remove(0);
    // The beginning of a record, as long as it is being written.
    std::io::Write::write_all(&mut std::fs::OpenOptions::new().append(true).open(&file).unwrap(), b"LMj1").unwrap();
    let before = std::fs::read(&file).unwrap();
    let other = Database::sqlite();
    let finished = test_app::run(app.dir.path(), &[("DATABASE_URL", &other.url), ("PORT", "0")], &["serve"]).await;
    assert_eq!(finished.code, Some(1), "{finished:?}");
    assert!(finished.stderr.contains("cannot use the journal in") && finished.stderr.contains("another server is using it"), "{finished:?}");
    assert_eq!(std::fs::read(&file).unwrap(), before);
    assert_eq!(app.webhook(started("RM_2")).await.status, 204);
    database.give_back();
    replayed(&app).await;
    assert_eq!(database.texts("SELECT id AS text FROM webhook_events ORDER BY id").await, ["EV_RM_1", "EV_RM_2"]);
}

#[tokio::test]
async fn w2_a_journal_whose_disk_hangs_refuses_what_memory_should_not_hold() {
    let mut database = Database::sqlite();
    let app = builder(&database).env("LIVE_MEETING__STORAGE__JOURNAL_MAX", "1MiB").start().await;
    database.take_away();
    assert_eq!(app.webhook(started("RM_0")).await.status, 204);
    let Some(_strace) = Strace::inject(&app, Some("fdatasync"), "delay_enter=15000000:when=1", Some(&files(&app)[0])) else { return };
    let large = |number: usize| {
        let mut event = started(&format!("RM_{number}"));
        event["room"]["metadata"] = json!("x".repeat(300_000));
        event
    };
    let mut answers: FuturesUnordered<_> = (1..=8).map(|number| app.webhook_once(large(number))).collect();
    let first = answers.next().await.expect("an answer");
    first.assert_problem(503, "databaseUnavailable");
    app.logged("the journal's disk is slow").await;
}
