//! Transactions that PostgreSQL ends: victims of deadlocks, of serialization and of people who cancel or terminate. What was acknowledged is in the tables once.

use std::cell::Cell;

use futures_util::future::join_all;
use serde_json::Value;

use super::rows::{connect, segments, written};
use super::webhooks::{deliver, meeting, told};
use super::{assert_no_errors, builder_at, replayed};
use crate::storage_engines::engine::{self, TestDatabase, on_postgres};
use crate::support::egress_peer::counter_pcm;
use crate::support::test_app::TestApp;

/// Longer than it takes another to step into the deadlock, and shorter than the server's patience with a statement.
const DETECTED_AFTER: &str = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET deadlock_timeout = ''3s''', current_database()); END $$";
const DEADLOCKS: &str = "SELECT CAST(deadlocks AS TEXT) AS text FROM pg_stat_database WHERE datname = current_database()";
const WAITING: &str = "SELECT 'waits' AS text FROM pg_locks JOIN pg_database ON pg_database.oid = database
    WHERE NOT granted AND datname = current_database()";

/// What the server does while `act` goes on waits for one table, which another has locked, when that other asks for a table that the server has written before.
/// The server's transaction is the victim: the other is patient.
async fn crosswise<T>(database: &TestDatabase, app: &TestApp, [wanted, written]: [&str; 2], act: impl Future<Output = T>) -> T {
    let other = engine::connect(&database.url).await;
    other.batch_execute("SET deadlock_timeout = '1min'; BEGIN").await.unwrap();
    let lock = async |table: &str| other.batch_execute(&format!("LOCK TABLE {table} IN SHARE MODE")).await;
    lock(wanted).await.unwrap();
    let meeting_in_the_middle = async {
        app.eventually("the server waits for the other", async || database.texts(WAITING).await.first().map(drop)).await;
        lock(written).await.expect("the other is not the victim");
        other.batch_execute("COMMIT").await.unwrap();
    };
    let (done, ()) = tokio::join!(act, meeting_in_the_middle);
    app.eventually("a deadlock", async || (database.texts(DEADLOCKS).await == ["1"]).then_some(())).await;
    replayed(app).await;
    done
}

/// What the server tells of these meetings is what one tells that nothing has disturbed.
async fn assert_as_if_undisturbed(app: &TestApp, database: &TestDatabase, meetings: &[(String, Vec<Value>)]) {
    let (sids, events): (Vec<&str>, Vec<&[Value]>) = meetings.iter().map(|(sid, events)| (sid.as_str(), &events[..])).unzip();
    let undisturbed = TestApp::builder().start().await;
    deliver(&undisturbed, &events.concat()).await;
    assert_eq!(told(app, &sids).await, told(&undisturbed, &sids).await);
    assert_eq!(database.count("webhook_events").await, events.concat().len());
    assert_no_errors(app);
}

fn meetings(prefix: &str, count: usize) -> Vec<(String, Vec<Value>)> {
    let sids = (0..count).map(|number| format!("RM_{prefix}_{number}"));
    sids.map(|sid| (sid.clone(), meeting(&sid))).collect()
}

#[tokio::test]
async fn w6_webhooks_of_a_deadlocks_victim_are_acknowledged_and_applied_once() {
    on_postgres(async |database| {
        database.execute(DETECTED_AFTER).await.unwrap();
        let app = builder_at(&database.url).start().await;
        let meetings = meetings("dead", 1);
        crosswise(database, &app, ["transitions", "webhook_events"], deliver(&app, &meetings[0].1)).await;
        assert_as_if_undisturbed(&app, database, &meetings).await;
    })
    .await;
}

#[tokio::test]
async fn s7_rows_of_a_deadlocks_victim_are_written_once() {
    on_postgres(async |database| {
        database.execute(DETECTED_AFTER).await.unwrap();
        let app = builder_at(&database.url).start().await;
        let pcm = counter_pcm(9_600, 1);
        let act = async {
            let mut peer = connect(&app, "ana").await;
            peer.send_pcm(&pcm).await.unwrap();
            written(&app, "ana", pcm.len()).await;
            peer
        };
        let peer = crosswise(database, &app, ["recordings", "tracks"], act).await;
        peer.close_and_wait().await;
        replayed(&app).await;
        assert!(segments(&app, "ana").await == [("closed".to_owned(), pcm)]);
        assert_eq!((database.count("tracks").await, database.count("segments").await), (1, 1));
        assert_no_errors(&app);
    })
    .await;
}

/// How PostgreSQL ends a transaction that may succeed when it is done again: serialization, deadlock, cancelled, terminated, no more locks.
const ENDS: [&str; 5] = ["40001", "40P01", "57014", "57P01", "53200"];

/// The first transactions that write one of these tables end so, when they write it or when they commit.
async fn end_transactions(database: &TestDatabase, code: &str, when: &str) {
    let mut sql = "DROP FUNCTION IF EXISTS refuse CASCADE; DROP SEQUENCE IF EXISTS asked; CREATE SEQUENCE asked;
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF nextval('asked') <= 4 THEN RAISE EXCEPTION 'ended by a test' USING ERRCODE = TG_ARGV[0]; END IF;
            RETURN NULL;
        END $$;"
        .to_owned();
    for table in ["webhook_events", "transitions", "recordings", "segments"] {
        sql += &format!("CREATE CONSTRAINT TRIGGER refuse AFTER INSERT OR UPDATE ON {table} {when} FOR EACH ROW EXECUTE FUNCTION refuse('{code}');");
    }
    database.execute(&sql).await.unwrap();
}

async fn each_end_costs_nothing(database: &TestDatabase, when: &str) {
    let app = builder_at(&database.url).start().await;
    let mut all = Vec::new();
    for code in ENDS {
        end_transactions(database, code, when).await;
        let (new, pcm) = (meetings(code, 2), counter_pcm(4_800, 1));
        let speaking = async {
            let mut peer = connect(&app, code).await;
            peer.send_pcm(&pcm).await.unwrap();
            peer.close_and_wait().await;
        };
        tokio::join!(speaking, join_all(new.iter().map(|(_, events)| deliver(&app, events))));
        replayed(&app).await;
        assert_eq!(database.texts("SELECT CAST(last_value > 4 AS TEXT) AS text FROM asked").await, ["true"], "{code}");
        assert!(segments(&app, code).await == [("closed".to_owned(), pcm)], "{code}");
        all.extend(new);
    }
    assert_as_if_undisturbed(&app, database, &all).await;
    assert_eq!((database.count("recordings").await, database.count("segments").await), (ENDS.len(), ENDS.len()));
}

#[tokio::test]
async fn s7_w6_what_postgresql_ends_at_a_statement_is_written_once() {
    on_postgres(async |database| each_end_costs_nothing(database, "").await).await;
}

#[tokio::test]
async fn s7_w6_what_postgresql_ends_at_its_commit_is_written_once() {
    on_postgres(async |database| each_end_costs_nothing(database, "DEFERRABLE INITIALLY DEFERRED").await).await;
}

/// Somebody who is in the midst of a transaction that has written something.
async fn end_one(database: &TestDatabase, how: &str) -> Option<()> {
    let writing = "datname = current_database() AND pid <> pg_backend_pid() AND backend_xid IS NOT NULL";
    let sql = format!("SELECT CAST({how}(pid) AS TEXT) AS text FROM pg_stat_activity WHERE {writing} LIMIT 1");
    database.texts(&sql).await.first().map(drop)
}

#[tokio::test]
async fn s7_w6_transactions_that_are_cancelled_or_terminated_under_load_are_done_again_once() {
    on_postgres(async |database| {
        let app = builder_at(&database.url).start().await;
        let pcm = counter_pcm(48_000, 1);
        let (goes_on, rounds) = (Cell::new(true), Cell::new(0));
        let lane = async |lane: usize| {
            let mut all = Vec::new();
            while goes_on.get() {
                let round = meetings(&format!("{lane}_{}", all.len()), 1);
                deliver(&app, &round[0].1).await;
                all.extend(round);
                rounds.set(rounds.get() + 1);
            }
            all
        };
        let speaking = async {
            let mut peer = connect(&app, "ana").await;
            for piece in pcm.chunks(pcm.len() / 4) {
                peer.send_pcm(piece).await.unwrap();
                peer.mute(true).await.unwrap();
                peer.mute(false).await.unwrap();
            }
            peer.close_and_wait().await;
        };
        let ending = async {
            for how in ["pg_cancel_backend", "pg_terminate_backend"].repeat(3) {
                app.eventually(how, async || end_one(database, how).await).await;
            }
            goes_on.set(false);
        };
        let (all, (), ()) = tokio::join!(join_all((0..4).map(lane)), speaking, ending);
        replayed(&app).await;
        assert!(segments(&app, "ana").await == [("closed".to_owned(), pcm)]);
        assert_as_if_undisturbed(&app, database, &all.concat()).await;
    })
    .await;
}
