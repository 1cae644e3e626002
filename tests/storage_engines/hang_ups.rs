//! Callers that go while their query hangs (`docs/FACTS.md`, F13).

use std::sync::{Mutex, Once};
use std::time::Duration;

use futures_util::future::join_all;
use live_meeting::db::rows::SessionFilter;
use live_meeting::livekit::webhook::sign;
use serde_json::{Value, json};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::engine::{CONNECTIONS, TestDatabase};
use super::fixtures::{ALL, arrival, started};
use crate::support::test_app::{API_KEY, API_SECRET, TestApp, complete};

/// A call that has no answer after this hangs in the lock: a free one takes a few milliseconds.
const HANGING: Duration = Duration::from_millis(250);
/// More hang-ups than there are connections, so that each may cost none.
const HANG_UPS: usize = 2 * CONNECTIONS as usize;

static STORE_PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Notes the panics of the stores' threads, which their tasks' handles swallow. One on a test's own thread fails that test anyway.
fn watch_for_panics() {
    static WATCHING: Once = Once::new();
    WATCHING.call_once(|| {
        let default = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if std::thread::current().name() == Some("store") {
                STORE_PANICS.lock().unwrap().push(panic.to_string());
            }
            default(panic);
        }));
    });
}

fn assert_no_store_panicked() {
    assert_eq!(*STORE_PANICS.lock().unwrap(), [""; 0]);
}

pub async fn a_call_whose_caller_hangs_up_in_mid_query_is_finished_by_the_store(db: &TestDatabase) {
    watch_for_panics();
    let store = db.store().await;
    store.probe().await.expect("the first connection is there");
    for n in 1..=HANG_UPS {
        let lock = db.lock().await;
        let call = store.apply_event(arrival(started(&format!("RM_{n}"), "room", 0)));
        // On its time-out the call is dropped, on this actix thread.
        tokio::time::timeout(HANGING, call).await.expect_err("the query hangs");
        lock.release().await;
        db.eventually("the dropped call's work", async || db.count("sessions").await == n && db.count("webhook_events").await == n).await;
    }
    let calls = join_all((0..4 * CONNECTIONS).map(|_| async { (store.probe().await, store.sessions(SessionFilter::default(), ALL).await) })).await;
    for (written, read) in calls {
        written.expect("the store writes as before");
        assert_eq!(read.expect("the store reads as before").len(), HANG_UPS);
    }
    assert_no_store_panicked();
}

pub async fn a_call_dropped_at_any_moment_is_finished(db: &TestDatabase) {
    watch_for_panics();
    let store = db.store().await;
    let mut dropped = 0;
    for n in 0..16_u32 {
        let call = store.apply_event(arrival(started(&format!("RM_{n}"), "room", 0)));
        dropped += usize::from(tokio::time::timeout(Duration::from_micros(100) * n, call).await.is_err());
    }
    assert!(dropped > 0, "the first is dropped at once");
    db.eventually("every call's work", async || db.count("sessions").await == 16 && db.count("webhook_events").await == 16).await;
    store.probe().await.expect("the store writes as before");
    assert_no_store_panicked();
}

async fn start(db: &TestDatabase) -> TestApp {
    let connections = CONNECTIONS.to_string();
    let app = TestApp::builder().env("DATABASE_URL", &db.url).env("LIVE_MEETING__DATABASE__CONNECTIONS", connections).start().await;
    assert_eq!(app.webhook(room_started(0)).await.status, 204);
    app
}

fn room_started(n: usize) -> Value {
    json!({"event": "room_started", "id": format!("EV_{n}"), "room": {"sid": format!("RM_{n}"), "name": "room"}})
}

fn webhook(n: usize) -> Vec<u8> {
    let body = complete(room_started(n)).to_string();
    let token = sign(API_KEY, API_SECRET, body.as_bytes()).expect("signed");
    let length = body.len();
    format!("POST /livekit/webhook HTTP/1.1\r\nHost: h\r\nAuthorization: {token}\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()
}

/// The server's end of a connection, as its process's files name it.
fn servers_end(app: &TestApp, stream: &TcpStream) -> String {
    let port = stream.local_addr().expect("an address").port();
    let remote = format!(":{port:04X}");
    let sockets = std::fs::read_to_string("/proc/net/tcp").expect("Linux");
    let columns = sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = format!(":{:04X}", app.addr.port());
    let mut found = columns.filter(|columns| columns[1].ends_with(&ours) && columns[2].ends_with(&remote));
    format!("socket:[{}]", found.next().expect("the connection is there")[9])
}

fn holds(app: &TestApp, socket: &str) -> bool {
    let files = std::fs::read_dir(format!("/proc/{}/fd", app.child.id().expect("the server runs"))).expect("Linux");
    files.flatten().any(|file| std::fs::read_link(file.path()).is_ok_and(|target| target.to_str() == Some(socket)))
}

/// Sends a request, waits until it hangs, resets the connection, and waits until the server has let go of it. `false` when it was answered.
async fn hang_up(app: &TestApp, db: &TestDatabase, request: &[u8]) -> bool {
    let mut stream = TcpStream::connect(app.addr).await.expect("connected");
    stream.write_all(request).await.expect("sent");
    if tokio::time::timeout(HANGING, stream.read_u8()).await.is_ok() {
        return false;
    }
    let servers_end = servers_end(app, &stream);
    assert!(holds(app, &servers_end), "the server holds {servers_end}");
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("SO_LINGER can be set");
    drop(stream);
    db.eventually("the server lets go of the connection", async || !holds(app, &servers_end)).await;
    true
}

/// More calls at a time than there are connections, of both kinds, are answered as ever.
async fn assert_usable(app: &TestApp, sessions: usize) {
    let answers = join_all((0..HANG_UPS).map(|n| app.webhook(room_started(100 + n)))).await;
    assert!(answers.iter().all(|answer| answer.status == 204), "{answers:?}\n{}", app.log());
    app.settled().await;
    for items in join_all((0..HANG_UPS).map(|_| app.items("/api/v1/sessions"))).await {
        assert_eq!(items.len(), sessions + HANG_UPS);
    }
    app.healthy().await;
    assert!(!app.log().contains("panicked"), "{}", app.log());
}

pub async fn clients_that_hang_up_in_mid_query_leave_the_server_as_it_was(db: &TestDatabase) {
    let app = start(db).await;
    for n in 1..=HANG_UPS {
        let lock = db.lock().await;
        assert!(hang_up(&app, db, &webhook(n)).await, "the query hangs");
        lock.release().await;
        db.eventually("the event is kept", async || db.count("webhook_events").await == n + 1 && db.count("sessions").await == n + 1).await;
        assert_eq!(app.webhook(room_started(n)).await.status, 204, "LiveKit, which got no answer, sends it again");
        assert_eq!(db.count("webhook_events").await, n + 1);
    }
    assert_usable(&app, HANG_UPS + 1).await;
}

pub async fn health_checks_that_are_given_up_in_mid_query_leave_the_server_as_it_was(db: &TestDatabase) {
    let app = start(db).await;
    for n in 0..HANG_UPS {
        let lock = db.lock().await;
        // The one who asks gives up, or the server does, whose own deadline is a second. For a moment an earlier answer is told again.
        if n % 2 == 0 {
            let check = b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n";
            db.eventually("a health check that hangs", async || hang_up(&app, db, check).await).await;
        } else {
            let unhealthy = async || Some(app.get("/health").await).filter(|answer| answer.status == 503);
            let answer = app.eventually("the server is unhealthy", unhealthy).await.json();
            assert!(answer["reasons"][0].as_str().unwrap().contains("database"), "{answer}");
        }
        lock.release().await;
        app.eventually("the server is healthy", async || (app.get("/health").await.status == 200).then_some(())).await;
    }
    assert_usable(&app, 1).await;
}
