//! The server is killed at each system call by which the journal grows: what was acknowledged is there afterwards.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::databases::Database;
use super::{builder, replayed};
use crate::support::test_app::TestApp;

const FIRST: &str = "00000000000000000001.journal";

/// Kills the server at the `nth` of these calls on a file of the journal. `None`, with a line that says so, where nobody may trace.
fn kill_at(app: &TestApp, call: &str, nth: usize, file: &str) -> Option<std::process::Child> {
    let killer = killer(app, call, nth, file);
    if killer.is_none() {
        writeln!(std::io::stderr(), "kills at system calls are skipped: strace cannot attach to a process here").expect("stderr");
    }
    killer
}

fn killer(app: &TestApp, call: &str, nth: usize, file: &str) -> Option<std::process::Child> {
    // As descriptors are known, and as the server calls it.
    let named = std::path::Path::new("storage/journal").join(file);
    let file = app.dir.path().join(&named);
    // Its path must be there to be recognised.
    let pid = app.child.id().expect("the server runs").to_string();
    let inject = format!("inject={call}:signal=SIGKILL:when={nth}");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-p", &pid, "-o", "/dev/null", "-P"]).arg(file).arg("-P").arg(named).args(["-e", &format!("trace={call}"), "-e", &inject]);
    let mut strace = strace.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().ok()?;
    let status = format!("/proc/{pid}/status");
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::fs::read_to_string(&status).ok()?.contains("TracerPid:\t0\n") {
        if strace.try_wait().ok()?.is_some() || Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Some(strace)
}

#[tokio::test]
async fn w6_what_was_acknowledged_survives_a_kill_at_each_call_of_the_append() {
    for (call, nth) in [("pwrite64", 1), ("pwrite64", 2), ("fdatasync", 1), ("fdatasync", 2), ("fdatasync", 3)] {
        let mut database = Database::sqlite();
        let app = builder(&database).start().await;
        database.take_away();
        let Some(mut strace) = kill_at(&app, call, nth, FIRST) else { return };
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
        assert_eq!(acknowledged.len(), nth - 1, "{call} {nth}: each of them is one write and one sync");
        let stopped = app.kill().await;
        strace.wait().expect("waited for");
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
        let Some(mut strace) = kill_at(&app, call, 1, file) else { return };
        database.give_back();
        let mut app = app;
        tokio::time::timeout(Duration::from_secs(40), app.child.wait())
            .await
            .unwrap_or_else(|_| panic!("{call} {file}: it is not killed"))
            .expect("waited for");
        strace.wait().expect("waited for");
        let app = app.kill().await.restart().await;
        replayed(&app).await;
        assert_eq!(database.texts("SELECT id AS text FROM webhook_events ORDER BY id").await, ids, "{call} {file}");
        assert!(!app.log().contains("set aside"), "{call} {file}: {}", app.log());
    }
}
