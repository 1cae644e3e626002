//! A database of its own for each case, on either engine, and the ways around the store into it.

use std::panic::{AssertUnwindSafe, resume_unwind};
use std::str::FromStr;
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::sqlite::SqliteConnection;
use diesel::{Connection, QueryableByName, RunQueryDsl, sql_query};
use diesel_async::{AsyncConnection, AsyncMigrationHarness, AsyncPgConnection};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};
use futures_util::FutureExt;
use live_meeting::config::DatabaseUrl;
use live_meeting::db::Store;
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::support::machine::say;

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations");
const PATIENCE: Duration = Duration::from_secs(20);

/// Fewer than the cases' simultaneous calls, so that connections are used again.
pub const CONNECTIONS: u32 = 3;

pub struct TestDatabase {
    engine: Engine,
    /// As `DATABASE_URL` takes it.
    pub url: String,
}

enum Engine {
    Sqlite(TempDir),
    Postgres(Box<Client>),
}

pub async fn on_sqlite(case: impl AsyncFnOnce(&TestDatabase)) {
    let dir = TempDir::new().expect("a directory");
    let url = format!("sqlite:{}", dir.path().join("test.db").display());
    case(&TestDatabase { engine: Engine::Sqlite(dir), url }).await;
}

/// Does nothing, and says so, where there is no server; in CI that is a failure.
pub async fn on_postgres(case: impl AsyncFnOnce(&TestDatabase)) {
    let Ok(server_url) = std::env::var("TEST_POSTGRES_URL") else {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "CI must name a PostgreSQL server in TEST_POSTGRES_URL");
        say("skipped: PostgreSQL, as TEST_POSTGRES_URL is not set");
        return;
    };
    let name = format!("live_meeting_test_{}", uuid::Uuid::new_v4().simple());
    let server = connect(&server_url).await;
    server.batch_execute(&format!("CREATE DATABASE {name}")).await.expect("the server lets databases be made");
    let url = with_database(&server_url, &name);
    let db = TestDatabase { engine: Engine::Postgres(Box::new(connect(&url).await)), url };
    let outcome = AssertUnwindSafe(case(&db)).catch_unwind().await;
    server.batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)")).await.expect("dropped");
    if let Err(panic) = outcome {
        resume_unwind(panic);
    }
}

/// The server's URL with another database in it.
fn with_database(url: &str, name: &str) -> String {
    let (base, parameters) = url.split_once('?').map_or((url, String::new()), |(base, parameters)| (base, format!("?{parameters}")));
    let (scheme, rest) = base.split_once("://").expect("a URL");
    let authority = rest.rsplit_once('/').map_or(rest, |(authority, _)| authority);
    format!("{scheme}://{authority}/{name}{parameters}")
}

/// A connection around the store.
pub async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("PostgreSQL answers");
    // It ends with its client, or with its database.
    tokio::spawn(connection.map(drop));
    client
}

#[derive(QueryableByName)]
struct Line {
    #[diesel(sql_type = diesel::sql_types::Text)]
    text: String,
}

impl TestDatabase {
    pub fn database_url(&self) -> DatabaseUrl {
        DatabaseUrl::from_str(&self.url).expect("a database's URL")
    }

    pub async fn store(&self) -> Store {
        Store::open(&self.database_url(), CONNECTIONS).await.expect("the store opens")
    }

    fn sqlite(dir: &TempDir) -> SqliteConnection {
        let mut connection = SqliteConnection::establish(&dir.path().join("test.db").to_string_lossy()).expect("SQLite opens");
        connection.batch_execute("PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = ON").expect("set up");
        connection
    }

    /// Runs SQL behind the store's back.
    pub async fn execute(&self, sql: &str) -> Result<(), String> {
        match &self.engine {
            Engine::Sqlite(dir) => Self::sqlite(dir).batch_execute(sql).map_err(|error| error.to_string()),
            Engine::Postgres(client) => {
                let done = client.batch_execute(sql).await;
                done.map_err(|error| error.as_db_error().map_or_else(|| error.to_string(), |error| error.message().to_owned()))
            }
        }
    }

    /// The rows of a query of one column, which it must name `text`.
    pub async fn texts(&self, sql: &str) -> Vec<String> {
        match &self.engine {
            Engine::Sqlite(dir) => {
                let lines: Vec<Line> = sql_query(sql).load(&mut Self::sqlite(dir)).expect(sql);
                lines.into_iter().map(|line| line.text).collect()
            }
            Engine::Postgres(client) => {
                let messages = client.simple_query(sql).await.expect(sql);
                let row = |message: &SimpleQueryMessage| match message {
                    SimpleQueryMessage::Row(row) => Some(row.get("text").expect("not null").to_owned()),
                    _ => None,
                };
                messages.iter().filter_map(row).collect()
            }
        }
    }

    pub async fn count(&self, table: &str) -> usize {
        self.texts(&format!("SELECT CAST(count(*) AS TEXT) AS text FROM {table}")).await[0].parse().expect("a number")
    }

    pub async fn tables(&self) -> Vec<String> {
        let mut tables = self
            .texts(match &self.engine {
                Engine::Sqlite(_) => "SELECT name AS text FROM sqlite_master WHERE type = 'table'",
                Engine::Postgres(_) => "SELECT tablename AS text FROM pg_tables WHERE schemaname = 'public'",
            })
            .await;
        tables.sort();
        tables
    }

    /// Everything that the migrations make, in the engine's own words.
    pub async fn schema(&self) -> Vec<String> {
        let sql = match &self.engine {
            Engine::Sqlite(_) => "SELECT sql AS text FROM sqlite_master WHERE sql IS NOT NULL",
            Engine::Postgres(_) => {
                "SELECT concat_ws(' ', table_name, column_name, data_type, is_nullable) AS text FROM information_schema.columns
                 WHERE table_schema = 'public'
                 UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
                 UNION ALL SELECT concat_ws(' ', conrelid::regclass, pg_get_constraintdef(oid)) FROM pg_constraint
                 WHERE connamespace = 'public'::regnamespace"
            }
        };
        let mut schema = self.texts(sql).await;
        schema.sort();
        schema
    }

    /// Runs every `down.sql`, and returns how many there were.
    pub fn migrate_down(&self) -> usize {
        match &self.engine {
            Engine::Sqlite(dir) => Self::sqlite(dir).revert_all_migrations(MIGRATIONS).expect("reverted").len(),
            Engine::Postgres(_) => {
                let url = self.url.clone();
                // The harness blocks, which an actix thread must not.
                let reverted = std::thread::spawn(move || {
                    tokio::runtime::Runtime::new().expect("a runtime").block_on(async {
                        let connection = AsyncPgConnection::establish(&url).await.expect("connected");
                        AsyncMigrationHarness::new(connection).revert_all_migrations(MIGRATIONS).expect("reverted").len()
                    })
                });
                reverted.join().expect("reverted")
            }
        }
    }

    /// Keeps everybody else from writing, until it is released. On PostgreSQL from reading sessions too.
    pub async fn lock(&self) -> Lock {
        match &self.engine {
            Engine::Sqlite(dir) => {
                let mut connection = Self::sqlite(dir);
                connection.batch_execute("BEGIN IMMEDIATE").expect("locked");
                Lock::Sqlite(connection)
            }
            Engine::Postgres(_) => {
                let client = connect(&self.url).await;
                client.batch_execute("BEGIN; LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE").await.expect("locked");
                Lock::Postgres(client)
            }
        }
    }

    /// Waits until `condition` holds; fails after 20 s, naming `what`.
    pub async fn eventually(&self, what: &str, mut condition: impl AsyncFnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition().await {
            assert!(Instant::now() < deadline, "{what} did not come true");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

pub enum Lock {
    Sqlite(SqliteConnection),
    Postgres(Client),
}

impl Lock {
    pub async fn release(self) {
        match self {
            Self::Sqlite(mut connection) => connection.batch_execute("ROLLBACK").expect("released"),
            Self::Postgres(client) => client.batch_execute("ROLLBACK").await.expect("released"),
        }
    }
}
