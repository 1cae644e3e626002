//! Opening, migrations, constraints, and a database that does not answer.

use futures_util::future::{Either, join_all, select};
use live_meeting::db::rows::EndReason;
use live_meeting::db::rows::events::Applied;
use live_meeting::db::{DbError, Store};

use super::engine::TestDatabase;
use super::fixtures::{closed, deliver, open_recording, open_segment, started};

/// Folders of `migrations`.
const MIGRATIONS: usize = 4;

pub async fn opening_makes_the_tables_and_can_be_repeated(db: &TestDatabase) {
    assert_eq!(Store::pending_migrations(&db.database_url()).await.unwrap(), MIGRATIONS);
    let first = started("RM_1", "room", 0);
    {
        let store = db.store().await;
        assert!(matches!(deliver(&store, first.clone()).await, Applied::Kept(Some(_))));
    }
    assert_eq!(Store::pending_migrations(&db.database_url()).await.unwrap(), 0);
    let tables = db.tables().await;
    for table in
        ["egresses", "measurements", "participants", "recordings", "segments", "servers", "sessions", "tracks", "transitions", "webhook_events"]
    {
        assert!(tables.iter().any(|name| name == table), "{table} is not in {tables:?}");
    }
    let store = db.store().await;
    assert_eq!(deliver(&store, first).await, Applied::Repeated, "opening again forgets nothing");
}

pub async fn servers_that_start_together_take_turns_to_migrate(db: &TestDatabase) {
    // What an earlier version left behind: a database without the newest tables.
    drop(db.store().await);
    assert_eq!(db.migrate_down(), MIGRATIONS);
    let url = db.database_url();
    for opened in join_all((0..4).map(|_| Store::open(&url, 1))).await {
        opened.expect("opened").probe().await.expect("usable");
    }
}

pub async fn migrations_go_down_and_up_again(db: &TestDatabase) {
    {
        // Rows that refer to each other must not keep the tables from going.
        let store = db.store().await;
        deliver(&store, started("RM_1", "room", 0)).await;
        let recording = open_recording(&store, "RM_1", "room", 1).await;
        open_segment(&store, &recording, 1).await;
    }
    let before = db.schema().await;
    assert!(before.len() > 7, "{before:?}");
    assert_eq!(db.migrate_down(), MIGRATIONS);
    assert_eq!(db.tables().await, ["__diesel_schema_migrations"]);
    assert_eq!(Store::pending_migrations(&db.database_url()).await.unwrap(), MIGRATIONS);
    let store = db.store().await;
    assert_eq!(db.schema().await, before);
    deliver(&store, started("RM_1", "room", 0)).await;
    assert_eq!(db.count("sessions").await, 1, "the tables are new and usable");
}

pub async fn a_word_the_tables_do_not_know_is_refused(db: &TestDatabase) {
    let store = db.store().await;
    deliver(&store, started("RM_1", "room", 0)).await;
    let recording = open_recording(&store, "RM_1", "room", 1).await;
    let segment = open_segment(&store, &recording, 1).await;
    let updates = [("sessions", "status", "PAUSED", "ENDED"), ("segments", "format", "mp3", "wav"), ("segments", "end_reason", "bored", "idle")];
    for (table, column, unknown, known) in updates {
        let refusal = db.execute(&format!("UPDATE {table} SET {column} = '{unknown}'")).await.expect_err(unknown);
        assert!(refusal.to_lowercase().contains("check constraint"), "{refusal}");
        db.execute(&format!("UPDATE {table} SET {column} = '{known}'")).await.expect(known);
    }
    // Every word the server has is one the tables know.
    use EndReason::{Closed, Crashed, Failed, Gap, Idle, Lost, Rotated, Shutdown, Superseded, TicketSpent, Violation};
    for reason in [Closed, Lost, Idle, Superseded, Shutdown, Rotated, Gap, Violation, TicketSpent, Failed, Crashed] {
        let other = open_segment(&store, &recording, 2).await;
        store.close_segment(closed(&other, 3, reason)).await.unwrap();
        assert_eq!(store.segment(other).await.unwrap().unwrap().end_reason.as_deref(), Some(reason.as_str()));
    }
    assert_eq!(store.segment(segment).await.unwrap().unwrap().format, "wav");
}

pub async fn the_database_takes_writes_unless_another_holds_the_write_lock(db: &TestDatabase) {
    let store = db.store().await;
    store.probe().await.expect("it takes writes");
    let lock = db.lock().await;
    let error = store.probe().await.expect_err("it takes none");
    assert!(matches!(&error, DbError::Query(_)) && error.is_retryable(), "{error:?}");
    lock.release().await;
    store.probe().await.expect("it takes writes again");
}

pub async fn whoever_gets_no_connection_in_time_is_told_that_it_is_busy(db: &TestDatabase) {
    let store = Store::open(&db.database_url(), 1).await.unwrap();
    store.probe().await.unwrap();
    let lock = db.lock().await;
    let (one, other) = (Box::pin(store.probe()), Box::pin(store.probe()));
    let (refused, rest) = match select(one, other).await {
        Either::Left(done) => done,
        Either::Right(done) => done,
    };
    assert!(matches!(&refused, Err(error @ DbError::Busy(_)) if error.is_retryable()), "{refused:?}");
    lock.release().await;
    drop(rest);
    assert!(matches!(deliver(&store, started("RM_3", "room", 0)).await, Applied::Kept(Some(_))), "the connection comes back");
}
