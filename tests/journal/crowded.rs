//! PostgreSQL that lets almost nobody in: its `max_connections` are taken by others.

use futures_util::future::join_all;
use serde_json::Value;
use tokio_postgres::{Client, NoTls};

use super::databases::{Database, Fault};
use super::rows::{connect, segments};
use super::webhooks::{deliver, meeting, told};
use super::{Starting, assert_no_errors, builder, replayed, waiting};
use crate::storage_engines::engine;
use crate::support::egress_peer::counter_pcm;
use crate::support::test_app::TestApp;

/// The server's own four, as its pool would like them, and one more.
const MAX_CONNECTIONS: usize = 5;
const REFUSED: &str = "sorry, too many clients already";
const PEOPLE: [&str; 3] = ["ana", "ben", "eve"];

/// Connections of others.
struct Crowd {
    url: String,
    seats: Vec<Client>,
}

impl Crowd {
    /// Of a server of its own that lets in [`MAX_CONNECTIONS`]. `None` where there is no PostgreSQL.
    async fn of(size: usize) -> Option<(Database, Self)> {
        let mut database = Database::postgres(Fault::Killed)?;
        database.restart_with(&format!("max_connections = {MAX_CONNECTIONS}\nsuperuser_reserved_connections = 0\n"));
        let url = format!("{}?application_name=seat", database.url);
        let mut seats = Vec::new();
        for _ in 0..size {
            seats.push(engine::connect(&url).await);
        }
        Some((database, Self { url, seats }))
    }

    /// Takes the seats of the server, too.
    async fn take_all(&mut self, app: &TestApp) {
        const REST: &str =
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name <> 'seat'";
        while self.seats.len() < MAX_CONNECTIONS {
            let (first, url) = (&self.seats[0], &self.url);
            let seat = app.eventually("a seat", async || {
                first.batch_execute(REST).await.unwrap();
                let (client, connection) = tokio_postgres::connect(url, NoTls).await.ok()?;
                tokio::spawn(connection);
                Some(client)
            });
            let seat = seat.await;
            self.seats.push(seat);
        }
    }

    /// Everybody leaves but one, who looks into the database: with that one, PostgreSQL lets in as many as there may be.
    async fn leave(mut self, app: &TestApp) -> Client {
        let one = self.seats.swap_remove(0);
        drop(self.seats);
        let seats = "SELECT pid FROM pg_stat_activity WHERE application_name = 'seat'";
        app.eventually("the others are gone", async || (one.query(seats, &[]).await.unwrap().len() == 1).then_some(())).await;
        one
    }
}

/// Everybody speaks, while meetings take place. All of it is taken.
async fn work(app: &TestApp, name: &str) -> (Vec<u8>, Vec<(String, Vec<Value>)>) {
    let pcm = counter_pcm(9_600, 1);
    let speaking = async |person: &&str| {
        let mut peer = connect(app, &format!("{person}-{name}")).await;
        peer.send_pcm(&pcm).await.unwrap();
        peer.close_and_wait().await;
    };
    let sids = (0..8).map(|number| format!("RM_{name}_{number}"));
    let meetings: Vec<_> = sids.map(|sid| (sid.clone(), meeting(&sid))).collect();
    tokio::join!(join_all(PEOPLE.iter().map(speaking)), join_all(meetings.iter().map(|(_, events)| deliver(app, events))));
    (pcm, meetings)
}

async fn assert_all_is_there_once(app: &TestApp, database: &Client, name: &str, (pcm, meetings): (Vec<u8>, Vec<(String, Vec<Value>)>)) {
    for person in PEOPLE {
        assert!(segments(app, &format!("{person}-{name}")).await == [("closed".to_owned(), pcm.clone())], "{person}");
    }
    let (sids, events): (Vec<&str>, Vec<&[Value]>) = meetings.iter().map(|(sid, events)| (sid.as_str(), &events[..])).unzip();
    let undisturbed = TestApp::builder().start().await;
    deliver(&undisturbed, &events.concat()).await;
    assert_eq!(told(app, &sids).await, told(&undisturbed, &sids).await);
    let rows = async |table: &str| {
        let row = database.query_one(&format!("SELECT count(*) FROM {table}"), &[]).await.unwrap();
        row.get::<_, i64>(0) as usize
    };
    assert_eq!(rows("webhook_events").await, events.concat().len());
    assert_eq!((rows("recordings").await, rows("segments").await), (PEOPLE.len(), PEOPLE.len()));
    assert_no_errors(app);
}

#[tokio::test]
async fn s7_w6_a_server_that_gets_two_connections_takes_all_and_writes_it_once() {
    let Some((database, crowd)) = Crowd::of(MAX_CONNECTIONS - 2).await else { return };
    let app = builder(&database).start().await;
    let work = work(&app, "two").await;
    // Two are enough for all that waits.
    replayed(&app).await;
    assert!(database.postgres_log().contains(REFUSED), "it wanted more: {}", database.postgres_log());
    let one = crowd.leave(&app).await;
    replayed(&app).await;
    assert_all_is_there_once(&app, &one, "two", work).await;
}

#[tokio::test]
async fn s7_w6_a_server_that_gets_no_connection_any_more_loses_nothing_until_it_does() {
    let Some((database, mut crowd)) = Crowd::of(MAX_CONNECTIONS - 2).await else { return };
    let app = builder(&database).start().await;
    crowd.take_all(&app).await;
    let work = work(&app, "none").await;
    let answer = app.get("/api/v1/recordings").await;
    answer.assert_problem(503, "databaseUnavailable");
    assert!(answer.header("retry-after").is_some() && waiting(&app).await.is_some(), "{answer:?}");
    let one = crowd.leave(&app).await;
    replayed(&app).await;
    assert_all_is_there_once(&app, &one, "none", work).await;
}

#[tokio::test]
async fn s7_a_start_that_gets_no_connection_waits_for_one() {
    let Some((database, crowd)) = Crowd::of(MAX_CONNECTIONS).await else { return };
    let dir = tempfile::TempDir::new().unwrap();
    let mut starting = Starting::new(dir.path(), &database.url);
    starting.says("the start waits for it").await;
    drop(crowd);
    starting.says("listening address=").await;
    starting.child.kill().await.unwrap();
}
