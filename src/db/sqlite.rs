//! The embedded engine: bundled SQLite, one writer and a few readers over a WAL.

use std::path::Path;
use std::time::Duration;

use diesel::prelude::Connection as _;
use diesel::sqlite::{Sqlite, SqliteConnection};
use diesel_async::SimpleAsyncConnection;
use diesel_async::pooled_connection::deadpool::{Object, Pool};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager, ManagerConfig};
use diesel_async::sync_connection_wrapper::SyncConnectionWrapper;
use diesel_migrations::MigrationHarness;
use futures_util::FutureExt;

use super::{DbError, MIGRATIONS, STATEMENT_WAIT, make_parent};

pub type Connection = SyncConnectionWrapper<SqliteConnection>;
pub type Backend = Sqlite;

/// Readers in the pool; SQLite's WAL lets them go on beside the writer.
const READERS: usize = 4;

/// One writer, so that writers queue here rather than in SQLite's busy loop.
pub struct Pools {
    pub writer: Pool<Connection>,
    pub reader: Pool<Connection>,
}

impl Pools {
    pub fn new(path: &Path) -> Result<Self, DbError> {
        Ok(Self { writer: pool(path, 1)?, reader: pool(path, READERS)? })
    }
}

fn pool(path: &Path, size: usize) -> Result<Pool<Connection>, DbError> {
    let mut config = ManagerConfig::<Connection>::default();
    config.custom_setup = Box::new(|url| {
        async move {
            let mut connection = <Connection as diesel_async::AsyncConnection>::establish(url).await?;
            connection.batch_execute(&pragmas()).await.map_err(diesel::ConnectionError::CouldntSetupConfiguration)?;
            Ok(connection)
        }
        .boxed()
    });
    let manager = AsyncDieselConnectionManager::new_with_config(path.to_string_lossy(), config);
    Pool::builder(manager).max_size(size).build().map_err(|error| DbError::Connect(error.to_string()))
}

/// FULL, so that a commit survives power loss: webhooks are acknowledged by it.
fn pragmas() -> String {
    format!("PRAGMA busy_timeout = {}; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;", STATEMENT_WAIT.as_millis())
}

/// A connection of the pool, or [`DbError::Busy`].
pub async fn connection(pool: &Pool<Connection>, wait: Duration) -> Result<Object<Connection>, DbError> {
    match tokio::time::timeout(wait, pool.get()).await {
        Ok(connection) => connection.map_err(|error| DbError::Connect(error.to_string())),
        Err(_) => Err(DbError::Busy(wait)),
    }
}

fn establish(path: &Path) -> Result<SqliteConnection, DbError> {
    let mut connection = SqliteConnection::establish(&path.to_string_lossy()).map_err(|error| DbError::Connect(error.to_string()))?;
    diesel::connection::SimpleConnection::batch_execute(&mut connection, &pragmas())?;
    Ok(connection)
}

/// Brings the tables up to date, making the file if need be. Servers that start at the same time take turns.
pub async fn migrate(path: &Path) -> Result<(), DbError> {
    make_parent(path)?;
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || {
        let mut connection = establish(&path)?;
        connection.immediate_transaction(|connection| {
            connection.run_pending_migrations(MIGRATIONS).map(drop).map_err(|error| DbError::Migration(error.to_string()))
        })
    })
    .await?
}

/// The migrations still to run; all of them where there is no file yet.
pub async fn pending(path: &Path) -> Result<usize, DbError> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || {
        let mut connection = if path.exists() {
            establish(&path)?
        } else {
            SqliteConnection::establish(":memory:").map_err(|error| DbError::Connect(error.to_string()))?
        };
        connection.pending_migrations(MIGRATIONS).map(|pending| pending.len()).map_err(|error| DbError::Migration(error.to_string()))
    })
    .await?
}

/// A transaction that takes the write lock at once: one that reads first and writes later could fail half-way, past any busy timeout.
macro_rules! transaction {
    ($connection:expr, $body:expr) => {
        $connection.immediate_transaction($body).await
    };
}

/// Inserts the rows that are not there yet, and gives the ids of those. A statement is a call here, so each row has its own.
macro_rules! insert_new {
    ($connection:expr, $table:ident, $rows:expr) => {{
        let mut new: Vec<String> = Vec::new();
        for row in $rows {
            let insert = diesel::insert_into($table::table).values(row).on_conflict_do_nothing().returning($table::id);
            new.extend(insert.get_result($connection).await.optional()?);
        }
        new
    }};
}

#[path = "queries/mod.rs"]
pub mod queries;
