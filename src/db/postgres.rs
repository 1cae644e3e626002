//! The engine for production: PostgreSQL.

use std::time::Duration;

use diesel::pg::Pg;
use diesel_async::pooled_connection::deadpool::{Object, Pool};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager, ManagerConfig};
use diesel_async::{AsyncConnection as _, AsyncMigrationHarness, AsyncPgConnection, SimpleAsyncConnection};
use diesel_migrations::MigrationHarness;
use futures_util::FutureExt;

use super::{DbError, MIGRATIONS, STATEMENT_WAIT};

pub type Connection = AsyncPgConnection;
pub type Backend = Pg;

/// One pool under two names: PostgreSQL needs no writer of its own.
pub struct Pools {
    pub writer: Pool<Connection>,
    pub reader: Pool<Connection>,
}

impl Pools {
    pub fn new(url: &str, connections: u32) -> Result<Self, DbError> {
        let mut config = ManagerConfig::<Connection>::default();
        config.custom_setup = Box::new(|url| async move { establish(url).await }.boxed());
        let manager = AsyncDieselConnectionManager::new_with_config(with_time_outs(url), config);
        let size = usize::try_from(connections).unwrap_or(usize::MAX);
        let pool = Pool::builder(manager).max_size(size).build().map_err(|error| DbError::Connect(error.to_string()))?;
        Ok(Self { writer: pool.clone(), reader: pool })
    }
}

/// A server that vanished without a word is found by the kernel, so that its connections do not fill the pool. What the URL says itself stays.
fn with_time_outs(url: &str) -> String {
    /// In seconds, by the names that tokio-postgres knows.
    const TIME_OUTS: [(&str, u32); 4] = [("connect_timeout", 5), ("tcp_user_timeout", 20), ("keepalives_idle", 20), ("keepalives_interval", 5)];
    TIME_OUTS.iter().filter(|(name, _)| !url.contains(name)).fold(url.to_owned(), |url, (name, seconds)| {
        let joint = if url.contains('?') { '&' } else { '?' };
        format!("{url}{joint}{name}={seconds}")
    })
}

async fn establish(url: &str) -> diesel::ConnectionResult<Connection> {
    let mut connection = Connection::establish(url).await?;
    let settings = format!("SET statement_timeout = {}; SET timezone = 'UTC';", STATEMENT_WAIT.as_millis());
    connection.batch_execute(&settings).await.map_err(diesel::ConnectionError::CouldntSetupConfiguration)?;
    Ok(connection)
}

/// A connection of the pool, or [`DbError::Busy`].
pub async fn connection(pool: &Pool<Connection>, wait: Duration) -> Result<Object<Connection>, DbError> {
    match tokio::time::timeout(wait, pool.get()).await {
        Ok(connection) => connection.map_err(|error| DbError::Connect(error.to_string())),
        Err(_) => Err(DbError::Busy(wait)),
    }
}

/// A connection whose statements take as long as they need: a migration may rewrite a table.
async fn patient(url: &str) -> Result<Connection, DbError> {
    Connection::establish(&with_time_outs(url)).await.map_err(|error| DbError::Connect(error.to_string()))
}

/// Brings the tables up to date. Servers that start at the same time take turns.
pub async fn migrate(url: &str) -> Result<(), DbError> {
    let mut connection = patient(url).await?;
    // An arbitrary number that only this program's migrations lock; freed with the connection.
    connection.batch_execute("SELECT pg_advisory_lock(7203456912)").await?;
    let mut harness = AsyncMigrationHarness::new(connection);
    harness.run_pending_migrations(MIGRATIONS).map(drop).map_err(|error| DbError::Migration(error.to_string()))
}

/// The migrations still to run.
pub async fn pending(url: &str) -> Result<usize, DbError> {
    let mut harness = AsyncMigrationHarness::new(patient(url).await?);
    harness.pending_migrations(MIGRATIONS).map(|pending| pending.len()).map_err(|error| DbError::Migration(error.to_string()))
}

macro_rules! transaction {
    ($connection:expr, $body:expr) => {
        diesel_async::AsyncConnection::transaction($connection, $body).await
    };
}

/// Inserts the rows that are not there yet, and gives the ids of those. A statement is a journey here, so many share one: as many as its 65,535 values allow.
macro_rules! insert_new {
    ($connection:expr, $table:ident, $rows:expr) => {{
        let mut new: Vec<String> = Vec::new();
        for rows in $rows.chunks(1_000) {
            let into = diesel::insert_into($table::table);
            let inserted: Vec<String> = match rows {
                // Its statement is prepared once, those of several rows each time.
                [row] => into.values(row).on_conflict_do_nothing().returning($table::id).load($connection).await?,
                rows => into.values(rows).on_conflict_do_nothing().returning($table::id).load($connection).await?,
            };
            new.extend(inserted);
        }
        new
    }};
}

#[path = "queries/mod.rs"]
pub mod queries;

#[cfg(test)]
mod tests {
    use super::with_time_outs;

    #[test]
    fn what_the_url_says_of_time_outs_stays() {
        let rest = "tcp_user_timeout=20&keepalives_idle=20&keepalives_interval=5";
        assert_eq!(with_time_outs("postgres://a@b/c"), format!("postgres://a@b/c?connect_timeout=5&{rest}"));
        assert_eq!(with_time_outs("postgres://a@b/c?connect_timeout=9"), format!("postgres://a@b/c?connect_timeout=9&{rest}"));
    }
}
