//! The server is killed at each system call by which the journal grows: what was acknowledged is there afterwards.

use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::databases::Database;
use super::{builder, replayed};
use crate::support::strace::Strace;
use crate::support::test_app::TestApp;

const FIRST: &str = "00000000000000000001.journal";

/// Kills the server at the `nth` of these calls on a file of the journal.
fn kill_at(app: &TestApp, calls: &str, nth: usize, file: &str) -> Option<Strace> {
    // As descriptors are known, and as the server calls it.
    let named = Path::new("storage/journal").join(file);
    Strace::inject_on(app, calls, &format!("signal=SIGKILL:when={nth}"), &[&app.dir.path().join(&named), &named])
}

#[tokio::test]
async fn w6_what_was_acknowledged_survives_a_kill_at_each_call_of_the_append() {
    for (call, nth) in [("pwrite64", 1), ("pwrite64", 2), ("fdatasync", 1), ("fdatasync", 2), ("fdatasync", 3)] {
        let mut database = Database::sqlite();
        let app = builder(&database).start().await;
        database.take_away();
        let Some(strace) = kill_at(&app, call, nth, FIRST) else { return };
        let mut acknowledged = Vec::new();
        for number in 0..10 {
            let id = format!("EV_{number}");
            let event = json!({"event": "room_started", "id": id, "room": {"sid": format!("RM_{number}"), "name": "room"}});
            let body = crate::support::test_app::complete(event).to_string();
            let answer = std::panic::AssertUnwindSafe(app.signed_webhook(body.as_bytes()));
            match futures_util::FutureExt::catch_unwind(answer).await {
                Ok(answer) if answer.status == 204 => acknowledged.push(id),
                _ => break,
            }
        }
        // Each of them is one write and one sync; one that was not kept in time came again.
        let is_each = acknowledged.len() == nth - 1 || app.log().contains("a webhook could not be kept");
        assert!(is_each && acknowledged.len() < nth, "{call} {nth}: {acknowledged:?}\n{}", app.log());
        let stopped = app.kill().await;
        drop(strace);
        database.give_back();
        let app = stopped.restart().await;
        replayed(&app).await;
        let ids = database.texts("SELECT id AS text FROM webhook_events ORDER BY id").await;
        assert!(ids.starts_with(&acknowledged) && ids.len() <= nth, "{call} {nth}: {acknowledged:?}, {ids:?}");
        assert!(!app.log().contains("set aside"), "{call} {nth}: {}", app.log());
    }
}

#[tokio::test]
async fn w6_what_was_acknowledged_survives_a_kill_at_each_call_by_which_the_journal_gets_empty() {
    for (call, file) in [("pwrite64", "cursor"), ("fdatasync", "cursor"), ("?unlink,?unlinkat", FIRST), ("?unlink,?unlinkat", "cursor")] {
        let mut database = Database::sqlite();
        let app = builder(&database).start().await;
        database.take_away();
        let ids = ["EV_0", "EV_1", "EV_2"];
        for id in ids {
            let event = json!({"event": "room_started", "id": id, "room": {"sid": format!("RM_{id}"), "name": "room"}});
            assert_eq!(app.webhook(event).await.status, 204);
        }
        let Some(strace) = kill_at(&app, call, 1, file) else { return };
        database.give_back();
        let mut app = app;
        tokio::time::timeout(Duration::from_secs(40), app.child.wait())
            .await
            .unwrap_or_else(|_| panic!("{call} {file}: it is not killed"))
            .expect("waited for");
        drop(strace);
        let app = app.kill().await.restart().await;
        replayed(&app).await;
        assert_eq!(database.texts("SELECT id AS text FROM webhook_events ORDER BY id").await, ids, "{call} {file}");
        assert!(!app.log().contains("set aside"), "{call} {file}: {}", app.log());
    }
}
